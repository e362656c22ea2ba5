"Sleep and event statistics against hand-worked nights, naive oracles, and real scorings."
import json
import math
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pftsleep.data.alignment import align
from pftsleep.data.hypnograms import read_annotations
from pftsleep.data.recording import EVENT_COLUMNS, Hypnogram, Recording, array_channel, crop_hypnogram
from pftsleep.errors import ChannelError, ConfigError
from pftsleep.evaluation.sleep_stats import EVENT_STATISTICS, FAMILIES, STATISTICS, event_statistics, sleep_statistics, statistics_table

REALDATA = Path(__file__).parents[2] / "shared" / "realdata"
needs_realdata = pytest.mark.skipif(not REALDATA.exists(), reason="../shared/realdata is not here")
W, N1, N2, N3, REM, U = 0, 1, 2, 3, 4, -1
NAMES = {1: "n1", 2: "n2", 3: "n3", 4: "rem"}
stages = st.lists(st.sampled_from([W, W, N1, N2, N3, REM, U]), max_size=30)


def by_seconds(stages, epoch_length, off, on):
    "Every statistic from a list with one stage for each second between `off` and `on`; -1 where no epoch is."
    line = [stages[t // epoch_length] if 0 <= t < len(stages) * epoch_length else -1 for t in range(off, on)]
    minutes = lambda wanted, part: sum(s in wanted for s in part) / 60
    find = lambda wanted: next((i for i, s in enumerate(line) if s in wanted), None)
    sleep = {1, 2, 3, 4}
    onset, scored = find(sleep), [s for s in line if s != -1]
    out = dict.fromkeys((s.key for s in STATISTICS), math.nan)
    out |= {"lights_off_s": off, "lights_on_s": on, "tib_min": len(line) / 60, "unscored_min": minutes({-1}, line)}
    if scored:
        out |= {"tst_min": minutes(sleep, line), "wake_min": minutes({0}, line), "sleep_efficiency_percent": 100 * minutes(sleep, line) / (len(line) / 60)}
        out |= {f"{n}_min": minutes({s}, line) for s, n in NAMES.items()}
        out["stage_shifts"] = sum(a != b for a, b in pairwise(scored))
    if onset is not None:
        last = max(i for i, s in enumerate(line) if s in sleep)
        out |= {f"{n}_percent": 100 * minutes({s}, line) / minutes(sleep, line) for s, n in NAMES.items()}
        out |= {f"{n}_latency_min": math.nan if find({s}) is None else find({s}) / 60 for s, n in NAMES.items()}
        out["rem_latency_min"] -= onset / 60
        out |= {"sol_min": onset / 60, "unscored_before_sleep_min": minutes({-1}, line[:onset]), "waso_min": minutes({0}, line[onset:]),
            "spt_min": (last + 1 - onset) / 60, "waso_spt_min": minutes({0}, line[onset:last + 1]),
            "awakenings": sum(a != 0 and b == 0 for a, b in pairwise(scored))}
    return out


def check(got, expected):
    for key, value in expected.items():
        if not key.endswith("_source"): assert got[key] == pytest.approx(value, abs=1e-9, nan_ok=True), key


@settings(max_examples=300, deadline=None)
@given(stages, st.sampled_from([1, 4, 20, 30]), st.integers(-90, 300), st.integers(1, 900))
def test_every_statistic_is_what_a_clock_counts(stages, epoch_length, off, length):
    h = Hypnogram(stages, epoch_length)
    assume(off < h.duration and off + length > 0)
    check(sleep_statistics(h, off, off + length), by_seconds(stages, epoch_length, off, off + length))


@settings(max_examples=150, deadline=None)
@given(stages, st.sampled_from([4, 30]))
def test_default_is_the_first_and_last_scored_epoch(stages, epoch_length):
    scored = [i for i, s in enumerate(stages) if s != U]
    assume(scored)
    got = sleep_statistics(Hypnogram(stages, epoch_length))
    assert (got["lights_off_source"], got["lights_on_source"]) == ("first scored epoch", "last scored epoch")
    check(got, by_seconds(stages, epoch_length, scored[0] * epoch_length, (scored[-1] + 1) * epoch_length))


@settings(max_examples=150, deadline=None)
@given(stages, st.floats(.1, 60), st.floats(-100, 1000), st.floats(.01, 2000))
def test_invariants_at_any_cut(stages, epoch_length, off, length):
    h = Hypnogram(stages, epoch_length)
    assume(off < h.duration and off + length > 0)
    s = sleep_statistics(h, off, off + length)
    assert set(s) == {d.key for d in STATISTICS}
    assert s["tib_min"] == pytest.approx(length / 60)
    zero = lambda key: 0 if math.isnan(s[key]) else s[key]
    assert zero("tst_min") + zero("wake_min") + s["unscored_min"] == pytest.approx(s["tib_min"], abs=1e-6)
    if not math.isnan(s["tst_min"]): assert sum(s[f"{n}_min"] for n in NAMES.values()) == pytest.approx(s["tst_min"])
    if zero("tst_min"):
        assert sum(s[f"{n}_percent"] for n in NAMES.values()) == pytest.approx(100)
        assert s["waso_spt_min"] <= s["waso_min"] + 1e-9
        if s["rem_latency_min"] != 0: assert s["sol_min"] == min(v for n in ("n1", "n2", "n3") if not math.isnan(v := s[f"{n}_latency_min"]))
        assert s["sol_min"] + s["spt_min"] <= s["tib_min"] + 1e-6
        assert s["awakenings"] <= s["stage_shifts"]


@settings(max_examples=60, deadline=None)
@given(stages.filter(lambda s: any(e != U for e in s)), st.integers(0, 5), st.integers(0, 5))
def test_unscored_ends_change_nothing_but_the_clock(stages, before, after):
    plain, padded = sleep_statistics(Hypnogram(stages, 30)), sleep_statistics(Hypnogram([U] * before + stages + [U] * after, 30))
    for key in plain.keys() - {"lights_off_s", "lights_on_s"}: assert padded[key] == pytest.approx(plain[key], nan_ok=True), key
    assert padded["lights_off_s"] == plain["lights_off_s"] + before * 30


@settings(max_examples=60, deadline=None)
@given(stages.filter(lambda s: any(e != U for e in s)), st.integers(0, 10), st.integers(1, 20))
def test_lights_cut_like_cropping(stages, first, n):
    h, stop = Hypnogram(stages, 20), min(first + n, len(stages))
    assume(first < stop)
    cut, cropped = sleep_statistics(h, first * 20, stop * 20), sleep_statistics(crop_hypnogram(h, first, stop), 0, (stop - first) * 20)
    for key in cut.keys() - {"lights_off_s", "lights_on_s"}: assert cropped[key] == pytest.approx(cut[key], nan_ok=True), key


def test_a_whole_night_by_hand():
    # 23:00 in bed; 20 min awake, 5 N1, 60 N2, 30 N3, 2 unscored, 20 REM, 10 awake, 100 N2, 15 REM, 8 awake until lights on
    plan = [(W, 20), (N1, 5), (N2, 60), (N3, 30), (U, 2), (REM, 20), (W, 10), (N2, 100), (REM, 15), (W, 8)]
    h = Hypnogram(np.repeat([s for s, _ in plan], [2 * m for _, m in plan]), 30, start=datetime(2024, 3, 1, 23))
    s = sleep_statistics(h)
    expected = {"tib_min": 270, "tst_min": 230, "wake_min": 38, "unscored_min": 2, "sleep_efficiency_percent": 100 * 230 / 270, "sol_min": 20,
        "unscored_before_sleep_min": 0, "n1_latency_min": 20, "n2_latency_min": 25, "n3_latency_min": 85, "rem_latency_min": 97, "waso_min": 18,
        "spt_min": 242, "waso_spt_min": 10, "awakenings": 2, "stage_shifts": 8, "n1_min": 5, "n2_min": 160, "n3_min": 30, "rem_min": 35,
        "n1_percent": 100 * 5 / 230, "n2_percent": 100 * 160 / 230, "n3_percent": 100 * 30 / 230, "rem_percent": 100 * 35 / 230}
    check(s, expected)
    assert all(type(v) in (float, int, str) for v in s.values()) # plain values, ready for JSON
    json.dumps(s)


def test_lights_by_clock_by_file_and_by_argument():
    h = Hypnogram([W, N2, N2, W], 30, start=datetime(2024, 3, 1, 23, 59), lights_off=15., lights_on=120.)
    s = sleep_statistics(h)
    assert (s["lights_off_source"], s["lights_on_source"], s["sol_min"]) == ("file", "file", .25)
    s = sleep_statistics(h, lights_on=datetime(2024, 3, 2, 0, 0, 30)) # across midnight
    assert (s["lights_off_source"], s["lights_on_source"], s["lights_on_s"], s["wake_min"]) == ("file", "argument", 90, .25)
    assert sleep_statistics(h, pd.Timestamp(h.start), np.float32(60))["tib_min"] == 1
    assert sleep_statistics(replace(h, lights_on=None))["lights_on_source"] == "last scored epoch"


def test_lights_of_the_file_outside_the_hypnogram_are_unscored_time():
    s = sleep_statistics(Hypnogram([N2, N2], 30, lights_off=3600., lights_on=7200.)) # the file was cut before its night began
    assert (s["tib_min"], s["unscored_min"]) == (60, 60)
    assert math.isnan(s["tst_min"]) and math.isnan(s["sleep_efficiency_percent"])


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"lights_off": 60, "lights_on": 60}, "not after"),
    ({"lights_off": 600, "lights_on": 700}, "miss the hypnogram"),
    ({"lights_off": -700, "lights_on": -600}, "miss the hypnogram"),
    ({"lights_off": math.nan}, "nan"),
    ({"lights_off": math.inf}, "inf"),
    ({"lights_off": "23:00"}, "23:00"),
    ({"lights_off": pd.NaT}, "nan|NaT"),
    ({"lights_off": datetime(2024, 3, 1).astimezone()}, "time zone"),
    ({"lights_off": datetime(2024, 2, 1), "lights_on": datetime(2024, 2, 1, 6)}, "miss the hypnogram"),
])
def test_lights_that_cannot_be(kwargs, message):
    with pytest.raises(ConfigError, match=message) as caught: sleep_statistics(Hypnogram([W, N2, N2, W], 30, start=datetime(2024, 3, 1, 23)), **kwargs)
    assert caught.value.remedy


def test_clock_lights_need_a_clock():
    with pytest.raises(ConfigError, match="has none"): sleep_statistics(Hypnogram([W], 30), datetime(2024, 3, 1))


@pytest.mark.parametrize("stages", [[], [U], [U] * 5])
def test_nothing_scored(stages):
    s = sleep_statistics(Hypnogram(stages, 30))
    assert {k for k, v in s.items() if not isinstance(v, str) and not math.isnan(v)} == {"unscored_min"}
    assert s["unscored_min"] == len(stages) / 2
    assert (statistics_table(s).value == "n/a").sum() == len(STATISTICS) - 3


def test_a_night_awake_and_a_night_of_sleep_alone():
    awake, asleep = sleep_statistics(Hypnogram([W] * 4, 30)), sleep_statistics(Hypnogram([N2] * 4, 30))
    assert (awake["tst_min"], awake["sleep_efficiency_percent"], awake["stage_shifts"]) == (0, 0, 0)
    assert all(math.isnan(awake[k]) for k in ("sol_min", "waso_min", "spt_min", "n2_percent", "awakenings", "rem_latency_min"))
    assert (asleep["sol_min"], asleep["waso_min"], asleep["awakenings"], asleep["sleep_efficiency_percent"], asleep["n2_percent"]) == (0, 0, 0, 100, 100)


def test_gaps_hide_no_awakening():
    assert sleep_statistics(Hypnogram([N2, U, W, N2], 30))["awakenings"] == 1 # one took place in the gap or at its end
    assert sleep_statistics(Hypnogram([N2, U, N2], 30))["stage_shifts"] == 0 # none is proved


def test_a_shift_of_one_epoch_is_seen():
    stages = [W] * 10 + [N1] * 3 + [N2] * 20 + [REM] * 5 + [W] * 4
    a, b = sleep_statistics(Hypnogram(stages, 30), 0, 1260), sleep_statistics(Hypnogram([W, *stages[:-1]], 30), 0, 1260)
    assert b["sol_min"] - a["sol_min"] == .5
    assert a["waso_min"] - b["waso_min"] == .5


def test_clock_and_seconds_agree():
    h = Hypnogram([W, N1, N2, REM, W] * 9, 30, start=datetime(2024, 3, 1, 23, 59, 59, 500000))
    off, on = 12.25, 777.125
    assert sleep_statistics(h, h.start + timedelta(seconds=off), h.start + timedelta(seconds=on)) == sleep_statistics(h, off, on)


@needs_realdata
def test_real_night_of_yasa():
    path = REALDATA / "hypnograms/other/yasa_data_full_6hrs_100Hz_hypno_30s.txt"
    words = [line for line in path.read_text().split("\n") if line and not line.startswith("#")]
    night = [int(w) for w in words]
    assert len(night) == 720
    got = sleep_statistics(Hypnogram(night, 30))
    assert got["tib_min"] == 360
    check(got, by_seconds(night, 30, 0, 21600))
    half = lambda word: words.count(word) / 2 # two epochs a minute, counted in the text itself
    assert [got[k] for k in ("wake_min", "n1_min", "n2_min", "n3_min", "rem_min")] == [half(w) for w in "01234"]
    assert got["sol_min"] == min(words.index(w) for w in "1234") / 2
    assert got["rem_latency_min"] == words.index("4") / 2 - got["sol_min"]


@needs_realdata
def test_real_nights_of_five_scorers():
    paths = sorted((REALDATA / "hypnograms/dreem_dodh").rglob("*.json"))
    assert len(paths) == 15
    for path in paths:
        night = json.loads(path.read_text())
        scored = [i for i, s in enumerate(night) if s != U]
        check(sleep_statistics(Hypnogram(night, 30)), by_seconds(night, 30, scored[0] * 30, (scored[-1] + 1) * 30))


# --- events ---------------------------------------------------------------------------------------------------------

KINDS = {"respiratory": ["apnea", "apnea_obstructive", "apnea_central", "apnea_mixed", "hypopnea", "hypopnea_central"], "rera": ["rera"], "desaturation": ["desaturation"],
    "arousal": ["arousal", "arousal_limb"], "limb": ["limb_movement", "periodic_limb_movement"]}
ENDINGS = {"": {1, 2, 3, 4}, "_nrem": {1, 2, 3}, "_rem": {4}, "_n1": {1}, "_n2": {2}, "_n3": {3}}


def stage_of(t, h, off, on):
    "The stage at a time, epoch by epoch."
    t -= h.onset
    for k, s in enumerate(h.stages.tolist()):
        if k * h.epoch_length <= t < (k + 1) * h.epoch_length: return s if off <= t < on else -1
    return -1


def naive(events, h, depths, scored):
    "Event statistics by loops over rows (onset, duration, type)."
    known = [k for k, s in enumerate(h.stages.tolist()) if s != -1]
    off = h.lights_off if h.lights_off is not None else known[0] * h.epoch_length if known else 0
    on = h.lights_on if h.lights_on is not None else (known[-1] + 1) * h.epoch_length if known else h.duration
    stage = lambda e: stage_of(e[0], h, off, on)
    hours = {k: sum(max(0, min((i + 1) * h.epoch_length, on) - max(i * h.epoch_length, off)) for i, s in enumerate(h.stages.tolist()) if s in wanted) / 3600 for k, wanted in ENDINGS.items()}
    by = {f: [e for e in events if e[2] in kinds] for f, kinds in KINDS.items()}
    told = {f for f in KINDS if by[f] or f in scored}
    rate = lambda some, k="": sum(stage(e) in ENDINGS[k] for e in some) / hours[k] if hours[k] > 0 else math.nan
    out = {}
    for name, f in (("ahi", "respiratory"), ("odi", "desaturation"), ("arousal_index", "arousal")):
        for k in ENDINGS: out[f"{name}{k}_per_h"] = rate(by[f], k) if f in told else math.nan
    out["apnea_index_per_h"] = rate([e for e in by["respiratory"] if e[2].startswith("apnea")]) if "respiratory" in told else math.nan
    out["rdi_per_h"] = rate(by["respiratory"] + by["rera"]) if {"respiratory", "rera"} <= told else math.nan
    deep = lambda least: [e for e in by["desaturation"] if not depths or e[3] >= least]
    after = lambda e, others, s: any(e[0] <= o[0] <= e[0] + (0 if math.isnan(e[1]) else e[1]) + s for o in others)
    kept = [e for e in by["respiratory"] if e[2].startswith("apnea") or after(e, deep(3), 30) or after(e, by["arousal"], 5)]
    out["ahi_1a_per_h"] = rate(kept) if {"respiratory", "desaturation", "arousal"} <= told else math.nan
    kept = [e for e in by["respiratory"] if e[2].startswith("apnea") or after(e, deep(4), 30)]
    out["ahi_1b_per_h"] = rate(kept) if {"respiratory", "desaturation"} <= told and (depths or not by["desaturation"]) else math.nan
    for f in KINDS: out |= {f"{f}_in_wake": sum(stage(e) == 0 for e in by[f]), f"{f}_unscored": sum(stage(e) == -1 for e in by[f])}
    asleep = [e[2] for e in events if stage(e) > 0]
    out |= {"obstructive_apneas": asleep.count("apnea_obstructive"), "central_apneas": asleep.count("apnea_central"), "mixed_apneas": asleep.count("apnea_mixed"),
        "unspecified_apneas": asleep.count("apnea"), "hypopneas": asleep.count("hypopnea") + asleep.count("hypopnea_central"), "reras": asleep.count("rera"),
        "desaturations": asleep.count("desaturation"), "arousals": asleep.count("arousal") + asleep.count("arousal_limb"), "limb_movements": sum(t in KINDS["limb"] for t in asleep)}
    plms = naive_plms(by, stage)
    out["plms"] = math.nan if plms is None else len(plms)
    for k in ENDINGS: out[f"plm_index{k}_per_h"] = rate(plms, k) if plms is not None and "limb" in told else math.nan
    return out


def naive_plms(by, stage):
    moves = sorted((e for e in by["limb"] if stage(e) > 0), key=lambda e: e[0])
    scored = any(e[2] == "periodic_limb_movement" for e in by["limb"])
    if scored: moves = [e for e in moves if e[2] == "periodic_limb_movement"]
    elif by["limb"] and not any(.5 <= e[1] <= 10 for e in by["limb"]): return None
    else:
        breaths = [(b[0] - .5, b[0] + (0 if math.isnan(b[1]) else b[1]) + .5) for b in by["respiratory"] + by["rera"]]
        moves = [e for e in moves if .5 <= e[1] <= 10 and not any(a <= e[0] + e[1] and e[0] <= z for a, z in breaths)]
    kept = []
    for e in moves:
        if not kept or e[0] - kept[-1][0] >= 5: kept.append(e)
    if scored: return kept
    rows = []
    for e in kept:
        if rows and e[0] - rows[-1][-1][0] <= 90: rows[-1].append(e)
        else: rows.append([e])
    return [e for row in rows if len(row) >= 4 for e in row]


TYPES = [t for kinds in KINDS.values() for t in kinds] + ["snore"]
HALVES = lambda low, high: st.integers(2 * low, 2 * high).map(lambda x: x / 2)
ONE = st.tuples(HALVES(-40, 1000), HALVES(0, 40) | st.just(math.nan), st.sampled_from(TYPES), st.sampled_from([2., 3., 4., 9., math.nan]))
KICKS = st.tuples(st.integers(0, 600), st.sampled_from([4, 5, 30, 90, 91]), st.integers(1, 9), st.sampled_from([.5, 2., 10., 10.5])).map(
    lambda x: [(float(x[0] + k * x[1]), x[3], "limb_movement", math.nan) for k in range(x[2])])
NIGHT = st.lists(st.sampled_from([W, N1, N2, N2, N3, REM, U]), min_size=1, max_size=35)


@settings(max_examples=200, deadline=None)
@given(NIGHT, st.sampled_from([30, 20]), st.sampled_from([0., 10.5, 100.]), st.lists(ONE, max_size=25), st.lists(KICKS, max_size=3), st.booleans(), st.sets(st.sampled_from([*FAMILIES])),
    st.sampled_from([(None, None), (45., None), (45., 400.), (-60., 2000.)]))
def test_event_statistics_are_what_loops_count(night, length, onset, events, kicks, depths, scored, lights):
    h = Hypnogram(night, length, onset=onset, lights_off=lights[0], lights_on=lights[1])
    known = [k for k, s in enumerate(night) if s != U]
    assume(lights[0] is None or lights[1] is not None or not known or (known[-1] + 1) * length > lights[0])
    assume(lights[0] is None or lights[1] is not None or known or h.duration > lights[0])
    events = events + [e for row in kicks for e in row]
    depths = depths and any(e[2] == "desaturation" and not math.isnan(e[3]) for e in events)
    table = pd.DataFrame(events, columns=["onset", "duration", "type", "depth"]).assign(channel="")
    got = event_statistics(table if depths else table.drop(columns="depth"), h, scored=scored)
    assert set(got) == {s.key for s in EVENT_STATISTICS}
    for key, value in naive(events, h, depths, scored).items(): assert got[key] == pytest.approx(value, nan_ok=True), key
    if sleep_statistics(h)["tst_min"] > 0: # else every index is NaN
        for rule in ("ahi", "ahi_1a", "ahi_1b", "plm"):
            assert got[f"{rule}_rule"].startswith("can't be told") == math.isnan(got["plm_index_per_h" if rule == "plm" else f"{rule}_per_h"])
    json.dumps(got)
    assert len(statistics_table(got)) == len(EVENT_STATISTICS)


@settings(max_examples=100, deadline=None)
@given(NIGHT, st.lists(st.sampled_from([95., 90., 89.5, 70., 50., 49., 100., 101., 0., math.nan]), min_size=1, max_size=60), st.sampled_from([1., .2, 4.]), st.sampled_from([0., 7.]),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)), max_size=2))
def test_t90_is_what_loops_count(night, values, fs, onset, artefacts):
    h = Hypnogram(night, 20, onset=onset)
    known = [k for k, s in enumerate(night) if s != U]
    off, on = (known[0] * 20, (known[-1] + 1) * 20) if known else (0, h.duration)
    table = pd.DataFrame([(float(a), float(d), "SpO2 artifact", "SaO2") for a, d in artefacts], columns=EVENT_COLUMNS)
    got = event_statistics(table, h, array_channel("SpO2", values, fs, "%", "SPO2"))
    valid = [(i / fs, v) for i, v in enumerate(values) if 50 <= v <= 100 and not any(a <= i / fs < a + d for a, d in artefacts)]
    asleep = [(t, v) for t, v in valid if stage_of(t, h, off, on) > 0]
    for key, part in (("t90", valid), ("t90_sleep", asleep)):
        low = sum(v < 90 for _, v in part)
        assert got[f"{key}_min"] == pytest.approx(low / fs / 60 if part else math.nan, nan_ok=True)
        assert got[f"{key}_percent"] == pytest.approx(100 * low / len(part) if part else math.nan, nan_ok=True)
    assert got["spo2_artefact_percent"] == pytest.approx(100 - 100 * len(valid) / len(values))
    assert got["spo2_min_sleep_percent"] == pytest.approx(min((v for _, v in asleep), default=math.nan), nan_ok=True)
    assert got["spo2_mean_sleep_percent"] == pytest.approx(sum(v for _, v in asleep) / len(asleep) if asleep else math.nan, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(NIGHT, st.integers(0, 50), st.lists(ONE.filter(lambda e: 0 <= e[0] < 300), max_size=20))
def test_aligning_changes_nothing(night, late, events):
    assume(any(s != U for s in night))
    h = Hypnogram(night, 30, onset=float(late))
    table = pd.DataFrame([(t + late, d, name, "") for t, d, name, _ in events], columns=EVENT_COLUMNS)
    r = Recording("r", {"x": array_channel("x", np.zeros(late + len(night) * 30), 1., "uV")}, events=table)
    cropped, aligned, _ = align(r, h)
    assert aligned.onset == 0
    inside = [e for e in events if 0 <= e[0] < h.duration]
    assert str(event_statistics(cropped.events[cropped.events["onset"] < h.duration], aligned)) == str(event_statistics(pd.DataFrame([(t + late, d, n, "") for t, d, n, _ in inside], columns=EVENT_COLUMNS), h))


def test_hours_are_those_of_the_sleep_statistics():
    h = Hypnogram([W, N1, N2, N3, REM, U] * 20, 30, lights_off=95., lights_on=2000.)
    e = event_statistics(pd.DataFrame([(320., 10., "Hypopnea", "")] * 7, columns=EVENT_COLUMNS), h)
    assert e["ahi_per_h"] == pytest.approx(7 / (sleep_statistics(h)["tst_min"] / 60))


@pytest.mark.parametrize("stages", [[], [U, U], [W, W]])
def test_without_sleep_every_index_is_undefined(stages):
    e = event_statistics(pd.DataFrame([(10., 10., "Hypopnea", "")], columns=EVENT_COLUMNS), Hypnogram(stages, 30), array_channel("SpO2", [95.], 1., "%"), scored=FAMILIES)
    assert all(math.isnan(v) for k, v in e.items() if k.endswith("_per_h")) and e["t90_percent"] == 0
    assert e["respiratory_in_wake"] + e["respiratory_unscored"] == 1


def test_events_refused():
    h, fine = Hypnogram([N2], 30), pd.DataFrame([(1., 1., "Hypopnea", "")], columns=EVENT_COLUMNS)
    with pytest.raises(ConfigError, match="respiratory"): event_statistics(fine, h, scored=["ahi"])
    with pytest.raises(ConfigError, match="onset"): event_statistics(fine.drop(columns="onset"), h)
    with pytest.raises(ConfigError, match="no time"): event_statistics(fine.assign(onset=math.inf), h)
    with pytest.raises(ConfigError, match="lights on"): event_statistics(fine, replace(h, lights_off=20., lights_on=10.))
    with pytest.raises(ChannelError, match="unit='%'"): event_statistics(fine, h, array_channel("SpO2", [.9], 1., ""))


@needs_realdata
def test_real_night_of_learn_nsrr01():
    s = read_annotations(REALDATA / "annotations_xml/learn-nsrr01.xml")
    e = event_statistics(s.events, s.hypnogram)
    rows = [(float(o), float(d), n) for o, d, n, _ in s.events[EVENT_COLUMNS].itertuples(index=False)]
    stages = s.hypnogram.stages.tolist()
    asleep = lambda *names: sum(n in names and stages[int(o // 30)] > 0 for o, _, n in rows if o < len(stages) * 30)
    hours = sum(x > 0 for x in stages) / 120
    assert e["ahi_per_h"] == pytest.approx(asleep("Hypopnea", "Obstructive Apnea") / hours)
    assert (e["odi_per_h"], e["arousal_index_per_h"]) == pytest.approx((asleep("SpO2 desaturation") / hours, asleep("Arousal ()") / hours))
    assert (round(e["ahi_per_h"], 1), round(e["ahi_1a_per_h"], 1), round(e["odi_per_h"], 1), round(e["arousal_index_per_h"], 1)) == (51, 36.1, 29.8, 20.8)
    assert (e["respiratory_in_wake"], e["obstructive_apneas"], e["hypopneas"]) == (21, 37, 340)
    assert math.isnan(e["ahi_1b_per_h"]) and math.isnan(e["plm_index_per_h"]) and "depth" in e["ahi_1b_rule"]


@needs_realdata
@pytest.mark.parametrize(("name", "expected"), [
    ("annotations_xml/compumedics_20017.edf.XML", {"ahi_per_h": 14.7, "arousal_index_per_h": 10.0, "plm_index_per_h": 7.9, "plms": 53, "respiratory_in_wake": 5}), # mild, some leg movements
    ("annotations_xml/100657_MIMI.xml", {"ahi_per_h": 3.9, "odi_per_h": 3.6, "arousal_index_per_h": 8.9, "respiratory_in_wake": 5}), # healthy
    ("cinc2018/tr03-0005.arousal", {"ahi_per_h": 9.0, "rdi_per_h": 15.6, "reras": 26, "respiratory_in_wake": 7}),
    ("cinc2018/tr03-0029.arousal", {"ahi_per_h": 39.1, "rdi_per_h": 50.8, "reras": 44, "respiratory_in_wake": 6}),
    ("hypnograms/slpdb/slp01a.an", {"ahi_per_h": 19.1, "hypopneas": 37, "respiratory_in_wake": 1})])
def test_real_nights(name, expected):
    s = read_annotations(REALDATA / name)
    e = event_statistics(s.events, s.hypnogram)
    assert {k: round(e[k], 1) for k in expected} == expected
    total = sum(v for k, v in e.items() if k in ("obstructive_apneas", "central_apneas", "mixed_apneas", "hypopneas"))
    assert e["ahi_per_h"] == pytest.approx(total / (sleep_statistics(s.hypnogram)["tst_min"] / 60))
    assert total + e["respiratory_in_wake"] + e["respiratory_unscored"] == sum("pnea" in str(n) or n in ("H", "HA") for n in s.events["name"])
