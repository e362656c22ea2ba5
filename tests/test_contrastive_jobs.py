"""The scripts around contrastive pretraining, with their own YAML files, end to end on small simulated stores."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from pftsleep.data.signals import Recipe, apply_recipe
from pftsleep.data.simulate import simulate_hypnogram, simulate_night
from pftsleep.data.splits import make_split
from pftsleep.data.store import create_store, open_store
from pftsleep.errors import ConfigError
from pftsleep.models.sleepfm import PUBLISHED_CHANNELS
from pftsleep.models.transformer import PatchTransformer
from pftsleep.training.contrastive_ablation import PRETEXTS, compare_pretexts, pretext_encoder, pretext_settings, pretext_table
from pftsleep.training.contrastive_pretraining import ContrastiveConfig, pretrain_contrastive
from pftsleep.training.embedding_probe import load_encoders
from pftsleep.training.probe import StagingConfig
from pftsleep.training.runs import history, weights_hash

JOBS = Path(__file__).parents[1] / "jobs"
MODALITIES = dict(brain=("EEG",), muscle=("EMG",), breath=("THOR RES",))
SMALL = ContrastiveConfig(modalities=MODALITIES, window=2, patch_seconds=5, d_model=8, n_layers=1, width=8, epochs=1, batch_size=8, accelerator="cpu", loggers=())
PROBE = StagingConfig(epochs=1, batch_size=8, accelerator="cpu", loggers=())


def run(script: str, *arguments, ok: bool = True) -> str:
    done = subprocess.run([sys.executable, JOBS / script, "--config", (JOBS / script).with_suffix(".yaml"), *map(str, arguments)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + ("" if ok else done.stderr)


def made(folder: Path, recipe: Recipe, channels: dict, people: int, minutes: float):
    store = create_store(folder, recipe)
    for i in range(people):
        h = simulate_hypnogram(minutes / 60, np.random.default_rng(i))
        store.add(apply_recipe(replace(simulate_night(h, channels, seed=i, id=f"n{i}", subject=f"s{i}"), hypnogram=h), recipe))
    store.sync()
    return store

@pytest.fixture(scope="module")
def store(tmp_path_factory): return made(tmp_path_factory.mktemp("nights") / "store", Recipe("small", rate=16., standardise=True), {"EEG": 16., "EMG": 16., "THOR RES": 16.}, 8, 4)


# CinC 2018

def test_the_published_settings_are_those_of_the_yaml_file():
    "Published: SGD at 1e-3 for 20 epochs of 32 clips, a tenth every 5 epochs, no decay, no clipping, a scale that begins at 1."
    said = yaml.safe_load((JOBS / "cinc2018/pretrain.yaml").read_text())["train"]
    config, published = ContrastiveConfig(**said), ContrastiveConfig.sleepfm()
    assert {k: getattr(config, k) for k in said if k != "workers"} == {k: getattr(published, k) for k in said if k != "workers"}
    assert config.modalities == PUBLISHED_CHANNELS and said["workers"] == 4
    assert replace(config, workers=0) == published, "what the file doesn't name is as published, too"


def test_cinc_pretraining_is_read_by_the_next_step(tmp_path):
    "On a store at 256 Hz with the published channels and encoders. Another mode wants another folder."
    channels = {c: 256. for names in PUBLISHED_CHANNELS.values() for c in names}
    store = made(tmp_path / "store", Recipe("small", rate=256.), channels, 2, .5)
    split = make_split(store.manifest, dict(train=.5, val=.5), seed=0)
    split.save(tmp_path / "split.json")
    said = run("cinc2018/pretrain.py", tmp_path / "store", tmp_path / "split.json", tmp_path / "run", "--train.accelerator", "cpu", "--train.workers", 0, "--train.loggers", "[]", "--train.batch_size", 1, "--train.epochs", 1)
    assert "val_loss" in said and len(history(tmp_path / "run")) == 1
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert facts["facts"]["config"]["step_period"] == 5 and facts["facts"]["split"] == split.hash and facts["results"]["parameters"] == 10_410_696
    encoders = load_encoders(tmp_path / "run")
    assert list(encoders) == list(PUBLISHED_CHANNELS) and {e.config.channels for e in encoders.values()} == set(PUBLISHED_CHANNELS.values())
    again = ContrastiveConfig.sleepfm(**yaml.safe_load(json.dumps(facts["facts"]["config"])))
    with pytest.raises(ConfigError, match="config differ"): pretrain_contrastive(store, split, tmp_path / "run", replace(again, mode="pairwise"), progress=False)
    assert len(history(tmp_path / "run")) == 1


# the ablation

@pytest.mark.slow
def test_the_ablation_from_a_store_to_a_table(store, tmp_path):
    small = {f"--train.{k}": v for k, v in dict(modalities=json.dumps({k: list(v) for k, v in MODALITIES.items()}), window=2, patch_seconds=5, d_model=8, n_layers=1, width=8, epochs=1, batch_size=8, accelerator="cpu", loggers="[]").items()}
    said = run("model_training/contrastive_ablation.py", store.path, tmp_path / "runs", *[x for pair in small.items() for x in pair], "--probe.epochs", 1, "--probe.accelerator", "cpu", "--probe.loggers", "[]", "--seeds", "[0]")
    table, runs = (pd.read_csv(tmp_path / "runs" / f"{name}.csv") for name in ("contrastive_ablation", "runs"))
    assert set(table["pretext"]) == set(runs["pretext"]) == set(PRETEXTS) and all(p in said for p in PRETEXTS)
    assert table.set_index("pretext").loc["masked", ["gain", "gain_low", "gain_high"]].fillna(0).tolist() == [0, 0, 0]
    encoders = {weights_hash(PatchTransformer.from_pretrained(tmp_path / "runs" / f"{p}-0" / "encoder" / "encoder")) for p in PRETEXTS if p != "untrained"}
    assert len(encoders) == 4, "each pretext leads somewhere else"
    assert "jigsaw" in run("model_training/contrastive_ablation.py", store.path, tmp_path / "no", "--pretexts", "[jigsaw]", ok=False) and not (tmp_path / "no").exists()


def test_all_pretexts_begin_alike_and_see_the_same(store, tmp_path):
    "No step is made (a learning rate of zero): every encoder is the untrained one."
    still, split = replace(SMALL, learning_rate=0.), make_split(store.manifest, seed=0)
    encoders = {p: pretext_encoder(store, split, tmp_path / p, p, still, progress=False) for p in PRETEXTS}
    assert len({weights_hash(e) for e in encoders.values()}) == 1
    shared = [{k: getattr(s, k) for k in ("channels", "window", "batch_size", "epochs", "learning_rate", "warmup", "weight_decay", "clip", "seed", "d_model", "n_layers", "patch_seconds", "instance_norm")} for s in pretext_settings(SMALL).values()]
    assert all(s == shared[0] for s in shared)


def test_a_run_of_the_ablation_is_the_run_it_says(store, tmp_path):
    split = make_split(store.manifest, seed=0)
    alone = pretrain_contrastive(store, split, tmp_path / "alone", replace(SMALL, mode="pairwise", seed=3), progress=False)
    table, runs = compare_pretexts(store, split, tmp_path / "runs", SMALL, PROBE, ("pairwise",), (3,), progress=False)
    assert weights_hash(PatchTransformer.from_pretrained(tmp_path / "runs/pairwise-3/encoder/encoder")) == weights_hash(alone.encoder)
    assert table.index.tolist() == ["pairwise"] and table["gain"].item() == 0 and runs["seed"].tolist() == [3], "with nothing masked to compare with, the first is the reference"


def test_gains_are_paired():
    "People differ much, the gain little: its interval is far narrower than that of either figure. Order doesn't matter, and a constant shift is found exactly."
    rng = np.random.default_rng(0)
    wrong = rng.integers(0, 50, 30)
    counts = lambda w: np.stack([np.diag([100] * 5) + np.array([[-k, k, 0, 0, 0]] + [[0] * 5] * 4) for k in w])[None]
    table = pretext_table({"masked": counts(wrong + 5), "joint": counts(wrong), "pairwise": counts(wrong + 5)}, n_resamples=500)
    width = lambda row, of: row[f"{of}high"] - row[f"{of}low"]
    joint = table.loc["joint"]
    assert joint["gain_low"] > 0 and width(joint, "gain_") < width(joint, "") / 3
    assert table.loc["pairwise", ["gain", "gain_low", "gain_high"]].tolist() == [0, 0, 0]
    twice = pretext_table({"masked": np.repeat(counts(wrong), 2, 0)}, n_resamples=50).loc["masked"]
    assert twice["lowest_run"] == twice["highest_run"] == pytest.approx(twice["kappa"])
    with pytest.raises(ConfigError, match="compare with one of joint"): pretext_table({"joint": counts(wrong)})


def test_the_ablation_knows_its_pretexts(store, tmp_path):
    split = make_split(store.manifest, seed=0)
    for pretexts, seeds, said in ((("jigsaw",), (0,), "jigsaw"), ((), (0,), "name some"), (("masked",), (), "and a seed")):
        with pytest.raises(ConfigError, match=said): compare_pretexts(store, split, tmp_path / "x", SMALL, PROBE, pretexts, seeds, progress=False)
    with pytest.raises(ConfigError, match="choose from"): pretext_encoder(store, split, tmp_path / "x", "jigsaw", SMALL)
    assert not (tmp_path / "x").exists() and len(open_store(store.path)) == 8
