"Cox losses, figures of survival, and the training of heads: definitions written with loops, scikit-survival, the published fixture, faults."
import importlib.util
import json
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pftsleep.errors import ConfigError, ModelError, PFTSleepError, SplitError
from pftsleep.evaluation.survival import (BaselineHazard, Outcomes, TooFewEvents, auc_at, breslow_hazard, competing_risks, concordances, disease_table, draws, harrell_c, incident,
    integrated_brier, risk_calibration, uno_c)
from pftsleep.models.clinical_heads import Diagnosis, DiagnosisConfig
from pftsleep.training import finetune
from pftsleep.training.cox import (CoxConfig, CoxData, CoxHead, CoxHeadConfig, cox_loss, cox_models, hazards_of, label_mean, load_cox, partial_likelihood, risk_sets, save_cox,
    train_cox, with_bmi)

torch.set_num_threads(1)
needs_sksurv = pytest.mark.skipif(importlib.util.find_spec("sksurv") is None, reason="the extra 'survival' isn't installed")
FIXTURE = Path(__file__).parents[2] / "shared/fixtures/sleepfm/clinical_diagnosis_io.npz"


def tensors(*arrays): return [torch.from_numpy(np.asarray(a)) for a in arrays]


# --- the loss

def by_hand(h, t, e, known, strata, ties):
    "Minus log partial likelihood of one label, event time by event time."
    total = 0.
    for s in set(strata):
        rows = [i for i in range(len(t)) if strata[i] == s and known[i]]
        for day in sorted({t[i] for i in rows if e[i]}):
            falls = [i for i in rows if e[i] and t[i] == day]
            risk, tied = sum(np.exp(h[i]) for i in rows if t[i] >= day), sum(np.exp(h[i]) for i in falls)
            for gone, i in enumerate(falls): total += np.log(risk - (gone / len(falls) if ties == "efron" else 0) * tied) - h[i]
    return total


cohorts = st.integers(1, 25).flatmap(lambda n: st.lists(st.tuples(st.floats(-4, 4), st.integers(1, 6), st.booleans(), st.booleans(), st.sampled_from("ab")), min_size=n, max_size=n))


@settings(max_examples=60)
@given(cohorts, st.sampled_from(["efron", "breslow"]))
def test_the_partial_likelihood_is_that_of_the_textbook(rows, ties):
    h, t, e, known, strata = (np.array(c) for c in zip(*rows, strict=True))
    sets = risk_sets(*tensors(t[:, None].astype(float), e[:, None], known[:, None]), strata.tolist(), ties)
    at = torch.from_numpy(np.where(known, h, np.nan)[:, None]).requires_grad_()
    loss = partial_likelihood(at, sets)
    assert loss.item() == pytest.approx(by_hand(h, t, e, known, strata, ties), abs=1e-9)
    assert sets.events.item() == (e & known).sum()
    grad, = torch.autograd.grad(loss.sum(), at)
    for i in range(len(t)): # central differences
        if not known[i]: assert grad[i, 0] == 0; continue
        up, down = h.copy(), h.copy()
        up[i] += 1e-5; down[i] -= 1e-5
        assert grad[i, 0].item() == pytest.approx((by_hand(up, t, e, known, strata, ties) - by_hand(down, t, e, known, strata, ties)) / 2e-5, abs=1e-6)


def test_upstream_equals_the_published_fixture():
    if not FIXTURE.exists(): pytest.skip("../shared isn't here")
    f = np.load(FIXTURE)
    h, t, e = tensors(f["cox_h"], f["cox_t"], f["cox_e"])
    h.requires_grad_()
    sets = risk_sets(t, e, ties="upstream")
    torch.testing.assert_close((partial_likelihood(h, sets) / (sets.events + 1e-9)).detach(), torch.from_numpy(f["cox_per_label"]), atol=1e-5, rtol=0)
    loss = cox_loss(h, t, e, upstream=True)
    assert loss.item() == pytest.approx(float(f["cox_loss"]), abs=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, h)[0], torch.from_numpy(f["cox_grad"]), atol=1e-5, rtol=0)
    assert abs(cox_loss(h, t, e).item() - loss.item()) > .1 # a silent label doesn't divide ours, and ties count


@needs_sksurv
@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_scikit_survivals_coefficients_are_where_our_gradient_is_zero(ties):
    from sksurv.linear_model import CoxPHSurvivalAnalysis
    from sksurv.util import Surv
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 3))
    t, e = np.ceil(rng.exponential(8 * np.exp(-x @ [1, -.5, 0]))), rng.random(150) < .7 # whole days: many ties
    fitted = CoxPHSurvivalAnalysis(ties=ties, tol=1e-12, n_iter=200).fit(x, Surv.from_arrays(e, t))
    sets = risk_sets(*tensors(t[:, None], e[:, None]), ties=ties)
    other = risk_sets(*tensors(t[:, None], e[:, None]), ties="breslow" if ties == "efron" else "efron")
    b = torch.from_numpy(fitted.coef_).requires_grad_()
    slope = lambda s: torch.autograd.grad(partial_likelihood((torch.from_numpy(x) @ b)[:, None], s).sum(), b)[0].abs().max().item()
    assert slope(sets) < 1e-5 < .5 < slope(other)
    if ties == "breslow": # Breslow's hazard, too
        h = x @ fitted.coef_
        ours, theirs = breslow_hazard(t, e, h), fitted.cum_baseline_hazard_
        scale = np.exp((fitted.predict(x) - h).mean()) # theirs is centred at the mean of x in some versions
        np.testing.assert_allclose(ours.at(theirs.x) / scale, theirs.y, rtol=1e-8)


def test_float32_survives_extreme_hazards_and_half_precision():
    h = torch.tensor([[90.], [-200.], [80.], [3.]], requires_grad=True)
    for ties in ("efron", "breslow"):
        loss = cox_loss(h, torch.tensor([[1.], [1.], [2.], [1.]]), torch.ones(4, 1), ties=ties)
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, h)[0]).all()
    rng = np.random.default_rng(1)
    x, t, e = tensors(rng.normal(size=(64, 4)), rng.integers(1, 9, (64, 4)).astype(float), rng.random((64, 4)) < .5)
    assert cox_loss(x.float(), t, e).item() == pytest.approx(cox_loss(x, t, e).item(), rel=1e-6)
    assert cox_loss(x.bfloat16(), t, e).dtype == torch.float32


def test_days_in_float32_keep_their_order_and_who_doesnt_count_changes_nothing():
    rng = np.random.default_rng(2)
    h, t, e, known = tensors(rng.normal(size=(30, 2)), rng.integers(1, 20, (30, 2)).astype(float), rng.random((30, 2)) < .5, rng.random((30, 2)) < .7)
    value = cox_loss(h, t, e, known)
    assert cox_loss(torch.where(known, h, 1e30), torch.where(known, t, torch.nan), e, known) == value
    order = torch.from_numpy(rng.permutation(30))
    torch.testing.assert_close(cox_loss(h[order], t[order], e[order], known[order]), value) # no chance in ties
    one = [cox_loss(*(v[:, k:k + 1] for v in (h, t, e, known))) for k in range(2)]
    torch.testing.assert_close(torch.stack(one).mean(), value)
    assert label_mean(torch.tensor([3., 0.]), torch.tensor([2, 0])) == 1.5


# --- figures

def pairs(t, e, s, w=None):
    w = np.ones(len(t)) if w is None else w
    ok = [(i, j) for i in np.flatnonzero(e) for j in range(len(t)) if t[j] > t[i] or (t[j] == t[i] and not e[j])]
    total = sum(w[i] * w[j] for i, j in ok)
    return sum(w[i] * w[j] * ((s[i] > s[j]) + .5 * (s[i] == s[j])) for i, j in ok) / total if total else np.nan


watched = st.integers(3, 20).flatmap(lambda n: st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.integers(-2, 2), st.integers(0, 3)), min_size=n, max_size=n))


@needs_sksurv
@settings(max_examples=60)
@given(watched)
def test_concordance_is_a_count_of_pairs(rows):
    t, e, s, w = (np.array(c) for c in zip(*rows, strict=True))
    if not e.any(): return
    want = pairs(t, e, s)
    if np.isfinite(want): assert harrell_c(t, e, s, at_least=1) == pytest.approx(want, abs=1e-12)
    np.testing.assert_allclose(concordances(t, e, s, np.stack([np.ones(len(t)), w]), block=3), [want, pairs(t, e, s, w)], atol=1e-12)


@pytest.fixture(scope="module")
def simulated():
    rng = np.random.default_rng(3)
    risk = rng.normal(size=400)
    ill, lost = rng.exponential(1500 / np.exp(risk)), rng.uniform(200, 3000, 400)
    return np.ceil(np.minimum(ill, lost)), ill <= lost, risk


@needs_sksurv
def test_figures_refuse_what_they_cannot_know(simulated):
    t, e, s = simulated
    for figure in (lambda k: harrell_c(t[:k], e[:k], s[:k]), lambda k: uno_c(t[:k], e[:k], s[:k], 900), lambda k: auc_at(t[:k], e[:k], s[:k], [900]),
            lambda k: risk_calibration(t[:k], e[:k], 1 / (1 + np.exp(-s[:k])), 900), lambda k: competing_risks(t[:k], e[:k].astype(int), [100])):
        figure(400)
        with pytest.raises(TooFewEvents): figure(6)
    with pytest.raises(TooFewEvents, match="0 people watched beyond"): auc_at(t, e, s, [9000])
    with pytest.raises(ConfigError, match="NaN"): harrell_c(t, e, np.where(s > 2, np.nan, s))
    with pytest.raises(ConfigError, match="refuses"): uno_c(t, e, s, 2000, reference=(np.minimum(t, 500), e & (t <= 500)))


@needs_sksurv
def test_an_event_on_the_last_day_of_all_stops_nothing(simulated):
    "As where a study closes on one day: nobody is watched beyond it, so such an event has no weight; earlier horizons don't need it."
    t, e, s = simulated
    closed, ill = np.minimum(t, 1500), np.where(t > 1500, np.arange(400) % 2 == 0, e)
    assert (ill & (closed == 1500)).any() and (~ill & (closed == 1500)).any()
    np.testing.assert_allclose(auc_at(closed, ill, s, [400, 900]), auc_at(t, e, s, [400, 900]), atol=1e-12)
    assert np.isfinite(uno_c(closed, ill, s, 1400))
    assert np.isfinite(integrated_brier(closed, ill, np.tile([.2, .4], (400, 1)), np.array([400., 900.]))["model"])
    o = Outcomes(closed[:, None], ill[:, None], np.ones((400, 1), bool), ("x",))
    table = disease_table(o, {"m": s[:, None]}, range(400), horizon=900, n_resamples=20)
    assert table.auc_low[0] < table.auc[0] < table.auc_high[0]


def test_without_the_extra_the_way_out_is_named(monkeypatch, simulated):
    monkeypatch.setitem(sys.modules, "sksurv.metrics", None)
    with pytest.raises(ConfigError, match=r"pftsleep\[survival\]"): harrell_c(*simulated)


@needs_sksurv
def test_uncensored_brier_is_the_plain_mean_square(simulated):
    t, _, s = simulated
    e, times = np.ones(400, bool), np.array([300., 600., 900.])
    told = BaselineHazard(np.array([1.]), np.array([.4])).risk(s, times)
    each = [((told[:, k] - (t <= d))**2).mean() for k, d in enumerate(times)]
    got = integrated_brier(t, e, told, times)
    assert got["model"] == pytest.approx(np.trapezoid(each, times) / 600, rel=1e-9)
    null = integrated_brier(t, e, np.tile([(t <= d).mean() for d in times], (400, 1)), times)
    assert null["gain"] == pytest.approx(0, abs=1e-9) # who says the share says what Kaplan-Meier says


def aalen_johansen(t, cause, day):
    alive, total = 1., 0.
    for x in sorted(set(t[(cause > 0) & (t <= day)])):
        risk = (t >= x).sum()
        total += alive * ((t == x) & (cause == 1)).sum() / risk
        alive *= 1 - ((t == x) & (cause > 0)).sum() / risk
    return total


@needs_sksurv
def test_competing_risks_are_those_of_the_definition():
    rng = np.random.default_rng(4)
    t, cause = rng.integers(1, 30, 120).astype(float), rng.integers(0, 4, 120)
    table = competing_risks(t, cause, [5, 12, 25])
    np.testing.assert_allclose(table.aalen_johansen, [aalen_johansen(t, cause, d) for d in (5, 12, 25)], atol=1e-12)
    np.testing.assert_allclose(table.kaplan_meier, [aalen_johansen(t, np.where(cause == 1, 1, 0), d) for d in (5, 12, 25)], atol=1e-12)
    assert (table.excess > 0).all() and (table.aalen_johansen + table.competing <= 1).all()


@needs_sksurv
def test_calibration_without_censoring_is_a_share(simulated):
    t, _, s = simulated
    p = 1 / (1 + np.exp(-s))
    table = risk_calibration(t, np.ones(400, bool), p, 700, bins=4)
    group = np.searchsorted(np.quantile(p, [.25, .5, .75]), p, "left")
    np.testing.assert_allclose(table.came, [(t[group == g] <= 700).mean() for g in range(4)], atol=1e-12)
    assert ((table.low <= table.came) & (table.came <= table.high)).all() and table.n.sum() == 400


codes = st.lists(st.tuples(st.one_of(st.none(), st.integers(-500, 3000)), st.integers(0, 3000)), min_size=1, max_size=20)


@given(codes, st.integers(0, 30))
def test_only_what_comes_after_the_washout_is_new(rows, washout):
    first = np.array([np.nan if c is None else min(c, end) for c, end in rows], float)
    end = np.array([end for _, end in rows], float)
    o = incident(first[:, None], end, ["x"], washout)
    for i, (c, stop) in enumerate(zip(first, end, strict=True)):
        assert o.event[i, 0] == (np.isfinite(c) and c > washout)
        assert o.known[i, 0] == (stop > washout and not c <= washout)
        if o.known[i, 0]: assert o.time[i, 0] == (c if np.isfinite(c) else stop)


@needs_sksurv
def test_the_table_corrects_pairs_and_counts_people(simulated):
    t, e, s = simulated
    rng = np.random.default_rng(5)
    few = np.zeros(400, bool)
    few[np.flatnonzero(e)[:4]] = True
    o = Outcomes(np.stack([t, t, t], 1), np.stack([e, e, few], 1), np.ones((400, 3), bool), ("a", "b", "few"))
    scores = {"m": np.stack([s, rng.normal(size=400), s], 1), "age": np.stack([s + 2 * rng.normal(size=400)] * 3, 1), "copy": np.stack([s, s, s], 1)}
    table = disease_table(o, scores, range(400), "age", horizon=900, n_resamples=60).set_index(["label", "model"])
    assert table.c["a", "m"] == table.c["a", "copy"] and table.low["a", "m"] < table.c["a", "m"] < table.high["a", "m"]
    assert table.p["a", "m"] < 1e-8 and table.p["b", "m"] > .01
    assert table.p_bonferroni["b", "m"] == pytest.approx(min(1, 2 * table.p["b", "m"])) # of two that were judged
    assert table.p_bh["b", "m"] == pytest.approx(table.p["b", "m"])
    assert np.isnan(table.gain["a", "age"]) and table.gain_low["a", "m"] > 0
    assert np.isnan(table.c["few", "m"]) and table.events["few", "m"] == 4 and "too few" in table.note["few", "m"]
    again = disease_table(o, scores, range(400), "age", horizon=900, n_resamples=60).set_index(["label", "model"])
    assert again.equals(table)
    doubled = o.take(np.tile(range(400), 2)), {k: np.tile(v, (2, 1)) for k, v in scores.items()}, np.tile(range(400), 2)
    twice = disease_table(*doubled, "age", horizon=900, n_resamples=60).set_index(["label", "model"])
    assert (twice.events == table.events).all() # people, not nights
    assert abs((twice.high - twice.low)["a", "m"] - (table.high - table.low)["a", "m"]) < .01
    beyond = disease_table(o, scores, range(400), horizon=1e5, n_resamples=5)
    assert beyond.auc.isna().all() and beyond.c.notna().sum() == 6


def test_draws_keep_the_nights_of_a_person_together():
    counts = draws(["a", "b", "a", "c"], 50, seed=1)
    assert (counts[:, 0] == counts[:, 2]).all() and (counts[:, [0, 1, 3]].sum(1) == 3).all()
    assert (counts == draws(["a", "b", "a", "c"], 50, seed=1)).all() and (counts != draws(["a", "b", "a", "c"], 50, seed=2)).any()


# --- training

def people(n=160, seed=0, k=3):
    rng = np.random.default_rng(seed)
    x, person = rng.normal(size=(n, 4)).astype("float32"), rng.random((n, 2)).astype("float32")
    hazard = np.exp(np.stack([x[:, 0] + person[:, 0], -x[:, 1], np.full(n, -4.)], 1)[:, :k]) / 900
    first, lost = np.ceil(rng.exponential(1 / hazard)), rng.uniform(100, 2000, n).round()
    o = incident(np.where(first <= lost[:, None], first, np.nan), lost, [f"d{i}" for i in range(k)])
    return CoxData(x, o, tuple(f"{seed}-{i}" for i in range(n)), tuple(f"{seed}-{i}" for i in range(n)), person=person)


quick = CoxConfig(epochs=12)
def head_of(data): return CoxHead(CoxHeadConfig(data.x.shape[1], len(data.outcomes.labels), 2)).standardise(data)


class Stop(Exception): "A power cut."


def test_a_run_that_was_cut_off_ends_like_one_that_was_not(tmp_path, monkeypatch):
    train, val = people(), people(60, 1)
    config = replace(quick, batch_size=50) # so that the order of people matters, too
    whole = train_cox(head_of(train), train, val, tmp_path / "whole", config)
    monkeypatch.setattr(finetune, "_SAVE_SECONDS", -1.)
    step, real = count(), finetune._epoch
    def failing(*args):
        if next(step) == 5: raise Stop
        return real(*args)
    monkeypatch.setattr(finetune, "_epoch", failing)
    with pytest.raises(Stop): train_cox(head_of(train), train, val, tmp_path / "cut", config)
    monkeypatch.setattr(finetune, "_epoch", real)
    again = train_cox(head_of(train), train, val, tmp_path / "cut", config)
    assert again.hash == whole.hash and again.provenance["epochs"] == 12
    assert (tmp_path / "whole/history.csv").read_text() == (tmp_path / "cut/history.csv").read_text()


def test_memory_is_bounded_without_changing_the_step(tmp_path):
    "Pieces are computed again on the way back, dropout included; the risk sets stay those of everybody."
    train, val = people(), people(60, 1)
    pieces, whole = (train_cox(head_of(train), train, val, tmp_path / str(k), replace(quick, at_once=k)) for k in (7, 1000))
    np.testing.assert_allclose(pieces.log_hazard(val), whole.log_hazard(val), rtol=1e-3, atol=1e-5)
    assert np.isnan(whole.log_hazard(val)[:, 2]).all() and whole.trained == ("d0", "d1") and whole.provenance["left_out"] == ["d2"]


def test_training_refuses_leaks_and_too_few(tmp_path):
    train, val = people(), people(60, 1)
    with pytest.raises(SplitError, match="split people"): train_cox(head_of(train), train, train.take(range(30)), tmp_path / "a", quick)
    with pytest.raises(TooFewEvents, match="validation"): train_cox(head_of(train), train, val.take(np.flatnonzero(~val.outcomes.event[:, :2].any(1))), tmp_path / "b", quick)
    with pytest.raises(ConfigError, match="other labels"): train_cox(head_of(train), train, replace(val, outcomes=val.outcomes.only(["d1", "d0", "d2"])), tmp_path / "c", quick)
    with pytest.raises(TooFewEvents, match="needed"): train_cox(head_of(train), train.take(range(10)), val, tmp_path / "d", quick)
    train_cox(head_of(train), train, val, tmp_path / "e", quick)
    with pytest.raises(ConfigError, match="other settings: train"): train_cox(head_of(train), replace(train, x=train.x + 1), val, tmp_path / "e", quick)
    assert not [p for p in tmp_path.rglob("*.json") if "0-17" in p.read_text()] # no subject in what is kept


def test_strata_and_prevalent_people_are_compared_with_nobody_else(tmp_path):
    train, val = people(), people(60, 1)
    known = train.outcomes.known.copy()
    known[:40, 0] = False
    o = replace(train.outcomes, known=known, event=train.outcomes.event & known)
    a = train_cox(head_of(train), replace(train, outcomes=o), val, tmp_path / "a", quick)
    wild = replace(o, time=np.where(known, o.time, 7.5))
    b = train_cox(head_of(train), replace(train, outcomes=wild), val, tmp_path / "b", quick)
    assert (a.log_hazard(val)[:, 0] == b.log_hazard(val)[:, 0]).all()
    study = tuple("ab"[i % 2] for i in range(160))
    c = train_cox(head_of(train), replace(train, strata=study), val, tmp_path / "c", quick)
    assert (c.log_hazard(val)[:, 1] != a.log_hazard(val)[:, 1]).any()


def test_a_diagnosis_head_is_trained_on_tokens(tmp_path):
    def tokens(data):
        rng = np.random.default_rng(len(data))
        pad = rng.random((len(data), 2, 6)) < .3
        pad[:, 0, 0] = False
        x = np.where(pad[..., None], np.nan, data.x[:, None, None].repeat(2, 1).repeat(6, 2)).astype("float32")
        return replace(data, x=x, pad=pad)
    train, val = tokens(people(90)), tokens(people(40, 1))
    torch.manual_seed(0)
    head = Diagnosis(DiagnosisConfig(channels=("BAS", "EKG"), d_model=4, n_labels=3, demographics_width=4, pooling_heads=2, d_ff=8, lstm_layers=1, hidden=4, max_tokens=6, dropout=0.))
    model = train_cox(head, train, val, tmp_path, replace(quick, epochs=6, at_once=32, learning_rate=.01))
    curve = (tmp_path / "history.csv").read_text().splitlines()
    assert len(curve) == 7 and float(curve[-1].split(",")[2]) < float(curve[1].split(",")[2])
    again = load_cox(tmp_path / "model", Diagnosis)
    np.testing.assert_array_equal(again.log_hazard(val), model.log_hazard(val))
    one = again.log_hazard(val, 1)
    np.testing.assert_allclose(one, model.log_hazard(val), atol=1e-5) # whoever is in the batch


def test_a_saved_model_is_whole_or_refused(tmp_path):
    train, val = people(), people(60, 1)
    model = train_cox(head_of(train), train, val, tmp_path / "run", quick)
    other = train_cox(head_of(train), train, val, tmp_path / "other", replace(quick, epochs=5))
    risk = model.risk(val, 500)
    assert ((risk[:, :2] > 0) & (risk[:, :2] < 1)).all() and np.isnan(risk[:, 2]).all()
    folder = save_cox(model, tmp_path / "copy")
    np.testing.assert_array_equal(load_cox(folder).risk(val, 500), risk)
    (folder / "hazards.safetensors").write_bytes((tmp_path / "other/model/hazards.safetensors").read_bytes())
    with pytest.raises(ModelError, match="not those that were trained together"): load_cox(folder)
    save_cox(model, folder)
    about = json.loads((folder / "cox.json").read_text())
    (folder / "cox.json").write_text(json.dumps(about | dict(labels=["d1", "d0", "d2"])))
    with pytest.raises(ModelError): load_cox(folder)
    assert other.hash != model.hash


@settings(max_examples=40)
@given(st.sampled_from(["cox.json", "hazards.safetensors", "head/config.json"]), st.binary(max_size=60), st.integers(0, 400))
def test_garbage_is_a_model_error(tmp_path_factory, name, junk, at):
    train = people(40)
    folder = tmp_path_factory.mktemp("m")
    from pftsleep.training.cox import CoxModel
    save_cox(CoxModel(head_of(train), ("a", "b", "c"), (BaselineHazard(np.array([1.]), np.array([.1])), None, None), {}), folder)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:at] + junk + data[at + len(junk):])
    try: load_cox(folder)
    except PFTSleepError: return


def test_models_to_compare_read_the_same_nights(tmp_path):
    from pftsleep.data.splits import Split
    data = people(200)
    parts = dict(train=data.ids[:120], val=data.ids[120:160], test=data.ids[160:])
    split = Split(parts, dict(zip(data.ids, data.subjects, strict=True)))
    bmi = replace(data, x=np.zeros((200, 0), "float32"), person=with_bmi(data.person, np.full(200, 27.)))
    models = cox_models({"age, sex": replace(data, x=bmi.x), "age, sex, BMI": bmi, "all": data}, split, tmp_path, quick)
    assert models["age, sex"].log_hazard(replace(data, x=bmi.x).part(split, "test")).shape == (40, 3)
    np.testing.assert_allclose(models["age, sex"].log_hazard(replace(data, x=bmi.x)), models["age, sex, BMI"].log_hazard(bmi), atol=1e-6) # a constant tells nothing
    with pytest.raises(ConfigError, match="same nights"): cox_models({"a": data, "b": data.take(range(100))}, split, tmp_path, quick)
    with pytest.raises(ConfigError, match="kg/m2"): with_bmi(data.person, np.full(200, 2.7))
    assert hazards_of(models["all"].head, data).shape == (200, 3)
