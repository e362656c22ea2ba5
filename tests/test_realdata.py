"""Every file of ../shared/realdata holds for our readers what PROVENANCE.md says of it. Numbers are counted here by other means: raw bytes, numpy, json, csv, ElementTree, wfdb, h5py."""
import csv
import json
import re
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from fnmatch import fnmatch
from pathlib import Path
from xml.etree import ElementTree

import h5py
import numpy as np
import pandas as pd
import pytest

from pftsleep.data.accelerometers import read_accelerometer
from pftsleep.data.actigraphy import depresjon_scores, read_actigraphy, read_nhanes_r
from pftsleep.data.edf import read_edf, write_edf
from pftsleep.data.hypnograms import read_annotations, read_hypnogram
from pftsleep.data.mesa_actigraphy import actigraphy_overlap, read_mesa_actigraphy
from pftsleep.data.nhanes import phq9_scores, read_nhanes_header, read_table
from pftsleep.data.readers import READERS, read_signals
from pftsleep.data.recording import Recording, Stage, array_channel
from pftsleep.data.splits import Split
from pftsleep.data.weeks import WEEK, cut_weeks, nonwear, to_minutes
from pftsleep.errors import PFTSleepError

REALDATA = Path(__file__).parents[2] / "shared" / "realdata"
pytestmark = pytest.mark.skipif(not REALDATA.exists(), reason="../shared/realdata is not here")
FILES = sorted(p.relative_to(REALDATA).as_posix() for p in REALDATA.rglob("*") if p.is_file()) if REALDATA.exists() else []
U = Stage.UNSCORED


# --- signals

def raw_signal(data: bytes, k: int) -> tuple[str, str, float, np.ndarray]: # label, unit, Hz, [T] physical values
    "Signal `k` of an EDF file, by slicing its bytes (Kemp et al., 1992)."
    n, seconds = int(data[252:256]), float(data[244:252])
    field = lambda begin, width, i=k: data[256 + begin * n + i * width:][:width].decode().strip()
    low, high, d_low, d_high = (float(field(at, 8)) for at in (104, 112, 120, 128))
    per_record = [int(field(216, 8, i)) for i in range(n)]
    body = data[256 * (n + 1):]
    x = np.frombuffer(body[:len(body) // (2 * sum(per_record)) * 2 * sum(per_record)], "<i2").reshape(-1, sum(per_record))[:, sum(per_record[:k]):sum(per_record[:k + 1])].reshape(-1)
    return field(0, 16), field(96, 8), per_record[k] / seconds, (x - d_low) * (high - low) / (d_high - d_low) + low


ONE_HERTZ = (("Resp oro-nasal", 1, ""), ("EMG submental", 1, "uV"), ("Temp rectal", 1, "degC"), ("Event marker", 1, ""))
GENERATOR = tuple((label, 200, "uV") for label in ("squarewave", "ramp", "pulse", "ECG", "noise", "sine 1 Hz", "sine 8 Hz", "sine 8.5 Hz", "sine 15 Hz", "sine 17 Hz", "sine 50 Hz"))
PSG = { # start, seconds, events, (label, Hz, unit that we hand out); the ECG of the generator is in mV
    "sleepedf_SC4001_5min": (datetime(1989, 4, 24, 16, 13), 300, 0, (("EEG Fpz-Cz", 100, "uV"), ("EEG Pz-Oz", 100, "uV"), ("EOG horizontal", 100, "uV"), *ONE_HERTZ)),
    "mne_test_uneven_samp": (datetime(2000, 7, 13, 12, 5, 48), 110, 0, (("3Hz +5/-5 V", 100, "uV"), ("0.2Hz Blk 1/0uV", 12.8, "uV"))),
    "mne_duplicate_channel_labels": (datetime(2018, 4, 1, 14, 12, 44), 10, None, (("EEG F1-Ref", 250, "uV"), ("EEG F2-Ref", 250, "uV"), ("EEG F1-Ref", 250, "uV"))),
    "edfReader_edfPlusC": (datetime(2009, 12, 10, 12, 44, 2), 20, 2, GENERATOR), "edfReader_edfPlusD": (datetime(2009, 12, 10, 12, 44, 2), 20, 1, GENERATOR),
    "pyedflib_test_subsecond": (datetime(2020, 1, 24, 4, 5, 56, 394531), 698, 4, (("Fp1", 128, "uV"),)),
    "edfize_invalid-date": (None, 0, 0, (("SaO2", 1, ""), ("H.R.", 1, ""), ("EEG(sec)", 125, "uV"), ("ECG", 125, "mV"), ("EMG", 125, "uV"), ("EOG(L)", 50, "uV"), ("EOG(R)", 50, "uV"), ("EEG", 125, "uV"),
        ("THOR RES", 10, ""), ("ABDO RES", 10, ""), ("POSITION", 1, ""), ("LIGHT", 1, ""), ("NEW AIR", 10, "uV"), ("OX stat", 1, "")))}
TO_OURS = {("V", "uV"): 1e6, ("uV", "mV"): 1e-3} # factor from the file's unit; 1 elsewhere
SECONDS_OF_D = [0, 2, 4, 5, 6, 7, 8, 9, 12, 15, 19] # when the records of the discontinuous file begin


def signals(path: Path) -> None:
    "Labels, rates, units, and every stored value at its time."
    start, seconds, n_events, expected = PSG[path.stem]
    data, rec = path.read_bytes(), read_signals(path)
    assert (rec.start, rec.duration) == (start, seconds) and (n_events is None or len(rec.events) == n_events)
    assert [(c.source_label, c.fs) for c in rec.channels.values()] == [(label, fs) for label, fs, _ in expected]
    for k, (c, (label, fs, unit)) in enumerate(zip(rec.channels.values(), expected, strict=True)):
        told, dimension, rate, values = raw_signal(data, k)
        assert (told, rate, c.unit, c.n_samples) == (label, fs, "mV" if label == "ECG" else unit, round(seconds * fs))
        at = np.concatenate([np.arange(s * 200, s * 200 + 200) for s in SECONDS_OF_D]) if "PlusD" in path.stem else np.arange(len(values))
        np.testing.assert_allclose(c.samples()[at], values * TO_OURS.get((dimension, c.unit), 1), rtol=2e-6, atol=2e-6 * max([1., *np.abs(values)]))


def sine(path: Path) -> None:
    "A generator's frequencies, where the samples say when they were taken."
    signals(path)
    for c in list(read_edf(path).channels.values())[5:]:
        x = c.samples(800, 2000).astype("float64") # seconds 4 to 10 are there in both
        assert np.argmax(np.abs(np.fft.rfft(x - x.mean()))) / 6 == pytest.approx(float(c.source_label.split()[1]), abs=.1)


def reversed_gain(path: Path) -> None:
    "Its range goes from 8711 down to -8711, so that the largest code is the lowest voltage."
    signals(path)
    x, codes = read_edf(path)["Fp1"].samples(), np.frombuffer(path.read_bytes()[768:], "<i2").reshape(698, -1)[:, :128].reshape(-1)
    assert x[codes.argmax()] == x.min() and x[codes.argmin()] == x.max()


def without_samples(path: Path) -> None:
    "Reversed belts and 8-bit codes; nothing to read, and that is said."
    signals(path)
    rec = read_edf(path)
    step = {c.source_label: c.resolution for c in rec.channels.values()}
    assert step["THOR RES"] == pytest.approx(2 / 255) and rec.start is None and {i.action for i in rec.issues} == {"noted"}


# --- stages of one person

SLEEP_EDF = { # epochs of W, 1, 2, 3, 4, R, movement, ?
    "SC4001EC": (1997, 58, 250, 101, 119, 125, 0, 230), "SC4002EC": (1885, 59, 373, 94, 203, 215, 1, 50), "SC4011EH": (1856, 109, 562, 96, 9, 170, 0, 78), "SC4012EC": (1824, 92, 660, 80, 16, 176, 0, 32),
    "SC4021EH": (1907, 94, 545, 73, 22, 163, 0, 76), "SC4022EJ": (1871, 184, 402, 81, 38, 179, 1, 124), "SC4031EC": (2008, 61, 485, 56, 1, 209, 0, 60), "SC4032EP": (1957, 45, 400, 54, 77, 199, 0, 148),
    "SC4041EC": (1534, 166, 620, 53, 0, 196, 1, 310), "SC4042EC": (1773, 137, 514, 88, 6, 270, 4, 88)}


def sleep_edf(path: Path) -> None:
    "24 hours of Rechtschaffen and Kales; each run of the file, in its place."
    w, s1, s2, s3, s4, r, movement, unknown = SLEEP_EDF[path.name[:8]]
    h = read_hypnogram(path)
    assert (len(h), h.epoch_length, h.onset) == (2880, 30, 0) and h.counts() == {k: n for k, n in dict(W=w, N1=s1, N2=s2, N3=s3 + s4, REM=r, UNSCORED=movement + unknown).items() if n}
    runs = re.findall(rb"\+(\d+)\x15(\d+)\x14([^\x14\0]+)\x14", path.read_bytes())
    assert sum(int(d) for _, d, _ in runs) == 86400 and h.stages[-1] == U
    code = {b"W": 0, b"1": 1, b"2": 2, b"3": 3, b"4": 3, b"R": 4, b"?": -1, b"e": -1} # 'Movement time' ends with e
    assert h.stages.tolist() == [code[word[-1:]] for _, d, word in sorted(runs, key=lambda run: int(run[0])) for _ in range(int(d) // 30)]


def child(path: Path) -> None:
    "94 annotations; lights as points in time, with the channel that they were tied to."
    told = re.findall(rb"\+([\d.]+)\x15?([\d.]*)\x14([^\x14\0]+)\x14", path.read_bytes())
    s = read_annotations(path)
    assert len(told) == 94 and sum(b"Sleep stage" in word for *_, word in told) + len(s.events) == 94
    assert s.events["name"].tolist() == ["Lights off", "Lights on"] and set(s.events["channel"]) == {"EMG RAT"}
    assert (s.hypnogram.lights_off, s.hypnogram.lights_on) == tuple(float(t) for t, _, word in told if word.startswith(b"Lights"))
    seconds = Counter()
    for _, d, word in told: seconds[word.decode().split()[-1]] += float(d or 0)
    assert {k: n * 30 for k, n in s.hypnogram.counts().items()} == {k: seconds[w] for k, w in (("W", "W"), ("N1", "N1"), ("N2", "N2"), ("N3", "N3"), ("REM", "R"))}


def yasa(path: Path) -> None:
    h, lines = read_hypnogram(path), [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert len(path.read_text().splitlines()) == 722 and h.stages.tolist() == [int(x) for x in lines] and h.duration == 6 * 3600


DREEM = { # epochs of -1, 0, ..., 4, by scorers 1 to 5; share of epochs on which 1 and 2 agree
    "095d6e40": (((0, 112, 525, 438, 98, 19), (0, 33, 42, 675, 355, 87), (0, 150, 56, 733, 187, 66), (0, 25, 4, 533, 568, 62), (0, 104, 26, 631, 276, 155)), .28),
    "0d79f4b1": (((0, 184, 79, 384, 146, 175), (3, 181, 89, 342, 178, 175), (6, 184, 60, 425, 91, 202), (0, 254, 50, 345, 126, 193), (0, 156, 65, 368, 172, 207)), .82),
    "119f9726": (((55, 82, 37, 517, 85, 211), (0, 60, 76, 574, 74, 203), (0, 81, 58, 544, 75, 229), (0, 69, 49, 583, 124, 162), (0, 53, 50, 564, 97, 223)), .83)}


def dreem(path: Path) -> None:
    counts, agreement = DREEM[path.name[:8]]
    k, h = int(path.parent.name[-1]), read_hypnogram(path)
    assert h.scorer == f"scorer_{k}" and h.stages.tolist() == json.loads(path.read_text()) and 968 <= len(h) <= 1192
    assert tuple((h.stages == s).sum() for s in range(-1, 5)) == counts[k - 1]
    if k == 2: assert round(float((read_hypnogram(path.parents[1] / "scorer_1" / path.name).stages == h.stages).mean()), 2) == agreement


def slpdb_stages(path: Path) -> None:
    "A text dump; each line is 30 s, and its first word the stage."
    rows = [line.split("\t")[-1].split() for line in path.read_text().splitlines()[1:]]
    s = read_annotations(path)
    assert s.hypnogram.stages.tolist() == [{"W": 0, "1": 1, "2": 2, "3": 3, "4": 3, "R": 4, "MT": -1}[row[0]] for row in rows] and len(rows) == 240
    assert Counter(s.events["name"]) == Counter(word for row in rows for word in (row if row[0] == "MT" else row[1:]))
    assert s.origin == datetime(1989, 1, 19, 23, 7) # by the header beside


# --- XML and events

def profusion(n: int, events: int) -> Callable[[Path], None]:
    def check(path: Path) -> None:
        root, s = ElementTree.parse(path).getroot(), read_annotations(path)
        codes = [e.text for e in root.iter("SleepStage")]
        assert root.tag == "CMPStudyConfig" and len(codes) == n and s.hypnogram.stages.tolist() == [min(int(c), 3) if int(c) < 5 else 4 for c in codes]
        rows = [[e.findtext(tag) for tag in ("Start", "Duration", "Name", "Input")] for e in root.iter("ScoredEvent")]
        assert len(rows) == events == len(s.events) and sorted((float(a), float(d), word, ch) for a, d, word, ch in rows) == sorted(s.events.itertuples(index=False, name=None))
    return check


def physiomimi(path: Path) -> None:
    "208 events: a clock, 60 runs of stages, and 147 others."
    s, rows = read_annotations(path), [{e.tag: e.text for e in row} for row in ElementTree.parse(path).getroot().iter("ScoredEvent")]
    assert len(rows) == 208 and not any("EventType" in row for row in rows) and len(s.events) == 147 and s.hypnogram.duration == 26850
    seconds = Counter()
    for row in rows: seconds[row["EventConcept"]] += float(row.get("Duration") or 0)
    words = dict(W="SDO:WakeState", N1="SDO:NonRapidEyeMovementSleep-N1", N2="SDO:NonRapidEyeMovementSleep-N2", N3="SDO:NonRapidEyeMovementSleep-N3", REM="SDO:RapidEyeMovementSleep")
    assert {k: n * 30 for k, n in s.hypnogram.counts().items()} == {k: seconds[word] for k, word in words.items()}
    assert s.origin == datetime(1996, 7, 17, 23, 37, 6)


def noxturnal(path: Path) -> None:
    rows = list(csv.reader(path.read_text("utf-16").splitlines()))[2:]
    s = read_annotations(path)
    zero = datetime.strptime(rows[0][0], "%d/%m/%Y %H:%M:%S")
    code = {"Éveil": 0, "N1": 1, "N2": 2, "N3": 3, "REM": 4}
    scored = {int((datetime.strptime(r[0], "%d/%m/%Y %H:%M:%S") - zero).total_seconds() // 30): code[r[2]] for r in rows if r[2] in code}
    assert len(rows) == 1411 and s.hypnogram.stages.tolist() == [scored.get(k, -1) for k in range(len(s.hypnogram))] and max(scored) == len(s.hypnogram) - 1
    assert Counter(s.events["name"]) == Counter(r[2] for r in rows if r[2] not in code)


# --- CinC 2018 and the headers of PhysioNet

CINC = {"tr03-0005": (240, 72000, 5147000), "tr03-0029": (496, 108000, 4770000)} # annotations, first stage, samples


def arousal(path: Path) -> None:
    "Stages of each epoch and brackets of each event, by the wfdb package."
    n, first, samples = CINC[path.stem]
    told, s = pytest.importorskip("wfdb").rdann(str(path.with_suffix("")), "arousal"), read_annotations(path)
    marks = list(zip(told.sample.tolist(), told.aux_note, strict=True))
    changes = [(at, word) for at, word in marks if "(" not in word and ")" not in word]
    assert (len(marks), changes[0][0], s.hypnogram.onset) == (n, first, first / 200)
    for k, stage in enumerate(s.hypnogram.stages):
        at = first + k * 6000 + 3000
        if at + 3000 > samples: assert stage == U and k == len(s.hypnogram) - 1; continue # the record ends within it
        assert stage == {"W": 0, "N1": 1, "N2": 2, "N3": 3, "R": 4, "U": -1}[[word for a, word in changes if a <= at][-1]]
    opened, closed = ([(at / 200, w.strip("()")) for at, w in marks if sign in w] for sign in "()")
    assert sorted(opened) == sorted(zip(s.events["onset"], s.events["name"], strict=True)) and sorted(closed) == sorted(zip(s.events["onset"] + s.events["duration"], s.events["name"], strict=True))


def arousal_matrix(path: Path) -> None:
    "Stages in the middle of each epoch, and the challenge's targets, sample by sample."
    s, n = read_annotations(path), CINC[path.stem.removesuffix("-arousal")][2]
    with h5py.File(path) as f: one_hot, targets = {k: v[0] for k, v in f["data/sleep_stages"].items()}, f["data/arousals"][:, 0]
    assert len(targets) == n == sum(int(v.sum()) for v in one_hot.values())
    code = {"wake": 0, "nonrem1": 1, "nonrem2": 2, "nonrem3": 3, "rem": 4, "undefined": -1}
    middle, whole = {k: v[3000::6000] for k, v in one_hot.items()}, n // 6000
    assert s.hypnogram.stages[:whole].tolist() == [next(code[k] for k, v in middle.items() if v[i]) for i in range(whole)] and set(s.hypnogram.stages[whole:]) <= {U}
    seconds = s.events.groupby("name")["duration"].sum() * 200
    assert abs(seconds["target_arousal"] - (targets == 1).sum()) <= 2 * len(s.events) and abs(seconds["not_scored"] - (targets == -1).sum()) <= 2 * len(s.events) # a change is counted one sample later in the matrix


def record_header(packed: int, names: list[str], units: list[str]) -> Callable[[Path], None]:
    "A header without its signals: refused by name. With made-up bytes behind it, the wfdb package reads the same values."
    def check(path: Path) -> None:
        import tempfile
        with pytest.raises(PFTSleepError, match=r"isn't there"): read_signals(path)
        lines = path.read_text().splitlines()
        n, frames = int(lines[0].split()[1]), 200
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / path.name).write_text(re.sub(rf"^({path.stem} \d+ \S+) \d+", rf"\1 {frames}", path.read_text()))
            (Path(folder) / lines[1].split()[0]).write_bytes(np.random.default_rng(0).integers(0, 256, packed + n * frames * (4 if packed else 3) // 2, "uint8").tobytes())
            rec, theirs = read_signals(Path(folder) / path.name), pytest.importorskip("wfdb").rdrecord(f"{folder}/{path.stem}").p_signal
            assert [c.source_label for c in rec.channels.values()] == names and [c.unit for c in rec.channels.values()] == units
            scale = [1e3 if unit == "uV" and line.split()[2].endswith("/mV") else 1 for unit, line in zip(units, lines[1:], strict=False)]
            for c, x, k in zip(rec.channels.values(), theirs.T, scale, strict=True): np.testing.assert_allclose(c.samples(), x * k, rtol=1e-5, atol=1e-3)
    return check


CINC_NAMES = ["F3-M2", "F4-M1", "C3-M2", "C4-M1", "O1-M2", "O2-M1", "E1-M2", "Chin1-Chin2", "ABD", "CHEST", "AIRFLOW", "SaO2", "ECG"]


# --- text

def mesa(path: Path) -> None:
    rows, r = list(csv.DictReader(path.open())), read_mesa_actigraphy(path)
    assert len(rows) == 4 == r["Activity"].n_samples and r["Activity"].fs == 1 / 30 and r.start == datetime(1985, 1, 10) # dayofweek 5: a Thursday
    for name, column, unit in (("Activity", "activity", "counts"), ("White light", "whitelight", "lux"), ("Red light", "redlight", "uW/cm2"), ("Off-wrist", "offwrist", "")):
        np.testing.assert_array_equal(r[name].samples(), [float(row[column] or "nan") for row in rows]); assert r[name].unit == unit
    assert r.events["name"].tolist() == [row["interval"] for row in rows]


def segment(n: int, fs: float, low: float, high: float, sd: float) -> Callable[[Path], None]:
    "Numbers in a text: true range and spread, and the same after they have been an EDF file, to its step."
    def check(path: Path) -> None:
        import tempfile
        x = np.loadtxt(path)
        assert x.shape == (n,) and (round(x.min()), round(x.max()), round(x.std())) == (low, high, sd)
        with tempfile.TemporaryDirectory() as folder:
            write_edf(Recording("x", {"EEG": array_channel("EEG", x, fs, "uV", "EEG")}), Path(folder) / "x.edf")
            c = read_signals(Path(folder) / "x.edf")["EEG"]
            assert (c.fs, c.unit, c.n_samples, c.duration) == (fs, "uV", n, n / fs) and np.abs(c.samples() - x).max() <= .51 * c.resolution
    return check


def segment_stages(path: Path) -> None:
    "28 changes and an end; epochs are counted from a change, which isn't at a multiple of 30 s."
    table, h = pd.read_csv(path), read_hypnogram(path, "csv_pydynamo")
    assert len(table) == 29 and table["Time"].iloc[-1] == 5026
    for t, code, until in zip(table["Time"], table["Stage"], [*table["Time"][1:], 5026.], strict=True):
        inside = [int(s) for k, s in enumerate(h.stages) if h.onset + 30 * k >= t - 1e-6 and h.onset + 30 * (k + 1) <= until + 1e-6]
        assert set(inside) <= {{0: -1, 1: 3, 2: 2, 3: 1, 4: 4, 5: 0, 6: -1}[code]}


def provenance(path: Path) -> None:
    "The document lists every file, with its size."
    listed, folder = {}, ""
    for line in path.read_text().splitlines():
        if m := re.match(r"## .*\(`(\S+/)`\)", line): folder = m[1]
        if m := re.match(r"\| (\S+) \| (\d+) \| \S.* \|$", line): listed[folder + m[1]] = int(m[2])
    assert listed == {f: (REALDATA / f).stat().st_size for f in FILES if f != "PROVENANCE.md"}


# --- wearables

def agd(path: Path) -> None:
    "Read with sqlite3; its minutes are those that another program made of it, but for the last, of which only 50 s were recorded."
    import sqlite3
    with sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True) as con: rows = con.execute("SELECT dataTimestamp, axis1, axis2, axis3, steps, lux FROM data ORDER BY rowid").fetchall()
    r = read_actigraphy(path)
    assert len(rows) == 8999 == r["Activity"].n_samples and r["Activity"].fs == .1 and r.start == datetime(2012, 6, 27, 10, 54) == datetime(1, 1, 1) + timedelta(microseconds=rows[0][0] // 10)
    for c, column in zip(r.channels.values(), list(zip(*rows, strict=True))[1:], strict=True): assert c.samples().tolist() == list(column)
    minutes, theirs = to_minutes(r), pd.read_csv(path.with_name(f"{path.stem}-sleep-awake.csv"))
    for name, column in (("Activity", "axis1"), ("Axis 2", "axis2"), ("Axis 3", "axis3")):
        x = minutes[name].samples()
        assert len(x) == 1500 and x[:-1].tolist() == theirs[column][:-1].tolist() and np.isnan(x[-1])
    with path.open("rb") as f: assert b"dateOfBirth" in f.read() # which is in the file,
    assert not re.search("621132192|Male|172.72|Caucasian|NEO1D|DESKTOP", repr((r.provenance, r.issues))) # and stays there


def sleep_awake(path: Path) -> None:
    rows = list(csv.DictReader(path.open()))
    r = read_actigraphy(path)
    assert len(rows) == 1500 == r["Activity"].n_samples and r.start == datetime(2012, 6, 27, 10, 54) and "Z" in str(r.issues[0])
    for name, column in (("Activity", "axis1"), ("Axis 2", "axis2"), ("Axis 3", "axis3")): assert r[name].samples().tolist() == [float(row[column]) for row in rows]
    for name, column in (("Wake Sadeh", "sadeh"), ("Wake Cole-Kripke", "cole-kripke")): assert r[name].samples().tolist() == [float(row[column] == "W") for row in rows]


def depresjon(n: int, weeks: int, gap: str | None) -> Callable[[Path], None]:
    def check(path: Path) -> None:
        rows = {row["timestamp"]: float(row["activity"]) for row in csv.DictReader(path.open())}
        r = read_actigraphy(path)
        x = r["Activity"].samples()
        assert len(rows) == n and (r.cohort, r.subject) == ("depresjon", path.stem) and np.nansum(x, dtype="float64") == sum(rows.values())
        for k in range(len(x)): assert x[k] == rows.get(f"{r.start + timedelta(minutes=k)}", np.nan) or (np.isnan(x[k]) and f"{r.start + timedelta(minutes=k)}" not in rows)
        assert np.isnan(x).sum() == (60 if gap else 0) and (not gap or f"60 epochs are missing from {gap}" in str(r.issues[0]))
        cut = cut_weeks(r, "all")
        assert len(cut) == weeks and sum(w.pad.sum() for w in cut) == (60 if gap else 0)
        for w in cut: assert all(v == rows[f"{w.start + timedelta(minutes=k)}"] for k, v in enumerate(w.values) if not w.pad[k]) and w.at_midnight
    return check


def scores(path: Path) -> None:
    rows, table = list(csv.DictReader(path.open())), depresjon_scores(path)
    assert table.index.tolist() == [row["number"] for row in rows] and len(rows) == 55 and table["depressed"].sum() == 23 == table["madrs1"].notna().sum()
    assert table["madrs2"].dropna().tolist() == [float(row["madrs2"]) for row in rows if row["madrs2"].strip() not in ("", "NA")]


def actiwatch(path: Path) -> None:
    lines = path.read_text("ascii").split()
    r = read_actigraphy(path)
    assert r.start == datetime(1918, 1, 23, 13, 58) and r["Activity"].fs == 1 / 60 and round(r.duration / 86400, 1) == 12.8
    assert r["Activity"].samples().tolist() == [float(v) for v in lines[7:] if v != "M"] and r["Marker"].samples().sum() == lines.count("M")


def axivity(path: Path) -> None:
    "30 s that begin 9.6 s before the half-minute; two of them make a minute."
    table = pd.read_csv(path)
    r = read_actigraphy(path)
    assert len(table) == 16841 == r["Activity"].n_samples and r["Activity"].unit == "mg" and r.start == datetime(2014, 5, 7, 13, 29, 50, 439000)
    for name, column in (("Activity", "acc"), ("Sleep", "sleep"), ("MET", "MET")): np.testing.assert_array_equal(r[name].samples(), table[column].to_numpy("float32"))
    m = to_minutes(r)
    np.testing.assert_allclose(m["Activity"].samples()[:8420], table["acc"].to_numpy()[:16840].reshape(-1, 2).mean(1), rtol=1e-6) # NaN where one of the two is
    assert m.start == datetime(2014, 5, 7, 13, 30) and "9.561 s off" in str(m.issues[-1]) and cut_weeks(r) == []


def nhanes_matrix(path: Path) -> None:
    "Five people, a whole week each; the day is a weekday, and one of them began on a Thursday."
    import rdata
    m, people = np.asarray(rdata.read_rda(path)["unidata"]), read_nhanes_r(path)
    assert m.shape == (50400, 3) and list(people) == [str(i) for i in range(21005, 21010)] and m[:, 2].max() == 13889
    for i, r in people.items():
        mine = m[m[:, 0] == int(i)]
        assert r["Activity"].samples().tolist() == mine[:, 2].tolist() and (r.start.isoweekday() % 7 + 1, r.start.hour) == (mine[0, 1], 0) and len(cut_weeks(r)) == 1
    assert people["21008"].start.strftime("%A") == "Thursday"


def nhanes_days(path: Path) -> None:
    "Fifty people; a missing day is a gap. Choi's rule agrees with the file's own wear flags in 99.4 % of minutes, Troiano's in 95.7 %."
    import rdata
    tables, people = rdata.read_rda(path)["example_activity_data"], read_nhanes_r(path)
    count, wear = ({(int(row[0]), int(row[1])): row[2:] for row in t.to_numpy("float64")} for t in (tables["count"], tables["wear"]))
    assert len(count) == 275 and len(people) == 50 and sum(np.isfinite(r["Activity"].samples()).sum() == WEEK for r in people.values()) == 23
    same = Counter()
    for i, r in people.items():
        first = min(d for p, d in count if p == int(i))
        x, off = (r[c].samples().reshape(-1, 1440) for c in ("Activity", "Off-wrist"))
        for k, (a, b) in enumerate(zip(x, off, strict=True)):
            day = (int(i), first + k)
            if day in count: assert (a == count[day]).all() and (b == 1 - wear[day]).all()
            else: assert np.isnan(a).all() and np.isnan(b).all() and "missing" in str(r.issues[1])
        for how in ("choi", "troiano"): same[how] += int((nonwear(x.reshape(-1), how) == off.reshape(-1)).sum())
    assert same == {"choi": 393795, "troiano": 378950} # of 396000


def ax3(path: Path) -> None:
    "The samples that scikit-digital-health decodes. Set to 200 Hz, it took 58800 in 298.1 s; placed by their time, within half a sample."
    r = read_accelerometer(path)
    blocks = r["X"].read.blocks
    skdh = pytest.importorskip("skdh.io._extensions", reason="extra wear").read_axivity(str(path))
    theirs = skdh[2].astype("float32")
    assert theirs.shape == (58800, 3) and np.array_equal(blocks.decode(0, 490), theirs) and r["X"].n_samples == 58800 and 197.2 < r["X"].fs < 197.3
    assert abs((r.start - datetime(1970, 1, 1)).total_seconds() - skdh[3][0]) < .01
    at, j, there = blocks.at(np.arange(58800) / r["X"].fs)
    assert there.all() and np.abs(skdh[3][at * 120 + j] - skdh[3][0] - np.arange(58800) / r["X"].fs).max() < .02 and len(np.unique(at * 120 + j)) == 58800 - 15
    assert all(np.array_equal(r[a].samples(), theirs[at * 120 + j, k]) for k, a in enumerate("XYZ"))
    assert .9 < np.median(np.linalg.norm(theirs, axis=1)) < 1.1 and 27 < r["Temperature"].samples(0, 9).mean() < 28


def link(path: Path) -> None:
    "Five minutes, of which the device slept 227 s. Raw integers by the archive's bytes."
    import zipfile
    log, r, held = zipfile.ZipFile(path).read("log.bin"), read_accelerometer(path), read_accelerometer(path, "hold")
    assert (r.start, r["X"].fs, r["X"].n_samples, r.duration) == (datetime(2021, 3, 19, 15, 57), 30, 9000, 300)
    at, seconds = 0, {}
    while at < len(log):
        size = int.from_bytes(log[at + 6:at + 8], "little")
        if log[at + 1] == 26: seconds[int.from_bytes(log[at + 2:at + 6], "little") - 1616169420] = np.frombuffer(log[at + 8:at + 8 + size], "<i2").reshape(30, 3)
        at += 9 + size
    x, y = (np.stack([q[a].samples() for a in "XYZ"], 1).reshape(300, 30, 3) * 256 for q in (r, held))
    assert len(seconds) == 73
    for s in range(300):
        assert np.array_equal(x[s], seconds[s]) if s in seconds else np.isnan(x[s]).all()
        assert np.array_equal(y[s], seconds[s]) if s in seconds else (y[s] == seconds[max(k for k in seconds if k < s)][-1]).all()
    assert r["Idle"].samples().tolist() == [float(s not in seconds) for s in range(300)] and len(r.issues) == 1 and "ISM" not in str({k: v for k, v in r.provenance.items() if k != "file"})


CHECKS: dict[str, Callable[[Path], None]] = { # pattern -> what is true of the file
    "PROVENANCE.md": provenance, "psg_edf/sleepedf_SC4001_5min.edf": signals, "psg_edf/format_quirks/mne_*.edf": signals, "psg_edf/format_quirks/edfReader_edfPlus?.edf": sine,
    "psg_edf/format_quirks/pyedflib_test_subsecond.edf": reversed_gain, "psg_edf/format_quirks/edfize_invalid-date.edf": without_samples,
    "hypnograms/sleep_edf/SC4*-Hypnogram.edf": sleep_edf, "hypnograms/other/bigsasi_child_hypnogram.edf": child, "hypnograms/other/yasa_data_full_6hrs_100Hz_hypno_30s.txt": yasa,
    "hypnograms/dreem_dodh/scorer_?/*.json": dreem, "hypnograms/slpdb/slp01a.an": slpdb_stages,
    "hypnograms/slpdb/slp01a.hea": record_header(0, ["ECG", "BP", "EEG (C4-A1)", "Resp (sum)"], ["mV", "mmHg", "uV", "l"]), "cinc2018/tr03-0005.hea": record_header(24, CINC_NAMES, ["uV"] * 11 + ["%", "mV"]),
    "cinc2018/*.arousal": arousal, "cinc2018/*-arousal.mat": arousal_matrix,
    "annotations_xml/learn-nsrr01.xml": profusion(1364, 905), "annotations_xml/compumedics_20017.edf.XML": profusion(1194, 263), "annotations_xml/100657_MIMI.xml": physiomimi,
    "annotations_xml/noxturnal_events_example_unicode.csv": noxturnal, "actigraphy/pyActigraphy/test_sample_mesa.csv": mesa,
    "eeg_segments/pydynamo_segment_data.csv": segment(502600, 100, -521, 587, 25), "eeg_segments/yasa_data_N2_spindles_15sec_200Hz.txt": segment(3000, 200, -188, 101, 29),
    "eeg_segments/pydynamo_segment_stages.csv": segment_stages}
def phq(path: Path) -> None:
    "4799 of 5334 people answered all nine questions; 6.2 % of them reach 10."
    table = read_table(path)
    scores = phq9_scores(table, path)
    by_hand = table.set_index("SEQN")[[f"DPQ0{k}0" for k in range(1, 10)]].round()
    whole = (by_hand <= 3).all(axis=1)
    assert len(table) == 5334 and scores.notna().sum() == whole.sum() == 4799 and round(100 * (scores >= 10).sum() / 4799, 1) == 6.2
    assert scores.dropna().tolist() == by_hand[whole].sum(axis=1).tolist()


def header(path: Path) -> None:
    theirs, table = pd.read_sas(path), read_nhanes_header(path)
    assert len(theirs) == 8913 == len(table) and table.index.tolist() == theirs["SEQN"].tolist()


CHECKS |= {"nhanes_xpt/DPQ_D.xpt": phq, "nhanes_xpt/PAXHD_H.xpt": header, "actigraphy/actigraph_sleepr/*.agd": agd, "actigraphy/actigraph_sleepr/*.csv": sleep_awake, "actigraphy/depresjon/condition_1.csv": depresjon(23244, 2, None),
    "actigraphy/depresjon/control_1.csv": depresjon(51611, 5, "2003-03-30 02:00:00"), "actigraphy/depresjon/scores.csv": scores, "actigraphy/nhanes_r/unidata.rda": nhanes_matrix,
    "actigraphy/nhanes_r/example_activity_data.RData": nhanes_days, "actigraphy/pyActigraphy/example_01.AWD": actiwatch, "actigraphy/pyActigraphy/sample-timeSeries.csv.gz": axivity,
    "accelerometer_human/skdh/ax3_sample.cwa": ax3, "accelerometer_human/pygt3x/ISM_Enabled.gt3x": link}
LATER = {"accelerometer_animal/whitestork_acc.rda": "a table of bouts and no recording: test_bouts checks what convert_rabc makes of it"} # what no reader of recordings takes


def checks_of(file: str) -> list[Callable[[Path], None]]: return [check for pattern, check in CHECKS.items() if fnmatch(file, pattern)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*inplace:Warning") # of the wfdb package
@pytest.mark.parametrize("file", FILES)
def test_what_is_true_of_it(file):
    if file in LATER: pytest.skip(LATER[file])
    found = checks_of(file)
    assert found, f"{file} has no entry in CHECKS: say what is true of it, or in LATER who does"
    for check in found: check(REALDATA / file)


def test_the_table_has_nothing_that_is_not_there():
    assert not [p for p in CHECKS if not any(fnmatch(f, p) for f in FILES)] and LATER.keys() <= set(FILES) and not [f for f in LATER if checks_of(f)]
    assert all(len(checks_of(f)) == 1 for f in FILES if f not in LATER)


@pytest.mark.parametrize("file", LATER)
def test_nobody_takes_it_for_something_else(file):
    "What is no recording is refused by every reader of recordings, and by name."
    for read in (read_hypnogram, read_mesa_actigraphy, actigraphy_overlap, read_actigraphy, read_accelerometer, read_nhanes_r, Split.load, *set(READERS.values()), read_signals):
        with pytest.raises(PFTSleepError, match=re.escape(Path(file).name)): read(REALDATA / file)
