"Scorings: the true content of real files, what single formats are known for, and rubbish in every format."
import json
import re
import struct
import tracemalloc
from collections import Counter
from datetime import datetime, time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyedflib
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pftsleep.data.hypnograms import FORMATS, Scoring, consensus, detect_format, ranked_scorers, read_annotations, read_arousal_mat, read_hypnogram, rebase, soft_agreement
from pftsleep.data.recording import EVENT_COLUMNS, Hypnogram, Stage
from pftsleep.data.study_formats import CINC2018_MAT, SLPDB_EVENTS, STUDY_FORMATS
from pftsleep.errors import HypnogramError, PFTSleepError

REALDATA = Path(__file__).parents[2] / "shared" / "realdata"
needs_realdata = pytest.mark.skipif(not REALDATA.exists(), reason="../shared/realdata is not here")
tmp = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def names(scoring): return Counter(scoring.events["name"])


def well_formed(scoring):
    events = scoring.events
    assert isinstance(scoring, Scoring) and list(events) == EVENT_COLUMNS
    assert np.isfinite(events["onset"]).all() and events["onset"].is_monotonic_increasing and not (events["duration"] < 0).any()
    assert all(isinstance(x, str) for column in ("name", "channel") for x in events[column])
    h = scoring.hypnogram
    if h is not None: assert h.start == (scoring.origin and scoring.origin + pd.Timedelta(seconds=h.onset).to_pytimedelta())
    return scoring


# --- real files: PROVENANCE.md says what is in them, counted here by other means ----------------------------------

@needs_realdata
@pytest.mark.parametrize(("name", "epochs", "n", "counts"), [
    ("learn-nsrr01.xml", 1364, 905, {"Hypopnea": 361, "Obstructive Apnea": 37, "SpO2 desaturation": 254, "SpO2 artifact": 59, "Arousal ()": 194}),
    ("compumedics_20017.edf.XML", 1194, 263, {"Hypopnea": 103, "Arousal (ASDA)": 76, "Limb Movement (Left)": 10, "Limb Movement (Right)": 54, "SpO2 artifact": 20})])
def test_profusion_events(name, epochs, n, counts):
    file = REALDATA / "annotations_xml" / name
    s = well_formed(read_annotations(file))
    assert (len(s.hypnogram), len(s.events), s.origin) == (epochs, n, None)
    assert names(s) == counts
    text = re.search(r"<ScoredEvents>.*</ScoredEvents>", file.read_text(), re.DOTALL)[0]
    rows = re.findall(r"<ScoredEvent>.*?</ScoredEvent>", text, re.DOTALL)
    told = [tuple(re.search(f"<{tag}>(.*?)</{tag}>", row)[1] for tag in ("Name", "Start", "Duration", "Input")) for row in rows]
    expected = sorted((float(a), float(d), word, channel) for word, a, d, channel in told)
    assert sorted(s.events.itertuples(index=False, name=None)) == expected


@needs_realdata
def test_physiomimi_events():
    s = well_formed(read_annotations(REALDATA / "annotations_xml/100657_MIMI.xml"))
    assert names(s) == {"Oximetry Artifact Event": 60, "SDO:SleepArousalFinding": 50, "SDO:HypopneaFinding": 18, "SDO:HemoglobinOxygenDesaturationFinding": 18,
        "SDO:CentralApneaFinding": 1} # 147 of 208; 60 are stages, one is the clock
    assert (s.origin, len(s.hypnogram)) == (datetime(1996, 7, 17, 23, 37, 6), 895)
    assert s.events.loc[0, ["onset", "duration", "name"]].tolist() == [198, 4, "Oximetry Artifact Event"]


@needs_realdata
def test_noxturnal():
    file = REALDATA / "annotations_xml/noxturnal_events_example_unicode.csv"
    lines = [line.split(",") for line in file.read_text("utf-16").splitlines()]
    s = well_formed(read_annotations(file))
    h = s.hypnogram
    assert (detect_format(file), len(lines), s.origin) == ("noxturnal", 1413, datetime(2016, 1, 15, 22, 30))
    assert h.counts() == {"W": 213, "N1": 66, "N2": 466, "N3": 364, "REM": 249, "UNSCORED": 139} # 1358 rows in 1497 epochs, in which holes stay holes
    assert (len(h), h.epoch_length, h.onset) == (1497, 30, 0)
    assert h.start == datetime(2016, 1, 15, 22, 30)
    assert names(s) == {"Notification": 29, "Micro-éveil": 22, "Avertissement": 2}
    code = {"Éveil": 0, "N1": 1, "N2": 2, "N3": 3, "REM": 4}
    for begin, _, word, duration, _ in lines[2:]:
        at = (datetime.strptime(begin, "%d/%m/%Y %H:%M:%S") - h.start).total_seconds()
        if word in code: assert h.stages[int(at // 30)] == code[word] and float(duration) == 30
        else: assert ((s.events.onset == at) & (s.events.duration == float(duration)) & (s.events.name == word)).any()


@needs_realdata
def test_slpdb():
    file = REALDATA / "hypnograms/slpdb/slp01a.an"
    rows = [line.split("\t")[1].split() for line in file.read_text().splitlines()[1:]]
    s = well_formed(read_annotations(file))
    assert detect_format(file) == "slpdb" and len(rows) == len(s.hypnogram) == 240
    assert s.hypnogram.stages.tolist() == [{"W": 0, "R": 4, "MT": -1, "4": 3}.get(row[0]) if row[0] in ("W", "R", "MT", "4") else int(row[0]) for row in rows]
    assert s.hypnogram.counts() == {"W": 7, "N1": 1, "N2": 105, "N3": 113, "REM": 13, "UNSCORED": 1}
    assert names(s) == {"LA": 150, "L": 64, "H": 23, "HA": 15, "MT": 1} and names(s).keys() <= SLPDB_EVENTS.keys()
    assert (s.origin, s.hypnogram.onset, s.events.onset[0]) == (datetime(1989, 1, 19, 23, 7), 0, 0)
    expected = sorted((30. * k, word) for k, row in enumerate(rows) for word in (row if row[0] == "MT" else row[1:]))
    assert sorted(zip(s.events.onset, s.events.name, strict=True)) == expected and s.events.duration.isna().all()


CINC = {"tr03-0005": ({"W": 367, "N1": 58, "N2": 267, "N3": 72, "REM": 81, "UNSCORED": 1}, 360., {"arousal_rera": 27, "resp_centralapnea": 20, "resp_hypopnea": 14,
    "resp_obstructiveapnea": 9}), "tr03-0029": ({"W": 317, "N1": 134, "N2": 295, "N3": 21, "REM": 1}, 540., {"resp_hypopnea": 85, "resp_obstructiveapnea": 61,
    "arousal_rera": 44, "resp_centralapnea": 7})}


@needs_realdata
@pytest.mark.parametrize("record", CINC)
def test_cinc2018_annotations(record):
    file = REALDATA / f"cinc2018/{record}.arousal"
    counts, onset, events = CINC[record]
    s = well_formed(read_annotations(file))
    assert (detect_format(file), s.hypnogram.onset, s.hypnogram.epoch_length) == ("cinc2018", onset, 30)
    assert s.hypnogram.counts() == counts and names(s) == events and (s.events.duration > 0).all()


@needs_realdata
@pytest.mark.parametrize("record", CINC)
def test_cinc2018_matrix_and_annotations_are_the_same_night(record):
    folder = REALDATA / "cinc2018"
    whole, told = well_formed(read_arousal_mat(folder / f"{record}-arousal.mat")), read_annotations(folder / f"{record}.arousal")
    assert detect_format(folder / f"{record}-arousal.mat") == "cinc2018_mat"
    skip = int(told.hypnogram.onset // 30)
    assert (whole.hypnogram.onset, whole.hypnogram.start) == (0, None) and set(whole.hypnogram.stages[:skip]) == {-1}
    both = slice(skip, skip + len(told.hypnogram))
    assert whole.hypnogram.stages[both].tolist() == told.hypnogram.stages.tolist()
    with h5py.File(folder / f"{record}-arousal.mat") as f: sums = {k: int(f[f"data/sleep_stages/{k}"][...].sum()) for k in CINC2018_MAT}
    assert {s: n // 6000 for s, n in sums.items() if s != "undefined"} == {k: whole.hypnogram.counts().get(v.name, 0) for k, v in CINC2018_MAT.items() if k != "undefined"}
    targets = whole.events[whole.events.name == "target_arousal"] # RERAs, from 2 s before to 10 s after them, as the challenge has it
    rera = told.events[told.events.name == "arousal_rera"]
    around = np.zeros(len(whole.hypnogram) * 6000, bool)
    for e in rera.itertuples(): around[round((e.onset - 2) * 200):round((e.onset + e.duration + 10) * 200) + 1] = True
    for e in targets.itertuples(): assert around[round(e.onset * 200):round((e.onset + e.duration) * 200)].all()
    assert sum(np.abs(rera.onset - 2 - e.onset).min() < 1e-6 for e in targets.itertuples()) > .8 * len(targets) # to the sample; others are cut by unscored time


@needs_realdata
@pytest.mark.parametrize("file", sorted((REALDATA / "hypnograms/sleep_edf").glob("*.edf")), ids=lambda f: f.name[:6])
def test_sleep_edf_has_no_events_but_stages(file):
    s = well_formed(read_annotations(file))
    with pyedflib.EdfReader(str(file)) as f: words = f.readAnnotations()[2]
    assert len(s.events) == sum(not w.startswith(("Sleep stage", "Movement")) for w in words) == 0


@needs_realdata
def test_child_edf_has_lights_as_events():
    s = well_formed(read_annotations(REALDATA / "hypnograms/other/bigsasi_child_hypnogram.edf"))
    assert s.events[["onset", "name", "channel"]].values.tolist() == [[1197.44, "Lights off", "EMG RAT"], [37735.8, "Lights on", "EMG RAT"]]
    assert (s.origin, s.hypnogram.lights_off, s.hypnogram.lights_on) == (datetime(2016, 8, 4, 20, 4), 1197.44, 37735.8)


@needs_realdata
@pytest.mark.parametrize("name", ["095d6e40-5f19-55b6-a0ec-6e0ad3793da0", "0d79f4b1-e74f-5e87-8e42-f9dd7112ada5", "119f9726-eb4c-5a0e-a7bb-9e15256149a1"])
def test_dreem_consensus(name):
    files = [REALDATA / f"hypnograms/dreem_dodh/scorer_{k}/{name}.json" for k in range(1, 6)]
    hypnograms = [read_hypnogram(f) for f in files]
    raw = np.array([json.loads(f.read_text()) for f in files])
    assert detect_format(files[0]) == "dreem" and [h.scorer for h in hypnograms] == [f"scorer_{k}" for k in range(1, 6)]
    assert np.stack([h.stages for h in hypnograms]).tolist() == raw.tolist() and 968 <= raw.shape[1] <= 1192
    agreement = []
    for j in range(5): # Guillot et al. 2020, epoch by epoch
        marks = []
        for t in range(raw.shape[1]):
            votes = Counter(x for i, x in enumerate(raw[:, t]) if i != j and x >= 0)
            if raw[j, t] >= 0 and votes: marks.append(votes[raw[j, t]] / max(votes.values()))
        agreement.append(np.mean(marks))
    assert soft_agreement(hypnograms) == pytest.approx(agreement) and min(agreement) > .4 and max(agreement) < 1
    ranking = ranked_scorers(hypnograms)
    assert ranking == sorted(range(5), key=lambda j: -agreement[j])
    h = consensus(hypnograms)
    for t in range(raw.shape[1]):
        votes = Counter(raw[:, t].tolist())
        best = [k for k, n in votes.items() if n == max(votes.values())]
        assert h.stages[t] == next(raw[j, t] for j in ranking if raw[j, t] in best)
        scored = raw[raw[:, t] >= 0, t]
        assert h.probabilities[t].tolist() == pytest.approx([np.mean(scored == k) if len(scored) else 0 for k in range(5)])


# --- known traps ---------------------------------------------------------------------------------------------------

def wfdb(*marks):
    out, at = b"", 0
    for sample, text in marks:
        aux = text.encode() + b"\0" * (len(text) % 2)
        out += struct.pack("<HhHHH", 59 << 10, (sample - at) >> 16, (sample - at) & 65535, 22 << 10, 63 << 10 | len(text)) + aux
        at = sample
    return out + b"\0\0"


def mat(path, n=18000, epoch=6000):
    stages = np.repeat([0, 2, -1], epoch)[1:n + 1] # every change one sample early, as in the real files
    stages = np.append(stages, -1)[:n]
    with h5py.File(path, "w", userblock_size=512) as f:
        for k, v in CINC2018_MAT.items(): f[f"data/sleep_stages/{k}"] = (stages == int(v))[None].astype("u1")
        f["data/arousals"] = np.zeros((n, 1))
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(512, b"\0") + path.read_bytes()[512:])
    return path


TWIN = "23:59:00.00\tSTART RECORDING\n23:59:00.00\tSTAGE - W\n0:00:00.00\tSTAGE - N3\n00:00:07.00\tRESPIRATORY EVENT - DUR: 12.5 SEC. - OBSTRUCTIVE APNEA - DESAT 88 %\n00:01:00.00\tLIGHTS ON\n"
HYPJSON = json.dumps({"header": {"study_date": ""}, "Data": {"10sEpochs": [0, 3, 4, 5, -1]}, "Legend": {"undefined": -1, "awake": 0, "stage3": 3, "stage4": 4, "REM": 5}})
ANNOT = "class\tinstance\tchannel\tstart\tstop\tmeta\nW\t.\t.\t23:59:30\t00:00:00\t.\nN3\t.\t.\t00:00:00\t00:00:30\t.\narousal\t.\tC3\t00:00:11\t+3\t.\n"
EXAMPLES = {
    "nsrr": b"<PSGAnnotation><EpochLength>30</EpochLength><ScoredEvents><ScoredEvent><EventType>Stages|Stages</EventType><EventConcept>Wake|0</EventConcept><Start>0</Start>"
        b"<Duration>60</Duration></ScoredEvent><ScoredEvent><EventType>R|R</EventType><EventConcept>Hypopnea|Hypopnea</EventConcept><Start>41</Start><Duration>12</Duration>"
        b"<SignalLocation>NEW AIR</SignalLocation></ScoredEvent></ScoredEvents></PSGAnnotation>",
    "profusion": b"<CMPStudyConfig><EpochLength>30</EpochLength><ScoredEvents><ScoredEvent><Name>Hypopnea</Name><Start>3</Start><Duration>11</Duration><Input>Flow</Input>"
        b"</ScoredEvent></ScoredEvents><SleepStages><SleepStage>0</SleepStage><SleepStage>4</SleepStage></SleepStages></CMPStudyConfig>",
    "csv": b"onset,duration,stage\n0,30,W\n30,60,N2\n",
    "noxturnal": ("Heure de début,Heure de fin,Événement,Durée,\r\n[],[],[],[s],\r\n01/03/2024 23:59:30,02/03/2024 00:00:00,Éveil,30,\r\n"
        "02/03/2024 00:00:00,02/03/2024 00:00:30,N2,30,\r\n02/03/2024 00:00:08,02/03/2024 00:00:11,Micro-éveil,3.2,\r\n").encode("utf-16"),
    "slpdb": b"Elapsed time  Sample #  Type  Sub Chan  Num\tAux\n    0:00.004        1     \"    0    0    0\t4 LA LA\n    0:30.000     7500     \"    0    0    0\tR\n",
    "cinc2018": wfdb((0, "## time resolution: 200"), (6000, "W"), (7000, "(resp_hypopnea"), (9000, "resp_hypopnea)"), (12000, "N2")),
    "wsc_allscore": TWIN.encode(), "wsc_stg": b"Epoch\tUser-Defined Stage\tCAST-Defined Stage\n1\t0\t0\n2\t4\t3\n3\t7\t7\n",
    "hypjson": HYPJSON.encode(), "annot": ANNOT.encode(), "dreem": b"[-1, 0, 1, 2, 3, 4]",
    "bids": b"onset\tduration\ttrial_type\n0\t30\tW\n30\t30\tN3\n31\t4\tarousal\n"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_format_is_recognised_by_its_content(tmp_path, name):
    path = tmp_path / "no-extension"
    path.write_bytes(EXAMPLES[name])
    assert detect_format(path) == name
    assert well_formed(read_annotations(path)).hypnogram.stages.tolist() == read_hypnogram(path, name).stages.tolist()


def test_cinc_matrix_is_recognised(tmp_path):
    path = mat(tmp_path / "no-extension")
    assert detect_format(path) == "cinc2018_mat" and read_hypnogram(path).stages.tolist() == [0, 2, -1]


def test_all_formats_that_cohorts_name_exist():
    assert {"nsrr", "physiomimi", "profusion", "edf", "csv", "noxturnal", "slpdb", "cinc2018", "wsc_allscore", "wsc_stg", "wsc_json", "annot", "dreem", "hypjson",
        "bids"} <= FORMATS.keys() and STUDY_FORMATS.keys() < FORMATS.keys()


@pytest.mark.parametrize(("name", "old", "new", "stages"), [("wsc_allscore", "- N3", "- N4", [0, 0, 3, 3]), ("wsc_allscore", "- N3", "- MVT", [0, 0, -1, -1]),
    ("wsc_allscore", "- N3", "- NO STAGE", [0, 0, -1, -1]), ("wsc_stg", "3\t7", "3\t6", [0, 3, -1]), ("slpdb", "4 LA LA", "MT", [-1, 4]),
    ("annot", "W\t", "?\t", [-1, 3]), ("annot", "N3", "NREM4", [0, 3]), ("annot", "W\t", "L\t", [-1, 3]), ("bids", "N3", "S4", [0, 3]), ("bids", "\tW", "\t?", [-1, 3])])
def test_stage_4_is_n3_and_movement_is_unscored(tmp_path, name, old, new, stages):
    path = tmp_path / "x"
    text = EXAMPLES[name].decode()
    assert old in text
    path.write_text(text.replace(old, new))
    assert read_hypnogram(path).stages.tolist() == stages


@pytest.mark.parametrize(("name", "old", "new", "says"), [("wsc_allscore", "- N3", "- N5", "'N5' at line 3"), ("wsc_stg", "3\t7", "3\t9", "'9' at line 4"),
    ("slpdb", "4 LA", "7 LA", "'7' at line 2"), ("slpdb", "4 LA LA", "4 LB", "'LB' at line 2"), ("cinc2018", "N2", "N7", "'N7' at 60 s"), ("hypjson", "5, -1]", "5, 6]", "'6' at epoch 5 of 5"),
    ("dreem", "3, 4]", "3, 5]", "'5' at epoch 6 of 6"), ("nsrr", "Wake|0", "Wake|1", "'Wake|1' at event 1"), ("profusion", ">4<", ">8<", "'8' at epoch 2 of 2")])
def test_an_unknown_code_raises_and_says_where(tmp_path, name, old, new, says):
    path = tmp_path / "some-night"
    data = EXAMPLES[name].decode("latin-1")
    assert old in data
    path.write_bytes(data.replace(old, new).encode("latin-1"))
    with pytest.raises(HypnogramError) as e: read_annotations(path)
    assert says in str(e.value) and "some-night" in str(e.value) and e.value.remedy


def test_an_unknown_word_between_stages_is_a_stage_not_an_event(tmp_path):
    path = tmp_path / "x_events.tsv"
    rows = ["W", "W", "Wach", "N1", "N2", "Wach", "N2"]
    path.write_text("onset\tduration\ttrial_type\n" + "".join(f"{30 * k}\t30\t{w}\n" for k, w in enumerate(rows)))
    with pytest.raises(HypnogramError, match="unknown stage 'Wach' at 60 s"): read_annotations(path)


@pytest.mark.parametrize("text", [",0,1\n0,0,0\n1,30,0\n2,60,2\n3,90,2\n", "0,1\n1,0\n2,0\n3,2\n"]) # MrOS and APPLES; WSC
def test_the_header_of_the_original_never_becomes_a_stage(tmp_path, text):
    path = tmp_path / "night-hyp.csv"
    path.write_text(text)
    for format in (None, *(f for f in FORMATS if f != "edf")):
        with pytest.raises(HypnogramError): read_hypnogram(path, format)


@pytest.mark.parametrize("name", ["wsc_stg", "annot", "bids", "csv", "noxturnal", "slpdb"])
def test_a_header_is_no_epoch(tmp_path, name):
    path = tmp_path / "x"
    path.write_bytes(EXAMPLES[name])
    assert read_hypnogram(path).stages[0] == {"slpdb": 3}.get(name, 0) and len(read_hypnogram(path)) == {"wsc_stg": 3, "csv": 3}.get(name, 2)


def test_allscore_over_midnight_and_onto_a_clock(tmp_path):
    path = tmp_path / "n.allscore.txt"
    path.write_bytes(TWIN.replace("\n", "\r\n").encode())
    s = read_annotations(path)
    assert (s.hypnogram.stages.tolist(), s.clock, s.origin) == ([0, 0, 3, 3], time(23, 59), None)
    assert s.events.iloc[1].tolist()[:3] == [67, 12.5, "RESPIRATORY EVENT - OBSTRUCTIVE APNEA"]
    moved = rebase(s, datetime(2000, 1, 1, 23, 58, 30)) # the signal began half a minute earlier
    assert (moved.hypnogram.onset, moved.hypnogram.start, moved.events.onset[1]) == (30, datetime(2000, 1, 1, 23, 59), 97)


def test_annot_rows_in_any_order(tmp_path):
    head, *rows = ANNOT.splitlines()
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        path = tmp_path / "a.annot"
        path.write_text("\n".join([head, *(rows[k] for k in order)]))
        s = read_annotations(path)
        assert (s.hypnogram.stages.tolist(), s.clock, s.events.onset.tolist()) == ([0, 3], time(23, 59, 30), [41])


def test_wfdb_files_of_slpdb(tmp_path):
    data = wfdb((1, "4 LA"), (7500, "W"), (15000, "MT"))
    (tmp_path / "slp.st").write_bytes(data)
    with pytest.raises(HypnogramError, match=r"no \.hea file"): read_annotations(tmp_path / "slp.st")
    (tmp_path / "slp.hea").write_text("slp 4 250 1800000 23:07:00 19/1/1989\n")
    s = read_annotations(tmp_path / "slp.st")
    assert s.hypnogram.stages.tolist() == [3, 0, -1] and s.events.name.tolist() == ["LA", "MT"]


@pytest.mark.parametrize("event", ["<Start>41</Start>", "<Start>41</Start><Duration>long</Duration>", "<Start>41</Start><Duration>-3</Duration>"])
def test_an_event_of_unknown_length_costs_no_stages(tmp_path, event):
    path = tmp_path / "x.xml"
    path.write_text(re.sub(r"<Start>41</Start><Duration>12</Duration>", event, EXAMPLES["nsrr"].decode()))
    s = read_annotations(path)
    assert s.hypnogram.counts() == {"W": 2} and s.events.onset[0] == 41 and np.isnan(s.events.duration[0])


def test_files_with_events_and_no_stages(tmp_path):
    path = tmp_path / "x.xml"
    path.write_text(EXAMPLES["nsrr"].decode().replace("Stages|Stages", "Notes|Notes"))
    assert read_annotations(path).hypnogram is None and len(read_annotations(path).events) == 2
    with pytest.raises(HypnogramError, match="none of 2 events is a sleep stage"): read_hypnogram(path)


# --- several scorers -------------------------------------------------------------------------------------------------

@given(st.lists(st.lists(st.integers(-1, 4), min_size=12, max_size=12), min_size=2, max_size=6))
@settings(max_examples=80, deadline=None)
def test_a_consensus_is_always_among_the_most_chosen(rows):
    panel = [Hypnogram(row, 30.) for row in rows]
    h = consensus(panel)
    for t in range(12):
        votes = Counter(row[t] for row in rows)
        assert votes[int(h.stages[t])] == max(votes.values())
        assert h.probabilities[t].sum() == pytest.approx(float(any(row[t] >= 0 for row in rows)))
    agreement = soft_agreement(panel)
    assert ((agreement >= 0) & (agreement <= 1) | np.isnan(agreement)).all() and sorted(ranked_scorers(panel)) == list(range(len(rows)))


# --- rubbish ---------------------------------------------------------------------------------------------------------

def harmless(path, format=None):
    "Reads or refuses, and nothing else."
    try: well_formed(read_annotations(path, format))
    except PFTSleepError as e: assert path.name in str(e)


@given(st.binary(max_size=300), st.sampled_from([None, *FORMATS]))
@settings(tmp, max_examples=300)
def test_random_bytes(tmp_path, data, format):
    path = tmp_path / "rubbish"
    path.write_bytes(data)
    harmless(path, format)


@given(st.sampled_from(sorted(EXAMPLES)), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 3), st.binary(min_size=1, max_size=6)), min_size=1, max_size=4), st.booleans())
@settings(tmp, max_examples=600)
def test_mutated_files(tmp_path, name, changes, named):
    path, data = tmp_path / "mutant", EXAMPLES[name]
    for at, cut, new in changes:
        at %= len(data) + 1
        data = data[:at] + new + data[at + cut:]
    path.write_bytes(data)
    harmless(path, name if named else None)


@given(st.sampled_from(sorted(EXAMPLES)), st.lists(st.tuples(st.integers(0, 50), st.sampled_from(["1e308", "-1", "nan", "99999999999999", "24:00:00", "", "٣", "²", "0x1", "inf", "W", "?",
    "e:9999999:9999", "31/02/2024 25:61:61"])), min_size=1, max_size=3), st.booleans())
@settings(tmp, max_examples=500)
def test_files_with_odd_words(tmp_path, name, changes, named):
    path = tmp_path / "odd"
    encoding = "utf-16" if name == "noxturnal" else "latin-1"
    words = re.split(r"([\s,<>\"\[\]|]+)", EXAMPLES[name].decode(encoding))
    for k, word in changes: words[k * 2 % len(words)] = word
    path.write_bytes("".join(words).encode(encoding, "replace"))
    harmless(path, name if named else None)


@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=8))
@settings(tmp, max_examples=80)
def test_mutated_matrices(tmp_path, at, new):
    path = mat(tmp_path / "m-arousal.mat", n=1800, epoch=600)
    data = bytearray(path.read_bytes())
    at %= len(data)
    data[at:at + len(new)] = new
    path.write_bytes(data)
    harmless(path, "cinc2018_mat")


def test_a_matrix_that_claims_too_much_costs_nothing(tmp_path):
    path = tmp_path / "big-arousal.mat"
    with h5py.File(path, "w", userblock_size=512) as f:
        for k in CINC2018_MAT: f.create_dataset(f"data/sleep_stages/{k}", (1, 10**11), "u1", chunks=(1, 10**6))
        f.create_dataset("data/arousals", (10**11, 1), "f8", chunks=(10**6, 1))
    tracemalloc.start()
    with pytest.raises(HypnogramError, match="too many for a night"): read_arousal_mat(path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize(("name", "old", "new"), [("bids", "30\t30\tN3", "30\t1e15\tN3"), ("annot", "00:00:30", "+1e15"), ("cinc2018", None, wfdb((0, "W"), (2**31 - 1, "N2"))),
    ("slpdb", "    0:30.000     7500", " 9999:59:30.000     7500")])
def test_absurd_times_cost_no_memory(tmp_path, name, old, new):
    path = tmp_path / "absurd"
    path.write_bytes(new if old is None else EXAMPLES[name].replace(old.encode(), new.encode()))
    tracemalloc.start()
    harmless(path, name)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


def test_stages_of_a_scoring_are_ours():
    assert {int(s) for s in Stage} == {-1, 0, 1, 2, 3, 4}
