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
from pftsleep.data.splits import Split
from pftsleep.data.studies import simulate_files
from pftsleep.models.head_parts import HeadConfig
from pftsleep.models.stager import load_stager
from pftsleep.models.transformer import PatchConfig
from pftsleep.training.pretrain import PretrainConfig
from pftsleep.training.probe import StagingConfig

JOBS = Path(__file__).parents[1] / "jobs"
SCRIPTS = sorted(p.relative_to(JOBS).as_posix() for p in JOBS.rglob("*.py"))
STUDIES = ("shhs", "mesa", "mros", "wsc", "apples", "cinc2018", "sleep_edf", "dreem")
CONFIGS = {"simulated/make_cohort.py": "simulated/cohort.yaml", "simulated/make_study.py": "simulated/study.yaml", "simulated/build_store.py": "simulated/store.yaml",
    **{f"{s}/build_{what}.py": f"{s}/{what}.yaml" for s in STUDIES for what in ("hypnograms", "store")},
    "model_training/pretrain.py": "model_training/pretrain.yaml", "model_training/probe.py": "model_training/probe.yaml",
    "model_training/train_transformer.py": "model_training/train_transformer.yaml", "model_training/train_classifier.py": "model_training/train_classifier.yaml",
    "model_training/ablation.py": "model_training/ablation.yaml"}


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
    size = "--train.d_model", 16, "--train.n_layers", 1, *train, "--probe.accelerator", "cpu", "--probe.epochs", 1
    run(*config("model_training/ablation.py"), tmp_path / "store", tmp_path / "ablation", "--regions", '[masked,"0.1"]', "--mask_ratios", "[0.5]", "--patch_seconds", "[6.0]", *size)
    assert set(pd.read_csv(tmp_path / "ablation" / "ablation.csv")["name"]) == {"masked-0.5-6s", "0.1-0.5-6s"}


def test_the_published_model_is_trained_by_its_own_scripts(tmp_path):
    "SHHS in its layout -> the seven channels -> encoder -> classifier, both YAML files made small; then again, which goes on where it ended."
    config = lambda script: (script, "--config", JOBS / script.replace(".py", ".yaml"))
    simulate_files("shhs", tmp_path / "files", n_subjects=4, hours=.1)
    run("shhs/build_store.py", "--config", JOBS / "shhs/store.yaml", tmp_path / "files", tmp_path / "store", "--workers", 1, "--rate", 125, "--channels", ",".join(PatchConfig.pftsleep().channels))
    small = "--train.window", 12, "--train.epochs", 2, "--train.workers", 0, "--train.accelerator", "cpu"
    encoder = *config("model_training/train_transformer.py"), tmp_path / "store", tmp_path / "run", "--train.d_model", 32, "--train.n_layers", 1, *small
    run(*encoder)
    run(*config("model_training/train_classifier.py"), tmp_path / "store", tmp_path / "run" / "encoder", tmp_path / "head", "--train.hidden", 16, *small)
    stager = load_stager(tmp_path / "head" / "stager")
    c, h = stager.encoder.config, stager.head.config
    assert c == PatchConfig.pftsleep(d_model=32, d_ff=128, n_layers=1, upstream=False)
    assert h == HeadConfig.pftsleep(d_model=32, hidden=16, upstream=False)
    assert stager.provenance["config"]["loss"] == "focal" and Split.load(tmp_path / "head" / "split.json").hash == Split.load(tmp_path / "run" / "split.json").hash
    before = (tmp_path / "run" / "encoder" / "model.safetensors").read_bytes()
    run(*encoder)
    assert (tmp_path / "run" / "encoder" / "model.safetensors").read_bytes() == before


def test_the_published_settings():
    "Hyper-parameters of the article's two trainings."
    train = lambda name: yaml.safe_load((JOBS / "model_training" / f"{name}.yaml").read_text())["train"]
    both = dict(learning_rate=.01, clip=1., accumulate=8, seed=126, window=960, precision="32-true")
    encoder = both | dict(preset="pftsleep", epochs=100, batch_size=3, weight_decay=1e-4, target="samples", region="all", kind="mse", augmentations=["jitter_zero"], augment_ratio=.1, mask_ratio=0.,
        channels=list(PatchConfig.pftsleep().channels), patch_seconds=6.)
    head = both | dict(head="pftsleep", hidden=None, epochs=30, batch_size=4, weight_decay=1e-3, loss="focal", cutmix=.5)
    for name, want in dict(train_transformer=encoder, train_classifier=head).items(): assert {k: train(name).get(k, "absent") for k in want} == want
    for name, known in dict(train_transformer=PretrainConfig, train_classifier=StagingConfig).items(): known(**train(name))


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
