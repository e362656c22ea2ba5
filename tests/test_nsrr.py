"""The NSRR's studies end to end: a simulated tree in the real layout, converted, compared with the truth. And what can be wrong with their files."""
import math
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pftsleep.data.cohorts import find_nights
from pftsleep.data.convert import convert, read_night
from pftsleep.data.edf import read_edf
from pftsleep.data.hypnograms import read_annotations
from pftsleep.data.mesa_actigraphy import actigraphy_overlap, align_actigraphy, during, read_mesa_actigraphy
from pftsleep.data.montage import apply_montage
from pftsleep.data.nsrr import CFS, MESA, MROS, NSRR, SHHS
from pftsleep.data.signals import Recipe
from pftsleep.data.simulate_nsrr import simulate_study
from pftsleep.data.store import open_store
from pftsleep.data.wsc_apples import WSC_APPLES
from pftsleep.errors import PFTSleepError, ReadError

SHARED = Path(__file__).parents[2] / "shared"
COHORTS = {**NSRR, **WSC_APPLES}
CHANNELS = { # what a model would ask for, by canonical name
    "shhs": ("C4-M1", "C3-M2", "E1", "E2", "Chin", "ECG", "SpO2", "HR", "Thorax", "Abdomen", "Airflow"),
    "mesa": ("C4-M1", "Fz-Cz", "Cz-Oz", "E1-Fpz", "E2-Fpz", "Chin", "ECG", "SpO2", "HR", "Thorax", "Abdomen", "Nasal pressure"),
    **dict.fromkeys(("mros", "cfs", "ccshs", "chat", "sof", "nchsdb"), ("C4-M1", "C3-M2", "E1-M2", "E2-M1", "Chin", "ECG", "SpO2", "Thorax", "Abdomen", "Airflow")),
    "wsc": ("C3-M2", "O1-M2", "E1-M2", "E2-M1", "Chin", "ECG", "SpO2", "Thorax", "Abdomen", "Airflow"),
    "apples": ("C4-M1", "C3-M2", "E1-M2", "E2-M1", "Chin", "ECG", "SpO2", "Pulse", "Thorax", "Abdomen", "Airflow")}
RATES = {"HR": "HR", "Pulse": "HR"} # canonical name -> what the simulator calls it
EVENTS = {"Hypopnea": "hypopnea", "Obstructive apnea": "apnea_obstructive", "Central apnea": "apnea_central", "SpO2 desaturation": "desaturation", "Arousal": "arousal"}


@pytest.fixture(scope="module", params=list(COHORTS))
def study(request, tmp_path_factory):
    "One study: its name, the nights that were written, and the store that `convert` made of them."
    folder = tmp_path_factory.mktemp(request.param)
    nights = simulate_study(request.param, folder / "files", n_subjects=2, hours=.1)
    with ThreadPoolExecutor(1) as executor: ledger = convert(COHORTS[request.param], folder / "files", folder / "store", Recipe.native(channels=CHANNELS[request.param]), executor)
    assert not ledger.failed, str(ledger)
    return request.param, nights, open_store(folder / "store")


def test_every_night_is_there_with_its_person(study):
    name, nights, store = study
    table = store.manifest.set_index("id")
    assert sorted(table.index) == sorted(n.id for n in nights)
    assert {n.id: n.subject for n in nights} == table["subject"].to_dict()
    if name in ("shhs", "mros", "chat", "nchsdb", "wsc"): assert table["subject"].nunique() == len(nights) / 2 # both visits are one person


def test_stages_are_the_truth_epoch_by_epoch(study):
    _, nights, store = study
    for n in nights:
        kept, h = store[n.id], n.truth.hypnogram
        epochs = int((n.truth.duration - h.onset) / 30)
        assert kept.hypnogram.epoch_length == 30
        assert kept.hypnogram.stages.tolist() == h.stages[:epochs].tolist(), n.id
        assert (kept.start - n.truth.start) == timedelta(seconds=h.onset)


def test_signals_are_the_truth_within_a_step(study):
    name, nights, store = study
    for n in nights:
        kept, raw = store[n.id], {c.source_label: c for c in read_edf(n.signals).channels.values()}
        assert tuple(kept.channels) == CHANNELS[name]
        for channel in CHANNELS[name]:
            truth, found = n.truth[RATES.get(channel, channel)], kept[channel]
            sources = [raw[label] for label in found.source_label.split(" - ")]
            step = sum(c.resolution * (1e-3 if (c.unit, found.unit) == ("uV", "mV") else 1) for c in sources)
            first = math.ceil(n.truth.hypnogram.onset * truth.fs - 1e-6) # the first sample that is not before the first epoch
            expected = truth.samples()[first:first + found.n_samples]
            assert found.fs == truth.fs and len(expected) == found.n_samples
            assert np.abs(found.samples() - expected).max() <= 1.01 * step, (n.id, channel)
        assert kept["SpO2"].unit == "%" and kept["ECG"].unit == "mV" and kept[CHANNELS[name][0]].unit == "uV"


def test_events_are_kept_where_they_were(study):
    name, nights, store = study
    for n in nights:
        found, h = store[n.id].events, n.truth.hypnogram
        wanted = n.truth.events.assign(name=n.truth.events["name"].map(EVENTS), onset=n.truth.events["onset"] - h.onset)
        if name == "wsc": wanted = wanted[wanted["name"].str.contains("pnea") & ("visit1" in n.id)] # the other program's events are in files of their own
        wanted = wanted[wanted["onset"] >= 0]
        kept = found[found["name"].isin(EVENTS.values()) & (found["onset"] >= 0)]
        assert list(zip(kept["name"], kept["onset"].round(1), kept["duration"].round(1), strict=True)) == list(zip(wanted["name"], wanted["onset"], wanted["duration"], strict=True)), n.id


# --- traps

def test_profusion_is_read_where_the_nsrrs_xml_is_missing(tmp_path):
    night, *_ = simulate_study("shhs", tmp_path, 1, .05)
    night.annotations[0].unlink()
    found = find_nights(SHHS, tmp_path)[0]
    assert found.annotations[0].name == "shhs1-200001-profusion.xml"
    assert read_night(found, SHHS).hypnogram.stages.tolist() == night.truth.hypnogram.stages.tolist()


def test_an_impossible_date_costs_the_clock_and_nothing_else(tmp_path):
    "SHHS's recordings were dated 00.00.00 until 2016."
    night, *_ = simulate_study("shhs", tmp_path, 1, .05)
    with night.signals.open("r+b") as f:
        f.seek(88); f.write(b" " * 80) # plain EDF has no second date
        f.seek(168); f.write(b"00.00.00")
    rec = read_night(find_nights(SHHS, tmp_path)[0], SHHS)
    assert rec.start is None and rec.hypnogram.stages.tolist() == night.truth.hypnogram.stages.tolist()


def test_flags_of_fallen_electrodes_are_no_signals(tmp_path):
    simulate_study("mesa", tmp_path, 1, .05)
    rec = read_night(find_nights(MESA, tmp_path)[0], MESA)
    assert not [n for n, c in rec.channels.items() if c.source_label.endswith("_Off")]
    assert sum("*_Off" in str(i) for i in rec.issues) == 3


def test_nights_whose_stages_are_known_to_be_wrong_are_left_out(tmp_path):
    for who in ("aa0001", "aa2033", "aa5660"): (tmp_path / f"mros-visit1-{who}.edf").touch()
    (tmp_path / "mros-visit2-aa2033.edf").touch()
    assert [n.id for n in find_nights(MROS, tmp_path)] == ["mros-visit1-aa0001", "mros-visit2-aa2033"]
    assert len(find_nights(replace(MROS, not_signals=()), tmp_path)) == 4


def test_a_family_is_one_group_and_stays_so_in_the_store(tmp_path):
    simulate_study("cfs", tmp_path / "files", 4, .05)
    with ThreadPoolExecutor(1) as executor: convert(CFS, tmp_path / "files", tmp_path / "store", Recipe.native(channels=("C4-M1",)), executor)
    store = open_store(tmp_path / "store")
    assert {i: store[i].group for i in store.manifest["id"]} == {"cfs-visit5-800001": "100", "cfs-visit5-800002": "100", "cfs-visit5-800003": "101", "cfs-visit5-800004": "101"}
    (tmp_path / "files/datasets/cfs-visit5-dataset-0.7.0.csv").unlink()
    with pytest.raises(PFTSleepError, match="tells the families"): find_nights(CFS, tmp_path / "files")


def test_mros_visits_need_different_labels_and_give_the_same_channels(tmp_path):
    first, second = simulate_study("mros", tmp_path, 1, .05)
    made = [apply_montage(read_edf(n.signals), MROS.montage) for n in (first, second)]
    assert [m["E1-M2"].source_label for m in made] == ["LOC - A2", "E1 - M2"]
    assert [m["ECG"].source_label for m in made] == ["ECG L - ECG R", "ECGL - ECGR"]
    assert list(made[0].channels)[:8] == list(made[1].channels)[:8]


def test_a_label_that_came_twice_does_not_decide(tmp_path):
    "Labels are compared by letters and digits, so the five spellings of SHHS's second EEG are all found."
    night, *_ = simulate_study("shhs", tmp_path, 1, .05)
    for label in ("EEG(sec)", "EEG(SEC)", "EEG sec", "EEG2", "EEG 2"):
        with night.signals.open("r+b") as f:
            head = f.read(256 * 16)
            names = [head[256 + 16 * k:272 + 16 * k].strip() for k in range(14)]
            f.seek(256 + 16 * 2); f.write(label.encode().ljust(16))
        assert names[3] == b"ECG"
        rec = apply_montage(read_edf(night.signals), SHHS.montage)
        assert rec["C3-M2"].source_label == label and rec["C3-M2"].kind == "EEG"


@pytest.mark.parametrize("shift", [0, 60])
def test_stages_beyond_the_signal_and_before_it_are_dropped(tmp_path, shift):
    night, = simulate_study("apples", tmp_path, 1, .05)
    path = night.annotations[0]
    if shift: path.write_text(path.read_text().replace("class\t", "class\t", 1) + f"L\t.\t.\t{night.truth.start:%H:%M:%S}\t{night.truth.start + timedelta(seconds=60):%H:%M:%S}\t.\n")
    rec = read_night(find_nights(COHORTS["apples"], tmp_path)[0], COHORTS["apples"])
    truth = night.truth.hypnogram.stages[:-2].tolist() # two epochs were scored after the signals' end
    assert rec.hypnogram.stages.tolist() == ([-1, -1] if shift else []) + truth


def test_a_log_without_its_anchor_is_refused(tmp_path):
    "Nothing else says when the signals begin: any other line would be hours off in some nights."
    night, *_ = simulate_study("wsc", tmp_path, 1, .05)
    path = night.annotations[0]
    path.write_text(path.read_text().replace("START RECORDING", "IMPEDANCE CHECK"))
    with pytest.raises(PFTSleepError, match="START RECORDING"): read_night(find_nights(COHORTS["wsc"], tmp_path)[0], COHORTS["wsc"])


def test_a_table_of_stages_without_its_header_line(tmp_path):
    "As in some nights of WSC."
    _, night = simulate_study("wsc", tmp_path, 1, .05)
    path = night.annotations[0]
    path.write_text(path.read_text().partition("\n")[2])
    assert read_night(find_nights(COHORTS["wsc"], tmp_path)[1], COHORTS["wsc"]).hypnogram.stages.tolist() == night.truth.hypnogram.stages.tolist()


def test_every_study_says_where_its_facts_are_from():
    for cohort in COHORTS.values():
        assert cohort.link.startswith("https://") and cohort.traps
        assert re.match("read on a real file|written from its public documentation|simulated only", cohort.verified)
        assert all(isinstance(t, str) and len(t) > 20 for t in cohort.traps)


# --- the one real header

def test_the_real_header_of_a_recording_like_those_of_shhs():
    path = SHARED / "realdata/psg_edf/format_quirks/edfize_invalid-date.edf"
    if not path.exists(): pytest.skip("../shared isn't here")
    rec = apply_montage(read_edf(path), SHHS.montage, SHHS.ignored)
    assert [(n, c.source_label, c.fs, c.unit) for n, c in rec.channels.items()] == [
        ("C4-M1", "EEG", 125, "uV"), ("C3-M2", "EEG(sec)", 125, "uV"), ("E1", "EOG(L)", 50, "uV"), ("E2", "EOG(R)", 50, "uV"), ("Chin", "EMG", 125, "uV"), ("ECG", "ECG", 125, "mV"),
        ("SpO2", "SaO2", 1, "%"), ("HR", "H.R.", 1, "bpm"), ("Thorax", "THOR RES", 10, ""), ("Abdomen", "ABDO RES", 10, ""), ("Airflow", "NEW AIR", 10, "uV"),
        ("Position", "POSITION", 1, ""), ("Light", "LIGHT", 1, ""), ("OX stat", "OX stat", 1, "")]
    assert rec.start is None and any("no date and time" in str(i) for i in rec.issues)


def test_the_real_profusion_file_of_the_nsrrs_tutorial():
    path = SHARED / "realdata/annotations_xml/learn-nsrr01.xml"
    if not path.exists(): pytest.skip("../shared isn't here")
    s = read_annotations(path, SHHS.hypnogram_format)
    assert len(s.hypnogram) == 1364 and s.hypnogram.epoch_length == 30 and len(s.events) == 905
    assert s.hypnogram.counts().keys() == {"W", "N1", "N2", "N3", "REM"}


# --- MESA's actigraphy

def test_the_real_stub_of_mesas_actigraphy():
    path = SHARED / "realdata/actigraphy/pyActigraphy/test_sample_mesa.csv"
    if not path.exists(): pytest.skip("../shared isn't here")
    r = read_mesa_actigraphy(path)
    assert r.start == datetime(1985, 1, 10) and r.subject is None # dayofweek 5 is a Thursday; the stub has no number
    np.testing.assert_array_equal(r["Activity"].samples(), [np.nan, 100, 40, 0])
    np.testing.assert_array_equal(r["Off-wrist"].samples(), [1, 0, 0, 0])
    np.testing.assert_array_equal(r["White light"].samples(), [np.nan, 10, 5, 1])
    assert r.events["name"].tolist() == ["EXCLUDED", "ACTIVE", "REST", "REST-S"] and r.duration == 120


def test_a_simulated_week_meets_its_night(tmp_path):
    for night in simulate_study("mesa", tmp_path, 2, .1):
        week = read_mesa_actigraphy(tmp_path / f"actigraphy/{night.id}.csv")
        psg = read_edf(night.signals)
        aligned = align_actigraphy(week, psg, actigraphy_overlap(tmp_path / "overlap/mesa-actigraphy-psg-overlap.csv"))
        assert week.subject == night.subject and aligned.start.time() == week.start.time()
        assert (aligned.start - psg.start) % timedelta(days=1) == timedelta(hours=week.start.hour, minutes=week.start.minute) - timedelta(
            hours=psg.start.hour, minutes=psg.start.minute, seconds=psg.start.second) + timedelta(days=1) # true on the night's clock
        part = during(aligned, psg)
        assert psg.start <= part.start < psg.start + timedelta(seconds=30) and part.duration <= psg.duration
        table = pd.read_csv(tmp_path / f"actigraphy/{night.id}.csv").set_index("linetime")["activity"]
        clock = [f"{part.start + timedelta(seconds=30 * k):%H:%M:%S}" for k in range(part["Activity"].n_samples)]
        nights_rows = [table[c].iloc[0] if isinstance(table[c], pd.Series) else table[c] for c in clock] # the first such time of day is the night's: the week begins 20 h before
        np.testing.assert_array_equal(part["Activity"].samples(), nights_rows)


def test_off_the_wrist_is_never_zero(tmp_path):
    head = "mesaid,line,linetime,offwrist,activity,dayofweek,daybymidnight\n"
    (tmp_path / "mesa-sleep-0001.csv").write_text(head + "1,1,22:00:00,1,0,3,1\n1,2,22:00:30,0,0,3,1\n1,9,22:04:00,0,7,3,1\n")
    r = read_mesa_actigraphy(tmp_path / "mesa-sleep-0001.csv")
    np.testing.assert_array_equal(r["Activity"].samples(), [np.nan, 0, *[np.nan] * 6, 7])
    np.testing.assert_array_equal(r["Off-wrist"].samples(), [1, 0, *[np.nan] * 6, 0])


@pytest.mark.parametrize(("text", "problem"), [
    ("mesaid,line,linetime,offwrist,activity\n1,1,22:00:00,0,5,6\n", "not a table|no time|no number|no whole"),
    ("line,linetime,offwrist,activity,daybymidnight\n1,22:00:00,0,5,1\n2,22:00:30,0,5,900000\n", "after the row before"),
    ("line,linetime,offwrist,activity,dayofweek\n1,22:00:00,0,5,8\n", "dayofweek in row 1 is 8"),
    ("line,linetime,offwrist,activity\n", "no rows"),
])
def test_damaged_weeks_are_refused_with_the_row(tmp_path, text, problem):
    (tmp_path / "w.csv").write_text(text)
    with pytest.raises(ReadError, match=problem): read_mesa_actigraphy(tmp_path / "w.csv")


CELLS = st.sampled_from(["1", "0", "", "22:00:00", "22:00:30", "24:61:00", "-1", "1e9", "nan", "inf", "ACTIVE", "x", '"', "\0", "00:00:00", "999999999999999999999", "é"])


@given(st.one_of(st.binary(max_size=300), st.lists(st.lists(CELLS, min_size=6, max_size=8), max_size=8).map(
    lambda rows: ("line,linetime,offwrist,activity,dayofweek,daybymidnight,interval\n" + "\n".join(",".join(r) for r in rows)).encode())))
def test_any_garbage_only_raises_our_errors(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "garbage.csv"
    path.write_bytes(content)
    for read in (read_mesa_actigraphy, actigraphy_overlap):
        with suppress(PFTSleepError): read(path)
