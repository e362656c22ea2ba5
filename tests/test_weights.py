"""`load_published`: the original's numbers, nothing executed, nothing guessed, and an error in words for every file that isn't what it should be."""
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_transformer import FIXTURES, close, from_original, needs_fixtures

from pftsleep.data.download import NotAuthorised
from pftsleep.data.signals import Recipe
from pftsleep.errors import ConfigError, DownloadError, ModelError, PFTSleepError
from pftsleep.models import weights
from pftsleep.models.head_parts import Head, HeadConfig
from pftsleep.models.hub import download_published
from pftsleep.models.transformer import PatchConfig, PatchTransformer, Reconstruction, n_parameters
from pftsleep.models.weights import Call, Format, Name, WeightFile, load_published, read_lightning, read_pickle, read_tensors


# ---- files in the original's layout, from modules of ours ----

def tiny(**changes) -> PatchConfig:
    return PatchConfig.pftsleep(**dict(patch=30, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_patches=10) | changes)


def shaken(module, seed=0):
    "Every parameter and statistic away from its initial value, but for the scale of attention."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in module.state_dict().items():
            if t.is_floating_point() and not name.endswith("scale"): t += torch.rand(t.shape, generator=generator) * .5
    return module.eval()


def original_state(encoder: PatchTransformer, decoder: Reconstruction | None = None, prefix="model.") -> dict:
    "Our tensors under the original's names; written from reference 1.4, apart from the loader."
    c, s = encoder.config, encoder.state_dict()
    out = {"pe.W_pos": s["positions"]}
    if c.instance_norm: out |= {f"revin.affine_{what}": s[f"instance_norm.{what}"][None] for what in ("weight", "bias")}
    def maps(name, weight, bias):
        if c.embedding == "shared": return {f"{name}.W_P.weight": weight, f"{name}.W_P.bias": bias}
        return {f"{name}.W_P.{i}.{what}": t[i] for what, t in (("weight", weight), ("bias", bias)) for i in range(len(c.channels))}
    out |= maps("patch_encoder", s["embedding.weight"], s["embedding.bias"])
    if decoder: out |= maps("head", *(decoder.state_dict()[f"decoder.{what}"] for what in ("weight", "bias")))
    for i in range(c.n_layers):
        old, new = f"layers.{i}.", f"blocks.{i}."
        out[old + "self_attn.sdp_attn.scale"] = s[new + "attention.scale"]
        for what in ("weight", "bias"):
            for x, t in zip("QKV", s[f"{new}attention.qkv.{what}"].chunk(3), strict=True): out[f"{old}self_attn.W_{x}.{what}"] = t
            for a, b in (("self_attn.to_out.0", "attention.out"), ("ff.0", "feed_forward.0"), ("ff.3", "feed_forward.3")): out[f"{old}{a}.{what}"] = s[f"{new}{b}.{what}"]
        for a, b in (("norm_attn", "norm1"), ("norm_ffn", "norm2")):
            out |= {old + a + (".1." if c.norm == "batch" else ".") + k.rsplit(".", 1)[1]: t for k, t in s.items() if k.startswith(f"{new}{b}.")}
    return {prefix + k: t.clone() for k, t in out.items()}


def head_state(head: Head) -> dict:
    renamed = {"mixer.weight": "affine_weight", "mixer.bias": "affine_bias"}
    return {"feedforward." + renamed.get(k, k.replace("temporal.model.rnn", "rnn").replace("classifier", "layers.0")): t for k, t in head.state_dict().items()}


def saved(path: Path, state: dict, hyper: dict | None = None, **more) -> Path:
    torch.save(dict(epoch=3, state_dict=OrderedDict(state), hyper_parameters=hyper or {}, **more), path)
    return path


@pytest.fixture(scope="module")
def modules():
    config = tiny(rate=5.) # so that five patches are an epoch
    head = Head(HeadConfig.pftsleep(d_model=16, hidden=8))
    return shaken(PatchTransformer(config)), shaken(Reconstruction(config), 1), shaken(head, 2)


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory, modules):
    return saved(tmp_path_factory.mktemp("published") / "pft_sleep_encoder.ckpt", original_state(*modules[:2]), dict(n_heads=2, metrics=[]))


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory, modules):
    return saved(tmp_path_factory.mktemp("published") / "pft_sleep_classifier.ckpt", original_state(modules[0], prefix="encoder.model.") | head_state(modules[2]))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def signals(c: PatchConfig, seed=0):
    x = torch.randn(2, len(c.channels), c.max_patches * c.patch, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(x.shape[-1]).expand(2, -1) >= torch.tensor([[10**9], [x.shape[-1] // 2]])


# ---- the original's outputs ----

@needs_fixtures
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["pft_encoder_tiny", "pft_encoder_tiny_pickled_metrics"])
def test_encoder_equals_the_original(name, masked):
    z = np.load(FIXTURES / "pft_encoder_tiny.npz")
    model = load_published(FIXTURES / f"{name}.ckpt", part="pretraining")
    assert not model.training and model.config == PatchConfig.pftsleep(d_model=32, n_layers=2, n_heads=2, d_ff=64, max_patches=40)
    with torch.no_grad():
        tokens = model(torch.from_numpy(z["x"]), torch.from_numpy(z["mask"]) if masked else None)
        recon = model.reconstruct(tokens)
    close(tokens.mT, z["z_mask" if masked else "z_nomask"], 4e-6)
    close(recon.transpose(1, 2)[..., ::10], z["recon_mask" if masked else "recon_nomask"], 4e-6)


@needs_fixtures
@pytest.mark.parametrize("masked", [False, True])
def test_classifier_equals_the_original(masked):
    z, h = np.load(FIXTURES / "pft_encoder_tiny.npz"), np.load(FIXTURES / "pft_head_tiny.npz")
    model = load_published(FIXTURES / "pft_classifier_tiny.ckpt")
    assert model.config.n_heads == 2 # from the scale: nothing else in the file says so
    with torch.no_grad():
        x, pads = torch.from_numpy(z["x"]), [m := torch.from_numpy(z["mask"]), m[:, 0], m.bool()] if masked else [None]
        logits = [model(x, pad) for pad in pads]
        head = model.head(model.encode(x, pads[0])._replace(values=torch.from_numpy(z["z_mask" if masked else "z_nomask"]).mT))
    theirs = [h["logits_mask3d"], h["logits_mask2d"], h["logits_mask2d"]] if masked else [h["logits_nomask"]]
    for a, b in zip(logits, theirs, strict=True): close(a.mT, b, 1e-6)
    close(head.mT, theirs[0], 3e-7)
    close(logits[0].log_softmax(-1).mT, h["logp_mask" if masked else "logp_nomask"], 1e-6)


@needs_fixtures
def test_two_people_map_the_names_alike():
    "`test_transformer` has its own translation, which was compared with the original's gradients, too."
    path = FIXTURES / "pft_encoder_tiny.ckpt"
    model, state = load_published(path, part="pretraining"), torch.load(path, weights_only=True)["state_dict"]
    for module, wanted in zip((model.encoder, model.decoder), from_original(state, 7, 2), strict=True):
        assert module.state_dict().keys() == wanted.keys() and all(torch.equal(v, wanted[k]) for k, v in module.state_dict().items())


@needs_fixtures
@pytest.mark.parametrize("name", ["pft_encoder_tiny", "pft_encoder_tiny_pickled_metrics", "pft_classifier_tiny"])
def test_reader_equals_torch(name):
    path = FIXTURES / f"{name}.ckpt"
    state, hyper = read_lightning(path)
    if "pickled" in name:
        with pytest.raises(pickle.UnpicklingError): torch.load(path, weights_only=True)
        assert "pftsleep.loss" not in sys.modules
        assert Name("pftsleep.loss", "mse") in hyper["metrics"]
        return
    theirs = torch.load(path, weights_only=True)
    assert hyper == theirs["hyper_parameters"]
    assert list(state) == list(theirs["state_dict"]) and all(torch.equal(state[k], v) and state[k].dtype == v.dtype for k, v in theirs["state_dict"].items())


@needs_fixtures
@pytest.mark.filterwarnings("ignore:for blocks") # a number is copied into a tensor that has none
@pytest.mark.parametrize(("name", "count"), [("encoder", "encoder_params_total"), ("classifier", "classifier_total")])
def test_published_sizes(name, count, tmp_path, monkeypatch):
    "Every key of the published files finds its place; without 250 MB of numbers."
    facts = json.loads((FIXTURES / "pft_full_keys.json").read_text())
    path = saved(tmp_path / f"{name}.ckpt", {k: torch.zeros(1) for k in facts[f"{name}_checkpoint"]})
    def shapes(file, described):
        assert described.keys() == facts[f"{name}_checkpoint"].keys()
        return {k: torch.tensor(128**-.5, device="cpu") if k.endswith("scale") else torch.empty(v, device="meta") for k, v in facts[f"{name}_checkpoint"].items()}
    monkeypatch.setattr(weights, "read_tensors", shapes)
    with torch.device("meta"): model = load_published(path, **{"part": "pretraining"} if name == "encoder" else {})
    assert model.config == PatchConfig.pftsleep() and n_parameters(model) == facts[count] == {"encoder": 17_299_603, "classifier": 63_922_212}[name]
    if name == "classifier": assert model.head.config == HeadConfig.pftsleep()
    else: assert n_parameters(model.decoder) == facts["pretrain_head_params"]


# ---- what comes out ----

@pytest.mark.parametrize("settings", [{}, dict(embedding="shared"), dict(norm="layer"), dict(residual_attention=False), dict(instance_norm=False), dict(n_heads=4), dict(n_layers=3),
    dict(channels=("EEG", "EMG"), rate=100.), dict(upstream=False)], ids=str)
def test_what_is_written_in_the_original_layout_comes_back(settings, tmp_path):
    config = tiny(**settings)
    encoder, decoder = shaken(PatchTransformer(config)), shaken(Reconstruction(config), 1)
    hyper = dict(res_attention=config.residual_attention, use_revin=config.instance_norm, c_in=len(config.channels), win_length=30, hop_length=30, max_seq_len=300, dropout=.1)
    path = saved(tmp_path / "x.ckpt", original_state(encoder, decoder), hyper)
    which = dict(channels=config.channels, rate=config.rate) if "channels" in settings else {}
    model = load_published(path, upstream=config.upstream, part="pretraining", **which)
    assert model.config == config and same(model.encoder, encoder) and same(model.decoder, decoder)
    alone, (x, pad) = load_published(path, upstream=config.upstream, **which), signals(config)
    assert isinstance(alone, PatchTransformer) and not alone.training
    with torch.no_grad(): assert torch.equal(alone(x, pad), encoder(x, pad))


def test_normalisation_without_scale_and_offset(tmp_path, modules):
    state = {k: v for k, v in original_state(modules[0]).items() if "revin" not in k}
    encoder = load_published(saved(tmp_path / "x.ckpt", state, dict(use_revin=True, affine=False)))
    assert (encoder.instance_norm.weight == 1).all() and (encoder.instance_norm.bias == 0).all()
    with pytest.raises(ModelError, match="whether its input is normalised"): load_published(saved(tmp_path / "y.ckpt", state))


def test_classifier_comes_back(classifier_file, modules):
    model, (x, pad) = load_published(classifier_file, rate=5.), signals(modules[0].config)
    assert same(model.encoder, modules[0]) and same(model.head, modules[2])
    with torch.no_grad():
        assert torch.equal(model(x, pad), modules[2](modules[0].encode(x, pad))) and model(x, pad).shape == (2, 2, 5)
        assert not torch.allclose(load_published(classifier_file, rate=5., upstream=False)(x, pad), model(x, pad))


def test_upstream_is_fixed_at_loading_and_kept(tmp_path, encoder_file, classifier_file):
    for upstream in (True, False):
        encoder, model = (load_published(f, upstream=upstream, rate=5.) for f in (encoder_file, classifier_file))
        assert encoder.config.upstream == model.config.upstream == model.head.config.upstream == encoder.provenance["upstream"] == upstream
        again = PatchTransformer.from_pretrained(encoder.save_pretrained(tmp_path / str(upstream)))
        x, pad = signals(encoder.config)
        assert again.config == encoder.config and again.recipe == encoder.recipe
        with torch.no_grad(): assert torch.equal(again(x, pad), encoder(x, pad))
        head = Head.from_pretrained(model.head.save_pretrained(tmp_path / f"head {upstream}"))
        with torch.no_grad(): assert torch.equal(head(again.encode(x, pad)), model(x, pad))


def test_corrected_form_ignores_padding(encoder_file):
    encoder = load_published(encoder_file, upstream=False)
    x, pad = signals(encoder.config)
    with torch.no_grad(): assert torch.allclose(encoder(x, pad), encoder(x.masked_fill(pad[:, None], 1e4), pad), atol=1e-6)


def test_provenance_and_recipe(encoder_file, classifier_file, tmp_path):
    model = load_published(classifier_file)
    assert model.provenance["sha256"] == WeightFile(classifier_file).sha256 and model.provenance["file"] == classifier_file.name and model.provenance["format"] == "PFTSleep classifier"
    assert model.recipe == model.encoder.recipe == model.head.recipe == load_published(encoder_file).recipe == Recipe.pftsleep().to_dict()
    assert load_published(encoder_file, rate=100.).recipe is None # no recipe of theirs has that rate


def test_a_name_means_nothing(tmp_path, encoder_file):
    (tmp_path / "notes.txt").write_bytes(encoder_file.read_bytes())
    assert same(load_published(tmp_path / "notes.txt"), load_published(encoder_file))


def test_half_precision_and_double(tmp_path, modules):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in original_state(modules[0]).items()}
        encoder = load_published(saved(tmp_path / "x.ckpt", state), n_heads=2)
        assert all(torch.equal(a, b.to(dtype).float()) for a, b in zip(encoder.parameters(), modules[0].parameters(), strict=True))


def test_another_format_is_another_entry(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    torch.save({"conv.weight": torch.ones(3, 3)}, path)
    with pytest.raises(ModelError, match="unknown model.*conv.weight.*PFTSleep encoder"): load_published(path)
    def load(file, upstream, width=3):
        module = torch.nn.Linear(width, 3, bias=False)
        module.load_state_dict({"weight": read_tensors(file, file.tree)["conv.weight"]})
        return module
    monkeypatch.setattr(weights, "FORMATS", [*weights.FORMATS, Format("linear", lambda file: file.kind == "torch" and "conv.weight" in file.tree, load, ("width",))])
    assert (load_published(path, width=3).weight == 1).all()
    with pytest.raises(ConfigError, match="no choice of depth"): load_published(path, depth=3)


# ---- how many heads ----

def test_where_the_number_of_heads_comes_from(tmp_path, modules):
    state = original_state(modules[0])
    heads = lambda state, hyper=None, **which: load_published(saved(tmp_path / "x.ckpt", state, hyper), **which).config.n_heads
    learned = state | {k: torch.tensor(.3) for k in state if k.endswith("scale")} # as with a scale that was trained
    assert heads(state) == 2 # from the scale
    with pytest.raises(ModelError, match="how many heads.*pass `n_heads`"): heads(learned)
    assert load_published(tmp_path / "x.ckpt", n_heads=4).blocks[0].attention.scale == torch.tensor(.3) # honoured
    (tmp_path / "x_config.json").write_text('{"n_heads": 8}')
    assert heads(state) == heads(learned) == 8
    assert heads(state, dict(n_heads=4)) == 4 and heads(state, dict(n_heads=4), n_heads=1) == 1
    (tmp_path / "config.json").write_text('{"n_heads": 4}')
    with pytest.raises(ModelError, match="don't agree"): heads(state)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json.*can't be read"): heads(state)
    for wrong in (3, 0, "2", True, 2.):
        with pytest.raises(ModelError, match="can't share"): heads(state, n_heads=wrong)


# ---- nothing runs ----

class Wants:
    def __init__(self, function, *args): self.call = function, args
    def __reduce__(self): return self.call


def archive(path: Path, pickled: bytes, records: dict | None = None, compression=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, data in ({"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"} | (records or {})).items(): z.writestr(f"archive/{name}", data)
    return path


@pytest.fixture
def trap(tmp_path, monkeypatch):
    "A place where a mark appears if anything is run: a command, code, or a module that only has to be imported."
    mark = tmp_path / "it ran"
    (tmp_path / "innocent_metrics.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\ndef score(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield mark
    assert not mark.exists(), "something in the pickle was executed"
    assert "innocent_metrics" not in sys.modules


touch = "__import__('pathlib').Path({!r}).touch()"
EVIL = {"os.system": lambda m: Wants(os.system, f"touch '{m}'"), "builtins.exec": lambda m: Wants(exec, touch.format(str(m))), "builtins.eval": lambda m: Wants(eval, touch.format(str(m))),
    "builtins.open": lambda m: Wants(open, str(m), "w"), "builtins.getattr": lambda m: Wants(getattr, Path(m), "touch"), "pathlib": lambda m: Wants(Path.touch, Path(m)),
    "map": lambda m: Wants(list, Wants(map, Wants(eval, "print"), [1])), "torch.load": lambda m: Wants(torch.load, str(m))}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("evil", EVIL.values(), ids=EVIL)
def test_malicious_pickles_do_nothing(evil, protocol, trap, tmp_path):
    for contents in (evil(trap), {"state_dict": {"model.patch_encoder.W_P.0.weight": evil(trap)}}, {"state_dict": evil(trap)}, {"hyper_parameters": evil(trap), "state_dict": {}}):
        path = archive(tmp_path / "evil.ckpt", pickle.dumps(contents, protocol))
        with pytest.raises(ModelError): load_published(path)
        with pytest.raises(ModelError): read_lightning(path)


RAW = {"import": b"cinnocent_metrics\nscore\n.", "import, protocol 4": b"\x80\x04\x8c\x10innocent_metrics\x8c\x05score\x93.", "call": b"cinnocent_metrics\nscore\n)R.",
    "INST": b"(S'x'\niinnocent_metrics\nscore\n.", "OBJ": b"(cinnocent_metrics\nscore\nS'x'\no.", "NEWOBJ": b"\x80\x02cinnocent_metrics\nscore\n)\x81.",
    "NEWOBJ_EX": b"\x80\x04cinnocent_metrics\nscore\n)}\x92.", "BUILD": b"\x80\x02cinnocent_metrics\nscore\n)\x81}S'__setstate__'\ncinnocent_metrics\nscore\nsb."}


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW)
def test_nothing_is_imported_or_called(raw, trap):
    found = read_pickle(raw)
    assert found == Name("innocent_metrics", "score") or (type(found) is Call and found.what == Name("innocent_metrics", "score"))


@pytest.mark.parametrize("raw", [b"\x82\x01.", b"\x83\x01\x00.", b"\x84\x01\x00\x00\x00.", b"Pstorage\n.", b"\x80\x05\x97.", b"\x80\x02cos\nsystem\n.", b"\x80\x02c__builtin__\neval\n."],
    ids=["EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "os.system", "eval"])
def test_instructions_and_names_without_business_here(raw, trap):
    with pytest.raises(ModelError): read_pickle(raw)


def test_functions_among_the_settings_are_names(trap, tmp_path, modules):
    "What the published encoder may hold: a reference to a function of a package that is not there, or must not be imported."
    path = saved(tmp_path / "x.ckpt", original_state(modules[0]), dict(metrics=["HERE"]))
    with zipfile.ZipFile(path) as z: records = {n.split("/", 1)[1]: z.read(n) for n in z.namelist()}
    pickled = records.pop("data.pkl").replace(b"X\x04\x00\x00\x00HERE", b"cinnocent_metrics\nscore\n")
    assert same(load_published(archive(tmp_path / "y.ckpt", pickled, records)), modules[0])
    assert read_lightning(tmp_path / "y.ckpt")[1]["metrics"] == [Name("innocent_metrics", "score")]


def test_pickles_that_would_exhaust_a_naive_reader():
    deep = b"\x80\x02" + b")" + b"\x85" * 300_000 + b"."
    assert type(read_pickle(deep)) is tuple # and is thrown away without overflow
    for strange in (b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.", b"\x80\x02}G" + bytes(8) + b"K\x01s."): # as keys of a dict: hashing would recurse
        with pytest.raises(ModelError, match="strange key"): read_pickle(strange)
    doubled = b"\x80\x02]q\x00" + b"".join(b"(h%ch%clq%c" % (i, i, i + 1) for i in range(60)) + b"\x86" * 60 + b"." # a list of two lists of two lists ...
    assert len(read_pickle(doubled)) == 2 # 2**60 items, and no more than 60 lists


# ---- files that are not what they should be ----

def test_only_what_is_asked_for_is_read(tmp_path, modules):
    "Numbers of an optimiser may be damaged, or infinite, and take no memory."
    path = saved(tmp_path / "x.ckpt", original_state(modules[0]), optimizer_states=[{"state": {0: torch.full((7, 11), torch.inf)}}])
    data, place = bytearray(path.read_bytes()), path.read_bytes().find(torch.full((7, 11), torch.inf).numpy().tobytes())
    data[place:place + 8] = bytes(8)
    path.write_bytes(data)
    with pytest.raises(ModelError, match="CRC"): read_tensors(file := WeightFile(path), {"x": file.tree["optimizer_states"][0]["state"][0]})
    assert same(load_published(path), modules[0])


@settings(max_examples=60)
@given(cut=st.floats(0, .9999))
def test_truncated(cut, encoder_file):
    data = encoder_file.read_bytes()
    path = encoder_file.with_name("cut.ckpt")
    path.write_bytes(data[:int(cut * len(data))])
    with pytest.raises(ModelError, match="cut.ckpt"): load_published(path)


@settings(max_examples=150)
@given(place=st.floats(0, .99999), value=st.integers(1, 255), n=st.integers(1, 4))
def test_a_changed_byte_is_found_or_harmless(place, value, n, encoder_file, modules):
    data = bytearray(encoder_file.read_bytes())
    for i in range(n): data[(int(place * len(data)) + 997 * i) % len(data)] ^= value
    path = encoder_file.with_name("changed.ckpt")
    path.write_bytes(data)
    try: model = load_published(path)
    except PFTSleepError: return
    assert same(model, modules[0]) # it was in a name or a date that nobody reads


@settings(max_examples=300)
@given(data=st.binary(max_size=200))
def test_garbage_in_a_pickle(data):
    for pickled in (data, b"\x80\x02" + data + b"."):
        with suppress(ModelError): read_pickle(pickled)


@settings(max_examples=200)
@given(data=st.data())
def test_mutated_pickles(data, encoder_file):
    with zipfile.ZipFile(encoder_file) as z: pickled = bytearray(z.read(f"{encoder_file.stem}/data.pkl"))
    for _ in range(data.draw(st.integers(1, 8))): pickled[data.draw(st.integers(0, len(pickled) - 1))] = data.draw(st.integers(0, 255))
    path = archive(encoder_file.with_name("mutated.ckpt"), bytes(pickled), {f"data/{i}": bytes(64) for i in range(9)})
    for f in (load_published, read_lightning):
        with suppress(PFTSleepError): f(path)


def tensor_call(key="0", numel=4, offset=0, shape=(4,), strides=(1,), kind="FloatStorage"):
    "The pickle of {'state_dict': {'x': tensor}} with any claims."
    class P(pickle._Pickler):
        def persistent_id(self, obj): return ("storage", getattr(torch, kind), key, "cpu", numel) if obj is self else None
    buffer = io.BytesIO()
    p = P(buffer, 2)
    p.dump({"state_dict": {"x": Wants(torch._utils._rebuild_tensor_v2, p, offset, shape, strides, False, OrderedDict())}})
    return buffer.getvalue()


def test_claims_about_tensors_are_checked(tmp_path):
    record = {"data/0": np.arange(4, dtype=np.float32).tobytes()}
    read = lambda **claims: read_lightning(archive(tmp_path / "x.ckpt", tensor_call(**claims), record))[0]["x"]
    assert read().tolist() == [0, 1, 2, 3] and read(offset=1, shape=(3,)).tolist() == [1, 2, 3] and read(shape=(2, 2), strides=(1, 2)).tolist() == [[0, 2], [1, 3]]
    assert read(shape=(), strides=()).tolist() == 0 and read(shape=(0, 9), strides=(9, 1)).shape == (0, 9)
    assert read(kind="IntStorage").dtype == torch.int32 and read(kind="HalfStorage", numel=8).dtype == torch.float16
    for claims in (dict(offset=1), dict(shape=(5,)), dict(shape=(10**12,), strides=(0,)), dict(shape=(2,), strides=(4,)), dict(offset=-1), dict(shape=(-4,)), dict(shape=(4, 1)), dict(shape=[4]),
            dict(numel=5), dict(numel=10**15, shape=(10**15,)), dict(key="1"), dict(key="../../etc/passwd"), dict(kind="DoubleStorage"), dict(shape=(4.,)), dict(shape=(1,) * 17, strides=(1,) * 17)):
        with pytest.raises(ModelError, match="tensor 'x'"): read(**claims)


def test_shared_numbers_stay_bounded(tmp_path):
    "Ten thousand names for one storage would be ten thousand times its size in a module."
    t = torch.ones(1000)
    torch.save({"state_dict": {f"x{i}": t.view(10, 100) for i in range(100)}}, tmp_path / "x.ckpt")
    with pytest.raises(ModelError, match="too many views"): read_lightning(tmp_path / "x.ckpt")
    torch.save({"state_dict": {"a": t, "b": t.view(10, 100)}}, tmp_path / "y.ckpt") # honest sharing
    a, b = read_lightning(tmp_path / "y.ckpt")[0].values()
    assert a.data_ptr() == b.data_ptr()


def test_parameters_and_non_contiguous_tensors(tmp_path):
    t = torch.arange(12.).view(3, 4)
    torch.save({"state_dict": {"p": torch.nn.Parameter(t), "t": t.T, "slice": t[1:, ::2], "bool": t > 3, "long": t.long(), "none": torch.empty(0)}}, tmp_path / "x.ckpt")
    ours, theirs = read_lightning(tmp_path / "x.ckpt")[0], torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(ours[k], v) and ours[k].dtype == v.dtype for k, v in theirs.items())


def test_bombs(tmp_path):
    zeros = {"data/0": bytes(10**7)}
    with pytest.raises(ModelError, match="compressed"): load_published(archive(tmp_path / "x.ckpt", tensor_call(), zeros, zipfile.ZIP_DEFLATED))
    path = archive(tmp_path / "y.ckpt", tensor_call(), {"data/0": bytes(16)})
    data = bytearray(path.read_bytes())
    for entry in (b"PK\x03\x04", b"PK\x01\x02"): # both headers of data/0 claim a gigabyte
        at = data.rindex(entry) + (18 if entry[2] == 3 else 20)
        data[at:at + 8] = (2**30).to_bytes(4, "little") * 2
    path.write_bytes(data)
    with pytest.raises(ModelError, match="more than it is long"): read_lightning(path)
    with pytest.raises(ModelError, match="unbelievable length"): load_published(archive(tmp_path / "z.ckpt", b"\x80\x02" + b"N0" * 3_000_000 + b"N."))


WRONG = {"empty": (b"", "empty"), "page": (b"<!DOCTYPE html><title>Sign in</title>", "web page"), "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git-lfs pointer|pointer of git-lfs"),
    "legacy": (pickle.dumps({"state_dict": {}}, 2), "without an archive"), "text": (b"just some notes", "no known format"), "zip of nothing": (b"PK\x03\x04" + bytes(300), "damaged"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(300), "damaged, or no file of weights")}


@pytest.mark.parametrize(("data", "text"), WRONG.values(), ids=WRONG)
def test_other_kinds_of_files(data, text, tmp_path):
    path = tmp_path / "wrong.ckpt"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=f"wrong.ckpt: .*({text})"): load_published(path)


def test_other_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "doc.ckpt", "w") as z: z.writestr("word/document.xml", "<x/>")
    with pytest.raises(ModelError, match="not one of torch.save"): load_published(tmp_path / "doc.ckpt")
    with pytest.raises(ModelError, match="big-endian"): load_published(archive(tmp_path / "big.ckpt", pickle.dumps({}), {"byteorder": b"big"}))
    with pytest.raises(ModelError, match="is a folder.*from_pretrained"): load_published(tmp_path)
    with pytest.raises(ModelError, match="download_published"): load_published(tmp_path / "nothing.ckpt")
    for contents in ([1, 2], {"state_dict": [1]}, {3: 4}, None, {"state_dict": {"a": torch.ones(2)}}):
        torch.save(contents, tmp_path / "other.ckpt")
        with pytest.raises(ModelError, match="unknown model"): load_published(tmp_path / "other.ckpt")


def test_sha256(encoder_file, monkeypatch):
    right = WeightFile(encoder_file).sha256
    assert load_published(encoder_file, sha256=right.upper()).provenance["sha256"] == right
    with pytest.raises(ModelError, match="not 0000"): load_published(encoder_file, sha256="0" * 64)
    monkeypatch.setitem(weights.KNOWN_SHA256, encoder_file.name, "1" * 64)
    with pytest.raises(ModelError, match="not 1111"): load_published(encoder_file)
    assert load_published(encoder_file, sha256=right)


CHANGES = {"one missing": (lambda s: s.pop("model.layers.1.self_attn.W_K.bias"), "no tensor 'layers.1.self_attn.W_K.bias'"),
    "a layer missing": (lambda s: [s.pop(k) for k in list(s) if ".layers.0." in k], "no tensor 'layers.0"),
    "a head cut off": (lambda s: s.pop("model.head.W_P.6.bias"), "no tensor 'head.W_P.6.bias'"),
    "one too many": (lambda s: s.update({"model.layers.0.extra": torch.ones(3)}), "without a place, 'layers.0.extra'"),
    "renamed": (lambda s: s.update({"model.embed": s.pop("model.pe.W_pos")}), "no tensor 'pe.W_pos'"),
    "wrong shape": (lambda s: s.update({"model.layers.1.ff.0.weight": torch.ones(24, 15)}), "don't fit together"),
    "wrong number of dimensions": (lambda s: s.update({"model.patch_encoder.W_P.0.weight": torch.ones(24)}), "don't fit together"),
    "no dimension": (lambda s: s.update({"model.revin.affine_weight": torch.tensor(1.)}), "don't fit together"),
    "NaN": (lambda s: s["model.layers.1.ff.0.weight"][3].fill_(torch.nan), "'model.layers.1.ff.0.weight' holds NaN"),
    "infinite": (lambda s: s["model.layers.0.norm_attn.1.running_var"][3:4].fill_(-torch.inf), "running_var' holds NaN or infinite"),
    "no tensor": (lambda s: s.update({"model.pe.W_pos": [1., 2.]}), "'model.pe.W_pos' is a list, not a tensor"),
    "fused": (lambda s: s.update({"model.layers.0.self_attn.c_attn.weight": torch.ones(3)}), "fused attention"),
    "relative": (lambda s: s.update({"model.layers.0.self_attn.relative_bias_table": torch.ones(3)}), "relative positions"),
    "tAPE": (lambda s: s.update({"model.pe.pe": s.pop("model.pe.W_pos")}), "positions that aren't learned")}


@pytest.mark.parametrize(("change", "text"), CHANGES.values(), ids=CHANGES)
def test_tensors_that_do_not_fit(change, text, tmp_path, modules):
    state = original_state(*modules[:2])
    change(state)
    with pytest.raises(ModelError, match=f"x.ckpt: .*{text}"): load_published(saved(tmp_path / "x.ckpt", state))


@pytest.mark.parametrize(("change", "text"), [(lambda s: s.pop("feedforward.rnn.bias_ih_l0"), "don't fit together"), (lambda s: s.pop("feedforward.rnn.weight_hh_l0"), "weight_hh_l0"),
    (lambda s: s.update({"feedforward.norm_layer.weight": torch.ones(7)}), "norm_layer"), (lambda s: s.update({"extra": torch.ones(7)}), "without a place, 'extra'"),
    (lambda s: s.update({"feedforward.layers.0.4.weight": torch.ones(5, 9)}), "don't fit together"), (lambda s: [s.pop(k) for k in list(s) if k.startswith("feedforward")], "no published probe")],
    ids=["missing", "no size", "variant", "extra", "shape", "no head"])
def test_heads_that_do_not_fit(change, text, tmp_path, modules):
    state = original_state(modules[0], prefix="encoder.model.") | head_state(modules[2])
    change(state)
    with pytest.raises(ModelError, match=f"x.ckpt: .*{text}"): load_published(saved(tmp_path / "x.ckpt", state))


@pytest.mark.parametrize(("hyper", "text"), [(dict(dim1reduce=True), "over channels"), (dict(pre_norm=True), "pre-norm"), (dict(time_domain=False), "frequencies"), (dict(use_flash_attn=True), "fused"),
    (dict(relative_attn_type="eRPE"), "relative"), (dict(pos_encoding_type="tAPE"), "aren't learned"), (dict(act="relu"), "activation"), (dict(win_length=30, hop_length=15), "overlapping"),
    (dict(max_seq_len=310), "310 samples"), (dict(pre_norm=[[], torch.nn.functional.relu]), "pre-norm"), (dict(max_seq_len={}), "dict samples")], ids=str)
def test_variants_are_refused_by_name(hyper, text, tmp_path, modules):
    with pytest.raises(ModelError, match=text): load_published(saved(tmp_path / "x.ckpt", original_state(modules[0]), hyper))


def test_choices(encoder_file, classifier_file, tmp_path):
    for path, which, text in ((encoder_file, dict(part="head"), "no part 'head'"), (encoder_file, dict(modality="ekg"), "no choice of modality"), (classifier_file, dict(part="pretraining"), "no choice of part")):
        with pytest.raises(PFTSleepError, match=text): load_published(path, **which)
    two = saved(tmp_path / "x.ckpt", original_state(PatchTransformer(tiny(channels=("a", "b")))))
    with pytest.raises(ModelError, match="2 channels, without their names -> pass `channels`"): load_published(two)
    with pytest.raises(ModelError, match="pass `channels`"): load_published(two, channels=("a", "b", "c"))
    assert load_published(two, channels=["b", "a"]).config.channels == ("b", "a")


# ---- the Hub ----

def raising(kind: str, *bases: str):
    "A client that fails as huggingface_hub does: classes by name, with their parents."
    made = type(kind, tuple(type(b, (OSError,), {}) for b in bases) or (OSError,), {})
    def hf_hub_download(*args, **kwargs): raise made("403 Client Error: {braces} and\na long story")
    return SimpleNamespace(hf_hub_download=hf_hub_download)


@pytest.mark.parametrize(("client", "error", "text"), [
    (raising("GatedRepoError", "RepositoryNotFoundError"), NotAuthorised, "only to people who have asked.*huggingface.co/me/mine.*HF_TOKEN.*load_published"),
    (raising("RepositoryNotFoundError", "HfHubHTTPError"), NotAuthorised, "no me/mine, or not for this token.*HF_TOKEN"),
    (raising("RevisionNotFoundError", "HfHubHTTPError"), DownloadError, "no such revision"), (raising("RemoteEntryNotFoundError", "HfHubHTTPError", "EntryNotFoundError"), DownloadError, "no such file.*tree/main"),
    (raising("LocalEntryNotFoundError", "FileNotFoundError", "EntryNotFoundError"), DownloadError, "not in the cache.*network.*browser"), (raising("OfflineModeIsEnabled"), DownloadError, "HF_HUB_OFFLINE"),
    (raising("HFValidationError"), ConfigError, "OWNER/NAME"), (raising("ConnectTimeout"), DownloadError, r"can't be fetched: 403 Client Error: \(braces\) and -> try again")],
    ids=["gated", "no repository", "revision", "no file", "offline, not cached", "offline", "name", "anything else"])
def test_hub_errors_say_what_to_do(client, error, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    with pytest.raises(error, match=text) as e: download_published("weights.ckpt", repo="me/mine")
    assert "\n" not in str(e.value) and str(e.value).startswith("weights.ckpt: ") and e.value.__cause__ is not None


def test_hub_download(monkeypatch, tmp_path, encoder_file):
    asked = []
    def hf_hub_download(repo_id, filename, **more):
        asked.append((repo_id, filename, more))
        return str(encoder_file)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=hf_hub_download))
    right = WeightFile(encoder_file).sha256
    path = download_published("pft_sleep_encoder.ckpt", revision="abc", token="mine", cache=tmp_path, sha256=right)
    assert load_published(path, sha256=right).provenance["file"] == "pft_sleep_encoder.ckpt"
    assert asked == [("benmfox/PFTSleep", "pft_sleep_encoder.ckpt", dict(revision="abc", token="mine", cache_dir=tmp_path))]
    with pytest.raises(DownloadError, match="SHA-256"): download_published("pft_sleep_encoder.ckpt", sha256="0" * 64)
    for wrong in ("", "/etc/passwd", "../x", "a/../../b"):
        with pytest.raises(ConfigError, match="no file of a repository"): download_published(wrong)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pftsleep\[hub\].*browser"): download_published("pft_sleep_encoder.ckpt")


def test_hub_is_imported_only_when_used():
    code = "import sys, pftsleep.models.hub, pftsleep.models.weights; print('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
