"""Head parts: the published probe's numbers, and padding, missing channels and neighbours in the batch that must not change anything for our own."""
import contextlib
import itertools
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pftsleep.data.recording import Recording, array_channel
from pftsleep.data.signals import Recipe
from pftsleep.errors import ConfigError, ModelError, PFTSleepError
from pftsleep.models.head_parts import (
    PUBLISHED_HEAD_KEYS, AttentionPool, ChannelMixer, Head, HeadConfig, Pooler, Recurrent, TemporalModel, classifier, from_published_keys, load_head, published_config, valid_lengths)
from pftsleep.models.heads import LinearProbe, epoch_features, epoch_tokens
from pftsleep.models.stager import Stager
from pftsleep.models.transformer import PatchConfig, PatchTransformer, Tokens, n_parameters
from pftsleep.training.probe import ProbeTraining, StageTraining, StagingConfig, standardise

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "pftsleep"
needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="../shared/fixtures is not here")
MIXERS, TEMPORAL = ("concat", "affine", "mean", "attention", "per_channel", "none"), ("none", "gru", "lstm", "transformer", "conv")
POOLS, PRESETS = ("first", "attention", "mean", "max", "vote"), ("linear", "mlp", "attention_pool", "gru", "transformer")
CHANNELS = ("EEG", "EOG-L", "EMG-Chin")


def rand(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head_of(seed=0, channels=CHANNELS, d_model=4, **changes) -> Head:
    "A small head in float64 whose standardisation, biases and preferences all do something."
    torch.manual_seed(seed)
    sizes = dict(hidden=4, n_heads=2, kernel=3)
    head = Head(HeadConfig(channels, d_model, 6., **sizes | changes)).double().eval()
    with torch.no_grad():
        for p in head.parameters(): p += .1 * torch.randn_like(p)
        for norm in head.norms:
            norm.running_mean += torch.randn_like(norm.running_mean)
            norm.running_var += torch.rand_like(norm.running_var)
    return head


def tokens_of(b=2, n=20, pad=None, seed=0, c=3, d=4) -> Tokens:
    return Tokens(rand(b, c, n, d, seed=seed), torch.zeros(b, c, n, dtype=torch.bool) if pad is None else pad, 6.)


# ---- the published probe ----

def published() -> tuple[Head, dict]:
    state = torch.load(FIXTURES / "pft_classifier_tiny.ckpt", weights_only=True)["state_dict"]
    ours = from_published_keys(state)
    head = Head(published_config(ours))
    head.load_state_dict(ours)
    return head.eval(), state


def token_pad(mask: np.ndarray, n: int, channels: int) -> torch.Tensor: # [B,1,T] -> [B,C,N]
    return torch.from_numpy(mask.reshape(len(mask), 1, n, -1).all(-1)).expand(-1, channels, -1)


@needs_fixtures
@pytest.mark.parametrize("masked", [False, True])
def test_head_equals_the_original(masked):
    z, encoded = np.load(FIXTURES / "pft_head_tiny.npz"), np.load(FIXTURES / "pft_encoder_tiny.npz")
    head, _ = published()
    values = torch.from_numpy(encoded["z_mask"] if masked else z["z"]).mT # [B,C,D,N] there
    pad = token_pad(encoded["mask"] > 0, 40, 7) if masked else torch.zeros(3, 7, 40, dtype=torch.bool)
    assert not masked or (pad[0, 0, 0] and pad[2, 0, 10] and not pad[2, 0, 20] and pad[1, 0, -1]) # padding at the beginning, in the middle, at the end
    with torch.no_grad(): logits = head(Tokens(values, pad, 6.))
    for wanted in ("logits_mask3d", "logits_mask2d") if masked else ("logits_nomask",): assert np.abs(logits.mT.numpy() - z[wanted]).max() < 1e-6
    assert np.abs(logits.log_softmax(-1).mT.numpy() - z["logp_mask" if masked else "logp_nomask"]).max() < 1e-6
    assert np.abs(z["logits_mask3d"] - z["logits_nomask"]).max() > .1 # so padding matters in this fixture


@needs_fixtures
def test_sizes_are_read_off_the_file():
    head, state = published()
    assert head.config == HeadConfig.pftsleep(d_model=32, hidden=16)
    theirs = {k for k in state if k.startswith("feedforward.")}
    assert len(theirs) == len(head.state_dict()) and n_parameters(head) == sum(state[k].numel() for k in theirs)


@needs_fixtures
def test_every_published_key_has_a_place():
    shapes = json.loads((FIXTURES / "pft_full_keys.json").read_text())
    with torch.device("meta"): ours, head = from_published_keys({k: torch.empty(s) for k, s in shapes["classifier_checkpoint"].items()}), Head(HeadConfig.pftsleep())
    assert published_config(ours) == head.config
    assert {k: v.shape for k, v in head.state_dict().items()} == {k: v.shape for k, v in ours.items()}
    assert n_parameters(head) == shapes["feedforward_params"]


def test_published_size():
    with torch.device("meta"): assert n_parameters(Head(HeadConfig.pftsleep())) == 49_315_859


@pytest.mark.parametrize("changes", [{}, dict(temporal="lstm"), dict(classifier="linear"), dict(mixer="concat"), dict(n_layers=1), dict(n_classes=2), dict(channels=CHANNELS)], ids=str)
def test_variants_of_the_published_probe_are_recognised(changes):
    config = HeadConfig.pftsleep(d_model=8, hidden=4, **changes)
    ours, back = Head(config).state_dict(), {v: k for k, v in PUBLISHED_HEAD_KEYS.items()}
    theirs = {next(back[p] + k.removeprefix(p) for p in back if k.startswith(p)): v for k, v in ours.items()}
    for prefix in ("", "feedforward."):
        again = from_published_keys({prefix + k: v for k, v in theirs.items()})
        assert again.keys() == ours.keys()
    if config.mixer == "affine" and "channels" not in changes: assert published_config(again) == config
    Head(published_config(again)).load_state_dict(again)


@pytest.mark.parametrize("state", [{}, {"encoder.pe.W_pos": 0}, {"feedforward.norm_layer.weight": 0}, {"rnn.weight_hh_l0": 0}, {"affine_weight": 0, "rnn.weight_hh_l0": 1}], ids=str)
def test_something_else_is_no_published_probe(state):
    with pytest.raises(ModelError): published_config(from_published_keys({k: torch.zeros((2,) * n) for k, n in state.items()}))


# ---- upstream: what the original does with padding ----

def published_like(**changes) -> Head: return head_of(**dict(mixer="affine", temporal="gru", classifier="mlp", pool="mean", n_layers=2, standardise=False, upstream=True) | changes)


def naive_published(head: Head, values: torch.Tensor, length: int) -> torch.Tensor:
    "One night, read as spec 2.2 says: [C,N,D], tokens up to `length`, everything else zeros before the classifier."
    x = (values * head.mixer.weight[0, :, :, None] + head.mixer.bias[0, :, :, None]).transpose(0, 1).flatten(1)
    h = head.temporal.model.rnn(x[None, :length])[0][0]
    return head.classifier(torch.cat([h, h.new_zeros(len(x) - length, h.shape[1])])).unflatten(0, (-1, 5)).mean(1)


def test_upstream_takes_off_trailing_padding_and_nothing_else():
    pad = torch.zeros(4, 3, 20, dtype=torch.bool)
    pad[0, :, :4], pad[1, :, 7:9], pad[2, :, 13:], pad[3] = True, True, True, True
    head, tokens = published_like(), tokens_of(4, 20, pad)
    logits = head(tokens)
    for i, length in enumerate((20, 20, 13, 20)): # all padding: as if it were none
        assert torch.allclose(logits[i], naive_published(head, tokens.values[i], length), atol=1e-12)
        alone = head(Tokens(tokens.values[i:i + 1], pad[i:i + 1], 6.))
        assert torch.allclose(logits[i:i + 1], alone, atol=1e-12)
    silence = head.classifier(torch.zeros(1, 8, dtype=torch.float64)) # the constant answer that follows the end
    assert torch.allclose(logits[2, 3:], silence, atol=1e-12) and not torch.allclose(logits[2, 2], silence[0], atol=1e-3)
    assert not torch.allclose(published_like(upstream=False)(tokens)[0], logits[0], atol=1e-3)
    assert head.padded(tokens)[2].tolist() == [False, False, False, True] and head.padded(tokens)[3].all() # yet everyone is told


# ---- padding and missing channels change nothing ----

configs = st.fixed_dictionaries(dict(mixer=st.sampled_from(MIXERS), temporal=st.sampled_from(TEMPORAL), classifier=st.sampled_from(["linear", "mlp"]), pool=st.sampled_from(POOLS),
    n_layers=st.integers(1, 2), standardise=st.booleans()))


@given(configs, st.integers(1, 23), st.integers(1, 30), st.integers(0, 2**31), st.booleans())
@settings(max_examples=60)
def test_padding_never_changes_a_prediction(config, n, more, seed, partly):
    "However much is appended, whatever it holds, and whoever shares the batch; gaps included."
    head = head_of(seed, **config)
    pad = torch.rand(2, 3, n, generator=torch.Generator().manual_seed(seed)) < (.3 if partly else 0)
    tokens = tokens_of(2, n, pad, seed)
    logits = head(tokens)
    assert logits.shape == (2, -(-n // 5), 5) and logits.isfinite().all()
    grown = Tokens(torch.cat([tokens.values, torch.full((2, 3, more, 4), 1e6, dtype=torch.float64)], 2), torch.cat([pad, torch.ones(2, 3, more, dtype=torch.bool)], 2), 6.)
    longer = head(grown)
    assert torch.allclose(longer[:, :logits.shape[1]], logits, atol=1e-10)
    assert (longer[head.padded(grown)] == 0).all()
    night = rand(1, 3, n + more, 4, seed=seed + 1) # a longer one, in the same batch
    together = head(Tokens(torch.cat([grown.values, night]), torch.cat([grown.pad, torch.zeros(1, 3, n + more, dtype=torch.bool)]), 6.))
    assert torch.allclose(together[:2], longer, atol=1e-10)
    assert torch.allclose(head(tokens._replace(values=tokens.values.masked_fill(pad[..., None], torch.nan))), logits, atol=1e-10)


@pytest.mark.parametrize(("mixer", "temporal", "pool"), [*itertools.product(MIXERS, TEMPORAL, POOLS)])
def test_missing_channels(mixer, temporal, pool):
    "A channel may be missing; where channels are averaged or kept apart, the others are judged as if it had never existed."
    head = head_of(mixer=mixer, temporal=temporal, pool=pool)
    pad = torch.zeros(3, 3, 15, dtype=torch.bool)
    pad[0, 1], pad[1] = True, True # one channel; all of them; none
    logits = head(tokens := tokens_of(3, 15, pad))
    assert logits.isfinite().all() and (logits[1] == 0).all() and head.padded(tokens).tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert not torch.allclose(logits[0], head(tokens_of(3, 15))[0], atol=1e-6)
    if mixer in ("mean", "none"):
        fewer = head_of(mixer=mixer, temporal=temporal, pool=pool, channels=("EEG", "EMG-Chin"))
        keep = {k: v for k, v in head.state_dict().items() if not k.startswith("norms.")} # these mixers have nothing of a channel's own but its standardisation
        fewer.load_state_dict(keep | {k.replace("norms.2", "norms.1"): v for k, v in head.state_dict().items() if k.startswith(("norms.0", "norms.2"))})
        assert torch.allclose(fewer(Tokens(tokens.values[:1, [0, 2]], pad[:1, [0, 2]], 6.)), logits[:1], atol=1e-10)


@pytest.mark.parametrize("temporal", TEMPORAL[1:])
def test_neighbours_have_a_say_and_order_matters(temporal):
    head, tokens = head_of(temporal=temporal), tokens_of(1, 40)
    other = tokens.values.clone()
    other[:, :, 5:10] += 1
    moved = (head(tokens) - head(tokens._replace(values=other)))[0].abs().amax(-1)
    assert moved[0] > 1e-6 and moved[2] > 1e-6 # both ways
    assert temporal != "conv" or (moved[3:] == 0).all() # three epochs wide
    flipped = head(Tokens(tokens.values.flip(2), tokens.pad, 6.))
    assert not torch.allclose(flipped.flip(1), head(tokens), atol=1e-6)


def test_a_gap_is_time_that_passed():
    "Padding in the middle stays where it is: what comes after a gap of an hour is not what comes next."
    head = head_of(temporal="gru", pool="mean")
    tokens, pad = tokens_of(1, 20), torch.zeros(1, 3, 20, dtype=torch.bool)
    pad[:, :, 5:15] = True
    closed = torch.cat([tokens.values[:, :, :5], tokens.values[:, :, 15:]], 2)
    assert not torch.allclose(head(tokens._replace(pad=pad))[:, [0, 3]], head(Tokens(closed, pad[:, :, [0] * 10], 6.)), atol=1e-6)


# ---- parts against their definition ----

@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_valid_lengths(rows):
    expected = [max((i + 1 for i, p in enumerate(row) if not p), default=0) for row in rows]
    assert valid_lengths(torch.tensor(rows)).tolist() == expected


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_packed_equals_each_alone(kind):
    torch.manual_seed(0)
    part = Recurrent(HeadConfig(("a",), 3, 6., temporal=kind, hidden=4, n_layers=2), 3).double().eval()
    x, lengths = rand(4, 9, 3), [9, 1, 5, 0]
    pad = torch.arange(9)[None] >= torch.tensor(lengths)[:, None]
    out = part(x.masked_fill(pad[..., None], 0), pad)
    assert out.shape == (4, 9, part.width)
    for i, n in enumerate(lengths):
        assert (out[i, n:] == 0).all()
        if n: assert torch.allclose(out[i, :n], part.rnn(x[i:i + 1, :n])[0][0], atol=1e-12)


@pytest.mark.parametrize(("kind", "temperature"), [("mean", 1.), ("max", 1.), ("vote", 1.), ("vote", 2.)])
def test_pooling_equals_its_definition(kind, temperature):
    x, pad = rand(2, 3, 10, 5), torch.rand(2, 3, 10, generator=torch.Generator().manual_seed(0)) < .5
    pad[1, :, 5:] = True
    out = Pooler(HeadConfig(CHANNELS, 4, 6., pool=kind, temperature=temperature))(x, pad, 5)
    for b, e in itertools.product(range(2), range(2)):
        some = x[b, :, 5 * e:5 * e + 5][~pad[b, :, 5 * e:5 * e + 5]]
        wanted = {"mean": lambda s: s.mean(0), "max": lambda s: s.amax(0), "vote": lambda s: (s / temperature).softmax(-1).mean(0).log()}[kind]
        assert torch.allclose(out[b, e], wanted(some) if len(some) else torch.zeros(5, dtype=torch.float64), atol=1e-12)


def test_a_vote_survives_certainty():
    "Probabilities that are 0 in float32 have no logarithm; the vote never computes them."
    x = torch.tensor([[300., 0., -300.]]).repeat(5, 1)[None, None].requires_grad_()
    out = Pooler(HeadConfig(("a",), 4, 6., pool="vote", n_classes=3))(x, torch.zeros(1, 1, 5, dtype=torch.bool), 5)
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("kind", MIXERS)
def test_a_missing_channel_is_zeros_wherever_it_has_a_place(kind):
    torch.manual_seed(0)
    mixer = ChannelMixer(HeadConfig(CHANNELS, 4, 6., mixer=kind)).double()
    with torch.no_grad():
        for p in mixer.parameters(): p += 1
    pad = torch.zeros(1, 3, 2, dtype=torch.bool)
    pad[:, 1, 0], pad[:, :, 1] = True, True
    out, gone = mixer(rand(1, 3, 2, 4), pad)
    assert (out[:, :, 1] == 0).all() and gone[..., 1].all() and out[:, 0, 0].abs().sum() > 0
    if kind in ("concat", "affine"): assert (out[0, 0, 0, 4:8] == 0).all()
    if kind in ("per_channel", "none"): assert (out[0, 1, 0] == 0).all() and gone[0, :, 0].tolist() == [False, True, False]


def test_attention_over_nothing():
    "Zeros, and no gradient that isn't a number, whatever the padding holds."
    pool, x = AttentionPool(4, 2).double(), rand(2, 3, 4).requires_grad_()
    pad = torch.tensor([[True, True, True], [False, True, False]])
    out = pool(x, pad)
    out.square().sum().backward()
    assert (out[0] == 0).all() and (x.grad[0] == 0).all() and x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in pool.parameters())


def test_linear_preset_is_the_linear_probe():
    torch.manual_seed(0)
    encoder = PatchTransformer(PatchConfig.tiny(channels=CHANNELS, d_model=8), recipe={"a": 1})
    probe, head = LinearProbe.of(encoder).eval(), Head.of(encoder).eval()
    for norm in probe.norms: norm.running_mean.normal_()
    head.load_state_dict({k.replace("linear.", "classifier."): v for k, v in probe.state_dict().items()})
    pad = torch.rand(2, 3, 23, generator=torch.Generator().manual_seed(0)) < .4
    pad[0, :, 10:] = True
    tokens = Tokens(rand(2, 3, 23, 8).float(), pad, 6.)
    known = ~epoch_features(tokens)[1]
    assert torch.allclose(head(tokens)[known], probe(tokens)[known], atol=1e-6) and (known == ~head.padded(tokens)).all()
    assert torch.allclose(head(epoch_tokens(tokens)), head(tokens), atol=1e-6)
    assert head.recipe == encoder.recipe and n_parameters(head) == n_parameters(probe)


# ---- gradients ----

@pytest.mark.parametrize(("mixer", "temporal", "pool"), [*((m, "none", "mean") for m in MIXERS), *(("concat", t, "first") for t in TEMPORAL), *(("none", "gru", p) for p in POOLS)])
def test_gradients(mixer, temporal, pool):
    "As finite differences say, with gaps, a missing channel and a night of nothing."
    head = head_of(mixer=mixer, temporal=temporal, pool=pool, classifier="mlp" if pool == "vote" else "linear")
    pad = torch.zeros(2, 3, 10, dtype=torch.bool)
    pad[0, 1], pad[0, :, 7:], pad[0, 0, 2], pad[1] = True, True, True, True
    tokens = tokens_of(2, 10, pad)
    assert torch.autograd.gradcheck(lambda v: head(tokens._replace(values=v)), tokens.values.clone().requires_grad_())
    values = tokens.values.clone().requires_grad_()
    head(tokens._replace(values=values)).square().sum().backward()
    assert (values.grad[pad] == 0).all() and all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("preset", [*PRESETS, "pftsleep"])
def test_every_parameter_learns(preset):
    torch.manual_seed(0)
    changes = dict(hidden=8) if preset == "pftsleep" else {}
    head = Head(HeadConfig.preset(preset, CHANNELS, 4, 6., **changes)).train()
    head(Tokens(rand(2, 3, 20, 4).float(), torch.zeros(2, 3, 20, dtype=torch.bool), 6.)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters() if p.requires_grad)


@pytest.mark.parametrize("part", [AttentionPool(4, 3), ChannelMixer(HeadConfig(CHANNELS, 4, 6., mixer="attention"))], ids=["pool", "mixer"])
def test_weights_sum_to_one(part):
    "A mean of equal things is that thing, whoever is missing."
    part, pad = part.double(), torch.tensor([[[False, True], [True, True], [False, False]]])
    x = torch.tensor([3., -1, 0, 5], dtype=torch.float64).expand(1, 3, 2, 4)
    out = part(x.transpose(1, 2), pad.mT) if isinstance(part, AttentionPool) else part(x, pad)[0][:, 0]
    assert torch.allclose(out.unflatten(-1, (3, 4)), x.transpose(1, 2), atol=1e-12)


# ---- settings and files ----

@pytest.mark.parametrize("wrong", [dict(mixer="blend"), dict(temporal="rnn"), dict(classifier="forest"), dict(pool="last"), dict(channels=()), dict(channels=("a", "a")), dict(hidden=0),
    dict(n_layers=0), dict(d_model=-1), dict(kernel=4), dict(dropout=1.), dict(dropout=-.1), dict(temperature=0.), dict(temperature=2.), dict(n_classes=1), dict(seconds_per_token=0.),
    dict(temporal="transformer", hidden=6, n_heads=2), dict(upstream=True), dict(upstream=True, standardise=False, temporal="gru"),
    dict(upstream=True, standardise=False, pool="mean"), dict(upstream=True, standardise=False, pool="mean", temporal="gru", mixer="attention")], ids=str)
def test_contradictions_are_refused(wrong):
    with pytest.raises(ConfigError): HeadConfig(**dict(channels=CHANNELS, d_model=4, seconds_per_token=6.) | wrong)


def test_epochs_are_whole_tokens():
    with pytest.raises(ModelError, match="no whole number"): HeadConfig(CHANNELS, 4, 7.)
    with pytest.raises(ConfigError, match="choose from linear"): HeadConfig.preset("forest", CHANNELS, 4, 6.)


@pytest.mark.parametrize("preset", [*PRESETS, "pftsleep"])
def test_tokens_of_another_encoder_are_refused(preset):
    head = Head(HeadConfig.preset(preset, CHANNELS, 4, 6., hidden=8)).eval()
    good = Tokens(torch.zeros(1, 3, 10, 4), torch.zeros(1, 3, 10, dtype=torch.bool), 6.)
    head(good)
    for bad in (good._replace(values=good.values[..., :3]), Tokens(good.values[:, :2], good.pad[:, :2], 6.), good._replace(seconds_per_token=3.)):
        with pytest.raises(ModelError, match="made for 3 channels"): head(bad)
    if head.config.pool == "first": assert head(good._replace(seconds_per_token=30.)).shape == (1, 10, 5)
    else:
        with pytest.raises(ModelError, match="made for 3 channels"): head(good._replace(seconds_per_token=30.))


@pytest.mark.parametrize("preset", [*PRESETS, "pftsleep"])
def test_saved_and_loaded(preset, tmp_path):
    torch.manual_seed(0)
    head = Head(HeadConfig.preset(preset, CHANNELS, 4, 6., hidden=8), {"rate": 100}).eval()
    again, tokens = load_head(head.save_pretrained(tmp_path / "head")), Tokens(rand(1, 3, 10, 4).float(), torch.zeros(1, 3, 10, dtype=torch.bool), 6.)
    assert again.config == head.config and again.recipe == head.recipe and torch.equal(again(tokens), head(tokens)) and not again.training


@given(st.dictionaries(st.sampled_from([f for f in HeadConfig.__dataclass_fields__] + ["more"]), st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)))
@settings(max_examples=40)
def test_a_broken_folder_says_so(tmp_path_factory, changes):
    folder = Head(HeadConfig(CHANNELS, 4, 6.)).save_pretrained(tmp_path_factory.mktemp("head"))
    about = json.loads((folder / "config.json").read_text())
    about["config"] |= changes
    (folder / "config.json").write_text(json.dumps(about))
    with contextlib.suppress(PFTSleepError): load_head(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"class": "Encoder"}', '{"class": ["LinearProbe"]}'])
def test_no_head_is_there(text, tmp_path):
    with pytest.raises(ModelError): load_head(tmp_path)
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError): load_head(tmp_path)


# ---- in the places of a linear probe ----

@pytest.mark.parametrize("preset", [*PRESETS, "pftsleep"])
def test_takes_the_place_of_a_linear_probe(preset):
    torch.manual_seed(0)
    encoder = PatchTransformer(PatchConfig.tiny(channels=("EEG", "EOG-L"), rate=20., d_model=8)).eval()
    head = Head.of(encoder, preset=preset, hidden=8)
    stager = Stager(encoder, head, Recipe.default())
    samples = rand(2, 20 * 100).float().numpy()
    rec = Recording("night", {c: array_channel(c, s, fs=20., unit="uV", kind=c[:3]) for c, s in zip(stager.channels, samples, strict=True)})
    h = stager.stage(rec)
    assert len(h) == 3 and np.allclose(h.probabilities.sum(1), 1, atol=1e-5)
    batch = dict(x=rand(2, 2, 20 * 90).float(), pad=torch.zeros(2, 2, 20 * 90, dtype=torch.bool), stages=torch.tensor([[0, 1, 4], [2, -1, 3]]))
    batch["pad"][1, 0] = True
    loss = StageTraining(stager, StagingConfig()).train().batch_loss(batch, torch.Generator())
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in stager.parameters())
    if head.config.pool == "first": # a probe is trained on one token per epoch
        tokens = epoch_tokens(encoder.encode(batch["x"], batch["pad"]))
        standardise(head, [dict(x=v.detach(), pad=p) for v, p in zip(tokens.values, tokens.pad, strict=True)])
        before = head.norms[0].running_mean.clone()
        assert ProbeTraining(head, StagingConfig()).train().batch_loss(dict(x=tokens.values, pad=tokens.pad, stages=batch["stages"]), torch.Generator()).isfinite()
        assert torch.equal(head.norms[0].running_mean, before) and before.abs().sum() > 0


@pytest.mark.parametrize("preset", [*PRESETS, "pftsleep"])
def test_in_half_precision(preset):
    "bfloat16 by autocast stays close, padding and all."
    torch.manual_seed(0)
    head = Head(HeadConfig.preset(preset, CHANNELS, 16, 6., **dict(hidden=16) if preset == "pftsleep" else {})).eval()
    pad = torch.arange(20).expand(2, 3, -1) >= torch.tensor([20, 12])[:, None, None]
    tokens = Tokens(rand(2, 3, 20, 16).float(), pad, 6.)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): half = head(tokens)
    assert half.isfinite().all() and (half - head(tokens)).abs().max() < .1


def test_temporal_model_keeps_channels_apart():
    model = TemporalModel(HeadConfig(CHANNELS, 4, 6., temporal="gru", hidden=4), 4).double().eval()
    x, pad = rand(2, 3, 6, 4), torch.zeros(2, 3, 6, dtype=torch.bool)
    assert torch.allclose(model(x, pad)[:, 1:2], model(x[:, 1:2], pad[:, 1:2]), atol=1e-12)
    assert TemporalModel(HeadConfig(CHANNELS, 4, 6.), 7).width == 7 and classifier(HeadConfig(CHANNELS, 4, 6.), 7).in_features == 7


def test_config_is_plain_data(): assert HeadConfig(**json.loads(json.dumps(asdict(HeadConfig.pftsleep())))) == HeadConfig.pftsleep()
