"""The scripts of jobs/: each tells what it takes, and runs on something tiny."""
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from pftsleep.data.hypnograms import read_hypnogram
from pftsleep.data.store import open_store
from pftsleep.data.studies import simulate_files
from pftsleep.models.stager import load_stager

JOBS = Path(__file__).parents[1] / "jobs"
SCRIPTS = sorted(p.relative_to(JOBS).as_posix() for p in JOBS.rglob("*.py"))
STUDIES = ("shhs", "mesa", "mros", "wsc", "apples", "cinc2018", "sleep_edf", "dreem")
CONFIGS = {"simulated/make_cohort.py": "simulated/cohort.yaml", "simulated/make_study.py": "simulated/study.yaml", "simulated/build_store.py": "simulated/store.yaml",
    **{f"{s}/build_{what}.py": f"{s}/{what}.yaml" for s in STUDIES for what in ("hypnograms", "store")},
    "model_training/pretrain.py": "model_training/pretrain.yaml", "model_training/probe.py": "model_training/probe.yaml"}


def run(script: str, *arguments) -> str:
    done = subprocess.run([sys.executable, JOBS / script, *map(str, arguments)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    said = run(script, "--help")
    for setting in yaml.safe_load((JOBS / CONFIGS[script]).read_text()): assert setting in said # of the YAML file beside it


def test_the_scripts_are_thin():
    for script in SCRIPTS: assert len((JOBS / script).read_text().splitlines()) <= 30, script


def test_the_way_from_files_to_a_stager(tmp_path):
    "Each script with its own YAML file, made small."
    train = "--train.accelerator", "cpu", "--train.epochs", 1
    config = lambda script: (script, "--config", JOBS / CONFIGS[script])
    said = run(*config("simulated/make_cohort.py"), tmp_path / "files", "--subjects", 4, "--hours", .2, "--montage", "pftsleep")
    assert "4 nights of 4 people" in said
    run(*config("simulated/build_store.py"), tmp_path / "files", tmp_path / "store")
    assert open_store(tmp_path / "store").recipe["channels"] == ["EEG", "EOG", "EMG"]
    run(*config("model_training/pretrain.py"), tmp_path / "store", tmp_path / "run", "--train.d_model", 32, "--train.n_layers", 1, *train)
    run(*config("model_training/probe.py"), tmp_path / "store", tmp_path / "run" / "encoder", tmp_path / "probe", *train)
    assert load_stager(tmp_path / "probe" / "stager").channels == ("EEG", "E1", "EMG")


def test_the_readme_names_what_is_there():
    text = (JOBS / "README.md").read_text()
    for script in SCRIPTS: assert f"python jobs/{script} " in text
    for folder in {p.parent.name for p in JOBS.glob("*/*.*")}: assert f"| `{folder}/` |" in text


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_in_its_real_layout(study, tmp_path):
    "Files as the study has them -> tables of stages and a store, each by its own script and YAML file."
    config = lambda what: yaml.safe_load((JOBS / study / f"{what}.yaml").read_text())
    truth = simulate_files(config("store")["cohort"], tmp_path / "files", n_subjects=1, hours=.1)
    run(f"{study}/build_hypnograms.py", "--config", JOBS / study / "hypnograms.yaml", tmp_path / "files", tmp_path / "tables")
    run(f"{study}/build_store.py", "--config", JOBS / study / "store.yaml", tmp_path / "files", tmp_path / "store", "--workers", 1)
    store, tables = open_store(tmp_path / "store"), pd.read_csv(tmp_path / "tables" / "sleep.csv")
    assert len(store) == len(tables) == truth
    assert set(store.manifest["channels"]) == {";".join(select_names(config("store")["channels"]))} and set(store.manifest["rates"].str.split(";").explode()) == {"100"}
    for id in store: # the two ways agree, epoch by epoch
        assert read_hypnogram(tmp_path / "tables" / f"{id}.csv").stages.tolist() == store[id].hypnogram.stages.tolist()


def select_names(asked: list[str]) -> list[str]:
    "Under which names channels come that were asked for by role."
    return [{"chin EMG": "chin EMG", "thorax": "Thorax", "abdomen": "Abdomen"}.get(a, a) for a in asked]
