"""What every encoder promises, whatever is inside: one suite over all of them. A new encoder, or a new option of one, is a line in `CASES`."""
import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file

from pftsleep.errors import ModelError
from pftsleep.models.heads import LinearProbe, epoch_features, epoch_tokens
from pftsleep.models.transformer import PatchConfig, PatchTransformer, Pretrained, Reconstruction, Tokens, n_parameters

CHANNELS = ("EEG", "EOG", "EMG")


@dataclass(frozen=True)
class Case:
    "An encoder and the input that it takes."
    make: Callable[[], Pretrained]
    samples: int # of a recording
    any_length: bool = True # other lengths do as well
    ignores_padding: bool = True # padding never changes a prediction; only published models are excused


def patched(samples=200, **settings):
    "Patches of 20 samples, 2 s each; ten of them."
    config = PatchConfig(**dict(channels=CHANNELS, rate=10., patch=20, d_model=16, n_heads=2, d_ff=32, dropout=.1) | settings)
    return Case(lambda: PatchTransformer(config, recipe={"rate": 10, "channels": list(CHANNELS)}), samples, config.max_patches is None, not config.upstream)


PFTSLEEP = dict(embedding="per_channel", position="learned", max_patches=10, norm="batch", pre_norm=False, final_norm=False, residual_attention=True)
PAT = dict(embedding="shared", position="sine_tf", d_model=96, n_heads=2, head_width=96, activation="relu", norm_eps=1e-6, pre_norm=False, final_norm=False, instance_norm=False, dropout_at="branches")
AAR = dict(embedding_bias=False, position="learned", max_patches=10, head_width=8, activation="relu", instance_norm=False, dropout_at="layers")
CASES = {
    "tiny": patched(), "tiny, one channel": Case(lambda: PatchTransformer(PatchConfig.tiny(rate=10.)), 600),
    "pftsleep": patched(**PFTSLEEP, upstream=True), "pftsleep, corrected": patched(**PFTSLEEP),
    "per channel": patched(embedding="per_channel"), "shared": patched(embedding="shared"),
    "learned": patched(position="learned", max_patches=10), "sine": patched(position="sine"), "no positions": patched(position="none"),
    "batch norm": patched(norm="batch"), "after": patched(pre_norm=False), "no final norm": patched(final_norm=False),
    "residual": patched(residual_attention=True, n_layers=3), "raw amplitudes": patched(instance_norm=False), "no layers": patched(n_layers=0),
    "PAT": patched(**PAT), "PAT, as published": patched(**PAT, upstream=True, max_patches=10), "PAT-Conv": patched(**PAT | dict(embedding="short_conv")),
    "animal activity": patched(**AAR, embedding="shared"), "animal activity, conv": patched(**AAR, embedding="deep_conv"),
    "wide heads": patched(head_width=12), "one head": patched(n_heads=1), "short patches": patched(patch=2, samples=20), "one sample per patch": patched(patch=1, rate=1., samples=10),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def rand(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def built(case: Case, seed=0):
    "The encoder, every parameter away from its initial zeros and ones, in eval mode."
    torch.manual_seed(seed)
    encoder = case.make()
    for p in encoder.parameters():
        if p.requires_grad: p.data += .05 * torch.randn_like(p)
    return encoder.eval()


def signals(encoder, case, n=2, seed=0): return rand(n, len(encoder.config.channels), case.samples, seed=seed) * 20 + 3


@every_case
@torch.no_grad()
def test_shapes(case):
    encoder = built(case)
    x = signals(encoder, case)
    tokens = encoder.encode(x)
    c, n = len(encoder.config.channels), tokens.values.shape[2]
    assert tokens.values.shape == (2, c, n, encoder.config.d_model) and tokens.pad.shape == (2, c, n) and tokens.pad.dtype == torch.bool
    assert n * tokens.seconds_per_token == pytest.approx(case.samples / encoder.config.rate)
    assert encoder.pool(tokens).shape == (2, encoder.config.d_model)
    assert torch.allclose(encoder.pool(tokens), tokens.values.mean((1, 2)), atol=1e-5)
    assert torch.isfinite(tokens.values).all() and not tokens.pad.any() and tokens.values.std() > 1e-3


@every_case
@torch.no_grad()
def test_repeatable_and_leaves_its_input_alone(case):
    encoder = built(case)
    x, pad = signals(encoder, case), torch.zeros(2, case.samples, dtype=torch.bool)
    pad[1, case.samples // 2:] = True
    before, state = (x.clone(), pad.clone()), copy.deepcopy(encoder.state_dict())
    first, second = encoder.encode(x, pad), encoder.encode(x, pad)
    assert torch.equal(first.values, second.values) and torch.equal(x, before[0]) and torch.equal(pad, before[1])
    assert all(torch.equal(v, state[k]) for k, v in encoder.state_dict().items())
    assert torch.equal(copy.deepcopy(encoder).encode(x, pad).values, first.values)


@every_case
@torch.no_grad()
def test_a_batch_is_its_recordings(case):
    "No recording sees another one, and none depends on its place."
    encoder = built(case)
    x = signals(encoder, case, n=3)
    together = encoder.encode(x).values
    for i in range(3): assert torch.allclose(encoder.encode(x[i:i + 1]).values[0], together[i], atol=2e-5)


@every_case
@torch.no_grad()
def test_channels_are_told_apart_only_by_their_weights(case):
    "Changing one channel changes the tokens of that channel and of no other."
    encoder = built(case)
    x = signals(encoder, case)
    before = encoder.encode(x).values
    x[:, 0] += 10 * rand(2, case.samples, seed=1)
    after = encoder.encode(x).values
    assert torch.allclose(after[:, 1:], before[:, 1:], atol=2e-5) and (after[:, 0] - before[:, 0]).abs().max() > 1e-3


@every_case
@torch.no_grad()
def test_all_ways_to_say_padding_agree(case):
    encoder = built(case)
    x, pad = signals(encoder, case), torch.zeros(2, case.samples, dtype=torch.bool)
    pad[0, case.samples // 2:] = True
    wanted = encoder.encode(x, pad)
    for other in (pad[:, None], pad[:, None].expand(x.shape), pad[:, None].float()): assert torch.equal(encoder.encode(x, other).values, wanted.values)
    assert torch.allclose(encoder.encode(x, torch.zeros_like(pad)).values, encoder.encode(x).values, atol=2e-5)
    assert wanted.pad[0].any() and not wanted.pad[1].any()


@every_case
@torch.no_grad()
def test_padding_never_changes_a_prediction(case):
    "What lies in the padding, however loud, is not seen; padded tokens are zeros."
    encoder = built(case)
    x, pad = signals(encoder, case), torch.zeros(2, case.samples, dtype=torch.bool)
    pad[0, case.samples // 2 + 1:] = True
    if not case.ignores_padding: pytest.skip("published models count padding in their statistics")
    quiet, loud = encoder.encode(x.masked_fill(pad[:, None], 0), pad), encoder.encode(x.masked_fill(pad[:, None], 1e6), pad)
    assert torch.equal(quiet.values, loud.values) and (quiet.values[quiet.pad] == 0).all()
    assert torch.equal(encoder.encode(x.masked_fill(pad[:, None], torch.nan), pad).values, quiet.values)
    if case.any_length:
        alone = encoder.encode(x[:1, :, :case.samples // 2 + 1]).values
        assert torch.allclose(quiet.values[:1, :, :alone.shape[2]], alone, atol=2e-5)


@every_case
@torch.no_grad()
def test_missing_channels(case):
    "A wholly padded channel changes nothing for the others; a recording without any channel is finite, and pools to zeros."
    encoder = built(case)
    x = signals(encoder, case)
    pad = torch.zeros(x.shape, dtype=torch.bool)
    pad[0, 0] = True
    tokens, full = encoder.encode(x, pad), encoder.encode(x)
    assert tokens.pad[0, 0].all() and not tokens.pad[0, 1:].any()
    assert torch.allclose(tokens.values[0, 1:], full.values[0, 1:], atol=2e-5) and torch.allclose(tokens.values[1], full.values[1], atol=2e-5)
    if x.shape[1] > 1: assert torch.allclose(encoder.pool(tokens)[0], tokens.values[0, 1:].mean((0, 1)), atol=1e-5)
    pad[0] = True
    nothing = encoder.encode(x, pad)
    assert torch.isfinite(nothing.values).all() and (encoder.pool(nothing)[0] == 0).all()
    if case.ignores_padding: assert (nothing.values[0] == 0).all()


@every_case
@torch.no_grad()
def test_odd_lengths(case):
    "One sample, one less and one more than a patch: the last patch is filled up, and what was filled up is padding."
    encoder = built(case)
    if not case.any_length: pytest.skip("a model with a fixed length")
    p = encoder.config.patch
    for t in {1, max(1, p - 1), p, p + 1, 3 * p + p // 2}:
        x = rand(1, len(encoder.config.channels), t)
        tokens = encoder.encode(x)
        assert tokens.values.shape[2] == -(-t // p) and not tokens.pad.any() and torch.isfinite(tokens.values).all()


@every_case
@torch.no_grad()
def test_double_precision(case):
    encoder = built(case)
    x = signals(encoder, case)
    single, double = encoder.encode(x), encoder.double().encode(x.double())
    assert double.values.dtype == torch.float64 and (double.values - single.values).abs().max() < 1e-4 * max(1, single.values.abs().max())


@every_case
@torch.no_grad()
def test_half_precision(case):
    encoder = built(case)
    x = signals(encoder, case)
    with torch.autocast("cpu", torch.bfloat16): half = encoder.encode(x).values.float()
    exact = encoder.encode(x).values
    assert (half - exact).std() < .1 * exact.std()


@every_case
def test_every_weight_learns(case):
    "In training mode, with padding in the batch, the loss reaches every weight that isn't frozen, with finite gradients."
    encoder = built(case).train()
    x, pad = signals(encoder, case, n=4), torch.zeros(4, case.samples, dtype=torch.bool)
    pad[0], pad[1, case.samples // 2:] = True, True
    values = encoder.encode(x, pad).values
    (values * rand(*values.shape, seed=1)).sum().backward()
    for name, p in encoder.named_parameters():
        if p.requires_grad: assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name
        else: assert name.endswith("scale"), name


@every_case
@torch.no_grad()
def test_saved_and_loaded(case, tmp_path):
    encoder = built(case)
    x = signals(encoder, case)
    again = type(encoder).from_pretrained(encoder.save_pretrained(tmp_path / "new" / "folder"))
    assert again.config == encoder.config and again.recipe == encoder.recipe and not again.training and n_parameters(again) == n_parameters(encoder)
    assert torch.equal(again.encode(x).values, encoder.encode(x).values)


@every_case
def test_wrong_weights_are_refused(case, tmp_path):
    encoder = built(case)
    folder = encoder.save_pretrained(tmp_path)
    weights, about = (folder / "model.safetensors"), json.loads((folder / "config.json").read_text())

    def with_weights(state):
        save_file(state, weights)
        (folder / "config.json").write_text(json.dumps(about | {"sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}))
        return pytest.raises(ModelError, match="don't fit")

    state = load_file(weights)
    first = next(k for k in state if not k.endswith("num_batches_tracked")) # torch itself supplies that counter
    for wrong in ({k: v for k, v in state.items() if k != first}, state | {"another": torch.zeros(1)}, {k: v[..., None] for k, v in state.items()}):
        with with_weights(wrong): type(encoder).from_pretrained(folder)


def test_damaged_folders_are_refused(tmp_path):
    folder = built(CASES["tiny"]).save_pretrained(tmp_path / "model")
    weights, settings = folder / "model.safetensors", folder / "config.json"
    good = weights.read_bytes(), json.loads(settings.read_text())
    load = lambda: PatchTransformer.from_pretrained(folder)

    weights.write_bytes(good[0][:-1] + bytes([good[0][-1] ^ 1]))
    with pytest.raises(ModelError, match="not those that were saved"): load()
    weights.write_bytes(good[0])
    for change in (dict(config=good[1]["config"] | {"d_modell": 3}), dict(config=good[1]["config"] | {"n_heads": 3}), dict(config=None), dict(config=good[1]["config"] | {"d_model": "64"})):
        settings.write_text(json.dumps(good[1] | change))
        with pytest.raises(ModelError, match="don't fit"): load()
    for text, problem in (("[]", "holds no"), ("{", "can't be read"), (json.dumps(good[1] | {"class": "Another"}), "holds no PatchTransformer"), (json.dumps({"class": "PatchTransformer"}), "not those")):
        settings.write_text(text)
        with pytest.raises(ModelError, match=problem): load()
    encoder = built(CASES["tiny"])
    with pytest.raises(ModelError, match="can't be saved"): encoder.save_pretrained(weights) # a file is in the way
    encoder.recipe = {"filter": lambda x: x}
    with pytest.raises(ModelError, match="plain data"): encoder.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    settings.unlink()
    with pytest.raises(ModelError, match=r"config\.json"): load()
    with pytest.raises(ModelError, match="nowhere"): PatchTransformer.from_pretrained(tmp_path / "nowhere")


@every_case
@torch.no_grad()
def test_wrong_input_is_refused(case):
    encoder = built(case)
    x = signals(encoder, case)
    for wrong in (x[0], x[:, :0], torch.cat([x, x], 1), x[..., :0]):
        with pytest.raises(ModelError, match="signals have shape"): encoder.encode(wrong)
    for pad in (torch.zeros(2, case.samples - 1), torch.zeros(3, case.samples), torch.zeros(2, 9, case.samples), torch.zeros(case.samples)):
        with pytest.raises(ModelError, match="padding has shape"): encoder.encode(x, pad.bool())
    for bad in (torch.nan, torch.inf):
        x[0, 0, 0] = bad
        with pytest.raises(ModelError, match="NaN or infinite"): encoder.encode(x)
    if not case.any_length and case.ignores_padding:
        with pytest.raises(ModelError, match="windows"): encoder.encode(torch.cat([x.nan_to_num(0, 0), signals(encoder, case)], -1))


@every_case
@torch.no_grad()
def test_reconstruction(case):
    encoder = built(case)
    decoder = Reconstruction(encoder.config)
    x = signals(encoder, case)
    patches, pad = encoder.patches(x)
    assert pad is None and decoder.reconstruct(encoder.run(encoder.embed(patches))).shape == patches.shape


# ---- the probe that reads them ----

@every_case
def test_probe(case, tmp_path):
    "A probe fits any encoder; padding, missing channels and other recordings of the batch change nothing; it saves, loads, and learns with every weight."
    encoder = built(case)
    x = signals(encoder, case)
    with torch.no_grad(): tokens = encoder.encode(x)
    probe = LinearProbe.of(encoder, n_classes=3, seconds_per_epoch=2 * tokens.seconds_per_token)
    logits = probe.train()(tokens)
    epochs = -(-tokens.values.shape[2] // 2)
    assert logits.shape == (2, epochs, 3)
    logits.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in probe.parameters())
    probe.eval()
    with torch.no_grad():
        wanted = probe(tokens)
        longer = Tokens(torch.nn.functional.pad(tokens.values, (0, 0, 0, 5), value=7.), torch.nn.functional.pad(tokens.pad, (0, 5), value=True), tokens.seconds_per_token)
        assert torch.allclose(probe(longer)[:, :epochs], wanted, atol=1e-5)
        assert torch.allclose(probe(Tokens(tokens.values[:1], tokens.pad[:1], tokens.seconds_per_token)), wanted[:1], atol=1e-5)
        assert torch.equal(LinearProbe.from_pretrained(probe.save_pretrained(tmp_path))(tokens), wanted)
        rows, pad = epoch_features(tokens, 2 * tokens.seconds_per_token)
        assert rows.shape == (2, epochs, len(encoder.config.channels) * encoder.config.d_model) and not pad.any()
    with pytest.raises(ModelError, match="whole number"): LinearProbe.of(encoder, seconds_per_epoch=1.5 * tokens.seconds_per_token)
    with pytest.raises(ModelError, match="made for"): probe(Tokens(tokens.values[..., 1:], tokens.pad, tokens.seconds_per_token))


def test_probe_standardises_over_what_is_there():
    "The statistics are those of the valid epochs of each channel, and a channel that no recording has is left alone."
    probe = LinearProbe.of(PatchTransformer(PatchConfig.tiny(channels=("EEG", "EOG"), rate=10.))).train()
    values, pad = rand(4, 2, 50, 64) * 5 + 2, torch.zeros(4, 2, 50, dtype=torch.bool)
    pad[:, 1], pad[0, :, 25:] = True, True
    probe(Tokens(values.masked_fill(pad[..., None], 1e9), pad, 6.))
    epochs = epoch_tokens(Tokens(values, pad, 6.))
    seen = epochs.values[:, 0][~epochs.pad[:, 0]]
    assert torch.allclose(probe.norms[0].running_mean, .1 * seen.mean(0), atol=1e-5) and torch.allclose(probe.norms[0].running_var, .9 + .1 * seen.var(0), atol=1e-5)
    assert (probe.norms[1].running_mean == 0).all() and (probe.norms[1].running_var == 1).all()
