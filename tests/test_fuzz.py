"""Readers fed with what nobody wrote: only `PFTSleepError` comes out, in bounded time and memory. Coverage-guided by atheris, and by hypothesis where other tests don't do it."""
import json
import os
import subprocess
import sys
import tracemalloc
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from fuzz.readers import SEPARATOR, load
from hypothesis import given, settings
from hypothesis import strategies as st
from test_annotations import EXAMPLES, mat, wfdb
from test_edf import NOTES, make, signal

from pftsleep.data.annotation_writers import WRITERS, write_annotations
from pftsleep.data.edf import read_edf, write_edf
from pftsleep.data.hypnograms import read_annotations
from pftsleep.data.mesa_actigraphy import read_mesa_actigraphy
from pftsleep.data.recording import EVENT_COLUMNS, Hypnogram, Recording, array_channel
from pftsleep.data.signals import Recipe
from pftsleep.data.splits import make_split
from pftsleep.data.store import create_store

REALDATA = Path(__file__).parents[2] / "shared" / "realdata"
OURS, GROUPS = load()
WEEK = "mesaid,line,linetime,offwrist,activity,whitelight,interval,dayofweek,daybymidnight\n1,1,23:59:30,1,,,EXCLUDED,5,1\n1,2,00:00:00,0,100,10,ACTIVE,6,2\n1,5,00:01:30,0,0,1,REST-S,6,2\n"
WORDS = ["99999999", "-1      ", "1e308", "nan", "inf", "0x1", "1_0", "²", "EDF+D", "BDF+C", "EDF Annotations ", "\x14\x14\0", "\x15", "Sleep stage W", "<SleepStage>", "<ScoredEvent>", "<Start>", "</Start>",
    "<!ENTITY", "Stages|Stages", "\t", ",", "\n", "24:00:00", "23:59:59", "START RECORDING", "PAUSED", "STAGE - ", "e:9999999", "0+", "...", "# epoch length: ", "[", "{", "null", "212", "16x9999+24", ":99", "rec.dat", "\r\n"]


# --- what is fed at first

def night() -> Recording:
    "Three signals at their own rates, stages and events; a few kB."
    rng = np.random.default_rng(0)
    channels = {n: array_channel(n, rng.normal(0, 20, int(60 * fs)), fs, unit, kind) for n, fs, unit, kind in (("C3-M2", 10, "uV", "EEG"), ("SpO2", 1, "%", "SPO2"), ("ECG", 12.5, "mV", "ECG"))}
    events = pd.DataFrame([(11., 12., "Hypopnea", "Airflow"), (20., 3., "Arousal", "")], columns=EVENT_COLUMNS)
    return Recording("night", channels, datetime(2024, 3, 1, 22, 30, 0, 500000), hypnogram=Hypnogram(np.array([0, 2]), 30., datetime(2024, 3, 1, 22, 30, 0, 500000)), events=events)


def edf_seeds(folder: Path):
    write_edf(night(), folder / "n.edf")
    whole = (folder / "n.edf").read_bytes()
    broken = whole.replace(b"EDF+C", b"EDF+D").replace(b"+30.5\x14\x14", b"+90.5\x14\x14") # a pause
    bdf = b"\xffBIOSEMI" + whole[8:192] + b"BDF+C" + whole[197:] # records don't fit, but are read
    real = [p.read_bytes()[:6000] for p in sorted((REALDATA / "psg_edf").rglob("*.edf"))] + [p.read_bytes()[:4000] for p in sorted((REALDATA / "hypnograms/sleep_edf").glob("*.edf"))[:2]] if REALDATA.exists() else []
    for name in GROUPS["edf"]: yield from ((name, data, data is whole) for data in (whole, broken, bdf, whole[:-100], *real))


def scoring_seeds(folder: Path):
    rec = night()
    written = {}
    for name in WRITERS:
        write_annotations(rec.hypnogram, rec.events if name in ("edf", "nsrr", "bids") else None, folder / f"{name}.tsv", name)
        written[name] = (folder / f"{name}.tsv").read_bytes()
    several = EXAMPLES | {"dcsm": b"0,60,W\n60,30,N2\n", "isruc": b"0\n2\n5\n", "physiomimi": EXAMPLES["nsrr"].replace(b"Wake|0", b"SDO:WakeState"), "wsc_json": EXAMPLES["hypjson"], **{f"csv_{k}": b"stage\n0\n1\n" for k in ("nsrr", "rk", "pydynamo")}}
    for name in GROUPS["scoring"]:
        examples = [x for x in (several.get(name), written.get(name)) if x] or [*several.values(), *written.values()]
        yield from ((name, data, name != "detected") for data in examples)
    real = [p for p in sorted(REALDATA.glob("*/**/*")) if p.suffix.lower() in (".xml", ".csv", ".an", ".arousal", ".json", ".txt") and p.stat().st_size < 200_000] if REALDATA.exists() else []
    yield from (("detected", p.read_bytes()[:3000], False) for p in real)


def record_seeds(folder: Path):
    head = b"rec 3 50/1000(3) 4 23:07:00 19/1/1989\nrec.dat %s 2.5(-7)/uV 16 0 0 0 0 EEG C3-A2\nrec.dat %s 1/%% 16 0 0 0 0 SaO2\nrec.mat 16+24 1000/mV 12 0 0 0 0 ECG\n# Age: 3\n"
    yield from (("wfdb", head % (f, f) + SEPARATOR + bytes(range(200)), True) for f in (b"16", b"212", b"24", b"310", b"311", b"80x2:1"))
    if REALDATA.exists(): yield from (("wfdb", p.read_bytes(), False) for p in (REALDATA / "cinc2018/tr03-0005.hea", REALDATA / "hypnograms/slpdb/slp01a.hea"))


def hdf5_seeds(folder: Path):
    with h5py.File(folder / "d.h5", "w") as f:
        f["signals/eeg/C3_M2"], f["signals/emg/ECG"], f["hypnogram"] = np.arange(500.), np.arange(50.), np.zeros(5, int)
        f.attrs["description"] = json.dumps([dict(path="signals/eeg/C3_M2", fs=250, unit="uV"), dict(path="signals/emg/ECG", fs=250, unit="mV")])
    yield "dreem_h5", (folder / "d.h5").read_bytes(), True
    yield "cinc2018_mat", mat(folder / "m.mat").read_bytes(), True


def table_seeds(folder: Path):
    make_split(pd.DataFrame(dict(id=list("abcd"), subject=list("wxyz"))), dict(train=.5, test=.5)).save(folder / "s.json")
    rec = night()
    write_annotations(rec.hypnogram, rec.events, folder / "n.xml", "nsrr")
    xml = (folder / "n.xml").read_bytes()
    yield from (("week", WEEK.encode(), True), ("overlap", b"mesaid,line,timeactigraphy,timepsg\n1,241,20:00:00,20:00:03\n", True), ("families", b"nsrrid,familyi,rectype\n800001,100,5\n", True), ("split", (folder / "s.json").read_bytes(), True),
        ("deidentify .xml", xml, True), ("deidentify .xml", EXAMPLES["profusion"], True), ("deidentify .csv", EXAMPLES["csv"], True), ("deidentify .json", b"[0, 1, -1]", True))


def store_seeds(folder: Path):
    store = create_store(folder / "store", Recipe.default())
    store.add(Recording("a", {"C3": array_channel("C3", np.arange(600), 10, "uV", "EEG", resolution=1.)}, hypnogram=Hypnogram(np.array([0, 2]), 30.)))
    store.sync()
    yield from ((where, (folder / "store" / where).read_bytes(), where in ("store.json", "manifest.parquet")) for where in GROUPS["store"]) # other files of the recording carry sums of their own store


SEEDS = {"edf": edf_seeds, "scoring": scoring_seeds, "records": record_seeds, "hdf5": hdf5_seeds, "tables": table_seeds, "store": store_seeds}


class Seeds(dict):
    def __repr__(self): return "seeds" # hypothesis prints what a test was called with


@pytest.fixture(scope="module")
def seeds(tmp_path_factory): return Seeds({group: list(make(tmp_path_factory.mktemp(group))) for group, make in SEEDS.items()})


@pytest.mark.parametrize("group", GROUPS)
def test_every_reader_has_seeds_and_reads_what_is_whole(seeds, group, tmp_path):
    assert {name for name, _, _ in seeds[group]} == set(GROUPS[group])
    for name, data, whole in seeds[group]:
        try: GROUPS[group][name](data, tmp_path)
        except OURS as e: assert not whole, f"{name}: {e}"


# --- atheris

def fuzz(group: str, seeds, folder: Path, runs: int) -> None:
    pytest.importorskip("atheris", reason="atheris isn't installed")
    (folder / "seeds").mkdir(parents=True)
    names = list(GROUPS[group])
    for i, (name, data, _) in enumerate(seeds): (folder / "seeds" / f"{i:04}").write_bytes(bytes([names.index(name)]) + data)
    (folder / "words").write_text("\n".join(word.encode().hex() for word in WORDS))
    seed = 1 if os.environ.get("CI") else int.from_bytes(os.urandom(3), "big")
    done = subprocess.run([sys.executable, str(Path(__file__).parent / "fuzz/readers.py"), group, str(folder / "words"), str(folder / "seeds"), str(folder / "run"), "--runs", str(runs), "--seed", str(seed)],
        capture_output=True, text=True, errors="replace", timeout=3600, env=os.environ | dict(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"))
    found = [f"{p.name}: {names[p.read_bytes()[0] % len(names)]} {p.read_bytes()[1:600]!r}" for p in (folder / "run").glob("*-*") if p.is_file() and p.stat().st_size]
    assert done.returncode == 0, "\n".join([f"seed {seed}", done.stdout[-2000:], done.stderr[-4000:], *found])


RUNS = {"edf": 1000, "scoring": 1500, "records": 600, "tables": 1500, "store": 120} # not of HDF5 and not of a store's chunks: on foreign bytes libhdf5 may never return, and Blosc may end the process

@pytest.mark.parametrize("group", RUNS)
def test_only_our_errors_come_out(seeds, group, tmp_path): fuzz(group, seeds[group], tmp_path, RUNS[group])


@pytest.mark.slow
@pytest.mark.parametrize("group", RUNS)
def test_only_our_errors_come_out_at_length(seeds, group, tmp_path): fuzz(group, seeds[group], tmp_path, 10 * RUNS[group])


# --- hypothesis, where no other test mutates a file that was whole

READERS = [("tables", name) for name in GROUPS["tables"]] + [("store", name) for name in GROUPS["store"]] + [("scoring", name) for name in ("dcsm", "isruc", "physiomimi", "wsc_json")]
CHANGES = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 9), st.sampled_from([w.encode() for w in WORDS]) | st.binary(max_size=4)), min_size=1, max_size=3)


def changed(data: bytes, changes) -> bytes:
    for at, cut, new in changes: at %= len(data) + 1; data = data[:at] + new + data[at + cut:]
    return data


@given(which=st.sampled_from(READERS), pick=st.integers(0, 9), changes=CHANGES)
@settings(max_examples=200)
def test_a_whole_file_with_a_few_changes(seeds, tmp_path_factory, which, pick, changes):
    group, name = which
    files = [data for n, data, _ in seeds[group] if n == name]
    with suppress(OURS): GROUPS[group][name](changed(files[pick % len(files)], changes), tmp_path_factory.getbasetemp() / "mutants")


# --- HDF5: not its bytes, which are libhdf5's, but everything that a file can hold where we look for something else

VALUE = st.sampled_from([np.arange(5.), np.arange(5, dtype="i2"), np.arange(6.).reshape(2, 3), np.array(3.), np.array([]), np.array([b"x", b"yz"]), np.array([True, False]), np.array([1j]), np.array([np.nan, np.inf, -1e300]), np.array([7, -2]),
    h5py.Empty("f8"), "text", 3, float("nan"), b"\xff\xfe", np.zeros((1, 5)), np.zeros((5, 1)), np.ones((1, 5), "u1"), np.array([0, 1, -1], "i8"), h5py.SoftLink("/signals"), h5py.SoftLink("/nowhere"), h5py.ExternalLink("other.h5", "/x"), None])
PLACES = st.sampled_from(["signals", "signals/eeg", "signals/eeg/C3_M2", "signals/emg/ECG", "signals/x/y/z", "hypnogram", "data", "data/arousals", "data/sleep_stages", *(f"data/sleep_stages/{k}" for k in ("wake", "rem", "undefined"))])
ABOUT = st.sampled_from([b"[]", "[", "[" * 100_000, "{}", "null", '[{"path": 3}]', '[{"path": "signals/eeg/C3_M2", "fs": "x", "unit": []}]', '[{"path": "signals/eeg/C3_M2", "fs": 1e400}]', '[{"path": "/signals/eeg/C3_M2", "fs": [250], "unit": 7}]', b"\xff", 5, np.arange(3), h5py.Empty("S5")])


def put(f: h5py.File, place: str, value) -> None:
    "Replaces what is there; not every value can stand everywhere."
    with suppress(KeyError, ValueError, TypeError, OSError, RuntimeError):
        if place in f: del f[place]
        if value is not None: f[place] = value


@given(name=st.sampled_from(["dreem_h5", "cinc2018_mat"]), changes=st.lists(st.tuples(PLACES, VALUE), max_size=4), about=ABOUT | st.none(), fs=VALUE.filter(lambda v: not isinstance(v, h5py.SoftLink | h5py.ExternalLink)))
@settings(max_examples=150)
def test_anything_that_hdf5_can_hold(seeds, tmp_path_factory, name, changes, about, fs):
    folder = tmp_path_factory.getbasetemp() / "hdf5"
    folder.mkdir(exist_ok=True)
    (folder / "made.h5").write_bytes(next(data for n, data, _ in seeds["hdf5"] if n == name))
    with h5py.File(folder / "made.h5", "a") as f:
        for place, value in changes: put(f, place, value)
        if about is not None: f.attrs["description"] = about
        with suppress(KeyError, RuntimeError): f["signals/eeg"].attrs.update({} if fs is None else {"fs": fs}) # a link may lead to itself
    with suppress(OURS): GROUPS["hdf5"][name]((folder / "made.h5").read_bytes(), folder)


# --- what this found, and a second pair of eyes

def refused(read, path: Path, content: bytes | str, problem: str, *more) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(OURS, match=problem): read(path, *more)


def test_a_blank_line_is_no_epoch_less(tmp_path):
    "In a list of stages all later ones would move."
    for format in (None, "csv_nsrr", "isruc"): refused(read_annotations, tmp_path / "a.txt", "0\n1\n\n2\n", "line 3 is blank", format)
    refused(read_annotations, tmp_path / "a.csv", "stage\nW\n\nN2\n", "line 3 is blank")
    for whole in ("0\n1\n2\n\n\n", "# stages\n\n0\n# a remark\n1\n2\n", "stage\r\n0\r\n1\r\n2\r\n"):
        (tmp_path / "a.txt").write_text(whole, newline="")
        assert read_annotations(tmp_path / "a.txt").hypnogram.stages.tolist() == [0, 1, 2]


def test_a_stage_without_a_type_among_others_with_one(tmp_path):
    event = "<ScoredEvent>{}<EventConcept>{}</EventConcept><Start>{}</Start><Duration>30</Duration></ScoredEvent>".format
    kind = "<EventType>Stages|Stages</EventType>"
    (tmp_path / "a.xml").write_text("<PSGAnnotation>" + event(kind, "Wake|0", 0) + event("", "REM sleep|5", 30) + event("<EventType/>", "Stage 2 sleep|2", 60) + event(kind, "Wake|0", 90) + event("", "Recording Start Time", 0) + "</PSGAnnotation>")
    s = read_annotations(tmp_path / "a.xml")
    assert s.hypnogram.stages.tolist() == [0, 4, 2, 0] and not len(s.events)


def test_large_codes_are_not_the_same_code(tmp_path):
    table = lambda *stages: json.dumps({"Data": {"30sEpochs": stages}, "Legend": {"awake": 0, "REM": 5000, "undefined": 9999}})
    refused(read_annotations, tmp_path / "a.json", table(0, 1234), "unknown stage '1234' at epoch 2")
    (tmp_path / "a.json").write_text(table(0, 5000, 9999))
    assert read_annotations(tmp_path / "a.json").hypnogram.stages.tolist() == [0, 4, -1]


def test_a_week_has_no_negative_or_endless_counts(tmp_path):
    for x in ("-1", "1e308", "inf"): refused(read_mesa_actigraphy, tmp_path / "w.csv", f"line,linetime,offwrist,activity\n1,22:00:00,0,{x}\n", "activity in row 1 is no number from 0 on")
    refused(read_mesa_actigraphy, tmp_path / "w.csv", "line,linetime,offwrist,activity" + "," * 10**6, "more than 1000 cells")


def test_pauses_ask_for_bounded_memory(tmp_path):
    "Ten thousand bytes that claimed terabytes of NaN."
    for n, seconds, step in ((200, 1, 600_000), (2000, "0.0001", 500_000)):
        rows = [[np.arange(n) % 50, b"+%d\x14\x14\0" % (i * step)] for i in range(20)]
        rec = read_edf(make(tmp_path / "p.edf", [signal(n=n), NOTES], rows, reserved="EDF+D", seconds=seconds))
        assert rec["C3-M2"].n_samples < 2**29 + 20 * n and any("no usable time" in i.problem for i in rec.issues)


def test_millions_of_beats_are_refused_or_forgotten(tmp_path):
    refused(read_annotations, tmp_path / "a.arousal", b"\x01\x04" * 2**21 + b"\0\0", "too many for WFDB annotations", "cinc2018")
    (tmp_path / "a.arousal").write_bytes(b"\x01\x04" * 10**5 + wfdb((0, "W"), (6000, "N2")))
    tracemalloc.start()
    assert read_annotations(tmp_path / "a.arousal", "cinc2018").hypnogram.stages.tolist() == [0, 2]
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()
