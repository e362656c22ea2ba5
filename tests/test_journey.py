"""The whole way through the real command: convert, pretrain, probe, stage, evaluate; and what happens when something is wrong, or somebody presses Ctrl-C."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from pftsleep.apps.cli import COMMANDS, command, help_texts, main
from pftsleep.data.edf import read_edf, write_edf
from pftsleep.data.hypnograms import read_hypnogram
from pftsleep.data.recording import Recording, Stage, array_channel
from pftsleep.data.simulate import simulate_cohort
from pftsleep.data.splits import Split
from pftsleep.data.store import open_store
from pftsleep.models.stager import load_stager
from pftsleep.models.transformer import PatchTransformer

COMMAND = Path(sys.executable).parent / "pftsleep"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TRAIN = ["--train.accelerator", "cpu", "--train.batch_size", "2"]
TINY = [*TRAIN, "--train.d_model", "32", "--train.n_layers", "1"]
EPOCHS = 10 # of pretraining: enough that a signal comes in the middle, on a busy machine too
SECRETS = "Haagse", "MCH-0234567", "02-MAY-1951", "1951", "PSG-1234", "Telemetry03"


def run(*arguments, code=0):
    "The command in a process of its own; its output, after a look at the exit code."
    done = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == code, f"exit {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr
    return done


def plant(path: Path) -> None:
    "Somebody's name, birth date and codes in the header of an EDF+ file."
    raw = bytearray(path.read_bytes())
    date = raw[88:168].decode().split()[1] # Startdate dd-MMM-yyyy ...: stays, since the clock comes from it
    raw[8:88] = b"MCH-0234567 F 02-MAY-1951 Haagse_Harry".ljust(80)
    raw[88:168] = f"Startdate {date} PSG-1234/2002 NN Telemetry03".encode().ljust(80)
    path.write_bytes(raw)
    assert read_edf(path, keep_identity=True) and all(s.encode() in path.read_bytes() for s in SECRETS)


@pytest.fixture(scope="module")
def work(tmp_path_factory): return tmp_path_factory.mktemp("journey")


@pytest.fixture(scope="module")
def cohort(work):
    simulate_cohort(work / "cohort", 8, hours=.5, seed=0, montage={"EEG": 100, "EOG(L)": 100})
    for path in (work / "cohort").rglob("*.edf"): plant(path)
    return work / "cohort"


@pytest.fixture(scope="module")
def store(work, cohort):
    out = run("convert", cohort, work / "store", "--cohort", "simulated", "--channels", "[EEG,EOG]")
    return SimpleNamespace(path=work / "store", said=out.stdout + out.stderr)


@pytest.fixture(scope="module")
def pretrained(work, store):
    "From a YAML file, one setting of which the command line overrides."
    (work / "pretrain.yaml").write_text(f"store: {store.path}\nout: {work / 'run'}\ntrain:\n  epochs: 999\n  d_model: 32\n  n_layers: 1\n  accelerator: cpu\n  batch_size: 2\n")
    out = run("pretrain", "--config", work / "pretrain.yaml", "--train.epochs", EPOCHS)
    return SimpleNamespace(path=work / "run", said=out.stdout + out.stderr)


@pytest.fixture(scope="module")
def probed(work, store, pretrained):
    before = (pretrained.path / "encoder" / "model.safetensors").read_bytes()
    out = run("probe", store.path, pretrained.path / "encoder", work / "probe", "--train.epochs", 2, *TRAIN)
    assert (pretrained.path / "encoder" / "model.safetensors").read_bytes() == before
    return SimpleNamespace(path=work / "probe", model=work / "probe" / "stager", said=out.stdout + out.stderr)


@pytest.fixture(scope="module")
def staged(work, cohort, probed):
    out = run("stage", cohort / "edfs", probed.model, "--out", work / "staged")
    return SimpleNamespace(path=work / "staged", said=out.stdout + out.stderr)


@pytest.fixture(scope="module")
def evaluated(work, cohort, store, probed):
    "On a store that has meanwhile got a second night of somebody who was trained on, and a person whom nobody knew."
    known = Split.load(probed.model / "split.json").parts["train"][0]
    for new in (known.replace("-v1", "-v2"), "sim-0099-v1"):
        for old in cohort.rglob(f"{known}*"):
            if old.suffix != ".json": shutil.copy(old, old.with_name(old.name.replace(known, new)))
    out = run("convert", cohort, store.path, "--cohort", "simulated", "--channels", "[EEG,EOG]")
    assert "2 done, 8 skipped, 0 failed" in out.stdout
    out = run("evaluate", store.path, probed.model, "--out", work / "evaluation")
    return SimpleNamespace(path=work / "evaluation", second=known.replace("-v1", "-v2"), said=out.stdout + out.stderr)


# the journey

def test_converted(cohort, store):
    assert "8 done, 0 skipped, 0 failed" in store.said
    nights = open_store(store.path)
    assert nights.recipe["channels"] == ["EEG", "EOG"]
    table = nights.manifest[nights.manifest["id"].str.match(r"sim-000\d-v1")]
    assert len(table) == 8 and (table["epochs"] == 60).all() and (table["channels"] == "EEG;E1").all()
    first = nights["sim-0001-v1"]
    truth = read_hypnogram(cohort / "annotations-events-nsrr" / "sim-0001-v1-nsrr.xml")
    assert first.hypnogram.stages.tolist() == truth.stages.tolist() and len(first["EEG"].samples()) == 180_000


def test_pretrained(store, pretrained):
    facts = json.loads((pretrained.path / "run.json").read_text())
    assert (facts["facts"]["config"]["epochs"], facts["facts"]["config"]["d_model"]) == (EPOCHS, 32) # the command line wins, the rest is the file's
    encoder = PatchTransformer.from_pretrained(pretrained.path / "encoder")
    assert encoder.config.channels == ("EEG", "E1")
    losses = pd.read_csv(pretrained.path / "logs" / "version_0" / "metrics.csv")["train_loss"].dropna()
    assert len(losses) == EPOCHS and losses.iloc[-1] < losses.iloc[0]
    Split.load(pretrained.path / "split.json").check(open_store(store.path).manifest)
    assert "validation loss" in pretrained.said


def test_probed(pretrained, probed):
    stager = load_stager(probed.model)
    assert stager.channels == ("EEG", "E1") and stager.epoch_length == 30
    assert Split.load(probed.model / "split.json") == Split.load(pretrained.path / "split.json") # whoever pretrained, tests nobody later
    assert json.loads((probed.path / "run.json").read_text())["results"]["weights"]


def self_contained(page: Path) -> bool:
    "Whether a page loads nothing from anywhere."
    text = page.read_text()
    links = re.findall(r"""(?:src|href|srcset|action|poster)\s*=\s*["']?([^"'\s>]*)""", text)
    return "<img" in text and all(x.startswith(("data:", "#")) for x in links) and not re.search(r"@import|url\((?!['\"]?data:)|<link|<iframe|fetch\(", text)


def test_staged(staged):
    assert "8 done, 0 skipped, 0 failed" in staged.said
    assert len(list(staged.path.iterdir())) == 8 * 6 + 1 # and the ledger
    for page in staged.path.glob("*-report.html"): assert self_contained(page)
    for table in staged.path.glob("*-stages.csv"):
        h, rows = read_hypnogram(table), pd.read_csv(table)
        assert len(h) == len(rows) == 60 and h.epoch_length == 30
        assert [Stage(s).name for s in h.stages] == rows["stage"].tolist()
        p = rows.filter(like="p_").to_numpy()
        assert np.abs(p.sum(1) - 1).max() < 1e-3 and rows.filter(like="p_").idxmax(axis=1).str[2:].tolist() == rows["stage"].tolist()
        events = read_edf(table.with_suffix(".edf"))
        assert events.events["duration"].sum() == 1800 and events.start.isoformat(sep=" ") == rows["clock"][0]
        assert read_hypnogram(table.with_suffix(".edf")).stages.tolist() == h.stages.tolist()


def test_evaluated(evaluated):
    metrics = pd.read_csv(evaluated.path / "metrics.csv", index_col=["result", "metric"])
    assert set(metrics.index.get_level_values("result")) == {"most frequent stage", "model"}
    epochs = pd.read_csv(evaluated.path / "predictions.csv")
    assert metrics.loc[("model", "accuracy"), "pooled"] == pytest.approx((epochs["true"] == epochs["predicted"]).mean())
    assert metrics.loc[("most frequent stage", "kappa"), "pooled"] == 0
    assert self_contained(evaluated.path / "report.html")
    assert "results in" in evaluated.said


def test_nobody_is_judged_who_was_learned_from(store, probed, evaluated):
    split = Split.load(probed.model / "split.json")
    judged = set(pd.read_csv(evaluated.path / "predictions.csv")["id"])
    assert judged == {*split.parts["test"], "sim-0099-v1"}
    assert evaluated.second in set(open_store(store.path).manifest["id"]) # it was there to be taken, and its id stands in no split


def test_nobody_left_to_judge(work, store, probed, capfd):
    "All people of this split were trained on."
    model = shutil.copytree(probed.model, work / "knows-all")
    rows = open_store(store.path).manifest
    Split({"train": tuple(rows["id"])}, dict(zip(rows["id"], rows["subject"], strict=True))).save(model / "split.json")
    assert main(["evaluate", str(store.path), str(model), "--out", str(work / "none")]) == 1
    assert "hasn't seen" in capfd.readouterr().err and not (work / "none").exists()


def test_no_identity_anywhere(work, cohort, store, pretrained, probed, staged, evaluated):
    "The name, birth date and codes of the headers stand in no file that a command wrote, and in nothing it said."
    said = "".join(x.said for x in (store, pretrained, probed, staged, evaluated)) + open_store(store.path).manifest.to_string()
    assert not [s for s in SECRETS if s in said]
    files = [p for p in work.rglob("*") if p.is_file() and not p.is_relative_to(cohort)]
    assert len(files) > 60
    assert not [(p, s) for p in files for s in SECRETS if s != "1951" and s.encode() in p.read_bytes()]
    texts = [p for p in files if p.suffix in (".csv", ".json", ".jsonl", ".html", ".yaml") or p.name.endswith("-stages.edf")]
    assert not [p for p in texts if re.search(r"02-05-1951|1951-05-02|02\.05\.51|02-MAY-1951", p.read_text(errors="replace"))]


# signals

def start(*arguments) -> subprocess.Popen:
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) # a shell that runs these tests in the background has told its children to ignore Ctrl-C
    return subprocess.Popen([COMMAND, *map(str, arguments)], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, preexec_fn=listen)


def wait_for(condition, process) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(.005)


def interrupted(number: int, out: Path, *arguments) -> subprocess.CompletedProcess:
    "A pretraining that gets a signal as soon as it has a checkpoint."
    process = start(*arguments)
    wait_for((out / "checkpoints" / "last.ckpt").exists, process)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=60)
    assert not (out / "encoder").exists(), "it was finished before the signal came: train longer"
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)], ids=lambda n: n.name)
def test_pretraining_goes_on_where_it_was_stopped(number, work, store, pretrained):
    out = work / f"run-{number.name}"
    line = "pretrain", store.path, out, "--train.epochs", EPOCHS, *TINY, "--split", pretrained.path / "split.json"
    stopped = interrupted(number, out, *line)
    run(*line)
    again = pd.read_csv(out / "logs" / "version_1" / "metrics.csv")["epoch"]
    assert again.min() > 0 # it didn't begin anew
    weights = lambda folder: json.loads((folder / "run.json").read_text())["results"]["weights"]
    assert weights(out) == weights(pretrained.path)
    if number == signal.SIGINT:
        assert stopped.returncode == 130
        said = [line for line in stopped.stderr.splitlines() if line.startswith("pftsleep pretrain: interrupted")] # TensorBoard's thread may have something to say before or behind it
        assert len(said) == 1 and "goes on from there" in said[0], stopped.stderr


def test_a_terminated_pretraining_does_not_look_finished(work, store):
    "SIGTERM is how a cluster ends a job; `pretrain && probe` must not go on."
    out = work / "run-SIGTERM"
    stopped = interrupted(signal.SIGTERM, out, "pretrain", store.path, out, "--train.epochs", EPOCHS, *TINY)
    assert stopped.returncode in (143, -signal.SIGTERM), stopped
    assert "Traceback" not in stopped.stderr


def test_half_a_checkpoint_is_not_the_end(store, pretrained, tmp_path):
    "A machine that dies while it writes `last.ckpt` leaves half of it; the one before is whole."
    out = shutil.copytree(pretrained.path, tmp_path / "run")
    shutil.rmtree(out / "encoder")
    last = out / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:last.stat().st_size // 2])
    assert main([str(x) for x in ("pretrain", store.path, out, "--train.epochs", EPOCHS, *TINY)]) == 0
    assert (out / "encoder" / "model.safetensors").read_bytes() == (pretrained.path / "encoder" / "model.safetensors").read_bytes()


# help and usage

@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, capfd):
    assert main([name, "--help"]) == 0
    said = " ".join(capfd.readouterr().out.split())
    texts = help_texts(command(name))
    assert len(texts) >= 2
    for parameter, text in texts.items():
        if parameter != "return" and "%" not in text: assert " ".join(text.split()) in said, parameter


def test_help_of_the_command_itself():
    said = run("--help").stdout
    for name in COMMANDS: assert f"  {name} " in said
    assert run("--version").stdout.startswith("pftsleep ")
    assert "there is no command 'fly'" in run("fly", code=2).stderr
    assert "source, store" in run("convert", code=2).stderr


@pytest.mark.parametrize("line, says", [
    ("pretrain", "store, out"), ("probe {store}", "encoder, out"), ("stage", "source, model"), ("evaluate", "store, model"),
    ("convert a b --ratee 50", "--ratee"), ("convert a b --rate fast", "fast"),
    ("pretrain a b --train.epochs many", "many"), ("pretrain --config {tmp}/no.yaml a b", "no.yaml"), ("pretrain --config {tmp}/broken.yaml a b", "pars"),
    ("pretrain --config {tmp}/unknown.yaml", "stroe")])
def test_usage(line, says, store, tmp_path, capfd):
    (tmp_path / "broken.yaml").write_text("store: [1,\n")
    (tmp_path / "unknown.yaml").write_text("stroe: x\nout: y\n")
    assert main(line.format(store=store.path, tmp=tmp_path).split()) == 2
    err = capfd.readouterr().err
    assert says in err and "Traceback" not in err


# faults

WORDS = "W", "N1", "N2", "N3", "R"


def night(folder: Path, name: str, seconds: int = 300, channels=("EEG", "EOG(L)"), epochs: int | None = 10) -> None:
    rng, begin = np.random.default_rng(len(name)), datetime(2024, 3, 1, 22, 30)
    made = [array_channel(c, 20 * rng.standard_normal(seconds * 100), 100, "uV", c[:3]) for c in channels]
    write_edf(Recording(name, {c.name: c for c in made}, start=begin), folder / f"{name}.edf")
    if epochs: (folder / f"{name}.csv").write_text("onset,duration,stage\n" + "".join(f"{30 * i},30,{WORDS[i % 5]}\n" for i in range(epochs)))


@pytest.fixture(scope="module")
def troubled(work, probed):
    "A folder in which much is wrong, converted with another recipe, and staged."
    files = work / "troubled"
    files.mkdir()
    night(files, "good"), night(files, "longer", epochs=14), night(files, "shorter", epochs=6)
    night(files, "brief", seconds=20, epochs=1), night(files, "blind", channels=("EOG(L)",)), night(files, "broken"), night(files, "wordy")
    (files / "broken.edf").write_bytes((files / "broken.edf").read_bytes()[:300])
    (files / "wordy.edf").write_text("this is not an EDF file\n" * 40)
    converted = run("convert", files, work / "other", "--channels", "[EEG,EOG]", "--rate", 50, code=1)
    staging = run("stage", files, probed.model, "--out", work / "troubled-staged", code=1)
    return SimpleNamespace(files=files, store=work / "other", converted=converted.stdout, staging=staging.stdout, staged=work / "troubled-staged")


def failures(said: str) -> dict[str, str]:
    "id -> message, of the lines under a ledger's first."
    return dict(re.findall(r"^  (\w+): (.*)$", said, re.M))


def test_bad_files_fail_alone(troubled):
    bad = {"brief", "blind", "broken", "wordy"}
    assert "3 done, 0 skipped, 4 failed" in troubled.converted and "3 done, 0 skipped, 4 failed" in troubled.staging
    for said in (troubled.converted, troubled.staging):
        lines = failures(said)
        assert set(lines) == bad
        for name, line in lines.items(): assert f"{name}" in line.split(": ", 1)[1] and " -> " in line, line # the file and the remedy
        assert "EEG" in lines["blind"] # the channel
    assert set(open_store(troubled.store).manifest["id"]) == {"good", "longer", "shorter"}
    assert {p.name.split("-")[0] for p in troubled.staged.iterdir()} == {"good", "longer", "shorter", "ledger.csv"}


def test_hypnogram_longer_or_shorter_than_the_signal(troubled):
    nights = open_store(troubled.store)
    reports = {i: nights[i].provenance["alignment"] for i in nights}
    assert {i: (len(nights[i].hypnogram), nights[i].duration) for i in nights} == {"good": (10, 300), "longer": (10, 300), "shorter": (6, 180)}
    assert [reports[i]["epochs_cut_after"] for i in ("good", "longer", "shorter")] == [0, 4, 0]
    assert [reports[i]["signal_cut_after"] for i in ("good", "longer", "shorter")] == [0, 0, 120]
    assert nights["shorter"].hypnogram.stages.tolist() == [0, 1, 2, 3, 4, 0]


def test_two_files_of_one_name_do_not_overwrite_each_other(troubled, probed, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        shutil.copy(troubled.files / f"{'good' if folder == 'a' else 'longer'}.edf", tmp_path / "in" / folder / "night.edf")
    code = main(["stage", str(tmp_path / "in"), str(probed.model), "--out", str(tmp_path / "out")])
    assert code == 1 or len(list((tmp_path / "out").rglob("*-stages.csv"))) == 2


DAMAGE = {
    "cut encoder": ("encoder/model.safetensors", lambda b: b[:len(b) // 2]), "changed head": ("head/model.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1])),
    "no encoder": ("encoder/model.safetensors", None), "cut configuration": ("encoder/config.json", lambda b: b[:len(b) // 2]), "no configuration": ("head/config.json", None),
    "cut stager": ("stager.json", lambda b: b[:len(b) // 2]), "another stager": ("stager.json", lambda b: b'{"a": 1}'), "half a stager": ("stager.json", lambda b: b'{"format": "pftsleep-stager/1"}'),
    "no stager": ("stager.json", None)}


def one_line(capfd, name: str, *words: str) -> None:
    "An error is one line with the command, everything in `words`, and a way out."
    err = capfd.readouterr().err.strip()
    assert err.startswith(f"pftsleep {name}: ") and "\n" not in err and " -> " in err, err
    for word in words: assert word in err, err


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_model(damage, troubled, probed, tmp_path, capfd):
    name, change = DAMAGE[damage]
    model = shutil.copytree(probed.model, tmp_path / "model")
    data = (model / name).read_bytes()
    if change: (model / name).write_bytes(change(data))
    else: (model / name).unlink()
    assert main(["stage", str(troubled.files / "good.edf"), str(model), "--out", str(tmp_path / "out")]) == 1
    one_line(capfd, "stage", str(model))
    assert not (tmp_path / "out").exists()


FAULTS = { # what somebody did -> the line, words of the message
    "convert from nowhere": ("convert {tmp}/nowhere {tmp}/s", "nowhere"), "convert nothing": ("convert {tmp}/empty {tmp}/s", "empty"),
    "convert over another recipe": ("convert {files} {store} --rate 50", "{store} recipe"), "convert with no workers": ("convert {files} {tmp}/s --workers -1", "-1"),
    "convert with a negative rate": ("convert {files} {tmp}/s --rate -5", "rate"), "convert into a file": ("convert {files} {tmp}/file", "file"),
    "pretrain on nothing": ("pretrain {tmp}/nowhere {tmp}/r", "nowhere"), "pretrain on a file": ("pretrain {tmp}/file {tmp}/r", "{tmp}/file"),
    "pretrain on a damaged store": ("pretrain {tmp}/damaged {tmp}/r", "{tmp}/damaged"), "pretrain into a file": ("pretrain {store} {tmp}/file", "{tmp}/file"),
    "pretrain in a used folder": ("pretrain {store} {run} --train.epochs 3", "{run} config"), "pretrain on a channel that isn't there": ("pretrain {store} {tmp}/r --train.channels [ECG]", "ECG"),
    "no epochs": ("pretrain {store} {tmp}/r --train.epochs 0", "epochs 0"), "no batch": ("pretrain {store} {tmp}/r --train.batch_size 0", "batch_size 0"),
    "no window": ("pretrain {store} {tmp}/r --train.window 0", "window 0"),
    "no such accelerator": ("pretrain {store} {tmp}/r --train.accelerator warp", "warp"), "no such precision": ("pretrain {store} {tmp}/r --train.precision 8", "8"),
    "damaged split": ("pretrain {store} {tmp}/r --split {tmp}/file", "{tmp}/file"), "split of others": ("pretrain {other} {tmp}/r --split {run}/split.json", "sim-0001-v1"),
    "probe without encoder": ("probe {store} {tmp}/nowhere/encoder {tmp}/p", "nowhere"), "probe on another recipe": ("probe {other} {run}/encoder {tmp}/p --split {tmp}/split.json", "{other} recipe"),
    "stage nothing": ("stage {tmp}/nowhere {model}", "nowhere"), "stage an empty folder": ("stage {tmp}/empty {model}", "empty"), "stage with nothing": ("stage {files} {tmp}/empty", "empty"),
    "evaluate nothing": ("evaluate {tmp}/nowhere {model}", "nowhere"), "evaluate another recipe": ("evaluate {other} {model} --out {tmp}/e", "{other} recipe"),
    "evaluate into a file": ("evaluate {store} {model} --out {tmp}/file", "{tmp}/file")}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault, store, troubled, pretrained, probed, tmp_path, capfd):
    line, words = FAULTS[fault]
    (tmp_path / "empty").mkdir(), (tmp_path / "damaged").mkdir()
    (tmp_path / "file").write_text("{}"), (tmp_path / "damaged" / "store.json").write_text("{}")
    Split({"train": ("good",), "val": ("longer",), "test": ("shorter",)}, {i: i for i in ("good", "longer", "shorter")}).save(tmp_path / "split.json")
    there = dict(tmp=tmp_path, store=store.path, run=pretrained.path, model=probed.model, files=troubled.files, other=troubled.store)
    assert main(line.format(**there).split()) == 1
    one_line(capfd, line.split()[0], *words.format(**there).split())
    if "r --train" in line: assert not (tmp_path / "r" / "encoder").exists()
