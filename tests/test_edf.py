"""Reading and writing EDF: real files, hand-made bytes, other libraries as oracles, and damage of every kind."""
import os
import pickle
import resource
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import edfio
import numpy as np
import pandas as pd
import pyedflib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pftsleep.data import edf
from pftsleep.data.edf import edf_name, edf_unit, read_edf, write_edf
from pftsleep.data.recording import EVENT_COLUMNS, Hypnogram, Kind, Recording, array_channel, crop_channel, named_channels
from pftsleep.errors import ChannelError, EDFError, PFTSleepError, SignalError

REALDATA = Path(__file__).parents[2] / "shared" / "realdata"
real = pytest.mark.skipif(not REALDATA.exists(), reason="../shared/realdata is not here")
QUIRKS = REALDATA / "psg_edf" / "format_quirks"
READERS = ["edfio", "pyedflib", "bytes"]


# --- files made by hand, byte by byte -------------------------------------------------------------------------------------------

def signal(label="EEG C3-A2", unit="uV", pmin=-3276.8, pmax=3276.7, dmin=-32768, dmax=32767, n=4, reserved=""):
    return dict(label=label, transducer="", unit=unit, pmin=pmin, pmax=pmax, dmin=dmin, dmax=dmax, prefilter="", n=n, reserved=reserved)


def field(value, width):
    raw = value if isinstance(value, bytes) else str(value).encode()
    assert len(raw) <= width, (value, width)
    return raw.ljust(width)


def make(path, signals, records, *, version="0", patient="X X X X", recording="Startdate X X X X", date="01.03.24", time="22.30.00", n_bytes=None, reserved="", n_records=None, seconds=1, n_signals=None, cut=0, extra=b""):
    """An EDF file; `records` is a list of records, each a list of arrays or bytes, one per signal."""
    head = b"".join(field(v, w) for v, w in [(version, 8), (patient, 80), (recording, 80), (date, 8), (time, 8), (256 * (len(signals) + 1) if n_bytes is None else n_bytes, 8), (reserved, 44),
        (len(records) if n_records is None else n_records, 8), (seconds, 8), (len(signals) if n_signals is None else n_signals, 4)])
    widths = dict(label=16, transducer=80, unit=8, pmin=8, pmax=8, dmin=8, dmax=8, prefilter=80, n=8, reserved=32)
    head += b"".join(field(s[k], w) for k, w in widths.items() for s in signals)
    width = 3 if version != "0" else 2
    data = b""
    for record in records:
        for s, x in zip(signals, record, strict=True):
            raw = x.ljust(s["n"] * width, b"\0") if isinstance(x, bytes) else np.asarray(x, "<i4").view("u1").reshape(-1, 4)[:, :width].tobytes()
            assert len(raw) == s["n"] * width
            data += raw
    data += extra
    path.write_bytes(head + (data[:-cut] if cut else data))
    return path


def ramp(n_records, n=4): return [[np.arange(i * n, (i + 1) * n)] for i in range(n_records)]


NOTES = dict(label="EDF Annotations", transducer="", unit="", pmin=-1, pmax=1, dmin=-32768, dmax=32767, prefilter="", n=40, reserved="")


def test_hand_made_file_has_its_values(tmp_path):
    r = read_edf(make(tmp_path / "a.edf", [signal()], ramp(5)))
    assert list(r.channels) == ["C3-M2"] and r.id == "a" and r.subject is None and r.issues == ()
    assert r.start == datetime(2024, 3, 1, 22, 30)
    np.testing.assert_allclose(r["C3-M2"].samples(), np.arange(20) / 10, atol=1e-4)
    assert r["C3-M2"].fs == 4 and r["C3-M2"].resolution == pytest.approx(.1)
    assert r.provenance == {"format": "EDF", "file": "a.edf", "record_duration": 1., "n_records": 5, "reader": "edfio"}


# --- real files -----------------------------------------------------------------------------------------------------------------

@real
@pytest.mark.parametrize("path", sorted(p.relative_to(REALDATA) for p in (REALDATA / "psg_edf").rglob("*.edf")), ids=lambda p: p.stem)
def test_real_files_equal_edfio(path):
    r, oracle = read_edf(REALDATA / path), edfio.read_edf(REALDATA / path)
    assert [c.source_label for c in r.channels.values()] == [s.label for s in oracle.signals]
    stored = len(oracle.signals[0].digital) / oracle.signals[0].sampling_frequency
    for c, s in zip(r.channels.values(), oracle.signals, strict=True):
        assert c.fs == pytest.approx(s.sampling_frequency, rel=1e-12)
        factor = edf_unit(s.physical_dimension, c.kind)[1]
        x = c.samples()
        assert x.dtype == np.float32
        np.testing.assert_allclose(x[~np.isnan(x)], s.data * factor, rtol=2e-6, atol=2e-6 * factor * max(1, abs(s.physical_max)))
        assert np.isnan(x).sum() == round((r.duration - stored) * c.fs)


@real
def test_sleep_edf_night():
    path = REALDATA / "psg_edf" / "sleepedf_SC4001_5min.edf"
    r = read_edf(path)
    assert r.start == datetime(1989, 4, 24, 16, 13) and r.duration == 300 and r.provenance["format"] == "EDF" and r.provenance["record_duration"] == 30
    assert [(c.source_label, c.kind, c.fs, c.unit, c.reference) for c in r.channels.values()] == [("EEG Fpz-Cz", "EEG", 100, "uV", "Cz"), ("EEG Pz-Oz", "EEG", 100, "uV", "Oz"),
        ("EOG horizontal", "EOG", 100, "uV", None), ("Resp oro-nasal", "RESP", 1, "", None), ("EMG submental", "EMG", 1, "uV", None), ("Temp rectal", "TEMP", 1, "degC", None), ("Event marker", "EVENT", 1, "", None)]
    with pyedflib.EdfReader(str(path)) as f:
        for i, c in enumerate(r.channels.values()): np.testing.assert_allclose(c.samples(), f.readSignal(i), rtol=1e-5, atol=1e-4)
    assert 34 < r["Temp rectal"].samples().mean() < 40


@real
def test_a_gap_is_where_the_continuous_twin_has_other_data():
    "edfPlusD holds 11 of the 20 seconds of edfPlusC, and says which by its time-keeping annotations."
    d, c = read_edf(QUIRKS / "edfReader_edfPlusD.edf"), read_edf(QUIRKS / "edfReader_edfPlusC.edf")
    there = np.repeat(np.isin(np.arange(20), [0, 2, 4, 5, 6, 7, 8, 9, 12, 15, 19]), 200)
    assert [str(i) for i in d.issues] == ["noted: 5 pauses, 9 s in all; the samples there are NaN"] and d.duration == c.duration == 20
    for name in c.channels:
        np.testing.assert_array_equal(np.isnan(d[name].samples()), ~there)
        np.testing.assert_array_equal(d[name].samples()[there], c[name].samples()[there])
    assert c.events.values.tolist() == [[0., 0., "RECORD START", ""], [600., 0., "REC STOP", ""]]


@real
def test_negative_gain_and_sub_second_start():
    path = QUIRKS / "pyedflib_test_subsecond.edf"
    r = read_edf(path)
    assert r.start == datetime(2020, 1, 24, 4, 5, 56, 394531) # pyedflib 0.1.42 says .039453; the file says +0.3945312
    with pyedflib.EdfReader(str(path)) as f: np.testing.assert_allclose(r["Fp1"].samples(), f.readSignal(0), rtol=1e-5, atol=1e-2)
    first = np.frombuffer(path.read_bytes()[768:768 + 256], "<i2")
    np.testing.assert_allclose(r["Fp1"].samples(0, 128), 8711 - (first + 32768.) * 2 * 8711 / 65535, atol=1e-3)
    assert r.events.name.tolist() == ["XLSpike", "Clip Note", "XLEvent", "XLSpike"]
    np.testing.assert_allclose(r.events.onset, [1.9511719, 3.4921875, 290.5019531, 583.5722656], atol=1e-6)
    assert b"1998" not in pickle.dumps(r) and "1998" not in repr(r.provenance)


@real
def test_a_header_without_samples():
    r = read_edf(QUIRKS / "edfize_invalid-date.edf")
    assert r.start is None and r.duration == 0 and len(r.channels) == 14
    assert any("00.00.00" in i.problem for i in r.issues) and any("no samples" in i.problem for i in r.issues)
    fs = {c.source_label: c.fs for c in r.channels.values()}
    assert (fs["EEG(sec)"], fs["EOG(L)"], fs["THOR RES"], fs["SaO2"]) == (125, 50, 10, 1)
    assert all(len(c.samples()) == 0 for c in r.channels.values())


@real
def test_duplicates_and_fractional_rates():
    r = read_edf(QUIRKS / "mne_duplicate_channel_labels.edf")
    assert list(r.channels) == ["F1-Ref", "F2-Ref", "F1-Ref #2"] and not np.array_equal(r["F1-Ref"].samples(), r["F1-Ref #2"].samples())
    assert list(read_edf(QUIRKS / "mne_duplicate_channel_labels.edf", channels=["EEG F1-Ref"]).channels) == ["F1-Ref", "F1-Ref #2"]
    u = read_edf(QUIRKS / "mne_test_uneven_samp.edf")
    volts, block = u.channels.values()
    assert (volts.fs, volts.unit, block.fs, block.unit) == (100, "uV", 12.8, "uV")
    assert volts.samples().max() == pytest.approx(5e6, rel=1e-3) # a sine of 5 V
    assert block.n_samples == 1408 and u.issues == ()


@real
@pytest.mark.parametrize("path", sorted(p.relative_to(REALDATA) for p in (REALDATA / "hypnograms").rglob("*.edf")), ids=lambda p: p.stem)
def test_hypnogram_files_are_events(path):
    r, oracle = read_edf(REALDATA / path), edfio.read_edf(REALDATA / path)
    assert not r.channels and r.issues == () and r.start == oracle.startdatetime
    expected = sorted((a.onset, a.duration or 0., a.text) for a in oracle.annotations)
    assert sorted((e.onset, e.duration, f"{e.name}@@{e.channel}" if e.channel else e.name) for e in r.events.itertuples()) == expected


@real
def test_the_child_hypnogram_ties_lights_to_a_channel():
    e = read_edf(REALDATA / "hypnograms" / "other" / "bigsasi_child_hypnogram.edf").events
    assert e[e.name == "Lights off"].values.tolist() == [[1197.44, 0., "Lights off", "EMG RAT"]]


@real
@pytest.mark.parametrize("path", sorted(p.relative_to(REALDATA) for p in (REALDATA / "psg_edf").rglob("*.edf") if "PlusD" not in p.name), ids=lambda p: p.stem)
def test_real_files_survive_writing(path, tmp_path):
    r = read_edf(REALDATA / path)
    write_edf(r, tmp_path / "b.edf")
    b = read_edf(tmp_path / "b.edf")
    assert list(b.channels) == list(r.channels) and b.start == r.start and b.events.name.tolist() == r.events.name.tolist()
    for name, c in r.channels.items():
        assert (b[name].kind, b[name].unit, b[name].fs, b[name].n_samples) == (c.kind, c.unit, c.fs, c.n_samples)
        if c.n_samples: np.testing.assert_allclose(b[name].samples(), c.samples(), atol=b[name].resolution * .51)
        if c.n_samples: assert b[name].resolution <= c.resolution * 1.01
    raw = (tmp_path / "b.edf").read_bytes()
    assert raw[8:88] == b"X X X X".ljust(80)
    assert raw[88:168].decode().split() == ["Startdate", f"{r.start:%d-%b-%Y}".upper() if r.start else "X", "X", "X", "X"]
    if r.start: assert edfio.read_edf(tmp_path / "b.edf").startdate == r.start.date() # other readers need the date here


# --- round trips ----------------------------------------------------------------------------------------------------------------

RATES = [1, 2, 10, 25, 50, 64, 100, 125, 128, 200, 256, 512, 12.8, 1 / 30, 1 / 3, .5, 99.5, 10.54, 127.9]


@st.composite
def recordings(draw):
    seed, rng = draw(st.integers(0, 2**31)), None
    rng = np.random.default_rng(seed)
    rates = draw(st.lists(st.sampled_from(RATES[:13]), min_size=1, max_size=4)) if draw(st.booleans()) else [draw(st.sampled_from(RATES))]
    seconds = draw(st.floats(.1, 90))
    kinds = draw(st.lists(st.sampled_from([("C3-M2", "EEG", "uV"), ("E1", "EOG", "uV"), ("Chin", "EMG", "uV"), ("ECG", "ECG", "mV"), ("SpO2", "SPO2", "%"), ("Pres", "RESP", "cmH2O"), ("Xyz", "OTHER", "")]),
        min_size=len(rates), max_size=len(rates)))
    made = []
    for fs, (name, kind, unit) in zip(rates, kinds, strict=True):
        x = rng.normal(size=max(1, int(np.ceil(seconds * fs)))) * 10. ** rng.integers(-2, 4) + rng.choice([0, 0, 50, -3000])
        made.append(array_channel(name, np.float32(x) if draw(st.integers(0, 5)) else np.full(len(x), np.float32(x[0])), fs, unit, kind))
    events = draw(st.lists(st.tuples(st.floats(-10, 2 * seconds), st.one_of(st.just(0.), st.floats(.001, 40)), st.text(min_size=1, max_size=30), st.sampled_from(["", "C3"])), max_size=12))
    start = draw(st.one_of(st.none(), st.datetimes(datetime(1985, 1, 2), datetime(2084, 12, 31))))
    return Recording("r", named_channels(made), start=start, events=pd.DataFrame(events, columns=EVENT_COLUMNS))


def expected_text(text):
    return text.translate({0: " ", 0x14: " ", 0x15: " "}).strip(" ")


def same(a, b):
    """`b` is `a` after a trip through a file."""
    assert list(b.channels) == list(a.channels)
    for name, c in a.channels.items():
        d = b[name]
        assert (d.kind, d.unit, d.n_samples) == (c.kind, c.unit, c.n_samples) and d.fs == pytest.approx(c.fs, rel=2e-9)
        x, y = c.samples().astype("f8"), d.samples().astype("f8")
        span = x.max() - x.min() if len(x) else 0
        np.testing.assert_allclose(y, x, rtol=1e-6, atol=d.resolution * .5001)
        if span: assert d.resolution <= (span + 2.1 * 10. ** -(6 - len(str(int(max(abs(x)))))) ) / 65535 * 1.0001 # as fine as eight characters allow
    assert b.start == a.start


@settings(max_examples=60, deadline=None)
@given(recordings())
def test_round_trip(tmp_path_factory, r):
    path = tmp_path_factory.mktemp("rt") / "r.edf"
    write_edf(r, path)
    b = read_edf(path)
    same(r, b)
    want = sorted((e.onset, e.duration, expected_text(f"{e.name}@@{e.channel}" if e.channel else e.name)) for e in r.events.itertuples())
    want = sorted(((o, d, *(part.strip(" ") for part in (*t.split("@@", 1), "")[:2])) for o, d, t in want if t), key=lambda e: e[0])
    got = sorted(b.events.itertuples(index=False, name=None), key=lambda e: e[0])
    assert len(got) == len(want)
    np.testing.assert_allclose([e[0] for e in got], [e[0] for e in want], atol=2e-7)
    assert sorted(e[2:] for e in got) == sorted(e[2:] for e in want)
    assert sorted(round(e[1], 4) for e in got) == pytest.approx(sorted(round(e[1], 4) for e in want), abs=2e-4)
    with pyedflib.EdfReader(str(path)) as f: # an independent reader of the same bytes
        for i, c in enumerate(r.channels.values()):
            np.testing.assert_allclose(f.readSignal(i)[:c.n_samples], c.samples(), rtol=1e-6, atol=b[c.name].resolution * .5001)
            assert f.getPhysicalDimension(i) == c.unit
        if r.start: assert f.getStartdatetime().replace(microsecond=0) == r.start.replace(microsecond=0)


@pytest.mark.parametrize("lengths", [[1000, 10], [1000, 11], [999, 10], [1, 1], [0, 0], [100003, 1001], [0, 5]])
def test_uneven_ends_keep_their_lengths(tmp_path, lengths):
    r = Recording("r", {c.name: c for c in (array_channel("C3", np.arange(lengths[0]) % 77, 100, "uV", "EEG"), array_channel("HR", np.full(lengths[1], 60.), 1, "bpm", "HR"))}, start=datetime(2024, 1, 1))
    write_edf(r, tmp_path / "r.edf")
    same(r, read_edf(tmp_path / "r.edf"))


def test_hypnogram_becomes_annotations(tmp_path):
    h = Hypnogram([0, 1, 2, 3, 4, -1], 20, start=datetime(2024, 1, 1, 23, 0, 0, 500000), lights_off=-5., lights_on=130.)
    old = pd.DataFrame([[0., 20., "Sleep stage R", ""], [1., 0., "Lights off", ""], [5., 3., "Arousal", "C3"]], columns=EVENT_COLUMNS)
    r = Recording("r", {"C3": array_channel("C3", np.zeros(15000), 100, "uV", "EEG")}, start=datetime(2024, 1, 1, 22, 59, 58, 250000), hypnogram=h, events=old)
    write_edf(r, tmp_path / "r.edf")
    e = read_edf(tmp_path / "r.edf").events
    stages = e[e.name.str.startswith("Sleep stage")]
    assert stages.name.str[12:].tolist() == ["W", "N1", "N2", "N3", "R", "?"] and stages.onset.tolist() == [2.25 + 20 * i for i in range(6)] and set(stages.duration) == {20}
    assert e[e.name.str.startswith("Lights")][["onset", "name"]].values.tolist() == [[-2.75, "Lights off"], [132.25, "Lights on"]]
    assert e[e.name == "Arousal"].channel.tolist() == ["C3"]
    write_edf(Recording("h", {}, hypnogram=h), tmp_path / "h.edf") # stages alone, on their own clock
    alone = read_edf(tmp_path / "h.edf")
    assert not alone.channels and alone.start == h.start and alone.events.onset.tolist()[:3] == [-5, 0, 20] and alone.provenance["record_duration"] == 0
    assert len(edfio.read_edf(tmp_path / "h.edf").annotations) == 8
    with pyedflib.EdfReader(str(tmp_path / "h.edf")) as f: assert len(f.readAnnotations()[0]) == 8


def test_a_thousand_events_at_one_instant_do_not_inflate_the_file(tmp_path):
    c = array_channel("C3", np.zeros(600 * 100), 100, "uV", "EEG")
    write_edf(Recording("r", {"C3": c}, events=pd.DataFrame([[1., 0., f"event {i}", ""] for i in range(1000)], columns=EVENT_COLUMNS)), tmp_path / "r.edf")
    assert (tmp_path / "r.edf").stat().st_size < 600 * 200 + 100_000
    assert read_edf(tmp_path / "r.edf").events.name.tolist() == [f"event {i}" for i in range(1000)]


def test_identity_never_travels(tmp_path):
    p = make(tmp_path / "p.edf", [signal(), NOTES], [[np.arange(4), b"+0\x14\x14\0"]], patient="MCH-0234567 F 02-MAY-1951 Haagse_Harry", recording="Startdate 01-MAR-2024 PSG-1234 Dr_Jones Telemetry03", reserved="EDF+C")
    r = read_edf(p)
    for secret in (b"Harry", b"0234567", b"1951", b"Jones", b"PSG-1234", b"Telemetry"):
        assert secret not in pickle.dumps(r) and secret.decode() not in repr(r) + repr(r.provenance) + repr(r.issues)
    kept = read_edf(p, keep_identity=True)
    assert kept.provenance["identity"] == {"patient": "MCH-0234567 F 02-MAY-1951 Haagse_Harry", "recording": "Startdate 01-MAR-2024 PSG-1234 Dr_Jones Telemetry03"}
    write_edf(kept, tmp_path / "q.edf")
    assert b"Harry" not in (tmp_path / "q.edf").read_bytes() and b"Jones" not in (tmp_path / "q.edf").read_bytes()
    assert read_edf(tmp_path / "q.edf").start == datetime(2024, 3, 1, 22, 30)


# --- windows --------------------------------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 6), st.sampled_from([.5, 1, 2.5, .3, 30]), st.integers(0, 60), st.lists(st.integers(0, 3), max_size=6), st.data())
def test_any_window_is_a_slice_of_the_whole(tmp_path_factory, n, n_records, seconds, cut, pauses, data):
    """Whatever the rate, the gaps and the truncation: the value at a time doesn't depend on how one asks for it."""
    starts = np.cumsum([0, *(seconds * (1 + (pauses[i] if i < len(pauses) else 0)) for i in range(max(0, n_records - 1)))])
    records = [[b"+%.3f\x14\x14\0" % starts[i], np.arange(i * n, (i + 1) * n), [i]] for i in range(n_records)]
    cut = min(cut, n_records * (80 + 2 * n + 2))
    p = make(tmp_path_factory.mktemp("w") / "w.edf", [NOTES, signal(n=n), signal("HR", "bpm", n=1)], records, seconds=seconds, reserved="EDF+D", cut=cut)
    for reader in READERS if not cut and n_records else ["bytes"]:
        for k, c in enumerate(read_edf(p).channels.values()):
            c = replace(c, read=replace(c.read, reader=reader)) if read_edf(p).provenance["reader"] == "edfio" and reader != "pyedflib" else c # pyedflib refuses EDF+D
            whole = c.samples()
            a, b = sorted(data.draw(st.tuples(st.integers(0, c.n_samples), st.integers(0, c.n_samples))))
            np.testing.assert_array_equal(c.samples(a, b), whole[a:b])
            np.testing.assert_array_equal(crop_channel(c, a, b).samples(), whole[a:b])
            for i in range(n_records - (cut > 0)): # each record at its own time
                at = round(starts[i] * c.fs)
                want = np.arange(i * n, (i + 1) * n) / 10 if k == 0 else [i / 10]
                np.testing.assert_allclose(whole[at:at + len(want)], want, atol=1e-3)


@pytest.mark.parametrize("reader", READERS)
def test_readers_agree(tmp_path, reader, monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.integers(-32768, 32768, (20, 7)), rng.integers(-32768, 32768, (20, 3))
    p = make(tmp_path / "r.edf", [signal(n=7), NOTES, signal("E1-M2", n=3)], [[a, b"+%d\x14\x14\0" % i, b] for i, (a, b) in enumerate(zip(x, y, strict=True))], reserved="EDF+C")
    refuse = lambda *a, **k: (_ for _ in ()).throw(ValueError("no"))
    if reader != "edfio": monkeypatch.setattr(edfio, "read_edf", refuse)
    if reader == "bytes": monkeypatch.setattr(pyedflib, "EdfReader", refuse)
    r = read_edf(p)
    assert r.provenance["reader"] == reader and r.issues == ()
    np.testing.assert_allclose(r["C3-M2"].samples(), x.ravel() / 10, atol=1e-3)
    np.testing.assert_allclose(r["E1-M2"].samples(10, 33), y.ravel()[10:33] / 10, atol=1e-3)


@pytest.mark.parametrize("n_records", [-1, None], ids=["bytes", "edfio"])
def test_a_window_of_a_huge_file_is_cheap(tmp_path, n_records):
    "16 GB on paper, a few kB on the disk: a window must touch its own records only."
    n = 2**20
    p = make(tmp_path / "huge.edf", [signal(n=n), signal("E1", n=n)], [], n_records=4096 if n_records is None else n_records)
    at = 768 + 4000 * 4 * n
    with p.open("r+b") as f:
        f.truncate(768 + 4096 * 4 * n)
        f.seek(at); f.write(np.arange(100, dtype="<i2").tobytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    r = read_edf(p)
    assert r.provenance["reader"] == ("edfio" if n_records is None else "bytes")
    np.testing.assert_allclose(r["C3-M2"].samples(4000 * n - 5, 4000 * n + 100)[5:], np.arange(100) / 10, atol=1e-3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000 # kB


def test_channels_travel_and_hold_nothing_open(tmp_path):
    p = make(tmp_path / "a.edf", [signal()], ramp(50))
    files = len(os.listdir("/proc/self/fd"))
    kept = [read_edf(p)["C3-M2"] for _ in range(20)]
    for c in kept: c.samples(3, 9)
    assert len(os.listdir("/proc/self/fd")) == files
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(kept[0])).samples(), kept[0].samples())
    assert len(pickle.dumps(kept[0])) < 3000


# --- BDF ------------------------------------------------------------------------------------------------------------------------

def test_bdf_by_hand(tmp_path):
    rng = np.random.default_rng(1)
    x = np.concatenate([[-2**23, 2**23 - 1, -1, 0], rng.integers(-2**23, 2**23, 96)]).reshape(10, 10)
    notes = dict(NOTES, label="BDF Annotations", dmin=-2**23, dmax=2**23 - 1)
    eeg = signal("EEG Cz", "uV", -262144, 262143, -2**23, 2**23 - 1, n=10)
    p = make(tmp_path / "a.bdf", [eeg, notes], [[v, b"+%d.5\x14\x14\0" % i + (b"+3\x151\x14Spindle\x14\0" if i == 4 else b"")] for i, v in enumerate(x)], version=b"\xffBIOSEMI", reserved="BDF+C")
    r = read_edf(p)
    assert r.provenance["format"] == "BDF+C" and r.start == datetime(2024, 3, 1, 22, 30, 0, 500000) and r.events.values.tolist() == [[2.5, 1., "Spindle", ""]]
    np.testing.assert_allclose(r["Cz"].samples(), -262144 + (x.ravel() + 2.**23) * 524287 / (2**24 - 1), rtol=1e-6, atol=1e-2)
    assert r.provenance["reader"] == "pyedflib"
    cut = make(tmp_path / "b.bdf", [eeg], [[v] for v in x], version=b"\xffBIOSEMI", reserved="24BIT", cut=10)
    c = read_edf(cut)
    np.testing.assert_array_equal(c["Cz"].samples(), r["Cz"].samples()[:96]) # 10 bytes off are 4 samples of three bytes
    assert c.provenance["reader"] == "bytes" and "cut" in c.issues[0].problem


def test_bdf_of_edfio(tmp_path):
    x = np.random.default_rng(0).normal(0, 50, 2560)
    edfio.Bdf([edfio.BdfSignal(x, 256, label="EEG C3-M2", physical_dimension="uV", physical_range=(-300, 300))]).write(tmp_path / "a.bdf")
    np.testing.assert_allclose(read_edf(tmp_path / "a.bdf")["C3-M2"].samples(), x, atol=1e-4)


def test_threads_may_read_one_bdf(tmp_path):
    x = np.random.default_rng(0).integers(-2**23, 2**23, (200, 30))
    p = make(tmp_path / "a.bdf", [signal(f"EEG C{k}", "uV", -8388608, 8388607, -2**23, 2**23 - 1, n=10) for k in (3, 4, 5)], [[v[:10], v[10:20], v[20:]] for v in x], version=b"\xffBIOSEMI", reserved="24BIT")
    r = read_edf(p)
    with ThreadPoolExecutor(8) as pool: parts = list(pool.map(lambda i: r[f"C{3 + i % 3}"].samples(i, i + 900), range(60)))
    for i, part in enumerate(parts): np.testing.assert_allclose(part, x[:, (i % 3) * 10:(i % 3) * 10 + 10].ravel()[i:i + 900])


# --- names and units ------------------------------------------------------------------------------------------------------------

MESA = dict(ECG="EKG", EOG="EOG-L EOG-R", EMG="EMG Leg", EEG="EEG1 EEG2 EEG3", RESP="Pres Flow Thor Abdo Therm", SNORE="Snore", POSITION="Pos", SPO2="SpO2", HR="HR DHR",
    EVENT="EKG_Off EOG-L_Off EOG-R_Off EMG_Off EEG1_Off EEG2_Off EEG3_Off Pleth_Off", OTHER="Pleth OxStatus")
OTHERS = {"EEG": ["EEG", "EEG(sec)", "EEG 2", "C3", "C4-A1", "C3_M2", "F3-M2", "O1_M2", "A1", "M2", "Fp1", "EEG Fpz-Cz", "EEG F1-Ref", "C3M2", "eeg pz-oz"],
    "EOG": ["EOG(L)", "EOG(R)", "E1", "E2-M1", "E1-M2", "LOC", "ROC", "LOC-A2", "EOG horizontal"], "ECG": ["ECG", "ECG (L-R)", "ECG L", "ECG II", "ecg"],
    "EMG": ["EMG", "chin", "cchin_l", "EMG (L-R)", "L Chin", "Chin1-Chin2", "EMG submental", "Leg L", "lleg", "rleg", "EMG RAT"],
    "RESP": ["THOR RES", "ABDO RES", "Thoracic", "Chest", "ABD", "Abdominal", "AIRFLOW", "NEW AIR", "Cannula Flow", "nas_pres", "nasalflow", "Resp oro-nasal", "NASAL PRES"],
    "SPO2": ["SaO2", "spo2", "SAO2", "O2 Sat"], "HR": ["H.R.", "HR", "Heart Rate", "Pulse", "PR"], "TEMP": ["Temp rectal", "Body Temp"], "POSITION": ["POSITION", "Body Position", "body_pos"],
    "LIGHT": ["LIGHT"], "CPAP": ["CPAP Flow", "PAP Pres"], "EVENT": ["Event marker", "Status", "Marker"], "OTHER": ["OX stat", "AUX", "Chinstrap", "Overflow", "Impulse", "Pulse Wave", "Legend", "STAT", "X1", ""]}
NAMED = [(label, kind) for kind, labels in MESA.items() for label in labels.split()] + [(label, kind) for kind, labels in OTHERS.items() for label in labels]


@pytest.mark.parametrize("label, kind", NAMED)
def test_kinds(label, kind):
    for variant in (label, label.upper(), label.lower()): assert edf_name(variant)[1] == Kind(kind), variant


@given(st.text(max_size=16), st.text(max_size=8))
def test_any_label_gets_a_name_and_a_unit(label, dimension):
    name, kind, reference = edf_name(label, dimension)
    assert isinstance(name, str) and kind in Kind and (reference is None or reference)
    assert edf_name(name)[0] == " ".join(name.split()) # naming a name changes nothing
    unit, factor, _ = edf_unit(dimension, kind)
    assert unit.isascii() and factor > 0


def test_units_scale_values(tmp_path):
    specs = [("EEG C3", "V", 1e6, "uV"), ("EEG C4", b"\xb5V", 1, "uV"), ("EEG O1", "µV", 1, "uV"), ("EEG O2", "mV", 1e3, "uV"), ("EEG F3", "nV", 1e-3, "uV"), ("ECG", "uV", 1e-3, "mV"), ("SpO2", "%", 1, "%"),
        ("HR", "BPM", 1, "bpm"), ("Temp", b"\xb0C", 1, "degC"), ("Pres", "cmH2O", 1, "cmH2O"), ("EEG F4", "", 1, ""), ("EEG Cz", "quux", 1, "quux")]
    r = read_edf(make(tmp_path / "u.edf", [signal(label, unit) for label, unit, *_ in specs], [[np.arange(4)] * len(specs)]))
    for (_, _, factor, unit), c in zip(specs, r.channels.values(), strict=True):
        assert c.unit == unit and c.resolution == pytest.approx(.1 * factor)
        np.testing.assert_allclose(c.samples(), np.arange(4) / 10 * factor, rtol=1e-5, atol=1e-4 * factor)
    assert {(i.channel, i.problem.split(";")[0]) for i in r.issues} == {("EEG F4", "unit not stated"), ("EEG Cz", "unknown unit 'quux'")}


def test_labels_in_other_alphabets(tmp_path):
    r = read_edf(make(tmp_path / "l.edf", [signal("Température", "degC"), signal("EEG Größe".encode("latin-1")), signal("筋電図")], [[np.arange(4)] * 3]))
    assert list(r.channels) == ["Température", "EEG Größe", "筋電図"] and r["EEG Größe"].kind == "EEG" and r.provenance["reader"] != "none"
    write_edf(r, tmp_path / "m.edf")
    assert list(read_edf(tmp_path / "m.edf").channels) == ["Temperature", "EEG Gro?e", "???"]


def test_asking_for_channels(tmp_path):
    p = make(tmp_path / "c.edf", [signal("EEG C3-A2"), signal("SaO2", "%"), signal("EOG(L)")], [[np.arange(4)] * 3])
    assert list(read_edf(p, channels=["eog(l)", "c3-a2"]).channels) == ["C3-M2", "E1"]
    assert list(read_edf(p, channels="spo2").channels) == ["SpO2"] and list(read_edf(p, channels=[]).channels) == []
    with pytest.raises(ChannelError, match="the file has C3-M2, SpO2, E1") as e: read_edf(p, channels=["C3-A2", "C4"])
    assert e.value.channel == "C4" and e.value.path == p


# --- dates ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("date, time, recording, start", [
    ("24.04.89", "16.13.00", "", datetime(1989, 4, 24, 16, 13)), ("31.12.84", "00.00.00", "", datetime(2084, 12, 31)), ("01.01.85", "00.00.00", "", datetime(1985, 1, 1)),
    ("01.01.85", "00.00.00", "Startdate X X X X", None), ("01.01.85", "22.15.00", "Startdate X X X X", datetime(1985, 1, 1, 22, 15)), ("24.04.89", "16.13.00", "Startdate 24-APR-2089 X X X", datetime(2089, 4, 24, 16, 13)),
    ("24.04.yy", "16.13.00", "Startdate 24-APR-1918 X X X", datetime(1918, 4, 24, 16, 13)), ("24/04/89", "16:13:00", "", datetime(1989, 4, 24, 16, 13)), (" 4. 4.89", " 6. 3. 0", "", datetime(1989, 4, 4, 6, 3)),
    ("00.00.00", "20.14.57", "", None), ("29.02.23", "20.14.57", "", None), ("", "", "", None), ("01.03.24", "24.00.00", "", None), ("01.03.24", "22.30.00", "Startdate 32-XYZ-2024 X", None)])
def test_dates(tmp_path, date, time, recording, start):
    r = read_edf(make(tmp_path / "d.edf", [signal()], ramp(1), date=date, time=time, recording=recording))
    assert r.start == start and (r.start is not None) == (not r.issues)
    assert len(r["C3-M2"].samples()) == 4


def test_start_survives_writing(tmp_path):
    c = {"C3": array_channel("C3", np.zeros(100), 100, "uV", "EEG")}
    for start in (None, datetime(1985, 1, 1, 0, 0, 1), datetime(2084, 12, 31, 23, 59, 59, 999999), datetime(2024, 2, 29, 12, 0, 0, 1)):
        write_edf(Recording("r", c, start=start), tmp_path / "r.edf")
        assert read_edf(tmp_path / "r.edf").start == start
    with pytest.raises(EDFError, match="1985 to 2084"): write_edf(Recording("r", c, start=datetime(1918, 1, 1)), tmp_path / "r.edf")


# --- files that aren't whole ----------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1200), st.sampled_from([None, -1]))
def test_cut_anywhere(tmp_path_factory, keep, claimed):
    """A file cut at any byte either can't be read at all, or gives the samples that are there, and says so."""
    folder = tmp_path_factory.mktemp("cut")
    n_records = 8
    p = make(folder / "c.edf", [signal(n=5), signal("HR", "bpm", n=2), dict(NOTES, n=8)], [[np.arange(i * 5, i * 5 + 5), [2 * i, 2 * i + 1], b"+%d\x14\x14\0" % i] for i in range(n_records)], reserved="EDF+C", n_records=claimed)
    raw = p.read_bytes()
    p.write_bytes(raw[:keep])
    if keep < 1024:
        with pytest.raises(EDFError, match="header|empty"): read_edf(p)
        return
    r = read_edf(p)
    whole, rest = divmod(min(keep, len(raw)) - 1024, 30)
    n = {"C3-M2": whole * 5 + min(rest, 10) // 2, "HR": whole * 2 + min(max(0, rest - 10), 4) // 2}
    for name, c in r.channels.items():
        assert c.n_samples == n[name]
        np.testing.assert_allclose(c.samples(), np.arange(n[name]) / 10, atol=1e-3)
        np.testing.assert_array_equal(c.samples(c.n_samples // 2), c.samples()[c.n_samples // 2:])
    assert (r.issues == ()) == (keep >= len(raw) and claimed is None)


def test_counts_that_lie(tmp_path):
    for claimed, extra, want in [(-1, b"", 20), (100, b"", 20), (2, b"", 20), ("", b"", 20), ("abc", b"", 20), (5, b"xxx", 20), ("99999999", b"", 20)]:
        r = read_edf(make(tmp_path / "n.edf", [signal()], ramp(5), n_records=claimed, extra=extra))
        assert r["C3-M2"].n_samples == want and len(r.issues) == 1, claimed
        np.testing.assert_allclose(r["C3-M2"].samples(), np.arange(20) / 10, atol=1e-3)


@pytest.mark.parametrize("change, problem", [
    (dict(version="1"), "neither EDF nor BDF"), (dict(n_signals=0), "number of signals"), (dict(n_signals="-1"), "number of signals"), (dict(n_signals="abc"), "number of signals"), (dict(n_signals=9999), "header promises 9999"),
    (dict(seconds=0), "sampling rates"), (dict(seconds=-1), "record duration"), (dict(seconds="nan"), "record duration"), (dict(seconds="x"), "record duration"), (dict(seconds=""), "record duration"),
    (dict(n_bytes=256 * 30), "contradicts itself")])
def test_impossible_headers(tmp_path, change, problem):
    p = make(tmp_path / "i.edf", [signal()], ramp(3), **change)
    with pytest.raises(EDFError, match=problem) as e: read_edf(p)
    assert e.value.path == p and e.value.remedy


@pytest.mark.parametrize("n", ["abc", "-4", "1e300", "99999999", "4.5"])
def test_impossible_samples_per_record(tmp_path, n):
    p = make(tmp_path / "i.edf", [signal()], ramp(3))
    raw = bytearray(p.read_bytes()); raw[256 + 216:256 + 224] = n.encode().ljust(8); p.write_bytes(raw)
    if n == "99999999": assert read_edf(p)["C3-M2"].n_samples == 12 # possible, then: one record that was cut short
    else:
        with pytest.raises(EDFError, match="samples per record"): read_edf(p)


def test_one_bad_signal_costs_one_signal(tmp_path):
    bad = [signal("flat", dmin=5, dmax=5), signal("EEG C4", pmin=7, pmax=7), signal("words", pmin="low"), signal("none", n=0), signal("huge", pmin="-1e99", pmax="1e99")]
    r = read_edf(make(tmp_path / "b.edf", [signal(), *bad, signal("SaO2", "%")], [[np.arange(4)] * 4 + [[], np.arange(4), np.arange(4)]]))
    assert list(r.channels) == ["C3-M2", "SpO2"] and [i.channel for i in r.issues] == [b["label"] for b in bad] and {i.action for i in r.issues} == {"skipped"}
    np.testing.assert_allclose(r["SpO2"].samples(), np.arange(4) / 10, atol=1e-3)


def test_precision_needs_float64(tmp_path):
    "Digital values around eight million for a signal around zero: in float32 the two offsets would cancel to steps of 0.016 instead of 0.02."
    x = np.arange(8_000_000, 8_000_101)
    r = read_edf(make(tmp_path / "p.bdf", [signal("Temp", "degC", -1, 1, 8_000_000, 8_000_100, n=101)], [[x]], version=b"\xffBIOSEMI", reserved="24BIT"))
    np.testing.assert_allclose(r["Temp"].samples(), np.linspace(-1, 1, 101), atol=1e-7)
    single = x.astype("f4") * np.float32(.02) + np.float32(-160001)
    assert np.abs(single - np.linspace(-1, 1, 101)).max() > .005


def test_not_files(tmp_path):
    (tmp_path / "empty.edf").touch(); (tmp_path / "zip.edf").write_bytes(b"PK\3\4" + bytes(5000)); (tmp_path / "short.edf").write_bytes(b"0".ljust(100))
    for name, problem in [("empty.edf", "empty"), ("zip.edf", "neither"), ("short.edf", "after 100 of 256"), ("none.edf", "no such file"), (".", "folder"), ("empty.edf/x.edf", "can't be opened|no such file")]:
        with pytest.raises(EDFError, match=problem) as e: read_edf(tmp_path / name)
        assert e.value.remedy and str(tmp_path) in str(e.value)


@pytest.mark.parametrize("what", ["cut", "gone"])
def test_a_file_that_changes_while_open(tmp_path, what):
    p = make(tmp_path / "c.edf", [signal()], ramp(50))
    c = read_edf(p)["C3-M2"]
    p.unlink() if what == "gone" else p.write_bytes(p.read_bytes()[:-100])
    with pytest.raises(EDFError, match="samples can't be read") as e: c.samples()
    assert e.value.channel == "EEG C3-A2" and e.value.path == p


def test_damaged_annotations_are_counted(tmp_path):
    rows = [b"+0\x14\x14\0+0.5\x14ok\x14\0", b"rubbish", b"+2\x14\x14\0+x\x14no\x14\0", b"+3\x14\x14\0+9" + b"9" * 50 + b"\x14far\x14\0"]
    r = read_edf(make(tmp_path / "a.edf", [signal(), NOTES], [[np.arange(4), t] for t in rows], reserved="EDF+C"))
    assert r.events.name.tolist() == ["ok"] and [i.problem for i in r.issues] == ["3 annotations are damaged"] and r["C3-M2"].n_samples == 16


def test_one_damaged_clock_moves_nothing(tmp_path):
    for wrong in (b"+500", b"+0", b"+99999999999", b"junk"):
        rows = [b"+%d\x14\x14\0" % i for i in range(6)]; rows[3] = wrong + b"\x14\x14\0"
        r = read_edf(make(tmp_path / "t.edf", [signal(), NOTES], [[np.arange(i * 4, i * 4 + 4), t] for i, t in enumerate(rows)], reserved="EDF+D"))
        np.testing.assert_allclose(r["C3-M2"].samples(), np.arange(24) / 10, atol=1e-3)
        assert any("no usable time" in i.problem for i in r.issues)


def test_pauses_in_a_file_that_says_it_has_none(tmp_path):
    rows = [b"+%d\x14\x14\0" % t for t in (0, 1, 601, 602)]
    r = read_edf(make(tmp_path / "t.edf", [signal(), NOTES], [[np.arange(i * 4, i * 4 + 4), t] for i, t in enumerate(rows)], reserved="EDF+C"))
    x = r["C3-M2"].samples()
    assert r.duration == 603 and np.isnan(x[8:-8]).all() and r.issues[0].action == "repaired" and "599 s" in r.issues[0].problem
    np.testing.assert_allclose(x[-8:], np.arange(8, 16) / 10, atol=1e-3)


# --- damage at random -----------------------------------------------------------------------------------------------------------

def damage(tmp_path, seed):
    """A valid file with some bytes changed, most of them in the header; reading may fail, in words only."""
    rng = np.random.default_rng(seed)
    plus = ["", "EDF+C", "EDF+D"][seed % 3]
    rows = [[np.arange(4), [i], b"+%d\x14\x14\0+%d.5\x153\x14Arousal\x14\0" % (i, i)] for i in range(6)]
    p = make(tmp_path / "f.edf", [signal(), signal("HR", "bpm", n=1), NOTES], rows, reserved=plus)
    raw = bytearray(p.read_bytes())
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, len(raw) if rng.random() < .3 else 1024))
        if rng.random() < .5: raw[at] = int(rng.integers(256))
        else: raw[at:at + 8] = rng.choice([b"99999999", b"-1      ", b"        ", b"1e308   ", b"nan     ", b"0       ", b"\0" * 8, b"00000001", b"0.000001"])
    if rng.random() < .2: del raw[int(rng.integers(len(raw))):]
    p.write_bytes(raw)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            r = read_edf(p)
            for c in r.channels.values():
                if c.n_samples < 10**7: assert len(c.samples()) == c.n_samples
                c.samples(c.n_samples // 2, min(c.n_samples, c.n_samples // 2 + 10))
            repr(r); pickle.dumps(r); r.events.to_string()
    except PFTSleepError as e:
        assert e.remedy or e.channel, str(e)
        return False
    return True


def test_fuzz(tmp_path):
    read = sum(damage(tmp_path, seed) for seed in range(300))
    assert 50 < read < 290 # neither everything nor nothing gets through


@pytest.mark.slow
def test_fuzz_long(tmp_path):
    assert sum(damage(tmp_path, seed) for seed in range(1000, 11000)) > 2500


# --- writing that must fail -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_a_number_is_refused(tmp_path, value):
    x = np.zeros(3_000_000, "float32"); x[2_500_000] = value
    with pytest.raises(SignalError, match=r"channel 'C4'.*sample 2500000 is .*->") as e:
        write_edf(Recording("r", {"C3": array_channel("C3", np.zeros(3_000_000), 100, "uV"), "C4": array_channel("C4", x, 100, "uV")}), tmp_path / "r.edf")
    assert e.value.path == tmp_path / "r.edf" and not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused(tmp_path):
    c = array_channel("C3", np.zeros(100), 100, "uV")
    for bad, error in [(replace(c, name="a name of more than sixteen"), ChannelError), (replace(c, unit="furlongs/fortnight"), ChannelError), (replace(c, name="EDF Annotations"), ChannelError), (array_channel("C3", np.array([0, 1e15]), 100, "uV"), SignalError)]:
        with pytest.raises(error, match="->"): write_edf(Recording("r", {"C3": bad}), tmp_path / "r.edf")
    with pytest.raises(EDFError, match="no record duration suits"): write_edf(Recording("r", {"a": c, "b": replace(c, name="b", fs=float(np.pi))}), tmp_path / "r.edf")
    assert not list(tmp_path.iterdir())


def test_an_old_file_stays_when_the_new_one_fails(tmp_path):
    p = tmp_path / "r.edf"
    write_edf(Recording("r", {"C3": array_channel("C3", np.arange(100), 100, "uV")}), p)
    before = p.read_bytes()
    calls = []

    def breaks(start, stop): # the range is found, then the disk of the source fails
        calls.append(start)
        if len(calls) > 1: raise EDFError("samples can't be read", "source.edf", remedy="check the disk")
        return np.zeros(stop - start)
    with pytest.raises(EDFError, match="source.edf"): write_edf(Recording("r", {"C3": replace(array_channel("C3", np.zeros(100), 100, "uV"), read=breaks)}), p)
    assert p.read_bytes() == before and [x.name for x in tmp_path.iterdir()] == ["r.edf"]


def test_a_file_may_be_rewritten_in_place(tmp_path):
    p = tmp_path / "r.edf"
    write_edf(Recording("r", {"C3": array_channel("C3", np.arange(5000), 100, "uV", "EEG")}), p)
    write_edf(read_edf(p), p)
    np.testing.assert_allclose(read_edf(p)["C3"].samples(), np.arange(5000), atol=.05)


def test_folders_that_refuse(tmp_path):
    r = Recording("r", {"C3": array_channel("C3", np.zeros(100), 100, "uV")})
    (tmp_path / "file").touch(); (tmp_path / "folder").mkdir()
    for p in (tmp_path / "none" / "r.edf", tmp_path / "file" / "r.edf", tmp_path / "folder"):
        with pytest.raises(EDFError, match="can't be written.*->"): write_edf(r, p)
    assert sorted(x.name for x in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_full_disk_leaves_nothing(tmp_path):
    code = """if True:
        import resource, sys, numpy as np
        from pftsleep.data.edf import write_edf
        from pftsleep.data.recording import Recording, array_channel
        from pftsleep.errors import PFTSleepError
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)) # the kernel refuses to write more, as a full disk does
        try: write_edf(Recording("r", {"C3": array_channel("C3", np.zeros(10**6), 100, "uV")}), sys.argv[1])
        except PFTSleepError as e: print("refused:", e)"""
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "r.edf")], capture_output=True, text=True, check=True).stdout
    assert out.startswith("refused:") and "can't be written" in out and not list(tmp_path.iterdir())


def test_writers_in_two_threads_do_not_meet(tmp_path):
    made = [Recording("r", {"C3": array_channel("C3", np.full(200_000, i), 100, "uV")}) for i in range(4)]
    threads = [threading.Thread(target=write_edf, args=(r, tmp_path / "r.edf")) for r in made]
    for t in threads: t.start()
    for t in threads: t.join()
    x = read_edf(tmp_path / "r.edf")["C3"].samples()
    assert len(set(x.tolist())) == 1 and [p.name for p in tmp_path.iterdir()] == ["r.edf"]


def test_value_at_a_time(tmp_path):
    """A clock written into the signal: after writing, reading and cropping, each sample still says its own time."""
    fs, start = 25.6, datetime(2024, 3, 1, 22, 30, 0, 700000)
    t = np.arange(5000) / fs
    write_edf(Recording("r", {"Clock": array_channel("Clock", t, fs, "s")}, start=start), tmp_path / "r.edf")
    r = read_edf(tmp_path / "r.edf")
    c = r["Clock"]
    assert r.start == start
    for a in (0, 1, 24, 25, 26, 127, 128, 4999): assert c.samples(a, a + 1)[0] == pytest.approx(a / fs, abs=c.resolution)
    when = start + timedelta(seconds=100)
    i = round((when - r.start).total_seconds() * c.fs)
    assert c.samples(i, i + 1)[0] == pytest.approx(100, abs=c.resolution)


def test_the_module_is_lazy_about_libraries_warnings(tmp_path):
    "edfio warns about a file that was cut; here that is an issue, and no warning leaks out."
    p = make(tmp_path / "w.edf", [signal()], ramp(5), cut=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_edf(p)["C3-M2"].samples()) == 18
    assert set(edf._READERS) == set(READERS)
