"""`pftsleep finetune` and the jobs of PAT, on a few simulated people: the command itself, what it refuses, and what it does when it is killed."""
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pftsleep.apps import finetuning
from pftsleep.apps.cli import main
from pftsleep.apps.embedding import load_encoder
from pftsleep.apps.finetuning import encoder_for, guarded, labelled_weeks, read_labels, survey_name
from pftsleep.data.nhanes import TASKS, nhanes_labels, nhanes_weeks, write_weeks
from pftsleep.data.simulate_nhanes import simulate_nhanes
from pftsleep.data.splits import Split
from pftsleep.data.standardise import load_standardiser
from pftsleep.data.weeks import WEEK, Week
from pftsleep.errors import ConfigError, ModelError, PFTSleepError
from pftsleep.models.transformer import PatchConfig, PatchTransformer
from pftsleep.training.finetune import FinetuneConfig, load_task, scaler_of
from pftsleep.training.masked_weeks import WeeksConfig

JOBS, SHARED = Path(__file__).parents[1] / "jobs", Path(__file__).parents[2] / "shared"
QUICK = "--train.epochs=3", "--train.learning_rate=.003", "--train.batch_size=16"


def run(*arguments, code=0, script=None):
    start = [sys.executable, str(JOBS / script)] if script else [sys.executable, "-c", "import sys; from pftsleep.apps.cli import main; sys.exit(main())"]
    done = subprocess.run([*start, *map(str, arguments)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=400)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def week(k: int, cohort="nhanes-2013-14") -> Week:
    "People with an odd number move more at night."
    rng = np.random.default_rng(k)
    day = np.clip(np.sin((np.arange(WEEK) / 1440 - .3) * 2 * np.pi), 0, None) + (.5 if k % 2 else .02)
    return Week(f"{1000 + k}_w1", str(1000 + k), cohort, (day * rng.gamma(2., 50., WEEK)).astype("float32"), np.zeros(WEEK, bool), datetime(1985, 1, 6), "MIMS")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "60 people, a task that can be learned, one that nobody has, one with too few to be judged; an encoder."
    root = tmp_path_factory.mktemp("finetune")
    write_weeks([week(k) for k in range(60)], root / "weeks_H.h5")
    k = np.arange(62) # two have no week
    table = pd.DataFrame({"SEQN": 1000 + k, "night": k % 2, "rare": (k % 20 == 0) * 1, "nobody": 0, "odd": np.where(k == 5, 7, k % 2), "some": np.where(k < 40, k % 2, np.nan)})
    table.to_csv(root / "labels.csv", index=False)
    table.rename(columns={"SEQN": "subject"}).astype({"subject": str}).to_parquet(root / "labels.parquet")
    torch.manual_seed(0)
    PatchTransformer(PatchConfig(("Activity",), 1 / 60, 720, 16, 1, 2, d_ff=32, embedding="shared", position="sine", instance_norm=False)).save_pretrained(root / "encoder")
    return root


def command(work, out, *more, task="night", labels="labels.csv"):
    return "finetune", work / "weeks_H.h5", work / labels, task, work / "encoder", out, *QUICK, *more


def test_from_weeks_to_a_figure_and_again(work, tmp_path):
    "The command in a process of its own: model, metrics, predictions, curve; then again, which trains nothing."
    done = run(*command(work, tmp_path, "--mode", "frozen", "--curve", "24,all", "--baselines", "boosting,wavelet", "--seeds", 1))
    assert "AUC" in done.stdout and "boosting" in done.stdout
    m, p = json.loads((tmp_path / "metrics.json").read_text()), pd.read_csv(tmp_path / "predictions.csv", dtype=dict(subject=str))
    assert m["cohort"] == "NHANES 2013-2014" and m["test"]["low"] <= m["test"]["auc"] <= m["test"]["high"] and m["test"]["refused"] is None and m["test"]["n"] == 12
    split = Split.load(tmp_path / "split.json")
    assert set(p.loc[p["part"] == "test", "id"]) == set(split.parts["test"]) and not {*p["id"]} & {*split.parts["train"]} and p["p"].between(0, 1).all()
    model, by = load_task(tmp_path / "model"), load_standardiser(tmp_path / "standardiser.npz")
    assert model.classes == ("no", "night") and scaler_of(model).n == by.n == len(split.parts["train"])
    curve = pd.read_csv(tmp_path / "curve.csv")
    assert set(curve["learner"]) == {"encoder", "boosting", "wavelet"} and sorted(set(curve["n"])) == [24, 48] and curve[curve["learner"] == "boosting"]["auc"].max() > .9
    before = {f: (tmp_path / f).read_bytes() for f in ("model/task.json", "metrics.json", "predictions.csv")}
    assert main([str(a) for a in command(work, tmp_path, "--mode", "frozen")]) == 0
    assert all((tmp_path / f).read_bytes() == data for f, data in before.items())
    assert torch.equal(load_encoder(tmp_path).state_dict()["embedding.weight"], load_encoder(work / "encoder").state_dict()["embedding.weight"]) # frozen; and `embed` finds it


def test_the_model_embeds_with_its_own_standardisation(work, tmp_path):
    assert main([str(a) for a in command(work, tmp_path / "run")]) == 0
    assert main(["embed", str(work / "weeks_H.h5"), str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    table = pd.read_parquet(tmp_path / "out/embeddings.parquet")
    assert len(table) == 60 and not table["off_distribution"].any()


def test_too_few_for_an_auc_but_a_model(work, tmp_path, capfd):
    "Three people with the label, one in each part: trained, predicted, and no figure."
    assert main([str(a) for a in command(work, tmp_path, "--curve", "all", task="rare")]) == 0
    said = capfd.readouterr().out
    assert "no AUC is given for 1 with and 11 without" in said and "too few for an AUC" in said
    m = json.loads((tmp_path / "metrics.json").read_text())["test"]
    assert m["auc"] is None and "too few" in m["refused"] and (m["positive"], m["negative"]) == (1, 11)
    assert len(pd.read_csv(tmp_path / "predictions.csv")) == 24 and not (tmp_path / "curve.csv").exists()


@pytest.mark.parametrize("change, says", [
    (dict(task="nobody"), "nothing can be trained"), (dict(task="happiness"), "its columns are SEQN, night"), (dict(task="odd"), "has the value 7"), (dict(labels="none.csv"), "none.csv"), (dict(labels="weeks_H.h5"), "can't be read as a table"),
    (dict(more=["--split", "{w}/nothing.json"]), "nothing.json"), (dict(more=["--baselines", "magic", "--seeds", "1"]), "no baseline 'magic'"), (dict(more=["--curve", "many"]), "no number of people"),
    (dict(more=["--train.epochs=0"]), "epochs is 0"), (dict(more=["--mode", "last_k", "--train.last_k=4"]), "last 4 of 1 blocks")])
def test_what_is_refused(work, tmp_path, change, says, capfd):
    more = [m.format(w=work) for m in change.pop("more", [])]
    assert main([str(a) for a in command(work, tmp_path, *more, **change)]) == 1
    err = capfd.readouterr().err
    assert says in err and "Traceback" not in err


def test_wrong_places(work, tmp_path, capfd):
    labels, out = str(work / "labels.csv"), str(tmp_path / "out")
    for source, encoder, says in ((work / "nowhere", work / "encoder", "no such file or folder"), (work / "weeks_H.h5", work / "nowhere", "nowhere"), (work / "weeks_H.h5", work, "this week")):
        if encoder == work: (night := tmp_path / "night").mkdir(); PatchTransformer(PatchConfig.tiny(rate=10.)).save_pretrained(night); encoder, says = night, "not minutes of activity"
        assert main(["finetune", str(source), labels, "night", str(encoder), out]) == 1
        assert says in capfd.readouterr().err
    assert main(["finetune", "a", "b"]) == 2
    assert main([str(a) for a in command(work, tmp_path / "run")]) == 0
    assert main([str(a) for a in command(work, tmp_path / "run", "--train.seed=5")]) == 1
    assert "other settings" in capfd.readouterr().err


def test_ctrl_c_and_again(work, tmp_path):
    "An interrupted run goes on to the result of one that wasn't."
    long = [str(a) for a in command(work, tmp_path / "a", "--train.epochs=400", "--train.patience=400")]
    process = subprocess.Popen([sys.executable, "-c", "import sys; from pftsleep.apps import finetuning; import pftsleep.training.finetune as f; f._SAVE_SECONDS = 0.; from pftsleep.apps.cli import main; sys.exit(main())", *long],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 240
    while not (tmp_path / "a/state.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in said[1] and not (tmp_path / "a/metrics.json").exists(), said
    short = [str(a) for a in command(work, tmp_path / "a", "--train.epochs=400", "--train.patience=400")]
    torch.set_num_threads(1)
    assert main(short) == 0
    assert main([a if a != str(tmp_path / "a") else str(tmp_path / "b") for a in short]) == 0
    a, b = (pd.read_csv(tmp_path / x / "predictions.csv") for x in "ab")
    np.testing.assert_allclose(a["p"], b["p"], atol=1e-5)


def test_labels(work, tmp_path):
    for name in ("labels.csv", "labels.parquet"):
        kind, labels = read_labels(work / name, "some")
        assert kind == "subject" and len(labels) == 40 and labels["1001"] == 1 and labels["1000"] == 0
    weeks, y, told = labelled_weeks(work, kind, labels)
    assert len(weeks) == 40 and all(int(w.subject) % 2 == v for w, v in zip(weeks, y, strict=True)) and not told
    (tmp_path / "ids.csv").write_text("id,t\n1003,1\n1004_w1,0\n9,1\n")
    weeks, y, _ = labelled_weeks(work / "weeks_H.h5", *read_labels(tmp_path / "ids.csv", "t"))
    assert [(w.subject, v) for w, v in zip(weeks, y, strict=True)] == [("1003", 1), ("1004", 0)]
    for text, says in (("id,t\na,1\na,0\n", "two labels"), ("name,t\na,1\n", "says whose labels"), ("id,t\na,yes\n", "has the value 'yes'"), ("id,t\na,1\n", "none of 60 recordings")):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(ConfigError, match=says): labelled_weeks(work / "weeks_H.h5", *read_labels(tmp_path / "bad.csv", "t"))


@settings(max_examples=30)
@given(st.binary(max_size=300), st.sampled_from(["a.csv", "a.parquet"]))
def test_garbled_labels(tmp_path_factory, data, name):
    path = tmp_path_factory.mktemp("labels") / name
    path.write_bytes(data)
    with suppress(PFTSleepError): read_labels(path, "t")


def test_a_benchmark_is_guarded_by_the_survey_s_own_name(work, tmp_path):
    "Weeks say 'nhanes-2013-14', the provenance of weights 'NHANES 2013-2014': the same survey."
    assert [survey_name(c) for c in ("nhanes-2003-04", "nhanes-2011-12", "mesa", None)] == ["NHANES 2003-2004", "NHANES 2011-2012", "mesa", ""]
    encoder = load_encoder(work / "encoder")
    for provenance, fails in ((dict(file="PAT-S_29k_weights.h5"), True), (dict(file="PAT-S_21k_weights.h5"), False), (dict(file="renamed.h5"), True), ({}, False)):
        vars(encoder)["provenance"] = provenance
        if fails:
            with pytest.raises(ConfigError, match="benchmark"): guarded(encoder, [week(0)])
        else: assert guarded(encoder, [week(0)]) == "NHANES 2013-2014"
        assert guarded(encoder, [week(0), week(1, "nhanes-2011-12")], benchmark=False) == "NHANES 2011-2012, NHANES 2013-2014"
    encoder.source = dict(file="PAT-S_29k_weights.h5") # kept by save_pretrained, so that a copy doesn't get round the guard
    encoder.save_pretrained(tmp_path / "copy")
    with pytest.raises(ConfigError, match="benchmark"): guarded(load_encoder(tmp_path / "copy"), [week(0)])
    with pytest.raises(ConfigError, match="of which years"): guarded(load_encoder(tmp_path / "copy"), [week(0, "nhanes")])
    with pytest.raises(ModelError): encoder_for(str(tmp_path / "none"), "S", 0)
    assert encoder_for("random", "S", 0).config.n_heads == 6


# jobs

def test_the_yaml_files_hold_the_published_settings():
    "PAT, reference 4.3 and 5.2."
    read = lambda name: yaml.safe_load((JOBS / f"model_training/{name}.yaml").read_text())
    for size in "SML":
        assert WeeksConfig(**read("train_pat")["train"][size]) == WeeksConfig.pat(size)
        assert FinetuneConfig(**read("finetune_pat")["train"][size]) == FinetuneConfig.pat(size)
    assert tuple(read("finetune_pat")["tasks"]) == TASKS and "H" not in read("train_pat")["cycles"]


@pytest.mark.slow
def test_the_jobs_from_the_survey_s_files_to_a_table(tmp_path):
    "Files in the survey's layout -> weeks and labels -> pretraining -> table; both scripts with their YAML files made small, and again."
    truth = simulate_nhanes(tmp_path / "files", "D", 40, seed=1)
    (tmp_path / "store").mkdir()
    write_weeks(nhanes_weeks(tmp_path / "files/PAXRAW_D.xpt"), tmp_path / "store/weeks_D.h5") # as jobs/nhanes/build_store.py
    labels = nhanes_labels(tmp_path / "files", "D").assign(planted=(truth["u"] > 0).astype(int))
    labels.to_csv(tmp_path / "labels_D.csv")
    small = dict(S=dict(epochs=1, batch_size=20))
    said = run("--config", JOBS / "model_training/train_pat.yaml", tmp_path / "store", tmp_path / "pat_S", "--cycles", "D", "--train", json.dumps(small), script="model_training/train_pat.py").stdout
    assert "36 weeks of nhanes-2005-06; 1 epochs" in said
    weights = (tmp_path / "pat_S/encoder/model.safetensors").read_bytes()
    assert finetuning.train_pat(str(tmp_path / "store"), str(tmp_path / "pat_S"), cycles="D", train=small) == 0 and (tmp_path / "pat_S/encoder/model.safetensors").read_bytes() == weights
    assert load_encoder(tmp_path / "pat_S").recipe["pretrained_on"] == ["NHANES 2005-2006"]
    tune = dict(source=str(tmp_path / "store"), labels=str(tmp_path / "labels_D.csv"), out=str(tmp_path / "table"), tasks=["planted", "ssri"], encoders=dict(S=str(tmp_path / "pat_S")), curve=["all"], baselines=["boosting"], seeds=1, train=small)
    with pytest.raises(ConfigError, match="pretrained on"): finetuning.finetune_pat(**tune) # of the very people
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(yaml.safe_load((JOBS / "model_training/finetune_pat.yaml").read_text()) | tune | dict(benchmark=False)))
    said = run("--config", tmp_path / "small.yaml", script="model_training/finetune_pat.py").stdout
    assert "left out: ssri" in said
    table = pd.read_csv(tmp_path / "table/table.csv")
    assert set(table["task"]) == {"planted"} and set(table["learner"]) == {"PAT-S", "boosting"} and (table["low"] <= table["auc"]).all() and (table["n"] == 28).all()
    assert finetuning._sizes(["100", "all"]) == [100, None]


@pytest.mark.skipif(not SHARED.exists(), reason="../shared isn't here")
def test_real_people_of_whom_one_is_depressed(tmp_path, capfd):
    "17 people of NHANES 2005-2006 with a PHQ-9, one at 10 or above: no model, no AUC, and it is said why."
    pytest.importorskip("rdata")
    labels = nhanes_labels(SHARED / "realdata/nhanes_xpt", "D")
    labels[["depression"]].dropna().to_csv(tmp_path / "labels.csv")
    people = SHARED / "realdata/actigraphy/nhanes_r/example_activity_data.RData"
    assert main(["finetune", str(people), str(tmp_path / "labels.csv"), "depression", "random", str(tmp_path / "out"), "--cohort", "NHANES 2005-2006", "--partial"]) == 1
    said = capfd.readouterr().err
    assert "1 people with the label and 16 without" in said and "nothing can be trained" in said and not (tmp_path / "out/model").exists()
