"""The scripts of jobs/: each tells what it takes, and runs on something tiny."""
import dataclasses
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
import yaml

from pftsleep.apps import training
from pftsleep.apps.training import StudyConfig, Trials, check_space, open_study, search_settings, study_table
from pftsleep.data.hypnograms import read_hypnogram
from pftsleep.data.recording import Hypnogram, Recording, array_channel
from pftsleep.data.signals import Recipe
from pftsleep.data.splits import Split, make_split
from pftsleep.data.store import create_store, open_store
from pftsleep.data.studies import simulate_files
from pftsleep.errors import ConfigError
from pftsleep.models.head_parts import HeadConfig
from pftsleep.models.stager import load_stager
from pftsleep.models.transformer import PatchConfig
from pftsleep.training import runs
from pftsleep.training.pretrain import PretrainConfig, pretrain
from pftsleep.training.probe import StagingConfig

JOBS = Path(__file__).parents[1] / "jobs"
SCRIPTS = sorted(p.relative_to(JOBS).as_posix() for p in JOBS.rglob("*.py"))
STUDIES = ("shhs", "mesa", "mros", "wsc", "apples", "cinc2018", "sleep_edf", "dreem")
CONFIGS = {"simulated/make_cohort.py": "simulated/cohort.yaml", "simulated/make_study.py": "simulated/study.yaml", "simulated/build_store.py": "simulated/store.yaml",
    **{f"{s}/build_{what}.py": f"{s}/{what}.yaml" for s in STUDIES for what in ("hypnograms", "store")},
    "model_training/pretrain.py": "model_training/pretrain.yaml", "model_training/finetune_classification.py": "model_training/finetune_classification.yaml",
    "model_training/pretrain_nights.py": "model_training/pretrain_nights.yaml", "model_training/probe.py": "model_training/probe.yaml",
    "model_training/train_transformer.py": "model_training/train_transformer.yaml", "model_training/train_classifier.py": "model_training/train_classifier.yaml",
    "model_training/ablation.py": "model_training/ablation.yaml", "model_training/study.py": "model_training/study.yaml",
    **{f"cinc2018/{s}.py": f"cinc2018/{s}.yaml" for s in ("extract", "prepare", "pretrain", "embed", "evaluate")},
    "model_training/contrastive_ablation.py": "model_training/contrastive_ablation.yaml",
    **{f"animals/{s}.py": f"animals/{s}.yaml" for s in (*(f"process_{n}" for n in ("horsing_around", "calf", "cats", "idlab_foaling", "kamminga_goats", "waves_equine_activities", "whitestork", "csv", "device")), "data_preparation_pretraining", "data_preparation_finetuning")},
    "nhanes/build_store.py": "nhanes/store.yaml", "nhanes/build_labels.py": "nhanes/labels.yaml",
    "model_training/train_pat.py": "model_training/train_pat.yaml", "model_training/finetune_pat.py": "model_training/finetune_pat.yaml"}


def run(script: str, *arguments) -> str:
    done = subprocess.run([sys.executable, JOBS / script, *map(str, arguments)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def within(monkeypatch, script: str, *arguments) -> None:
    "A script in this process: each of many processes would import torch anew."
    monkeypatch.setattr(sys, "argv", [str(JOBS / script), *map(str, arguments)])
    try: runpy.run_path(str(JOBS / script), run_name="__main__")
    except SystemExit as end: assert not end.code


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, monkeypatch, capsys):
    within(monkeypatch, script, "--help")
    said = capsys.readouterr().out
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
    run(*config("model_training/pretrain_nights.py"), tmp_path / "store", tmp_path / "run", "--train.d_model", 32, "--train.n_layers", 1, *train)
    run(*config("model_training/probe.py"), tmp_path / "store", tmp_path / "run" / "encoder", tmp_path / "probe", *train)
    assert load_stager(tmp_path / "probe" / "stager").channels == ("EEG", "E1", "EMG")
    size = "--train.d_model", 16, "--train.n_layers", 1, *train, "--probe.accelerator", "cpu", "--probe.epochs", 1
    run(*config("model_training/ablation.py"), tmp_path / "store", tmp_path / "ablation", "--regions", '[masked,"0.1"]', "--mask_ratios", "[0.5]", "--patch_seconds", "[6.0]", *size)
    assert set(pd.read_csv(tmp_path / "ablation" / "ablation.csv")["name"]) == {"masked-0.5-6s", "0.1-0.5-6s"}


@pytest.mark.slow
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
def test_a_study_in_its_real_layout(study, tmp_path, monkeypatch):
    "Files as the study has them -> tables of stages and a store, each by its own script and YAML file."
    config = lambda what: yaml.safe_load((JOBS / study / f"{what}.yaml").read_text())
    truth = simulate_files(config("store")["cohort"], tmp_path / "files", n_subjects=1, hours=.1)
    within(monkeypatch, f"{study}/build_hypnograms.py", "--config", JOBS / study / "hypnograms.yaml", tmp_path / "files", tmp_path / "tables")
    within(monkeypatch, f"{study}/build_store.py", "--config", JOBS / study / "store.yaml", tmp_path / "files", tmp_path / "store", "--workers", 1)
    store, tables = open_store(tmp_path / "store"), pd.read_csv(tmp_path / "tables" / "sleep.csv")
    assert len(store) == len(tables) == truth
    assert set(store.manifest["channels"]) == {";".join(select_names(config("store")["channels"]))} and set(store.manifest["rates"].str.split(";").explode()) == {"100"}
    for id in store: # the two ways agree, epoch by epoch
        assert read_hypnogram(tmp_path / "tables" / f"{id}.csv").stages.tolist() == store[id].hypnogram.stages.tolist()


def select_names(asked: list[str]) -> list[str]:
    "Under which names channels come that were asked for by role."
    return [{"chin EMG": "chin EMG", "thorax": "Thorax", "abdomen": "Abdomen"}.get(a, a) for a in asked]


# a search for settings

SPACE = dict(train=dict(learning_rate=dict(low=1e-4, high=1e-2, log=True)), probe=dict(learning_rate=dict(choices=[.001, .01])))

@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    "A store of seven nights of noise, ten minutes each."
    store, rng = create_store(tmp_path_factory.mktemp("noise") / "store", Recipe.native()), np.random.default_rng(0)
    for i in range(7): store.add(Recording(f"n{i}", {"EEG": array_channel("EEG", rng.standard_normal(20 * 30 * 50), 50, "uV", "EEG")}, subject=f"s{i}", hypnogram=Hypnogram(rng.choice(5, 20), 30)))
    store.sync()
    return store

def trials_of(store, out: Path, space=SPACE, train=None, **search) -> Trials:
    out.mkdir(exist_ok=True)
    small = dict(epochs=1, batch_size=2, accelerator="cpu")
    return Trials(store, make_split(store.manifest, seed=0), out, space, StudyConfig(**dict(trials=3) | search), PretrainConfig(**dict(d_model=16, n_layers=1) | small | (train or {})), StagingConfig(**small), progress=False)


@pytest.mark.slow
def test_a_study_from_its_yaml_file_to_the_training_scripts(noise, tmp_path):
    "Three trials, one more after that, and the best settings where they belong."
    small = [f"--{part}.{k}={v}" for part in ("train", "probe") for k, v in dict(epochs=1, batch_size=2, accelerator="cpu").items()]
    search = ["model_training/study.py", "--config", JOBS / "model_training/study.yaml", noise.path, tmp_path / "study", "--train.n_layers=1", "--space", '{"train": {"d_model": {"choices": [16, 32]}}}', *small]
    said = run(*search, "--search.trials=2")
    assert "best: trial" in said and "probe_kappa" in said
    run(*search, "--search.trials=3")
    table = pd.read_csv(tmp_path / "study/trials.csv")
    assert table["number"].tolist() == [0, 1, 2] and set(table["state"]) == {"complete"} and set(table["train.d_model"]) <= {16, 32} and table["value"].between(-1, 1).all()
    run("model_training/train_transformer.py", "--config", tmp_path / "study/best_transformer.yaml")
    run("model_training/train_classifier.py", "--config", tmp_path / "study/best_classifier.yaml")
    stager = load_stager(tmp_path / "study/best/classifier/stager")
    assert stager.encoder.config.d_model == table.sort_values("value", kind="stable")["train.d_model"].iloc[-1] or table["value"].nunique() < 3
    assert Split.load(tmp_path / "study/best/classifier/split.json").hash == Split.load(tmp_path / "study/split.json").hash # the people that chose the settings are still no test


@pytest.mark.slow
def test_a_killed_study_goes_on_as_if_nothing_had_happened(noise, tmp_path):
    whole = search_settings(trials_of(noise, tmp_path / "whole"))
    command = [sys.executable, JOBS / "model_training/study.py", noise.path, tmp_path / "killed", "--space", str(SPACE).replace("'", '"').replace("True", "true"), "--search.trials=3", "--train.d_model=16", "--train.n_layers=1",
        *[f"--{part}.{k}={v}" for part in ("train", "probe") for k, v in dict(epochs=1, batch_size=2, accelerator="cpu").items()]]
    process = subprocess.Popen(list(map(str, command)), env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline, second = time.monotonic() + 240, lambda: len(list((tmp_path / "killed/trials").glob("*/encoder/run.json"))) == 2
    while not second(): # in the middle of the second trial
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read().decode()
        time.sleep(.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run("model_training/study.py", *command[2:])
    a, b = study_table(whole), pd.read_csv(tmp_path / "killed/trials.csv")
    b = b[b["state"] != "fail"]
    assert len(a) == len(b) == 3
    for name in ("value", "train.learning_rate", "probe.learning_rate"): np.testing.assert_allclose(a[name], b[name], rtol=1e-9, err_msg=name)
    assert len(list((tmp_path / "killed/trials").glob("*"))) == 3 # what was begun was taken up


def test_trials_of_other_machines_are_left_alone(noise, tmp_path):
    trials = trials_of(noise, tmp_path / "s")
    study = open_study(trials)
    for process in ("elsewhere 1", f"{socket.gethostname()} {os.getppid()}", f"{socket.gethostname()} 999999999"):
        trial = study.ask()
        trial.suggest_float("train.learning_rate", 1e-4, 1e-2, log=True)
        trial.set_user_attr("process", process)
    states = [t.state.name for t in open_study(trials).trials]
    assert states == ["RUNNING", "RUNNING", "FAIL", "WAITING"]


def test_hopeless_pretrainings_end_early(noise, tmp_path, monkeypatch):
    "Their loss is made worse with each trial, so the later ones are below the median from the first epoch on."
    trials, seen = trials_of(noise, tmp_path / "s", dict(train=SPACE["train"]), dict(epochs=3), objective="pretraining_loss", trials=6), []
    def worse(self):
        seen.append(self.current_epoch)
        self.watch(self.current_epoch, float(self.trainer.callback_metrics["val_loss"]) + len(seen))
    monkeypatch.setattr(training._Watched, "on_validation_end", worse)
    table = study_table(search_settings(trials))
    assert table["state"].tolist() == ["complete"] * 4 + ["pruned"] * 2 and len(seen) == 4 * 3 + 2
    assert table["value"][:4].notna().all() and not (tmp_path / "s/best_classifier.yaml").exists()
    assert PretrainConfig(**yaml.safe_load((tmp_path / "s/best_transformer.yaml").read_text())["train"]).epochs == 3


def test_repeats_are_seeds_whose_mean_counts(noise, tmp_path):
    table = study_table(search_settings(trials_of(noise, tmp_path / "s", dict(train=SPACE["train"]), objective="pretraining_loss", trials=1, repeats=2)))
    losses = [runs.history(p)["val_loss"].iloc[-1] for p in (tmp_path / "s/trials").iterdir()]
    assert len(losses) == 2 and losses[0] != losses[1]
    np.testing.assert_allclose((table["value"][0], table["spread"][0]), (np.mean(losses), np.std(losses)), rtol=1e-5)


def test_a_probe_alone_needs_one_encoder(noise, tmp_path):
    search_settings(trials_of(noise, tmp_path / "s", dict(probe=dict(learning_rate=dict(low=.001, high=.1))), objective="probe_loss", trials=2))
    encoder, = (tmp_path / "s/trials").iterdir()
    assert len([p for p in encoder.iterdir() if p.name != "encoder"]) == 2


@pytest.mark.parametrize(("space", "objective", "said"), [({}, "probe_kappa", "nothing to search"), ({"train": {}}, "probe_kappa", "nothing to search"), ({"head": {"x": {}}}, "probe_kappa", "no part of a search"),
    ({"train": {"wings": {"low": 1, "high": 2}}}, "probe_kappa", "no setting 'wings'"), ({"train": {"d_model": {"low": 2, "high": 1}}}, "probe_kappa", "neither bounds nor choices"), ({"train": {"d_model": {"choices": []}}}, "probe_kappa", "neither bounds"),
    ({"train": {"d_model": {"low": 1, "high": 2, "by": 1}}}, "probe_kappa", "neither bounds"), *[({"train": {name: {"choices": [1, 2]}}}, "pretraining_loss", "can't compare") for name in ("mask_ratio", "region", "window", "seed")],
    ({"probe": {"learning_rate": {"low": 1, "high": 2}}}, "pretraining_loss", "settings of the probe"), ({"probe": {"loss": {"choices": ["kl", "focal"]}}}, "probe_loss", "can't be compared")])
def test_what_cannot_be_searched(space, objective, said):
    with pytest.raises(ConfigError, match=said): check_space(space, StudyConfig(objective))


def test_every_field_of_a_pretraining_is_judged():
    "Whoever adds a setting has to say whether losses can be compared across it."
    compared = {"epochs", "batch_size", "accumulate", "learning_rate", "warmup", "weight_decay", "clip", "workers", "precision", "devices", "nodes", "accelerator", "strategy", "loggers", "preset", "d_model", "n_layers", "frugal"}
    assert {f.name for f in dataclasses.fields(PretrainConfig)} - training.OTHER_LOSS - compared == set()


def test_lists_may_be_choices(tmp_path):
    trial = optuna.trial.FixedTrial({"train.augmentations": '["jitter_zero"]'})
    train, _ = training.propose(trial, dict(train=dict(augmentations=dict(choices=[[], ["jitter_zero"]]))), PretrainConfig(), StagingConfig())
    assert train.augmentations == ("jitter_zero",)


def test_a_study_needs_optuna_and_a_storage(noise, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="storage can't be opened") as e: open_study(trials_of(noise, tmp_path / "s", storage="postgresql://me:secret@127.0.0.1:1/none"))
    assert "secret" not in str(e.value)
    with pytest.raises(ConfigError, match="storage can't be opened"): open_study(trials_of(noise, tmp_path / "s", storage="nonsense"))
    shared = f"sqlite:///{tmp_path / 'shared.db'}"
    open_study(trials_of(noise, tmp_path / "a", storage=shared))
    with pytest.raises(ConfigError, match="objective differ"): open_study(trials_of(noise, tmp_path / "a", storage=shared, objective="probe_macro_f1"))
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'pftsleep\[scale\]'"): training.study(str(noise.path), str(tmp_path / "n"), SPACE)


# Weights & Biases

WANDB = """
import socket, sys
def refuse(self, address, *a):
    if self.family != socket.AF_UNIX and not str(address[0]).startswith("127."): print("NETWORK", address)
    return real(self, address, *a)
real, socket.socket.connect = socket.socket.connect, refuse
looked = socket.getaddrinfo
def look(host, *a, **kw):
    if host not in (None, "", "localhost", "127.0.0.1", socket.gethostname()): print("NETWORK", host)
    return looked(host, *a, **kw)
socket.getaddrinfo = look
from pathlib import Path
from pftsleep.data.splits import make_split
from pftsleep.data.store import open_store
from pftsleep.training.pretrain import PretrainConfig, pretrain
store = open_store(sys.argv[1])
pretrain(store, make_split(store.manifest, seed=0), sys.argv[2], PretrainConfig(epochs=2, batch_size=2, d_model=16, n_layers=1, accelerator="cpu", loggers=(sys.argv[3],)), progress=False)
"""

@pytest.mark.parametrize(("logger", "mode"), [("wandb", "offline"), ("wandb_offline", None)])
def test_wandb_offline(noise, tmp_path, logger, mode):
    "Everything lies in the run's folder, and nobody is called."
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"OMP_NUM_THREADS": "1", "HOME": str(tmp_path / "home")} | ({"WANDB_MODE": mode} if mode else {})
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    done = subprocess.run([sys.executable, "-c", WANDB, str(noise.path), str(tmp_path / "run"), logger], cwd=tmp_path / "here", env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "NETWORK" not in done.stdout, done.stdout + done.stderr
    kept, = (tmp_path / "run" / "wandb").glob("offline-run-*")
    data, = kept.glob("*.wandb")
    assert b"val_loss" in data.read_bytes() and len(runs.history(tmp_path / "run")) == 2
    assert not list((tmp_path / "here").iterdir()) and (tmp_path / "run/encoder/model.safetensors").exists()


def test_without_wandb_there_is_a_word_about_it(noise, tmp_path, monkeypatch):
    def missing(*a, **kw): raise ModuleNotFoundError("No module named 'wandb'")
    monkeypatch.setattr(runs, "WandbLogger", missing)
    with pytest.raises(ConfigError, match="needs the package wandb"):
        pretrain(noise, make_split(noise.manifest, seed=0), tmp_path / "run", PretrainConfig(epochs=1, d_model=16, n_layers=1, accelerator="cpu", loggers=("wandb_offline",)), progress=False)
