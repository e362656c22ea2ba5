"Hypnograms: real files against counts made by other means, random files against brute force, rubbish against errors."
import re
import tracemalloc
from datetime import datetime, timedelta
from itertools import groupby
from pathlib import Path

import edfio
import numpy as np
import pandas as pd
import pyedflib
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pftsleep.data.hypnograms import CSV_CODES, FORMATS, NSRR_STAGES, detect_format, from_runs, infer_epoch_length, read_hypnogram
from pftsleep.data.recording import Hypnogram
from pftsleep.errors import ConfigError, HypnogramError

REALDATA = Path(__file__).parents[2] / "shared" / "realdata"
needs_realdata = pytest.mark.skipif(not REALDATA.exists(), reason="../shared/realdata is not here")
SLEEP_EDF = sorted((REALDATA / "hypnograms/sleep_edf").glob("*.edf"))
NIGHT = st.lists(st.sampled_from([-1, 0, 1, 2, 3, 4]), min_size=1, max_size=40)
WORDS = {-1: "?", 0: "W", 1: "N1", 2: "N2", 3: "N3", 4: "R"}
tmp = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def runs_of(stages, epoch):
    "(onset, duration, stage) of each run of equal stages."
    out, at = [], 0.
    for stage, group in groupby(stages):
        n = len(list(group))
        out.append((at * epoch, n * epoch, stage))
        at += n
    return out


# --- real files -------------------------------------------------------------------------------------------------

@needs_realdata
@pytest.mark.parametrize(("name", "n"), [("learn-nsrr01.xml", 1364), ("compumedics_20017.edf.XML", 1194)])
def test_profusion(name, n):
    file = REALDATA / "annotations_xml" / name
    codes = re.findall(r"<SleepStage>(\d+)</SleepStage>", file.read_text())
    h = read_hypnogram(file)
    assert (len(h), len(codes), h.epoch_length, h.start, h.onset, detect_format(file)) == (n, n, 30, None, 0, "profusion")
    assert h.stages.tolist() == [{"0": 0, "1": 1, "2": 2, "3": 3, "4": 3, "5": 4}[c] for c in codes]


@needs_realdata
def test_physiomimi():
    text = (REALDATA / "annotations_xml/100657_MIMI.xml").read_text("latin-1")
    epochs = {}
    pattern = r"SDO:(WakeState|NonRapidEyeMovementSleep-N\d|RapidEyeMovementSleep)<.*?<Start>([\d.]+)<.*?<Duration>([\d.]+)<"
    for concept, start, duration in re.findall(pattern, text, re.DOTALL):
        for second in range(int(float(start)), int(float(start) + float(duration)), 30):
            assert second not in epochs
            epochs[second] = {"W": 0, "R": 4}.get(concept[0]) if concept[0] in "WR" else int(concept[-1])
    h = read_hypnogram(REALDATA / "annotations_xml/100657_MIMI.xml")
    assert h.stages.tolist() == [epochs[30 * k] for k in range(895)]
    assert (len(h), h.start, h.onset) == (895, datetime(1996, 7, 17, 23, 37, 6), 0)


@needs_realdata
@pytest.mark.parametrize("file", SLEEP_EDF, ids=lambda f: f.name[:6])
def test_sleep_edf(file):
    with pyedflib.EdfReader(str(file)) as f: onsets, durations, words, begin = *f.readAnnotations(), f.getStartdatetime()
    h = read_hypnogram(file)
    assert (h.epoch_length, h.start, h.onset, len(h)) == (30, begin, 0, int((onsets + durations).max()) // 30)
    for onset, duration, word in zip(onsets, durations, words, strict=True):
        expected = {"W": 0, "1": 1, "2": 2, "3": 3, "4": 3, "R": 4, "?": -1, "e": -1}[word[-1]] # 'Movement time' ends with e
        assert set(h.stages[int(onset) // 30:int(onset + duration) // 30]) == {expected}
    seconds = {w: durations[[x[-1] in w for x in words]].sum() for w in ("W", "1", "2", "34", "R", "?e")}
    assert [(h.stages == s).sum() * 30 for s in (0, 1, 2, 3, 4, -1)] == list(seconds.values())


@needs_realdata
def test_aasm_words_and_lights():
    file = REALDATA / "hypnograms/other/bigsasi_child_hypnogram.edf"
    with pyedflib.EdfReader(str(file)) as f: onsets, durations, words = f.readAnnotations()
    h = read_hypnogram(file)
    assert (h.start, h.lights_off, h.lights_on) == (datetime(2016, 8, 4, 20, 4), 1197.44, 37735.8)
    for onset, duration, word in zip(onsets, durations, words, strict=True):
        if not word.startswith("Sleep"): continue
        assert set(h.stages[int(onset) // 30:int(onset + duration) // 30]) == {["W", "N1", "N2", "N3", "R"].index(word.split()[-1])}
    assert len(h) * 30 == durations[durations > 0].sum() == 39600


@needs_realdata
def test_a_list_with_comments():
    file = REALDATA / "hypnograms/other/yasa_data_full_6hrs_100Hz_hypno_30s.txt"
    h = read_hypnogram(file)
    assert h.stages.tolist() == np.loadtxt(file).astype(int).tolist() and (len(h), h.epoch_length) == (720, 30)


@needs_realdata
def test_changes_on_a_grid_that_does_not_begin_at_zero():
    file = REALDATA / "eeg_segments/pydynamo_segment_stages.csv"
    with pytest.raises(HypnogramError, match=r"ambiguous.*csv_nsrr.*csv_pydynamo"): read_hypnogram(file)
    h = read_hypnogram(file, "csv_pydynamo")
    table = pd.read_csv(file)
    for k, stage in enumerate(h.stages): # each epoch against the table, by its time
        begin, end = h.onset + k * 30, h.onset + (k + 1) * 30
        rows = table.index[:-1][(table.Time[:-1] < end - 1e-6) & (table.Time.shift(-1)[:-1] > begin + 1e-6)]
        inside = begin >= -1e-6 and end <= 5026 and len(rows) == 1
        assert stage == ({1: 3, 2: 2, 3: 1, 4: 4, 5: 0}[table.Stage[rows[0]]] if inside else -1)
    assert h.onset % 30 == pytest.approx(10.01)
    assert h.counts() == {"W": 2, "N1": 7, "N2": 95, "N3": 37, "REM": 26, "UNSCORED": 2} # REM: one of 26 before 40.01 s


@needs_realdata
@pytest.mark.parametrize("name", ["psg_edf/sleepedf_SC4001_5min.edf", "psg_edf/format_quirks/pyedflib_test_subsecond.edf",
    "PROVENANCE.md", "nhanes_xpt/PAXHD_H.xpt", "cinc2018/tr03-0005.hea", "hypnograms/slpdb/slp01a.hea", "actigraphy/pyActigraphy/test_sample_mesa.csv",
    "actigraphy/actigraph_sleepr/GT3XPlus-RawData-Day01.agd", "hypnograms"])
def test_files_without_stages_that_we_know_are_refused_by_name(name):
    with pytest.raises(HypnogramError) as e: read_hypnogram(REALDATA / name)
    assert Path(name).name in str(e.value) and e.value.remedy


# --- what is written is what is read, in every format -------------------------------------------------------------

def as_nsrr(path, runs, epoch, start):
    words = {int(s): w for w, s in reversed(NSRR_STAGES.items())}
    clock = start.strftime("%d.%m.%y %H.%M.%S") if start else "01.01.85 22.00.00"
    event = ("<ScoredEvent><EventType>Stages|Stages</EventType><EventConcept>{}</EventConcept><Start>{!r}</Start>"
             "<Duration>{!r}</Duration></ScoredEvent>\n").format
    first = f"<ScoredEvent><EventType/><EventConcept>Recording Start Time</EventConcept><Start>0</Start><ClockTime>{clock}</ClockTime></ScoredEvent>\n"
    path.write_text(f'<?xml version="1.0" encoding="UTF-8" standalone="no"?>\n<PSGAnnotation><EpochLength>{epoch:g}</EpochLength><ScoredEvents>{first}'
                    f'{"".join(event(words[s], o, d) for o, d, s in runs)}</ScoredEvents></PSGAnnotation>')


def as_edf(path, runs, epoch, start):
    notes = [edfio.EdfAnnotation(round(o, 3), round(d, 3), f"Sleep stage {WORDS[s]}") for o, d, s in runs] + [edfio.EdfAnnotation(1., 2., "Arousal")]
    when = dict(starttime=start.time(), recording=edfio.Recording(startdate=start.date())) if start else {}
    edfio.Edf([], annotations=notes, **when).write(path)


def as_runs(path, runs, epoch, start):
    pd.DataFrame([(o, d, WORDS[s]) for o, d, s in runs], columns=["Onset", "Duration", "Stage"]).to_csv(path, index=False)


def as_stops(path, runs, epoch, start):
    path.write_text("Start,Stop,Stage\n" + "".join(f"{o},{o + d},{s}\n" for o, d, s in runs))


def as_changes(path, runs, epoch, start):
    changes = [(o, s) for o, _, s in runs] + [(runs[-1][0] + runs[-1][1], runs[-1][2])]
    path.write_text(f"# epoch length: {epoch:g} s\nTime\tStage\n" + "".join(f"{t}\t{s}\n" for t, s in changes))


WRITERS = [as_nsrr, as_edf, as_runs, as_stops, as_changes]


@given(NIGHT, st.sampled_from([30., 20., 10., 7.5]), st.integers(0, 10**5), st.booleans(), st.sampled_from(WRITERS), st.booleans())
@tmp
def test_round_trip(tmp_path, stages, epoch, phase, clock, write, per_epoch):
    onset = phase / 1000 # s; the grid begins anywhere
    runs = [(k * epoch, epoch, s) for k, s in enumerate(stages)] if per_epoch else runs_of(stages, epoch)
    start = datetime(2023, 12, 31, 22, 59, 7) if clock else None
    path = tmp_path / "scoring.dat"
    write(path, [(round(o + onset, 3), d, s) for o, d, s in runs], epoch, start)
    h = read_hypnogram(path)
    assert h.onset == pytest.approx(onset, abs=1e-6)
    assert write not in (as_nsrr, as_changes) or h.epoch_length == epoch # the others don't say; the stages must hold at every moment all the same
    assert h.duration == pytest.approx(len(stages) * epoch)
    moments = np.arange(.25, len(stages) * epoch, .5)
    assert h.stages[(moments / h.epoch_length).astype(int)].tolist() == np.array(stages)[(moments / epoch).astype(int)].tolist()
    assert h.start == (start + timedelta(seconds=onset) if start and write in (as_nsrr, as_edf) else None)


@given(NIGHT, st.sampled_from(["words", "codes", "floats", "header", "epoch", "pandas", "semicolon", "utf16", "crlf"]), st.sampled_from([None, 20, 4]))
@tmp
def test_lists_don_t_shift(tmp_path, stages, style, epoch):
    "Regression: a header became the first label and moved the night by one epoch."
    path = tmp_path / "list.csv"
    comment = f"# 1 value per {epoch} seconds\n" if epoch else ""
    words, codes = [WORDS[s] for s in stages], [str(s) for s in stages]
    lines = "\n".join
    text = {"words": lines(words), "codes": lines(codes) + "\n", "floats": lines(f"{s:.18e}" for s in stages), "header": lines(["Sleep stage", *codes]),
        "epoch": lines(["epoch,stage", *(f"{k},{w}" for k, w in enumerate(words, 1))]),
        "semicolon": lines(["Epoch;Stage", *(f"{k};{w}" for k, w in enumerate(words))]), "pandas": pd.DataFrame({"stage": words}).to_csv(), "utf16": lines(["stage", *words]), "crlf": "\r\n".join(["hypnogram", *words, ""])}[style]
    path.write_bytes((comment + text).encode("utf-16" if style == "utf16" else "utf-8-sig" if style == "header" else "utf-8"))
    h = read_hypnogram(path)
    assert h.stages.tolist() == stages and h.epoch_length == (epoch or 30) and (h.start, h.onset) == (None, 0)


# --- runs to epochs, against brute force ----------------------------------------------------------------------------

@st.composite
def run_lists(draw):
    "Onsets and durations in tenths of a second, mostly on a grid, with gaps, odd ends, disorder, overlaps, duplicates."
    epoch, phase = draw(st.sampled_from([300, 200, 100])), draw(st.integers(0, 299))
    at, runs = phase, []
    for _ in range(draw(st.integers(1, 15))):
        at += draw(st.sampled_from([0] * 8 + [epoch, 2 * epoch, 70, -50]))
        length = draw(st.sampled_from([1, 1, 2, 3, 10])) * epoch + draw(st.sampled_from([0] * 9 + [37]))
        runs.append((at, length, draw(st.sampled_from([-1, 0, 1, 2, 3, 4]))))
        at += length
    if draw(st.booleans()): runs.append(draw(st.sampled_from(runs)))
    return epoch, draw(st.permutations(runs))


@given(run_lists())
@settings(max_examples=250, deadline=None)
def test_from_runs_against_counting_every_tenth_of_a_second(case):
    epoch, runs = case
    zero = min(a for a, _, _ in runs)
    at = {}
    for a, n, s in runs:
        for t in range(a, a + n): at.setdefault(t, set()).add(s)
    call = lambda: from_runs([a / 10 for a, _, _ in runs], [n / 10 for _, n, _ in runs], [s for *_, s in runs], epoch / 10)
    if any(len(s) > 1 for s in at.values()):
        with pytest.raises(HypnogramError, match=r"two stages at once: \w+ from -?[\d.]+ to -?[\d.]+ s and"): call()
        return
    h = call()
    begin = round(h.onset * 10)
    assert h.onset * 10 == pytest.approx(begin)
    boundaries = {t for a, n, _ in runs for t in (a, a + n)}
    hits = lambda phase: sum(t % epoch == phase for t in boundaries)
    assert hits(begin % epoch) == max(hits(p) for p in {t % epoch for t in boundaries}) # no other grid meets more boundaries
    assert begin <= zero < begin + epoch and (len(h) - 1) * epoch < max(at) + 1 - begin <= len(h) * epoch # the whole file, and nothing more
    for k, stage in enumerate(h.stages):
        seen = [at.get(t, {None}) for t in range(begin + k * epoch, begin + (k + 1) * epoch)]
        alike = {s for x in seen for s in x}
        assert stage == (alike.pop() if len(alike) == 1 and None not in alike else -1)


@given(NIGHT, st.sampled_from([10., 15., 20., 30.]), st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_inferred_epoch_fits_the_runs(stages, epoch, cut_first, cut_last):
    durations = np.array([d for _, d, _ in runs_of(stages, epoch)])
    fits = lambda d, length: np.mean(np.isclose(d / length, np.rint(d / length)))
    length = infer_epoch_length(durations)
    assert 10 <= length <= 30 and max(fits(durations, length), fits(durations[1:-1], length) if len(durations) > 2 else 0) >= .9
    assert length >= epoch or np.gcd.reduce(durations.astype(int)) != epoch
    if len(durations) > 2 and np.gcd.reduce(durations[1:-1].astype(int)) == epoch: # what is cut at the ends of the recording changes nothing
        durations[[0, -1]] -= 3.17 * cut_first, 1.43 * cut_last
        assert infer_epoch_length(durations) >= epoch


def test_absurd_times_don_t_allocate():
    tracemalloc.start()
    for onset, duration in [(1e12, 30), (0, 1e12), (-1e15, 30), (1e300, 1e300)]:
        with pytest.raises(HypnogramError, match=r"out of all proportion|no number"): from_runs([0, onset], [30, duration], [0, 1], 30)
        with pytest.raises(HypnogramError): from_runs([0, onset], [30, duration], [0, 1])
    with pytest.raises(HypnogramError): from_runs([0], [30], [0], 1e-9)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(("onsets", "durations", "stages"), [([np.nan], [30], [0]), ([0], [np.inf], [0]), ([0], [-30], [0]), ([0, 30], [30], [0, 1]),
    ([0], [0], [0]), ([], [], [])])
def test_impossible_runs(onsets, durations, stages):
    for epoch in (30, None):
        with pytest.raises(HypnogramError): from_runs(onsets, durations, stages, epoch)


def test_agreeing_duplicates_are_one_and_clock_and_onset_move_together():
    h = from_runs([60, 60, 90, 75], [30, 30, 60, 15], [2, 2, 2, 2], 30, origin=datetime(2024, 3, 1, 23, 59, 30))
    assert (h.stages.tolist(), h.onset, h.start) == ([2, 2, 2], 60, datetime(2024, 3, 2, 0, 0, 30))


# --- errors -----------------------------------------------------------------------------------------------------

def fails(path, *says, format=None):
    with pytest.raises(HypnogramError) as e: read_hypnogram(path, format)
    for text in (path.name, *says): assert text in str(e.value), str(e.value)


BOMB = "<!DOCTYPE x [" + '<!ENTITY a0 "ha">' + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10)) + "]><PSGAnnotation>&a9;</PSGAnnotation>"
XXE = '<!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]><PSGAnnotation><ScoredEvents>&f;</ScoredEvents></PSGAnnotation>'


def profusion(*stages, length=30): return f"<CMPStudyConfig><EpochLength>{length}</EpochLength><SleepStages>{''.join(stages)}</SleepStages></CMPStudyConfig>"
def mimi(event): return f"<PSGAnnotation><ScoredEvents><ScoredEvent>{event}</ScoredEvent></ScoredEvents></PSGAnnotation>"


@pytest.mark.parametrize(("text", "says"), [
    (BOMB, "entities"), (XXE, "entities"), ("<PSGAnnotation>", "broken XML"), ("<PSGAnnotation/>", "none of 0 events is a sleep stage"), ("<a/>", "root element 'a'"),
    ("<CMPStudyConfig/>", "none of 0 events is a sleep stage"), ("", "no lines"), ("  \n\n# nothing\n", "no lines"), ("W\nN1\nbad\n", "'bad' at line 3"),
    ("W\n\n\x00\n", "not a text file"), (profusion("<SleepStage>0</SleepStage>", length=-3), "epoch length of -3"),
    (profusion("<SleepStage>0</SleepStage>", "<SleepStage/>"), "unknown stage '' at epoch 2 of 2"),
    (mimi("<EventConcept>SDO:WakeState</EventConcept><Start>0</Start>"), "Duration of event 1 is missing"),
    (mimi("<EventConcept>SDO:NonRapidEyeMovementSleep-N5</EventConcept>"), "'SDO:NonRapidEyeMovementSleep-N5' at event 1"),
    ("onset,duration,stage\n0,30,W\n20,30,N2\n", "W from 0 to 30 s and N2 from 20 to 50 s"), ("onset,duration,stage\n0,30,W\n30,-30,N2\n", "negative duration"),
    ("Time,Stage\n30,W\n0,N2\n60,N2\n", "negative duration"), ("Time,Stage\n30,W\n", "no stage lasts"), ("stage\n", "nothing else"),
    ("onset,duration,stage\nnan,30,W\n", "the onset in line 2 is 'nan'"), ("1\n2\n6\n", "ambiguous"), ("N2,N2\nN1,N2\n", "no column"),
    ('"unclosed\n', "unknown stage")])
def test_broken_files(tmp_path, text, says):
    path = tmp_path / "some-name.dat"
    path.write_text(text)
    fails(path, says)


def test_missing_unreadable_too_large_and_wrong_format(tmp_path):
    fails(tmp_path / "nowhere.xml", "No such file")
    fails(tmp_path, "can't be read")
    large = tmp_path / "large.xml"
    with large.open("wb") as f: f.write(b"<PSGAnnotation>"); f.truncate(65 * 2**20)
    fails(large, "too many for a hypnogram")
    with pytest.raises(ConfigError, match="known are nsrr"): read_hypnogram(large, "xml")
    text = tmp_path / "text.txt"
    text.write_text("W\nN1\n")
    for format in ("nsrr", "profusion", "edf"): fails(text, format=format)


HEADS = [b"", b"<?xml version='1.0'?>", b"<PSGAnnotation>", b"0       ", b"\xffBIOSEMI", b"stage\n", b"Time,Stage\n0,W\n", b"\xff\xfe"]


@given(st.binary(max_size=200), st.sampled_from(HEADS), st.sampled_from([None, *FORMATS]))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rubbish_is_refused_or_read_but_never_anything_else(tmp_path, data, head, format):
    path = tmp_path / "rubbish"
    path.write_bytes(head + data)
    try: h = read_hypnogram(path, format)
    except HypnogramError as e: assert "rubbish" in str(e)
    else: assert isinstance(h, Hypnogram) and len(h) <= max(len(data), 10**7)


@pytest.mark.parametrize("write", [as_nsrr, as_edf])
def test_every_truncation_is_an_error(tmp_path, write):
    "A file cut anywhere must not read as a shorter or different night."
    path = tmp_path / "night"
    write(path, runs_of([0, 0, 1, 2, 2, 3, -1, 4, 0], 30.), 30., datetime(2024, 3, 1, 22))
    data, whole = path.read_bytes(), read_hypnogram(path).stages.tolist()
    for n in range(len(data) - 1, 1, -max(1, len(data) // 150)):
        path.write_bytes(data[:n])
        try: assert read_hypnogram(path).stages.tolist() == whole
        except HypnogramError as e: assert "night" in str(e)


def test_codings_differ_as_they_should(tmp_path):
    path = tmp_path / "codes.csv"
    path.write_text("0\n1\n2\n3\n4\n")
    got = {name: read_hypnogram(path, name).stages.tolist() for name in CSV_CODES}
    assert got == {"csv": [0, 1, 2, 3, 4], "csv_nsrr": [0, 1, 2, 3, 3], "csv_rk": [0, 1, 2, 3, 3], "csv_pydynamo": [-1, 3, 2, 1, 4]}
    path.write_text("W\n1\n2\n4\nR\nMT\n")
    fails(path, "ambiguous: 4 may be stage 4 or REM")
    assert read_hypnogram(path, "csv_rk").stages.tolist() == [0, 1, 2, 3, 4, -1]


def test_our_own_files_come_back(tmp_path):
    from pftsleep.data.edf import write_edf
    from pftsleep.data.recording import Recording
    for epoch in (30., 20., 10., 60.):
        h = Hypnogram([0, 0, 1, 2, 3, 3, -1, 4, 0, 0], epoch, start=datetime(2024, 3, 1, 22, 30, 0, 250000))
        write_edf(Recording("r", {}, start=h.start, hypnogram=h), tmp_path / f"{epoch}.edf")
        back = read_hypnogram(tmp_path / f"{epoch}.edf")
        assert (back.stages.tolist(), back.epoch_length, back.start) == (h.stages.tolist(), epoch, h.start)
