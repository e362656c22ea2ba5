"""The openly available studies, from their own files to a store; each trap has a test."""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pftsleep.data.cohorts import find_nights
from pftsleep.data.convert import convert, read_night
from pftsleep.data.hypnograms import FORMATS, read_annotations, read_hypnogram
from pftsleep.data.open_cohorts import OPEN_COHORTS
from pftsleep.data.recording import Kind
from pftsleep.data.signals import Recipe
from pftsleep.data.simulate_open import OPEN_STUDIES, PLANTED, simulate_open_study
from pftsleep.data.store import open_store
from pftsleep.data.wfdb_dreem import read_ids, read_isruc
from pftsleep.errors import PFTSleepError

REAL = Path(__file__).parents[2] / "shared/realdata"
real = pytest.mark.skipif(not REAL.exists(), reason="../shared isn't here")
MINUTES = 6 / 60 # h
REGISTERED = set(FORMATS)
EXPECTED = { # channels that every night of the study must have, under canonical names
    "sleep_edf": {"Fpz-Cz", "Pz-Oz", "EOG horizontal", "EMG envelope", "Airflow"}, "sleep_edf_st": {"Fpz-Cz", "Pz-Oz", "EOG horizontal", "Chin"},
    "cinc2018": {"F3-M2", "F4-M1", "C3-M2", "C4-M1", "O1-M2", "O2-M1", "E1-M2", "Chin", "Abdomen", "Thorax", "Airflow", "SpO2", "ECG"},
    "dod_h": {"C3-M2", "F4-M1", "F3-M2", "Fp1-M2", "EMG", "ECG", "EOG1", "EOG2"}, "dod_o": {"C3-M2", "C4-M1", "F3-M2", "O1-M2", "O2-M1", "EMG", "ECG", "EOG1", "EOG2"},
    "slpdb": {"ECG", "C4-M1", "Effort sum"}, "hmc": {"F4-M1", "C4-M1", "O2-M1", "C3-M2", "E1-M2", "E2-M2", "Chin", "ECG"},
    "dcsm": {"F3-M2", "F4-M1", "C3-M2", "C4-M1", "O1-M2", "O2-M1", "E1-M2", "E2-M2", "Chin", "ECG", "Leg L", "Leg R", "Flow", "Thorax", "Abdomen", "SpO2"},
    "isruc": {"F3-M2", "C3-M2", "O1-M2", "F4-M1", "C4-M1", "O2-M1", "E1-M2", "E2-M1", "Chin", "ECG", "Leg L", "SpO2"}, "mass": {"C3-M2", "E1", "E2", "Chin", "ECG", "SpO2"}}


@pytest.fixture(autouse=True)
def formats(monkeypatch):
    "The two small tables are read even where `FORMATS` doesn't list them; `test_every_format_is_known` says so."
    for name, reader in (("dcsm", read_ids), ("isruc", read_isruc)):
        if name not in FORMATS: monkeypatch.setitem(FORMATS, name, reader)


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    "Each study, made once: its folder and the truth."
    made = {}
    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = folder, simulate_open_study(name, folder, 2, MINUTES)
        return made[name]
    return get


def truths(studies, name):
    folder, truth = studies(name)
    return {t.id: t for t in truth}, {n.id: n for n in find_nights(OPEN_COHORTS[name], folder)}


def read(studies, name, k=0):
    true, nights = truths(studies, name)
    id = sorted(true)[k]
    return true[id], read_night(nights[id], OPEN_COHORTS[name])


def test_every_cohort_has_a_simulated_study(): assert set(OPEN_STUDIES) == set(OPEN_COHORTS) == set(EXPECTED)
def test_every_format_is_known(): assert {c.hypnogram_format for c in OPEN_COHORTS.values()} <= REGISTERED


@pytest.mark.parametrize("name", OPEN_COHORTS)
def test_files_are_read_as_what_they_are(studies, name):
    "Ids and people; stages epoch by epoch; names, units and samples of every channel, derived ones included, within the file's own step."
    true, nights = truths(studies, name)
    assert set(true) == set(nights)
    for id, t in true.items():
        assert nights[id].subject == nights[id].group == t.subject
        rec = read_night(nights[id], OPEN_COHORTS[name])
        assert EXPECTED[name] <= set(rec.channels), id
        h = rec.hypnogram
        assert h.epoch_length == t.epoch_length
        np.testing.assert_array_equal(h.stages, t.stages)
        for n, step in t.steps.items():
            got, want = rec[n], t.channels[n]
            assert (got.kind, got.fs) == (want.kind, want.fs), n
            assert got.unit == want.unit or not got.unit or want.unit in ("", "uV"), n
            first = int(np.ceil(round(t.onset * want.fs, 6)))
            expected = want.samples()[first:first + got.n_samples]
            np.testing.assert_allclose(got.samples(), expected, atol=step * 1.01 + 1e-4 * np.nanmax(np.abs(expected)), rtol=0, err_msg=f"{id} {n}")


@pytest.mark.parametrize("name", OPEN_COHORTS)
def test_a_study_becomes_a_store(studies, name, tmp_path):
    folder, truth = studies(name)
    cohort = OPEN_COHORTS[name]
    recipe = Recipe.native(channels=sorted(EXPECTED[name] & {"Fpz-Cz", "C3-M2", "C4-M1", "Chin", "ECG", "SpO2"}))
    with ThreadPoolExecutor(1) as pool: ledger = convert(cohort, folder, tmp_path / "store", recipe, pool)
    assert not ledger.failed, str(ledger)
    store = open_store(tmp_path / "store")
    manifest = store.manifest.set_index("id")
    for t in truth:
        assert manifest.loc[t.id, "subject"] == t.subject and manifest.loc[t.id, "cohort"] == name
        np.testing.assert_array_equal(store[t.id].hypnogram.stages, t.stages)
    kept = b"".join(p.read_bytes() for p in (tmp_path / "store").rglob("*") if p.is_file())
    assert not [w for w in PLANTED.split() if len(w) > 3 and w.encode() in kept], "somebody's name came out"


# --- traps

def test_both_nights_of_a_person_stay_together(studies):
    for name in ("sleep_edf", "sleep_edf_st", "slpdb"):
        _, nights = truths(studies, name)
        assert len(nights) == 4 and len({n.group for n in nights.values()}) == 2


def test_sleep_edf_has_no_stages_where_the_tape_had_ended(studies):
    folder, truth = studies("sleep_edf")
    file = next(folder.rglob(truth[0].id[:6] + "*-Hypnogram.edf"))
    assert read_hypnogram(file, "edf").duration == 86400
    t, rec = read(studies, "sleep_edf")
    assert len(rec.hypnogram) == len(t.stages) and rec.duration == 30 * len(t.stages)
    assert rec.hypnogram.stages[2] == -1 and 3 in rec.hypnogram.stages # movement time; stage 4


def test_an_envelope_is_not_filtered_as_a_waveform(studies):
    from pftsleep.data.signals import apply_recipe
    _, rec = read(studies, "sleep_edf")
    assert rec["EMG envelope"].fs == 1 and "Chin" not in rec.channels and "Event marker" not in rec.channels
    with pytest.raises(PFTSleepError, match="envelope"): apply_recipe(rec, Recipe.default(channels=("EMG envelope",)))
    assert apply_recipe(read(studies, "sleep_edf_st")[1], Recipe.default(channels=("Chin",)))["Chin"].fs == 100


def test_cinc_begins_with_undefined_time_and_has_no_clock(studies):
    t, rec = read(studies, "cinc2018")
    assert t.onset == 60 and rec.start is None and rec.duration == len(t.stages) * 30 and not (rec.hypnogram.stages == -1).any()
    e = rec.events
    assert len(e) == 1 and (e["onset"][0], e["duration"][0]) == (3, 12), "on the clock of what is left" # 63 s after the signal's first sample


def test_a_saturation_of_zero_is_a_gap(studies):
    from pftsleep.data.readers import read_signals
    folder, _ = studies("cinc2018")
    rec = read_signals(next(folder.rglob("*.hea")))
    assert np.isnan(rec["SpO2"].samples()).sum() == 200 and not rec.issues and (rec["ECG"].unit, rec["SpO2"].unit) == ("mV", "%")


def test_a_model_is_no_scorer(studies):
    _, nights = truths(studies, "dod_h")
    for n in nights.values(): assert [a.parent.name for a in n.annotations] == [f"scorer_{k}" for k in range(1, 6)]
    alone = [read_hypnogram(a, "dreem").stages[3:-2] for n in nights.values() for a in n.annotations]
    assert not any(np.array_equal(a, t.stages) for a in alone for t in studies("dod_h")[1]), "nobody alone has the truth"


def test_scorers_lists_are_longer_than_the_signal(studies):
    "Cut to what all have scored where that fits; else the list beside the signal, and it is said."
    true, nights = truths(studies, "dod_o")
    said = []
    for id, n in nights.items():
        assert {len(read_hypnogram(a, "dreem")) for a in n.annotations} == {len(true[id].stages) + 5}
        rec = read_night(n, OPEN_COHORTS["dod_o"])
        np.testing.assert_array_equal(rec.hypnogram.stages, true[id].stages)
        said.append(any("scorers don't fit" in str(i) for i in rec.issues))
    assert sorted(said) == [False, True]


def test_without_the_lists_the_files_own_stages_count(studies):
    true, nights = truths(studies, "dod_h")
    for id, n in nights.items(): np.testing.assert_array_equal(read_night(replace(n, annotations=()), OPEN_COHORTS["dod_h"]).hypnogram.stages, true[id].stages)


def test_dreem_has_no_local_clock(studies):
    _, rec = read(studies, "dod_o")
    assert rec.start is None and any("UTC" in str(i) for i in rec.issues)


def test_lights_are_no_stage(studies):
    _, rec = read(studies, "hmc")
    assert rec.hypnogram.lights_off == 30 and len(find_nights(OPEN_COHORTS["hmc"], studies("hmc")[0])) == 2


def test_the_numbers_of_isruc_are_not_ours(studies):
    folder, _ = studies("isruc")
    file = next(folder.rglob("1_1.txt"))
    assert 4 in read_hypnogram(file, "isruc").stages and not np.array_equal(read_hypnogram(file, "isruc").stages, read_hypnogram(file.with_name("1_2.txt"), "isruc").stages)
    with pytest.raises(PFTSleepError): read_hypnogram(file, "csv")


def test_single_electrodes_are_subtracted(studies):
    _, first = read(studies, "isruc", 0)
    _, second = read(studies, "isruc", 1)
    assert first["F3-M2"].source_label == "F3-A2" and second["F3-M2"].source_label == "F3 - A2" and second["E1-M2"].source_label == "LOC - A2"
    assert {c["Chin"].source_label for c in (first, second)} == {"X1", "24"} and first["Chin"].kind == Kind.EMG


def test_epochs_of_twenty_seconds(studies):
    _, nights = truths(studies, "mass")
    lengths = {n: read_night(nights[n], OPEN_COHORTS["mass"]).hypnogram.epoch_length for n in nights}
    assert lengths == {"01-02-0002 PSG": 20, "01-03-0001 PSG": 30}


def test_slpdb_keeps_events_of_its_epochs(studies):
    _, rec = read(studies, "slpdb")
    assert set(rec.events["onset"]) == {90} and sorted(rec.events["type"]) == ["arousal_respiratory", "hypopnea", "limb_movement"] and rec.start.year == 1989 # 'HA L'


def test_a_night_without_annotations_is_unlabelled(studies):
    folder, _ = studies("cinc2018")
    night = find_nights(OPEN_COHORTS["cinc2018"], folder)[0]
    rec = read_night(replace(night, annotations=()), OPEN_COHORTS["cinc2018"])
    assert rec.hypnogram is None and any("unlabelled" in str(i) for i in rec.issues)


def test_strangers_names_are_refused(tmp_path):
    (tmp_path / "SC4001E0-PSG.edf").touch()
    for name in ("hmc", "isruc", "mass", "dcsm", "slpdb"):
        with pytest.raises(PFTSleepError, match="no file matches"): find_nights(OPEN_COHORTS[name], tmp_path)
    (tmp_path / "night.rec").touch()
    with pytest.raises(PFTSleepError, match="doesn't tell whose"): find_nights(OPEN_COHORTS["isruc"], tmp_path)


# --- real files

@real
def test_a_real_night_of_sleep_edf(tmp_path):
    "Five minutes of SC4001E0 with its 24-hour hypnogram."
    (tmp_path / "SC4001E0-PSG.edf").write_bytes((REAL / "psg_edf/sleepedf_SC4001_5min.edf").read_bytes())
    for p in (REAL / "hypnograms/sleep_edf").glob("SC40*"): (tmp_path / p.name).write_bytes(p.read_bytes())
    cohort = OPEN_COHORTS["sleep_edf"]
    (night,) = find_nights(cohort, tmp_path)
    assert (night.subject, [a.name for a in night.annotations]) == ("SC400", ["SC4001EC-Hypnogram.edf"])
    rec = read_night(night, cohort)
    assert rec.hypnogram.stages.tolist() == [0] * 10 and rec.start.isoformat() == "1989-04-24T16:13:00"
    assert {n: (c.fs, c.unit) for n, c in rec.channels.items()} == {"Fpz-Cz": (100, "uV"), "Pz-Oz": (100, "uV"), "EOG horizontal": (100, "uV"), "EMG envelope": (1, "uV"), "Airflow": (1, ""), "Temp rectal": (1, "degC")}
    with ThreadPoolExecutor(1) as pool: ledger = convert(cohort, tmp_path, tmp_path / "store", Recipe.default(channels=("Fpz-Cz", "EOG horizontal")), pool)
    assert not ledger.failed and open_store(tmp_path / "store")[night.id].hypnogram.counts() == {"W": 10}


@real
@pytest.mark.parametrize("name, onset, counts", [("tr03-0005", 360, {"W": 367, "N1": 58, "N2": 267, "N3": 72, "REM": 81}), ("tr03-0029", 540, {"W": 317, "N1": 134, "N2": 295, "N3": 21, "REM": 1})])
def test_real_stages_of_cinc(name, onset, counts):
    h = read_annotations(REAL / f"cinc2018/{name}.arousal", "cinc2018").hypnogram
    assert h.onset == onset and {k: v for k, v in h.counts().items() if k != "UNSCORED"} == counts


@real
def test_real_scorers_of_dreem(tmp_path):
    "The real JSON files with a simulated signal: the label is the consensus of five."
    import h5py
    from pftsleep.data.study_formats import consensus
    files = sorted((REAL / "hypnograms/dreem_dodh").glob("scorer_*/0d79f4b1*.json"))
    for p in files: (tmp_path / p.parent.name).mkdir(); (tmp_path / p.parent.name / p.name).write_bytes(p.read_bytes())
    with h5py.File(tmp_path / f"{files[0].stem}.h5", "w") as f:
        f["signals/eeg/C3_M2"] = np.arange(968 * 30 * 10, dtype="float32") % 99
        f["signals/eeg"].attrs["fs"] = 10
    (night,) = find_nights(OPEN_COHORTS["dod_h"], tmp_path)
    rec = read_night(night, OPEN_COHORTS["dod_h"])
    expected = consensus([read_hypnogram(p, "dreem") for p in files])
    assert len(files) == 5 and len(rec.hypnogram) == 968
    np.testing.assert_array_equal(rec.hypnogram.stages, expected.stages)


@real
def test_real_files_of_slpdb_tell_what_is_missing(tmp_path):
    for p in (REAL / "hypnograms/slpdb").glob("slp01a*"): (tmp_path / p.name).write_bytes(p.read_bytes())
    (night,) = find_nights(OPEN_COHORTS["slpdb"], tmp_path)
    assert (night.subject, night.annotations[0].name) == ("slp01", "slp01a.an")
    with pytest.raises(PFTSleepError, match=r"slp01a\.dat, which isn't there"): read_night(night, OPEN_COHORTS["slpdb"])
    frames = np.zeros(1_800_000 * 4 * 3 // 2, "uint8") # the signals that we don't have
    (tmp_path / "slp01a.dat").write_bytes(frames.tobytes())
    rec = read_night(night, OPEN_COHORTS["slpdb"])
    assert set(rec.channels) == {"C4-M1", "Effort sum", "ECG", "BP"} and rec.start.isoformat() == "1989-01-19T23:07:00"
    assert rec.hypnogram.counts() == {"W": 7, "N1": 1, "N2": 105, "N3": 113, "REM": 13, "UNSCORED": 1} and rec["BP"].unit == "mmHg" and rec["C4-M1"].unit == "uV"
    assert any("checksums of ECG, BP, EEG (C4-A1), Resp (sum) differ" in str(i) for i in rec.issues)
