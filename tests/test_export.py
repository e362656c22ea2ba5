"""ONNX files of every model answer as the models do, for any batch, with and without padding, and say what they are."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pftsleep.errors import ConfigError, ModelError
from pftsleep.models.aar import BoutClassifier, BoutClassifierConfig, BoutCNN, BoutCNNConfig
from pftsleep.models.clinical_heads import ClinicalStaging, ClinicalStagingConfig, Diagnosis, DiagnosisConfig
from pftsleep.models.head_parts import Head, HeadConfig
from pftsleep.models.heads import LinearProbe
from pftsleep.models.pat import PAT, ClassifierConfig, WeekClassifier, published_form
from pftsleep.models.set_transformer import SetConfig, SetTransformer
from pftsleep.models.sleepfm import SleepFMConfig, SleepFMEncoder
from pftsleep.models.stager import weights_hash
from pftsleep.models.transformer import PatchConfig, PatchTransformer

pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
from pftsleep.models.export import TOLERANCE, OnnxModel, differences, export_onnx, graph_of

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
TINY = dict(d_model=16, d_ff=32)
SMALL = dict(d_model=32, d_ff=64, n_layers=2, max_patches=10)
SETS = dict(d_model=32, d_ff=64, n_layers=1, n_heads=4, pooling_heads=4, window=4)
THREE = ("a", "b", "c"), ("BAS", "BAS", "EKG")
CLINICAL = dict(d_model=32, d_ff=64, hidden=8)
head = lambda preset, **changes: Head(HeadConfig.preset(preset, ("a", "b"), 16, 6., **changes))

QUICK = {"PAT-S": (lambda: PatchTransformer(published_form(PAT.S)), None), "PFTSleep": (lambda: PatchTransformer(PatchConfig.pftsleep(**SMALL)), None), "GRU probe": (lambda: head("gru", hidden=8), 23)}
SLOW = {
    "PAT-M": (lambda: PatchTransformer(published_form(PAT.M)), None), "PAT-L": (lambda: PatchTransformer(published_form(PAT.L)), None), "PAT-S, ours": (lambda: PatchTransformer(PAT.S), None),
    "PAT-Conv-S": (lambda: PatchTransformer(PAT.conv_S), None), "PAT-Conv-L": (lambda: PatchTransformer(published_form(PAT.conv_L)), None), "PAT, other length": (lambda: PatchTransformer(PAT.S), 1445),
    "week classifier": (lambda: WeekClassifier(ClassifierConfig(PAT.S)), None), "PFTSleep, corrected": (lambda: PatchTransformer(PatchConfig.pftsleep(**SMALL, upstream=False)), None),
    "our preset": (lambda: PatchTransformer(PatchConfig.tiny(("EEG", "EOG"), **TINY)), 3000), "our preset, ragged": (lambda: PatchTransformer(PatchConfig.tiny(("EEG",), **TINY)), 3001),
    "SleepFM 2024": (lambda: SleepFMEncoder(SleepFMConfig.published("respiratory")), None), "SleepFM, corrected": (lambda: SleepFMEncoder(SleepFMConfig(("a", "b"), d_model=32)), 2 * 7680),
    "SleepFM-clinical": (lambda: SetTransformer(SetConfig(*THREE, upstream=True, **SETS)), 640 * 6), "SleepFM-clinical, corrected": (lambda: SetTransformer(SetConfig(*THREE, **SETS)), 640 * 6 + 10),
    "clinical staging": (lambda: ClinicalStaging(ClinicalStagingConfig(**CLINICAL, upstream=True)), 20), "clinical staging, corrected": (lambda: ClinicalStaging(ClinicalStagingConfig(**CLINICAL)), 20),
    "diagnosis": (lambda: Diagnosis(DiagnosisConfig(**CLINICAL, n_labels=7, upstream=True)), 20), "diagnosis, corrected": (lambda: Diagnosis(DiagnosisConfig(**CLINICAL, n_labels=7, n_demographics=0)), 20),
    "AAR": (lambda: PatchTransformer(PatchConfig.aar()), None), "AAR, conv": (lambda: PatchTransformer(PatchConfig.aar(True)), 990),
    "bouts, last": (lambda: BoutClassifier(BoutClassifierConfig(PatchConfig.aar(), THREE[0])), None), "bouts, attention": (lambda: BoutClassifier(BoutClassifierConfig(PatchConfig.aar(), THREE[0], "attention")), None),
    "bout CNN": (lambda: BoutCNN(BoutCNNConfig(("a", "b"))), 200), "linear probe": (lambda: LinearProbe.of(PatchTransformer(PatchConfig.tiny(("a", "b"), **TINY))), 23),
    "attention pool": (lambda: head("attention_pool"), 23), "MLP": (lambda: head("mlp", hidden=8), 23), "transformer probe": (lambda: head("transformer", hidden=16), 23),
    "LSTM probe": (lambda: head("gru", temporal="lstm", hidden=8, n_layers=2), 23), "published probe": (lambda: head("pftsleep", hidden=16), 23), "convolution, vote": (lambda: head("linear", mixer="none", temporal="conv", pool="vote", hidden=8), 23)}


def lived_in(model: nn.Module) -> nn.Module:
    "Statistics as after training, or batch normalisation would do nothing."
    for name, b in model.named_buffers():
        if name.endswith("running_mean"): b.normal_(0, .1)
        if name.endswith("running_var"): b.uniform_(.5, 1.5)
    return model.eval()


def agrees(name: str, kinds: dict, folder: Path) -> tuple[nn.Module, OnnxModel]:
    torch.manual_seed(0)
    make, length = kinds[name]
    model = lived_in(make())
    file = export_onnx(model, folder / "m.onnx", length)
    found = differences(graph_of(model, length), file, (1, 2, 3, 7), seed=11)
    assert max(found.values()) < TOLERANCE, found
    assert file.metadata["weights"] == weights_hash(model)
    return model, file


@pytest.mark.parametrize("name", QUICK)
def test_a_file_answers_as_its_model(name, tmp_path):
    _, file = agrees(name, QUICK, tmp_path)
    proto = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(proto)
    kinds = {i.type.tensor_type.elem_type for i in [*proto.graph.input, *proto.graph.output]} | {t.data_type for t in proto.graph.initializer}
    assert onnx.TensorProto.DOUBLE not in kinds and onnx.TensorProto.FLOAT16 not in kinds
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    data = (tmp_path / "m.onnx").read_bytes()
    assert str(ROOT).encode() not in data and str(Path.home()).encode() + b"/" not in data and b"site-packages" not in data, "a path of this machine"
    assert {"model", "weights", "recipe_hash", "inputs", "units", "licence", "use"} <= file.metadata.keys()
    if name == "GRU probe":
        counts = [n.op_type for n in proto.graph.node]
        assert counts.count("GRU") == 2 and len(counts) < 200 and "Loop" not in counts # one for each direction, nothing unrolled


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_file_of_any_other_model_does_too(name, tmp_path): agrees(name, SLOW, tmp_path)


def test_a_fine_tuned_model_and_its_scaler(tmp_path):
    pytest.importorskip("lightning")
    from pftsleep.training.finetune import TaskHead, TaskHeadConfig, TaskModel
    config = PatchConfig(("Activity",), 1 / 60, 18, d_model=8, d_ff=16, n_layers=1, n_heads=2, instance_norm=False, embedding="shared", position="none")
    task = TaskModel(PatchTransformer(config), TaskHead(TaskHeadConfig(8, 3, 4)), ("no", "mild", "severe")).eval()
    file = export_onnx(task, tmp_path / "task.onnx", 180)
    x = np.random.default_rng(0).standard_normal((4, 1, 180)).astype("f4")
    with torch.inference_mode(): np.testing.assert_allclose(file(x)["logits"], task(torch.from_numpy(x)).numpy(), atol=TOLERANCE)
    assert json.loads(file.metadata["classes"]) == ["no", "mild", "severe"]


def test_what_can_not_be_exported_is_refused_before_anything_is_written(tmp_path):
    tiny = PatchTransformer(PatchConfig.tiny(**TINY))
    with pytest.raises(ConfigError, match="length"): export_onnx(tiny, tmp_path / "a.onnx")
    with pytest.raises(ConfigError, match="bfloat16"): export_onnx(tiny.bfloat16(), tmp_path / "a.onnx", 600)
    with pytest.raises(ConfigError, match="can't be exported"): export_onnx(nn.Linear(1, 1), tmp_path / "a.onnx", 600)
    with pytest.raises(ModelError, match="no ONNX file"): OnnxModel(tmp_path / "absent.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_answers_otherwise_is_never_written(tmp_path, monkeypatch):
    from pftsleep.models import export
    honest = export.tokens_in_graph
    monkeypatch.setattr(export, "tokens_in_graph", lambda *a: (t := honest(*a))._replace(values=t.values * 1.001))
    with pytest.raises(ModelError, match="off by"): export_onnx(PatchTransformer(PatchConfig.tiny(**TINY)), tmp_path / "a.onnx", 600)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_published_files(tmp_path):
    "The original weights' forms, with random numbers, from ../shared/fixtures."
    if not (SHARED / "fixtures").exists(): pytest.skip("../shared/fixtures is absent")
    from pftsleep.models.weights import load_published
    tried = 0
    for path in sorted((SHARED / "fixtures").rglob("*weights*.h5"))[:3]:
        try: model = load_published(path)
        except ModelError: continue
        model = getattr(model, "encoder", model) # of a masked autoencoder, what a graph can hold
        file = export_onnx(model, tmp_path / "m.onnx")
        assert "CC BY 4.0" in file.metadata["licence"]
        tried += 1
    if not tried: pytest.skip("no published file of PAT in ../shared/fixtures")


def test_the_file_runs_without_torch(tmp_path):
    export_onnx(PatchTransformer(PatchConfig.tiny(**TINY)).eval(), tmp_path / "a.onnx", 600)
    code = ("import sys, numpy as np, onnxruntime as o\ns = o.InferenceSession(sys.argv[1])\nr = s.run(None, {'signals': np.zeros((5, 1, 600), 'f4'), 'padding': np.zeros((5, 1, 600), bool)})\n"
        "assert r[0].shape[:2] == (5, 1) and 'torch' not in sys.modules and 'pftsleep' not in sys.modules")
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.onnx"], check=True, cwd=tmp_path)
