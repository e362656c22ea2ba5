"Events: words of real files; annotations written in each format and read again; rubbish against errors."
import json
import math
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from defusedxml import ElementTree
from hypothesis import assume, example, given, HealthCheck, settings
from hypothesis import strategies as st

from pftsleep.data import annotation_writers
from pftsleep.data.annotation_writers import WRITERS, write_annotations
from pftsleep.data.edf import read_edf
from pftsleep.data.events import SCORED_COLUMNS, UNMAPPED, EventType, event_words, event_type, event_types, scored_events
from pftsleep.data.hypnograms import read_annotations, read_hypnogram
from pftsleep.data.recording import EVENT_COLUMNS, Hypnogram
from pftsleep.errors import ConfigError, EDFError, PFTSleepError
from pftsleep.files import write_whole

REALDATA = Path(__file__).parents[2] / "shared" / "realdata"
needs_realdata = pytest.mark.skipif(not REALDATA.exists(), reason="../shared/realdata is not here")
tmp = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def table(rows): return pd.DataFrame(rows, columns=EVENT_COLUMNS)


def xml_events(file, name):
    "Events of a Profusion or PhysioMIMI file, by the simplest means."
    return [e.findtext(name) for e in ElementTree.parse(file).getroot().findall(".//ScoredEvents/ScoredEvent")]


# --- words ----------------------------------------------------------------------------------------------------------

@needs_realdata
@pytest.mark.parametrize(("file", "n", "expected"), [
    ("learn-nsrr01.xml", 905, {"hypopnea": 361, "desaturation": 254, "arousal": 194, "artefact_spo2": 59, "apnea_obstructive": 37}),
    ("compumedics_20017.edf.XML", 263, {"hypopnea": 103, "arousal": 76, "limb_movement": 64, "artefact_spo2": 20})])
def test_every_event_of_profusion_has_a_type(file, n, expected):
    names = xml_events(REALDATA / "annotations_xml" / file, "Name")
    assert len(names) == n
    events = table([(0., 1., name, "") for name in names])
    assert scored_events(events)["type"].value_counts().to_dict() == expected
    assert (event_words(events).type != "").all()


@needs_realdata
@pytest.mark.parametrize("file", ["learn-nsrr01.xml", "compumedics_20017.edf.XML"])
def test_every_name_in_the_scorers_settings_is_known_or_left_out_on_purpose(file):
    names = {e.findtext("Name") for e in ElementTree.parse(REALDATA / "annotations_xml" / file).getroot().findall(".//ScoredEventSetting")}
    assert len(names) > 20
    assert {name for name in names if not event_type(name)} <= {"Unsure", "Distal pH"} <= set(UNMAPPED)


@needs_realdata
def test_physiomimi_words():
    names = Counter(name for name in xml_events(REALDATA / "annotations_xml/100657_MIMI.xml", "EventConcept") if "State" not in name and "Movement" not in name)
    assert {str(event_type(name)): n for name, n in names.items() if event_type(name)} == {"artefact_spo2": 60, "apnea_central": 1, "desaturation": 18, "hypopnea": 18, "arousal": 50}
    assert {name for name in names if not event_type(name)} == {"Recording Start Time"} <= set(UNMAPPED)


@needs_realdata
def test_noxturnal_words():
    text = (REALDATA / "annotations_xml/noxturnal_events_example_unicode.csv").read_text("utf-16")
    names = Counter(line.split(",")[2] for line in text.splitlines()[2:])
    stages = {"Éveil", "N1", "N2", "N3", "REM"}
    assert {name: (event_type(name), n) for name, n in names.items() if name not in stages} == {
        "Micro-éveil": (EventType.AROUSAL, 22), "Notification": (None, 29), "Avertissement": (None, 2)}
    assert {"Notification", "Avertissement"} <= set(UNMAPPED)
    assert not any(event_type(name) for name in stages)


@needs_realdata
def test_slpdb_words():
    lines = (REALDATA / "hypnograms/slpdb/slp01a.an").read_text().splitlines()[1:]
    codes = Counter(code for line in lines for code in line.split("\t")[1].split()[1:])
    assert codes == {"LA": 150, "L": 64, "H": 23, "HA": 15}
    events = table([(30. * k, 30., code, "") for k, line in enumerate(lines) for code in line.split("\t")[1].split()[1:]])
    counts = scored_events(events)["type"].value_counts()
    assert counts["hypopnea"] == codes["H"] + codes["HA"] and counts["arousal_respiratory"] == codes["HA"]
    assert counts["limb_movement"] == codes["L"] + codes["LA"] and counts["arousal_limb"] == codes["LA"]


@needs_realdata
@pytest.mark.parametrize(("record", "expected"), [("tr03-0005", {"rera": 27, "apnea_central": 20, "hypopnea": 14, "apnea_obstructive": 9}),
    ("tr03-0029", {"hypopnea": 85, "apnea_obstructive": 61, "rera": 44, "apnea_central": 7})])
def test_cinc2018_words(record, expected):
    data = (REALDATA / f"cinc2018/{record}.arousal").read_bytes()
    words = Counter(word for word in ("arousal_rera", "resp_hypopnea", "resp_centralapnea", "resp_obstructiveapnea") for _ in range(data.count(b"(" + word.encode())))
    assert {str(event_type(word)): n for word, n in words.items()} == expected


WORDS = [("Arousal|Arousal ()", "arousal"), ("ASDA arousal|Arousal (ASDA)", "arousal"), ("Arousal resulting from respiratory effort|Arousal (ARO RES)", "arousal_respiratory"),
    ("Respiratory effort related arousal|RERA", "rera"), ("Periodic leg movement - left|PLM (Left)", "periodic_limb_movement"), ("Limb movement - right|Limb Movement (Right)", "limb_movement"),
    ("SpO2 desaturation|SpO2 desaturation", "desaturation"), ("Mixed apnea|APNEA-MIXED", "apnea_mixed"), ("Narrow complex tachycardia|Narrow Complex Tachycardia", "tachycardia"),
    ("Body position change to supine|POSITION-SUPINE", "supine"), ("resp_cheynestokesbreath", "cheyne_stokes"), ("arousal_spontaneous", "arousal_spontaneous"), ("arousal_plm", "arousal_limb"),
    ("APNEA - OBSTRUCTIVE", "apnea_obstructive"), ("AROUSAL - LM", "arousal_limb"), ("DESATURATION", "desaturation"), ("PLM", "periodic_limb_movement"), ("LM", "limb_movement"),
    ("CAA", "apnea_central"), ("X", "apnea_obstructive"), ("arousal:cheshire", "arousal_other"), ("artifact/SpO2", "artefact_spo2"), ("LIGHTS OUT", "lights_off"), ("Lights On", "lights_on")]


@pytest.mark.parametrize(("word", "expected"), WORDS)
def test_words_of_the_public_lists(word, expected): assert event_type(word) == expected


@given(st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_has_a_type_or_none(text):
    assert len(event_types(text)) <= 2
    note = f"{text} said Ms So-and-so"
    assert event_type(note) is None
    if "|" not in text: assert scored_events(table([(0., 1., note, "")])).empty


@given(st.sampled_from([*EventType]), st.sampled_from([str.upper, str.title, lambda s: s.replace("_", " "), lambda s: s.replace("_", " - "), lambda s: f"  {s} "]))
def test_spelling_does_not_matter(t, spell): assert event_type(spell(t)) == t


def test_free_text_does_not_get_into_what_is_kept():
    events = table([(0., 1., "Hypopnea|seen by Ms So-and-so", "Flow"), (1., 1., "Ms So-and-so", "Flow"), (2., 1., "HA", None)])
    kept = scored_events(events)
    assert list(kept.columns) == SCORED_COLUMNS and kept["type"].tolist() == ["hypopnea", "hypopnea", "arousal_respiratory"]
    assert "So-and-so" not in kept.to_csv()
    assert kept["channel"].tolist() == ["Flow", "", ""]


# --- round trips ----------------------------------------------------------------------------------------------------

STAGES = st.lists(st.sampled_from([-1, 0, 1, 2, 3, 4]), min_size=1, max_size=40)
NAMES = st.sampled_from(["Obstructive Apnea", "Hypopnea|Hypopnea", "resp_centralapnea", "Arousal ()", "LMA", "SpO2 desaturation", "kräftiges Schnarchen", "<b> & 'it'", "cough", "HA", "Unsure"])
MS = lambda low, high: st.integers(low * 1000, high * 1000).map(lambda ms: ms / 1000)
EVENTS = st.lists(st.tuples(MS(-50, 2000), MS(0, 100), NAMES, st.sampled_from(["", "EEG", "Résp", "C3-M2"])), max_size=12).map(table)


@st.composite
def hypnograms_(draw, years=(1986, 2083)):
    start = draw(st.none() | st.datetimes(datetime(years[0], 1, 2), datetime(years[1], 12, 30)))
    length = draw(st.sampled_from([30., 20., 4.]))
    stages = draw(STAGES)
    lights = [draw(st.none() | MS(-100, 100)), draw(st.none() | MS(100, 2000))]
    return Hypnogram(stages, length, start, draw(st.sampled_from([0., 10., 12.345, 3600.5])), draw(st.none() | st.just("A")), *lights)


def same_stages(h, back): return (back.stages.tolist(), back.epoch_length, back.onset) == (h.stages.tolist(), h.epoch_length, pytest.approx(h.onset, abs=1e-6))


def same_clock(h, back):
    assert (back.start is None) == (h.start is None)
    if h.start: assert abs(back.start - h.start) <= timedelta(microseconds=2)


def same_lights(h, back):
    for key in ("lights_off", "lights_on"): assert getattr(back, key) == (None if getattr(h, key) is None else pytest.approx(getattr(h, key), abs=1e-5))


def rows(events):
    "Events without order, to the microsecond."
    return Counter((round(float(o), 5), round(float(d), 5), n, c) for o, d, n, c in events[EVENT_COLUMNS].itertuples(index=False))


@given(hypnograms_(), EVENTS)
@tmp
def test_edf(tmp_path, h, events):
    write_annotations(h, events, tmp_path / "n.edf", "edf")
    back, kept = read_hypnogram(tmp_path / "n.edf"), read_edf(tmp_path / "n.edf").events
    assert same_stages(h, back)
    same_clock(h, back); same_lights(h, back)
    kept = kept[~kept["name"].str.match("Sleep stage|Lights o")]
    assert rows(kept.fillna({"duration": 0.})) == rows(events)


@given(hypnograms_(years=(1800, 2999)), EVENTS)
@tmp
def test_nsrr(tmp_path, h, events):
    assume(h.start is None or (h.start - timedelta(seconds=h.onset)).date() != datetime(1985, 1, 1).date()) # EDF's and the NSRR's word for 'blanked'
    write_annotations(h, events, tmp_path / "n.xml", "nsrr")
    back = read_hypnogram(tmp_path / "n.xml")
    assert same_stages(h, back)
    same_clock(h, back)
    found = [e for e in ElementTree.parse(tmp_path / "n.xml").getroot().findall(".//ScoredEvent") if not (e.findtext("EventType") or "").startswith("Stages")]
    assert found.pop(0).findtext("EventConcept") == "Recording Start Time"
    kept = table([(float(e.findtext("Start")), float(e.findtext("Duration")), e.findtext("EventConcept"), e.findtext("SignalLocation") or "") for e in found])
    typed = lambda t: rows(t.assign(name=[event_type(n) or n for n in t["name"]]))
    lights = table([(h.onset + at, 0., word, "") for word, at in (("Lights off", h.lights_off), ("Lights on", h.lights_on)) if at is not None])
    assert typed(kept) == typed(events) + typed(lights)


@given(hypnograms_(years=(1, 9999)))
@tmp
def test_csv(tmp_path, h):
    write_annotations(h, None, tmp_path / "n.csv", "csv")
    back = read_hypnogram(tmp_path / "n.csv")
    assert same_stages(h, back) and back.start is None


@given(STAGES, st.sampled_from([(30, 10), (20, 10), (10, 10), (4, 4), (1, 1)]), st.integers(0, 9))
@tmp
def test_hypjson(tmp_path, stages, lengths, late):
    "The stage of every moment survives; the epochs are those of the format."
    (length, step), path = lengths, tmp_path / "n.HYPJSON"
    h = Hypnogram(stages, length, onset=late * step)
    write_annotations(h, None, path, "hypjson")
    back = read_hypnogram(path)
    assert (back.epoch_length, back.onset, len(back)) == (step, 0, late + len(h) * length // step)
    assert back.stages.tolist() == [-1] * late + [s for s in stages for _ in range(length // step)]
    assert json.loads(path.read_text())["header"]["study_id"] == ""


@pytest.mark.parametrize("h", [Hypnogram([0], 30, onset=12.), Hypnogram([0], 30, onset=-10.), Hypnogram([0], 7.5), Hypnogram([0], .2), Hypnogram([0], 30, onset=1e9)])
def test_hypjson_refuses_what_it_would_move(tmp_path, h):
    with pytest.raises(ConfigError, match="don't fit"): write_annotations(h, None, tmp_path / "n.HYPJSON", "hypjson")


@given(hypnograms_(years=(2, 9999)), EVENTS)
@tmp
def test_bids(tmp_path, h, events):
    write_annotations(h, events, tmp_path / "n_events.tsv", "bids")
    t = pd.read_csv(tmp_path / "n_events.tsv", sep="\t", keep_default_na=False, quoting=3)
    assert list(t.columns) == ["onset", "duration", "trial_type", "channel"] and t["onset"].is_monotonic_increasing
    stages = t[t["trial_type"].str.startswith("Sleep stage")]
    codes = {"W": 0, "N1": 1, "N2": 2, "N3": 3, "R": 4, "?": -1}
    assert [codes[word.split()[-1]] for word in stages["trial_type"]] == h.stages.tolist()
    assert stages["onset"].to_numpy() == pytest.approx(h.onset + np.arange(len(h)) * h.epoch_length, abs=1e-6)
    kept = t[~t["trial_type"].str.match("Sleep stage|Lights o")].rename(columns={"trial_type": "name"}).replace({"channel": {"n/a": ""}})
    assert rows(kept) == rows(events)
    sidecar = json.loads((tmp_path / "n_events.json").read_text())
    assert set(t["trial_type"]) <= set(sidecar["trial_type"]["Levels"])
    back = read_hypnogram(tmp_path / "n_events.tsv")
    assert same_stages(h, back)
    same_lights(h, back)


STAGES_ONLY = {"csv", "hypjson"}
WITH_EVENTS = sorted(set(WRITERS) - STAGES_ONLY)

@pytest.mark.parametrize("format", WITH_EVENTS)
@given(hypnograms_(), EVENTS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_readers_of_events_find_them(format, tmp_path, h, events):
    "What `read_annotations` gives, in a format that it detects."
    path = tmp_path / f"n_events.{'tsv' if format == 'bids' else format}"
    write_annotations(h, events, path, format)
    scoring = read_annotations(path)
    kept = scoring.events
    assert same_stages(h, scoring.hypnogram)
    same_lights(h, scoring.hypnogram)
    typed = lambda t: Counter(row for row in scored_events(t)[["onset", "type"]].round(4).itertuples(index=False, name=None) if "lights" not in row[1])
    once = events.assign(name=[event_type(n) or "" for n in events["name"]]) if format == "nsrr" else events # there a compound has one word
    assert typed(kept) == typed(once)


# --- faults ---------------------------------------------------------------------------------------------------------

ANY_EVENTS = st.lists(st.tuples(st.floats(-1e8, 1e8), st.floats(0, 1e6) | st.just(math.nan), st.text(max_size=20), st.text(max_size=5) | st.none()), max_size=5).map(table)


@given(st.sampled_from(WITH_EVENTS), ANY_EVENTS)
@example("bids", table([(0., math.nan, "", "\0")]))
@example("bids", table([(0., math.nan, "0", None)]))
@tmp
def test_any_event_is_written_and_the_stages_survive(tmp_path, format, events):
    h, path = Hypnogram([0, 2, -1, 2], 30), tmp_path / f"n_events.{'tsv' if format == 'bids' else format}"
    try: write_annotations(h, events, path, format)
    except ConfigError as e: assert format == "bids" and "taken for stages" in str(e)
    else: assert read_hypnogram(path, format).stages.tolist() == h.stages.tolist()
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".part") == []


@given(st.floats() | st.none(), st.text(max_size=8), st.datetimes() | st.none(), st.sampled_from(sorted(WRITERS)), st.floats(-1e300, 1e300))
@tmp
def test_rubbish_is_refused_by_name(tmp_path, onset, name, start, format, began):
    events = table([(onset, 1., name, "")]).astype({"onset": "float64"})
    with suppress(PFTSleepError): write_annotations(Hypnogram([0, 2], 30, start=start, onset=began), events, tmp_path / "n.tsv", format)


@pytest.mark.parametrize("format", sorted(WRITERS))
def test_a_refused_file_leaves_the_old_one(tmp_path, format, monkeypatch):
    path = tmp_path / "n.tsv"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    monkeypatch.setattr(annotation_writers, "write_edf", lambda *_: (_ for _ in ()).throw(EDFError("can't be written: No space left on device")))
    with pytest.raises(PFTSleepError, match="No space left"): write_annotations(Hypnogram([0, 2], 30), None, path, format)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["n.tsv"]


@pytest.mark.parametrize("format", sorted(STAGES_ONLY))
def test_formats_of_stages_refuse_events_and_name_the_way_out(tmp_path, format):
    with pytest.raises(ConfigError, match="bids"): write_annotations(Hypnogram([0], 30), table([(0., 1., "Hypopnea", "")]), tmp_path / "n.csv", format)
    write_annotations(Hypnogram([0], 30), table([(0., 30., "Sleep stage W", "")]), tmp_path / "n.csv", format) # these are the stages themselves


@needs_realdata
@pytest.mark.parametrize("format", WITH_EVENTS)
@pytest.mark.parametrize("name", ["annotations_xml/learn-nsrr01.xml", "annotations_xml/compumedics_20017.edf.XML", "annotations_xml/100657_MIMI.xml", "hypnograms/slpdb/slp01a.an",
    "annotations_xml/noxturnal_events_example_unicode.csv", "cinc2018/tr03-0029.arousal", "hypnograms/other/bigsasi_child_hypnogram.edf"])
def test_real_scorings_survive_every_format(tmp_path, name, format):
    s, path = read_annotations(REALDATA / name), tmp_path / "n_events.tsv"
    write_annotations(s.hypnogram, s.events, path, format)
    back = read_annotations(path, format)
    assert back.hypnogram.stages.tolist() == s.hypnogram.stages.tolist() and back.hypnogram.onset == pytest.approx(s.hypnogram.onset, abs=1e-6)
    if format == "nsrr": return
    assert Counter(back.events["name"]) == Counter(s.events["name"])
    assert scored_events(back.events)["onset"].to_numpy() == pytest.approx(scored_events(s.events)["onset"].to_numpy(), abs=1e-6)


def test_only_typed_events_when_asked(tmp_path):
    events = table([(0., 1., "Hypopnea", "Flow"), (5., 1., "moved by Ms So-and-so", "")])
    for format in WITH_EVENTS:
        write_annotations(Hypnogram([0, 2], 30), scored_events(events), tmp_path / "n.tsv", format)
        assert b"So-and-so" not in (tmp_path / "n.tsv").read_bytes() and b"ypopnea" in (tmp_path / "n.tsv").read_bytes()


def test_two_writers_at_once(tmp_path):
    path, sizes = tmp_path / "x.bin", [10, 100_000] * 20
    with ThreadPoolExecutor(4) as pool: list(pool.map(lambda n: write_whole(path, bytes(n)), sizes))
    assert path.stat().st_size in (10, 100_000) and [p.name for p in tmp_path.iterdir()] == ["x.bin"]
