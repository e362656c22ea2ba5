"Quality of recordings and `pftsleep inspect`: true figures on planted defects and real files, bounded memory, pages."
import html.parser
import json
import math
import tracemalloc
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pftsleep.apps.files import find_files, inspect
from pftsleep.data.edf import read_edf, write_edf
from pftsleep.data.quality import annotation_summary, channel_quality, envelope, implausible, inspection, quality_table, spectrum, worst_finding
from pftsleep.data.recording import Channel, Hypnogram, Kind, Recording, array_channel, crop_channel
from pftsleep.errors import PFTSleepError, ReadError
from pftsleep.evaluation.inspection import inspection_report

REAL = Path(__file__).parents[2] / "shared/realdata"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="../shared/realdata isn't here")
START = datetime(2024, 3, 1, 22, 47)
rng = np.random.default_rng(0)


def eeg(seconds=300, fs=200, scale=20): return rng.normal(0, scale, seconds * fs)
def quality(x, fs=200, unit="uV", kind="EEG", **kw): return channel_quality(array_channel("C3", x, fs, unit, kind, **kw))
def night(seconds=300): return Recording("night", {"C4-M1": array_channel("C4-M1", eeg(seconds, 100), 100, "uV", "EEG"), "SpO2": array_channel("SpO2", np.full(seconds, 96.), 1, "%", "SPO2")}, START)


class Page(html.parser.HTMLParser):
    "Raises where tags aren't balanced; remembers addresses and alternative texts."
    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.alts, self.tags = [], [], [], set()
        self.feed(text)
        assert not self.open, self.open
    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href")]
        if tag == "img": self.alts.append(dict(attrs).get("alt"))
        if tag not in ("meta", "img", "br", "link"): self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag


# --- one channel

@pytest.mark.parametrize("share", [0, .1, .5, 1])
def test_flat_share(share):
    x = eeg(600)
    x[:int(share * len(x))] = 1.
    if share == 1: x[-1] = 40 # one sample, so that it isn't constant
    assert quality(x)["flat"] == pytest.approx(share, abs=.051)


def test_flat_means_under_three_steps_of_the_source():
    x = np.round(rng.normal(0, .4, 60_000)) # mostly -1, 0, 1
    assert quality(np.clip(x, -1, 1), resolution=1.)["flat"] == 1 and quality(x * 30, resolution=1.)["flat"] == 0


@pytest.mark.parametrize("level", [1., 1.5, 2.])
def test_clipped_share_is_that_of_the_normal_distribution(level):
    x = np.convolve(rng.normal(0, 1, 200_000), np.ones(20) / np.sqrt(20), "same") # slow enough for runs
    q = quality(np.clip(x, -level, level) * 20)
    true = np.mean(np.abs(x) >= level)
    assert .75 * true < q["clipped"] <= true * 1.001 and "clipped" in q["findings"][0]


def test_a_wave_that_only_touches_its_maximum_is_not_clipped(): assert quality(eeg())["clipped"] == 0


def test_saturation_and_position_are_neither_flat_nor_clipped():
    q = quality(np.repeat([96., 97.], 300), 1, "%", "SPO2")
    assert math.isnan(q["flat"]) and math.isnan(q["clipped"]) and q["findings"] == []


def test_missing_share_and_percentiles():
    x = eeg(100)
    x[::4] = np.nan
    q = quality(x)
    assert q["missing"] == .25 and q["min"] == np.float32(np.nanmin(x)) and q["max"] == np.float32(np.nanmax(x))
    assert [q[k] for k in ("p1", "median", "p99")] == pytest.approx(np.nanpercentile(x.astype("float32"), [1, 50, 99]), rel=1e-4, abs=1e-4)


def test_percentiles_of_a_long_channel_are_close():
    x = rng.normal(0, 20, 2_000_000)
    assert [quality(x)[k] for k in ("p1", "median", "p99")] == pytest.approx(np.percentile(x, [1, 50, 99]), abs=.5)


@pytest.mark.parametrize("line,fs,answer", [(50, 200, (True, False)), (60, 200, (False, True)), (50, 125, (True, False)), (50, 100, (None, None)), (50, 110, (True, None))])
def test_line_noise(line, fs, answer):
    x = eeg(120, fs) + 20 * np.sin(2 * np.pi * line * np.arange(120 * fs) / fs) * (line < fs / 2)
    q = quality(x, fs)
    for key, a in zip(("line_50", "line_60"), answer, strict=True): assert math.isnan(q[key]) if a is None else (q[key] > 10) == a


@given(fs=st.floats(1e-3, 5000), n=st.integers(0, 3000), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_any_rate_and_length(fs, n, seed):
    r = np.random.default_rng(seed)
    x = r.normal(0, 10. ** r.integers(-9, 9), n)
    x[r.random(n) < r.choice([0, .5, 1])] = np.nan
    c = array_channel("x", x, fs, "uV", r.choice([k.value for k in Kind]))
    q = channel_quality(c)
    assert all(0 <= q[k] <= 1 for k in ("flat", "clipped", "missing") if not math.isnan(q[k]))
    json.dumps(inspection(Recording("r", {"x": c})), allow_nan=False)
    assert len(envelope(c)[0]) == min(800, n)


@pytest.mark.parametrize("factor,word", [(1, None), (1e3, "nV"), (1e-3, "mV"), (1e-6, "V"), (15, None)])
def test_units_that_cannot_be_right_are_named_and_not_changed(factor, word):
    x = eeg() * factor
    q = quality(x)
    assert q["p99"] == pytest.approx(np.percentile(x, 99), rel=.02)
    assert (q["findings"] == []) if word is None else q["findings"][0].endswith(f"are these {word}?")


def test_levels(): assert implausible(Kind.SPO2, "%", .9, .95, 1).endswith("fraction?") and implausible(Kind.HR, "bpm", 50, 60, 90) == "" and implausible(Kind.TEMP, "degC", 90, 97, 99)


def test_polarity_is_noticed_through_crops(tmp_path):
    write_edf(night(), tmp_path / "a.edf")
    data = bytearray((tmp_path / "a.edf").read_bytes())
    at = 256 + 3 * (16 + 80 + 8) # two signals and the annotations; then 8 bytes of physical minimum for each
    low, high = bytes(data[at:at + 8]), bytes(data[at + 24:at + 32])
    data[at:at + 8], data[at + 24:at + 32] = high, low
    (tmp_path / "a.edf").write_bytes(bytes(data))
    c = read_edf(tmp_path / "a.edf")["C4-M1"]
    assert channel_quality(c)["reversed"] and channel_quality(crop_channel(c, 100, 9000))["reversed"]
    assert "upside down" in channel_quality(c)["findings"][-1] and not channel_quality(night()["C4-M1"])["reversed"]


def test_twelve_hours_need_no_more_memory_than_one():
    n = 12 * 3600 * 512
    c = Channel("C3", Kind.EEG, 512., "uV", n, lambda a, b: np.random.default_rng(a).normal(0, 20, b - a).astype("float32"))
    tracemalloc.start()
    q = channel_quality(c)
    envelope(c)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6 and q["findings"] == []


# --- a recording

def test_table_and_summary():
    table = quality_table(night())
    assert list(table["name"]) == ["C4-M1", "SpO2"] and worst_finding(table) == "SpO2: never changes: always 96"
    events = pd.DataFrame([(0., 1., "Hypopnea", ""), (1., 1., "Mr Miller coughs", "")], columns=["onset", "duration", "name", "channel"])
    s = annotation_summary(Recording("r", {}, events=events), Hypnogram([0, 1, -1, -1], 30))
    assert s == dict(annotations={"Hypopnea": 1}, other_annotations=1, hypnogram=dict(epochs=4, epoch_length=30, unscored=.5, stages=dict(W=1, N1=1, UNSCORED=2), start=None))


def test_the_page_is_balanced_offline_and_described():
    h = Hypnogram([0, 1, 2, 3, 4] * 2, 30, start=START)
    evil = "\"'><script>alert(1)</script>$x$<img src=http://x/>"
    r = night()
    for rec in (r, Recording(evil, {evil: array_channel(evil, eeg(), 100, evil, "EEG")}, START), Recording("e", {})):
        for stages in (None, h):
            page = Page(inspection_report(rec, hypnogram=stages).html())
            assert "script" not in page.tags and all(page.alts) and all(a.startswith("data:image/png;base64,") for a in page.addresses)
    assert len(Page(inspection_report(r, hypnogram=h).html()).alts) == 3


# --- the command

def test_a_file(tmp_path, capsys):
    write_edf(night(), tmp_path / "n.edf")
    assert inspect(str(tmp_path / "n.edf")) == 0
    said = capsys.readouterr().out
    assert "C4-M1" in said and "never changes" in said and "2 channels" in said
    assert inspect(str(tmp_path / "n.edf"), format="json") == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["file"] == "n.edf" and [c["name"] for c in row["channels"]] == ["C4-M1", "SpO2"] and row["channels"][0]["line_50"] is None


def test_stages_beside_are_read_and_not_listed(tmp_path, capsys):
    write_edf(night(), tmp_path / "n.edf")
    write_edf(Recording("h", {}, hypnogram=Hypnogram([0, 1, 2], 30, start=START)), tmp_path / "n-Hypnogram.edf")
    write_edf(Recording("h", {}, hypnogram=Hypnogram([0, 1, 2], 30, start=START)), tmp_path / "alone-Hypnogram.edf")
    assert [p.name for p in find_files(tmp_path)] == ["alone-Hypnogram.edf", "n.edf"]
    assert [p and p.name for p in find_files(tmp_path).values()] == [None, "n-Hypnogram.edf"] and find_files(tmp_path / "n.edf") == {tmp_path / "n.edf": tmp_path / "n-Hypnogram.edf"}
    assert inspect(str(tmp_path), str(tmp_path / "out"), "json") == 0
    rows = json.loads((tmp_path / "out/summary.json").read_text())
    assert [r["hypnogram"]["epochs"] for r in rows] == [3, 3]
    (tmp_path / "n-Hypnogram.edf").write_bytes(b"0".ljust(8) + bytes(9))
    assert inspect(str(tmp_path / "n.edf")) == 0 and "stages: " in capsys.readouterr().out # the recording is still shown
    (tmp_path / "given.csv").write_text("stage\nW\nN1\n")
    assert inspect(str(tmp_path / "n.edf"), hypnogram=str(tmp_path / "given.csv")) == 0 and "'epochs': 2" in capsys.readouterr().out
    with pytest.raises(ReadError, match="many recordings"): inspect(str(tmp_path), hypnogram=str(tmp_path / "given.csv"))


def test_a_file_scored_inside(tmp_path, capsys):
    r = night()
    write_edf(Recording("n", r.channels, START, hypnogram=Hypnogram([0, 1, 2], 30, start=START)), tmp_path / "n.edf")
    assert inspect(str(tmp_path / "n.edf")) == 0 and "'epochs': 3" in capsys.readouterr().out


def test_a_broken_file_is_a_row_and_the_others_go_on(tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    write_edf(night(), tmp_path / "deep" / "a.edf"); write_edf(night(), tmp_path / "a.edf")
    (tmp_path / "b.edf").write_bytes((tmp_path / "a.edf").read_bytes()[:300])
    for f, n in (("html", 3), ("json", 4), ("table", 3)):
        assert inspect(str(tmp_path), str(tmp_path / "o" / f), f) == 1
        assert sum(p.is_file() for p in (tmp_path / "o" / f).rglob("*")) == n
    said = capsys.readouterr().out
    assert "2 inspected, 1 refused" in said and "copy the file again" in said
    index = Page((tmp_path / "o/html/index.html").read_text())
    assert sorted(index.addresses) == ["a.edf.html", "deep/a.edf.html"]
    assert list(pd.read_csv(tmp_path / "o/table/summary.csv")["file"]) == ["a.edf", "b.edf", "deep/a.edf"]


@pytest.mark.parametrize("make", [lambda p: p / "nothing", lambda p: p])
def test_wrong_paths_are_one_line(tmp_path, make):
    with pytest.raises(PFTSleepError) as e: inspect(str(make(tmp_path)))
    assert "\n" not in str(e.value) and e.value.remedy


def test_a_folder_that_cannot_be_written(tmp_path):
    write_edf(night(), tmp_path / "n.edf")
    (tmp_path / "o").write_text("a file")
    with pytest.raises(PFTSleepError, match="can't be written"): inspect(str(tmp_path / "n.edf"), str(tmp_path / "o"), "html")


# --- real files

@needs_real
def test_sleep_edf_as_it_is():
    r = read_edf(REAL / "psg_edf/sleepedf_SC4001_5min.edf")
    table = quality_table(r).set_index("name")
    assert list(table.index) == ["Fpz-Cz", "Pz-Oz", *table.index[2:]] and set(table["duration"]) == {300}
    assert table.loc["Fpz-Cz", "rate"] == 100 and math.isnan(table.loc["Fpz-Cz", "line_50"]) and table.loc["Fpz-Cz", "missing"] == 0
    assert -200 < table.loc["Fpz-Cz", "min"] < table.loc["Fpz-Cz", "p1"] < 0 < table.loc["Fpz-Cz", "p99"] < table.loc["Fpz-Cz", "max"] < 200
    assert table.loc[table["rate"] == 1, "flat"].isna().all()
    assert 36 < table.loc[table["kind"] == "TEMP", "median"].iloc[0] < 39


@needs_real
def test_real_quirks(capsys):
    by = {p.stem: quality_table(read_edf(p)).set_index("name") for p in (REAL / "psg_edf/format_quirks").glob("*.edf")}
    assert by["pyedflib_test_subsecond"]["reversed"].all() and by["edfize_invalid-date"].loc["Thorax", "findings"] == ["no samples"]
    assert by["edfReader_edfPlusD"]["missing"].between(.4, .5).all() and (by["edfReader_edfPlusC"]["missing"] == 0).all() # 9 of 20 s
    hz, density = spectrum(read_edf(REAL / "psg_edf/format_quirks/edfReader_edfPlusC.edf")["sine 50 Hz"])
    assert hz[density.argmax()] == 50
    assert inspect(str(REAL / "psg_edf")) == 0
    assert inspect(str(REAL / "hypnograms/other/bigsasi_child_hypnogram.edf")) == 0
    said = capsys.readouterr().out
    assert "Male" not in said and "'Lights off': 1" in said and "Clip Note" not in said
