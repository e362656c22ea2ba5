"""Counts, raw acceleration, minutes and weeks: each value at its clock time, and nothing but our own errors for damaged files."""
import gzip
import importlib.util
import pickle
import sqlite3
import struct
import zipfile
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pftsleep.data.accelerometers import read_accelerometer
from pftsleep.data.actigraphy import depresjon_scores, on_clock, read_actigraphy, read_activity_csv, read_nhanes_r
from pftsleep.data.readers import WEARABLES, read_signals
from pftsleep.data.recording import Kind, Recording, array_channel
from pftsleep.data.signals import Recipe, apply_recipe
from pftsleep.data.store import create_store
from pftsleep.data.weeks import DAY, WEEK, WeekRule, cut_weeks, mark_nonwear, nonwear, stack_weeks, to_minutes, wear_by_day
from pftsleep.errors import ChannelError, ConfigError, PFTSleepError, ReadError, SignalError

SHARED = Path(__file__).parents[2] / "shared" / "realdata"
START = datetime(2021, 3, 26, 14, 17)
QUIET = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def week_of(counts, start=START, fs=1 / 60, **more) -> Recording:
    return Recording("p", {"Activity": array_channel("Activity", np.asarray(counts, "float32"), fs, "counts", "ACTIVITY")} | more, start, "p", "made up")


def ticks(t: datetime) -> int: return int((t - datetime(1, 1, 1)) / timedelta(microseconds=1)) * 10


def write_agd(path: Path, rows, options=(("epochlength", "10"), ("subjectname", "Erika Mustermann"), ("dateOfBirth", "621132192000000000"), ("deviceserial", "NEO1D"), ("machinename", "LAPTOP-ERIKA"))) -> Path:
    con = sqlite3.connect(path)
    con.execute("CREATE TABLE settings (settingID INTEGER PRIMARY KEY, settingName VARCHAR(64), settingValue VARCHAR(8192))")
    con.execute("CREATE TABLE data (dataTimestamp INTEGER, axis1 REAL, axis2 REAL, axis3 REAL, steps REAL, lux REAL)")
    con.executemany("INSERT INTO settings (settingName, settingValue) VALUES (?, ?)", options)
    con.executemany("INSERT INTO data VALUES (?, ?, ?, ?, ?, ?)", rows)
    con.commit(); con.close()
    return path


# --- rows at their times

@QUIET
@given(n=st.integers(20, 300), lost=st.lists(st.integers(1, 299), max_size=12), epoch=st.sampled_from([10, 15, 30, 60]), twice=st.lists(st.integers(1, 299), max_size=4), seed=st.integers(0, 99))
def test_a_row_is_where_its_time_says(n, lost, epoch, twice, seed):
    "Whatever rows are missing or doubled, in a generic CSV as a person would have it."
    rng = np.random.default_rng(seed)
    kept = sorted({k for k in range(n) if k not in lost} | {0} | {k for k in twice if k < n}) # row 0 sets the grid
    rows = sorted(kept + [k for k in twice if k < n])
    counts = {k: int(rng.integers(0, 999)) for k in kept}
    values, zero, issues = on_clock(np.array(rows) * float(epoch), {"a": np.array([counts[k] for k in rows])}, epoch, START, Path("a"))
    assert zero == START and len(values["a"]) == kept[-1] + 1
    for k, v in enumerate(values["a"]): assert np.isnan(v) if k not in counts else v == counts[k]
    missing = kept[-1] + 1 - len(kept)
    assert any("missing" in i.problem for i in issues) == (missing > 0) and any("several rows" in i.problem for i in issues) == (len(rows) > len(kept))


def test_clock_changes(tmp_path):
    "The two nights of a year, as local times without and with their offset."
    t = pd.date_range("2003-03-29 22:00", "2003-03-30 06:00", freq="min")
    t = t[(t < "2003-03-30 02:00") | (t >= "2003-03-30 03:00")]
    pd.DataFrame({"timestamp": t, "date": t.date, "activity": np.arange(len(t))}).to_csv(tmp_path / "control_9.csv", index=False)
    r = read_actigraphy(tmp_path / "control_9.csv")
    x = r["Activity"].samples()
    assert np.isnan(x[240:300]).all() and x[300] == 240 and "exactly an hour" in r.issues[0].problem # 03:00 is 300 minutes after 22:00
    u = pd.date_range("2014-10-25 22:00", "2014-10-26 06:00", freq="30s", tz="Europe/London")
    lines = [f"{s:%Y-%m-%d %H:%M:%S.%f%z} [Europe/London],{k}" for k, s in enumerate(u)]
    with gzip.open(tmp_path / "a.csv.gz", "wt") as f: f.write("time,acc\n" + "\n".join(lines))
    r = read_actigraphy(tmp_path / "a.csv.gz")
    x, told = r["Activity"].samples(), " ".join(map(str, r.issues))
    assert "from +0100 to +0000" in told and "goes back by 3570 s" in told
    twice = slice(3 * 120, 4 * 120) # 01:00 to 02:00 came twice
    assert np.isnan(x[twice]).all() and np.isfinite(x[:360]).all() and x[480] == 600 # 02:00 is five hours after 22:00 BST


def test_irregular_rows_are_dropped_or_refused(tmp_path):
    s = np.r_[np.arange(30) * 60., 30 * 60 + 25, np.arange(31, 60) * 60]
    values, _, issues = on_clock(s, {"a": np.ones(60)}, 60, START, Path("a"))
    assert np.isnan(values["a"][30]) and np.isfinite(np.delete(values["a"], 30)).all() and issues[0].action == "dropped"
    with pytest.raises(ReadError, match="off a grid"): on_clock(np.cumsum(np.random.default_rng(0).uniform(20, 90, 99)), {}, 60, START, Path("a.csv"))


@pytest.mark.parametrize(("text", "match"), [
    ("timestamp,date,activity\n01/02/2003 12:00,2003-05-07,0\n", "one way only"), ("timestamp,date,activity\n", "no rows"), ("a,b\n1,2\n", "which of its columns"),
    ("timestamp,date,activity\n2003-05-07 12:00:00,2003-05-07,-5\n", "no number from 0"), ("timestamp,date,activity\n2003-05-07 12:00:00,2003-05-07,x\n", "no number"),
    ("time,acc\n2014-05-07 13:29:50+0100,1\n2014-05-07 13:30:20,2\n", "some times have an offset"), ("timestamp,date,activity\n" + "2003-05-07 12:00:00,2003-05-07,1\n" * 5, "no regular distance"),
    ("timestamp,date,activity\n2003-05-07 12:00:00,d,1\n2003-05-07 12:01:00,d,1\n2003-05-01 12:00:00,d,1\n", "before the row|regular"), ("", "not a table"), ("\0\1\2", "isn't text")])
def test_what_could_mean_two_things_is_refused(tmp_path, text, match):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(PFTSleepError, match=match): read_actigraphy(tmp_path / "a.csv")


def test_activity_csv_takes_nothing_for_granted(tmp_path):
    p = tmp_path / "a.csv"
    p.write_text("Date;Time\n1;2\n")
    with pytest.raises(ReadError, match="there is no column"): read_activity_csv(p, "vm", "counts", "Date")
    p.write_text("day,clock,vm,off\n03/04/2020,12:00,1,0\n03/04/2020,12:01,2,2\n")
    with pytest.raises(ReadError, match="neither 0 nor 1"): read_activity_csv(p, "vm", "counts", ("day", "clock"), "%d/%m/%Y %H:%M", off_wrist="off")
    dmy, mdy = (read_activity_csv(p, "vm", "counts", ("day", "clock"), f"{f} %H:%M").start for f in ("%d/%m/%Y", "%m/%d/%Y"))
    assert (dmy, mdy) == (datetime(2020, 4, 3, 12), datetime(2020, 3, 4, 12))


# --- databases

def test_agd_keeps_the_person_out(tmp_path):
    p = write_agd(tmp_path / "a.agd", [(ticks(START) + k * 10**8, k, 2 * k, 3 * k, 1, 5) for k in range(30) if k not in (7, 8)])
    before = p.read_bytes()
    r = read_actigraphy(p)
    assert r.start == START and np.isnan(r["Activity"].samples()).sum() == 2 and r["Axis 3"].samples()[29] == 87 and r["White light"].unit == "lux"
    assert not any(word in repr((r, r.provenance, r.issues)) for word in ("Erika", "6211", "NEO1D", "LAPTOP"))
    assert p.read_bytes() == before and [q.name for q in tmp_path.iterdir()] == ["a.agd"] # nothing written beside it


def test_a_database_that_is_a_trap_is_refused(tmp_path):
    p = write_agd(tmp_path / "a.agd", [])
    with pytest.raises(ReadError, match="0 rows"): read_actigraphy(p)
    con = sqlite3.connect(p)
    con.execute("DROP TABLE data")
    con.execute("CREATE VIEW data AS WITH RECURSIVE n(dataTimestamp) AS (SELECT 1 UNION ALL SELECT dataTimestamp + 1 FROM n) SELECT dataTimestamp, 1 AS axis1 FROM n")
    con.commit(); con.close()
    with pytest.raises(ReadError, match="there is no table"): read_actigraphy(p)
    for wrong in ("'soon'", "-5", "9e18", "NULL"):
        q = write_agd(tmp_path / f"{abs(hash(wrong))}.agd", [(ticks(START), 1, 1, 1, 1, 1)])
        con = sqlite3.connect(q)
        con.execute(f"INSERT INTO data VALUES ({wrong}, 1, 1, 1, 1, 1)")
        con.commit(); con.close()
        with pytest.raises(ReadError): read_actigraphy(q)


# --- raw acceleration

def cwa(n=60, fs=98., lost=(), seed=0) -> tuple[bytes, np.ndarray]:
    "A device set to 100 Hz that takes `fs`; packed samples in steps of 1/256 g."
    x = np.random.default_rng(seed).integers(-300, 300, (n * 120, 3))
    blocks = []
    for k in range(n):
        t = k * 120 / fs
        part, c = int((t - int(t)) * 32768), datetime(2020, 2, 12, 9, 3, 37) + timedelta(seconds=int(t))
        stamp = c.year - 2000 << 26 | c.month << 22 | c.day << 17 | c.hour << 12 | c.minute << 6 | c.second
        v = x[k * 120:][:120]
        body = struct.pack("<2sHHIIIHHBBBBhH", b"AX", 508, part | 0x8000, 1, k, stamp, 300, 256, 0, 200, 0x4a, 0x30, -(part * 100 >> 15), 120) + ((v[:, 0] & 1023) | (v[:, 1] & 1023) << 10 | (v[:, 2] & 1023) << 20).astype("<u4").tobytes()
        blocks.append(body + struct.pack("<H", -int(np.frombuffer(body, "<u2").sum()) & 0xffff))
    return b"MD" + struct.pack("<H", 1020) + bytes(32) + b"\x4a" + bytes(987) + b"".join(b for k, b in enumerate(blocks) if k not in lost), (x / 256).astype("float32")


def gt3x(seconds=range(5), events=(), rate=30, bits=16, stray=b"") -> bytes:
    def record(kind, t, payload):
        body = struct.pack("<BBIH", 0x1e, kind, t, len(payload)) + payload
        return body + bytes([int(np.bitwise_xor.reduce(np.frombuffer(body, "u1"))) ^ 0xff])
    import io
    zero, out = int((START - datetime(1970, 1, 1)).total_seconds()), io.BytesIO()
    def samples(t):
        v = np.stack([np.arange(rate) + 100 * t, -np.arange(rate), np.full(rate, 256)], 1)
        if bits == 16: return 26, v.astype("<i2").tobytes()
        h = "".join(f"{n & 4095:03X}" for row in v[:, [1, 0, 2]] for n in row)
        return 0, bytes.fromhex(h + "0" * (len(h) % 2))
    log = sorted([(t, *samples(t)) for t in seconds] + [(t, 3, bytes([c])) for t, c in events])
    info = f"Serial Number: NEO1\nSample Rate: {rate}\nStart Date: {ticks(START)}\nLast Sample Time: {ticks(START) + (max(seconds) + 1) * 10**7}\nSubject Name: Erika\nAcceleration Scale: 256.0\n"
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z: z.writestr("info.txt", info); z.writestr("log.bin", stray + b"".join(record(kind, zero + t, p) for t, kind, p in log))
    return out.getvalue()


def test_cwa_and_its_gaps(tmp_path):
    raw, x = cwa(lost=(20, 21, 22))
    (tmp_path / "a.cwa").write_bytes(raw)
    r = read_accelerometer(tmp_path / "a.cwa")
    got, want = np.stack([r[a].samples() for a in "XYZ"], 1), x.copy()
    want[2400:2760] = np.nan
    np.testing.assert_array_equal(got, want)
    assert r["X"].fs == pytest.approx(98, abs=.001) and "3 gaps" not in str(r.issues) and any("1 gaps, 3.7 s" in str(i) for i in r.issues)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(r["Y"])).samples(2000, 3000), want[2000:3000, 1]) # as a worker gets it


def test_cwa_like_skdh(tmp_path):
    "On a sound file. (With blocks missing, that reader ends the process.)"
    pytest.importorskip("skdh")
    from skdh.io._extensions import read_axivity
    raw, x = cwa(fs=100.)
    (tmp_path / "a.cwa").write_bytes(raw)
    fs, _, theirs, t, _ = read_axivity(str(tmp_path / "a.cwa"))
    r = read_accelerometer(tmp_path / "a.cwa")
    ours = np.stack([r[a].samples() for a in "XYZ"], 1)
    np.testing.assert_array_equal(ours, theirs.astype("float32")); np.testing.assert_array_equal(ours, x)
    assert fs == 100 and abs((r.start - datetime(1970, 1, 1)).total_seconds() - t[0]) < .01


def test_one_damaged_block_costs_one_block(tmp_path):
    raw, x = cwa()
    (tmp_path / "a.cwa").write_bytes(raw[:1024 + 512 * 9 + 100] + b"?" + raw[1024 + 512 * 9 + 101:])
    r = read_accelerometer(tmp_path / "a.cwa")
    assert np.isnan(r["X"].samples()).sum() == 120 and any("1 of 60 blocks" in str(i) for i in r.issues)
    np.testing.assert_array_equal(r["Z"].samples(1200, 7200), x[1200:, 2])


@pytest.mark.parametrize("bits", [12, 16])
def test_gt3x(tmp_path, bits):
    (tmp_path / "a.gt3x").write_bytes(gt3x((0, 1, 2, 6, 7), ((3, 8), (5, 9)), bits=bits, stray=b"\x1e\1garbage"))
    r, h = (read_accelerometer(tmp_path / "a.gt3x", idle) for idle in ("nan", "hold"))
    x = r["X"].samples().reshape(8, 30) * 256
    assert r.start == START and np.isnan(x[3:6]).all() and x[6].tolist() == (np.arange(30) + 600).tolist() and (r["Y"].samples(0, 30) * 256).tolist() == (-np.arange(30)).tolist()
    held = h["X"].samples().reshape(8, 30) * 256
    assert (held[3:5] == 229).all() and np.isnan(held[5]).all() # second 5 is no idle second, and isn't there
    assert r["Idle"].samples().tolist() == [0, 0, 0, 1, 1, 0, 0, 0] and any("sound record" in str(i) for i in r.issues) and any("1 gaps" in str(i) for i in r.issues)
    assert "Erika" not in repr((r, r.provenance))


def test_gt3x_that_is_a_bomb_or_something_else(tmp_path, monkeypatch):
    monkeypatch.setattr("pftsleep.data.accelerometers._MAX_LOG", 1000)
    (tmp_path / "a.gt3x").write_bytes(gt3x(range(9)))
    with pytest.raises(ReadError, match="more than"): read_accelerometer(tmp_path / "a.gt3x")
    for names, match in ((("info.txt", "activity.bin"), "old kind"), (("night.txt",), "without info.txt")):
        with zipfile.ZipFile(tmp_path / "b.gt3x", "w") as z:
            for n in names: z.writestr(n, "x")
        with pytest.raises(ReadError, match=match): read_accelerometer(tmp_path / "b.gt3x")


def geneactiv(pages: np.ndarray, hz=50., skip=()) -> bytes:
    "The 59 lines of a header that devices write, of which we need the calibration, and pages of ten lines."
    device = ["Device Identity", "Device Unique Serial Code:012345", "Device Type:GENEActiv", "Device Model:1.1", "Device Firmware Version:Ver4", "Calibration Date:2012-01-01 00:00:00:000", "", "Device Capabilities", *["Range:0 to 1"] * 9, ""]
    setting = ["Configuration Info", f"Measurement Frequency:{hz:g} Hz", "Measurement Period:168 Hours", f"Start Time:{START}:000", "Time Zone:GMT +00:00", "", "Trial Info", *["Study:"] * 10, "", "Subject Info", "Device Location Code:left wrist", "Subject Code:Erika", *["Sex:"] * 6, ""]
    calibration = ["Calibration Data", *(f"{a} {w}" for a, o in zip("xyz", (100, -200, 0), strict=True) for w in ("gain:25600", f"offset:{o}")), "Volts:300", "Lux:800", "", "Memory Status", f"Number of Pages:{len(pages) - len(skip)}", ""]
    out = device + setting + calibration
    assert len(out) == 59
    for k, page in enumerate(pages):
        t = START + timedelta(seconds=k * 300 / hz)
        body = "".join(f"{a & 4095:03X}{b & 4095:03X}{c & 4095:03X}000" for a, b, c in page)
        if k not in skip: out += ["Recorded Data", "Device Unique Serial Code:012345", f"Sequence Number:{k}", f"Page Time:{t:%Y-%m-%d %H:%M:%S}:{t.microsecond // 1000:03}", "Unassigned:", "Temperature:21.5", "Battery voltage:4.1", "Device Status:Recording", f"Measurement Frequency:{hz}", body]
    return ("\r\n".join(out) + "\r\n").encode()


def test_geneactiv_like_skdh(tmp_path):
    pytest.importorskip("skdh")
    from skdh.io._extensions import read_geneactiv
    (tmp_path / "a.bin").write_bytes(geneactiv(np.random.default_rng(1).integers(-2048, 2048, (8, 300, 3))))
    n, fs, theirs, t, _, temperature = read_geneactiv(str(tmp_path / "a.bin"))
    r = read_accelerometer(tmp_path / "a.bin")
    np.testing.assert_array_equal(np.stack([r[a].samples() for a in "XYZ"], 1), theirs[:n].astype("float32"))
    assert (fs, n, t[0], temperature[0]) == (r["X"].fs, 2400, (r.start - datetime(1970, 1, 1)).total_seconds(), 21.5)


def test_geneactiv(tmp_path):
    codes = np.random.default_rng(1).integers(-2048, 2048, (8, 300, 3))
    (tmp_path / "a.bin").write_bytes(geneactiv(codes, skip=(3,)))
    r = read_accelerometer(tmp_path / "a.bin")
    want = ((codes * 100 - [100, -200, 0]) / 25600).astype("float32")
    want[3] = np.nan
    np.testing.assert_array_equal(np.stack([r[a].samples() for a in "XYZ"], 1), want.reshape(-1, 3))
    assert r.start == START and (r["Temperature"].samples(0, 9) == 21.5).all() and "Erika" not in repr((r, r.provenance))


# --- garbage

GARBAGE = {"a.cwa": cwa(8)[0], "a.gt3x": gt3x((0, 1, 4), ((2, 8), (3, 9))), "a.bin": geneactiv(np.zeros((3, 300, 3), int)), "a.AWD": b"x\r\n23-Jan-1918\r\n13:58\r\n 4 \r\n0\r\nV\r\nX\r\n" + b"12\r\n7 M\r\n" * 30,
    "a.csv": b"timestamp,date,activity\n" + b"".join(b"2003-05-07 12:%02d:00,2003-05-07,%d\n" % (m, m) for m in range(40)),
    "a.csv.gz": gzip.compress(b"time,acc,sleep\n" + b"".join(b"2014-05-07 13:%02d:50.439000+0100 [Europe/London],%d,1\n" % (m, m) for m in range(40)))}


@pytest.mark.parametrize("name", GARBAGE)
@QUIET
@given(data=st.data())
def test_damage_raises_our_errors_or_none(tmp_path_factory, name, data):
    raw = bytearray(GARBAGE[name])
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=20)): raw[at] = byte
    raw = raw[:data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    _survives(tmp_path_factory.mktemp("garbage") / name, bytes(raw))


def _survives(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    try:
        rec = read_signals(path)
        for c in rec.channels.values(): c.samples(0, min(c.n_samples, 5000))
    except PFTSleepError as e: assert path.name in str(e) or e.channel


@QUIET
@given(data=st.data())
def test_damaged_databases(tmp_path_factory, data):
    p = write_agd(tmp_path_factory.mktemp("garbage") / "a.agd", [(ticks(START) + k * 10**8, k, 0, 0, 0, 0) for k in range(40)])
    raw = bytearray(p.read_bytes())
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=20)): raw[at] = byte
    _survives(p, bytes(raw))


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/realdata is not here")
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_r_data(tmp_path_factory, data):
    pytest.importorskip("rdata")
    import lzma
    raw = bytearray(lzma.decompress((SHARED / "actigraphy/nhanes_r/unidata.rda").read_bytes()))
    for at, byte in data.draw(st.lists(st.tuples(st.one_of(st.integers(0, 200), st.integers(len(raw) - 400, len(raw) - 1)), st.integers(0, 255)), max_size=6)): raw[at] = byte
    p = tmp_path_factory.mktemp("garbage") / "a.rda"
    p.write_bytes(bytes(raw))
    try: read_nhanes_r(p)
    except PFTSleepError as e: assert "a.rda" in str(e)


def test_r_data_needs_its_package(tmp_path, monkeypatch):
    (tmp_path / "a.rda").write_bytes(b"RDX2\nX\n")
    monkeypatch.setitem(__import__("sys").modules, "rdata", None)
    with pytest.raises(ConfigError, match=r"pftsleep\[wear\]"): read_nhanes_r(tmp_path / "a.rda")
    assert importlib.util.find_spec("pftsleep.data.actigraphy")


# --- minutes

@QUIET
@given(second=st.integers(0, 59), epoch=st.sampled_from([5, 10, 15, 20, 30, 60]), n=st.integers(1, 400), lost=st.lists(st.integers(0, 399), max_size=9), seed=st.integers(0, 99))
def test_minutes_are_sums_by_the_clock(second, epoch, n, lost, seed):
    x = np.random.default_rng(seed).integers(0, 99, n).astype(float)
    x[[k for k in lost if k < n]] = np.nan
    start = START + timedelta(seconds=second)
    m = to_minutes(week_of(x, start, 1 / epoch))
    middle = [start + timedelta(seconds=(k + .5) * epoch) for k in range(n)]
    by_hand: dict[datetime, list[float]] = {}
    for t, v in zip(middle, x, strict=True): by_hand.setdefault(t.replace(second=0, microsecond=0), []).append(v)
    assert m.start == min(by_hand) and m["Activity"].n_samples == (max(by_hand) - min(by_hand)) // timedelta(minutes=1) + 1
    for k, v in enumerate(m["Activity"].samples()):
        cell = by_hand[m.start + timedelta(minutes=k)]
        want = sum(cell) if len(cell) == 60 // epoch else np.nan
        assert v == want or (np.isnan(v) and np.isnan(want))


def test_minutes_of_long_recordings_are_those_of_short_ones():
    "Blocks of minutes have no seams."
    x = np.random.default_rng(0).integers(0, 99, 6 * 60 * 11).astype(float)
    whole = to_minutes(week_of(x, START, .1))["Activity"].samples()
    np.testing.assert_array_equal(whole, x.reshape(-1, 6).sum(1))
    acc = {a: array_channel(a, np.random.default_rng(k).normal(0, .6, int(31.7 * 60 * 500)), 31.7, "g", "ACC") for k, a in enumerate("XYZ")}
    r = Recording("r", acc, START)
    enmo, mad = (to_minutes(r, how)["Activity"].samples() for how in ("enmo", "mad"))
    length = np.sqrt(sum(c.samples().astype("float64") ** 2 for c in acc.values()))
    for k in (0, 100, 239, 240, 241, 498):
        a, b = (int(np.ceil(j * 60 * 31.7 - .5)) for j in (k, k + 1))
        assert enmo[k] == pytest.approx(1000 * np.maximum(length[a:b] - 1, 0).mean(), rel=1e-5)
        windows = [length[int(np.ceil((60 * k + 5 * w) * 31.7 - .5)):int(np.ceil((60 * k + 5 * w + 5) * 31.7 - .5))] for w in range(12)]
        assert mad[k] == pytest.approx(1000 * np.concatenate([np.abs(w - w.mean()) for w in windows]).mean(), rel=1e-5)


def test_a_hole_of_a_sample_is_a_hole_in_its_minute():
    z = np.ones(50 * 60 * 3, "float32"); z[50 * 70] = np.nan
    r = Recording("r", {a: array_channel(a, z if a == "Z" else np.zeros_like(z), 50, "g", "ACC") for a in "XYZ"}, START)
    assert np.isnan(to_minutes(r, "enmo")["Activity"].samples()).tolist() == [False, True, False]
    assert to_minutes(r, "enmo", min_share=.9)["Activity"].samples().tolist() == [0, 0, 0]
    with pytest.raises(ChannelError, match="three axes in g"): to_minutes(replace(r, channels={a: replace(c, unit="m/s2") for a, c in r.channels.items()}), "enmo")


# --- wear

def test_nonwear_by_hand():
    z, off = np.zeros, lambda x, how: nonwear(np.asarray(x, float), how)
    assert off(np.r_[5, z(60), 5], "troiano").tolist() == [0, *[1] * 60, 0] and not off(np.r_[5, z(59), 5], "troiano").any()
    assert off(np.r_[z(30), 100, 100, z(28)], "troiano").all() and not off(np.r_[z(30), 101, z(29)], "troiano").any() and not off(np.r_[z(30), 1, 1, 1, z(30)], "troiano").any()
    assert off(np.r_[5, z(90), 5], "choi").tolist() == [0, *[1] * 90, 0] and not off(np.r_[5, z(89), 5], "choi").any()
    assert off(np.r_[5, z(30), 9999, 9999, z(58), 5], "choi")[1:-1].all() # 30 zeros on either side are enough
    assert not off(np.r_[5, z(29), 9, z(60), 5], "choi").any() # 29 aren't
    assert not off(np.r_[5, z(45), 1, 1, 1, z(45), 5], "choi").any()
    assert not off(np.r_[z(50), np.nan, z(50)], "choi")[:50].any()


@QUIET
@given(st.lists(st.sampled_from([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 50, 200]), max_size=600), st.sampled_from(["choi", "troiano"]))
def test_nonwear_only_covers_long_quiet(counts, how):
    x = np.asarray(counts, float)
    off = nonwear(x, how) == 1
    edges = np.flatnonzero(np.diff(np.r_[0, off, 0])).reshape(-1, 2)
    assert all(b - a >= (90 if how == "choi" else 60) and x[a] == 0 and x[b - 1] == 0 for a, b in edges)


# --- weeks

@QUIET
@given(days=st.integers(1, 24), extra=st.integers(0, DAY - 1), hour=st.integers(0, 23), minute=st.integers(0, 59), which=st.sampled_from(["midnight", "latest", "all", "start"]), partial=st.booleans(),
    gaps=st.lists(st.integers(0, 24 * DAY), max_size=5))
def test_each_minute_of_a_week_is_the_source_at_that_clock_time(days, extra, hour, minute, which, partial, gaps):
    n, start = days * DAY + extra, datetime(2021, 3, 26, hour, minute)
    x = np.arange(n, dtype=float)
    for g in gaps: x[g:g + 100] = np.nan
    weeks = cut_weeks(week_of(x, start), WeekRule(which, partial=partial))
    for w in weeks:
        a = int((w.start - start).total_seconds() // 60)
        k = np.arange(a, a + WEEK)
        inside = (k >= 0) & (k < n)
        want = np.where(inside, x[k.clip(0, n - 1)], np.nan).astype("float32")
        np.testing.assert_array_equal(w.values, want); np.testing.assert_array_equal(w.pad, np.isnan(want))
        assert w.at_midnight == (which != "start" or (hour, minute) == (0, 0)) and (inside.all() or partial)
    lead = 0 if which == "start" else -(hour * 60 + minute) % DAY
    whole = max(n - lead, 0) // DAY // 7
    if not gaps and not partial: assert len(weeks) == (whole if which == "all" else min(whole, 1))
    starts = [w.start for w in weeks]
    assert all(b - a >= timedelta(days=7) for a, b in pairwise(starts)) # no minute twice
    if whole and not partial and not gaps and which == "latest": assert starts[0] + timedelta(days=8) > start + timedelta(minutes=n)


def test_days_of_wear():
    x = np.random.default_rng(0).integers(1, 500, 10 * DAY).astype(float)
    x[2 * DAY + 8 * 60:4 * DAY] = 0
    r = mark_nonwear(week_of(x, datetime(2021, 3, 22)))
    assert wear_by_day(r)["worn"].tolist() == [1440, 1440, 480, 0, *[1440] * 6]
    assert cut_weeks(r, WeekRule(valid_days=5))[0].start == datetime(2021, 3, 22)
    assert cut_weeks(r, WeekRule(valid_days=6))[0].start == datetime(2021, 3, 25) # two later begins have the two days still
    assert cut_weeks(r, WeekRule("latest", valid_days=7)) == [] and cut_weeks(r, WeekRule(valid_days=6, wear_hours=8))[0].start == datetime(2021, 3, 22)
    kept, padded = (cut_weeks(r, WeekRule(non_wear=how))[0] for how in ("keep", "pad"))
    assert kept.pad.sum() == 0 and padded.pad.sum() == 960 + DAY and np.isnan(padded.values[padded.pad]).all()
    with pytest.raises(ChannelError, match="it is there already"): mark_nonwear(r)
    values, pad = stack_weeks([kept, padded], fill=0)
    assert values.dtype == np.float32 and pad.dtype == bool and (values[pad] == 0).all()


def test_epochs_become_weeks_of_minutes():
    "Ten-second counts are summed before they are cut."
    x = np.random.default_rng(0).integers(0, 99, 8 * DAY * 6).astype(float)
    w = cut_weeks(week_of(x, datetime(2021, 3, 22, 23), .1))[0]
    np.testing.assert_array_equal(w.values, x[360 * 1:].reshape(-1, 6).sum(1)[:WEEK])
    with pytest.raises(SignalError, match="no start"): cut_weeks(replace(week_of(x), start=None))


def test_weeks_survive_a_store(tmp_path):
    x = np.random.default_rng(0).integers(0, 9000, 8 * DAY).astype(float); x[500:900] = np.nan
    r = mark_nonwear(week_of(x))
    store = create_store(tmp_path / "store", Recipe.native(("Activity", "Off-wrist")))
    store.add(apply_recipe(r, Recipe.native(("Activity", "Off-wrist"))))
    back = store["p"]
    np.testing.assert_array_equal(back["Activity"].samples(), r["Activity"].samples()); np.testing.assert_array_equal(back["Off-wrist"].samples(), r["Off-wrist"].samples())
    assert back.start == r.start and back["Activity"].fs * 60 == pytest.approx(1) and back["Activity"].kind == Kind.ACTIVITY
    np.testing.assert_array_equal(cut_weeks(back)[0].values, cut_weeks(r)[0].values)


def test_endings_of_weeks(): assert set(WEARABLES) == {".agd", ".awd", ".csv", ".gz", ".cwa", ".bin", ".gt3x"}


def test_scores_of_depresjon_are_checked(tmp_path):
    (tmp_path / "scores.csv").write_text("number,days,gender,age,afftype,inpatient,madrs1,madrs2\ncondition_1,1,1,20-24,,,,\ncondition_1,1,1,20-24,,,,\n")
    with pytest.raises(ReadError, match="one person twice"): depresjon_scores(tmp_path / "scores.csv")
