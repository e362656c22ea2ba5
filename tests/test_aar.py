"""The animal-activity model: the original's numbers, and a test for each of its defects that concern model and training (reference aar.md, section 8)."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pftsleep.errors import ConfigError, ModelError, PFTSleepError, ReadError, SplitError
from pftsleep.models.aar import BoutAutoencoder, BoutClassifier, BoutClassifierConfig, BoutCNN, BoutCNNConfig, aar_config, hide, published_tensors, reconstruction_loss, stretched
from pftsleep.models.transformer import PatchTransformer, n_parameters
from pftsleep.models.weights import load_published
from pftsleep.training.bouts import Bouts, Part, PretrainBouts, TuneBouts, balance, filling_losses, let_rest, noam, pretrain_bouts, say, tune_bouts
from pftsleep.training.cross_validation import UNKNOWN_SUBJECTS, activity_metrics, convolving, cross_validate, finetune_arrays, foresting, nested_folds, pretrain_arrays, pretraining, tuning
from pftsleep.training.runs import one_thread, weights_hash

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
FIXTURES, STORKS = SHARED / "fixtures/aar", SHARED / "realdata/accelerometer_animal/whitestork_acc.rda"
fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="../shared/fixtures is not here")
EMBEDDINGS = pytest.mark.parametrize("embedding", ["linear", "conv"])
SMALL = dict(d_embedding=64, n_layers=1, patch_size=10, window=50)


def herd(n=60, animals=6, seed=0, length=50) -> Bouts:
    "Three behaviours of different rhythm; every tenth bout is half as long."
    rng, t = np.random.default_rng(seed), np.arange(length) / 25
    label = np.arange(n) % 3
    x = np.array([0, .5, 1])[label, None] * np.sin(2 * np.pi * (np.array([0, 2, 4])[label, None] * t + rng.random((n, 1))))
    x = np.stack([x, .5 * x, 1 + x], 1) + .1 * rng.standard_normal((n, 3, length))
    x[::10, :, length // 2:] = np.nan
    return Bouts(x, label, ("a", "b", "c"), subjects=np.array([f"s{k}" for k in rng.permutation(np.arange(n) % animals)]))


def close(ours, theirs, most): assert float(np.abs(np.asarray(ours.detach() if isinstance(ours, torch.Tensor) else ours) - theirs).max()) <= most


# ---- as the original ----

@fixtures
@EMBEDDINGS
def test_published_files_give_the_original_numbers(embedding):
    z, path = np.load(FIXTURES / f"aar_{embedding}_multi.npz"), FIXTURES / f"aar_{embedding}_multi.pt"
    x, mask = torch.from_numpy(z["X"]), torch.from_numpy(z["mask"])
    m, whole = load_published(path), load_published(path, part="pretraining")
    assert not m.training and m.config.upstream and m.provenance["format"] == "AAR"
    with torch.no_grad():
        close(m(x), z["z_unmasked_input"], 1e-5)
        patches, _, real = whole.cut(x)
        guess = whole(patches, None, mask)
        close(guess, z["recon"], 1e-5)
        for weight, name in ((0., "loss_masked"), (1e-4, "loss_w1e4")): close(reconstruction_loss(guess, patches, mask, real, weight), z[name], 1e-4)


@fixtures
def test_gradients_equal_the_original():
    z = np.load(FIXTURES / "aar_linear_multi.npz")
    m, mask = load_published(FIXTURES / "aar_linear_multi.pt", part="pretraining"), torch.from_numpy(z["mask"])
    patches, _, real = m.cut(torch.from_numpy(z["X"]))
    reconstruction_loss(m(patches, None, mask), patches, mask, real, 1e-4).backward()
    names = {"self_supervised_head.weight_matrix.weight": m.decoder.decoder.weight, "transformer.embedding.layer.weight": m.encoder.embedding.weight, "transformer.positional_encoding.positional_encoding": m.encoder.positions,
        "transformer.transformer.layers.0.self_attn.out_proj.weight": m.encoder.blocks[0].attention.out.weight, "transformer.transformer.norm.bias": m.encoder.norm.bias}
    for name, p in names.items(): close(p.grad, z[f"grad/{name}"].reshape(p.shape), 1e-5)


@fixtures
def test_a_published_classifier_gives_the_original_logits():
    z = np.load(FIXTURES / "aar_linear_multi.npz")
    m = load_published(FIXTURES / "aar_cls_linear_multi.pt")
    assert isinstance(m, BoutClassifier) and m.config.pool == "last"
    with torch.no_grad(): close(m(torch.from_numpy(z["X"])), z["logits_avgpool0"], 1e-5)


@fixtures
def test_masks_and_rates_equal_the_original():
    z = np.load(FIXTURES / "aar_noam_mask.npz")
    for name in z.files:
        if name.startswith("mask_"): assert (hide(torch.from_numpy(z["noise"]), float(name[5:])).numpy() == z[name]).all(), name
    np.testing.assert_allclose([noam(int(t)) for t in z["steps"]], z["lr"], rtol=1e-9)


@fixtures
def test_names_and_shapes_are_the_published_ones():
    known = json.loads((FIXTURES / "aar_keys.json").read_text())
    shapes = lambda s: {k: list(v.shape) for k, v in s.items()}
    for embedding in ("linear", "conv"):
        layers = len({k.split(".")[3] for k in known[f"ssl_{embedding}"] if ".layers." in k and "conv_layers" not in k})
        c = aar_config(n_layers=layers, embedding_type=embedding)
        assert shapes(published_tensors(BoutAutoencoder(c))) == {k: list(v) for k, v in dict(known[f"ssl_{embedding}"]).items()}
        head = dict(known[f"cls_{embedding}_multi"])
        assert shapes(published_tensors(BoutClassifier(BoutClassifierConfig(c, tuple("abcdef"))))) == {k: list(v) for k, v in head.items()}
    assert shapes(BoutCNN(BoutCNNConfig(tuple("abcdef"))).state_dict()) == {k: list(v) for k, v in dict(known["cnn"]).items()}


@pytest.mark.parametrize("make", [lambda: BoutAutoencoder(aar_config(64, 2, embedding_type="conv")), lambda: BoutClassifier(BoutClassifierConfig(aar_config(64, 2), ("a", "b"), "mean")),
    lambda: BoutClassifier(BoutClassifierConfig(aar_config(64, 1, input_mode="single"), ("a", "b")))], ids=["pretrained", "mean", "single"])
def test_what_we_write_under_published_names_loads_again(make, tmp_path):
    m = make().eval()
    torch.save(published_tensors(m), tmp_path / "model.pt")
    again = load_published(tmp_path / "model.pt", upstream=False)
    x = torch.randn(2, len(m.encoder.config.channels), 1000)
    assert torch.equal(again(x), m.encoder(x) if isinstance(m, BoutAutoencoder) else m(x))


# ---- defect 1: NaN reach the network ----

@pytest.mark.parametrize("make", [lambda: BoutClassifier(BoutClassifierConfig(aar_config(**SMALL), ("a", "b", "c"))), lambda: BoutCNN(BoutCNNConfig.for_window(("a", "b", "c"), 50))], ids=["transformer", "cnn"])
def test_padding_never_reaches_the_network_and_other_nan_are_refused(make):
    m, b = make().eval(), herd()
    x, pad = torch.from_numpy(b.values), torch.from_numpy(b.pad)
    with torch.no_grad():
        want = m(x, pad)
        assert want.isfinite().all()
        for junk in (torch.nan, 1e6): torch.testing.assert_close(m(x.masked_fill(pad[:, None], junk), pad), want)
        with pytest.raises(ModelError, match="NaN"): m(x.masked_fill(pad[:, None], torch.nan))


def test_labels_outside_the_classes_are_refused(tmp_path):
    b = herd()
    unlabelled = Bouts(b.values, np.where(np.arange(60) == 3, -1, b.label), b.names, b.pad)
    with pytest.raises(ConfigError, match="1 without a label"): tune_bouts(aar_config(**SMALL), unlabelled, b, tmp_path)
    with pytest.raises(SplitError, match="without a label"): nested_folds(unlabelled.label, None)


# ---- defect 2: average pooling raises; dropout is ignored; 0 unlocked layers mean the opposite ----

@pytest.mark.parametrize("pool", ["last", "mean", "attention"])
@pytest.mark.parametrize("mode", ["multi", "single"])
def test_every_pool_works_in_both_modes(pool, mode):
    m = BoutClassifier(BoutClassifierConfig(aar_config(**SMALL, input_mode=mode), ("a", "b"), pool, dropout=.3))
    out = m(torch.randn(4, 3, 50))
    out.sum().backward()
    assert out.shape == (4, 2) and m.head[0].p == .3 and m.head[1].in_features == 64 * (3 if mode == "multi" else 1)


def test_freezing_as_the_seed_says():
    m = BoutClassifier(BoutClassifierConfig(aar_config(64, 3, embedding_type="conv"), ("a", "b")))
    trained = lambda **how: {n for n, p in let_rest(m, **how).encoder.named_parameters() if p.requires_grad}
    assert trained() == {n for n, _ in m.encoder.named_parameters()}
    assert {n.split(".")[1] for n in trained(unlocked_layers=1)} == {"2"} and all(n.startswith("blocks.") for n in trained(unlocked_layers=1))
    assert trained(freeze_backbone=True) == set()
    m.train()
    assert not m.encoder.training and m.head.training # no dropout where nothing is trained


@EMBEDDINGS
def test_a_frozen_encoder_is_byte_identical_afterwards(embedding, tmp_path):
    encoder = PatchTransformer(aar_config(**SMALL | dict(patch_size=13), embedding_type=embedding)).train()
    before = weights_hash(encoder)
    m = tune_bouts(encoder, herd(), herd(seed=1), tmp_path, TuneBouts(epochs=2, batch_size=20, learning_rate=.01, freeze_backbone=True))
    assert weights_hash(encoder) == before and all(torch.equal(a, b) for a, b in zip(encoder.blocks.parameters(), m.encoder.blocks.parameters(), strict=True))
    if embedding == "conv": assert torch.equal(m.encoder.embedding.layers[1].running_mean, encoder.embedding.layers[1].running_mean)


def test_freezing_is_ignored_without_a_pretrained_encoder(tmp_path):
    m = tune_bouts(aar_config(**SMALL), herd(), herd(seed=1), tmp_path, TuneBouts(epochs=1, batch_size=20, freeze_backbone=True))
    assert json.loads((tmp_path / "run.json").read_text())["results"]["trained_parameters"] == n_parameters(m)


# ---- defect 3: padding is trained on, attended to, and pooled ----

def test_padding_is_masked_in_attention_and_loss():
    torch.manual_seed(0)
    m, b = BoutAutoencoder(aar_config(**SMALL)).eval(), herd()
    x, pad = torch.from_numpy(b.values), torch.from_numpy(b.pad)
    def of(values):
        m.zero_grad()
        total = 0.
        for loss in filling_losses(m, values, pad, PretrainBouts(unmasked_loss_weight=.5), torch.Generator().manual_seed(0)): loss.backward(); total += loss.item()
        return total, m.decoder.decoder.weight.grad.clone()
    (a, ga), (b_, gb) = of(x), of(x.masked_fill(pad[:, None], 50.))
    assert a == b_ and torch.equal(ga, gb)
    short, n = x[:1, :, :25], 25 # half a bout alone gives what the padded one gave
    with torch.no_grad(): torch.testing.assert_close(m.encoder(x[:1], pad[:1])[:, :, :2], m.encoder(short, torch.zeros(1, n, dtype=torch.bool))[:, :, :2])


@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**31))
@settings(max_examples=40)
def test_the_number_of_hidden_patches_is_exact(n, ratio, seed):
    g = torch.Generator().manual_seed(seed)
    noise, valid = torch.rand(2, 3, 40, generator=g), torch.arange(40) < n
    masked = hide(noise, ratio, (~valid).expand(2, 3, 40))
    assert (masked.sum(-1) == n - int(n * (1 - ratio))).all() and not masked[..., ~valid].any()


# ---- defect 4: unseeded ----

def test_the_same_seed_gives_the_same_run(tmp_path):
    config = PretrainBouts(epochs=2, batch_size=32, warmup_steps=5, plot_every=0)
    a, b, c = (pretrain_bouts(aar_config(**SMALL), herd(), herd(seed=1), tmp_path / name, replace(config, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert weights_hash(a) == weights_hash(b) != weights_hash(c)


def test_folds_do_not_depend_on_the_order_of_the_bouts():
    b, order = herd(), np.random.default_rng(1).permutation(60)
    ours = lambda label, who: {frozenset(who[f.test]) for f in nested_folds(label, who, 3)}
    assert ours(b.label, b.subjects) == ours(b.label[order], b.subjects[order])


# ---- defect 9: non-strict loading, fixed windows, patches that must divide them ----

def test_loading_is_strict(tmp_path):
    s = published_tensors(BoutAutoencoder(aar_config(64, 2)))
    for change, said in ((dict(more=torch.zeros(1)), "without a place"), ({"transformer.extra.weight": torch.zeros(1)}, "don't fit|without a place"), (None, "don't fit|no tensor")):
        wrong = s | change if change else {k: v for k, v in s.items() if "layers.1.linear1.bias" not in k}
        torch.save(wrong, tmp_path / "m.pt")
        with pytest.raises(ModelError, match=said): load_published(tmp_path / "m.pt")


def test_other_windows_and_patches():
    m = PatchTransformer(aar_config(64, 1, patch_size=24)).eval() # 1000 / 24 is no whole number
    assert m(torch.randn(1, 3, 1000)).shape == (1, 3, 42, 64)
    assert stretched(m, 2000)(torch.randn(1, 3, 2000)).shape == (1, 3, 84, 64)


@fixtures
def test_a_published_encoder_is_tuned_on_longer_windows(tmp_path):
    encoder, b = load_published(FIXTURES / "aar_linear_multi.pt"), herd(12, 4, length=1250)
    m = tune_bouts(encoder, b, herd(12, 4, 1, 1250), tmp_path, TuneBouts(epochs=1, batch_size=12))
    assert m.encoder.config.max_patches == 50 and not m.encoder.config.upstream and np.isfinite(say(m, b)).all()


@given(st.dictionaries(st.sampled_from(["transformer.positional_encoding.positional_encoding", "0.positional_encoding.positional_encoding", "transformer.embedding.layer.weight", "1.layers.2.weight", "1.layers.2.bias", "cnn_head.0.weight",
    "classification_head.0.weight", "classification_head.6.weight", "self_supervised_head.weight_matrix.weight", "transformer.transformer.layers.0.linear1.weight"]), st.lists(st.integers(0, 64), max_size=4), max_size=6))
@settings(max_examples=60)
def test_fuzzed_files_only_raise_our_errors(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("fuzz") / "model.pt"
    torch.save({k: torch.zeros(shape) if np.prod(shape) < 10_000 else torch.zeros(3) for k, shape in shapes.items()}, path)
    with pytest.raises(PFTSleepError): load_published(path)


# ---- defect 10: no resume, last weights, no clipping, no class weights, selection on the reported fold ----

RUN = """
import sys, torch
sys.path.insert(0, sys.argv[3])
from test_aar import SMALL, herd
from pftsleep.models.aar import aar_config
from pftsleep.training import bouts
bouts._SAVE_SECONDS = 0
bouts.pretrain_bouts(aar_config(**SMALL), herd(), herd(seed=1), sys.argv[1], bouts.PretrainBouts(epochs=int(sys.argv[2]), batch_size=16, warmup_steps=20, plot_every=0))
"""

def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    command = lambda folder: [sys.executable, "-c", RUN, str(folder), "12", str(Path(__file__).parent)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(tmp_path / "killed"), env=env, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while not (tmp_path / "killed/state.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    config = PretrainBouts(epochs=12, batch_size=16, warmup_steps=20, plot_every=0)
    with one_thread(): a, b = (pretrain_bouts(aar_config(**SMALL), herd(), herd(seed=1), tmp_path / name, config) for name in ("killed", "whole")) # as the other process: threads divide sums differently
    assert weights_hash(a) == weights_hash(b)
    pd.testing.assert_frame_equal(*(pd.read_csv(tmp_path / name / "history.csv") for name in ("killed", "whole")))


def test_the_best_weights_are_kept_and_patience_ends_the_run(tmp_path):
    train, val = herd(), herd(seed=1)
    m = tune_bouts(aar_config(**SMALL), train, val, tmp_path, TuneBouts(epochs=60, patience=3, batch_size=20, learning_rate=.03))
    curve = pd.read_csv(tmp_path / "history.csv")
    assert len(curve) < 60 and len(curve) == curve["val_loss"].idxmin() + 4
    p = say(m, val)
    assert -np.log(p[np.arange(60), val.label]).mean() == pytest.approx(curve["val_loss"].min(), rel=1e-4)


def test_class_weights_make_classes_equal():
    w = balance(np.array([0] * 90 + [1] * 10), 2)
    assert w.tolist() == pytest.approx([100 / 180, 5.]) and (w * torch.tensor([90., 10.])).tolist() == pytest.approx([50., 50.])


def test_the_reported_fold_never_chooses_anything(tmp_path):
    "Whatever the reported bouts and their labels are, the model is the same."
    b = herd()
    folds = nested_folds(b.label, b.subjects, 3)
    changed = Bouts(b.values.copy(), b.label.copy(), b.names, b.pad, b.subjects)
    changed.values[folds[0].test] = 7.
    changed.label[folds[0].test] = (changed.label[folds[0].test] + 1) % 3
    hashes = []
    for name, bouts in dict(a=b, b=changed).items():
        learn = pretraining(aar_config(**SMALL), PretrainBouts(epochs=1, batch_size=16, plot_every=0), TuneBouts(epochs=3, batch_size=16))
        learn(Part(bouts, folds[0].train), Part(bouts, folds[0].select), tmp_path / name, 0)
        hashes.append(json.loads((tmp_path / name / "run.json").read_text())["results"]["weights"])
    assert hashes[0] == hashes[1]


def test_all_folds_in_one_command_and_unknown_animals_are_told(tmp_path):
    b = herd()
    learners = dict(scratch=tuning(aar_config(**SMALL), TuneBouts(epochs=2, batch_size=16)), cnn=convolving(TuneBouts(epochs=2, batch_size=16)), forest=foresting(25., 10))
    result = cross_validate(b, learners, tmp_path / "known", 3, max_samples=5)
    assert result.note == "" and set(result.table().index) == set(learners) and {"accuracy", "balanced_accuracy", "macro_f1", "macro_f1_low"} <= set(result.table().columns)
    for f in range(3):
        true, pred = (np.load(tmp_path / f"known/cnn/fold_{f}/y_{what}_fold_{f}.npy", allow_pickle=False) for what in ("true", "pred"))
        assert true.shape == pred.shape and true.dtype == pred.dtype == np.int64 and (tmp_path / f"known/fold_{f}/subsample_indices_5_578.npy").exists()
    anonymous = cross_validate(Bouts(b.values, b.label, b.names, b.pad), dict(forest=foresting(25., 10)), tmp_path / "unknown", 3)
    assert anonymous.table().attrs["note"] == UNKNOWN_SUBJECTS and UNKNOWN_SUBJECTS in (tmp_path / "unknown/table.csv").read_text()


def test_intervals_resample_animals():
    truth, who = np.repeat([0, 1], 50), np.repeat(np.arange(10), 10)
    said = np.where(who % 5 == 0, 1 - truth, truth) # two animals are always wrong
    one, by = (activity_metrics(truth, said, 2, s).loc["accuracy"] for s in (None, who))
    assert one["value"] == by["value"] == .8 and by["high"] - by["low"] > 2 * (one["high"] - one["low"])


# ---- defect 11: the same step in parts ----

def test_parts_of_a_batch_add_up():
    torch.manual_seed(0)
    m, b = BoutAutoencoder(aar_config(**SMALL, dropout=0.)), herd()
    def gradient(at_once):
        m.zero_grad()
        for loss in filling_losses(m, torch.from_numpy(b.values), torch.from_numpy(b.pad), PretrainBouts(at_once=at_once, unmasked_loss_weight=.1), torch.Generator().manual_seed(0)): loss.backward()
        return torch.cat([p.grad.flatten() for p in m.parameters()])
    torch.testing.assert_close(gradient(7), gradient(60), atol=1e-6, rtol=1e-4)


def test_single_mode_is_multi_mode_axis_by_axis():
    multi, single = PatchTransformer(aar_config(**SMALL)).eval(), PatchTransformer(aar_config(**SMALL, input_mode="single")).eval()
    single.load_state_dict(multi.state_dict())
    x = torch.randn(2, 3, 50)
    with torch.no_grad(): torch.testing.assert_close(multi(x).flatten(0, 1), single(x.flatten(0, 1)[:, None])[:, 0])


# ---- the scripts, and defect 12: names that collide, pickled labels, paths of one laboratory ----

def write(folder: Path, b: Bouts) -> Path:
    "The seed's layout."
    x = np.where(b.pad[:, None], np.nan, b.values).transpose(0, 2, 1)
    folder.mkdir()
    for part in ("train", "val"): np.save(folder / f"X_{part}.npy", x)
    for f in nested_folds(b.label, b.subjects, 2):
        (folder / f"fold_{f.number}").mkdir()
        for part, rows in dict(train=np.concatenate([f.train, f.select]), val=f.test).items():
            for name, v in dict(X=x, y=np.array(b.names)[b.label], subjects=b.subjects).items(): np.save(folder / f"fold_{f.number}" / f"{name}_{part}.npy", v[rows])
    return folder


@pytest.mark.slow
def test_both_scripts_from_arrays_to_predictions(tmp_path):
    data = write(tmp_path / "data", herd())
    run = lambda script, *a: subprocess.run([sys.executable, ROOT / f"jobs/model_training/{script}.py", "--config", ROOT / f"jobs/model_training/{script}.yaml", *map(str, a)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    size = ["--d_embedding", 64, "--n_layers", 1, "--patch_size", 10, "--input_mode", "single"]
    done = run("pretrain", "--data_path", data, "--output_dir", tmp_path / "p", "--epochs", 1, *size)
    assert done.returncode == 0, done.stderr
    model, = (tmp_path / "p").glob("*/model.pt")
    done = run("finetune_classification", "--data_path", data, "--output_dir", tmp_path / "f", "--pretrained_model_path", model, "--epochs", 1, "--n_classes", 3, "--avg_pool", "--freeze_backbone", "--fold", 1, *size)
    assert done.returncode == 0 and "macro_f1" in done.stdout, done.stderr
    assert sorted(p.name for p in (tmp_path / "f").rglob("*.npy")) == ["y_pred_fold_1.npy", "y_true_fold_1.npy"]
    done = run("finetune_classification", "--data_path", tmp_path / "none", "--output_dir", tmp_path / "f")
    assert done.returncode == 1 and done.stderr.startswith("finetune_classification: ") and "Traceback" not in done.stderr


def test_the_scripts_have_the_seeds_parameters_and_defaults():
    import inspect
    pre = dict(batch_size=512, epochs=200, d_embedding=128, n_layers=4, transformer_dropout=.1, masking_ratio=.5, patch_size=25, warmup_steps=4000, noam_factor=1., input_mode="multi", unmasked_loss_weight=0., embedding_type="linear")
    tune = dict(pretrained_model_path=None, batch_size=128, epochs=50, lr=1e-4, d_embedding=128, n_layers=4, patch_size=25, fold=0, freeze_backbone=False, unlocked_layers=0, avg_pool=False, input_mode="multi", embedding_type="linear")
    for job, want in ((pretrain_arrays, pre), (finetune_arrays, tune)):
        found = {k: p.default for k, p in inspect.signature(job).parameters.items()}
        assert {k: found[k] for k in want} == want and {"data_path", "output_dir"} <= set(found)
    assert "n_classes" in inspect.signature(finetune_arrays).parameters


def test_two_runs_of_one_second_have_folders_of_their_own(tmp_path):
    data, size = write(tmp_path / "data", herd(30)), dict(d_embedding=64, n_layers=1, patch_size=10, epochs=1)
    a, b = (pretrain_arrays(str(data), str(tmp_path / "runs"), **size) for _ in range(2)) # the first is finished, so the second is another
    assert a != b and asdict(PatchTransformer.from_pretrained(a / "encoder").config) == asdict(PatchTransformer.from_pretrained(b / "encoder").config)


def test_pickled_labels_are_never_opened(tmp_path):
    data = write(tmp_path / "data", herd(30))
    np.save(data / "fold_0/y_val.npy", np.array([b"a", "b", None], object), allow_pickle=True)
    with pytest.raises(ReadError): finetune_arrays(str(data), str(tmp_path / "f"), d_embedding=64, n_layers=1, patch_size=10, epochs=1)


# ---- real storks ----

@pytest.mark.skipif(not STORKS.exists(), reason="../shared/realdata is not here")
@pytest.mark.slow
def test_real_storks(tmp_path):
    "Convert, cut, and compare on folds of bouts; the source has no animal id, and the result says so."
    from pftsleep.data.animal_studies import convert_rabc
    from pftsleep.data.segments import SegmentRule, labelled_segments
    convert_rabc(STORKS, tmp_path / "files", 10.54)
    segments, _ = labelled_segments(tmp_path / "files", SegmentRule(40 / 10.54, 40, 10.54))
    assert len(segments) == 1746 and sorted(segments.counts().values()) == [77, 96, 273, 437, 863]
    config, tune = aar_config(64, 1, patch_size=5, window=40), TuneBouts(learning_rate=3e-3, batch_size=64, epochs=6, weighted=True, pool="mean")
    learners = dict(pretrained=pretraining(config, PretrainBouts(batch_size=128, epochs=3, warmup_steps=50, plot_every=0, at_once=64), tune), forest=foresting(10.54, 100))
    result = cross_validate(segments, learners, tmp_path / "cv", 2)
    assert result.note == UNKNOWN_SUBJECTS
    assert result.table().loc["forest", "macro_f1"] > .7 and result.table().loc["pretrained", "macro_f1"] > .4
