"""WFDB records, Dreem's HDF5 and two tables of stages: against the wfdb package, and against files that nobody should trust."""
import json
import pickle
import resource
import sys
from datetime import date, datetime, time
from pathlib import Path

import h5py
import numpy as np
import pytest
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st

from pftsleep.data.readers import READERS, read_signals
from pftsleep.data.recording import Kind
from pftsleep.data.wfdb_dreem import read_dreem_h5, read_ids, read_isruc, read_wfdb
from pftsleep.errors import ConfigError, PFTSleepError, ReadError

SHARED = Path(__file__).parents[2] / "shared"
shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared isn't here")
TOP = {"16": 32767, "24": 2**23 - 1, "32": 2**31 - 1, "80": 127, "212": 2047, "516": 32767}


def write(folder, d, fmt="16", **more):
    n = d.shape[1]
    settings = dict(fs=100, units=["uV"] * n, sig_name=["EEG C4-A1", "EMG", "ECG", "ABD"][:n], fmt=[fmt] * n, adc_gain=[2.5, 10, 1000, .5][:n], baseline=[0, -7, 3, 100][:n]) | more
    wfdb.wrsamp("rec", d_signal=d, write_dir=str(folder), **settings)
    return folder / "rec.hea"


# --- the same as the package

@pytest.mark.parametrize("fmt", TOP)
@pytest.mark.parametrize("length", [1, 2, 3, 1000])
def test_what_the_package_writes(tmp_path, fmt, length):
    rng = np.random.default_rng(length)
    d = rng.integers(-TOP[fmt], TOP[fmt], (length, 3), endpoint=True)
    rec = read_wfdb(write(tmp_path, d, fmt, base_time=time(23, 7, 5), base_date=date(1999, 12, 31)))
    theirs = wfdb.rdrecord(str(tmp_path / "rec"))
    assert (rec.id, rec.start, rec.issues) == ("rec", datetime(1999, 12, 31, 23, 7, 5), ())
    assert [(c.name, c.kind, c.fs, c.unit) for c in rec.channels.values()] == [("C4-M1", "EEG", 100, "uV"), ("EMG", "EMG", 100, "uV"), ("ECG", "ECG", 100, "mV")]
    for c, expected in zip(rec.channels.values(), theirs.p_signal.T, strict=True):
        np.testing.assert_allclose(c.samples(), expected * (1e-3 if c.unit == "mV" else 1), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("fmt", ["16", "24", "32", "61", "80", "160", "212", "310", "311"])
@pytest.mark.parametrize("frames", [[1], [1, 1], [2, 1, 1]])
def test_any_bytes_in_any_packing(tmp_path, fmt, frames):
    "Random bytes, read by both; samples per frame included, and prologues where the package reads them."
    n = 60
    raw = np.random.default_rng(len(frames)).integers(0, 256, n * sum(frames) * 4, dtype="uint8")
    if fmt == "311": raw[3::4] &= 0x3F # two bits are spare; the package takes one of them for a part of the sample
    size = {"16": 2, "24": 3, "32": 4, "61": 2, "80": 1, "160": 2, "212": 1.5, "310": 4 / 3, "311": 4 / 3}[fmt]
    (tmp_path / "rec.dat").write_bytes(raw[:int(n * sum(frames) * size)].tobytes())
    lines = "".join(f"rec.dat {fmt}x{k} 1(0)/nd 16 0 0 0 0 s{i}\n" for i, k in enumerate(frames))
    (tmp_path / "rec.hea").write_text(f"rec {len(frames)} 10 {n}\n{lines}")
    theirs = wfdb.rdrecord(str(tmp_path / "rec"), smooth_frames=False).e_p_signal
    rec = read_wfdb(tmp_path / "rec.hea")
    for c, k, expected in zip(rec.channels.values(), frames, theirs, strict=True):
        assert (c.fs, c.unit, c.n_samples) == (10 * k, "", n * k)
        np.testing.assert_allclose(c.samples(), expected, rtol=1e-6)
        np.testing.assert_array_equal(c.samples(7, 41), c.samples()[7:41])


def test_signals_in_two_files(tmp_path):
    d = np.arange(300).reshape(100, 3)
    d[:, :2].astype("<i2").tofile(tmp_path / "a.dat")
    (tmp_path / "b.mat").write_bytes(bytes(24) + d[:, 2].astype("<i2").tobytes())
    (tmp_path / "rec.hea").write_text("rec 3 50\na.dat 16 1/uV 16 0 0 0 0 EEG\na.dat 16 1/% 16 0 0 0 0 SaO2\nb.mat 16+24 1/mV 16 0 0 0 0 ECG\n")
    rec = read_wfdb(tmp_path / "rec.hea")
    assert [c.samples(3, 5).tolist() for c in rec.channels.values()] == [[9, 12], [10, 13], [11, 14]]
    assert [(c.name, c.unit) for c in rec.channels.values()] == [("EEG", "uV"), ("SpO2", "%"), ("ECG", "mV")]


def test_uncalibrated_and_unknown_units(tmp_path):
    np.arange(40, dtype="<i2").tofile(tmp_path / "a.dat")
    (tmp_path / "rec.hea").write_text("rec 4 50 10\na.dat 16 0 16 0\na.dat 16 200\na.dat 16 2/furlong 12 5\na.dat 16 -4/NU 12 0 0 0 0 Resp (sum)\n")
    a, b, c, d = (rec := read_wfdb(tmp_path / "rec.hea")).channels.values()
    assert (a.unit, b.unit, c.unit, d.unit) == ("", "uV", "furlong", "") and a.samples(0, 2).tolist() == [0, 4]
    assert b.samples(1, 2).tolist() == [25] and c.samples(0, 1).tolist() == [-1.5] and d.samples(0, 1).tolist() == [-.75] # zero level as baseline; negative gain
    assert [i.problem.split(";")[0] for i in rec.issues] == ["a.dat isn't what the header was written for: the checksums of Resp (sum) differ", "not calibrated", "unknown unit 'furlong'"]


def test_a_channel_goes_to_another_process(tmp_path):
    rec = read_wfdb(write(tmp_path, np.arange(3000).reshape(1000, 3)))
    back = pickle.loads(pickle.dumps(rec))
    np.testing.assert_array_equal(back["EMG"].samples(10, 990), rec["EMG"].samples()[10:990])


def test_memory_stays_small(tmp_path):
    "Two minutes of one channel out of a file of 256 MB."
    n = 10_000_000
    with (tmp_path / "big.dat").open("wb") as f: f.truncate(n * 13 * 2)
    (tmp_path / "big.hea").write_text(f"big 13 200 {n}\n" + "big.dat 16 1/uV 16 0\n" * 13)
    scale = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    rec = read_wfdb(tmp_path / "big.hea")
    assert rec.duration == n / 200 and not rec["unnamed"].samples(n - 24_000).any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale - before < 150e6


def test_the_package_is_only_asked_for_what_we_cannot(tmp_path, monkeypatch):
    plain, flac = tmp_path / "plain", tmp_path / "flac"
    plain.mkdir(); flac.mkdir()
    d = np.arange(300).reshape(100, 3)
    a, b = read_wfdb(write(plain, d)), read_wfdb(write(flac, d, "516"))
    monkeypatch.setitem(sys.modules, "wfdb", None)
    assert a["EMG"].n_samples == len(a["EMG"].samples()) == 100
    with pytest.raises(ConfigError, match=r"pip install 'pftsleep\[psg\]'"): b["EMG"].samples()


# --- damage

def test_damage_is_seen(tmp_path):
    path = write(tmp_path, np.arange(3000).reshape(1000, 3))
    data = (tmp_path / "rec.dat").read_bytes()
    (tmp_path / "rec.dat").write_bytes(data[:4000])
    (issue,) = read_wfdb(path).issues
    assert issue.action == "repaired" and "1000 samples, the file holds 666" in issue.problem and read_wfdb(path)["ECG"].n_samples == 666
    (tmp_path / "rec.dat").write_bytes(data[:4000] + bytes([data[4000] ^ 1]) + data[4001:])
    (issue,) = read_wfdb(path).issues
    assert issue.action == "noted" and "checksums of ECG differ" in issue.problem # bytes 4000 and 4001 are the third signal's
    (tmp_path / "rec.dat").write_bytes(data + b"more")
    assert read_wfdb(path).issues == () # what follows isn't the record's
    rec = read_wfdb(path)
    (tmp_path / "rec.dat").write_bytes(data)
    with pytest.raises(ReadError, match="6004 bytes when it was opened and has 6000 now"): rec["ECG"].samples()


@pytest.mark.parametrize("name", ["../secret.dat", "/etc/passwd", "..", "sub/a.dat", "C:\\a.dat", "~/a.dat", "~", "a b.dat"])
def test_a_header_points_nowhere_else(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.dat").write_bytes(bytes(1000))
    (tmp_path / "in/rec.hea").write_text(f"rec 1 100 10\n{name} 16 1/uV\n")
    with pytest.raises(ReadError): read_wfdb(tmp_path / "in/rec.hea")


HEADER = "rec 3 100 1000 23:07:00 19/1/1989\n" + "".join(f"rec.dat {f} {g} 16 0 0 0 0 {n}\n" for f, g, n in (("16", "2.5/uV", "EEG C4-A1"), ("16", "10(-7)/uV", "EMG"), ("16", "1000/mV", "ECG"))) + "# 44 M\n"
WORDS = ["", "0", "-1", "1", "2", "999999999999999", "1e99", "1e-99", "nan", "inf", "-", "~", "..", "16", "212", "24", "516", "8", "508", "16x999", "16:999999999", "16+999999999999", "16x0", "x" * 500, "\t", "1/uV", "0/", "1(9999999999)/mV", "#", "\n", "\0", "é", "rec.dat", "rec.hea"]


@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from(WORDS) | st.text(max_size=12)), min_size=1, max_size=6))
@settings(max_examples=250)
def test_mutated_headers(tmp_path_factory, changes):
    "Any words in any place: a recording with bounded samples, or an error of ours."
    folder = tmp_path_factory.getbasetemp() / "mutated"
    folder.mkdir(exist_ok=True)
    if not (folder / "rec.dat").exists(): (folder / "rec.dat").write_bytes(np.random.default_rng(0).integers(0, 256, 6000, dtype="uint8").tobytes())
    words = HEADER.replace("\n", " \n ").split(" ")
    for at, word in changes: words[at % len(words)] = word
    (folder / "rec.hea").write_text(" ".join(words), encoding="utf-8")
    try:
        for c in read_wfdb(folder / "rec.hea").channels.values():
            assert c.n_samples <= 10_000 * 6000 * 10_000
            assert c.samples(0, min(c.n_samples, 100)).dtype == "float32"
    except PFTSleepError as e: assert "rec" in str(e)


@given(st.binary(max_size=600))
@settings(max_examples=150)
def test_garbage(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "garbage"
    folder.mkdir(exist_ok=True)
    for name, read in (("x.hea", read_wfdb), ("x.h5", read_dreem_h5), ("x.ids", read_ids), ("x.txt", read_isruc)):
        for content in (data, b"\x89HDF\r\n\x1a\n" + data if name == "x.h5" else b"x 1 100 9\nx.txt 16 1/uV\n" + data):
            (folder / name).write_bytes(content)
            try: read(folder / name)
            except PFTSleepError as e: assert name in str(e)


# --- Dreem

def dreem(path, signals, fs=250., description=None, **attrs):
    with h5py.File(path, "w") as f:
        for name, values in signals.items(): f[f"signals/{name}"] = values
        f.attrs["description"] = json.dumps([dict(path=f"signals/{n}", fs=fs, unit="") for n in signals]) if description is None else description
        f.attrs.update(attrs)
    return path


def test_dreem(tmp_path):
    x = np.random.default_rng(0).normal(0, 30, 7500).astype("float32")
    with h5py.File(dreem(tmp_path / "a.h5", {"eeg/C3_M2": x, "eog/EOG1": x * 2, "emg/ECG": x * 50}), "a") as f: f["hypnogram"] = np.array([4, -1], "int64")
    rec = read_signals(tmp_path / "a.h5")
    assert [(c.name, c.kind, c.unit, c.fs) for c in rec.channels.values()] == [("C3-M2", Kind.EEG, "uV", 250), ("ECG", Kind.ECG, "mV", 250), ("EOG1", Kind.EOG, "uV", 250)]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(rec))["C3-M2"].samples(100, 7000), x[100:7000])
    np.testing.assert_allclose(rec["ECG"].samples(), x * .05, rtol=1e-6)
    assert rec.hypnogram.stages.tolist() == [4, -1] and rec.start is None


def test_hdf5_does_not_lead_elsewhere(tmp_path):
    "Links, external storage and virtual data sets could read any file; a claim of terabytes could eat the memory."
    secret = dreem(tmp_path / "secret.h5", {"eeg/C3_M2": np.zeros(1000)})
    (tmp_path / "bytes").write_bytes(bytes(4000))
    with h5py.File(dreem(tmp_path / "a.h5", {"eeg/F3_M2": np.arange(1000.)}, description=json.dumps([dict(path=f"signals/eeg/{n}", fs=250) for n in ("F3_M2", "C3_M2", "C4_M1", "O1_M2", "O2_M1", "F4_M1")])), "a") as f:
        f["signals/eeg/C3_M2"] = h5py.ExternalLink("secret.h5", "signals/eeg/C3_M2")
        f["signals/eeg/C4_M1"] = h5py.SoftLink("/signals/eeg/F3_M2")
        f["signals"]["eeg"].create_dataset("O1_M2", 1000, "float32", external=[(str(tmp_path / "bytes"), 0, 4000)])
        layout = h5py.VirtualLayout(1000, "float64"); layout[:] = h5py.VirtualSource(str(secret), "signals/eeg/C3_M2", 1000)
        f["signals/eeg"].create_virtual_dataset("O2_M1", layout)
        f["signals/eeg"].create_dataset("F4_M1", 10**12, "float32", chunks=(1000,))
    rec = read_dreem_h5(tmp_path / "a.h5")
    assert list(rec.channels) == ["F3-M2"] and [i.action for i in rec.issues if "unit isn't stated" not in i.problem] == ["skipped"] * 5


@pytest.mark.parametrize("description, problem", [("[", "no JSON"), ("{}", "nothing says how fast"), ('[{"path": "signals/eeg/C3_M2", "fs": "soon"}]', "nothing says how fast"), ('[{"path": "signals/eeg/C3_M2", "fs": -1}]', "nothing says how fast"),
    ('[{"path": "signals/eeg/C3_M2", "fs": 1e300}]', "nothing says how fast"), ("[1, null]", "nothing says how fast")])
def test_a_description_that_makes_no_sense(tmp_path, description, problem):
    with pytest.raises(ReadError, match=problem): read_dreem_h5(dreem(tmp_path / "a.h5", {"eeg/C3_M2": np.zeros(100)}, description=description))


def test_hypnograms_that_make_no_sense(tmp_path):
    for bad in (np.array([0, 7]), np.zeros((2, 2)), np.array([np.nan])):
        with h5py.File(dreem(tmp_path / "a.h5", {"eeg/C3_M2": np.zeros(100)}), "a") as f: f["hypnogram"] = bad
        with pytest.raises(ReadError, match="hypnogram"): read_dreem_h5(tmp_path / "a.h5")


@given(st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 255)), min_size=1, max_size=20))
@settings(max_examples=80)
def test_damaged_hdf5(tmp_path_factory, changes):
    folder = tmp_path_factory.getbasetemp() / "h5"
    folder.mkdir(exist_ok=True)
    if not (folder / "whole.h5").exists():
        with h5py.File(dreem(folder / "whole.h5", {"eeg/C3_M2": np.arange(500.), "emg/ECG": np.arange(500.)}), "a") as f: f["hypnogram"] = np.zeros(5, int)
    data = bytearray((folder / "whole.h5").read_bytes())
    for at, value in changes: data[at % len(data)] = value
    (folder / "x.h5").write_bytes(data)
    try:
        for c in read_dreem_h5(folder / "x.h5").channels.values(): c.samples(0, min(100, c.n_samples))
    except PFTSleepError: pass


# --- files that we have

def test_endings(): assert set(READERS) == {".edf", ".bdf", ".rec", ".hea", ".h5"}


@shared
@pytest.mark.parametrize("name, seconds", [("tr00-0001", 166), ("tr00-0002", 33), ("tr00-0003", 5)])
def test_cinc_fixtures(name, seconds):
    from scipy.io import loadmat
    path = SHARED / f"fixtures/sleepfm/cinc/raw/{name}/{name}.hea"
    rec, steps = read_signals(path), loadmat(path.with_suffix(".mat"))["val"]
    assert rec.duration == seconds and list(rec.channels) == ["F3-M2", "F4-M1", "C3-M2", "C4-M1", "O1-M2", "O2-M1", "E1-M2", "Chin", "Abdomen", "Thorax", "Airflow", "SpO2", "ECG"]
    for c, x in zip(rec.channels.values(), steps, strict=True):
        np.testing.assert_allclose(c.samples(), x * (1e-3 if c.name == "ECG" else 1.), rtol=1e-6)
        assert (c.fs, c.unit) == (200, "mV" if c.name == "ECG" else "uV") # these headers say microvolts for everything, saturation included
    assert [i.action for i in rec.issues] == ["noted"] and "checksums" in rec.issues[0].problem # and have zeros for checksums


@shared
def test_a_real_cinc_header(tmp_path):
    "7.15 h of zeros behind the real header."
    text = (SHARED / "realdata/cinc2018/tr03-0005.hea").read_text()
    (tmp_path / "tr03-0005.hea").write_text(text)
    with pytest.raises(ReadError, match=r"tr03-0005\.mat, which isn't there"): read_signals(tmp_path / "tr03-0005.hea")
    with (tmp_path / "tr03-0005.mat").open("wb") as f: f.truncate(24 + 13 * 2 * 5_147_000)
    rec = read_signals(tmp_path / "tr03-0005.hea")
    assert (rec.duration, rec.start, len(rec.channels)) == (25735, None, 13)
    assert [c.unit for c in rec.channels.values()] == ["uV"] * 11 + ["%", "mV"]
    np.testing.assert_allclose(rec["SpO2"].samples(0, 3), 50, atol=.001) # step 0 of -32768 ... 32767
    assert len(rec.issues) == 1 and "F3-M2, F4-M1" in rec.issues[0].problem # the real night's checksums aren't those of zeros


@shared
def test_a_real_slpdb_header():
    with pytest.raises(ReadError, match=r"slp01a\.dat, which isn't there"): read_signals(SHARED / "realdata/hypnograms/slpdb/slp01a.hea")
