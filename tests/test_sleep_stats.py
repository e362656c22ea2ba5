"Sleep statistics against hand-worked nights, a second-by-second oracle, and real hypnograms."
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

from pftsleep.data.recording import Hypnogram, crop_hypnogram
from pftsleep.errors import ConfigError
from pftsleep.evaluation.sleep_stats import STATISTICS, sleep_statistics, statistics_table

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
