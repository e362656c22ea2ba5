"""`pftsleep stage`: a file or a folder, six forms of one answer, and what happens when something is wrong."""
import json
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_weights import head_state, original_state, saved, shaken, tiny

from pftsleep.apps import staging
from pftsleep.apps.cli import main
from pftsleep.apps.staging import FORMATS, choose_channels, find_lights, find_recordings, read_ledger, stage_file, stage_files, write_staging
from pftsleep.data.annotation_writers import write_annotations
from pftsleep.data.edf import write_edf
from pftsleep.data.hypnograms import read_hypnogram
from pftsleep.data.pftsleep_recipes import PFTSLEEP_CHANNELS
from pftsleep.data.recording import Hypnogram, Recording, Stage, array_channel, named_channels
from pftsleep.data.signals import Recipe
from pftsleep.errors import ChannelError, SignalError, StoreError
from pftsleep.evaluation.report import RESEARCH_USE
from pftsleep.models.head_parts import Head, HeadConfig
from pftsleep.models.heads import LinearProbe
from pftsleep.models.stager import Stager, load_stager, save_stager, weights_hash
from pftsleep.models.transformer import PatchConfig, PatchTransformer

SHARED = Path(__file__).parents[2] / "shared"
SLEEP_EDF = SHARED / "realdata/psg_edf/sleepedf_SC4001_5min.edf"
PUBLISHED = SHARED / "fixtures/pftsleep"
START = datetime(2024, 3, 1, 22, 30, 5)
SEVEN = {"ECG": "mV", "E1-M2": "uV", "Chin": "uV", "C4-M1": "uV", "SpO2": "%", "Thorax": "uV", "Abdomen": "uV"}


def untrained(*channels: str) -> Stager:
    torch.manual_seed(0)
    encoder = PatchTransformer(PatchConfig.tiny(channels, 100., d_model=32, n_layers=1))
    return Stager(encoder, LinearProbe.of(encoder), Recipe.default(channels), dict(task="untrained")).eval()


def night(seconds: float, labels=("EEG C4-M1", "EOG E1-M2"), units=None, fs: float = 100., start=START, seed=0, id="night") -> Recording:
    rng, units = np.random.default_rng(seed), units or {}
    made = [array_channel(c, 20 * rng.standard_normal(round(seconds * fs)) if units.get(c) != "%" else 95 + rng.random(round(seconds * fs)), fs, units.get(c, "uV")) for c in labels]
    return Recording(id, named_channels(made), start=start)


@pytest.fixture(scope="module")
def stager(): return untrained("C4-M1", "E1-M2")

@pytest.fixture(scope="module")
def folder(tmp_path_factory, stager):
    "Recordings, one of them broken, and a stager beside them."
    root = tmp_path_factory.mktemp("stage")
    (root / "in" / "deep").mkdir(parents=True)
    write_edf(night(600), root / "in" / "a.edf")
    write_edf(night(300, seed=1), root / "in" / "deep" / "b.edf")
    (root / "in" / "broken.edf").write_bytes((root / "in" / "a.edf").read_bytes()[:300])
    save_stager(stager, root / "model")
    return root

@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "A small classifier in the layout of the published file, for windows of four minutes."
    encoder, head = shaken(PatchTransformer(tiny(patch=750, max_patches=40))), shaken(Head(HeadConfig.pftsleep(d_model=16, hidden=8)), 2)
    return saved(tmp_path_factory.mktemp("published") / "pft_sleep_classifier.ckpt", original_state(encoder, prefix="encoder.model.") | head_state(head))


def results(out: Path, id: str) -> dict[str, Path]: return {form: out / f"{id}-{end}" for form, end in FORMATS.items()}

def in_tens(h: Hypnogram) -> list[int]: return np.repeat(h.stages, round(h.epoch_length / 10)).tolist()

def agree(out: Path, id: str, h: Hypnogram) -> None:
    "Every file says the same, and on the same clock."
    files = results(out, id)
    for form in ("csv", "edf", "hypjson", "nsrr"): assert in_tens(read_hypnogram(files[form])) == in_tens(h), form
    if h.start: assert {read_hypnogram(files[form]).start for form in ("edf", "nsrr")} == {h.start}
    assert files["png"].read_bytes().startswith(b"\x89PNG") and RESEARCH_USE in files["html"].read_text()


# a folder

def test_folder(folder, stager, capsys):
    out = folder / "out"
    assert main(["stage", str(folder / "in"), str(folder / "model"), "--out", str(out)]) == 1
    assert "2 done, 0 skipped, 1 failed" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {p.name for i in ("a", "b") for p in results(out, i).values()} | {"ledger.csv"} # nothing hidden, nothing of the broken one
    for i, path in (("a", folder / "in/a.edf"), ("b", folder / "in/deep/b.edf")): agree(out, i, stage_file(path, stager)[1])
    ledger = pd.read_csv(out / "ledger.csv", index_col="id")
    assert ledger["status"].to_dict() == {"a": "done", "broken": "failed", "b": "done"} and (ledger["model"] == weights_hash(stager)).all()
    assert "broken.edf" in ledger["message"]["broken"] and "->" in ledger["message"]["broken"] and ledger["epochs"].tolist() == [20, 0, 10]
    assert .2 <= ledger["confidence"]["a"] <= 1 and "less than 4 h" in ledger["warnings"]["a"]


def test_own_results_are_no_recordings(folder, stager, tmp_path):
    shutil.copytree(folder / "in", tmp_path / "in")
    list(stage_files(find_recordings(tmp_path / "in"), stager, tmp_path / "in"))
    assert [p.stem for p in find_recordings(tmp_path / "in")] == ["a", "broken", "b"]


def test_table(folder, stager):
    h = stage_file(folder / "in/a.edf", stager)[1]
    table = staging.stage_table(h)
    assert table["clock"].tolist()[:2] == ["2024-03-01 22:30:05", "2024-03-01 22:30:35"]
    np.testing.assert_allclose(table["confidence"], h.probabilities.max(1), atol=1e-4)
    assert (table["confidence"] == table.filter(like="p_").max(axis=1)).all()


def test_earlier_results_are_replaced(stager, tmp_path):
    file, out = tmp_path / "x.edf", tmp_path / "out"
    write_edf(night(600), file)
    list(stage_files([file], stager, out))
    write_edf(night(300), file)
    o, = stage_files([file], stager, out, formats=["csv"])
    assert o.status == "done" and {p.name for p in out.iterdir()} == {"x-stages.csv", "ledger.csv"} # no page of the other night
    assert len(read_hypnogram(out / "x-stages.csv")) == 10
    file.write_bytes(b"no more")
    o, = stage_files([file], stager, out)
    assert o.status == "failed" and (out / "x-stages.csv").exists() and pd.read_csv(out / "ledger.csv")["status"].tolist() == ["failed"]


def test_nothing_half_written(stager, tmp_path, monkeypatch, folder):
    rec, h = stage_file(folder / "in/a.edf", stager)
    write_staging(rec, h, stager, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(staging, "staging_report", full) # the last of the six
    with pytest.raises(StoreError, match="No space left"): write_staging(rec, replace(h, stages=np.full(len(h), Stage.W)), stager, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_mistake_of_ours_stops_nobody(stager, tmp_path, monkeypatch, folder):
    real = staging.apply_montage
    monkeypatch.setattr(staging, "apply_montage", lambda rec, *a: 1 / 0 if rec.duration > 500 else real(rec, *a))
    first, second = stage_files([folder / "in/a.edf", folder / "in/deep/b.edf"], stager, tmp_path)
    assert (first.status, first.error, second.status) == ("failed", "ZeroDivisionError", "done") and "a.edf" in first.message
    assert "Traceback" in pd.read_csv(tmp_path / "ledger.csv")["trace"][0]


def test_a_stopped_run_keeps_its_ledger(stager, tmp_path, folder):
    run = stage_files(find_recordings(folder / "in"), stager, tmp_path)
    next(run); run.close()
    assert pd.read_csv(tmp_path / "ledger.csv")["id"].tolist() == ["a"] and not list(tmp_path.glob(".*"))


def test_out_is_no_folder(folder, capfd):
    assert main(["stage", str(folder / "in"), str(folder / "model"), "--out", str(folder / "in" / "a.edf")]) == 1
    err = capfd.readouterr().err.strip()
    assert err.startswith("pftsleep stage: ") and "a.edf" in err and "\n" not in err


# going on

def test_what_is_finished_is_skipped(folder, stager, tmp_path):
    files, out = find_recordings(folder / "in"), tmp_path / "out"
    run = stage_files(files, stager, out)
    first = next(run); run.close() # stopped after the first
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("a-*")}
    assert [o.status for o in stage_files(files, stager, out)] == ["skipped", "failed", "done"]
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("a-*")} == before and len(before) == len(FORMATS)
    ledger = read_ledger(out)
    assert {i: o.status for i, o in ledger.items()} == {"a": "skipped", "broken": "failed", "b": "done"} and replace(ledger["a"], status="done") == first
    assert [o.status for o in stage_files(files, stager, out)] == ["skipped", "failed", "skipped"] # also twice


@pytest.mark.parametrize("change", ["formats", "weights", "lost", "precision", "annotation"])
def test_what_has_changed_is_staged_again(folder, tmp_path, change):
    stager, out = untrained("C4-M1", "E1-M2"), tmp_path / "out"
    files = [Path(shutil.copy(folder / "in/a.edf", tmp_path / "a.edf")), Path(shutil.copy(folder / "in/deep/b.edf", tmp_path / "b.edf"))]
    run = lambda **kw: [o.status for o in stage_files(files, stager, out, **{"formats": ["csv", "nsrr"]} | kw)]
    assert run() == ["done", "done"] and run() == ["skipped", "skipped"]
    if change == "weights":
        with torch.no_grad(): stager.head.linear.bias[0] += 1
    if change == "lost": (out / "a-stages.csv").unlink()
    if change == "annotation": (tmp_path / "a-nsrr.xml").write_text("<PSGAnnotation/>")
    expected = ["done", "skipped"] if change in ("lost", "annotation") else ["done", "done"]
    assert run(**{"formats": dict(formats=["csv"]), "precision": dict(precision="bf16")}.get(change, {})) == expected
    assert {o.model for o in read_ledger(out).values()} == {weights_hash(stager)}


@pytest.mark.parametrize("damage", [b"", b"id,status\n1,2\n", b"\xff\x00\"\n", b"x" * 10000, None])
def test_a_damaged_ledger_costs_time_not_results(folder, stager, tmp_path, damage):
    list(stage_files([folder / "in/a.edf"], stager, tmp_path, formats=["csv"]))
    path = tmp_path / "ledger.csv"
    path.write_bytes(path.read_bytes().replace(b"done", b"done\x00").replace(b",20,", b",twenty,") if damage is None else damage)
    assert [o.status for o in stage_files([folder / "in/a.edf"], stager, tmp_path, formats=["csv"])] == ["done"]
    assert list(read_ledger(tmp_path)) == ["a"]


def test_rows_of_other_recordings_are_kept(folder, stager, tmp_path):
    list(stage_files([folder / "in/a.edf"], stager, tmp_path, formats=["csv"]))
    list(stage_files([folder / "in/deep/b.edf"], stager, tmp_path, formats=["csv"]))
    assert list(read_ledger(tmp_path)) == ["a", "b"]


def test_the_next_night_is_read_while_the_model_works(folder, tmp_path, monkeypatch):
    "And only the next one."
    stager, said = untrained("C4-M1", "E1-M2"), []
    real = staging.prepare_file
    monkeypatch.setattr(staging, "prepare_file", lambda path, *a: said.append(path.stem) or real(path, *a))
    files = [Path(shutil.copy(folder / "in/deep/b.edf", tmp_path / f"{k}.edf")) for k in range(4)]
    run = stage_files(files, stager, tmp_path / "out", formats=["csv"])
    next(run)
    assert set(said) <= {"0", "1"}
    run.close()
    assert len(said) <= 2 # nothing is begun for a caller who has gone


# lights

def lit_night(**kw): return replace(night(600), events=pd.DataFrame([(60., 0., "Lights off", ""), (500., 0., "Lights on", "")], columns=["onset", "duration", "name", "channel"]), **kw)

@pytest.mark.parametrize("beside", [False, True])
def test_lights(stager, tmp_path, beside):
    write_edf(lit_night(), tmp_path / "x.edf")
    scored = Hypnogram(np.full(19, Stage.N2), 30, start=START, lights_off=90., lights_on=450.) # it begins with the recording
    if beside: write_annotations(scored, None, tmp_path / "x-nsrr.xml", "nsrr")
    o, = stage_files([tmp_path / "x.edf"], stager, tmp_path / "out")
    source, off, on = ("x-nsrr.xml", 90., 450.) if beside else ("annotations of the recording", 60., 500.)
    h = stage_file(tmp_path / "x.edf", stager)[1]
    assert (h.lights_off, h.lights_on, o.lights) == (off, on, f"off: {source}; on: {source}")
    page = (tmp_path / "out/x-report.html").read_text()
    assert f"{(START + pd.Timedelta(seconds=off)):%H:%M:%S} (file)" in page and f"as {source} says" in page and f"{(on - off) / 60:.1f}" in page
    assert read_hypnogram(tmp_path / "out/x-stages.xml").lights_off == off
    assert not np.array_equal(h.stages[:19], scored.stages) # the stages are the model's
    agree(tmp_path / "out", "x", h)


def test_no_lights(stager, tmp_path):
    write_edf(night(600), tmp_path / "x.edf")
    o, = stage_files([tmp_path / "x.edf"], stager, tmp_path / "out", formats=["html"])
    assert o.lights == "off: first scored epoch; on: last scored epoch" and "(first scored epoch)" in (tmp_path / "out/x-report.html").read_text()


@pytest.mark.parametrize(("off", "on", "expected"), [(500., 60., (None, None)), (-5., 60., (None, 60.)), (60., 1e6, (60., None)), (np.nan, 100., (None, 100.)), (600., 601., (600., None))])
def test_impossible_lights(off, on, expected, stager):
    rec = lit_night()
    rec = replace(rec, events=rec.events.assign(onset=[off, on]), channels={n.split()[-1]: replace(c, name=n.split()[-1]) for n, c in rec.channels.items()})
    lights = find_lights(SLEEP_EDF if SLEEP_EDF.exists() else __file__, rec)
    assert lights[:2] == expected
    h = staging.lit(stager.stage(rec), replace(rec, provenance=dict(lights=lights)))
    staging.lights_rule(rec, h) # can be told, whatever was said


def test_a_broken_file_beside_stops_nothing(stager, tmp_path):
    write_edf(lit_night(), tmp_path / "x.edf")
    (tmp_path / "x-nsrr.xml").write_bytes(b"<PSGAnnotation><ScoredEvents>")
    o, = stage_files([tmp_path / "x.edf"], stager, tmp_path / "out", formats=["html"])
    assert o.status == "done" and "annotations of the recording" in o.lights and "Repaired or left out" in o.warnings
    assert "x-nsrr.xml isn&#x27;t asked for the lights" in (tmp_path / "out/x-report.html").read_text()


# time

def test_gap_and_no_clock(stager, tmp_path):
    "Epochs without signal are unscored in all files; a file without a clock has none."
    rec = night(600)
    x = {n: c.samples().copy() for n, c in rec.channels.items()}
    for v in x.values(): v[100 * 100:250 * 100] = np.nan
    gappy = Recording("gap", named_channels([array_channel(n, v, 100, "uV") for n, v in x.items()]), start=None)
    h = stager.stage(gappy_prepared := replace(gappy, channels={"C4-M1": replace(gappy["EEG C4-M1"], name="C4-M1"), "E1-M2": replace(gappy["EOG E1-M2"], name="E1-M2")}))
    assert (h.stages == Stage.UNSCORED).nonzero()[0].tolist() == [4, 5, 6, 7] and h.start is None
    write_staging(gappy_prepared, h, stager, tmp_path)
    agree(tmp_path, "gap", h)
    table = pd.read_csv(tmp_path / "gap-stages.csv")
    assert table["confidence"].isna().tolist() == (h.stages < 0).tolist() and "clock" not in table
    assert "4 of 20 epochs (20%) have no signal" in (tmp_path / "gap-report.html").read_text()


def test_wholly_unscored(stager, tmp_path):
    rec = night(60, labels=("C4-M1", "E1-M2"))
    h = Hypnogram([-1, -1], 30, start=START, probabilities=np.full((2, 5), np.nan, "float32"))
    write_staging(rec, h, stager, tmp_path)
    agree(tmp_path, "night", h)


def test_a_last_part_of_an_epoch_and_no_epoch(stager, tmp_path):
    write_edf(night(75), tmp_path / "x.edf"), write_edf(night(20), tmp_path / "y.edf")
    assert len(stage_file(tmp_path / "x.edf", stager)[1]) == 2
    with pytest.raises(SignalError, match="less than one epoch"): stage_file(tmp_path / "y.edf", stager)


# channels

def test_channels_by_label(stager, tmp_path, capsys, folder):
    write_edf(night(300, labels=("EEG C4-M1", "EOG E1-M2", "X7", "LOC")), tmp_path / "x.edf")
    line = ["stage", str(tmp_path / "x.edf"), str(folder / "model"), "--out", str(tmp_path / "out")]
    assert main([*line, "--channels", "[C4-M1=X7,E1-M2=LOC]"]) == 0
    rec, h = stage_file(tmp_path / "x.edf", stager, chosen={"C4-M1": "X7", "E1-M2": "LOC"})
    assert [(str(c.kind), c.source_label) for c in rec.channels.values()] == [("EEG", "X7"), ("EOG", "LOC")]
    agree(tmp_path / "out", "x", h)
    assert not np.allclose(h.probabilities, stage_file(tmp_path / "x.edf", stager)[1].probabilities) # it was another channel
    page = (tmp_path / "out" / "x-report.html").read_text()
    assert "X7" in page and "LOC" in page and "EEG C4-M1" not in page
    capsys.readouterr()
    assert main([*line, "--channels", "E1-M2=ROC"]) == 1
    said = capsys.readouterr().out
    assert "ChannelError" in said and "ROC" in said and "X7" in said and "LOC" in said
    assert main([*line, "--channels", "ECG=X7"]) == 1 and "it wants C4-M1, E1-M2" in capsys.readouterr().err


def test_chosen_wins_over_the_one_of_that_name():
    rec = choose_channels(night(60, labels=("C4-M1", "X7")), {"C4-M1": "X7"})
    assert {n: c.source_label for n, c in rec.channels.items()} == {"C4-M1": "X7", "C4-M1 #2": "C4-M1"}
    with pytest.raises(ChannelError, match="C4-M1, X7"): choose_channels(night(60, labels=("C4-M1", "X7")), {"C4-M1": "X8"})


def test_missing_channels(stager, tmp_path, capsys, folder):
    write_edf(night(300, labels=("EEG C4-M1",)), tmp_path / "x.edf")
    line = ["stage", str(tmp_path / "x.edf"), str(folder / "model"), "--out", str(tmp_path / "out")]
    assert main(line) == 1 and "E1-M2" in capsys.readouterr().out
    assert main([*line, "--allow-missing"]) == 0
    page = (tmp_path / "out" / "x-report.html").read_text()
    assert "Missing: E1-M2" in page and weights_hash(stager) in page and stager.recipe.hash in page and page.index("Warnings") < page.index("<figure")


# published models

def test_published_file_stages_to_the_end(published, tmp_path):
    "Nothing behind the model's window is lost: eleven minutes, in windows of four."
    write_edf(night(660, tuple(SEVEN), SEVEN, fs=50), tmp_path / "x.edf")
    assert main(["stage", str(tmp_path / "x.edf"), str(published), "--out", str(tmp_path / "out"), "--precision", "float32"]) == 0
    stager = load_stager(published)
    assert stager.channels == PFTSLEEP_CHANNELS and stager.window == 8
    h = stage_file(tmp_path / "x.edf", stager)[1]
    assert len(h) == 22 and (h.stages >= 0).all() and np.isfinite(h.probabilities).all()
    agree(tmp_path / "out", "x", h)
    page = (tmp_path / "out" / "x-report.html").read_text()
    for wanted in (*PFTSLEEP_CHANNELS, stager.provenance["sha256"], "PFTSleep classifier"): assert wanted in page, wanted
    assert page.count("<img ") == 1 and staging._shown_eeg(stage_file(tmp_path / "x.edf", stager)[0]) == "EEG central"
    half = stage_file(tmp_path / "x.edf", stager, precision="bf16")[1]
    assert 0 < np.abs(half.probabilities - h.probabilities).max() < .05


@pytest.mark.skipif(not PUBLISHED.exists(), reason="../shared/fixtures is not here")
def test_published_fixture(tmp_path):
    write_edf(night(300, tuple(SEVEN), SEVEN, fs=50), tmp_path / "x.edf")
    assert main(["stage", str(tmp_path / "x.edf"), str(PUBLISHED / "pft_classifier_tiny.ckpt"), "--out", str(tmp_path / "out")]) == 0
    assert main(["stage", str(tmp_path / "x.edf"), str(PUBLISHED / "pft_encoder_tiny.ckpt"), "--out", str(tmp_path / "none")]) == 1
    assert len(read_hypnogram(tmp_path / "out/x-stages.xml")) == 10 and not (tmp_path / "none").exists()


@pytest.mark.parametrize("options", [["--formats", "pdf"], ["--channels", "EEG"], ["--device", "cuda"], ["--cohort", "nobody"]])
def test_wrong_options(options, folder, capfd, tmp_path):
    if options[1] == "cuda" and torch.cuda.is_available(): pytest.skip("there is a GPU")
    assert main(["stage", str(folder / "in"), str(folder / "model"), "--out", str(tmp_path / "out"), *options]) == 1
    err = capfd.readouterr().err.strip()
    assert " -> " in err and "\n" not in err and not (tmp_path / "out").exists()


def test_refuses_without_weights(folder, capfd):
    assert main(["stage", str(folder / "in"), str(folder / "nothing")]) == 1
    err = capfd.readouterr().err
    assert "huggingface.co/benmfox/PFTSleep" in err and "pftsleep probe" in err and "Traceback" not in err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu(folder, tmp_path, stager):
    assert main(["stage", str(folder / "in/a.edf"), str(folder / "model"), "--out", str(tmp_path), "--device", "cuda"]) == 0
    agree(tmp_path, "a", stage_file(folder / "in/a.edf", stager)[1])


# a real file

@pytest.mark.skipif(not SLEEP_EDF.exists(), reason="../shared/realdata is not here")
def test_real_file(tmp_path):
    stager = untrained("EEG frontal", "EOG left", "chin EMG")
    o, = stage_files([SLEEP_EDF], stager, tmp_path, chosen={"EOG left": "EOG horizontal"}, allow_missing=True)
    assert (o.status, o.epochs) == ("done", 10) and "Missing: chin EMG" in o.warnings # its EMG is an envelope at 1 Hz
    rec, h = stage_file(SLEEP_EDF, stager, chosen={"EOG left": "EOG horizontal"}, allow_missing=True)
    assert h.start == datetime(1989, 4, 24, 16, 13) == rec.start
    agree(tmp_path, SLEEP_EDF.stem, h)
    used = rec.provenance["channels"]
    assert used["label or derivation"].tolist() == ["EEG Fpz-Cz", "EOG horizontal", "EMG submental"] and used["rate, Hz"].tolist() == ["100", "100", "1"] and used["gaps"].tolist() == ["0 %", "0 %", "can't be used"]


def test_no_identity(folder, stager, tmp_path):
    raw = bytearray((folder / "in/a.edf").read_bytes())
    raw[8:88] = b"MCH-0234567 F 02-MAY-1951 Haagse_Harry".ljust(80)
    (tmp_path / "x.edf").write_bytes(raw)
    list(stage_files([tmp_path / "x.edf"], stager, tmp_path / "out"))
    assert len(list((tmp_path / "out").iterdir())) == 7
    for p in (tmp_path / "out").iterdir(): assert not any(s in p.read_bytes() for s in (b"Haagse", b"0234567", b"1951")), p.name
    assert json.loads((tmp_path / "out/x-stages.json").read_text())["header"]["study_id"] == ""
