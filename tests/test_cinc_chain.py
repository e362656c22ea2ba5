"""SleepFM's five steps on CinC 2018 as a user runs them, one script after the other: a real record's header, scoring and truth (its signal is simulated from the real stages) among simulated people."""
import importlib.util
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from pftsleep.apps.cli import make_parser
from pftsleep.apps.stores import recipe_of
from pftsleep.data.hypnograms import read_hypnogram
from pftsleep.data.published_splits import SLEEPFM_RECORDS
from pftsleep.data.recording import Hypnogram, Stage
from pftsleep.data.signals import Recipe
from pftsleep.data.simulate import simulate_night
from pftsleep.data.simulate_open import simulate_open_study
from pftsleep.data.sleepfm_epochs import StoreNights
from pftsleep.data.sleepfm_recipes import CINC_LABELS, SLEEPFM_MODALITIES
from pftsleep.data.splits import Split
from pftsleep.data.store import open_store
from pftsleep.errors import ConfigError
from pftsleep.models.transformer import PatchConfig, PatchTransformer
from pftsleep.training.embedding_probe import read_embeddings
from pftsleep.training.runs import history

JOBS, SHARED = Path(__file__).parents[1] / "jobs" / "cinc2018", Path(__file__).parents[2] / "shared" / "realdata" / "cinc2018"
STAGES, REAL, RATE, ONSET = [s.name for s in Stage if s >= 0], "tr03-0005", 200, 360 # Hz, s
TINY = {"--train.accelerator": "cpu", "--train.workers": 0, "--train.loggers": "[]"}


@pytest.fixture
def real():
    if not SHARED.is_dir(): pytest.skip("the real files of CinC 2018 aren't beside the clone")
    return SHARED


def real_record(real: Path, folder: Path, epochs: int | None = None) -> np.ndarray:
    "Writes the record, whole or its first epochs; returns the truth, one stage for each sample. The saturation says which stage it is: 90 % and one for each step of the stage's number."
    lines, hypnogram = (real / f"{REAL}.hea").read_text().splitlines(), read_hypnogram(real / f"{REAL}.arousal")
    n = int(lines[0].split()[3]) if epochs is None else (ONSET + 30 * epochs) * RATE
    with h5py.File(real / f"{REAL}-arousal.mat") as f: truth = sum((f[f"data/sleep_stages/{name}"][0, :n] > 0) * (s + 1) for s, name in enumerate(("wake", "nonrem1", "nonrem2", "nonrem3", "rem"))).astype(int) - 1
    stages = np.r_[truth[:1], truth[:-1]] # its changes are one sample early
    known = Hypnogram(np.r_[np.zeros(ONSET // 30, "int8"), hypnogram.stages, 0, 0][:-(-n // (30 * RATE))], 30.)
    night = simulate_night(known, dict.fromkeys(CINC_LABELS, float(RATE)), seed=5, id=REAL)
    scale = {c: 1. for c in CINC_LABELS} | {"ECG": 1000., "Abdomen": 1000., "Thorax": 1000., "Airflow": 1000.}
    wave = np.stack([night[c].samples()[:n] * scale[c] for c in CINC_LABELS], 1)
    wave[:, list(CINC_LABELS).index("SpO2")] = 655.35 * (90 + stages) - 32768
    (folder / REAL).mkdir(parents=True)
    (folder / REAL / f"{REAL}.hea").write_text("\n".join([" ".join([*lines[0].split()[:3], str(n)]), *(" ".join([*line.split()[:6], "0", *line.split()[7:]]) for line in lines[1:])]) + "\n")
    (folder / REAL / f"{REAL}.mat").write_bytes(struct.pack("<5i", 30, 13, n, 0, 4) + b"val\0" + np.rint(wave).astype("<i2").tobytes())
    for name in (f"{REAL}.arousal", f"{REAL}-arousal.mat"): shutil.copy(real / name, folder / REAL)
    return truth


def simulated_records(folder: Path, ids: list[str], hours: float) -> None:
    "People who don't exist, under these ids."
    for night, id in zip(simulate_open_study("cinc2018", folder / "made", len(ids), hours, seed=2), ids, strict=True):
        at = next((folder / "made").rglob(f"{night.id}.hea")).parent
        (folder / id).mkdir()
        for p in at.iterdir(): (folder / id / p.name.replace(night.id, id)).write_bytes(p.read_bytes().replace(night.id.encode(), id.encode()))
    shutil.rmtree(folder / "made")


def arguments(script: str, *given, **options) -> list[str]:
    return [*map(str, ["--config", JOBS / f"{script}.yaml", *(x for k, v in options.items() for x in (f"--{k}", v)), *given])]

@cache
def loaded(script: str):
    spec = importlib.util.spec_from_file_location(f"cinc_{script}", JOBS / f"{script}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return getattr(module, script)

def within(script: str, *given, **options) -> None:
    "A script in this process, by its own parser."
    parser = make_parser(script, loaded(script))
    loaded(script)(**{k: v for k, v in parser.instantiate(parser.parse_args(arguments(script, *given, **options))).items() if k != "config"})

def started(script: str, *given, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, JOBS / f"{script}.py", *arguments(script, *given, **options)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})

def said(job: subprocess.Popen) -> str:
    out = job.communicate(timeout=900)[0]
    assert job.returncode == 0, out
    return out

def alone(script: str, *given, **options) -> str: return said(started(script, *given, **options))

def killed(job: subprocess.Popen, when) -> None:
    "Ended without a chance to tidy up, as soon as `when()`."
    until = time.monotonic() + 600
    while not when() and job.poll() is None and time.monotonic() < until: time.sleep(.05)
    assert job.poll() is None, "it should still be at work: " + job.communicate()[0]
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()


def true_counts(truth: np.ndarray) -> dict[str, int]:
    "Whole half minutes of each stage, of the one-hot truth."
    runs = np.split(truth, np.flatnonzero(np.diff(truth)) + 1)
    return {s.name: sum((len(r) + (i == len(runs) - 1 and r[0] >= 0)) // (30 * RATE) for i, r in enumerate(runs) if r[0] == s) for s in Stage if s >= 0}


def check_steps(work: Path, truth: np.ndarray, wanted: dict[str, int]) -> None:
    "Counts of all four places where stages are kept, and no shift in either store."
    assert {k: v for k, v in true_counts(truth).items() if v} == {k: v for k, v in wanted.items() if v}
    table = pd.read_csv(work / "epochs" / "epochs.csv").query("id == @REAL")
    assert table["stage"].map(dict(enumerate(STAGES))).value_counts().to_dict() == {k: v for k, v in wanted.items() if v}
    for name, rate in (("native", RATE), ("sleepfm", 256)):
        nights = StoreNights(open_store(work / name))
        e, oxygen = nights[REAL], nights[REAL].recording["SpO2"]
        assert e.counts() == {k: v for k, v in wanted.items() if v} and oxygen.fs == rate
        x = oxygen.samples()
        changes = np.flatnonzero(np.abs(np.diff(x)) > .2) + 1
        off = changes - np.rint((changes / rate) / 30) * 30 * rate
        assert len(changes) and (np.abs(off) <= (0 if name == "native" else 1)).all(), f"changes of stage in {name} are {off} samples off"
        levels = np.array([np.median(x[round(start * rate):round((start + 30) * rate)]) for start in e.starts])
        line = (1, 90) if name == "native" else np.polyfit(e.stages, levels, 1) # the prepared one has no unit
        assert line[0] > .1 and np.abs(np.polyval(line, e.stages) - levels).max() < .1


def check_result(work: Path, wanted: dict[str, int] | None = None) -> pd.DataFrame:
    "Figures that are figures: intervals around them, counts that are those of the people, and baselines that know nothing."
    table = pd.read_csv(work / "results" / "stages.csv")
    assert set(table["model"]) == {"probe", "random encoder", "majority"} and set(table["input"]) == {"respiratory", "sleep_stages", "ekg", "combined", "none"}
    known = table.dropna(subset=["auroc", "auroc_low"])
    assert known[["auroc", "auprc"]].stack().between(0, 1).all() and (known["auroc_low"] <= known["auroc_high"]).all()
    majority = table.query("model == 'majority'").set_index("class")
    assert (majority["auroc"].dropna() == .5).all()
    split = Split.load(work / "split.json")
    rows = read_embeddings([work / "embeddings" / "trained" / f"{i}.parquet" for i in split.parts["test"]]).rows
    for s in STAGES: assert majority.loc[s, "prevalence"] == pytest.approx((rows["stage"] == STAGES.index(s)).mean())
    if wanted is not None: assert {s: int((rows.query("id == @REAL")["stage"] == STAGES.index(s)).sum()) for s in STAGES} == wanted
    assert json.loads((work / "results" / "stages.json").read_text())["split"] == split.hash
    return table


def test_the_chain_on_the_first_minutes(real, tmp_path):
    "Four of the five scripts by their own parsers and YAML files, on 14 minutes of the real night and five short ones; the authors' quoted split."
    truth = real_record(real, files := tmp_path / "files", 16)
    ids = {"train": SLEEPFM_RECORDS["train"][:2], "val": SLEEPFM_RECORDS["val"][:1], "test": SLEEPFM_RECORDS["test"][:2]}
    simulated_records(files, [i for part in ids.values() for i in part], .05)
    wanted = dict(W=9, N1=5, N2=2, N3=0, REM=0)
    within("extract", files, tmp_path / "native", tmp_path / "epochs", workers=1)
    within("prepare", tmp_path / "native", tmp_path / "sleepfm", tmp_path, workers=1, need_all="false")
    split = Split.load(tmp_path / "split.json")
    assert split.parts == {"pretrain": (REAL,), **{part: tuple(sorted(of)) for part, of in ids.items()}}
    check_steps(tmp_path, truth, wanted)
    recipe = open_store(tmp_path / "sleepfm").recipe # in place of step 2, which the slow test runs: its encoders take their time
    for m, channels in SLEEPFM_MODALITIES.items(): PatchTransformer(PatchConfig.tiny(channels=channels, rate=256., patch=7680, n_layers=0), recipe).save_pretrained(tmp_path / "run" / "encoders" / m)
    within("embed", tmp_path / "sleepfm", tmp_path / "run", tmp_path / "split.json", tmp_path / "embeddings", '["train", "test"]')
    evaluate = lambda split: within("evaluate", tmp_path / "embeddings", split, tmp_path / "native", tmp_path / "results", resamples=5)
    evaluate(tmp_path / "split.json")
    check_result(tmp_path)
    few = {part: split.parts[part][:1] for part in ("train", "test")}
    Split(few, {i: split.subjects[i] for part in few.values() for i in part}).save(tmp_path / "few.json")
    with pytest.raises(ConfigError, match="no question can be asked.*stages: epochs of 1 person"): evaluate(tmp_path / "few.json")


@pytest.mark.slow
def test_the_chain_on_the_whole_night(real, tmp_path):
    "Every script a process of its own, each of the long ones killed and run again: the real night of 7 h is among those that are judged."
    truth = real_record(real, files := tmp_path / "files")
    simulated_records(files, [f"tr{k:02}-0001" for k in (0, *range(4, 18))], .05) # so the real one is the second of sorted ids, which the rule draws for the test part
    wanted = dict(W=367, N1=58, N2=267, N3=72, REM=81)
    hypnogram = read_hypnogram(real / f"{REAL}.arousal")
    assert hypnogram.counts() == wanted | dict(UNSCORED=1)
    extract = "extract", files, tmp_path / "native", tmp_path / "epochs"
    killed(started(*extract, workers=1), lambda: len(list((tmp_path / "native" / "recordings").glob("tr*.zarr"))) > 3)
    assert "16 done" not in (out := alone(*extract, workers=1)) and "skipped" in out, "what was finished is kept"
    prepare = "prepare", tmp_path / "native", tmp_path / "sleepfm", tmp_path
    alone(*prepare, split="drawn", test=2, workers=1)
    assert "16 skipped" in alone(*prepare, split="drawn", test=2, workers=1)
    check_steps(tmp_path, truth, wanted)
    split = Split.load(tmp_path / "split.json")
    assert REAL in split.parts["test"] and len(split.parts["pretrain"]) == 12
    options = {k.removeprefix("--"): v for k, v in TINY.items()} | {"train.epochs": 2}
    pretrain = lambda to: ("pretrain", tmp_path / "sleepfm", tmp_path / "pretraining_split.json", tmp_path / to)
    killed(started(*pretrain("run"), **options), (tmp_path / "run" / "best.safetensors").exists)
    alone(*pretrain("run"), **options)
    alone(*pretrain("straight"), **options)
    weights = lambda to: json.loads((tmp_path / to / "run.json").read_text())["results"]["weights"]
    assert weights("run") == weights("straight") and len(history(tmp_path / "run")) == 2, "an interrupted run ends where one goes that wasn't"
    embed = "embed", tmp_path / "sleepfm", tmp_path / "run", tmp_path / "split.json", tmp_path / "embeddings", '["train", "test"]'
    killed(started(*embed), lambda: len(list((tmp_path / "embeddings" / "trained").glob("*.parquet"))) > 0)
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "embeddings" / "trained").glob("*.parquet")}
    alone(*embed)
    assert first and all(p.stat().st_mtime_ns == t for p, t in first.items())
    out = alone("evaluate", tmp_path / "embeddings", tmp_path / "split.json", tmp_path / "native", tmp_path / "results", resamples=50)
    table = check_result(tmp_path, wanted)
    macro = table.query("`class` == 'macro' and model == 'probe' and input == 'combined'").iloc[0]
    assert "stages.csv" in out and macro["auroc"] > .5, table.to_string()


@pytest.mark.parametrize("name", ["convert", "prepare"])
def test_the_commands_know_sleepfms_recipes(name):
    "Both of the published, and ours; the default is as it was."
    from pftsleep.apps.cli import command
    parser, words = make_parser(name, command(name)), ["a", "b"]
    assert parser.parse_args(words).recipe == "default"
    for recipe, rate in dict(sleepfm_2024=256., sleepfm_2024_corrected=256., sleepfm_clinical=128., sleepfm_clinical_corrected=128.).items():
        assert parser.parse_args(["--recipe", recipe, *words]).recipe == recipe and recipe_of(recipe, None, 100., None).rate == rate
    assert recipe_of("sleepfm_2024", None, 100., None) == Recipe.sleepfm_2024()
