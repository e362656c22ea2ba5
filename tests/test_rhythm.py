"Rest-activity and sleep metrics against naive loops, ActiLife's own scores, and real weeks."
import math
import sqlite3
from contextlib import suppress
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime

from pftsleep.errors import ConfigError, PFTSleepError, SignalError
from pftsleep.evaluation.rhythm import (
    BINS, RHYTHM_STATISTICS, cosinor, extended_cosinor, rest_activity, rhythm_features, rhythm_table, simulate_activity, sustained_transitions, transition_probabilities)
from pftsleep.evaluation.sleep_wake import (
    OAKLEY, cole_kripke, fragmentation_index, night_statistics, oakley, period_statistics, rescore, sadeh, sleep_periods, sleep_regularity, sum_epochs)

ACTIGRAPHY = Path(__file__).parents[2] / "shared" / "realdata" / "actigraphy"
needs_realdata = pytest.mark.skipif(not ACTIGRAPHY.exists(), reason="../shared/realdata is not here")
MONDAY = datetime(2024, 1, 8)


# --- naive oracles: loops over single epochs, nothing shared with the module

def slow_rest_activity(x, epoch_length, start):
    "Every number of `rest_activity`, from (clock time, value) pairs."
    pairs = [(start + timedelta(seconds=i * epoch_length), v) for i, v in enumerate(x)]

    def means(minutes):
        "Bins on the clock: {(day, bin): mean} where at least half of the bin is known."
        found = {}
        for t, v in pairs:
            if not math.isnan(v): found.setdefault((t.toordinal(), (t.hour * 60 + t.minute) // minutes), []).append(v)
        return {k: sum(v) / len(v) for k, v in found.items() if 2 * len(v) * epoch_length >= minutes * 60}

    def stability(bins):
        mean = sum(bins.values()) / len(bins)
        by_clock = {}
        for (_, b), v in bins.items(): by_clock.setdefault(b, []).append(v)
        return sum(len(v) * (sum(v) / len(v) - mean) ** 2 for v in by_clock.values()) / sum((v - mean) ** 2 for v in bins.values())

    def variability(bins, minutes):
        mean, per_day = sum(bins.values()) / len(bins), 1440 // minutes
        line = {d * per_day + b: v for (d, b), v in bins.items()}
        steps = [(line[k + 1] - v) ** 2 for k, v in line.items() if k + 1 in line]
        return (sum(steps) / len(steps)) / (sum((v - mean) ** 2 for v in line.values()) / len(line))

    minutes = [m for m in range(1, 61) if 1440 % m == 0 and m * 60 % epoch_length == 0]
    clock = {}
    for t, v in pairs:
        if not math.isnan(v): clock.setdefault(t.time(), []).append(v)
    profile = {(t.hour * 3600 + t.minute * 60 + t.second): sum(v) / len(v) for t, v in clock.items()}
    slots = sorted({(t.hour * 3600 + t.minute * 60 + t.second) for t, _ in pairs})

    def window(hours, pick):
        n = round(hours * 3600 / epoch_length)
        candidates = []
        for k in range(len(slots)):
            values = [profile[slots[(k + i) % len(slots)]] for i in range(n) if slots[(k + i) % len(slots)] in profile]
            if values: candidates.append((sum(values) / len(values), slots[k] / 3600))
        return pick(candidates)
    (l5, l5_at), (m10, m10_at) = window(5, min), window(10, max)
    return {"IS": stability(means(60)), "IV": variability(means(60), 60), "ISm": np.mean([stability(means(m)) for m in minutes]),
        "IVm": np.mean([variability(means(m), m) for m in minutes]), "L5": l5, "M10": m10, "RA": (m10 - l5) / (m10 + l5), "L5_onset_h": l5_at, "M10_onset_h": m10_at}


def slow_sleep(x, scorer):
    "Scores of a scorer given as (epochs before, after, function of the window and the place in it) -> asleep."
    before, after, asleep = scorer
    out = []
    for i in range(len(x)):
        window = [x[k] if 0 <= k < len(x) else 0. for k in range(i - before, i + after + 1)]
        out.append(-1 if any(math.isnan(v) for v in window) else int(asleep(window)))
    return out


def slow_cole_kripke(w): return .001 * sum(p * min(v / 100, 300) for p, v in zip((106, 54, 58, 76, 230, 74, 67), w, strict=True)) < 1


def slow_sadeh(w):
    w = [min(v, 300.) for v in w]
    last = w[:6]
    sd = math.sqrt(sum((v - sum(last) / 6) ** 2 for v in last) / 5)
    return 7.601 - .065 * sum(w) / 11 - 1.08 * sum(50 <= v < 100 for v in w) - .056 * sd - .703 * math.log(w[5] + 1) > -4


def slow_rescore(s):
    out, n = list(s), len(s)
    def run(i, step):
        "Epochs of wake in a row from i on, in the direction of `step`."
        k = 0
        while 0 <= i < n and s[i] == 0: i, k = i + step, k + 1
        return k
    for i in range(n):
        if s[i] != 1: continue
        a = i
        while a > 0 and s[a - 1] == 1: a -= 1
        b = i
        while b < n and s[b] == 1: b += 1
        before, after, place = run(a - 1, -1), run(b, 1), i - a
        if any((before >= 4 and place < 1, before >= 10 and place < 3, before >= 15 and place < 4, b - a <= 6 and before >= 10 and after >= 10,
                b - a <= 10 and before >= 20 and after >= 20)): out[i] = 0
    return out


# --- rhythm

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([60, 300, 600, 1800, 3600]), st.integers(0, 1439), st.floats(0, .3))
def test_rest_activity_is_what_a_loop_computes(seed, epoch_length, minute, missing):
    rng = np.random.default_rng(seed)
    x = rng.gamma(.6, 200, round(rng.uniform(2.5, 4) * 86400 / epoch_length))
    x[rng.random(len(x)) < missing] = np.nan
    start = MONDAY + timedelta(minutes=minute // (epoch_length // 60) * (epoch_length // 60))
    try: fast = rest_activity(x, epoch_length, start)
    except SignalError as e:
        assert "clock hours" in str(e) and missing
        return
    slow = slow_rest_activity(x, epoch_length, start)
    assert {k: fast[k] for k in slow} == pytest.approx(slow, rel=1e-9)
    assert 0 <= fast["IS"] <= 1 and 0 <= fast["RA"] <= 1 and fast["IV"] >= 0


def test_every_number_is_defined():
    stats = rest_activity(simulate_activity(), 60, MONDAY)
    assert list(stats) == [s.key for s in RHYTHM_STATISTICS]
    assert len(rhythm_table(stats)) == len(stats) and set(rhythm_table(stats).source) >= {"Witting 1990", "Van Someren 1999"}
    assert all(1440 % m == 0 for m in BINS)


@pytest.mark.parametrize("epoch_length", [15, 30, 60])
def test_epochs_of_a_week_give_the_same_rhythm(epoch_length):
    x = simulate_activity(4, 15., seed=2)
    want, have = rest_activity(x, 15, MONDAY), rest_activity(sum_epochs(x, 15, epoch_length), epoch_length, MONDAY)
    for k in ("IS", "IV", "RA"): assert have[k] == pytest.approx(want[k], rel=1e-3)
    for k in ("L5", "M10"): assert have[k] == pytest.approx(want[k] * epoch_length / 15, rel=2e-2)
    for k in ("L5_onset_h", "M10_onset_h"): assert have[k] == pytest.approx(want[k], abs=.1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 1439), st.floats(.01, 100))
def test_shifts_of_the_clock_and_other_units(seed, minute, scale):
    day = np.random.default_rng(seed).gamma(.6, 200, 288)
    x = np.tile(day, 3)
    base, moved = rest_activity(x, 300, MONDAY), rest_activity(x * scale, 300, MONDAY + timedelta(minutes=minute // 60 * 60))
    assert moved["IS"] == pytest.approx(1) and base["IS"] == pytest.approx(1)
    assert moved["RA"] == pytest.approx(base["RA"]) and moved["IV"] == pytest.approx(base["IV"])
    for k in ("L5_onset_h", "M10_onset_h"): assert (moved[k] - base[k] - minute // 60 + 12) % 24 == pytest.approx(12)
    for k in ("L5", "M10"): assert moved[k] == pytest.approx(base[k] * scale)


def test_a_start_between_epochs_moves_the_onsets_by_it():
    x = simulate_activity(3)
    a, b = (rest_activity(x, 60, MONDAY + timedelta(seconds=s)) for s in (0, 25))
    assert b["L5_onset_h"] - a["L5_onset_h"] == pytest.approx(25 / 3600)


@pytest.mark.parametrize(("values", "epoch_length", "start", "says"), [
    (np.ones(100), 60, MONDAY, "0.07 days"), (np.zeros(1440 * 3), 60, MONDAY, "never changes"), (np.full(1440 * 3, np.nan), 60, MONDAY, "100% of the activity"),
    (np.ones((2, 5000)), 60, MONDAY, "shape"), (np.full(5000, np.inf), 60, MONDAY, "infinite"), (np.ones(5000), 0, MONDAY, "divide the hour"),
    (np.ones(5000), 7000, MONDAY, "divide the hour"), (np.ones(5000), math.nan, MONDAY, "divide the hour"), (np.ones(5000), 60, None, "start is None"), ([], 60, MONDAY, "0.00 days")])
def test_what_has_no_rhythm_is_refused(values, epoch_length, start, says):
    with pytest.raises(PFTSleepError, match=says): rest_activity(values, epoch_length, start)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([24., 12., 25.5]))
def test_cosinor_against_normal_equations_and_numeric_derivatives(seed, period):
    rng = np.random.default_rng(seed)
    n = 24 * 5
    hours, w = np.arange(n) + .5 + 6, 2 * math.pi / period
    x = np.abs(100 + rng.normal(0, 10, n) + rng.uniform(30, 60) * np.cos(w * (hours - rng.uniform(0, 24))))
    x[rng.random(n) < .1] = np.nan
    c, known = cosinor(x, 3600, MONDAY + timedelta(hours=6), period), ~np.isnan(x)
    X = np.array([[1, math.cos(w * h), math.sin(w * h)] for h in hours[known]])
    b = np.linalg.solve(X.T @ X, X.T @ x[known])
    rss = ((x[known] - X @ b) ** 2).sum()
    cov = np.linalg.inv(X.T @ X) * rss / (known.sum() - 3)
    amplitude, q = math.hypot(b[1], b[2]), 1.98 # t of 100 or so
    phase = math.atan2(b[2], b[1])
    assert (c["mesor"], c["amplitude"]) == pytest.approx((b[0], amplitude))
    assert (c["acrophase_h"] - phase / w) % period == pytest.approx(0, abs=1e-6) or (c["acrophase_h"] - phase / w) % period == pytest.approx(period, abs=1e-6)
    slope = approx_fprime(b, lambda v: math.hypot(v[1], v[2]), 1e-6)
    turn = approx_fprime(b, lambda v: (math.atan2(v[2], v[1]) - phase + math.pi) % (2 * math.pi) / w, 1e-6)
    assert c["amplitude_high"] - c["amplitude"] == pytest.approx(q * math.sqrt(slope @ cov @ slope), rel=.01)
    assert c["acrophase_h_high"] - c["acrophase_h"] == pytest.approx(q * math.sqrt(turn @ cov @ turn), rel=.01)
    tss = ((x[known] - x[known].mean()) ** 2).sum()
    assert c["F"] == pytest.approx((tss - rss) / 2 / (rss / (known.sum() - 3))) and c["p"] < .05


def test_intervals_of_cosinor_cover_what_they_promise():
    t, rng, hits, rejected = np.arange(72) + .5, np.random.default_rng(0), np.zeros(3), 0
    for _ in range(400):
        c = cosinor(500 + 80 * np.cos(2 * np.pi * (t - 15) / 24) + rng.normal(0, 60, 72), 3600, MONDAY)
        hits += [c[f"{k}_low"] <= v <= c[f"{k}_high"] for k, v in (("mesor", 500), ("amplitude", 80), ("acrophase_h", 15))]
        rejected += cosinor(500 + rng.normal(0, 60, 72), 3600, MONDAY)["p"] < .05
    assert (np.abs(hits / 400 - .95) < .035).all() and abs(rejected / 400 - .05) < .035


@pytest.mark.parametrize(("alpha", "beta", "peak"), [(-.5, 4, 14), (.3, 12, 3), (0, 30, 23.5)])
def test_extended_cosinor_finds_its_own_curve(alpha, beta, peak):
    t = (np.arange(4 * 288) + .5) / 12
    x = 10 + 200 / (1 + np.exp(-beta * (np.cos(2 * np.pi * (t - peak) / 24) - alpha)))
    x[500:700] = np.nan
    c = extended_cosinor(x, 300, MONDAY)
    assert [c[k] for k in ("minimum", "amplitude", "alpha", "beta")] == pytest.approx([10, 200, alpha, beta], rel=1e-3, abs=1e-3)
    assert (c["acrophase_h"] - peak + 12) % 24 == pytest.approx(12, abs=1e-3) and c["r2"] == pytest.approx(1)
    width = 2 * math.acos(alpha) * 12 / math.pi
    assert (c["down_mesor_h"] - c["up_mesor_h"]) % 24 == pytest.approx(width, abs=1e-2)


def test_extended_cosinor_minimises_over_all_epochs():
    "The fit of the weighted mean day is the fit of all epochs: no step away from it is better."
    x = simulate_activity(3, 600, seed=5)
    x[100:130] = np.nan
    c, t = extended_cosinor(x, 600, MONDAY), (np.arange(len(x)) + .5) / 6
    def rss(p): return np.nansum((x - p[0] - p[1] / (1 + np.exp(-p[3] * (np.cos(2 * np.pi * (t - p[4]) / 24) - p[2])))) ** 2)
    best = np.array([c[k] for k in ("minimum", "amplitude", "alpha", "beta", "acrophase_h")])
    assert 1 - rss(best) / np.nansum((x - np.nanmean(x)) ** 2) == pytest.approx(c["r2"])
    for k in range(5):
        for step in (-.02, .02):
            p = best.copy(); p[k] += step * max(abs(p[k]), 1)
            if p[0] >= 0: assert rss(p) >= rss(best) * (1 - 1e-9)


@given(st.lists(st.sampled_from([0., 0., 7., 20., math.nan]), min_size=2, max_size=40))
def test_transition_probabilities_against_a_loop(x):
    steps = [(a >= 5, b >= 5) for a, b in pairwise(x) if a == a and b == b]
    rest, active = [b for a, b in steps if not a], [b for a, b in steps if a]
    have = transition_probabilities(x, 5)
    assert have["TP_ra"] == pytest.approx(np.mean(rest) if rest else math.nan, nan_ok=True)
    assert have["TP_ar"] == pytest.approx(1 - np.mean(active) if active else math.nan, nan_ok=True)


def test_sustained_transitions_against_a_loop():
    "Bouts, local lines by numpy's polyfit, and all stretches, one by one."
    x = simulate_activity(3, seed=4)
    x[1000:1100] = np.nan
    for key, state in (("kRA", False), ("kAR", True)):
        bouts, i = [], 0
        while i < len(x):
            j = i
            while j < len(x) and x[j] == x[j] and (x[j] >= 1) == state: j += 1
            if j > i and i > 0 and j < len(x) and x[i - 1] == x[i - 1] and x[j] == x[j]: bouts.append(j - i)
            i = max(j, i + 1)
        lengths = sorted(set(bouts))
        reached = [sum(b >= t for b in bouts) for t in lengths]
        p = [bouts.count(t) / n / (u - t) for t, n, u in zip(lengths, reached, [*lengths[1:], lengths[-1] + 1], strict=True)]
        smooth = []
        for t in lengths:
            h = sorted(abs(t - u) for u in lengths)[math.ceil(.3 * len(lengths)) - 1]
            w = [max(1 - (abs(t - u) / h) ** 3, 0) ** 1.5 for u in lengths] # polyfit squares them
            smooth.append(np.polyval(np.polyfit(lengths, p, 1, w=w), t))
        best = (-1, 0, 0)
        for a in range(len(p)):
            for b in range(a, len(p)):
                if max(smooth[a:b + 1]) - min(smooth[a:b + 1]) <= np.std(p) and lengths[b] - lengths[a] > best[0]: best = (lengths[b] - lengths[a], a, b)
        _, a, b = best
        weights = [math.sqrt(n) for n in reached[a:b + 1]]
        assert sustained_transitions(x, 1)[key] == pytest.approx(sum(w * v for w, v in zip(weights, p[a:b + 1], strict=True)) / sum(weights), rel=1e-6)


# --- sleep and wake

counts = st.lists(st.one_of(st.just(0.), st.integers(0, 120).map(float), st.integers(0, 40000).map(float), st.just(math.nan)), max_size=60)


@given(counts)
def test_scorers_against_a_loop(x):
    assert cole_kripke(x).tolist() == slow_sleep(x, (4, 2, slow_cole_kripke))
    assert sadeh(x).tolist() == slow_sleep(x, (5, 5, slow_sadeh))
    for epoch_length, w in OAKLEY.items():
        k = len(w) - 1
        def asleep(v, w=w, k=k): return sum(w[abs(i - k)] * c for i, c in enumerate(v)) <= 40.003 # which no sum of weighted counts hits
        assert oakley(x, epoch_length, 40.003).tolist() == slow_sleep(x, (k, k, asleep))


@given(st.lists(st.tuples(st.sampled_from([0, 0, 1, 1, -1]), st.integers(1, 24)), max_size=12))
def test_rescoring_against_a_loop(parts):
    s = [v for v, n in parts for _ in range(n)]
    assert rescore(np.array(s, int)).tolist() == slow_rescore(s)


@given(st.lists(st.sampled_from([0., 3., 4., 50., math.nan]), min_size=1, max_size=40))
def test_fragmentation_against_a_loop(x):
    bouts, n = [], 0
    for v in [*x, 99.]:
        if v < 4: n += 1
        elif n: bouts, n = [*bouts, n], 0
    known = [v >= 4 for v in x if v == v]
    want = 100 * sum(known) / len(known) + (100 * bouts.count(1) / len(bouts) if bouts else 0) if known else math.nan
    assert fragmentation_index(x, 60) == pytest.approx(want, nan_ok=True)


@given(st.integers(0, 2**32 - 1), st.sampled_from([600, 1800, 3600]))
def test_regularity_against_a_loop(seed, epoch_length):
    n = 86400 // epoch_length
    s = np.random.default_rng(seed).choice([0, 1, -1], 3 * n, p=[.5, .4, .1])
    same = [s[i] == s[i + n] for i in range(2 * n) if s[i] >= 0 and s[i + n] >= 0]
    if len(same) < n: return
    assert sleep_regularity(s, epoch_length) == pytest.approx({"SRI": -100 + 200 * sum(same) / len(same), "pair_days": len(same) / n})


def test_regularity_of_days_that_differ_by_an_hour_or_two():
    "Successive days differ in 10 % of their epochs: 80, the value that GGIR's own test expects of such days."
    def day(a, b): return [int(a <= k / 1000 < b) for k in range(1000)]
    assert sleep_regularity(np.array(day(.5, .8) + day(.5, .9)), 86.4)["SRI"] == pytest.approx(80)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from([0, 1, 1, -1]), st.integers(1, 30)), max_size=20))
def test_periods_against_a_loop(parts):
    s = np.array([v for v, n in parts for _ in range(n)], int)
    want, i = [], 0
    while True:
        first = next((k for k in range(i, len(s) - 4) if all(s[k:k + 5] == 1)), None)
        if first is None: break
        stop = next((k for k in range(first, len(s) - 9) if all(s[k:k + 10] == 0)), None)
        if stop is None: break
        if stop - first >= 20: want.append([first, stop])
        i = stop
    assert sleep_periods(s, MONDAY, shortest=20)[["first", "stop"]].to_numpy().tolist() == want


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e9) | st.sampled_from([0., 0., 1., math.nan]), min_size=24, max_size=120) | st.lists(st.floats(), max_size=9), st.sampled_from([.1, 10, 15, 60, 120, 1200, 3600, 86400]))
def test_garbage_only_raises_our_errors(x, epoch_length):
    for f in (cole_kripke, sadeh, oakley, fragmentation_index, lambda v, e: rest_activity(v, e, MONDAY), lambda v, e: cosinor(v, e, MONDAY), lambda v, e: extended_cosinor(v, e, MONDAY),
            lambda v, e: oakley(v, e, "automatic"), sum_epochs, lambda v, e: sustained_transitions(v, 1), lambda v, e: rhythm_features(v, e, MONDAY, 1)):
        with suppress(PFTSleepError): f(np.array(x), epoch_length)


def test_a_night_with_nothing_scored():
    with pytest.raises(ConfigError): night_statistics([-1, -1], 60, 500, 600)
    assert math.isnan(night_statistics([-1, -1], 60, 0, 120)["tst_min"])


# --- real files

@pytest.fixture(scope="module")
def actilife() -> pd.DataFrame:
    if not ACTIGRAPHY.exists(): pytest.skip("../shared/realdata is not here")
    return pd.read_csv(ACTIGRAPHY / "actigraph_sleepr/GT3XPlus-RawData-Day01-sleep-awake.csv")


def test_actilife_scores_are_reproduced_in_every_minute(actilife):
    "1500 minutes of a GT3X+, scored by ActiLife 6."
    x = actilife.axis1.to_numpy()
    assert ((cole_kripke(x) == 1) == (actilife["cole-kripke"] == "S")).sum() == 1500
    assert ((sadeh(x) == 1) == (actilife.sadeh == "S")).sum() == 1500
    assert ((sadeh(np.minimum(x, 300), version="published") == 1) == (actilife.sadeh == "S")).sum() == 1354 # the paper's threshold of 0


def test_actilife_scores_from_the_agd_file_itself(actilife):
    "10-s epochs of the database, summed here; its last minute is not complete, so that the windows that reach it differ."
    with sqlite3.connect(f"file:{ACTIGRAPHY / 'actigraph_sleepr/GT3XPlus-RawData-Day01.agd'}?mode=ro", uri=True) as db:
        x = sum_epochs([row[0] for row in db.execute("select axis1 from data order by dataTimestamp")], 10)
    assert len(x) == 1499 and (x == actilife.axis1[:1499]).all()
    assert ((cole_kripke(x) == 1) == (actilife["cole-kripke"][:1499] == "S"))[:-2].all()
    assert ((sadeh(x) == 1) == (actilife.sadeh[:1499] == "S"))[:-5].all()


ACTILIFE_PERIODS = [ # of the same file, Sadeh and Tudor-Locke: settings, movement needed, and what ActiLife 6 reports
    ((5, 10, 160), [("28 00:03", "28 07:38", 97.14, 455, 442, 13, 4, 3.25, 5.934, 40, 45.934)]),
    ((5, 5, 20), [("27 16:15", "27 16:46", 100, 31, 31, 0, 0, 0, 35.484, 0, 35.484), ("27 20:55", "27 21:26", 100, 31, 31, 0, 0, 0, 25.806, 0, 25.806),
        ("27 21:35", "27 22:09", 100, 34, 34, 0, 0, 0, 32.353, 0, 32.353), ("28 00:03", "28 07:25", 99.55, 442, 440, 2, 2, 1, 4.751, 0, 4.751),
        ("28 09:41", "28 10:21", 100, 40, 40, 0, 0, 0, 20, 0, 20), ("28 10:30", "28 10:53", 91.3, 23, 21, 2, 1, 2, 39.13, 0, 39.13)]),
    ((10, 12, 60), [("27 19:03", "27 22:09", 76.88, 186, 143, 43, 5, 8.6, 31.72, 0, 31.72), ("27 22:56", "28 07:38", 91.76, 522, 479, 43, 11, 3.91, 9.004, 25, 34.004),
        ("28 09:41", "28 10:53", 84.72, 72, 61, 11, 2, 5.5, 33.333, 0, 33.333)])]


@pytest.mark.parametrize(("rule", "want"), ACTILIFE_PERIODS)
def test_actilife_periods_are_reproduced(actilife, rule, want):
    x = actilife.axis1.to_numpy()
    scores = sadeh(x)
    found = sleep_periods(scores, datetime.fromisoformat(actilife.timestamp[0]).replace(tzinfo=None), *rule)
    have = [(f"{p.in_bed:%d %H:%M}", f"{p.out_bed:%d %H:%M}", *period_statistics(scores[p.first:p.stop], x[p.first:p.stop]).values()) for p in found.itertuples(name="P")]
    moving = [h for h, p in zip(have, found.itertuples(), strict=True) if (x[p.first:p.stop] > 0).sum() >= (5 if rule == (5, 5, 20) else 20 if rule == (10, 12, 60) else 0)]
    assert [m[:2] for m in moving] == [w[:2] for w in want]
    for m, w in zip(moving, want, strict=True): assert m[2:] == pytest.approx(w[2:], abs=.0051)


@needs_realdata
@pytest.mark.parametrize(("name", "gap"), [("condition_1", 0), ("control_1", 61)])
def test_depresjon(name, gap):
    "Two real people of several weeks: the gap of control_1 is NaN on a regular grid, and numbers are those of the loop."
    table = pd.read_csv(ACTIGRAPHY / f"depresjon/{name}.csv", parse_dates=["timestamp"])
    series = table.set_index("timestamp").activity
    series = series[~series.index.duplicated()].asfreq("min")
    assert series.isna().sum() == pytest.approx(gap, abs=1)
    x, start = series.to_numpy(float), series.index[0].to_pydatetime()
    stats, slow = rest_activity(x, 60, start), slow_rest_activity(x, 60, start)
    assert {k: stats[k] for k in slow if not k.endswith("onset_h")} == pytest.approx({k: v for k, v in slow.items() if not k.endswith("onset_h")}, rel=1e-9)
    worn = rest_activity(x[:15 * 1440], 60, start)
    assert .1 < worn["IS"] < .7 and .3 < worn["IV"] < 1.5 and .6 < worn["RA"] <= 1
    if gap: assert np.nanmean(x[19 * 1440:]) < 5 and stats["IS"] < worn["IS"] / 2 # lay in a drawer from the 19th day on, and nothing here can know
    c = extended_cosinor(x, 60, start)
    assert c["r2"] >= cosinor(x, 60, start)["r2"]


@needs_realdata
def test_actiwatch_file():
    lines = (ACTIGRAPHY / "pyActigraphy/example_01.AWD").read_text().split("\n")
    start = datetime.strptime(" ".join(lines[1:3]), "%d-%b-%Y %H:%M")
    x = np.array([float(v.split()[0].rstrip("M")) for v in lines[7:] if v.strip()])
    stats = rest_activity(x, 60, start)
    night = oakley(x, 60)
    assert .5 < stats["RA"] < 1 and (stats["L5_onset_h"] + 4) % 24 < 10
    assert sleep_regularity(night, 60)["SRI"] > 20 and len(sleep_periods(night, start)) >= 10
