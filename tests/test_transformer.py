"""`PatchTransformer` against the original PFTSleep encoder, and attention against the residual attention of the paper, written out with all its scores."""
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from pftsleep.errors import ConfigError, ModelError
from pftsleep.models import transformer
from pftsleep.models.transformer import BatchNorm, InstanceNorm, PatchConfig, PatchTransformer, Reconstruction, attend, rotate

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "pftsleep"
needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="../shared/fixtures is not here")


def rand(*shape, seed=0, dtype=torch.float64): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- the original's tiny checkpoint ----

def from_original(state: dict, n_channels: int, n_layers: int) -> tuple[dict, dict]:
    "The original's tensors (weights, gradients or buffers) under our names: encoder, reconstruction head."
    s = {k.removeprefix("model."): v for k, v in state.items()}
    stack = lambda prefix, what: torch.stack([s[f"{prefix}.W_P.{c}.{what}"] for c in range(n_channels)])
    ours = {"instance_norm.weight": s["revin.affine_weight"][0], "instance_norm.bias": s["revin.affine_bias"][0], "positions": s["pe.W_pos"],
        **{f"embedding.{what}": stack("patch_encoder", what) for what in ("weight", "bias")}}
    for i in range(n_layers):
        old, new = f"layers.{i}.", f"blocks.{i}."
        if (scale := old + "self_attn.sdp_attn.scale") in s: ours[new + "attention.scale"] = s[scale]
        for what in ("weight", "bias"):
            ours[new + "attention.qkv." + what] = torch.cat([s[f"{old}self_attn.W_{x}.{what}"] for x in "QKV"])
            for a, b in [("self_attn.to_out.0.", "attention.out."), ("ff.0.", "feed_forward.0."), ("ff.3.", "feed_forward.3.")]: ours[new + b + what] = s[old + a + what]
        for a, b in [("norm_attn.1.", "norm1."), ("norm_ffn.1.", "norm2.")]: ours |= {k.replace(old + a, new + b): v for k, v in s.items() if k.startswith(old + a)}
    return ours, {f"decoder.{what}": stack("head", what) for what in ("weight", "bias")}


def original(**changes) -> tuple[PatchTransformer, Reconstruction]:
    "The fixture's encoder and reconstruction head as ours, in eval mode."
    state = torch.load(FIXTURES / "pft_encoder_tiny.ckpt", weights_only=True)["state_dict"]
    config = PatchConfig.pftsleep(d_model=32, n_layers=2, n_heads=2, d_ff=64, max_patches=40, **changes)
    encoder, decoder = PatchTransformer(config), Reconstruction(config)
    for module, weights in zip((encoder, decoder), from_original(state, 7, 2), strict=True): module.load_state_dict(weights)
    return encoder.eval(), decoder.eval()


def close(ours: torch.Tensor, theirs: np.ndarray, tolerance: float) -> None:
    "Largest difference, as a share of the largest value, is below `tolerance`."
    ours = ours.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < tolerance * max(1, np.abs(theirs).max())


@needs_fixtures
@pytest.mark.parametrize("masked", [False, True])
def test_encoder_equals_the_original(masked):
    z = np.load(FIXTURES / "pft_encoder_tiny.npz")
    encoder, decoder = original()
    x, pad = torch.from_numpy(z["x"]), torch.from_numpy(z["mask"]) if masked else None
    with torch.no_grad():
        patches, hidden = encoder.patches(x, pad)
        embedded, values = encoder.embedding(patches), encoder(x, pad)
        recon = decoder.reconstruct(values)
    close(encoder.instance_norm(x)[..., :1500], z["revin"], 1e-6)
    close(patches.transpose(1, 2)[..., ::10], z["target"], 1e-6)
    close(embedded.transpose(1, 2), z["emb"], 1e-6)
    close(values.mT, z["z_mask" if masked else "z_nomask"], 4e-6) # in absolute terms 5e-5 on values up to 25; the original itself is 7e-5 from a float64 run
    close(recon.transpose(1, 2)[..., ::10], z["recon_mask" if masked else "recon_nomask"], 4e-6)
    assert (hidden is not None) == masked
    if masked:
        assert z["key_padding_mask"].any() and (hidden.numpy() == z["key_padding_mask"][:, None]).all()
        assert np.abs(z["z_mask"] - z["z_nomask"]).max() > .1 # so the mask matters in this fixture


@needs_fixtures
def test_no_further_from_the_truth_than_the_original():
    z = np.load(FIXTURES / "pft_encoder_tiny.npz")
    encoder, _ = original()
    x, pad = torch.from_numpy(z["x"]), torch.from_numpy(z["mask"])
    with torch.no_grad(): single, double = encoder(x, pad).mT.numpy(), encoder.double()(x.double(), pad).mT.numpy()
    theirs = np.abs(z["z_mask"] - double).max()
    assert theirs < 1e-4 and np.abs(single - double).max() < 2 * theirs


@needs_fixtures
def test_training_step_equals_the_original():
    "Loss, gradients and batch-norm statistics of one step in training mode without dropout; mean squared error over what is not padding."
    z, t = np.load(FIXTURES / "pft_encoder_tiny.npz"), np.load(FIXTURES / "pft_train_step_tiny.npz")
    encoder, decoder = original(dropout=0.)
    encoder.train()
    patches, hidden = encoder.patches(torch.from_numpy(z["x"]), torch.from_numpy(z["mask"]))
    loss = (decoder(encoder.run(encoder.embed(patches), hidden)) - patches.detach())[~hidden].square().mean()
    loss.backward()
    assert abs(loss.item() / t["loss"] - 1) < 1e-6
    part = lambda prefix: {k.removeprefix(prefix): torch.from_numpy(v) for k, v in t.items() if k.startswith(prefix)}
    for module, wanted in zip((encoder, decoder), from_original(part("grad/"), 7, 2), strict=True):
        got = {k: p.grad for k, p in module.named_parameters() if p.requires_grad}
        assert set(got) == set(wanted)
        for k, g in wanted.items():
            assert (got[k] - g).abs().max() < 1e-4 * max(g.abs().max(), 1e-2), k # keys' biases have gradient 0 but for rounding
    ours, theirs = dict(encoder.named_buffers()), part("buffer_after/model.")
    for k, v in theirs.items(): assert torch.allclose(ours[k.replace("layers", "blocks").replace("norm_attn.1", "norm1").replace("norm_ffn.1", "norm2")], v, rtol=1e-4, atol=1e-5), k


@needs_fixtures
def test_published_sizes():
    "All keys and shapes of the published file have a place, and nothing is left over."
    keys = json.loads((FIXTURES / "pft_full_keys.json").read_text())["encoder_checkpoint"]
    with torch.device("meta"):
        modules = PatchTransformer(PatchConfig.pftsleep()), Reconstruction(PatchConfig.pftsleep())
        theirs = {k: torch.empty(shape) for k, shape in keys.items()}
    for module, wanted in zip(modules, from_original(theirs, 7, 3), strict=True):
        assert {k: v.shape for k, v in module.state_dict().items()} == {k: v.shape for k, v in wanted.items()}
    assert sum(v.numel() for m in modules for v in m.state_dict().values()) == sum(v.numel() for v in theirs.values())


@needs_fixtures
def test_upstream_cuts_and_refuses():
    encoder, _ = original()
    x = rand(1, 7, 31_000, dtype=torch.float32)
    longer, exact = encoder(x), encoder(x[..., :30_000])
    assert longer.shape == exact.shape == (1, 7, 40, 32)
    assert (longer - exact).abs().max() > 1e-3 # statistics of the whole night, then cut: defect D1 of the original, kept
    with pytest.raises(ModelError, match="published for 30000"): encoder(x[..., :29_000])


# ---- attention against its definition ----

def naive_run(encoder: PatchTransformer, tokens, pad=None, angle=None):
    "Layers with the scores kept, added to the next layer's and masked, as in RealFormer and in reference 1.3."
    c, previous = encoder.config, 0.
    x, hidden = tokens.flatten(0, 1), None if pad is None else pad.flatten(0, 1)
    for b in encoder.blocks:
        a, h = b.attention, b.norm1(x) if c.pre_norm else x
        q, k, v = (part.unflatten(-1, (c.n_heads, -1)).transpose(1, 2) for part in a.qkv(h).chunk(3, -1))
        if angle is not None: q, k = rotate(q, angle), rotate(k, angle)
        scores = q @ k.mT * a.scale + previous
        if c.residual_attention: previous = scores
        if hidden is not None: scores = scores.masked_fill(hidden[:, None, None], -1e30)
        weights = scores.softmax(-1)
        if hidden is not None: weights = weights * ~hidden[:, None, None]
        x = x + a.out((weights @ v).transpose(1, 2).flatten(2))
        if c.pre_norm: x = x + b.feed_forward(b.norm2(x))
        else:
            x = b.norm1(x)
            x = b.norm2(x + b.feed_forward(x))
    x = x if encoder.norm is None else encoder.norm(x)
    if hidden is not None and not c.upstream: x = x * ~hidden[..., None]
    return x.unflatten(0, tokens.shape[:2])


def some_padding(b, c, n, seed=0):
    "Padding at the end, in the middle, and of everything."
    pad = torch.rand(b, c, n, generator=torch.Generator().manual_seed(seed)) < .2
    pad[0, 0] = True
    pad[-1, :, n // 2:] = True
    return pad


@pytest.mark.parametrize("n", [1, 7, 120, 480])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("settings", [
    dict(residual_attention=True, pre_norm=False, norm="batch", final_norm=False, n_layers=3),
    dict(residual_attention=True, n_layers=4), dict(n_layers=2)], ids=["pftsleep", "residual, before", "plain, before"])
def test_attention_equals_its_definition(settings, masked, n):
    torch.manual_seed(0)
    encoder = PatchTransformer(PatchConfig.tiny(channels=("a", "b"), d_model=16, n_heads=2, d_ff=32, position="none", **settings)).double().eval()
    for i, block in enumerate(encoder.blocks): block.attention.scale.fill_(.35 + .1 * i) # a published file may hold any
    pad, weight = some_padding(2, 2, n) if masked else None, rand(2, 2, n, 16, seed=1)
    results = []
    for run in (encoder.run, lambda *args: naive_run(encoder, *args), lambda *args: encoder.run(*args, return_attention=True)[0]):
        encoder.zero_grad()
        tokens = rand(2, 2, n, 16).requires_grad_()
        out = run(tokens, pad)
        (out * weight).sum().backward()
        results.append([out, tokens.grad, *(p.grad for p in encoder.blocks.parameters() if p.requires_grad)])
    for got in results[::2]:
        for mine, definition in zip(got, results[1], strict=True):
            assert torch.isfinite(mine).all() and (mine - definition).abs().max() < 1e-9 * max(1, definition.abs().max())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", [2**22, 700, 50, 1])
@pytest.mark.parametrize("residual", [False, True])
def test_attention_by_rows_equals_its_definition(residual, block, masked, monkeypatch):
    "Without gradients, some rows of some heads of some channels after the other, whatever their number."
    monkeypatch.setattr(transformer, "_BLOCK", block)
    torch.manual_seed(0)
    encoder = PatchTransformer(PatchConfig.tiny(channels=("a", "b"), d_model=16, n_heads=2, d_ff=32, position="none", residual_attention=residual, n_layers=3)).double().eval()
    for i, b in enumerate(encoder.blocks): b.attention.scale.fill_(.35 + .1 * i)
    tokens, pad = rand(3, 2, 23, 16), some_padding(3, 2, 23) if masked else None
    with torch.no_grad():
        before, wanted = tokens.clone(), naive_run(encoder, tokens, pad)
        out = encoder.run(tokens, pad)
        assert torch.equal(tokens, before) and (out - wanted).abs().max() < 1e-9
        assert (encoder.run(tokens, pad, return_attention=True)[0] - wanted).abs().max() < 1e-9
    assert (encoder.run(tokens, pad) - wanted).abs().max() < 1e-9


@pytest.mark.parametrize("n", [50, 3000, 5000])
def test_channels_one_after_the_other_are_channels_together(n):
    "Rotary positions of each channel's own, padding, and more tokens than are run at once."
    torch.manual_seed(0)
    encoder = PatchTransformer(PatchConfig.tiny(channels=("a", "b", "c"), d_model=8, n_heads=1, d_ff=8)).eval()
    tokens, pad, places = rand(1, 3, n, 8, dtype=torch.float32), some_padding(1, 3, n), torch.arange(3 * n).view(1, 3, n) // 2
    together = encoder.run(tokens, pad, places).detach()
    with torch.no_grad(): assert (encoder.run(tokens, pad, places) - together).abs().max() < 1e-5


@pytest.mark.parametrize("settings", [dict(residual_attention=True, pre_norm=False, norm="batch", final_norm=False, n_layers=3, upstream=True, max_patches=20), dict(norm="batch"), dict()], ids=["pftsleep", "batch", "layer"])
def test_a_frugal_step_is_the_same_step(settings):
    "Loss, gradients and the statistics of batch norm, with dropout and padding."
    torch.manual_seed(0)
    encoder = PatchTransformer(PatchConfig.tiny(channels=("a", "b"), dropout=.2, **settings)).double().train()
    state, tokens, pad, found = {k: v.clone() for k, v in encoder.state_dict().items()}, rand(2, 2, 20, 64), some_padding(2, 2, 20), []
    for on in (False, True):
        encoder.load_state_dict(state)
        encoder.frugal(on).zero_grad()
        torch.manual_seed(1)
        loss = encoder.run(tokens, pad).square().sum()
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in encoder.blocks.parameters() if p.requires_grad), *(b.clone() for b in encoder.buffers())])
    for a, b in zip(*found, strict=True): assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_rows_without_a_key_are_exact_zeros():
    q, k, v = (rand(2, 3, 5, 4, seed=i).requires_grad_() for i in range(3))
    pad = torch.zeros(2, 5, dtype=torch.bool)
    pad[1] = True
    for with_weights in (False, True):
        out, weights = attend(q, k, v, pad, return_attention=with_weights)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert (out[1] == 0).all() and all((g[1] == 0).all() and torch.isfinite(g).all() for g in grads)
        assert (weights is not None) == with_weights
    assert (weights[1] == 0).all() and torch.allclose(weights[0].sum(-1), torch.ones(3, 5, dtype=torch.float64))


def test_rotary_tokens_may_be_left_out():
    "A masked autoencoder runs a tenth of the tokens; with one layer and their positions given, they see what they would see if the others were hidden."
    torch.manual_seed(0)
    encoder = PatchTransformer(PatchConfig.tiny()).double().eval()
    tokens, keep = rand(1, 1, 40, 64), torch.arange(40) % 10 == 3
    alone = encoder.run(tokens[:, :, keep], positions=torch.arange(40)[keep])
    assert torch.allclose(alone, encoder.run(tokens, ~keep[None, None])[:, :, keep], atol=1e-12)
    assert torch.allclose(alone, encoder.run(tokens[:, :, keep], positions=torch.arange(40)[keep].expand(1, 1, -1)), atol=1e-12)
    assert not torch.allclose(alone, encoder.run(tokens[:, :, keep]), atol=1e-3)


MEMORY = """
import resource, sys, torch
from pathlib import Path
from pftsleep.models.transformer import attend
torch.set_num_threads(1)
n, mode, tables = 4800, sys.argv[1], float(sys.argv[2])
def run(n):
    q, k, v = (torch.randn(1, 1, n, width, requires_grad=mode == "backward") for width in (384, 384, 128))
    pad = torch.arange(n)[None] >= n - n // 10
    if n > 64: # the inputs are there; what comes now is counted
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(tables * n * n * 4),) * 2)
    if mode == "unwidened": return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=~pad[:, None, None])
    out, _ = attend(q, k, v, pad)
    if mode == "backward": out.sum().backward()
run(64)
try: run(n)
except RuntimeError as e: print("out of memory" if "allocate memory" in str(e) else e)
else: print("fits")
"""


def within(mode: str, tables: float) -> str:
    "Whether one head's attention over a published night of one channel fits into so many tables of N x N float32, beside its inputs."
    return subprocess.run([sys.executable, "-c", MEMORY, mode, str(tables)], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
def test_no_table_of_scores_is_stored():
    "4800 tokens: the scores of a head would be one table, as the control shows, which forgets to widen the values."
    assert within("forward", .3) == "fits" # widened values and output, .08 each
    assert within("backward", .8) == "fits" # and the gradients of all of them
    assert within("unwidened", .8) == "out of memory"


@pytest.mark.slow
def test_published_size_equals_its_definition():
    torch.manual_seed(0)
    encoder = PatchTransformer(PatchConfig.pftsleep(channels=("EEG",), dropout=0.)).eval()
    x, pad = rand(1, 1, 3_600_000, dtype=torch.float32), torch.zeros(1, 3_600_000, dtype=torch.bool)
    pad[:, 3_000_000:] = True
    with torch.no_grad():
        patches, hidden = encoder.patches(x, pad)
        tokens = encoder.embed(patches)
        out = encoder.run(tokens, hidden)
        assert out.shape == (1, 1, 4800, 512) and (out - naive_run(encoder, tokens, hidden)).abs().max() < 1e-4


# ---- normalisation ----

def test_batch_norm_ignores_padding_only_while_it_counts():
    bn, plain = BatchNorm(6).double(), torch.nn.BatchNorm1d(6).double()
    x, pad = rand(3, 8, 6), torch.zeros(3, 8, dtype=torch.bool)
    pad[:, 5:] = True
    out = bn(x.masked_fill(pad[..., None], 1e9), pad)
    assert torch.allclose(out[:, :5], plain(x[:, :5].flatten(0, 1)).view(3, 5, 6))
    assert torch.allclose(bn.running_var, plain.running_var) and (out[pad] == 0).all()
    assert (bn(x, torch.ones_like(pad)) == 0).all() and torch.allclose(bn.running_var, plain.running_var) # nothing there, nothing learned
    assert torch.allclose(bn.eval()(x, pad), plain.eval()(x.flatten(0, 1)).view(3, 8, 6))


@pytest.mark.parametrize("offset", [0., 97.3, 1e4, -3e5])
def test_flat_channels_stay_flat(offset):
    "At any level, alone and in a padded batch; a normalisation that divides rounding by nothing would make a signal of it."
    norm, pad = InstanceNorm(1), torch.arange(4000)[None, None] >= 3001
    x = torch.full((1, 1, 4000), offset)
    assert norm(x).abs().max() < 1e-3 and norm(x, pad).abs().max() < 1e-3
    assert torch.isfinite(norm(x, torch.ones_like(pad))).all()


# ---- settings ----

@pytest.mark.parametrize("wrong", [dict(embedding="fourier"), dict(channels=()), dict(rate=0.), dict(patch=0), dict(n_heads=3), dict(d_model=-64), dict(n_layers=-1),
    dict(position="learned")], ids=str)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError): PatchConfig.tiny(**wrong)


def test_weights_are_drawn_from_torchs_seed():
    for seed, same in ((0, True), (1, False)):
        torch.manual_seed(0); a = PatchTransformer(PatchConfig.tiny())
        torch.manual_seed(seed); b = PatchTransformer(PatchConfig.tiny())
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True)) == same


def test_the_whole_step_can_be_captured():
    "No Python in the forward pass depends on values: one graph, without a break."
    encoder = PatchTransformer(PatchConfig.tiny(channels=("a", "b"), rate=10.)).eval()
    x, pad = rand(2, 2, 310, dtype=torch.float32), torch.arange(310).expand(2, -1) >= torch.tensor([[310], [150]])
    with torch.no_grad(): assert torch.allclose(torch.compile(encoder, backend="eager", fullgraph=True)(x, pad), encoder(x, pad), atol=1e-6)


# ---- the animal-activity model is a configuration, too ----

AAR = FIXTURES.parent / "aar"


@pytest.mark.skipif(not AAR.exists(), reason="../shared/fixtures is not here")
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_animal_activity_equals_the_original(conv):
    z, s = np.load(AAR / f"aar_{'conv' if conv else 'linear'}_multi.npz"), torch.load(AAR / f"aar_{'conv' if conv else 'linear'}_multi.pt", weights_only=True)
    config = PatchConfig.aar(conv, n_layers=2)
    m, decoder = PatchTransformer(config).eval(), Reconstruction(config).eval()
    ours = {"positions": s["transformer.positional_encoding.positional_encoding"][0]}
    renamed = [("transformer.transformer.norm.", "norm."), ("transformer.embedding.conv_layers.", "embedding.layers."), ("transformer.embedding.layer.", "embedding."), ("transformer.transformer.layers.", "blocks."),
        ("self_attn.in_proj_", "attention.qkv."), ("self_attn.out_proj", "attention.out"), ("linear1", "feed_forward.0"), ("linear2", "feed_forward.3")]
    for k, v in s.items():
        if "positional" in k or "head" in k: continue
        for a, b in renamed: k = k.replace(a, b)
        ours[k] = v
    m.load_state_dict(ours)
    decoder.load_state_dict({"decoder.weight": s["self_supervised_head.weight_matrix.weight"]})
    with torch.no_grad():
        patches, _ = m.patches(torch.from_numpy(z["X"]))
        values = m.run(m.embed(torch.from_numpy(z["masked"])))
        close(patches, z["patched"], 1e-6)
        close(m.run(m.embed(patches)), z["z_unmasked_input"], 5e-6)
        close(values, z["z"], 5e-6)
        close(decoder(values), z["recon"], 5e-6)


@pytest.mark.parametrize(("settings", "count"), [(dict(), 801_664), (dict(conv=True), 840_128), (dict(d_model=256, n_layers=6, n_heads=4, d_ff=1024), 4_755_712), (dict(conv=True, d_model=256, n_layers=6, n_heads=4, d_ff=1024), 4_914_560)])
def test_animal_activity_sizes(settings, count):
    with torch.device("meta"): assert sum(p.numel() for p in PatchTransformer(PatchConfig.aar(**settings)).parameters()) == count


# ---- new settings ----

def test_settings_of_earlier_files_still_mean_the_same(tmp_path):
    "A folder that was written before heads had a width of their own, and so on."
    torch.manual_seed(0)
    encoder = PatchTransformer(PatchConfig.pftsleep(channels=("a",), patch=20, d_model=16, n_layers=1, n_heads=2, d_ff=8, max_patches=10)).eval()
    folder = encoder.save_pretrained(tmp_path)
    about = json.loads((folder / "config.json").read_text())
    for name in ("head_width", "activation", "embedding_bias", "norm_eps", "dropout_at"): del about["config"][name]
    del about["source"], about["weights"]
    (folder / "config.json").write_text(json.dumps(about))
    again, x = PatchTransformer.from_pretrained(folder), rand(1, 1, 200, dtype=torch.float32)
    assert again.config == encoder.config and again.source is None and torch.equal(again(x), encoder(x))
    assert "blocks.0.attention.scale" in dict(again.named_parameters()) # stored, as in the original's files
    assert again.blocks[0].attention.drop.p == .1 # twice on that branch, as the original


@pytest.mark.parametrize(("settings", "text"), [(dict(head_width=3), "make it even"), (dict(head_width=0), "make it even"), (dict(position="sine_tf"), "width of 96"), (dict(embedding="deep_conv", patch=12), "at least 13"),
    (dict(activation="tanh"), "gelu, relu"), (dict(dropout_at="nowhere"), "everywhere, layers, branches")])
def test_settings_that_cannot_be(settings, text):
    with pytest.raises(ConfigError, match=text): PatchConfig.tiny(**settings)


def test_one_channel_needs_no_axis():
    m = PatchTransformer(PatchConfig.tiny(rate=10., d_model=16, n_heads=2)).eval()
    x, pad = rand(2, 600, dtype=torch.float32), torch.arange(600).expand(2, -1) > 400
    with torch.no_grad():
        assert torch.equal(m(x, pad), m(x[:, None], pad)[:, 0])
        values, maps = m(x, return_attention=True)
        assert values.shape == (2, 10, 16) and [a.shape for a in maps] == [(2, 2, 10, 10)] * 2
        with pytest.raises(ModelError, match="signals have shape"): PatchTransformer(PatchConfig.tiny(channels=("a", "b")))(x)


# ---- a machine that is switched off while a model is saved ----

class PowerCut(BaseException): pass


def test_a_power_cut_leaves_the_old_or_the_new_model(tmp_path, monkeypatch):
    "Before any of the steps that change the folder; and the next save works, whatever was left behind."
    make = lambda seed: (torch.manual_seed(seed), PatchTransformer(PatchConfig.tiny(rate=10., d_model=16 * seed, n_heads=2)))[1].eval()
    old, new, newer, write = make(1), make(2), make(3), transformer.write_whole
    for steps in range(5):
        folder, left = tmp_path / str(steps), [steps]
        old.save_pretrained(folder)
        def unsteady(path, data, left=left):
            if not left[0]: raise PowerCut
            left[0] -= 1
            write(path, data)
        monkeypatch.setattr(transformer, "write_whole", unsteady)
        try: new.save_pretrained(folder)
        except PowerCut: assert steps < 4
        found = PatchTransformer.from_pretrained(folder)
        assert found.config == (old if steps < 2 else new).config
        for second_cut in range(5): # once more, on what the first one left
            left[0] = second_cut
            with suppress(PowerCut): newer.save_pretrained(folder)
            assert PatchTransformer.from_pretrained(folder).config in (found.config, newer.config)
        monkeypatch.setattr(transformer, "write_whole", write)
        newer.save_pretrained(folder)
        assert PatchTransformer.from_pretrained(folder).config == newer.config and sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
