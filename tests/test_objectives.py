"""Masks, augmentations and losses: naive oracles, the original's recorded values, and the defects D5, D7 and D8 that must not come back."""
import math
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pftsleep.errors import ConfigError, PFTSleepError
from pftsleep.training.augmentations import (
    MASKS, MOVES, apply_jitter, corrupt, cutmix, cutmix_order, hide, jitter_zero, joined, largest, mix_pairs, mixup, mixup_share, movable, move_segments, patch_mask,
    random_mask, reverse, robust_sd, segments, shuffle, shuffled_within, surplus_wake, trim_wake, untouched)
from pftsleep.training.losses import (
    STAGING_LOSSES, cross_entropy, focal_loss, kl_loss, patch_continuity, patch_errors, patch_loss, reconstruction_metrics, soft_labels, staging_loss)
from pftsleep.training.objectives import block_mask, log_spectrum, region_loss

FIXTURES = Path(__file__).parents[2] / "shared/fixtures/pftsleep"
SEEDS = st.integers(0, 2**31)
KINDS = ("mse", "mae", "huber", "cosine")
W, N2, N3, REM, GAP = 0, 2, 3, 4, -1


def fixture(name):
    path = FIXTURES / f"{name}.npz"
    if not path.exists(): pytest.skip("../shared/fixtures isn't here")
    return {k: torch.from_numpy(v) if v.ndim else v.item() for k, v in np.load(path, allow_pickle=False).items()}

def generator(seed=0): return torch.Generator().manual_seed(seed)

def close(a, b, tolerance=1e-6):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

def batch(seed, B=3, C=2, E=7, S=4):
    "Windows of random length, with missing channels and epochs that nobody scored; every sample is unique."
    g = generator(seed)
    x = torch.arange(1., B * C * E * S + 1).view(B, C, E * S)
    pad, stages = torch.zeros(B, C, E * S, dtype=torch.bool), torch.randint(-1, 5, (B, E), generator=g)
    for b in range(B):
        end = int(torch.randint(1, E * S + 1, (), generator=g))
        pad[b, :, end:] = True
        stages[b, -(-end // S):] = GAP
        if torch.rand((), generator=g) < .3: pad[b, int(torch.randint(C, (), generator=g))] = True
    return x.masked_fill(pad, 0), pad, stages

def patches(seed, B=2, C=3, N=6, P=5, dtype=torch.float64):
    g = generator(seed)
    pred, target = (torch.randn(B, C, N, P, generator=g, dtype=dtype) for _ in range(2))
    return pred, target, torch.rand(B, C, N, generator=g) < .5, torch.rand(B, C, N, generator=g) < .3

def patches_of(seed):
    values, _, _, pad = patches(seed)
    return untouched(values.masked_fill(pad[..., None], 0), pad)


# --- the original's recorded values; its patches are [B, N, C, P], its logits [B, K, E]

def ours(t): return t.transpose(1, 2)

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["plain", "pad", "usemask", "both"])
def test_patch_losses_of_the_original(kind, which):
    f = fixture("pft_losses")
    pad = f["padding_mask"][:, None].expand(-1, 4, -1) if which in ("pad", "both") else torch.zeros(3, 4, 8, dtype=torch.bool)
    region = "masked" if which in ("usemask", "both") else "all"
    value = patch_loss(ours(f["pred"]), ours(f["target"]), ours(f["mask"]).bool(), pad, kind, region, upstream=True)
    close(value, f[f"{kind}_{which}"])
    if region == "all" and kind != "cosine": close(value, patch_loss(ours(f["pred"]), ours(f["target"]), ours(f["mask"]).bool(), pad, kind, region)) # where it was right
    if kind == "cosine": close(-value, f[f"cosine_similarity_{which}"])

def test_other_reconstruction_figures_of_the_original():
    f = fixture("pft_losses")
    pred, target, pad = ours(f["pred"]), ours(f["target"]), f["padding_mask"][:, None].expand(-1, 4, -1)
    nothing = torch.zeros_like(pad)
    close(patch_loss(pred, target, nothing, pad, "huber", "all", delta=.5, upstream=True), f["huber_delta0.5_pad"])
    close(patch_continuity(pred, nothing), f["patch_continuity"])
    close(reconstruction_metrics(pred, target, nothing, pad, "all")["rmse"], f["rmse_pad"])
    figures = reconstruction_metrics(pred, target, nothing, nothing, "all")
    close(figures["r2"], f["r2"])
    close(figures["mape"] * pad.numel(), f["mape"], 1e-5) # a mean here, a sum there; single precision
    close(figures["cosine"] / 25, f["cosine_similarity_plain"]) # there divided by the samples

def test_staging_losses_of_the_original():
    f = fixture("pft_losses")
    logits, y, soft, marked = ours(f["logits"]), f["y"], ours(f["soft"]), ours(f["soft_m100"])
    focal = partial(focal_loss, logits, ignore=-100, upstream=True)
    close(focal(y), f["focal"]); close(focal(y, weight=f["weight"]), f["focal_w"]); close(focal(y, gamma=0.), f["focal_g0"])
    close(focal(y) * (y >= 0).sum(), f["focal_sum"])
    close(focal(soft), f["focal_soft"]); close(focal(soft, weight=f["weight"]), f["focal_soft_w"])
    close(focal_loss(logits, soft), f["focal_soft"]) # for soft labels its form is the textbook's
    kl = partial(kl_loss, logits, ignore=-100, upstream=True)
    close(kl(y), f["kl_hard"]); close(kl(y, weight=f["weight"]), f["kl_hard_w"]); close(kl(marked), f["kl_soft"])
    close(cross_entropy(logits, y, ignore=-100), f["ce"])
    close(cross_entropy(logits, y, f["weight"], smoothing=.1, ignore=-100), f["ce_w_ls0.1"])

def test_patch_augmentations_of_the_original():
    f = fixture("pft_aug_dsp")
    x = ours(f["x"])
    p = untouched(x)
    drawn = ours(f["patch_mask_draw"]) == 0 # it draws what is kept
    assert torch.equal(hide(p, drawn).values, ours(f["patch_mask_x"])) and torch.equal(drawn, ours(f["patch_mask_m"]).bool())
    mask = largest(ours(f["random_masking_noise"]), p.pad, .4)
    assert torch.equal(mask.float(), ours(f["random_masking_m"])) and torch.equal(hide(p, mask).values, ours(f["random_masking_x"]))
    zero, jitter = ours(f["jitter_u_zero"]) <= .05, ours(f["jitter_u_jit"]) > .95
    close(apply_jitter(x, zero, jitter, ours(f["jitter_randn"]), .1 * x.abs().max()), ours(f["jitter_x"]))
    assert zero.sum() + jitter.sum() == f["jitter_n"]
    assert torch.equal(reverse(p, generator(), 1.).values, ours(f["reverse"]))
    assert torch.equal(x[:, f["shuffle2_perm"]], ours(f["shuffle2"]))

def test_cutmix_of_the_original():
    f = fixture("pft_aug_dsp")
    x, pad, y = f["cm_x"], f["cm_pm"], f["cm_y"]
    moved = move_segments(x, pad, y, f["cutmixbatch_cross_perm"], move_pad=False)
    for got, name in zip(moved, ("x", "pm", "y"), strict=True): assert torch.equal(got, f[f"cutmixbatch_cross_{name}"])
    flat = segments(x, 6).flatten(0, 1)
    for name, groups in {"cutmixbatch_intra": y, "cutmix1d": 1000 * torch.arange(6) + y}.items(): # no draws are recorded: find them, and check that ours obey the same rule
        source = torch.stack([(flat == s).all(-1).all(-1).nonzero()[0, 0] for s in segments(f[f"{name}_x"], 6).flatten(0, 1)])
        assert torch.equal(groups.flatten()[source], groups.flatten())
        assert (y.flatten()[source[source != torch.arange(24)]] == -100).any() or name == "cutmix1d" # padding was exchanged with padding
        for got, part in zip(move_segments(x, pad, y, source, move_pad=False), ("x", "pm", "y"), strict=True): assert torch.equal(got, f[f"{name}_{part}"])
        mode = "intra" if name == "cutmixbatch_intra" else "intra_epoch"
        order = cutmix_order(pad.bool(), y, mode, generator(), upstream=True)
        assert torch.equal(groups.flatten()[order], groups.flatten())

def test_mixup_of_the_original():
    f = fixture("pft_aug_dsp")
    share = torch.maximum(f["mixup_lam_raw"], 1 - f["mixup_lam_raw"])
    x, pad, labels = mix_pairs(f["cm_x"], f["cm_pm"].bool(), f["cm_y"], share, f["mixup_perm"], classes=3, upstream=True)
    close(x, f["mixup_x"]); close(ours(labels), f["mixup_y"])
    assert torch.equal(pad, f["mixup_pm"])

def test_wake_trimming_of_the_original():
    f = fixture("pft_aug_dsp")
    cases = [k.removeprefix("trim_in_") for k in f if k.startswith("trim_in_")]
    assert len(cases) == 8
    for case in cases:
        stages, after = f[f"trim_in_{case}"], f[f"trim_out_{case}"]
        assert torch.equal(stages.masked_fill(surplus_wake(stages, upstream=True), -100), after), case
        if not (surplus_wake(stages, upstream=True) & (stages != W)).any() and stages[-1] == W: # a record that ends in wake
            assert torch.equal(surplus_wake(stages), surplus_wake(stages, upstream=True)), case

def dense_encoder(weights, x, pad, N=40, P=750, H=2):
    "Tiny PFTSleep in training mode without dropout, with the full matrix of scores; reconstruction and target [B, C, N, P]."
    linear = lambda t, name: F.linear(t, weights[f"{name}.weight"], weights[f"{name}.bias"])
    by_channel = lambda t, name: torch.stack([linear(t[:, c], f"{name}.W_P.{c}") for c in range(t.shape[1])], 1)
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False).sqrt() + 1e-5) * weights["revin.affine_weight"] + weights["revin.affine_bias"]
    target = x.unflatten(-1, (N, P))
    h = (by_channel(target, "patch_encoder") + weights["pe.W_pos"]).flatten(0, 1)
    hidden, scores = pad.repeat_interleave(x.shape[1], 0)[:, None, None], torch.zeros(())
    for k in range(2):
        q, key, v = (linear(h, f"layers.{k}.self_attn.W_{n}").unflatten(-1, (H, -1)).transpose(1, 2) for n in "QKV")
        scores = (q @ key.transpose(-1, -2) * weights[f"layers.{k}.self_attn.sdp_attn.scale"] + scores).masked_fill(hidden, -torch.inf)
        norm = lambda t, name: F.batch_norm(t.transpose(1, 2), None, None, weights[f"{name}.1.weight"], weights[f"{name}.1.bias"], True).transpose(1, 2)
        h = norm(h + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"layers.{k}.self_attn.to_out.0"), f"layers.{k}.norm_attn")
        h = norm(h + linear(F.gelu(linear(h, f"layers.{k}.ff.0")), f"layers.{k}.ff.3"), f"layers.{k}.norm_ffn")
    return by_channel(h.unflatten(0, (len(x), -1)), "head"), target.detach()

def test_a_training_step_of_the_original():
    f, inputs = fixture("pft_train_step_tiny"), fixture("pft_encoder_tiny")
    weights = torch.load(FIXTURES / "pft_encoder_tiny.ckpt", weights_only=True)["state_dict"]
    weights = {k.removeprefix("model."): v.requires_grad_(f"grad/{k}" in f) for k, v in weights.items()}
    hidden = inputs["key_padding_mask"]
    pred, target = dense_encoder(weights, inputs["x"], hidden)
    pad = hidden[:, None].expand(-1, 7, -1)
    loss = patch_loss(pred, target, torch.zeros_like(pad), pad, region="all")
    close(loss.detach(), f["loss"])
    loss.backward()
    for name, gradient in f.items():
        if name.startswith("grad/model.head"): close(weights[name.removeprefix("grad/model.")].grad, gradient, 1e-5)


# --- errors of reconstruction against loops

def slow_patch_loss(pred, target, mask, pad, kind, weight, delta):
    total = count = 0.
    for b, c, n in np.ndindex(*mask.shape):
        w = 0. if pad[b, c, n] else 1. if mask[b, c, n] else weight
        p, t = pred[b, c, n].tolist(), target[b, c, n].tolist()
        d = [abs(i - j) for i, j in zip(p, t, strict=True)]
        if kind == "cosine": error = 1 - sum(i * j for i, j in zip(p, t, strict=True)) / math.sqrt(sum(i * i for i in p) * sum(j * j for j in t))
        else: error = sum({"mse": e * e, "mae": e, "huber": e * e / 2 if e <= delta else delta * (e - delta / 2)}[kind] for e in d) / len(d)
        total, count = total + w * error, count + w
    return total / count if count else 0.

@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from(KINDS), st.sampled_from(["masked", "all", .25]), st.floats(.1, 3))
def test_patch_loss_is_the_mean_over_its_region(seed, kind, region, delta):
    pred, target, mask, pad = patches(seed)
    weight = {"masked": 0., "all": 1.}.get(region, region)
    loss = patch_loss(pred.requires_grad_(), target, mask, pad, kind, region, delta)
    assert loss.item() == pytest.approx(slow_patch_loss(pred, target, mask, pad, kind, weight, delta), abs=1e-12)
    loss.backward()
    assert pred.grad.isfinite().all() and not pred.grad[pad].any() and (weight or not pred.grad[~mask].any())
    if kind == "mse": close(loss.detach(), region_loss(pred.detach(), target, mask, pad, weight), 1e-12)

@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_padding_costs_nothing(kind):
    pred, target, mask, _ = patches(1)
    pred = pred.requires_grad_()
    (patch_loss(pred, target, mask, torch.ones_like(mask), kind) + patch_continuity(pred, torch.ones_like(mask))).backward()
    assert not pred.grad.any()

@pytest.mark.parametrize("kind", KINDS)
def test_flat_patches_have_a_finite_gradient(kind):
    pred = torch.zeros(1, 1, 3, 5, requires_grad=True)
    everything = torch.ones(1, 1, 3, dtype=torch.bool)
    patch_loss(pred, torch.zeros(1, 1, 3, 5), everything, ~everything, kind).backward()
    assert pred.grad.isfinite().all()

@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_patch_losses(kind):
    pred, target, mask, pad = patches(2, B=1, C=2, N=3, P=4)
    assert torch.autograd.gradcheck(lambda p: patch_loss(p, target, mask, pad, kind, .5, .7), pred.requires_grad_())

def test_half_precision_is_summed_in_single():
    ones = torch.ones(1, 1, 5000, 2, dtype=torch.bfloat16)
    everything = torch.ones(1, 1, 5000, dtype=torch.bool)
    assert patch_loss(ones, 0 * ones, everything, ~everything).item() == 1
    assert cross_entropy(torch.zeros(5000, 5, dtype=torch.bfloat16), torch.zeros(5000, dtype=torch.long)).item() == pytest.approx(math.log(5), rel=1e-5)


# --- losses of stages against loops

def slow_staging_loss(kind, logits, y, w, gamma, smoothing):
    total = mass = 0.
    for z, row in zip(logits.tolist(), y, strict=True):
        if row is None: continue
        norm = math.log(sum(math.exp(v) for v in z))
        for k, z_k in enumerate(z):
            logp, share = z_k - norm, (1 - smoothing) * row[k] + smoothing / len(z)
            if kind == "kl": total += w[k] * (row[k] * math.log(row[k]) - row[k] * logp if row[k] else 0)
            else: total -= w[k] * share * logp * ((1 - math.exp(logp)) ** gamma if kind == "focal" else 1)
            mass += w[k] * row[k]
    return total / mass if mass else 0.

@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from(sorted(STAGING_LOSSES)), st.booleans(), st.booleans(), st.floats(0, 4), st.sampled_from([0., .1, .5]))
def test_staging_losses_are_weighted_means(seed, kind, soft, weighted, gamma, smoothing):
    g = generator(seed)
    logits = 3 * torch.randn(2, 4, 5, generator=g, dtype=torch.float64)
    hard = torch.randint(-1, 5, (2, 4), generator=g)
    labels = torch.randn(2, 4, 5, generator=g, dtype=torch.float64).softmax(-1).masked_fill((hard < 0)[..., None], -1.) if soft else hard
    w = torch.rand(5, generator=g, dtype=torch.float64) + .1 if weighted else None
    rows = [None if h < 0 else row.tolist() if soft else [float(k == h) for k in range(5)] for h, row in zip(hard.flatten(), labels.reshape(8, -1), strict=True)]
    options = {"cross_entropy": dict(smoothing=smoothing), "focal": dict(gamma=gamma, smoothing=smoothing), "kl": {}}[kind]
    loss = staging_loss(kind)(logits.requires_grad_(), labels, weight=w, **options)
    expected = slow_staging_loss(kind, logits.detach().flatten(0, 1), rows, [1.] * 5 if w is None else w.tolist(), gamma, smoothing if kind != "kl" else 0.)
    assert loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    loss.backward()
    assert logits.grad.isfinite().all() and not logits.grad[hard < 0].any()

@pytest.mark.parametrize("kind", sorted(STAGING_LOSSES))
@pytest.mark.parametrize("upstream", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_a_batch_that_nobody_scored_costs_nothing(kind, upstream, soft):
    logits = torch.randn(2, 3, 5, generator=generator())
    logits[0, 0] = torch.nan # behind the end of a night
    logits.requires_grad_()
    labels = torch.full((2, 3, 5), -1.) if soft else torch.full((2, 3), GAP)
    loss = staging_loss(kind)(logits, labels, **({} if kind == "cross_entropy" else dict(upstream=upstream)))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any() and not logits.grad.isnan().any()

@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(0, 3), st.floats(1, 1e4))
def test_extreme_logits_have_finite_gradients(seed, gamma, scale):
    logits = (scale * torch.randn(6, 5, generator=generator(seed))).requires_grad_()
    labels = torch.randint(5, (6,), generator=generator(seed))
    for upstream in (False, True): focal_loss(logits, labels, gamma, upstream=upstream).backward()
    kl_loss(logits, labels).backward()
    assert logits.grad.isfinite().all()

@pytest.mark.parametrize("gamma", [0., .5, 2.])
def test_gradients_of_focal_loss(gamma):
    logits, y = torch.randn(4, 5, generator=generator(), dtype=torch.float64, requires_grad=True), torch.tensor([0, 4, -1, 2])
    assert torch.autograd.gradcheck(lambda z: focal_loss(z, y, gamma, torch.rand(5, generator=generator(), dtype=torch.float64), .1), logits)

@pytest.mark.parametrize("label", [5, -2, -100])
def test_a_label_that_is_no_class_is_an_error(label):
    with pytest.raises(ConfigError, match=f"a label of {label} among 5 classes"): cross_entropy(torch.zeros(2, 5), torch.tensor([1, label]))

def test_a_class_that_weighs_nothing_costs_nothing():
    logits = torch.randn(3, 5, generator=generator(), requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(3, dtype=torch.long), torch.tensor([0., 1, 1, 1, 1]), smoothing=.1)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


# --- patches

@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(0, 1))
def test_masks_hide_what_they_say(seed, ratio):
    p = patches_of(seed)
    for q in (random_mask(p, ratio, generator(seed)), patch_mask(p, ratio, generator(seed))):
        assert not (q.changed & p.pad).any() and torch.equal(q.values, p.values.masked_fill(q.changed[..., None], 0))
    n = (~p.pad).sum(-1)
    left = [math.floor(k * (1 - ratio) + 1e-6) for k in n.flatten().tolist()]
    assert (n - random_mask(p, ratio, generator(seed)).changed.sum(-1)).flatten().tolist() == left

@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(0, 1))
def test_jitter_against_a_loop(seed, ratio):
    p = patches_of(seed)
    q = jitter_zero(p, ratio, generator(seed))
    g = generator(seed)
    u, v, noise = torch.rand(p.values.shape, generator=g), torch.rand(p.values.shape, generator=g), torch.randn(p.values.shape, generator=g)
    sd = robust_sd(p)
    for i in np.ndindex(*p.values.shape):
        spoilt = p.values[i] * (u[i] > ratio / 2) + (v[i] > 1 - ratio / 2) * noise[i] * sd[i[:2]]
        expected = p.values[i] if p.pad[i[:3]] else spoilt
        assert q.values[i].item() == pytest.approx(float(expected), abs=1e-6)
    assert torch.equal(q.changed, ((u <= ratio / 2) | (v > 1 - ratio / 2)).any(-1) & ~p.pad)

def test_one_artefact_scales_the_noise_of_nobody_else():
    "The original's noise is a tenth of the largest value in the whole batch."
    p = untouched(torch.randn(2, 3, 20, 50, generator=generator()))
    spoilt = untouched(p.values.clone())
    spoilt.values[0, 0, 3, 7] = 1e5
    quiet, loud = ({upstream: jitter_zero(q, .2, generator(1), upstream=upstream).values[1] for upstream in (False, True)} for q in (p, spoilt))
    assert torch.equal(quiet[False], loud[False])
    assert loud[True].std() > 100 * quiet[True].std()

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 3), max_size=30), SEEDS)
def test_shuffling_never_leaves_a_group(groups, seed):
    groups = torch.tensor(groups, dtype=torch.long)
    source = shuffled_within(groups, generator(seed))
    assert source.sort().values.tolist() == list(range(len(groups)))
    assert torch.equal(groups[source], groups) and torch.equal(source[groups < 0], torch.arange(len(groups))[groups < 0])

def test_all_orders_of_a_group_are_equally_likely():
    groups, g = torch.tensor([0, -1, 0, 0]), generator()
    seen = Counter(tuple(shuffled_within(groups, g).tolist()) for _ in range(3000))
    assert len(seen) == 6 and max(abs(n - 500) for n in seen.values()) < 110 # 5 standard deviations

@settings(max_examples=30, deadline=None)
@given(SEEDS, st.sampled_from(["channels", "patches", "features"]))
def test_shuffles_keep_values_and_padding_together(seed, axis):
    p = patches_of(seed)
    q = shuffle(p, axis, generator(seed), 1.)
    assert torch.equal((q.values != 0).any(-1), ~q.pad)
    for a, b in zip(p.values, q.values, strict=True): assert torch.equal(a.flatten().sort().values, b.flatten().sort().values)
    gone = p.pad.all(1 if axis == "patches" else 2)
    if axis == "patches": assert torch.equal(q.pad.all(1), gone)
    if axis == "channels": assert torch.equal(q.pad.all(2), gone)
    if axis == "features": assert torch.equal(q.pad, p.pad)

@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([*MASKS, *MOVES]), unique=True), SEEDS, st.floats(0, 1))
def test_any_combination_is_reproducible_and_leaves_its_input_alone(names, seed, ratio):
    p = patches_of(seed)
    before, listed, state = [t.clone() for t in p], list(names), torch.get_rng_state()
    one, two = (corrupt(p, names, generator(seed), ratio) for _ in range(2))
    for a, b in zip(one, two, strict=True): assert torch.equal(a, b)
    for a, b in zip(before, p, strict=True): assert torch.equal(a, b)
    assert names == listed and torch.equal(state, torch.get_rng_state())
    assert not (one.changed & one.pad).any() and one.values.isfinite().all()

@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(0, .9), st.integers(1, 5), st.booleans())
def test_block_masks_hide_the_right_share(seed, ratio, block, together):
    pad = patches(seed, N=20)[3] if not together else patches(seed, N=20)[3][:, :1].expand(-1, 3, -1)
    mask = block_mask(pad, ratio, block, generator(seed), together)
    assert not (mask & pad).any()
    assert ((mask.sum(-1) - ratio * (~pad).sum(-1)).abs() <= block / 2 + 1e-4).all()
    if together: assert torch.equal(mask, mask[:, :1].expand_as(mask))

def test_spectrum_of_a_tenth_of_the_amplitude():
    x = 100 * torch.randn(3, 200, generator=generator(), dtype=torch.float64) # far above the floor
    close(log_spectrum(x) - log_spectrum(x / 10), torch.full((3, 16), 2.), 1e-4)


# --- batches

def contents(x, pad, stages):
    E = stages.shape[1]
    flat = lambda t: [tuple(s.flatten().tolist()) for s in segments(t, E).flatten(0, 1)]
    return Counter(zip(flat(x), stages.flatten().tolist(), flat(pad), strict=True))

@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from(["intra", "intra_epoch", "cross"]), st.integers(1, 7), st.booleans())
def test_cutmix_moves_signal_label_and_padding_together(seed, mode, run, shared_pad):
    x, pad, stages = batch(seed)
    if shared_pad: pad = pad.all(1)
    mixed = cutmix(x, pad, stages, mode, generator(seed), 1., run=run)
    assert contents(*mixed) == contents(x, pad, stages)
    stays = ~movable(pad, stages)
    for before, after in zip((x, pad, stages), mixed, strict=True): assert torch.equal(segments(before, 7)[stays], segments(after, 7)[stays])
    if mode != "cross": assert torch.equal(mixed[2], stages)
    again = cutmix(x, pad, stages, mode, generator(seed), 1., run=run)
    assert all(torch.equal(a, b) for a, b in zip(mixed, again, strict=True))

def test_same_epoch_cutmix_keeps_the_time_of_night():
    _, pad, _ = batch(3, B=8)
    stages = torch.randint(2, (8, 7), generator=generator())
    source = cutmix_order(torch.zeros_like(pad), stages, "intra_epoch", generator()).view(8, 7)
    assert torch.equal(source % 7, torch.arange(7).expand(8, 7)) and (source != torch.arange(56).view(8, 7)).any()

def test_the_coin_decides_about_the_whole_batch():
    x, pad, stages = torch.rand(4, 1, 40), torch.zeros(4, 1, 40, dtype=torch.bool), torch.zeros(4, 10, dtype=torch.long)
    changed = [not torch.equal(cutmix(x, pad, stages, "cross", generator(s), .3, run=1)[0], x) for s in range(300)]
    assert .2 < np.mean(changed) < .4

@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_mixup_against_a_loop(seed):
    x, pad, stages = batch(seed)
    g = generator(seed)
    share, partner = torch.rand(3, generator=g), torch.randperm(3, generator=g)
    mixed, gone, labels = mix_pairs(x, pad, stages, share, partner)
    free = movable(pad, stages)
    for b, e in np.ndindex(*stages.shape):
        o, at, s = int(partner[b]), slice(4 * e, 4 * e + 4), float(share[b])
        both = bool(free[b, e] and free[o, e])
        if stages[b, e] < 0: assert (labels[b, e] == -1).all()
        else:
            expected = torch.zeros(5); expected[stages[b, e]] += s if both else 1.
            if both: expected[stages[o, e]] += 1 - s
            close(labels[b, e], expected)
        assert torch.equal(gone[b, :, at], pad[b, :, at] | pad[o, :, at] if both else pad[b, :, at])
        close(mixed[b, :, at], ((s * x[b, :, at] + (1 - s) * x[o, :, at]) if both else x[b, :, at]).masked_fill(gone[b, :, at], 0))

@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(.05, 5))
def test_mixup_is_reproducible_and_its_shares_are_shares(seed, alpha):
    x, pad, stages = batch(seed)
    state = torch.get_rng_state()
    for a, b in zip(*(mixup(x, pad, stages, generator(seed), alpha) for _ in range(2)), strict=True): assert torch.equal(a, b)
    assert torch.equal(state, torch.get_rng_state())
    share = mixup_share(20, alpha, generator(seed))
    assert ((share >= .5) & (share <= 1)).all()

def test_shares_follow_the_beta_distribution():
    drawn = mixup_share(20000, .4, generator()).double().numpy()
    s = np.random.default_rng(0).beta(.4, .4, 20000)
    assert np.abs(np.quantile(drawn, np.linspace(.1, .9, 9)) - np.quantile(np.maximum(s, 1 - s), np.linspace(.1, .9, 9))).max() < .02

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))
def test_cutting_and_joining(B, C, E, S):
    x = torch.arange(B * C * E * S).view(B, C, E * S)
    assert torch.equal(joined(segments(x, E)), x) and torch.equal(joined(segments(x[:, 0], E)), x[:, 0])


# --- trimming

def slow_surplus(stages):
    asleep = [i for i, s in enumerate(stages) if s > 0]
    if not asleep: return set()
    evening, morning = [i for i, s in enumerate(stages) if s == W and i < asleep[0]], [i for i, s in enumerate(stages) if s == W and i > asleep[-1]]
    cut = set()
    while len(evening) + len(morning) > max(stages.count(s) for s in range(1, 5)): cut.add((evening or morning).pop(0 if evening else -1))
    return cut

@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([W, 1, N2, N3, REM, GAP]), st.integers(1, 12)), max_size=8))
def test_trimming_against_a_loop(runs):
    stages = [s for s, n in runs for _ in range(n)]
    cut = surplus_wake(torch.tensor(stages, dtype=torch.long))
    assert set(cut.nonzero().flatten().tolist()) == slow_surplus(stages)


# --- defects of the original: ours, and the proof that the original's form has them

def test_d5_trimming_never_takes_sleep():
    stages = torch.tensor([W] * 30 + [N2] * 10 + [W] * 14 + [N3] * 6 + [REM] * 8)
    assert (stages[surplus_wake(stages, upstream=True)] > 0).sum() == 4 # the defect
    assert not (stages[surplus_wake(stages)] != W).any() and surplus_wake(stages).sum() == 20

def test_d5_a_night_without_sleep_is_left_as_it_is():
    awake = torch.zeros(40, dtype=torch.long)
    with pytest.raises(PFTSleepError, match="nobody sleeps"): surplus_wake(awake, upstream=True) # where the original stops
    assert not surplus_wake(awake).any() and not surplus_wake(torch.full((5,), GAP)).any() and not surplus_wake(torch.zeros(0, dtype=torch.long)).any()

def test_d5_padding_is_no_morning():
    night = torch.tensor([W] * 20 + [N2] * 12 + [W] * 3)
    padded = torch.cat([night, torch.full((20,), GAP)])
    assert torch.equal(surplus_wake(padded)[:35], surplus_wake(night)) and not surplus_wake(padded)[35:].any()
    assert surplus_wake(padded, upstream=True).sum() > surplus_wake(night, upstream=True).sum() # the defect
    pad = torch.zeros(1, 2, 110, dtype=torch.bool)
    gone, stages = trim_wake(pad, padded[None])
    assert torch.equal(segments(gone, 55)[0].all(-1).all(-1), surplus_wake(padded))
    assert torch.equal(stages[0] == GAP, surplus_wake(padded) | (padded < 0))

def test_d7_focal_factor_is_that_of_the_true_class():
    logits = torch.tensor([[9., 0, 0, 0, 0], [0., 0, 0, 0, 0]])
    y = torch.tensor([0, 0])
    each = lambda f: torch.stack([f(logits[i:i + 1], y[i:i + 1]) / cross_entropy(logits[i:i + 1], y[i:i + 1]) for i in range(2)]) # the factor alone
    close(each(focal_loss), (1 - logits.softmax(-1)[:, 0]) ** 2, 1e-4)
    factor = each(partial(focal_loss, upstream=True))
    assert factor[0] > factor[1] > 3 # the defect: the easy epoch weighs more than the doubtful one
    assert each(focal_loss)[0] < 1e-4 < each(focal_loss)[1]
    close(focal_loss(logits, y, 0., upstream=True), 5 * cross_entropy(logits, y))

@pytest.mark.parametrize("P", [10, 75, 750])
def test_d7_a_masked_loss_does_not_grow_with_the_patch(P):
    target = torch.randn(2, 3, 8, P, generator=generator())
    mask, pad = torch.rand(2, 3, 8, generator=generator()) < .5, torch.zeros(2, 3, 8, dtype=torch.bool)
    for kind, value in {"mse": 1., "mae": 1., "huber": .5}.items():
        close(patch_loss(target + 1, target, mask, pad, kind), value, 1e-5)
        close(patch_loss(target + 1, target, mask, pad, kind, upstream=True), P * value, 1e-5) # the defect
    pad[1] = True
    close(patch_loss(target + 1, target, mask, pad), 1., 1e-5)
    assert patch_loss(target + 1, target, mask, pad, upstream=True) < .9 * P # and hidden padding in its divisor

@pytest.mark.parametrize("P", [10, 750])
def test_d7_a_cosine_does_not_shrink_with_the_patch(P):
    target = torch.randn(2, 3, 8, P, generator=generator())
    mask, pad = torch.zeros(2, 3, 8, dtype=torch.bool), torch.zeros(2, 3, 8, dtype=torch.bool)
    close(patch_loss(-target, target, mask, pad, "cosine", "all"), 2., 1e-5)
    close(patch_loss(-target, target, mask, pad, "cosine", "all", upstream=True), 1 / P, 1e-5) # the defect

def test_d7_divergence_does_not_shrink_with_the_classes():
    for K in (2, 5, 10):
        logits, y = torch.randn(6, K, generator=generator()), torch.randint(K, (6,), generator=generator())
        close(kl_loss(logits, y), F.cross_entropy(logits, y))
        close(kl_loss(logits, y, upstream=True), F.cross_entropy(logits, y) / K) # the defect

def test_d7_epochs_that_mixup_ignores_are_ignored_by_every_loss():
    x, pad = torch.randn(2, 1, 16, generator=generator()), torch.zeros(2, 1, 16, dtype=torch.bool)
    stages = torch.tensor([[0, 1, GAP, GAP], [2, 3, 4, GAP]])
    share, partner = torch.tensor([.7, .6]), torch.tensor([1, 0])
    logits = torch.randn(2, 4, 5, generator=generator())
    _, _, labels = mix_pairs(x, pad, stages, share, partner)
    _, valid = soft_labels(labels, 5)
    assert torch.equal(valid, stages >= 0)
    for loss in STAGING_LOSSES.values(): close(loss(logits, labels), loss(logits[valid], labels[valid]))
    _, _, zeros = mix_pairs(x, pad, stages, share, partner, upstream=True)
    kept = zeros.sum(-1) > 0
    assert kept.sum() == 4 < valid.sum() == 5 # the original has lost a label
    close(kl_loss(logits, zeros, upstream=True), kl_loss(logits[kept], zeros[kept], upstream=True) / 2) # the defect: half of the rows are ignored and counted

def test_d8_cutmix_moves_the_padding_mask():
    x, pad = torch.rand(2, 1, 80, generator=generator()) + 1, torch.zeros(2, 1, 80, dtype=torch.bool)
    stages = torch.randint(5, (2, 20), generator=generator())
    pad[1, :, 32:], stages[1, 8:] = True, GAP
    x = x.masked_fill(pad, 0)
    for run, seed in ((1, 0), (3, 1), (1, 2)):
        mixed, moved, _ = cutmix(x, pad, stages, "cross", generator(seed), 1., run=run)
        assert not torch.equal(mixed, x) and torch.equal(mixed == 0, moved)
    theirs, still, _ = cutmix(x, pad, stages, "cross", generator(), 1., upstream=True)
    assert torch.equal(still, pad) and ((theirs == 0) & ~still).any() and ((theirs != 0) & still).any() # the defect

def test_d8_cutmix_leaves_unscored_epochs_alone():
    x, pad, stages = batch(5)
    stages[0, 0] = stages[1, 3] = GAP
    for mode in ("intra", "intra_epoch", "cross"):
        mixed = cutmix(x, pad, stages, mode, generator(), 1., run=1)
        assert torch.equal(segments(mixed[0], 7)[stages < 0], segments(x, 7)[stages < 0]) and torch.equal(mixed[2] < 0, stages < 0)
    order = cutmix_order(pad, stages, "intra", generator(), upstream=True)
    moved = (order != torch.arange(21)) & (stages.flatten() < 0)
    assert moved.any() # the defect: what nobody scored is exchanged too

def test_d8_cutmix_keeps_the_order_of_a_night():
    pad, stages = torch.zeros(4, 1, 960, dtype=torch.bool), torch.randint(5, (4, 960), generator=generator())
    together = lambda order: (order.view(4, 960)[:, 1:] == order.view(4, 960)[:, :-1] + 1).float().mean()
    assert together(cutmix_order(pad, stages, "cross", generator())) > .89
    assert together(cutmix_order(pad, stages, "cross", generator(), upstream=True)) < .01 # the defect


# --- settings that make no sense

@pytest.mark.parametrize("wrong", [
    lambda: patch_errors(torch.zeros(3), torch.zeros(3), "rmse"), lambda: patch_loss(*patches(0), region=2.), lambda: patch_loss(*patches(0), region="visible"),
    lambda: focal_loss(torch.zeros(1, 5), torch.zeros(1, dtype=torch.long), -1.), lambda: staging_loss("CrossEntropy"), lambda: corrupt(patches_of(0), ["cutmix"], generator()),
    lambda: random_mask(patches_of(0), -.1, generator()), lambda: shuffle(patches_of(0), "time", generator()), lambda: segments(torch.zeros(2, 7), 3),
    lambda: cutmix(*batch(0), "cross", generator(), 1., run=8), lambda: cutmix(*batch(0), "cross", generator(), 2.), lambda: cutmix_order(*batch(0)[1:], "inter", generator()),
    lambda: mixup_share(2, -1., generator()), lambda: block_mask(torch.zeros(1, 1, 4, dtype=torch.bool), 1., 1, generator()), lambda: log_spectrum(torch.zeros(1, 20))])
def test_senseless_settings_are_errors_of_ours(wrong):
    with pytest.raises(ConfigError): wrong()
