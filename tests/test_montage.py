"""Channels by role, and derivations against subtraction written out in float64. Names are those that the studies print in their public documentation."""
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pftsleep.data.edf import edf_name, read_edf, write_edf
from pftsleep.data.montage import GROUPS, ROLES, STANDARD, Derivation, apply_montage, explain, role_of
from pftsleep.data.recording import Channel, Kind, Recording, array_channel, crop_channel, named_channels
from pftsleep.data.signals import Recipe, apply_recipe
from pftsleep.errors import ChannelError, ConfigError

SHARED = Path(__file__).parents[2] / "shared"
real = pytest.mark.skipif(not SHARED.exists(), reason="../shared is not here")
UV = {"uV": 1., "mV": 1e3, "V": 1e6, "nV": 1e-3} # to uV


def channel(label, values=(0., 1., 2.), fs=256., unit="uV", **kwargs):
    name, kind, reference = edf_name(label, unit)
    return array_channel(name, np.asarray(values, "float32"), fs, unit, kind, reference=reference, source_label=label, **kwargs)


def night(*channels, **kwargs):
    return Recording("n", named_channels(channels), **kwargs)


def lazy(label, values, fs=256., unit="uV", **kwargs):
    "Counts how much is read at a time."
    name, kind, _ = edf_name(label, unit)
    read = Reads(np.asarray(values, "float32"))
    return Channel(name, kind, fs, unit, len(values), read, source_label=label, **kwargs)


class Reads:
    def __init__(self, values): self.values, self.asked = values, []
    def __call__(self, a, b): self.asked.append((a, b)); return self.values[a:b]


# --- names ------------------------------------------------------------------------------------------------------------------------

STUDIES = { # label -> role, as the studies' documentation lists them
    "SHHS": {"ECG": "ECG", "EOG(L)": "EOG left", "EOG(R)": "EOG right", "EMG": "chin EMG", "EEG": "other EEG", "EEG(sec)": "other EEG", "EEG 2": "other EEG", "SaO2": "SpO2", "THOR RES": "thorax", "ABDO RES": "abdomen",
        "NEW AIR": "airflow", "New Air": "airflow", "AIRFLOW": "airflow", "H.R.": "heart rate", "PR": "pulse", "POSITION": "position", "LIGHT": "light", "OX stat": None, "OX STAT": None},
    "MESA": {"EKG": "ECG", "EOG-L": "EOG left", "EOG-R": "EOG right", "EMG": "chin EMG", "EEG1": "other EEG", "EEG3": "other EEG", "SpO2": "SpO2", "Thor": "thorax", "Abdo": "abdomen", "Flow": "airflow", "Therm": "airflow",
        "Snore": "snore", "Leg": "leg EMG", "Pos": "position", "Pleth": "pulse wave", "HR": "heart rate", "DHR": "heart rate", "OxStatus": None, "EEG1_Off": None, "EOG-L_Off": None, "EKG_Off": None, "Pleth_Off": None},
    "MrOS": {"ECG (L-R)": "ECG", "ECG L": "ECG", "ECG R": "ECG", "E1-M2": "EOG left", "LOC": "EOG left", "ROC": "EOG right", "EMG (L-R)": "chin EMG", "L Chin": "chin EMG", "R Chin": "chin EMG", "C4-M1": "EEG central",
        "C3-M2": "EEG central", "C3": "EEG central", "A1": "mastoid", "A2": "mastoid", "SaO2": "SpO2", "SpO2": "SpO2", "SAO2": "SpO2", "Thoracic": "thorax", "Chest": "thorax", "Abdominal": "abdomen", "ABD": "abdomen",
        "Airflow": "airflow", "Cannula Flow": "nasal pressure", "CannulaFlow": "nasal pressure", "Leg L": "leg EMG left", "Leg R": "leg EMG right", "SUM": "effort sum", "STAT": None},
    "WSC": {"ECG": "ECG", "E1": "EOG left", "E2": "EOG right", "cchin_l": "chin EMG", "rchin_l": "chin EMG", "chin": "chin EMG", "C3_M2": "EEG central", "F3_AVG": "EEG frontal", "O1_M2": "EEG occipital", "Pz_Cz": "other EEG",
        "spo2": "SpO2", "thorax": "thorax", "abdomen": "abdomen", "lleg_r": "leg EMG", "nas_pres": "nasal pressure", "flow": "airflow", "position": "position", "snore": "snore"},
    "APPLES": {"ECG": "ECG", "LOC": "EOG left", "ROC": "EOG right", "EMG": "chin EMG", "C4_M1": "EEG central", "C3_M2": "EEG central", "O2_M1": "EEG occipital", "SpO2": "SpO2", "thorax": "thorax", "abdomen": "abdomen"},
    "CFS, CCSHS": {"ECG1": "ECG", "L Leg": "leg EMG left", "LEFT LEG1": "leg EMG left", "RIGHT LEG2": "leg EMG right", "THOR EFFORT": "thorax", "Abdo Effort": "abdomen", "NASAL PRES": "nasal pressure", "PlethWV": "pulse wave",
        "PULSE": "pulse", "HRate": "heart rate", "Light": "light", "OX STATUS": None, "EMG1": "other EMG"},
    "CHAT": {"Lchin": "chin EMG", "Cchin": "chin EMG", "Rchin": "chin EMG", "LCHIN-RCHIN": "chin EMG", "ECG3": "ECG", "RLeg1": "leg EMG right", "LLeg2": "leg EMG left", "T3": "other EEG", "CAP": "carbon dioxide", "EtCO2": "carbon dioxide"},
    "SOF": {"Leg/L": "leg EMG left", "L Chin": "chin EMG", "HR": "heart rate"},
    "NCHSDB": {"EOG LOC-M2": "EOG left", "EOG_ROC-EEG_M1": "EOG right", "EEG_C4-EEG_M1": "EEG central", "EMG Chin1-Chin2": "chin EMG", "EEG CHIN1-CHIN3": "chin EMG", "EMG LLeg-RLeg": "leg EMG", "ECG EKG2-EKG": "ECG", "EEG CZ-O1": "EEG occipital",
        "Resp PTAF": "nasal pressure", "PTAF": "nasal pressure", "Resp Airflow": "airflow", "Resp Thoracic": "thorax", "Resp Abdominal": "abdomen", "Resp Rate": None, "C-flow": "PAP", "Capno": "carbon dioxide"},
    "CinC 2018": {"F3-M2": "EEG frontal", "O1-M2": "EEG occipital", "E1-M2": "EOG left", "Chin1-Chin2": "chin EMG", "ABD": "abdomen", "CHEST": "thorax", "AIRFLOW": "airflow", "SaO2": "SpO2", "ECG": "ECG"},
    "Sleep-EDF": {"EEG Fpz-Cz": "EEG frontal", "EEG Pz-Oz": "other EEG", "EOG horizontal": "other EOG", "Resp oro-nasal": "airflow", "EMG submental": "chin EMG", "Temp rectal": "temperature", "Event marker": None},
    "Dreem": {"C3_M2": "EEG central", "F3_F4": "EEG frontal", "FP1_M2": "EEG frontal", "F3_O1": "other EEG", "EOG1": "other EOG", "EMG": "chin EMG"},
    "HMC": {"EEG F4-M1": "EEG frontal", "EEG C4-M1": "EEG central", "EEG O2-M1": "EEG occipital", "EOG E1-M2": "EOG left", "EOG E2-M2": "EOG right", "EMG chin": "chin EMG", "ECG": "ECG"},
    "DCSM": {"C3-M2": "EEG central", "E2-M2": "EOG right", "CHIN": "chin EMG", "LAT": "leg EMG left", "RAT": "leg EMG right", "ECG-II": "ECG", "THORAX": "thorax", "ABDOMINAL": "abdomen", "SPO2": "SpO2", "SNORE": "snore"},
    "ISRUC": {"F3-A2": "EEG frontal", "C3-A2": "EEG central", "O2-A1": "EEG occipital", "LOC-A2": "EOG left", "ROC-A1": "EOG right", "X1": None},
    "MASS": {"EEG C3-CLE": "EEG central", "EEG O2-LER": "EEG occipital", "EOG Left Horiz": "EOG left", "EOG Right Horiz": "EOG right", "EMG Chin1": "chin EMG", "Resp Belt Thor": "thorax"},
    "the brief": {"EEG C4-A1": "EEG central", "c3_m2": "EEG central", "E1_M2": "EOG left", "ECG (L-R)": "ECG", "lleg": "leg EMG left", "Position": "position", "Pulse": "pulse"}}


@pytest.mark.parametrize("study, label, role", [(s, label, role) for s, labels in STUDIES.items() for label, role in labels.items()])
def test_labels_of_the_studies(study, label, role):
    for variant in {label, label.upper(), label.lower(), label.replace(" ", "_"), label.replace("_", "-") if not label.lower().endswith("_off") else label, f"  {label} "}:
        name, kind, _ = edf_name(variant)
        assert role_of(array_channel(name, np.zeros(1), 1, "", kind, source_label=variant)) == role, variant
        assert edf_name(name)[:2] == (name, kind), "a canonical name stays what it is"


@pytest.mark.parametrize("a, b", [("C4-A1", "C4-M1"), ("EEG C3_a2", "C3-M2"), ("A1", "M1"), ("LOC-A2", "E1-M2"), ("C4:A1", "C4-M1"), ("EEG A1-A2", "M1-M2")])
def test_ear_and_mastoid_are_one(a, b): assert edf_name(a) == edf_name(b) and edf_name(a)[0] == b


def test_roles_and_groups_hold_together():
    assert not {r for roles in GROUPS.values() for r in roles} - set(ROLES)
    named = [n for r in ROLES.values() for n in r.names]
    assert len(named) == len(set(named)) and all(edf_name(n)[:2] == (n, r.kind) for r in ROLES.values() for n in r.names)
    assert {r for r, about in ROLES.items() if about.kind in (Kind.EEG, Kind.EOG)} == set(GROUPS["BAS"])


@given(st.text(max_size=12), st.sampled_from(list(Kind)))
@settings(max_examples=200, deadline=None)
def test_any_name_has_a_role_of_its_kind_or_none(name, kind):
    role = role_of(array_channel(name, np.zeros(1), 1, "", kind))
    assert role is None or ROLES[role].kind == kind


# --- subtraction ------------------------------------------------------------------------------------------------------------------

@given(st.data(), st.sampled_from([10.54, 128., 200., 256., 512 / 3]), st.sampled_from(sorted(UV)), st.sampled_from(sorted(UV)), st.integers(1, 3000))
@settings(max_examples=80, deadline=None)
def test_the_difference_is_that_of_float64(data, fs, unit_a, unit_b, n):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    a, b = rng.normal(50, 30, (2, n)) # both ride on the same offset, which must go
    common = rng.normal(0, 500, n)
    a, b = ((x + common) / UV[u] for x, u in ((a, unit_a), (b, unit_b)))
    a, b = a.astype("float32"), b.astype("float32")
    gaps = rng.random(n) < .1
    b[gaps] = np.nan
    rec = night(channel("C4", a, fs, unit_a, resolution=.5 / UV[unit_a]), channel("A1", b, fs, unit_b, resolution=.25 / UV[unit_b]))
    got = apply_montage(rec, [Derivation("C4-M1", ("C4 - M1",))])["C4-M1"]
    want = (a.astype("float64") * UV[unit_a] - b.astype("float64") * UV[unit_b]).astype("float32")
    assert (got.unit, got.fs, got.n_samples, got.kind, got.reference, got.source_label) == ("uV", fs, n, Kind.EEG, "M1", "C4 - A1")
    np.testing.assert_array_equal(got.samples(), want)
    assert np.isnan(got.samples()).sum() == gaps.sum() and got.resolution == pytest.approx(.25)
    first = data.draw(st.integers(0, n)); stop = data.draw(st.integers(first, n))
    np.testing.assert_array_equal(got.samples(first, stop), want[first:stop])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(got)).samples(first, stop), want[first:stop])
    np.testing.assert_array_equal(crop_channel(got, first, stop).samples(), want[first:stop])


def test_it_reads_what_is_asked_for_and_no_more():
    rng = np.random.default_rng(0)
    a, b = (lazy(label, rng.normal(size=3 * 2**20)) for label in ("C4", "M1"))
    rec = apply_montage(night(a, b), STANDARD)
    assert not a.read.asked and not b.read.asked # nothing so far
    rec["C4-M1"].samples(7, 1000)
    assert a.read.asked == b.read.asked == [(7, 1000)]
    np.testing.assert_array_equal(rec["C4-M1"].samples(), (a.read.values.astype("float64") - b.read.values).astype("float32"))
    assert max(stop - start for start, stop in a.read.asked) <= 2**20 # a long night in blocks


def test_a_file_that_was_cut_inside_a_record_keeps_its_derivations():
    "The last incomplete record holds all of one electrode's samples and a part of the other's."
    rec = apply_montage(night(channel("C4", np.arange(8192.)), channel("M1", np.arange(8183.) / 2)), [Derivation("C4-M1", ("C4 - M1",))])
    np.testing.assert_array_equal(rec["C4-M1"].samples(), np.arange(8183., dtype="float32") / 2)


@pytest.mark.parametrize("other, why", [(dict(fs=128.), "256 and 128 Hz"), (dict(values=[1.] * 16000), "3 and 16000 samples"), (dict(unit="%"), "units 'uV' and '%'"), (dict(unit="quux"), "units 'uV' and 'quux'"), (dict(unit=""), "units 'uV' and ''")])
def test_what_doesnt_fit_together_isnt_subtracted(other, why):
    m1 = channel("M1", **{"values": [1., 2., 3.], "unit": "uV", **other}) if "unit" not in other else replace(channel("M1", [1., 2., 3.]), **other)
    rec = apply_montage(night(channel("C4"), m1), [Derivation("C4-M1", ("C4 - M1",))])
    assert list(rec.channels) == ["C4", "M1"] and [(i.action, i.channel) for i in rec.issues] == [("skipped", "C4-M1")] and why in rec.issues[0].problem
    assert why in "".join(explain(rec).remark) and why in "".join(explain(rec, [Derivation("C4-M1", ("C4 - M1",))]).remark)


def test_the_next_alternative_is_tried():
    rec = night(channel("C4"), channel("M1", fs=128.), channel("C4_ref", [5., 6., 7.]))
    done = apply_montage(rec, [Derivation("C4-M1", ("EEG3", "C4 - M1", "C4_ref"))])
    assert done["C4-M1"].samples().tolist() == [5, 6, 7] and [i.action for i in done.issues] == ["skipped", "noted"]


def test_units_are_stated_never_overridden():
    d = [Derivation("SpO2", ("SaO2",), "%", "the manual")]
    blank, wrong, odd = (apply_montage(night(replace(channel("SaO2"), unit=u)), d) for u in ("", "mV", "furlong"))
    assert blank["SpO2"].unit == "%" and [i.action for i in blank.issues] == ["noted"] and "blank" in blank.issues[0].problem
    assert wrong["SpO2"].unit == "mV" and [i.action for i in wrong.issues] == ["skipped"] and "documentation" in wrong.issues[0].problem
    assert odd["SpO2"].unit == "%" and [i.action for i in odd.issues] == ["repaired"] and "'furlong'" in odd.issues[0].problem
    both = [replace(channel(x, [3., 4.]), unit="") for x in ("C4", "M1")]
    assert "C4-M1" not in apply_montage(night(*both), STANDARD).channels # nobody knows that the two have the same unit
    known = apply_montage(night(*both), [Derivation("C4-M1", ("C4 - M1",), "mV")])["C4-M1"]
    assert known.unit == "uV" and known.samples().tolist() == [0, 0]


@pytest.mark.parametrize("unit, kind, name, factor", [("mV", "uV", "Chin", 1000), ("uV", "mV", "ECG", .001), ("V", "uV", "E1", 1e6)])
def test_a_channel_gets_the_unit_of_its_kind(unit, kind, name, factor):
    done = apply_montage(night(channel("X1", unit=unit, resolution=.5)), [Derivation(name, ("X1",))])[name]
    assert done.unit == kind and done.resolution == pytest.approx(.5 * factor) and done.kind == edf_name(name)[1]
    np.testing.assert_allclose(done.samples(), np.arange(3) * factor, rtol=1e-6)


# --- montages ---------------------------------------------------------------------------------------------------------------------

MROS = (Derivation("C4-M1", ("C4 - A1|M1",)), Derivation("C3-M2", ("C3 - A2|M2",)), Derivation("E1-M2", ("LOC|E1 - A2|M2",)), Derivation("E2-M1", ("ROC|E2 - A1|M1",)), Derivation("Chin", ("L Chin - R Chin",)),
    Derivation("ECG", ("ECG L - ECG R",)))


@pytest.mark.parametrize("labels", [("C4", "C3", "A1", "A2", "LOC", "ROC", "L Chin", "R Chin", "ECG L", "ECG R"), ("c4", "C3", "M1", "M2", "E1", "E2", "L_Chin", "R-Chin", "ECG-L", "ecg_r"), ("C4", "C3", "A1", "M2", "loc", "roc", "LChin", "RChin", "ECGL", "ECGR")])
def test_one_montage_for_all_spellings(labels):
    rng = np.random.default_rng(0)
    values = {label: rng.normal(size=64).astype("float32") for label in labels}
    rec = apply_montage(night(*(channel(k, v) for k, v in values.items())), MROS)
    c4, c3, m1, m2, e1, e2, left, right, ecg_l, ecg_r = (v.astype("float64") for v in values.values())
    for name, want in {"C4-M1": c4 - m1, "C3-M2": c3 - m2, "E1-M2": e1 - m2, "E2-M1": e2 - m1, "Chin": left - right}.items(): np.testing.assert_allclose(rec[name].samples(), want, rtol=1e-6)
    np.testing.assert_allclose(rec["ECG"].samples(), (ecg_l - ecg_r) / 1000, rtol=1e-5)
    assert list(rec.channels)[:6] == [d.name for d in MROS] and len(rec.channels) == 16 and {i.action for i in rec.issues} == {"noted"}


pool = st.sampled_from(["C4", "A1", "M1", "M2", "C4-M1", "EEG", "EEG(sec)", "EEG3", "LOC", "E1-M2", "chin", "L Chin", "R Chin", "ECG L", "ECG R", "ECG1_2", "SaO2", "EEG1_Off", "x", "ECG #2", "EEG #2"])
ways = st.one_of(pool, st.builds("{} - {}".format, pool, pool), st.builds("{} - {}|{}".format, pool, pool, pool))
derivations = st.builds(Derivation, pool.map(lambda n: edf_name(n)[0]), st.lists(ways, max_size=3).map(tuple), st.sampled_from([None, "uV", "%", "bpm"]))


@given(st.lists(st.tuples(pool, st.sampled_from(["uV", "mV", "", "%", "quux"]), st.sampled_from([1., 128.]), st.integers(0, 4)), max_size=8), st.lists(derivations, max_size=5), st.lists(st.sampled_from(["*_off", "EEG?", "x", "[*"]), max_size=2))
@settings(max_examples=60, deadline=None)
def test_no_channel_is_lost_or_made_up(channels, montage, ignored):
    rng = np.random.default_rng(len(channels))
    rec = night(*(replace(channel(label, rng.normal(3, 1, n), fs), unit=unit) for label, unit, fs, n in channels))
    done = apply_montage(rec, montage, ignored)
    assert all(c.name == n for n, c in done.channels.items())
    out = {i.channel for i in done.issues if i.action == "skipped" and "no signal" in i.problem}
    assert {c.source_label for c in rec.channels.values()} - out <= {c.source_label for c in done.channels.values()}
    for c in done.channels.values():
        x = c.samples()
        assert len(x) == c.n_samples and not (x == 0).any() and not np.isnan(x).any() # nothing is filled
    assert len(explain(rec, montage)) >= len(rec.channels) and len(explain(rec)) >= len(rec.channels) and (explain(rec).columns == explain(done, montage).columns).all()
    again = apply_montage(done, montage, ignored)
    assert set(again.channels) >= set(done.channels) or len(again.channels) == len(done.channels)


@given(st.text(max_size=16), st.lists(st.text(max_size=16), max_size=3), st.none() | st.text(max_size=5))
@settings(max_examples=200, deadline=None)
def test_a_derivation_makes_sense_or_says_why_not(name, alternatives, unit):
    try: d = Derivation(name, tuple(alternatives), unit)
    except ConfigError as e: assert e.remedy; return
    rec = night(channel("C4"), channel("M1"))
    apply_montage(rec, [d]), explain(rec, [d])


def test_ignored_patterns_and_order():
    rec = night(*map(channel, ("EEG1_Off", "EEG3", "EKG_Off", "Snore", "EKG")))
    done = apply_montage(rec, [Derivation("ECG", ("EKG",)), Derivation("C4-M1", ("EEG3",), note="MESA")], ("*_OFF",))
    assert list(done.channels) == ["ECG", "C4-M1", "Snore"] and done["C4-M1"].reference == "M1" and done["C4-M1"].source_label == "EEG3"
    assert [(i.action, i.channel) for i in done.issues] == [("skipped", "EEG1_Off"), ("skipped", "EKG_Off"), ("noted", "EEG3")] and "MESA" in done.issues[-1].problem
    assert (rec.issues, list(rec.channels)[:2]) == ((), ["EEG1_Off", "EEG3"]) # the original is as it was


def test_twice_is_once():
    rec = night(*map(channel, ("C4", "C3", "A1", "A2", "LOC", "ROC", "L Chin", "R Chin", "ECG L", "ECG R", "EMG", "EEG")))
    for montage in (MROS, STANDARD, (*MROS, Derivation("O2-M1", ("EEG",)))):
        once = apply_montage(rec, montage)
        twice = apply_montage(once, montage)
        assert list(twice.channels) == list(once.channels) and twice.issues == once.issues


def test_two_sides_that_are_one_channel():
    rec = apply_montage(night(channel("A1"), channel("C4")), [Derivation("C4-M1", ("A1|C4 - M1",))])
    assert "C4-M1" not in rec.channels and "one channel" in rec.issues[0].problem # else it would be zeros


def test_through_a_file(tmp_path):
    rng = np.random.default_rng(0)
    rec = night(*(channel(label, rng.normal(0, 50, 2560), 256.) for label in ("C4", "M1", "EEG1_Off")))
    write_edf(rec, tmp_path / "a.edf")
    done = apply_montage(read_edf(tmp_path / "a.edf"), STANDARD)
    want = (rec["C4"].samples().astype("float64") - rec["M1"].samples())
    for c in (done["C4-M1"], pickle.loads(pickle.dumps(done["C4-M1"]))): np.testing.assert_allclose(c.samples(100, 2000), want[100:2000], atol=.01)
    assert done["C4-M1"].resolution == min(done["C4"].resolution, done["M1"].resolution)
    ready = apply_recipe(done, Recipe.default(channels=("EEG central",)))
    assert ready["EEG central"].source_label == "C4 - M1" and ready["EEG central"].reference == "M1"


# --- explain ----------------------------------------------------------------------------------------------------------------------

def test_explain_names_what_is_missing_and_for_want_of_what():
    rec = night(*map(channel, ("C4", "LOC", "A2", "THOR RES", "AUX")))
    table = explain(rec)
    assert list(table.columns) == ["role", "found", "source", "rate", "unit", "remark"]
    at = table.set_index("role")
    assert at.loc["EOG left"].iloc[0][["found", "source", "rate", "unit", "remark"]].tolist() == ["E1-M2", "LOC - A2", 256., "uV", ""]
    assert at.loc["EEG central", "found"] == "C4" and at.loc["EEG central", "remark"] == "reference not stated"
    assert at.loc["EOG right", "remark"] == "missing E2-M2: E2 - M2 needs E2" and at.loc["snore", "remark"].startswith("missing Snore")
    assert table.role.tolist()[-1] == "none (OTHER)" and table.found.tolist()[-1] == "AUX"
    study = explain(rec, MROS).set_index("role")
    assert "missing C4-M1: C4 - A1|M1 needs A1 or M1" in study.loc["EEG central"].remark.tolist()
    assert set(table.found) - {""} == set(apply_montage(rec, STANDARD).channels)


@real
def test_shhs_header():
    rec = read_edf(SHARED / "realdata" / "psg_edf" / "format_quirks" / "edfize_invalid-date.edf")
    raw = explain(rec).set_index("source")
    assert dict(raw.loc[[c.source_label for c in rec.channels.values()], "role"]) == {"SaO2": "SpO2", "H.R.": "heart rate", "EEG(sec)": "other EEG", "ECG": "ECG", "EMG": "chin EMG", "EOG(L)": "EOG left", "EOG(R)": "EOG right",
        "EEG": "other EEG", "THOR RES": "thorax", "ABDO RES": "abdomen", "POSITION": "position", "LIGHT": "light", "NEW AIR": "airflow", "OX stat": "none (OTHER)"}
    assert raw.loc["SaO2", "rate"] == 1 and raw.loc["ECG", "unit"] == "mV" and raw.loc["EOG(L)", "rate"] == 50 and "unit not stated" in raw.loc["SaO2", "remark"] and "unit not stated" in raw.loc["H.R.", "remark"]
    montage = (Derivation("C4-M1", ("EEG",), note="C4-A1"), Derivation("C3-M2", ("EEG(sec)", "EEG sec", "EEG 2"), note="C3-A2"), Derivation("Chin", ("EMG",)), Derivation("SpO2", ("SaO2",), "%"), Derivation("HR", ("H.R.", "PR"), "bpm"))
    done = apply_montage(rec, montage)
    assert list(done.channels)[:5] == ["C4-M1", "C3-M2", "Chin", "SpO2", "HR"] and len(done.channels) == 14 and (done["SpO2"].unit, done["HR"].unit) == ("%", "bpm")
    told = explain(rec, montage).set_index("found")
    assert told.loc["C4-M1", "role"] == "EEG central" and told.loc["C4-M1", "source"] == "EEG" and told.loc["C4-M1", "remark"] == "C4-A1" and told.loc["SpO2", "remark"] == ""
    assert {r for r, m in zip(told.role, told.remark, strict=True) if m.startswith("missing")} == {"EEG frontal", "EEG occipital", "leg EMG left", "leg EMG right", "nasal pressure", "snore"}


@real
def test_sleep_edf():
    rec = read_edf(SHARED / "realdata" / "psg_edf" / "sleepedf_SC4001_5min.edf")
    at = explain(rec).set_index("source")
    assert dict(at.loc[[c.source_label for c in rec.channels.values()], "role"]) == STUDIES["Sleep-EDF"] | {"Event marker": "none (EVENT)"}
    done = apply_montage(rec, [Derivation("Fpz-Oz", ("Fpz-Cz - Pz-Oz",))])["Fpz-Oz"] # no such derivation exists; the arithmetic does
    np.testing.assert_array_equal(done.samples(), (rec["Fpz-Cz"].samples().astype("float64") - rec["Pz-Oz"].samples()).astype("float32"))
    ready = apply_recipe(rec, Recipe.default())
    assert "Chin" not in ready.channels and any(i.channel == "EMG submental" and i.action == "skipped" for i in ready.issues) # an envelope at 1 Hz costs itself and not the night
    assert {"Fpz-Cz", "Pz-Oz", "EOG horizontal"} <= set(ready.channels)
    with pytest.raises(ChannelError, match=r"EOG left.*EOG horizontal \(other EOG"): apply_recipe(rec, Recipe.default(channels=("EEG frontal", "EOG left")))


@real
def test_synthetic_file_of_the_original():
    rec = read_edf(SHARED / "fixtures" / "pftsleep" / "edf" / "synth_12min.edf")
    at = explain(rec).set_index("role")
    assert at.loc["EEG central", "remark"] == "missing C4-M1: C4 - M1 needs C4" and at.loc["mastoid", "found"] == "M1" and at.loc["other EEG", "found"] == "EEG"
    done = apply_montage(rec, [Derivation("C4-M1", ("EEG - M1",))])["C4-M1"]
    assert (done.fs, done.n_samples, done.unit, done.source_label) == (200, 144000, "uV", "EEG - M1")
    np.testing.assert_array_equal(done.samples(), (rec["EEG"].samples().astype("float64") - rec["M1"].samples()).astype("float32"))
    seven = apply_recipe(rec, Recipe.default(channels=("ECG", "EOG left", "chin EMG", "EEG", "SpO2", "thorax", "abdomen")))
    assert list(seven.channels) == ["ECG", "EOG left", "chin EMG", "EEG", "SpO2", "Thorax", "Abdomen"]
