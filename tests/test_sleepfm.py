"""SleepFM, 2024 and clinical: against what the authors' code computed, all five of their files, and files that are wrong. Their missing channels and padding, and what every encoder promises."""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_encoder_contract as contract
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pftsleep.apps.embedding import load_encoder
from pftsleep.data.signals import Recipe, apply_recipe
from pftsleep.data.simulate import simulate_hypnogram, simulate_night
from pftsleep.errors import ConfigError, ModelError
from pftsleep.models.clinical_heads import (
    ClinicalStaging,
    ClinicalStagingConfig,
    Diagnosis,
    DiagnosisConfig,
    PersonConfig,
    PersonOnly,
    SignalDiagnosis,
    SignalDiagnosisConfig,
    clinical_diagnosis,
    clinical_staging,
    demographics,
    is_clinical_diagnosis,
    is_clinical_staging,
)
from pftsleep.models.heads import LinearProbe
from pftsleep.models.set_transformer import Layer, Pooling, SetConfig, SetTransformer, is_sleepfm_clinical, sleepfm_clinical
from pftsleep.models.sleepfm import PUBLISHED_CHANNELS, KeptNorm, SleepFMConfig, SleepFMEncoder, SupervisedCNN, is_sleepfm_2024, sleepfm_2024
from pftsleep.models.stager import Stager, load_stager, save_stager, weights_hash
from pftsleep.models.transformer import PatchTransformer, Tokens, load_any, n_parameters
from pftsleep.models.weights import load_published
from pftsleep.training.embedding_probe import load_encoders, random_encoders
from pftsleep.training.finetune import TaskHead, TaskHeadConfig, TaskModel, load_task, save_task

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "sleepfm"
needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="../shared/fixtures is not here")


def rand(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
def reference(name): return {k: torch.from_numpy(v) for k, v in np.load(FIXTURES / name).items()}
def apart(a, b):
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    "The five files, as the formula makes them."
    if not FIXTURES.exists(): pytest.skip("../shared/fixtures is not here")
    folder = tmp_path_factory.mktemp("sleepfm")
    subprocess.run([sys.executable, FIXTURES / "formula_weights.py", folder], check=True, capture_output=True)
    return folder


def shaken(module, seed=0):
    "Every parameter and statistic away from its initial zeros and ones."
    torch.manual_seed(seed)
    for p in module.parameters(): p.data += .05 * torch.randn_like(p)
    for m in module.modules():
        if isinstance(m, KeptNorm): m.running_mean.normal_(std=.1); m.running_var.uniform_(.5, 2)
    return module.eval()


gradients = pytest.mark.parametrize("grad", [True, False], ids=["plain", "as it is run"]) # without gradients, everything is folded and rearranged


# ---- what the original computed, within the tolerances of the fixtures ----

@needs_fixtures
@gradients
@pytest.mark.parametrize("modality", ["respiratory", "ekg"])
def test_the_encoders_of_2024(files, modality, grad):
    z, m = reference("sleepfm2024_io.npz"), load_published(files / "sleepfm2024_best.pt", modality=modality)
    assert m.config.channels == PUBLISHED_CHANNELS[modality] and m.config.upstream and not m.training and m.config.seconds_per_token == 30
    x, seen = z[f"{modality}_x"], {}
    hooks = [m.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out[0])) for name in ("stage2", "stage8")]
    with torch.set_grad_enabled(grad):
        assert apart(m(x), z[f"{modality}_y"]) < 5e-5
        for name, tolerance in (("stage2", 1e-5), ("stage8", 5e-4)): assert apart(seen[name][0], z[f"{modality}_{name}_s0"]) < tolerance
        for h in hooks: h.remove()
        many = x.repeat(9, 1, 1) # as many as are folded
        assert apart(m(many), z[f"{modality}_y"].repeat(9, 1)) < 1e-4 and apart(m.folded()(x), z[f"{modality}_y"]) < 1e-4
        if modality == "respiratory": assert apart(m(z["respiratory_short_x"]), z["respiratory_short_y"]) < 5e-5
        tokens = m.encode(torch.cat([x[:1], x[1:]], -1))
    assert tokens.values.shape == (1, 1, 2, 512) and apart(tokens.values[0, 0], z[f"{modality}_y"]) < 1e-4


@needs_fixtures
@pytest.mark.parametrize("name", list(PUBLISHED_CHANNELS))
def test_keys_and_counts_of_2024(files, name):
    keys = json.loads((FIXTURES / f"{name}_keys.json").read_text())
    m = load_published(files / "sleepfm2024_best.pt", modality=name)
    assert {k: [list(t.shape), str(t.dtype).removeprefix("torch.")] for k, t in m.state_dict().items()} == keys and list(m.state_dict()) == list(keys)
    assert n_parameters(m) == {"respiratory": 3_470_232, "sleep_stages": 3_470_424, "ekg": 3_470_040}[name]


@needs_fixtures
@gradients
def test_the_clinical_encoder(files, grad):
    z, m = reference("clinical_base_io.npz"), load_published(files / "clinical_base_best.pt")
    two = torch.cat([z["EKG_x"], torch.zeros_like(z["EKG_x"])], 1)
    with torch.set_grad_enabled(grad):
        for name, x in (("BAS", z["BAS_x"]), ("EKG", z["EKG_x"]), ("EKGpad", two), ("short", z["short_x"])):
            pooled, tokens = m(x, z[f"{name}_mask"])
            assert apart(pooled, z[f"{name}_pooled"]) < 1e-5 and apart(tokens, z[f"{name}_seq"]) < 1e-5
        assert apart(m.tokenise(z["BAS_x"].unflatten(-1, (-1, 640))), z["BAS_tokens"]) < 1e-5
        assert apart(m(z["EKG_x"])[0], z["EKG_pooled"]) < 1e-5 # no mask, nothing masked


@needs_fixtures
@gradients
def test_the_clinical_encoder_over_a_recording(files, grad):
    "`encode` in windows, with a montage: the rows are what the original gives for each modality by itself."
    z, m = reference("clinical_base_io.npz"), load_published(files / "clinical_base_best.pt", channels=["ECG", *"abcde"], modalities=["EKG"] + ["BAS"] * 5)
    x = torch.cat([z["EKG_x"], z["BAS_x"]], 1)
    pad = torch.cat([torch.zeros(2, 1), z["BAS_mask"]], 1).bool()[..., None].expand(x.shape)
    with torch.set_grad_enabled(grad):
        tokens = m.encode(torch.cat([x, x], -1), torch.cat([pad, pad], -1))
        pooled = m.pool_windows(tokens)
    assert m.config.rows == ("BAS", "EKG") and tokens.values.shape == (2, 2, 120, 128) and pooled.values.shape == (2, 2, 2, 128) and pooled.seconds_per_token == 300
    for i, name in enumerate(m.config.rows):
        for part in (0, 1): assert apart(tokens.values[:, i, 60 * part:60 * part + 60], z[f"{name}_seq"]) < 3e-5 and apart(pooled.values[:, i, part], z[f"{name}_pooled"]) < 1e-5


@needs_fixtures
@gradients
def test_corrected_the_clinical_encoder_differs_only_where_it_should(files, grad):
    z, m = reference("clinical_base_io.npz"), load_published(files / "clinical_base_best.pt", upstream=False)
    with torch.set_grad_enabled(grad):
        for name in ("BAS", "short"): assert apart(m(z[f"{name}_x"], z[f"{name}_mask"])[0], z[f"{name}_pooled"]) < 1e-5
        alone = m(z["EKG_x"])
        assert apart(alone[0], z["EKGpad_pooled"]) < 1e-5 and apart(alone[1], z["EKGpad_seq"]) < 3e-5 and apart(alone[0], z["EKG_pooled"]) > 1 # T1: always the layer


@needs_fixtures
@gradients
def test_the_staging_head(files, grad):
    z, m = reference("clinical_staging_io.npz"), load_published(files / "clinical_staging_best.pth")
    valid = z["mask"][:, 0] == 0
    with torch.set_grad_enabled(grad):
        assert apart(m(z["x"], z["mask"])[valid], z["logits"][valid]) < 1e-5
        assert apart(m(z["x"][1:, :, :150], z["mask"][1:, :, :150]), z["logits_sample1_unpadded"]) < 1e-5
    assert n_parameters(m) == 1_286_277 and len(m.state_dict()) == 37


@needs_fixtures
def test_in_training_the_published_staging_head_adds_its_mask(files):
    "T2: as the original trains. `train()` without dropout is the only way to see it."
    z, m = reference("clinical_staging_io.npz"), load_published(files / "clinical_staging_best.pth")
    for part in m.modules():
        if isinstance(part, torch.nn.Dropout): part.p = 0.
        if isinstance(part, Layer): part.self_attn.dropout = 0.
    valid = z["mask"][:, 0] == 0
    assert apart(m.train()(z["x"], z["mask"])[valid], z["logits_additive_mask"][valid]) < 1e-5


@needs_fixtures
@gradients
def test_corrected_the_staging_head_sees_no_padding(files, grad):
    "T3: in its batch, the short night has the logits that it has alone."
    z, m = reference("clinical_staging_io.npz"), load_published(files / "clinical_staging_best.pth", upstream=False)
    with torch.set_grad_enabled(grad): logits = m(z["x"].masked_fill(z["mask"].bool()[..., None], torch.nan), z["mask"])
    assert apart(logits[1, :150], z["logits_sample1_unpadded"][0]) < 1e-5 and apart(logits[0], z["logits"][0]) < 1e-5 and (logits[1, 150:] == 0).all()


@needs_fixtures
@gradients
@pytest.mark.parametrize("upstream", [True, False])
def test_the_diagnosis_heads(files, grad, upstream):
    z, m = reference("clinical_diagnosis_io.npz"), load_published(files / "clinical_diagnosis_best.pth", upstream=upstream)
    with torch.set_grad_enabled(grad):
        assert apart(m(z["x"], z["mask"], z["demo"]), z["hazards"]) < 1e-5
        bare = load_published(files / "clinical_diagnosis_nodemo_best.pth", upstream=upstream)
        hazards = bare(z["x"], z["mask"])
        assert hazards.shape == (3, 1065) and apart(hazards[2:], bare(z["x"][2:, :2, :37])) < 1e-5
    assert n_parameters(m) == 963_497 and n_parameters(bare) == 929_321 and bare.config.n_demographics == 0
    with pytest.raises(ModelError, match="no input for demographics"): bare(z["x"], z["mask"], z["demo"])


@needs_fixtures
@pytest.mark.parametrize("name,model", [("clinical_base", lambda: SetTransformer(SetConfig())), ("clinical_staging", lambda: ClinicalStaging(ClinicalStagingConfig())), ("clinical_diagnosis", lambda: Diagnosis(DiagnosisConfig())),
    ("clinical_diagnosis_nodemo", lambda: Diagnosis(DiagnosisConfig(n_demographics=0)))], ids=lambda v: v if isinstance(v, str) else "")
def test_keys_of_the_clinical_models(name, model):
    keys, state = json.loads((FIXTURES / f"{name}_keys.json").read_text()), model().state_dict()
    assert {k: [list(t.shape), str(t.dtype).removeprefix("torch.")] for k, t in state.items()} == keys
    table = torch.from_numpy(np.stack([np.sin(a := np.arange(len(state["positional_encoding.pe"][0]))[:, None] * 1e4 ** (-np.arange(0, 128, 2) / 128)), np.cos(a)], -1).reshape(-1, 128))
    assert apart(state["positional_encoding.pe"][0].double(), table) < 1e-3 # float32 angles of up to 8196


def test_counts():
    assert n_parameters(SetTransformer(SetConfig())) == 4_831_656
    assert n_parameters(SupervisedCNN.of([c for channels in PUBLISHED_CHANNELS.values() for c in channels])) == 2_821_341
    assert n_parameters(PersonOnly(PersonConfig())) == 35_305


# ---- files ----

@needs_fixtures
def test_provenance_holds_the_facts_of_the_container(files):
    m = load_published(files / "sleepfm2024_best.pt", modality="ekg")
    facts = m.provenance if "temperature" in m.provenance else m.facts
    assert facts["temperature"] == .37 and facts["epoch"] == 3 and facts["modality"] == "ekg"
    assert m.provenance["format"] == "SleepFM 2024" and m.provenance["upstream"] is True


@needs_fixtures
def test_a_prefix_is_optional(files, tmp_path):
    tree = torch.load(files / "sleepfm2024_best.pt", weights_only=True)
    bare = {"temperature": 0., "ekg_state_dict": {k.removeprefix("module."): v for k, v in tree["ekg_state_dict"].items()}}
    torch.save(bare, tmp_path / "best.pt")
    x = rand(1, 1, 1000)
    assert torch.equal(load_published(tmp_path / "best.pt", modality="ekg")(x), load_published(files / "sleepfm2024_best.pt", modality="ekg")(x))


@needs_fixtures
def test_which_modality(files):
    for wrong in (dict(), dict(modality="eeg"), dict(modality=3)):
        with pytest.raises(ConfigError, match="modality='ekg'"): load_published(files / "sleepfm2024_best.pt", **wrong)
    with pytest.raises(ModelError, match="has 1 channels, not 2"): load_published(files / "sleepfm2024_best.pt", modality="ekg", channels=("a", "b"))
    with pytest.raises(ConfigError, match="no choice of modality"): load_published(files / "clinical_base_best.pt", modality="ekg")
    with pytest.raises(ModelError, match="can't share"): load_published(files / "clinical_staging_best.pth", n_heads=5)
    assert load_published(files / "clinical_staging_best.pth", n_heads=8).config.n_heads == 8


FILES = {"sleepfm2024_best.pt": (lambda t: t["ekg_state_dict"], dict(modality="ekg")), "clinical_base_best.pt": (lambda t: t["state_dict"], {}), "clinical_staging_best.pth": (lambda t: t, {}),
    "clinical_diagnosis_best.pth": (lambda t: t, {}), "clinical_diagnosis_nodemo_best.pth": (lambda t: t, {})}


def renamed(s): k = "module.lstm.bias_ih_l0" if "module.lstm.bias_ih_l0" in s else "module.stage9.bias" if "module.stage9.bias" in s else "module.layer_norm.bias"; s[k + "_"] = s.pop(k)
def missing(s): del s["module.layer_norm.bias" if "module.layer_norm.bias" in s else "module.stage4.bn.num_batches_tracked"]
def extra(s): s["module.another"] = torch.zeros(1)
def half_prefixed(s): k = list(s)[3]; s[k.removeprefix("module.")] = s.pop(k)
def first_float(s): return next(k for k, t in s.items() if t.is_floating_point() and t.ndim > 1)
def not_finite(s): s[first_float(s)].view(-1)[0] = torch.nan
def reshaped(s): k = first_float(s); s[k] = s[k].mT.contiguous()
def flattened(s): k = first_float(s); s[k] = s[k].flatten()
def whole_numbers(s): k = first_float(s); s[k] = s[k].long()
def no_tensor(s): s[first_float(s)] = "weights"
def emptied(s): s.clear()
def longer_positions(s): k = "module.positional_encoding.pe"; s[k if k in s else first_float(s)] = torch.zeros(1, 3, 10**6)


@needs_fixtures
@pytest.mark.parametrize("name", FILES)
def test_wrong_files_are_refused(files, name, tmp_path):
    part, which = FILES[name]
    tree = torch.load(files / name, weights_only=True)
    if name.startswith("sleepfm"): tree = {k: v for k, v in tree.items() if k in ("temperature", "ekg_state_dict")}
    for damage in (renamed, missing, extra, half_prefixed, not_finite, reshaped, flattened, whole_numbers, no_tensor, emptied, longer_positions):
        copy = {k: (v.clone() if torch.is_tensor(v) else dict(v) if isinstance(v, dict) else v) for k, v in tree.items()}
        state = part(copy)
        if damage is not_finite: state[first_float(state)] = state[first_float(state)].clone()
        damage(state)
        torch.save(copy, tmp_path / name)
        with pytest.raises(ModelError) as e: load_published(tmp_path / name, **which)
        assert e.value.path and name in str(e.value), damage.__name__


@needs_fixtures
def test_variances_below_zero_are_refused(files, tmp_path):
    tree = torch.load(files / "clinical_base_best.pt", weights_only=True)
    tree["state_dict"]["module.patch_embedding.tokenizer.1.running_var"] *= -1
    torch.save(tree, tmp_path / "best.pt")
    with pytest.raises(ModelError, match="below zero"): load_published(tmp_path / "best.pt")


@needs_fixtures
@pytest.mark.parametrize("name", FILES)
def test_cut_files_are_refused(files, name, tmp_path):
    data = (files / name).read_bytes()
    for n in (0, 10, len(data) // 2, len(data) - 1):
        (tmp_path / name).write_bytes(data[:n])
        with pytest.raises(ModelError): load_published(tmp_path / name, **FILES[name][1])


names = st.sampled_from(["module.lstm.weight_hh_l0", "module.lstm.weight_ih_l0", "module.positional_encoding.pe", "module.spatial_pooling.transformer_layer.linear1.weight", "module.fc.bias", "module.disease_heads.bias",
    "module.demo_embedding.0.weight", "module.transformer_encoder.layers.0.norm1.bias", "module.stage1.weight", "module.fc.weight", "module.patch_embedding.tokenizer.3.weight", "module.patch_embedding.tokenizer.0.bias"])
tensors = st.lists(st.integers(0, 5), max_size=4).map(lambda shape: torch.zeros(shape))
states = st.dictionaries(names | st.text(max_size=8), tensors, max_size=12)


@settings(max_examples=60)
@given(states)
def test_garbage_raises_only_our_errors(state):
    "Whatever the names and shapes; `weights` turns the other three into a `ModelError` that names the file."
    for build, tree, which in ((sleepfm_2024, {"ekg_state_dict": state}, dict(modality="ekg")), (sleepfm_clinical, {"state_dict": state}, {}), (clinical_staging, state, {}), (clinical_diagnosis, state, {})):
        with pytest.raises((ModelError, ConfigError, KeyError, RuntimeError, ValueError, IndexError, TypeError)): build(tree, dict, **which)
    for known in (is_sleepfm_2024, is_sleepfm_clinical, is_clinical_staging, is_clinical_diagnosis): assert known(state) in (True, False) and known([state]) is False


# ---- what every encoder promises: the contract's own checks ----

def small(**changes): return SleepFMConfig(**dict(channels=("ECG",), rate=10., patch=64, d_model=16) | changes)
def small_set(**changes): return SetConfig(**dict(channels=("BAS", "RESP", "EKG"), rate=10., patch=64, window=3, d_model=16, n_layers=2, n_heads=2, pooling_heads=2, d_ff=32, dropout=.1) | changes)
recipe = {"rate": 10}


def lively(config):
    "With larger convolutions than torch begins with, of which hardly anything of the signal arrives at the end of so many layers."
    encoder = SleepFMEncoder(config, recipe)
    for m in encoder.modules():
        if isinstance(m, torch.nn.Conv1d): torch.nn.init.kaiming_normal_(m.weight, nonlinearity="linear")
    return encoder


CASES = {
    "SleepFM": contract.Case(lambda: lively(small()), 320), "SleepFM, as published": contract.Case(lambda: lively(small(upstream=True)), 320, any_length=False, ignores_padding=False),
    "SleepFM, a long recording": contract.Case(lambda: lively(small(patch=32)), 640),
    "set": contract.Case(lambda: SetTransformer(small_set(), recipe), 320), "set, as published": contract.Case(lambda: SetTransformer(small_set(upstream=True), recipe), 320, any_length=False, ignores_padding=False),
    "set, odd patches": contract.Case(lambda: SetTransformer(small_set(patch=50, window=4), recipe), 300), "set, one window": contract.Case(lambda: SetTransformer(small_set(window=60), recipe), 320),
}
PROMISES = ["test_shapes", "test_repeatable_and_leaves_its_input_alone", "test_a_batch_is_its_recordings", "test_channels_are_told_apart_only_by_their_weights", "test_all_ways_to_say_padding_agree",
    "test_padding_never_changes_a_prediction", "test_missing_channels", "test_odd_lengths", "test_double_precision", "test_half_precision", "test_wrong_input_is_refused"]


@pytest.mark.parametrize("promise", PROMISES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_contract(case, promise):
    getattr(contract, promise)(case)


@pytest.mark.parametrize("promise", ["test_saved_and_loaded", "test_wrong_weights_are_refused", "test_probe"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_contract_with_files(case, promise, tmp_path):
    if promise == "test_wrong_weights_are_refused" and isinstance(case.make(), SleepFMEncoder) and case.samples > 320: pytest.skip("once is enough")
    getattr(contract, promise)(case, tmp_path)


@pytest.mark.parametrize("name", ["SleepFM", "set"])
def test_every_weight_learns(name):
    "With padding in the batch, the loss reaches every weight, with finite gradients; the last pooling is read through `pool_windows`."
    case = CASES[name]
    encoder = contract.built(case).train()
    x, pad = contract.signals(encoder, case, n=4), torch.zeros(4, case.samples, dtype=torch.bool)
    pad[0], pad[1, case.samples // 2 + 3:] = True, True
    tokens = encoder.encode(x.masked_fill(pad[:, None], torch.nan), pad)
    loss = (tokens.values * rand(*tokens.values.shape)).sum()
    if name == "set": loss = loss + (encoder.pool_windows(tokens).values * rand(16)).sum()
    loss.backward()
    for key, p in encoder.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), key
        assert p.grad.abs().max() > 0 or key.endswith("bias"), key # a bias before a batch norm has no effect


# ---- padding and missing channels, further ----

@torch.no_grad()
def test_a_window_that_is_partly_padding_is_the_signal_alone():
    m = shaken(SleepFMEncoder(small(channels=("a", "b"), patch=96)))
    x, pad = rand(20, 2, 96), torch.zeros(20, 96, dtype=torch.bool)
    for n in (1, 2, 37, 50, 95):
        pad[:] = torch.arange(96) >= n
        assert apart(m.encode(x, pad).values[:, 0, 0], m(x[..., :n])) < 1e-5
        assert apart(m.encode(x[:3], pad[:3]).values[:, 0, 0], m(x[:3, :, :n])) < 1e-5 # not folded


def test_training_statistics_ignore_padding():
    a, b = (SleepFMEncoder(small(dropout=0.)).train() for _ in range(2))
    b.load_state_dict(a.state_dict())
    x, pad = rand(4, 1, 64), torch.zeros(4, 64, dtype=torch.bool)
    pad[2:] = True
    a.encode(x, pad); b.encode(x[:2])
    assert all(torch.allclose(v, b.state_dict()[k], atol=1e-6) for k, v in a.state_dict().items())
    s, t = (SetTransformer(small_set(dropout=0.)).train() for _ in range(2))
    t.load_state_dict(s.state_dict())
    x, pad = rand(2, 3, 192), torch.zeros(2, 3, 192, dtype=torch.bool)
    pad[1] = True
    s.encode(x, pad); t.encode(x[:1])
    assert all(torch.allclose(v, t.state_dict()[k], atol=1e-6) for k, v in s.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("upstream", [False, True])
def test_order_of_channels_does_not_matter(upstream):
    m = shaken(SetTransformer(small_set(channels=tuple("abcd"), modalities=("BAS", "EKG", "BAS", "BAS"), upstream=upstream)))
    x, other = rand(2, 4, 640), [3, 1, 0, 2]
    assert apart(m.encode(x).values, m.for_channels([m.config.channels[i] for i in other], [m.config.modalities[i] for i in other]).encode(x[:, other]).values) < 1e-5


@torch.no_grad()
def test_a_single_channel_does_not_depend_on_its_batch_mates():
    "T1, in both forms."
    for upstream in (False, True):
        m = shaken(SetTransformer(small_set(upstream=upstream)))
        x = rand(1, 1, 128)
        beside = m(torch.cat([x, torch.zeros_like(x)], 1), torch.tensor([[False, True]]))
        assert (apart(m(x)[0], beside[0]) < 1e-5) is not upstream


@torch.no_grad()
def test_nothing_is_finite_and_empty():
    "T4: a sample of which all channels are masked."
    for upstream in (False, True):
        m = shaken(SetTransformer(small_set(upstream=upstream)))
        pooled, tokens = m(rand(2, 3, 128), torch.tensor([[True] * 3, [False] * 3]))
        assert pooled.isfinite().all() and tokens.isfinite().all() and (upstream or ((pooled[0] == 0).all() and (tokens[0] == 0).all()))


@torch.no_grad()
def test_missing_modalities_end_to_end():
    "From signals to stages and hazards: without ECG and chin, and with a hole in what is left, as if those had never been recorded."
    encoder = shaken(SetTransformer(small_set(channels=tuple("abcde"), modalities=("BAS", "BAS", "RESP", "EKG", "EMG"))))
    sizes = dict(d_model=16, pooling_heads=2, d_ff=32, hidden=4, max_tokens=40, seconds_per_token=6.4)
    stage, hazard = shaken(ClinicalStaging(ClinicalStagingConfig(n_heads=2, seconds_per_epoch=12.8, **sizes))), shaken(Diagnosis(DiagnosisConfig(n_labels=7, **sizes)))
    x, pad = rand(2, 5, 64 * 10), torch.zeros(2, 5, 640, dtype=torch.bool)
    pad[0, 3:], pad[0, :, 128:256], pad[1] = True, True, True
    tokens = encoder.encode(x.masked_fill(pad, torch.nan), pad)
    without = encoder.for_channels("abc", ("BAS", "BAS", "RESP")).encode(x[:1, :3], pad[:1, :3])
    person = demographics([50, 60], ["F", "M"])
    logits, hazards = stage(tokens.values, tokens.pad), hazard(tokens.values, tokens.pad, person)
    assert apart(logits[:1], stage(without.values, without.pad)) < 1e-5 and apart(hazards[:1], hazard(without.values, without.pad, person[:1])) < 1e-5
    assert logits.isfinite().all() and hazards.isfinite().all() and (logits[1] == 0).all() and (logits[0, 2:4] == 0).all()
    epochs = stage.epochs(tokens)
    assert epochs.shape == (2, 5, 5) and torch.allclose(epochs[0, 0].exp(), logits[0, :2].softmax(-1).mean(0), atol=1e-6)


@torch.no_grad()
def test_per_time_missingness_is_seen():
    "T7: a modality that begins later. The original decides by the first token, for all of the night."
    x, pad = rand(1, 3, 20, 16), torch.zeros(1, 3, 20, dtype=torch.bool)
    pad[0, 2, :5] = True
    sizes = dict(d_model=16, pooling_heads=2, n_heads=2, d_ff=32, hidden=4, max_tokens=40)
    loud = x.clone(); loud[0, 2, 5:] += 10
    for upstream in (True, False):
        m = shaken(ClinicalStaging(ClinicalStagingConfig(upstream=upstream, **sizes)))
        assert (apart(m(x, pad), m(loud, pad)) < 1e-6) is upstream


def test_heads_learn_everywhere():
    sizes = dict(d_model=16, pooling_heads=2, d_ff=32, hidden=4, max_tokens=40)
    x, pad = rand(3, 3, 20, 16), torch.zeros(3, 3, 20, dtype=torch.bool)
    pad[0], pad[1, :, 12:], pad[2, 1] = True, True, True
    for m, more in ((ClinicalStaging(ClinicalStagingConfig(n_heads=2, **sizes)), ()), (Diagnosis(DiagnosisConfig(n_labels=7, **sizes)), (demographics([1, 2, 3], "FMF"),))):
        shaken(m).train()
        out = m(x.masked_fill(pad[..., None], torch.nan), pad, *more)
        (out * rand(*out.shape)).sum().backward()
        for key, p in m.named_parameters(): assert not p.requires_grad or (p.grad.isfinite().all() and p.grad.abs().max() > 0), key


def test_wrong_tokens_are_refused():
    m, x = ClinicalStaging(ClinicalStagingConfig(max_tokens=10)), rand(1, 4, 10, 128)
    for wrong in (x[0], x[..., 1:], x[:, :0], x[:, :, :0]):
        with pytest.raises(ModelError, match="tokens have shape"): m(wrong)
    with pytest.raises(ModelError, match="made for 10"): m(torch.cat([x, x], 2))
    with pytest.raises(ModelError, match="padding has shape"): m(x, torch.zeros(1, 10))
    with pytest.raises(ModelError, match="whole number"): SetTransformer(SetConfig(upstream=True))(rand(1, 2, 641))
    with pytest.raises(ModelError, match="positions for 128"): SetTransformer(small_set(max_patches_in_window=128))(rand(1, 2, 64 * 129))
    with pytest.raises(ModelError, match="padding has shape"): SetTransformer(small_set())(rand(1, 2, 64), torch.zeros(1, 3))


def test_raw_ages_are_refused():
    head = Diagnosis(DiagnosisConfig(n_labels=2, d_model=16, pooling_heads=2, d_ff=16, hidden=2, max_tokens=10))
    x = rand(1, 4, 10, 16)
    for person in ([[57., 1.]], [[.5, 2.]], [[-.1, 0.]], [[torch.nan, 0.]]):
        with pytest.raises(ModelError, match="coded from 0 to 1"): head(x, None, torch.tensor(person))
    for age in (-1, 99, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="age"): demographics([age], ["F"])
    with pytest.raises(ConfigError, match="sex"): demographics([50], [1])
    assert demographics([3], ["f"])[0, 0] == np.float32(3 / 98)


@torch.no_grad()
def test_a_pool_of_many_sets_is_that_of_few():
    pool = shaken(Pooling(16, 2, 32, 0.))
    x, pad = rand(700, 4, 16), rand(700, 4, seed=1) > .5
    assert apart(pool(x, pad), torch.cat([pool(a, b) for a, b in zip(x.split(70), pad.split(70), strict=True)])) < 1e-5


def test_settings_are_kept_and_checked():
    assert replace(SleepFMConfig.published("ekg"), upstream=False).channels == ("ECG",)
    for wrong in (lambda: SleepFMConfig(()), lambda: SleepFMConfig(("a", "a")), lambda: SleepFMConfig(("a",), dropout=1.), lambda: SetConfig(n_heads=3), lambda: SetConfig(window=200), lambda: SetConfig(("a", "a")),
        lambda: SetConfig(d_ff=0), lambda: ClinicalStagingConfig(hidden=0), lambda: DiagnosisConfig(n_demographics=-1), lambda: DiagnosisConfig(dropout=1.)):
        with pytest.raises(ConfigError): wrong()
    assert Tokens(*SleepFMEncoder(small()).eval().encode(torch.zeros(1, 1, 64))).seconds_per_token == 6.4


def test_a_probe_reads_rows_and_not_channels():
    from pftsleep.models.head_parts import Head
    from pftsleep.models.heads import LinearProbe
    encoder = SleepFMEncoder(SleepFMConfig(("CHEST", "SaO2", "ABD"))).eval()
    with torch.no_grad():
        tokens = encoder.encode(torch.randn(1, 3, 2 * 7680, generator=torch.Generator().manual_seed(0)))
        assert LinearProbe.of(encoder).eval()(tokens).shape == Head.of(encoder).eval()(tokens).shape == (1, 2, 5)


# ---- what is around the encoders ----

@needs_fixtures
def test_the_published_file_as_a_set_of_encoders(files):
    "All three modalities of best.pt, in the original's order, each as `load_published` gives it; their random siblings are others."
    found = load_encoders(files / "sleepfm2024_best.pt")
    assert {m: e.config.channels for m, e in found.items()} == PUBLISHED_CHANNELS and list(found) == list(PUBLISHED_CHANNELS)
    z = reference("sleepfm2024_io.npz")
    with torch.no_grad():
        for m in ("respiratory", "ekg"): assert apart(found[m](z[f"{m}_x"]), z[f"{m}_y"]) < 1e-4
        assert apart(random_encoders(found)["ekg"](z["ekg_x"]), z["ekg_y"]) > .1


@pytest.mark.parametrize("kind", ["2024", "clinical"])
def test_a_stager_around_sleepfm_is_saved_and_stages_a_night(tmp_path, kind):
    "Its folder says which encoder is in it; the night may lack a channel."
    channels, rate = ("C3-M2", "E1-M2", "ECG"), 64.
    config = SleepFMConfig(channels, rate, round(30 * rate), d_model=16) if kind == "2024" else SetConfig(channels, ("BAS", "BAS", "EKG"), rate, round(5 * rate), d_model=16, n_layers=1, n_heads=2, pooling_heads=2, d_ff=32)
    recipe = Recipe.default(channels, rate)
    encoder = shaken({"2024": SleepFMEncoder, "clinical": SetTransformer}[kind](config, recipe.to_dict()))
    stager = Stager(encoder, LinearProbe.of(encoder), recipe, dict(trained="not at all"))
    back = load_stager(save_stager(stager, tmp_path / "stager"))
    assert type(back.encoder) is type(encoder) and weights_hash(back) == weights_hash(stager)
    h = simulate_hypnogram(.1, np.random.default_rng(0))
    night = apply_recipe(simulate_night(h, dict.fromkeys(channels, 128.), seed=1, id="n"), recipe)
    staged = back.stage(night)
    assert len(staged) == len(h) and (staged.stages >= 0).all() and np.allclose(staged.probabilities, stager.eval().stage(night).probabilities, atol=1e-6)
    poor = replace(night, channels={n: night[n] for n in channels[:2]})
    assert np.isfinite(back.stage(poor, allow_missing=True).probabilities).all()
    with pytest.raises(ModelError, match="no channel ECG"): back.stage(poor)
    assert type(load_encoder(tmp_path / "stager")) is type(encoder)


def test_a_folder_names_its_class(tmp_path):
    "Ours only, and an encoder where one is wanted."
    encoder = SleepFMEncoder(SleepFMConfig(("ECG",), 64., 1920, d_model=8))
    task = TaskModel(encoder, TaskHead(TaskHeadConfig(8)))
    save_task(task.eval(), tmp_path / "task")
    assert type(load_task(tmp_path / "task").encoder) is type(load_any(tmp_path / "task" / "encoder")) is SleepFMEncoder
    with pytest.raises(ModelError, match="holds no PatchTransformer"): load_task(tmp_path / "task", PatchTransformer)
    about = json.loads((path := tmp_path / "task" / "encoder" / "config.json").read_text())
    for wrong in ("os.system", "Pretrain", 7, None):
        path.write_text(json.dumps(about | {"class": wrong}))
        with pytest.raises(ModelError, match="doesn't know"): load_any(path.parent)
    for text in ("[]", "{}", "", "[" * 10**5):
        path.write_text(text)
        with pytest.raises(ModelError, match="can't be read"): load_any(path.parent)


def test_the_baseline_from_signals():
    "The published count; and neither padding nor a missing channel, whatever is stored there, changes a hazard. It can be trained."
    assert n_parameters(SignalDiagnosis(SignalDiagnosisConfig())) == 1_050_449
    m = shaken(SignalDiagnosis(SignalDiagnosisConfig(("C3-M2", "ECG", "Thorax"), n_labels=4, d_model=16, hidden=8, d_ff=32, rate=32., n_demographics=0)))
    x, pad = rand(2, 3, 160 * 7), torch.zeros(2, 3, 160 * 7, dtype=torch.bool)
    pad[1, :, 160 * 4:] = pad[1, 2] = True
    with torch.no_grad(): assert apart(m(x, pad)[1:], m(x.masked_fill(pad, 99.)[1:, :, :160 * 4], pad[1:, :, :160 * 4])) < 1e-5
    m.train()(x, pad).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters() if p.requires_grad)
    for wrong in (dict(upstream=True), dict(rate=0.), dict(rate=33.3)):
        with pytest.raises(ConfigError): SignalDiagnosisConfig(**wrong)
