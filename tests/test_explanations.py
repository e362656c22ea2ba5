"""Explanations: against naive loops, against the authors' code, and on a model of which the truth is known."""
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pftsleep.errors import ConfigError, ModelError, PFTSleepError, SignalError
from pftsleep.evaluation import explanations as ex
from pftsleep.evaluation.plots import figure_png
from pftsleep.models.transformer import PatchConfig, PatchTransformer

SHARED = Path(__file__).parents[2] / "shared"
PAT_FILES = SHARED / "fixtures/pat"
MIDNIGHT = datetime(2024, 3, 4)


def encoder(patch=20, **changes) -> PatchTransformer:
    torch.manual_seed(0)
    settings = dict(patch=patch, d_model=16, n_layers=3, n_heads=2, d_ff=16, embedding="shared", position="sine", instance_norm=False)
    model = PatchTransformer(PatchConfig(("Activity",), 1 / 60, **settings | changes)).eval()
    with torch.no_grad():
        for block in model.blocks: block.attention.qkv.weight.mul_(4)
    return model


def weeks(n=2, minutes=10080, seed=0): return torch.tensor(np.random.default_rng(seed).gamma(.6, 1.5, (n, minutes)) - .9).float()


# --- profiles against loops

def naive_received(a: np.ndarray) -> np.ndarray: # [H,N,N]
    return np.array([[sum(float(a[h, q, k]) for q in range(a.shape[1])) for k in range(a.shape[2])] for h in range(a.shape[0])])


@pytest.mark.parametrize("changes", [{}, {"position": "rotary"}, {"residual_attention": True}, {"pre_norm": False, "head_width": 6}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_sums_made_in_blocks_are_those_of_the_whole_matrix(changes, padded, monkeypatch):
    model, x = encoder(**changes), weeks(2, 600)
    pad = torch.zeros(2, 600, dtype=torch.bool)
    if padded: pad[1, 200:] = True
    maps = model(x, pad if padded else None, return_attention=True)[1]
    monkeypatch.setattr(ex, "BLOCK", 300) # some rows at a time
    caught = ex.attending(model, x, *([pad] if padded else []))
    assert len(caught) == len(maps) == 3
    for layer, weights in zip(caught, maps, strict=True):
        w = weights.detach().numpy().astype("float64")
        np.testing.assert_allclose(layer.rows().numpy(), w, rtol=1e-5, atol=1e-5) # the model that hands out its weights takes another kernel
        for i in range(2):
            np.testing.assert_allclose(ex.received(weights)[i], naive_received(w[i]), atol=1e-12)
            np.testing.assert_allclose(ex.received(layer)[i], naive_received(w[i]), atol=2e-5)


def test_hooks_are_gone_afterwards_and_after_an_error():
    model = encoder()
    ex.attending(model, weeks(1))
    with pytest.raises(ModelError): ex.attending(model, torch.zeros(1, 3, 4))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_batch_run_in_parts_is_put_together():
    model, x = encoder(), weeks(12) # more than 4096 tokens: run in parts on a processor
    np.testing.assert_allclose(ex.received(ex.attending(model, x)[-1])[9:10], ex.received(ex.attending(model, x[9:10])[-1]), atol=1e-4)


def test_the_other_axis_is_constant():
    a = torch.softmax(torch.randn(1, 3, 50, 50), -1)
    np.testing.assert_allclose(ex.patch_profile(ex.received(a.mT)), np.full((1, 50), 1 / 50), atol=1e-7)
    assert ex.flatness(ex.patch_profile(ex.received(a.mT)))["flat"].all()


def test_profile_rollout_and_days_against_loops():
    model, x, start = encoder().double(), weeks(2).double(), datetime(2024, 3, 4, 9, 41) # in float32 the kernel that hands out its weights rounds otherwise
    found = ex.attention_profile(model, x, start)
    for b in range(2):
        maps = [m[b].detach().numpy().astype("float64") for m in model(x, return_attention=True)[1]]
        heads = np.stack([m.sum(1) for m in maps])
        mean = heads[-1].mean(0)
        np.testing.assert_allclose(found.patch[b], mean / mean.sum(), atol=1e-9)
        np.testing.assert_allclose(found.heads[b], heads / heads.sum(-1, keepdims=True), atol=1e-9)
        product = np.eye(504)
        for m in maps: product = (.5 * m.mean(0) + .5 * np.eye(504)) @ product
        np.testing.assert_allclose(found.rollout[b], product.mean(0), atol=1e-9)
        minute, total = [mean[i // 20] / mean.sum() for i in range(10080)], np.zeros(1440)
        for i in range(10080):
            t = start + timedelta(minutes=i)
            total[t.hour * 60 + t.minute] += minute[i] / 7
        np.testing.assert_allclose(found.day[b], total, atol=1e-9)
        assert found.minute[b].sum() == pytest.approx(20) and found.day[b].sum() == pytest.approx(20 / 7)


def test_each_week_has_its_own_start():
    x = weeks(1).repeat(2, 1)
    found = ex.attention_profile(encoder(), x, [MIDNIGHT, MIDNIGHT + timedelta(hours=5)])
    np.testing.assert_allclose(np.roll(found.day[0], 300), found.day[1])
    with pytest.raises(ValueError): ex.attention_profile(encoder(), x, [MIDNIGHT])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1439), st.integers(1, 8), st.integers(0, 2**32))
def test_the_day_is_on_the_clock(first, days, seed):
    rng = np.random.default_rng(seed)
    values, pad = rng.random(days * 1440), rng.random(days * 1440) < .4
    folded = ex.day_profile(values, MIDNIGHT + timedelta(minutes=first), pad)
    for clock in rng.integers(0, 1440, 20):
        there = [v for i, v in enumerate(values) if (first + i) % 1440 == clock and not pad[i]]
        assert (np.isnan(folded[clock]) and not there) or folded[clock] == pytest.approx(np.mean(there))


def test_padding_gets_nothing_and_has_no_say():
    model, x = encoder(), weeks(3)
    pad = np.zeros((3, 10080), bool)
    pad[0, 5000:], pad[2] = True, True
    x[torch.as_tensor(pad)] = torch.nan
    found = ex.attention_profile(model, x, MIDNIGHT, pad)
    assert found.patch[0, 250:].sum() == found.rollout[0, 250:].sum() == found.minute[0, 5000:].sum() == 0
    assert found.patch[0].sum() == pytest.approx(1) and found.rollout[0].sum() == pytest.approx(1)
    alone = ex.attention_profile(model, x[:1, :1440 * 3], MIDNIGHT, pad[:1, :1440 * 3])
    short = ex.shares(found.patch[:1, :216])
    np.testing.assert_allclose(ex.attention_profile(model, torch.cat([x[:1, :4320], torch.zeros(1, 5760)], 1), MIDNIGHT, np.arange(10080)[None] >= 4320).patch[0, :216], alone.patch[0], atol=1e-7)
    assert short.shape == alone.patch.shape
    assert np.isnan(found.patch[2]).all() and not found.flatness["flat"][2]
    with pytest.raises(SignalError): ex.attention_profile(model, x, MIDNIGHT)


def test_flatness_is_reported():
    assert ex.flatness(np.full((1, 560), .01)).iloc[0].tolist() == [pytest.approx(1), pytest.approx(1), True]
    one = np.zeros((1, 560))
    one[0, 3] = 1
    assert ex.flatness(one).iloc[0].tolist() == [pytest.approx(560), pytest.approx(0), False]
    p = np.random.default_rng(0).random(560)
    q = p / p.sum()
    row = ex.flatness(p[None]).iloc[0]
    assert row["entropy"] == pytest.approx(stats.entropy(q) / np.log(560)) and row["max_mean"] == pytest.approx(q.max() * 560)
    padded = ex.flatness(np.r_[np.ones(5), np.full(5, 9.)], np.arange(10) >= 5)
    assert padded["flat"].all() and padded["entropy"].iloc[0] == pytest.approx(1)


# --- the authors' code

def test_profiles_of_the_original():
    if not (PAT_FILES / "ref_S.npz").exists(): pytest.skip("the fixtures of PAT aren't here")
    with np.load(PAT_FILES / "ref_S.npz") as z: ref = dict(z)
    profile = ex.patch_profile(ref["attn1_received_per_key"])
    day = ex.day_profile(ex.minute_profile(profile, 18), MIDNIGHT)
    assert np.abs(profile - ref["explain_profile_patch"]).max() < 1e-7
    assert np.abs(day - ref["explain_profile_day"]).max() < 1e-7


def test_profiles_of_the_original_from_its_weights():
    if not (PAT_FILES / "ref_S.npz").exists(): pytest.skip("the fixtures of PAT aren't here")
    from pftsleep.models.weights import load_published
    with np.load(PAT_FILES / "ref_S.npz") as z: ref = dict(z)
    model = load_published(PAT_FILES / "PAT-S_random_weights.h5")
    found = ex.attention_profile(model, torch.tensor(ref["input"]), MIDNIGHT)
    assert np.abs(found.patch - ref["explain_profile_patch"]).max() < 1e-7
    assert np.abs(found.day - ref["explain_profile_day"]).max() < 1e-7
    np.testing.assert_allclose(found.minute, np.repeat(ref["explain_profile_patch"], 18, -1), atol=1e-7)
    heads = ref["attn1_received_per_key"].astype("float64")
    np.testing.assert_allclose(found.heads[:, 0], heads / heads.sum(-1, keepdims=True), atol=1e-6)
    from_tensor = ex.patch_profile(ex.received(model(torch.tensor(ref["input"]), return_attention=True)[1][-1]))
    assert np.abs(from_tensor - ref["explain_profile_patch"]).max() < 1e-7


def test_the_original_classifier_is_explained():
    if not (PAT_FILES / "ref_finetune_S.npz").exists(): pytest.skip("the fixtures of PAT aren't here")
    from pftsleep.models.weights import load_published
    with np.load(PAT_FILES / "ref_finetune_S.npz") as z: x = torch.tensor(z["input"])[:1]
    model = load_published(PAT_FILES / "PAT-S_random_finetune_weights.h5")
    g = ex.integrated_gradients(model, x, steps=32)
    with torch.no_grad(): change = float(model(x) - model(x * 0))
    assert g.sum() == pytest.approx(change, abs=.01 * np.abs(g).sum())
    assert ex.attention_profile(model, x, MIDNIGHT).patch.shape == (1, 560)


# --- cohorts

def test_cohort_mean_over_subjects_and_its_intervals():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(30, 50)) + np.arange(50)
    table = ex.cohort_profile(values, rng=1)
    np.testing.assert_allclose(table["mean"], values.mean(0))
    half = stats.t.ppf(.975, 29) * values.std(0, ddof=1) / 30**.5
    assert np.abs((table["high"] - table["low"]) / (2 * half) - 1).mean() < .15
    assert (table["all_low"] < table["low"]).all() and (table["all_high"] > table["high"]).all()
    twice = ex.cohort_profile(np.r_[values, values[:1], values[:1]], [*range(30), 0, 0], rng=1)
    np.testing.assert_allclose(twice, table) # a person with three equal weeks is one person


def test_the_band_for_all_minutes_covers_all_of_them():
    rng, inside, pointwise = np.random.default_rng(0), 0, 0
    for _ in range(60):
        t = ex.cohort_profile(rng.normal(size=(40, 30)), n_resamples=300, rng=rng)
        inside += ((t["all_low"] <= 0) & (t["all_high"] >= 0)).all()
        pointwise += ((t["low"] <= 0) & (t["high"] >= 0)).all()
    assert inside >= 48 and pointwise < 40


def test_cohort_edges():
    values = np.ones((4, 10))
    values[:, 3], values[0, 5] = np.nan, np.nan
    t = ex.cohort_profile(values)
    assert t.loc[3].isna().all() and t.loc[5].tolist() == [1] * 5 and t.attrs["subjects"] == 4
    for wrong in (np.ones(3), np.ones((0, 3))):
        with pytest.raises(ConfigError): ex.cohort_profile(wrong)
    with pytest.raises(ConfigError): ex.cohort_profile(values, ["a", "b", None, "c"])


# --- attributions of a known truth

HOUR = slice(38 * 60, 39 * 60)

class OneHour(torch.nn.Module):
    "Its encoder looks about, its answer comes from one hour."
    def __init__(self):
        super().__init__()
        self.encoder = encoder(n_layers=1)
        with torch.no_grad():
            for block in self.encoder.blocks:
                for p in block.attention.out.parameters(): p.zero_()
        self.head = torch.nn.Linear(16, 1)
    def forward(self, x, pad=None): return self.head(self.encoder(x, pad)[:, 114:117].mean(1))[:, 0]


def test_attributions_find_the_hour_and_attention_need_not():
    model, x = OneHour().eval(), weeks(2)
    maps = {"gradients": ex.integrated_gradients(model, x, steps=24), "occlusion": ex.occlusion(model, x)}
    assert not np.delete(maps["gradients"], np.r_[HOUR], 1).any()
    for m in maps.values(): assert np.abs(np.delete(m, np.r_[HOUR], 1)).max() < 1e-7 < .001 * np.abs(m[:, HOUR]).max(1).min() # occlusion rounds
    looked = ex.attention_profile(model, x, MIDNIGHT).minute
    hours = looked.reshape(2, 168, 60).sum(-1)
    assert (hours.argmax(1) != 38).all()
    for i in range(2):
        table, curves = ex.faithfulness(model, x[i], {k: m[i] for k, m in maps.items()} | {"attention": looked[i]}, shuffles=4)
        assert (table.loc[["gradients", "occlusion"], "beats"] == 1).all() and table.loc["attention", "score"] < .9 * table.loc["occlusion", "score"]
        with torch.no_grad(): f, base = float(model(x[i:i + 1])), float(model(x[:1] * 0))
        assert curves.iloc[0].xs("deletion", level=1).to_numpy() == pytest.approx(f, abs=1e-5)
        assert curves.iloc[-1].xs("deletion", level=1).to_numpy() == pytest.approx(base, abs=1e-5)
        assert curves.iloc[0].xs("insertion", level=1).to_numpy() == pytest.approx(base, abs=1e-5)


def test_gradients_of_known_functions():
    x, base = weeks(2, 40).double(), torch.linspace(-1, 1, 40).double()
    w = torch.randn(40, generator=torch.Generator().manual_seed(0)).double()
    np.testing.assert_allclose(ex.integrated_gradients(lambda z: z @ w, x, base), ((x - base) * w).numpy(), atol=1e-12)
    np.testing.assert_allclose(ex.integrated_gradients(lambda z: (z**2 * w).sum(1), x, base), ((x**2 - base**2) * w).numpy(), atol=1e-12)
    np.testing.assert_allclose(ex.integrated_gradients(lambda z: z[:, 0] * z[:, 1], x)[:, :2], (x[:, :1] * x[:, 1:2] / 2).numpy().repeat(2, 1), atol=1e-12)
    riemann = lambda f, z: np.stack([(z * torch.autograd.grad(f(p := (z * (k + .5) / 1000).requires_grad_()).sum(), p)[0]).numpy() for k in range(1000)]).mean(0)
    f = lambda z: torch.tanh(z @ w)
    np.testing.assert_allclose(ex.integrated_gradients(f, x), riemann(f, x), atol=1e-5)


def test_completeness_on_a_transformer():
    model, x = encoder(n_layers=2), weeks(2, 1440)
    f = lambda z: model(z).mean(1)[:, 3]
    for base in (0., weeks(1, 1440, 5)[0]):
        g = ex.integrated_gradients(f, x, base)
        with torch.no_grad(): change = (f(x) - f(x * 0 + base)).numpy()
        assert (np.abs(g.sum(1) - change) <= .01 * np.abs(g).sum(1) + 1e-4).all()
    assert all(p.grad is None for p in model.parameters())


def test_what_does_not_add_up_raises():
    with pytest.raises(ModelError, match="add up"): ex.integrated_gradients(lambda z: (z.mean(1) > .2).float() + 0 * z.sum(1), torch.ones(1, 60))
    with pytest.raises(ModelError, match="add up"): ex.integrated_gradients(lambda z: torch.sqrt(z.abs()).sum(1) * torch.nan, torch.ones(1, 60))
    with pytest.raises(ModelError, match="training"): ex.integrated_gradients(OneHour(), weeks(1))
    with pytest.raises(ConfigError): ex.integrated_gradients(lambda z: z, weeks(1))
    with pytest.raises(ConfigError): ex.integrated_gradients(lambda z: z.sum(1), weeks(1), torch.zeros(7))
    with pytest.raises(ConfigError): ex.occlusion(lambda z: z.sum(1), weeks(1), pad=np.zeros(10080, bool))
    with pytest.raises(ConfigError): ex.occlusion(lambda z: z.sum(1), weeks(1)[0])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 50), st.integers(0, 2**32))
def test_occlusion_against_a_loop(window, seed):
    rng = np.random.default_rng(seed)
    x, pad, w, base = rng.normal(size=50), rng.random(50) < .3, rng.normal(size=50), rng.normal(size=50)
    f = lambda z: np.tanh(z @ w)
    filled, expected = np.where(pad, base, x), np.zeros(50)
    for a in range(0, 50, window):
        here = np.arange(a, min(a + window, 50))
        if pad[here].all(): continue
        without = filled.copy()
        without[here] = base[here]
        expected[here[~pad[here]]] = (f(filled) - f(without)) / (~pad[here]).sum()
    tensor = torch.tensor(w)
    found = ex.occlusion(lambda z: torch.tanh(z @ tensor), torch.tensor(x)[None], window, torch.tensor(base), pad[None], batch=3)
    np.testing.assert_allclose(found[0], expected, atol=1e-12)


def test_padded_minutes_get_no_attribution():
    x, pad = weeks(2, 600), np.zeros((2, 600), bool)
    pad[0, 100:222] = True
    x[torch.as_tensor(pad)] = torch.nan
    f = lambda z: torch.tanh(z.mean(1))
    assert not ex.integrated_gradients(f, x, pad=pad)[pad].any() and not ex.occlusion(f, x, pad=pad)[pad].any()
    with pytest.raises(SignalError): ex.integrated_gradients(f, x)
    table, _ = ex.faithfulness(f, x[0], {"m": np.ones(600)}, pad=pad[0])
    assert np.isfinite(table["score"]).all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_linear_model_is_judged_as_theory_says(sign):
    w = sign * torch.tensor(np.random.default_rng(0).normal(size=600)) # their sum is -13.6: with 1 there is evidence against
    x = torch.ones(600).double()
    f = lambda z: z @ w
    table, curves = ex.faithfulness(f, x, {"truth": w.numpy(), "wrong": -w.numpy(), "equal": np.ones(600)}, window=20, shuffles=60)
    assert table["score"].idxmax() == "truth" and table.loc["truth", "beats"] == 1 and table.loc["wrong", "beats"] == 0
    assert table.loc["wrong", "score"] < 0 and abs(table.loc["random order", "score"]) < .2 * table.loc["truth", "score"]
    hourly = np.sort(w.numpy().reshape(30, 20).sum(1))[::sign]
    taken = np.round(curves.index.to_numpy() * 30).astype(int)
    np.testing.assert_allclose(curves["truth", "deletion"], [hourly[k:].sum() for k in taken], atol=1e-9)
    np.testing.assert_allclose(curves["truth", "insertion"], [hourly[:k].sum() for k in taken], atol=1e-9)
    again, _ = ex.faithfulness(f, x, {"truth": w.numpy(), "wrong": -w.numpy(), "equal": np.ones(600)}, window=20, shuffles=60)
    assert again.equals(table)


# --- figures

def test_a_flat_profile_is_drawn_white():
    values = np.random.default_rng(0).random(10080)
    flat = np.full(10080, 1 / 10080) * (1 + .02 * np.sin(np.arange(10080) / 300))
    ax = ex.plot_week(values, flat, MIDNIGHT)
    assert "(flat)" in ax.get_title("left")
    image = ax.images[0]
    colors = image.cmap(image.norm(image.get_array()))[..., :3]
    assert colors.min() > .93 # near white, whatever its own smallest and largest value
    hot = flat.copy()
    hot[:600] *= 40
    image = (ax := ex.plot_week(values, hot, MIDNIGHT)).images[0]
    assert image.cmap(image.norm(image.get_array()))[0, 0, 1] < .1 and "(flat)" not in ax.get_title("left")


def test_figures_are_drawn_and_repeatable():
    day, values = np.random.default_rng(0).random(1440), np.random.default_rng(1).random(1440)
    day[:60] = np.nan
    for draw in (lambda: ex.plot_day(values, day).figure, lambda: ex.plot_clock(values, day).figure, lambda: ex.plot_attention(torch.softmax(torch.ones(2, 30, 30), -1), 1080).figure,
            lambda: ex.plot_cohort({"a": ex.cohort_profile(np.random.default_rng(0).random((3, 1440)))}, fair=.5).figure,
            lambda: ex.plot_week(values, day - .5, signed=True).figure, lambda: ex.plot_week(values, day * np.nan).figure):
        assert figure_png(draw(), 30) == figure_png(draw(), 30)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 4), st.integers(0, 4), st.sampled_from([np.nan, np.inf, -1., 0., 1e100]))
def test_wrong_input_raises_ours_or_works(a, b, value):
    odd = np.full((a, b), value)
    for call in (ex.shares, ex.flatness, ex.cohort_profile, lambda v: ex.day_profile(v, MIDNIGHT), lambda v: ex.patch_pad(v > 0, 3), lambda v: ex.plot_attention(v, 60),
            lambda v: ex.plot_clock(v, v), lambda v: ex.occlusion(lambda z: z.sum(1), torch.tensor(v), 1), lambda v: ex.integrated_gradients(lambda z: z.sum(1), torch.tensor(v))):
        with suppress(PFTSleepError): call(odd)
