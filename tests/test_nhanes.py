"""NHANES: transport files against oracles and garbage, minutes, labels, standardisation; the real files where they are."""
import io
import json
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
from dataclasses import replace
from datetime import datetime
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import StandardScaler

from pftsleep.data.nhanes import (CYCLES, PHQ9, convert_nhanes, drug_labels, ibm_floats, label_counts, nhanes_file, nhanes_labels, nhanes_recordings, nhanes_weeks, phq9_scores,
    read_nhanes_days, read_nhanes_header, read_table, read_weeks, read_xpt, sleep_labels, write_weeks, xpt_layout)
from pftsleep.data.simulate_nhanes import ibm_codes, simulate_nhanes, write_xpt
from pftsleep.data.splits import Split
from pftsleep.data.standardise import caveats, check_no_leak, column_zscore, global_zscore, load_standardiser, save_standardiser, standardise, subject_zscore
from pftsleep.data.store import find_damage, open_store
from pftsleep.data.weeks import Week, stack_weeks
from pftsleep.errors import ConfigError, PFTSleepError, ReadError, SplitError, StoreError

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "realdata"
real = pytest.mark.skipif(not (REAL / "nhanes_xpt").exists(), reason="../shared/realdata isn't here")


@pytest.fixture(scope="module")
def wrist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wrist")
    simulate_nhanes(folder, "H", n_subjects=5)
    return folder


@pytest.fixture(scope="module")
def hip(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hip")
    simulate_nhanes(folder, "D", n_subjects=4)
    return folder


# --- numbers

def oracle(code: int) -> float:
    "TS-140, in rational numbers."
    mantissa, top = code & (2**56 - 1), code >> 56
    if mantissa == 0: return np.nan if top in b"._ABCDEFGHIJKLMNOPQRSTUVWXYZ" else 0.
    return float((-1 if top & 128 else 1) * Fraction(mantissa, 2**56) * Fraction(16) ** ((top & 127) - 64))


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 255).map(lambda b: b << 56) | st.builds(lambda b, m: b << 56 | m << 3, st.integers(0, 255), st.integers(0, 2**53 - 1)), min_size=1, max_size=30))
def test_mainframe_numbers_are_what_the_note_says(codes):
    np.testing.assert_array_equal(ibm_floats(np.array(codes, "uint64")), [oracle(c) for c in codes])


@given(st.lists(st.floats(-1e70, 1e70).filter(lambda x: x == 0 or abs(x) > 1e-70), min_size=1, max_size=30))
def test_numbers_survive_being_written(numbers):
    np.testing.assert_array_equal(ibm_floats(ibm_codes(np.array(numbers))), numbers)


def test_every_missing_code_is_nan_and_zero_is_zero():
    codes = np.array([ord(c) << 56 for c in "._ABCDEFGHIJKLMNOPQRSTUVWXYZ"], "uint64")
    assert np.isnan(ibm_floats(codes)).all() and (ibm_floats(np.zeros(3, "uint64")) == 0).all()


# --- tables

texts = st.text("abcXYZ 019-", max_size=5).map(lambda s: s.rstrip().encode())


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(-10**6, 10**6), texts, st.floats(width=32, allow_nan=True, allow_infinity=False)), min_size=1, max_size=50), st.integers(1, 60), st.integers(2, 8))
def test_a_table_comes_back_whatever_the_chunk(rows, chunk, length):
    t = {"A": np.array([r[0] for r in rows], float), "T": np.array([r[1] for r in rows], "S5"), "X": np.array([r[2] for r in rows], float), "B": np.array([r[0] % 9 for r in rows], float)}
    t["X"][np.abs(t["X"]) < 1e-70] = 0
    with tempfile.TemporaryDirectory() as d:
        for name in ("T_H.xpt", "T_H.zip"):
            write_xpt(p := Path(d) / name, [t], lengths={"B": length})
            back = pd.concat(read_xpt(p, chunk=chunk))
            for c in "AXB": np.testing.assert_array_equal(back[c], t[c])
            assert back["T"].tolist() == [x.decode() for x in t["T"]]
            assert xpt_layout(p).table == "T_H"


@pytest.mark.parametrize("n", range(1, 40))
def test_narrow_rows_and_padding(n, tmp_path):
    "Rows narrower than a card: how many there are is seen from the blanks."
    write_xpt(tmp_path / "N_H.xpt", [{"W": np.array([b"ab", b"c"] * n, "S3")[:n]}])
    for chunk in (1, 7, 1000): assert sum(map(len, read_xpt(tmp_path / "N_H.xpt", chunk=chunk))) == n


def test_pandas_agrees(wrist, hip):
    for p in (*wrist.glob("*.xpt"), *hip.glob("*.xpt")):
        theirs, ours = pd.read_sas(p, format="xport", encoding="latin1"), read_table(p)
        assert list(ours) == list(theirs) and 0 <= len(ours) - len(theirs) <= (p.name.startswith("RXQ")) # pandas takes a last row of many blanks for padding
        for c in ours:
            if ours[c].dtype.kind == "f": np.testing.assert_array_equal(ours[c][:len(theirs)], theirs[c].mask(theirs[c].abs() < 1e-70, 0.))
            else: assert ours[c][:len(theirs)].tolist() == theirs[c].tolist()


def test_columns_are_chosen_and_named(wrist):
    p = wrist / "PAXMIN_H.xpt"
    assert list(next(read_xpt(p, ["paxmtsm", "SEQN"]))) == ["PAXMTSM", "SEQN"]
    with pytest.raises(ReadError, match="no column PAXINTEN.*it has SEQN"): read_table(p, ["PAXINTEN"])


def test_memory_does_not_grow_with_the_file(tmp_path):
    "Ten times the rows, the same peak."
    peaks = []
    piece = {"SEQN": np.zeros(60000), **{f"X{i}": np.arange(60000.) for i in range(6)}}
    for n in (4, 40):
        write_xpt(tmp_path / "BIG_H.xpt", ({**piece, "SEQN": np.full(60000, k + 1.)} for k in range(n)))
        tracemalloc.start()
        assert sum(len(t) for t in read_xpt(tmp_path / "BIG_H.xpt", ["SEQN", "X1"])) == 60000 * n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] and peaks[1] < 40e6


# --- garbage

def survives(read, data: bytes, name: str) -> None:
    "Damaged input is read, or refused by an error of ours."
    with tempfile.TemporaryDirectory() as d:
        (p := Path(d) / name).write_bytes(data)
        try: read(p)
        except PFTSleepError as e: assert str(e)


def small_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as d:
        n = 30
        one = np.ones(n)
        write_xpt(a := Path(d) / "PAXRAW_D.xpt", [{"SEQN": 7 * one, "PAXSTAT": one, "PAXCAL": one, "PAXDAY": one, "PAXN": np.arange(n) + 1., "PAXHOUR": 0 * one, "PAXMINUT": np.arange(n) * 1., "PAXINTEN": 5 * one}])
        b = np.array([b"1"] * n, "S1")
        write_xpt(m := Path(d) / "PAXMIN_H.xpt", [{"SEQN": 7 * one, "PAXDAYM": np.array([b"1"] * 10 + [b"2"] * 20), "PAXDAYWM": b, "PAXSSNMP": np.arange(n) * 4800., "PAXMTSM": one, "PAXPREDM": b, "PAXQFM": 0 * one}])
        write_xpt(z := Path(d) / "PAXRAW_C.zip", read_pieces(a))
        save_standardiser(column_zscore([week("1"), week("2")]), s := Path(d) / "by.npz")
        write_weeks([week("1"), week("2")], h := Path(d) / "weeks.h5")
        return {p.name: p.read_bytes() for p in (a, m, z, s, h)}


def read_pieces(path): return [{c: t[c].to_numpy() for c in t} for t in read_xpt(path)]


def week(subject: str, values=None, cohort: str = "nhanes-2013-14", unit: str = "MIMS", pad=None, start=datetime(1985, 1, 7)) -> Week:
    values = np.random.default_rng(int(subject)).gamma(1, 5, 10080).astype("float32") if values is None else np.asarray(values, "float32")
    return Week(f"{subject}_w1", subject, cohort, values, np.isnan(values) if pad is None else pad, start, unit)


GARBAGE = {"PAXRAW_D.xpt": lambda p: list(nhanes_recordings(p)), "PAXMIN_H.xpt": lambda p: list(nhanes_recordings(p)), "PAXRAW_C.zip": lambda p: list(nhanes_weeks(p)), "by.npz": load_standardiser, "weeks.h5": read_weeks}


SMALL = small_files()


@pytest.mark.parametrize("name", GARBAGE)
@settings(max_examples=150)
@given(data=st.data())
def test_damaged_files_raise_nothing_but_our_errors(name, data):
    whole = bytearray(SMALL[name])
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()) or not whole: whole = whole[:data.draw(st.integers(0, len(whole)))]
        else: whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    survives(GARBAGE[name], bytes(whole), name)


@given(st.binary(max_size=3000))
@settings(max_examples=60)
def test_any_bytes(data):
    for name, read in GARBAGE.items(): survives(read, data, name)
    head = b"HEADER RECORD*******LIBRARY HEADER RECORD!!!!!!!000000000000000000000000000000  "
    survives(read_table, head + data, "a.xpt")


def test_what_is_wrong_and_where(wrist, tmp_path):
    whole = (wrist / "DPQ_H.xpt").read_bytes()
    def of(data, name="a.xpt"): (p := tmp_path / name).write_bytes(data); return read_table(p)
    for data, says in ((whole[:-3], "middle of a row"), ((wrist / "PAXHD_H.xpt").read_bytes()[:-80], "middle of a row"), (whole[:500], "ends in"), (b"", "its first card"), (whole.replace(b"NAMESTR", b"NAMESTX"), "card NAMESTR"),
        (whole.replace(b"LIBRARY HEADER", b"LIBV8   HEADER", 1), "version 8"), (whole + whole, "more than one table")):
        with pytest.raises(ReadError, match=says): of(data)
    with pytest.raises(ReadError, match="can't be unpacked"): of(whole, "a.zip")
    with pytest.raises(ReadError, match="can't be read: No such file"): read_table(tmp_path / "none.xpt")
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as z: z.writestr("a.xpt", whole); z.writestr("b.XPT", whole)
    with pytest.raises(ReadError, match="holds 2 files"): read_table(tmp_path / "two.zip")


def test_a_crushed_archive_stays_out_of_memory(tmp_path):
    "A gigabyte of rows in a megabyte: they pass, one block after the other."
    with zipfile.ZipFile(tmp_path / "B_H.zip", "w", zipfile.ZIP_DEFLATED) as z, z.open("B_H.xpt", "w", force_zip64=True) as f:
        buffer = io.BytesIO()
        write_xpt(tmp_path / "B_H.xpt", [{"SEQN": np.ones(1), "T": np.array([b"x"], "S200")}])
        buffer.write((tmp_path / "B_H.xpt").read_bytes()[:9 * 80 + 320])
        f.write(buffer.getvalue())
        for _ in range(1300): f.write(bytes(208 * 1000))
        f.write(b" " * (-(208 * 1300000) % 80))
    tracemalloc.start()
    assert sum(len(t) for t in read_xpt(tmp_path / "B_H.zip", ["SEQN"])) == 1_300_000
    assert tracemalloc.get_traced_memory()[1] < 60e6
    tracemalloc.stop()


# --- minutes

def rewrite(path: Path, change, out: Path) -> Path:
    "The same table after `change` of its columns."
    table = read_table(path)
    table = change(table)
    texts = {c.name: c.length for c in xpt_layout(path).columns if not c.numeric}
    write_xpt(out, [{c: table[c].to_numpy(f"S{texts[c]}") if c in texts else table[c].to_numpy("float64") for c in table}])
    return out


def test_minutes_of_the_hip(hip):
    table = read_table(hip / "PAXRAW_D.xpt")
    for r in nhanes_recordings(hip / "PAXRAW_D.xpt"):
        own = table[table["SEQN"] == int(r.id)]
        np.testing.assert_array_equal(r["Activity"].samples(), own["PAXINTEN"].astype("float32"))
        assert (r["Activity"].unit, r["Activity"].kind, r.cohort, r.provenance["site"]) == ("counts", "ACTIVITY", "nhanes-2005-06", "hip")
        assert (r.start.isoweekday() % 7 + 1, r.start.hour) == (own["PAXDAY"].iloc[0], 0) and r["Activity"].fs == 1 / 60
        assert r.provenance["reliable"] == (own["PAXSTAT"].iloc[0] == 1) and "Off-wrist" not in r.channels


def test_minutes_of_the_wrist(wrist):
    table, header = read_table(wrist / "PAXMIN_H.xpt"), read_nhanes_header(wrist / "PAXHD_H.xpt")
    for r in nhanes_recordings(wrist / "PAXMIN_H.xpt", header):
        own = table[table["SEQN"] == int(r.id)].reset_index()
        x = r["Activity"].samples()
        np.testing.assert_array_equal(np.isnan(x), own["PAXMTSM"] == -.01)
        np.testing.assert_allclose(x[~np.isnan(x)], own["PAXMTSM"][~np.isnan(x)], rtol=1e-6)
        assert not np.isclose(np.nan_to_num(x), own["PAXAISMM"]).all()
        off = r["Off-wrist"].samples()
        for code, value in (("1", 0), ("2", 0), ("3", 1), ("4", np.nan)): np.testing.assert_array_equal(off[own["PAXPREDM"] == code], value)
        midnight = own.index[own["PAXDAYM"] == "2"][0]
        assert (r.start.hour * 60 + r.start.minute + midnight) % 1440 == 0
        assert r.start.isoweekday() % 7 + 1 == int(own["PAXDAYWM"][0]) == header.at[int(r.id), "weekday"]


def test_missing_minutes_are_gaps_at_their_place(hip, wrist, tmp_path):
    for path, counter in ((hip / "PAXRAW_D.xpt", "PAXN"), (wrist / "PAXMIN_H.xpt", "PAXSSNMP")):
        before = next(iter(nhanes_recordings(path)))
        cut = rewrite(path, lambda t: t.drop(index=range(100, 130)), tmp_path / path.name)
        after = next(iter(nhanes_recordings(cut)))
        x, y = before["Activity"].samples(), after["Activity"].samples()
        assert len(x) == len(y) and np.isnan(y[100:130]).all() and any("30 minutes are missing" in str(i) for i in after.issues), counter
        np.testing.assert_array_equal(np.delete(x, range(100, 130)), np.delete(y, range(100, 130)))


def test_the_first_row_need_not_be_the_first_minute(wrist, tmp_path):
    "Header and midnights still agree on when it was."
    header = read_nhanes_header(wrist / "PAXHD_H.xpt")
    cut = rewrite(wrist / "PAXMIN_H.xpt", lambda t: t.drop(index=range(45)), tmp_path / "PAXMIN_H.xpt")
    whole, with_header, without = (next(iter(nhanes_recordings(p, h))) for p, h in ((wrist / "PAXMIN_H.xpt", header), (cut, header), (cut, None)))
    assert (with_header.start - whole.start).total_seconds() == 45 * 60 and with_header.start == without.start


def test_contradictions_are_told(wrist, hip, tmp_path):
    header = read_nhanes_header(wrist / "PAXHD_H.xpt")
    late = header.assign(start=header["start"] + pd.Timedelta("1h"))
    assert any("by its midnights" in str(i) for i in next(iter(nhanes_recordings(wrist / "PAXMIN_H.xpt", late))).issues)
    def shift(t): t = t.copy(); t.loc[3000:10079, "PAXHOUR"] = (t.loc[3000:10079, "PAXHOUR"] + 1) % 24; t.loc[5, "PAXINTEN"] = 32767; t.loc[:10079, "PAXCAL"] = 2; return t
    issues = " ".join(map(str, next(iter(nhanes_recordings(rewrite(hip / "PAXRAW_D.xpt", shift, tmp_path / "PAXRAW_D.xpt")))).issues))
    assert "7080 minutes don't agree" in issues and "32767, the most" in issues and "within calibration: no" in issues


@pytest.mark.parametrize(("column", "value", "says"), [("PAXN", 3., "PAXN in row"), ("PAXN", 2.5, "PAXN in row 6 is 2.5"), ("PAXINTEN", -1., "PAXINTEN in row 6 is -1"), ("PAXHOUR", 24., "PAXHOUR in row 6"), ("PAXDAY", 0., "PAXDAY in row 6"), ("PAXN", 1e12, "PAXN in row 6")])
def test_impossible_rows_are_refused(column, value, says, hip, tmp_path):
    def change(t): t = t.copy(); t.loc[5, column] = value; return t
    path = rewrite(hip / "PAXRAW_D.xpt", change, tmp_path / "PAXRAW_D.xpt")
    with pytest.raises(ReadError, match=says): next(iter(nhanes_recordings(path)))
    ledger = convert_nhanes(path, tmp_path / "store")
    assert (len(ledger.failed), len(ledger.of("done"))) == (1, 3) and says.split(" ")[0] in ledger.failed[0].message
    assert len(pd.read_parquet(tmp_path / "store" / "ledger_nhanes.parquet")) == 4


def test_rows_of_a_person_stand_together(hip, tmp_path):
    mixed = rewrite(hip / "PAXRAW_D.xpt", lambda t: pd.concat([t[:500], t[10080:], t[500:10080]]), tmp_path / "PAXRAW_D.xpt")
    with pytest.raises(ReadError, match="begin again in row.*sort the table by SEQN"): list(nhanes_recordings(mixed))


@pytest.mark.parametrize("seqn", [np.nan, -1., 1.5])
def test_a_person_has_a_number(seqn, hip, tmp_path):
    with pytest.raises(ReadError, match="SEQN in row 1"): next(iter(nhanes_recordings(rewrite(hip / "PAXRAW_D.xpt", lambda t: t.assign(SEQN=seqn), tmp_path / "PAXRAW_D.xpt"))))


def test_idle_samples_are_no_activity(wrist, tmp_path):
    "A table with PAXAISMM and without PAXMTSM isn't read as activity."
    path = rewrite(wrist / "PAXMIN_H.xpt", lambda t: t[:2000].drop(columns="PAXMTSM"), tmp_path / "PAXMIN_H.xpt")
    with pytest.raises(ReadError, match="neither PAXINTEN nor PAXMTSM"): next(iter(nhanes_recordings(path)))


def test_days_and_header(wrist):
    days, header = read_nhanes_days(wrist / "PAXDAY_H.xpt"), read_nhanes_header(wrist / "PAXHD_H.xpt")
    for r in nhanes_recordings(wrist / "PAXMIN_H.xpt", header):
        own = days.loc[int(r.id)]
        assert own["minutes"].sum() == r["Activity"].n_samples and own["off"].sum() == (r["Off-wrist"].samples() == 1).sum() and own["wake"].sum() == (r["Wake"].samples() == 1).sum()
        assert r.provenance["hand"] == "non-dominant"
    assert not any("NEO1G" in str(v) for v in header.to_numpy().ravel()) # serial numbers stay out


def test_a_store_is_resumed_and_sound(wrist, hip, tmp_path):
    store = tmp_path / "store"
    first = convert_nhanes(wrist / "PAXMIN_H.xpt", store, wrist / "PAXHD_H.xpt")
    assert not first.failed and len(convert_nhanes(wrist / "PAXMIN_H.xpt", store).of("skipped")) == len(first.outcomes)
    assert len(convert_nhanes(wrist / "PAXMIN_H.xpt", tmp_path / "late").of("done")) == len(first.outcomes) # the header came later: it says when minute 0 was, so what is there is no longer true
    assert len(convert_nhanes(wrist / "PAXMIN_H.xpt", tmp_path / "late", wrist / "PAXHD_H.xpt").of("done")) == len(first.outcomes)
    assert len(convert_nhanes(wrist / "PAXMIN_H.xpt", tmp_path / "late", wrist / "PAXHD_H.xpt").of("skipped")) == len(first.outcomes)
    convert_nhanes(hip / "PAXRAW_D.xpt", store)
    s, people = open_store(store), pd.read_parquet(store / "participants.parquet")
    assert len(s) == len(people) == 9 and set(people["cycle"]) == {"D", "H"} and set(s.manifest["cohort"]) == {"nhanes-2005-06", "nhanes-2013-14"}
    for r in nhanes_recordings(wrist / "PAXMIN_H.xpt"):
        for name, c in r.channels.items(): np.testing.assert_array_equal(s[r.id][name].samples(), c.samples())
        assert find_damage(store / "recordings" / f"{r.id}.zarr") == []


def test_weeks_in_a_file(wrist, hip, tmp_path):
    weeks = list(nhanes_weeks(wrist / "PAXMIN_H.xpt"))
    assert write_weeks(weeks, tmp_path / "w.h5") == 5
    back = read_weeks(tmp_path / "w.h5")
    for a, b in zip(weeks, back, strict=True):
        np.testing.assert_array_equal(a.values, b.values); np.testing.assert_array_equal(a.pad, b.pad)
        assert (a.id, a.subject, a.cohort, a.start, a.unit, a.group) == (b.id, b.subject, b.cohort, b.start, b.unit, b.group)
    assert read_weeks(tmp_path / "w.h5", slice(0, 0)) == [] and write_weeks([], tmp_path / "none.h5") == 0 and read_weeks(tmp_path / "none.h5") == []
    with pytest.raises(PFTSleepError, match="MIMS, counts"): write_weeks([*weeks, *nhanes_weeks(hip / "PAXRAW_D.xpt")], tmp_path / "mixed.h5")
    with pytest.raises(StoreError): read_weeks(tmp_path / "w.h5", [99])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["none.h5", "w.h5"] # nothing half-written


# --- labels

def test_phq9_needs_all_nine():
    t = pd.DataFrame({"SEQN": range(1, 6), **{c: [0., 1, 2, 3, 1] for c in PHQ9}})
    t.loc[1, "DPQ050"], t.loc[2, "DPQ090"], t.loc[3, "DPQ010"] = 7, 9, np.nan
    np.testing.assert_array_equal(phq9_scores(t), [0, np.nan, np.nan, np.nan, 9])
    with pytest.raises(ReadError, match="DPQ020 of SEQN 5 is 4"): phq9_scores(t.assign(DPQ020=[0, 0, 0, 0, 4]))


@pytest.mark.parametrize(("told", "hours", "disorder", "odd"), [(1, 7, 1, 1), (2, 7, 0, 0), (2, 5, 0, 1), (2, 6, 0, 0), (2, 11, 0, 0), (2, 12, 0, 1), (9, 7, None, None), (7, 4, None, None), (1, 77, None, None), (2, 99, None, None), (2, None, None, None), (None, 7, None, None)])
def test_sleep_labels(told, hours, disorder, odd):
    row = sleep_labels(pd.DataFrame({"SEQN": [5], "SLQ060": [told], "SLD010H": [hours]}, dtype=float)).iloc[0]
    np.testing.assert_array_equal(row[["sleep_disorder", "sleep_abnormality"]].astype(float), np.array([disorder, odd], float))


@pytest.mark.parametrize(("use", "drug", "benzodiazepine", "ssri"), [(1, "ALPRAZOLAM", 1, 0), (1, "ESCITALOPRAM OXALATE", 0, 1), (1, "CHLORDIAZEPOXIDE; CLIDINIUM", 1, 0), (1, "ZOLPIDEM", 0, 0), (1, "VILAZODONE", 0, 0), (1, "VENLAFAXINE", 0, 0),
    (1, "FLUOXETINE; OLANZAPINE", 0, 1), (1, "DULOXETINE", 0, 0), (1, "55555", 0, 0), (2, "", 0, 0), (7, "", None, None), (9, "", None, None), (None, "", None, None)])
def test_drug_labels(use, drug, benzodiazepine, ssri):
    row = drug_labels(pd.DataFrame({"SEQN": [5.], "RXDUSE": np.array([use], float), "RXDDRUG": [drug]})).iloc[0]
    np.testing.assert_array_equal(row[["benzodiazepine", "ssri"]].astype(float), np.array([benzodiazepine, ssri], float))


def test_one_table_of_labels(wrist):
    labels = nhanes_labels(wrist, "H")
    assert labels.index.is_unique and len(labels) == 5
    counts = label_counts(labels)
    assert (counts[["positive", "negative", "unlabelled"]].sum(axis=1) == 5).all()
    assert (label_counts(labels, [*labels.index[:2], 1])[["positive", "negative", "unlabelled"]].sum(axis=1) == 3).all() # somebody who isn't in the table is unlabelled
    assert nhanes_file(wrist, "dpq", "h") == wrist / "DPQ_H.xpt" and nhanes_file(wrist, "DPQ", "G") is None
    with pytest.raises(ReadError, match="no DEMO, DPQ, SLQ or RXQ_RX of cycle G"): nhanes_labels(wrist, "G")


@real
def test_the_real_questionnaire_and_header():
    folder = REAL / "nhanes_xpt"
    for name in ("DPQ_D.xpt", "PAXHD_H.xpt"):
        theirs, ours = pd.read_sas(folder / name, format="xport", encoding="latin1"), read_table(folder / name)
        for c in ours:
            if ours[c].dtype.kind == "f": np.testing.assert_array_equal(ours[c], theirs[c].mask(theirs[c].abs() < 1e-70, 0.))
            else: assert ours[c].tolist() == theirs[c].tolist()
    labels = nhanes_labels(folder, "D")
    counts = label_counts(labels).loc["depression"]
    assert (len(labels), counts["positive"] + counts["negative"], round(counts["prevalence"], 1)) == (5334, 4799, 6.2)
    header = read_nhanes_header(folder / "PAXHD_H.xpt")
    assert (len(header), int((header["status"] == "data").sum()), int(header["start"].notna().sum())) == (8913, 7776, 7776)
    assert header["start"].min() >= pd.Timedelta("9h") and set(header["weekday"].dropna()) <= set(range(1, 8))


@real
def test_real_people_join_their_answers():
    rdata = pytest.importorskip("rdata")
    counts = rdata.read_rda(REAL / "actigraphy/nhanes_r/example_activity_data.RData")["example_activity_data"]["count"]
    people = {int(i) for i in counts["ID"]}
    joined = nhanes_labels(REAL / "nhanes_xpt", "D").reindex(sorted(people)).dropna(how="all", axis=0)
    scores = nhanes_labels(REAL / "nhanes_xpt", "D").loc[lambda t: t.index.isin(people), "phq9"]
    assert (len(people), len(scores), int(scores.notna().sum()), scores[scores >= 10].tolist(), scores.nlargest(2).tolist()) == (50, 18, 17, [26.], [26., 8.]) and len(joined) == 17


# --- standardisation

def holed(subject: str, share: float = .1) -> Week:
    w = week(subject)
    return week(subject, np.where(np.random.default_rng(int(subject)).random(10080) < share, np.nan, w.values))


def test_columns_are_those_of_scikit_learn(monkeypatch):
    weeks = [holed(str(i)) for i in range(1, 12)]
    for w in weeks: w.values[17] = 3.25; w.pad[17] = False; w.values[18] = np.nan; w.pad[18] = True
    monkeypatch.setattr("pftsleep.data.standardise._batches", lambda ws: ([w] for w in ws)) # one by one: the merging counts
    by, theirs = column_zscore(weeks), StandardScaler().fit(np.stack([w.values for w in weeks if True]).astype("float64")[:, np.arange(10080) != 18])
    keep = np.arange(10080) != 18
    np.testing.assert_allclose(by.mean[keep], theirs.mean_, rtol=1e-12)
    np.testing.assert_allclose(by.sd[keep], theirs.scale_, rtol=1e-12)
    assert by.sd[17] == 1 and (by.mean[18], by.sd[18]) == (0, 1)
    x, pad = standardise(weeks, by)
    assert np.isfinite(x).all() and (x[pad] == 0).all() and (x[:, 17] == 0).all()


def test_one_pair_for_a_cohort():
    weeks = [holed(str(i), .3) for i in range(1, 6)]
    by, valid = global_zscore(iter(weeks)), np.concatenate([w.values[~w.pad] for w in weeks]).astype("float64")
    np.testing.assert_allclose([by.mean[0], by.sd[0]], [valid.mean(), valid.std()], rtol=1e-12)


def test_a_week_by_itself_is_marked():
    by = subject_zscore("MIMS")
    weeks = [holed("1"), holed("2"), week("3", np.full(10080, 4.))]
    x, pad = standardise(weeks, by)
    for row, gaps in zip(x[:2], pad[:2], strict=True): np.testing.assert_allclose([row[~gaps].mean(), row[~gaps].std()], [0, 1], atol=1e-5)
    assert (x[2] == 0).all() and by.off_distribution and "OFF-DISTRIBUTION" in repr(by) and "no published model" in caveats(weeks, by)[0]


def test_nobody_who_is_judged_is_fitted_on():
    weeks = [week(str(i)) for i in range(1, 7)]
    split = Split({"train": ("1_w1", "2_w1", "3_w1"), "test": ("4_w1", "5_w1", "6_w1")}, {w.id: w.subject for w in weeks})
    for fit in (column_zscore, global_zscore):
        by = fit(weeks[:3], split)
        assert (by.split, by.part, by.n, by.cohort) == (split.hash, "train", 3, "nhanes-2013-14")
        check_no_leak(by, weeks[3:]); check_no_leak(by, ["4", "5"])
        with pytest.raises(SplitError, match="isn't of the part 'train'"): fit(weeks, split)
        for judged in (weeks[2:4], ["3"]):
            with pytest.raises(SplitError, match="1 of those who are judged"): check_no_leak(by, judged)
        check_no_leak(by, [replace(weeks[0], cohort="another")]) # the same key in another study is another person
        with pytest.raises(SplitError, match="no part 'valid'"): fit(weeks, split, "valid")
    check_no_leak(subject_zscore("MIMS"), weeks)


def test_what_does_not_fit_is_refused():
    by = column_zscore([week("1"), week("2")])
    noon = replace(week("3"), start=datetime(1985, 1, 7, 12))
    with pytest.raises(ConfigError, match="don't fit the columns"): standardise([noon], by)
    with pytest.raises(ConfigError, match="is in counts"): standardise([week("3", unit="counts")], by)
    for other in (week("3", cohort="nhanes-2011-12"), week("3", unit="counts"), noon):
        with pytest.raises(ConfigError, match="several kinds"): column_zscore([week("1"), other])
    assert caveats([week("3", cohort=None)], by)[-1] == "weeks of no cohort were standardised by nhanes-2013-14"


def test_numbers_are_kept(tmp_path):
    for by in (column_zscore([week("1"), holed("2")]), global_zscore([week("1")]), subject_zscore("counts")):
        save_standardiser(by, tmp_path / "a.npz")
        back = load_standardiser(tmp_path / "a.npz")
        np.testing.assert_array_equal(back.mean, by.mean); np.testing.assert_array_equal(back.sd, by.sd)
        assert {k: v for k, v in vars(back).items() if k not in ("mean", "sd")} == {k: v for k, v in vars(by).items() if k not in ("mean", "sd")}
    np.savez(tmp_path / "b.npz", mean=np.zeros(3), sd=np.array([1, 0, 1.]), facts=np.frombuffer(json.dumps(dict(format="pftsleep-standardiser/1", strategy="column", unit="MIMS", cohort="", n=1, split="", part="", at_midnight=True, people=[])).encode(), "uint8"))
    with pytest.raises(ReadError, match="make no sense"): load_standardiser(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", mean=np.array([object()]), sd=np.ones(1), facts=np.zeros(1, "uint8"))
    with pytest.raises(ReadError, match="can't be read"): load_standardiser(tmp_path / "c.npz") # a pickle


# --- simulation and jobs

def test_simulation_is_the_same_each_time(tmp_path):
    for cycle in CYCLES:
        few, more = simulate_nhanes(tmp_path / "a", cycle, 3, seed=4, zipped=True), simulate_nhanes(tmp_path / "b", cycle, 3, seed=4, zipped=True)
        pd.testing.assert_frame_equal(few, more)
    for p in (tmp_path / "a").iterdir(): assert p.read_bytes() == (tmp_path / "b" / p.name).read_bytes()


def test_the_way_from_files_to_weeks_and_labels(tmp_path):
    for cycle in "CH": simulate_nhanes(tmp_path / "files", cycle, 4, zipped=cycle == "C")
    def run(name, *arguments):
        config = ROOT / "jobs/nhanes" / ("store.yaml" if "store" in name else "labels.yaml")
        done = subprocess.run([sys.executable, ROOT / "jobs/nhanes" / name, "--config", config, *map(str, arguments)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout
    said = run("build_store.py", tmp_path / "files", tmp_path / "store")
    assert "D: no file of minutes" in said and "C: 4 done, 0 skipped, 0 failed" in said and len(open_store(tmp_path / "store")) == 8
    assert stack_weeks(read_weeks(tmp_path / "store" / "weeks_H.h5"))[0].shape == (4, 10080)
    assert "those with minutes" in run("build_labels.py", tmp_path / "files", tmp_path / "labels", tmp_path / "store")
    assert pd.read_csv(tmp_path / "labels/counts_H.csv")["task"].tolist() == ["benzodiazepine", "ssri", "sleep_disorder", "sleep_abnormality", "depression"]
    assert set(yaml.safe_load((ROOT / "jobs/nhanes/store.yaml").read_text())) == {"source", "store", "cycles", "rule"}
