"""`pftsleep evaluate` for every task, and its figures against scikit-learn, torchmetrics, YASA and brute force, on inputs that are drawn anew each time."""
import contextlib
import json
import re
import secrets
from datetime import datetime, timedelta
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from pftsleep.apps.cli import TASKS, command, main, make_parser
from pftsleep.apps.evaluating import class_metrics, latex_table, random_encoder, read_predictions, read_scorers, seen_in_pretraining, whom_to_judge
from pftsleep.apps.evaluation import STAGING_BASELINES, baseline, movement_stages, predict, yasa_stages
from pftsleep.data.annotation_writers import write_annotations
from pftsleep.data.hypnograms import read_annotations
from pftsleep.data.recording import Hypnogram, Recording, Stage, array_channel
from pftsleep.data.signals import Recipe
from pftsleep.data.splits import make_split
from pftsleep.data.store import create_store, open_store
from pftsleep.data.study_formats import consensus, soft_agreement
from pftsleep.errors import AlignmentError, PFTSleepError
from pftsleep.evaluation.agreement import bland_altman, event_agreement, match_events, on_epochs_of, pairwise_agreement
from pftsleep.evaluation.calibration import calibration_figures, expected_calibration_error, multiclass_brier, reliability_table
from pftsleep.evaluation.groups import ahi_group, age_group, group_figures, read_people
from pftsleep.evaluation.metrics import staging_metrics
from pftsleep.evaluation.sleep_stats import sleep_statistics
from pftsleep.models.heads import LinearProbe
from pftsleep.models.stager import Stager, save_stager, weights_hash
from pftsleep.models.transformer import PatchConfig, PatchTransformer

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(params=[0, 1, None], ids=["0", "1", "fresh"])
def rng(request):
    seed = secrets.randbits(32) if request.param is None else request.param
    print(f"seed {seed}") # pytest shows it when the test fails
    return np.random.default_rng(seed)


def probabilities(rng, n, k=5): return rng.dirichlet(np.full(k, .7), n)
def hypnogram(rng, n=300): return np.repeat(rng.choice(5, n, p=[.2, .1, .4, .1, .2]), rng.integers(1, 12, n))[:n]


# figures against other libraries

def test_calibration(rng):
    from torchmetrics.classification import MulticlassCalibrationError
    n, bins = int(rng.integers(200, 900)), int(rng.integers(5, 25))
    y, p = rng.integers(0, 5, n), probabilities(rng, n)
    theirs = MulticlassCalibrationError(5, n_bins=bins, norm="l1")(torch.from_numpy(p), torch.from_numpy(y))
    assert expected_calibration_error(y, p, bins) == pytest.approx(float(theirs), abs=1e-6)
    assert multiclass_brier(y, p) == pytest.approx(sk.brier_score_loss(y, p, labels=range(5), scale_by_half=False))
    table = calibration_figures([y[:100], y[100:]], [p[:100], p[100:]], ["a", "b"], bins, n_resamples=20)
    assert table.value["log_loss"] == pytest.approx(sk.log_loss(y, p, labels=range(5)))
    assert table.value["accuracy"] == pytest.approx(sk.accuracy_score(y, p.argmax(1))) and table.value["ece"] == pytest.approx(float(theirs), abs=1e-6)
    assert reliability_table(y, p, bins).n.sum() == n


def test_unscored_epochs_and_silence_change_nothing(rng):
    y, p = rng.integers(0, 5, 50), probabilities(rng, 50)
    holes = rng.random(50) < .3
    kept = expected_calibration_error(y[~holes], p[~holes])
    assert expected_calibration_error(np.where(holes, -1, y), p) == expected_calibration_error(y, np.where(holes[:, None], np.nan, p)) == pytest.approx(kept)


def test_stages(rng):
    from torchmetrics.classification import MulticlassCohenKappa, MulticlassF1Score
    y = hypnogram(rng)
    p = np.where(rng.random(300) < .3, rng.integers(0, 5, 300), y)
    y[:5] = p[5:10] = range(5)
    m = staging_metrics(y, p).pooled
    assert m["kappa"] == pytest.approx(float(MulticlassCohenKappa(5)(torch.from_numpy(p), torch.from_numpy(y))), abs=1e-6)
    f1 = MulticlassF1Score(5, average=None)(torch.from_numpy(p), torch.from_numpy(y))
    assert [m[f"f1_{s.name}"] for s in Stage if s >= 0] == pytest.approx(f1.tolist(), abs=1e-6)
    assert m["macro_f1"] == pytest.approx(sk.f1_score(y, p, average="macro"))
    pair = pairwise_agreement(dict(a=[y], b=[p]))
    assert pair.kappa[0] == pytest.approx(sk.cohen_kappa_score(y, p))


def test_yasa_agrees(rng):
    "Accuracy, kappa and F1 of each night, sleep statistics, and Bland-Altman's limits."
    yasa = pytest.importorskip("yasa", reason="the extra yasa isn't installed")
    words = np.array(["WAKE", "N1", "N2", "N3", "REM"])
    theirs = lambda h, who: yasa.Hypnogram(words[h].tolist(), n_stages=5, freq="30s", scorer=who)
    ours = [hypnogram(rng) for _ in range(8)]
    others = [np.where(rng.random(300) < .2, rng.integers(0, 5, 300), h) for h in ours]
    table = yasa.EpochByEpochAgreement([theirs(h, "a") for h in ours], [theirs(h, "b") for h in others]).get_agreement()
    for k, (a, b) in enumerate(zip(ours, others, strict=True)):
        m = staging_metrics(a, b).pooled
        assert [100 * m["accuracy"], m["kappa"]] == pytest.approx(table.iloc[k][["accuracy", "kappa"]].tolist())
        mine, stats = sleep_statistics(Hypnogram(a, 30.)), theirs(a, "a").sleep_statistics()
        assert [mine[k] for k in ("tst_min", "tib_min", "waso_spt_min", "sol_min", "n1_min", "n2_min", "n3_min", "rem_min", "sleep_efficiency_percent")] == pytest.approx(
            [stats[k] for k in ("TST", "TIB", "WASO", "SOL", "N1", "N2", "N3", "REM", "SE")])
    a, b = rng.normal(400, 40, 30), rng.normal(410, 50, 30)
    index = pd.Index(range(30), name="session")
    made = yasa.SleepStatsAgreement(pd.DataFrame({"TST": a}, index), pd.DataFrame({"TST": b}, index), effect_size_gates=None)
    found, limits = bland_altman(a, b, n_resamples=200), made.summary(ci_method="param")
    assert found.value[["bias", "lower", "upper"]].tolist() == pytest.approx([limits.loc["TST", (k, "center")] for k in ("bias_mean", "loa_lower", "loa_upper")])
    assert found.low["bias"] < (b - a).mean() < found.high["bias"]


def test_classes(rng):
    k, n = int(rng.integers(2, 7)), 200
    y, p = rng.integers(0, k, n), rng.integers(0, k, n)
    m = class_metrics(sk.confusion_matrix(y, p, labels=range(k)))
    assert [float(m[c]) for c in ("accuracy", "balanced_accuracy", "macro_f1", "kappa")] == pytest.approx(
        [sk.accuracy_score(y, p), sk.balanced_accuracy_score(y, p), sk.f1_score(y, p, average="macro"), sk.cohen_kappa_score(y, p)])


def test_bootstrap_of_limits_covers(rng):
    "In nine of ten experiments or so the interval of the bias holds the true bias: people with two nights each."
    hits = 0
    for _ in range(40):
        who = np.repeat(np.arange(25), 2)
        d = rng.normal(5, 8, 25)[who] + rng.normal(0, 3, 50)
        t = bland_altman(np.zeros(50), d, who, n_resamples=150, seed=int(rng.integers(1 << 30)))
        hits += t.low["bias"] <= 5 <= t.high["bias"]
    assert hits >= 30


# agreement by brute force

def spans(rng, n): return pd.DataFrame(dict(onset=rng.uniform(0, 60, n), duration=rng.uniform(1, 15, n)))


def overlap(a, b):
    shared = min(a.onset + a.duration, b.onset + b.duration) - max(a.onset, b.onset)
    return shared / (max(a.onset + a.duration, b.onset + b.duration) - min(a.onset, b.onset)) if shared > 0 else 0.


def test_matching_is_the_largest(rng):
    for _ in range(10):
        a, b, iou = spans(rng, 5), spans(rng, 6), float(rng.uniform(.05, .6))
        fits = np.array([[overlap(x, y) >= iou for y in b.itertuples()] for x in a.itertuples()])
        best = max(sum(fits[i, j] for i, j in enumerate(order)) for order in permutations(range(6), 5))
        found = match_events(a, b, iou)
        assert len(found) == best and all(fits[i, j] for i, j in found)
        assert len(set(found[:, 0])) == len(set(found[:, 1])) == len(found)
        assert len(match_events(b, a, iou)) == best


def test_epochs_are_compared_by_time(rng):
    start = datetime(2024, 1, 1, 22)
    for _ in range(20):
        late, length, mine = float(rng.integers(-200, 200)), float(rng.choice([10, 20, 30, 60])), float(rng.choice([20, 30]))
        other = Hypnogram(rng.integers(0, 5, 40), length, start=start + timedelta(seconds=late))
        reference = Hypnogram(rng.integers(0, 5, 30), mine, start=start)
        middles = (np.arange(30) + .5) * mine
        expected = [next((int(s) for k, s in enumerate(other.stages) if late + k * length <= t < late + (k + 1) * length), -1) for t in middles]
        assert on_epochs_of(other, reference).stages.tolist() == expected


def test_groups_by_hand(rng):
    n = 40
    value, sex = rng.random(n), rng.choice(["male", "female"], n)
    sex[:10], sex[10:20] = "male", "female"
    t = group_figures(lambda rows: value[rows].mean(), dict(sex=sex.tolist()), range(n), 200).set_index("group")
    m, f = value[sex == "male"].mean(), value[sex == "female"].mean()
    assert t.value["male"] == pytest.approx(m) and t.difference["male"] == pytest.approx(m - f) == pytest.approx(-t.difference["female"])
    assert ((t.low < t.value) & (t.value < t.high) & (t.difference_low < t.difference) & (t.difference < t.difference_high)).all()


@given(st.floats(0, 120), st.floats(0, 1e6))
def test_everybody_is_in_one_group(age, ahi):
    assert age_group(age) != "unknown" and ahi_group(ahi) != "unknown"
    assert ("under 18" in age_group(age)) == (age < 18) and ("30 and over" in ahi_group(ahi)) == (ahi >= 30)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=120))
def test_any_table_is_read_or_refused(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("t") / "x.csv"
    for begin in ("", "id,age,sex\n", "id,label,p\n"):
        file.write_text(begin + text, encoding="utf-8", errors="replace")
        for read in (read_people, lambda f: read_predictions([str(f)])):
            with contextlib.suppress(PFTSleepError): read(file)


# the command

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A store of noise, an untrained stager, its split, people, and another scorer."
    root, rng, recipe = tmp_path_factory.mktemp("world"), np.random.default_rng(3), Recipe.native()
    store = create_store(root / "store", recipe)
    for i in range(20):
        stages = np.append(rng.choice(5, 19), -1)
        channels = {c: array_channel(c, rng.standard_normal(20 * 30 * 50) * (1 + np.repeat(stages, 1500)), 50, "uV", "EEG") for c in ("EEG", "EMG")} | {
            "Activity": array_channel("Activity", np.repeat(np.where(stages[::2] == 0, 800., 0.), 1), 1 / 60, "counts", "ACTIVITY")}
        store.add(Recording(f"n{i:02}", channels, subject=f"s{i // 2}", start=datetime(2024, 1, 1, 22), hypnogram=Hypnogram(stages, 30., start=datetime(2024, 1, 1, 22))))
    store.sync()
    torch.manual_seed(0)
    encoder = PatchTransformer(PatchConfig.tiny(("EEG", "EMG"), 50., d_model=16, n_layers=1))
    model = save_stager(Stager(encoder, LinearProbe.of(encoder), recipe, dict(task="none", config=dict(epochs=2, batch_size=2, accelerator="cpu"))), root / "model")
    make_split(store.manifest, dict(train=.3, val=.1, test=.6), seed=1).save(model / "split.json")
    pd.DataFrame(dict(subject=[f"s{i}" for i in range(10)], age=[30] * 5 + [70] * 5, sex=list("FM" * 5))).to_csv(root / "people.csv", index=False)
    (root / "bob").mkdir()
    for i in list(store)[:18]:
        h = store[i].hypnogram
        write_annotations(Hypnogram(h.stages[1:], 30., start=h.start + timedelta(seconds=30)), None, root / "bob" / f"{i}.xml", "nsrr")
    return root


def told(out, task): # evaluation.json, after a look at the files beside it
    data = json.loads((out / "evaluation.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    page, tex = (out / "report.html").read_text(), (out / "table.tex").read_text()
    assert data["format"] == "pftsleep-evaluation/1" and data["task"] == task
    assert "http" not in page.replace("http-equiv", "") and ("data:image/png" in page) == (task in ("staging", "classification") and page.count("<figure") > 0)
    assert tex.count(r"\begin{tabular}") == 1 and not re.search(r"(?<!\\)%", tex)
    for name in data["tables"]: assert len(pd.read_csv(out / f"{name}.csv")) == len(data["tables"][name])
    assert not list(out.glob(".*")), "a half-written file"
    return data


def test_staging(world, tmp_path, capsys):
    out = tmp_path / "out"
    line = ["evaluate", str(world / "store"), str(world / "model"), "--out", str(out), "--baselines", "majority,classical,cole_kripke,sadeh", "--scorers", f"bob={world / 'bob'}", "--people", str(world / "people.csv"), "--missing"]
    assert main(line) == 0
    data, said = told(out, "staging"), capsys.readouterr().out
    assert "12 nights of unseen people" in said and "results in" in said
    metrics = pd.read_csv(out / "metrics.csv", index_col=["result", "metric"])
    assert list(metrics.index.unique("result")) == ["most frequent stage", "classical features", "model"]
    assert metrics.loc[("classical features", "accuracy"), "pooled"] > metrics.loc[("most frequent stage", "accuracy"), "pooled"] # amplitude tells the stage here
    wake = pd.read_csv(out / "sleep_wake.csv", index_col=["result", "metric"])
    assert set(wake.index.unique("result")) == {"most frequent stage", "classical features", "Cole-Kripke", "Sadeh", "model"}
    p = data["provenance"]
    assert len(p["weights"]) == 16 and p["split"] == whom_to_judge(open_store(world / "store"), world / "model").split.hash and p["seed"] == 0 and p["recipe"] == open_store(world / "store").recipe_hash
    scorers = {(r["a"], r["b"]): r for r in data["tables"]["scorers"]}
    assert scorers["reference", "bob"]["kappa"] == 1, "bob began to score half a minute later, and agrees"
    soft = {r["scorer"]: r["median"] for r in data["tables"]["soft_agreement"]}
    assert soft["reference"] == soft["bob"] == 1 > soft["model"]
    assert {r["missing"] for r in data["tables"]["missing_channels"]} == {"none", "EEG", "EMG"}
    assert {r["group"] for r in data["tables"]["groups"]} <= {"18 to 39", "60 to 74", "female", "male"}
    cost = {r["result"]: r for r in data["tables"]["cost"]}
    assert cost["model"]["seconds_per_night"] > 0 and cost["model"]["probe_parameters"] == 2 * 16 * 5 + 5
    assert data["facts"]["seen_in_pretraining"].startswith("unknown") and data["facts"]["peak_memory"]["process_mb"] > 0
    nights = pd.read_csv(out / "nights.csv")
    assert metrics.loc[("model", "accuracy"), "night_median"] == pytest.approx(nights.accuracy.median())


@pytest.mark.slow
def test_twice_is_the_same(world, tmp_path):
    for n in "ab": assert main(["evaluate", str(world / "store"), str(world / "model"), "--out", str(tmp_path / n)]) == 0
    for f in ("metrics.csv", "predictions.csv", "calibration.csv", "bland_altman.csv", "table.tex"): assert (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes()


def test_another_split(world, tmp_path):
    store = open_store(world / "store")
    own = whom_to_judge(store, world / "model").split
    make_split(store.manifest, dict(train=.5, test=.5), seed=7).save(tmp_path / "s.json")
    some = whom_to_judge(store, world / "model", str(tmp_path / "s.json"))
    assert set(some.ids) <= set(own.parts["test"]), "who was learned from is never judged, whatever another split says"
    published = world / "people.csv" # any file stands for one
    assert len(whom_to_judge(store, published).ids) == 20 and "unknown" in whom_to_judge(store, published).seen


def test_seen_in_pretraining(world, tmp_path):
    store = open_store(world / "store")
    encoder = PatchTransformer(PatchConfig.tiny(("EEG",), 50., d_model=16, n_layers=1))
    stager = Stager(encoder, LinearProbe.of(encoder), Recipe.native())
    (tmp_path / "run.json").write_text(json.dumps(dict(facts={}, results=dict(weights=weights_hash(encoder)))))
    make_split(store.manifest, dict(train=.5, test=.5), seed=0).save(tmp_path / "split.json")
    split = json.loads((tmp_path / "split.json").read_text())
    seen, unseen = ({split["subjects"][i] for i in split["parts"][k]} for k in ("train", "test"))
    assert seen_in_pretraining(stager, sorted(unseen), str(tmp_path)) == "no"
    assert seen_in_pretraining(stager, [*unseen, min(seen)], str(tmp_path)) == f"yes: 1 of {len(unseen) + 1} people"
    assert seen_in_pretraining(stager, []).startswith("unknown")
    (tmp_path / "run.json").write_text(json.dumps(dict(results=dict(weights="other"))))
    with pytest.raises(PFTSleepError, match="other"): seen_in_pretraining(stager, [], str(tmp_path))


@pytest.mark.slow
def test_random_encoder_and_yasa(world, tmp_path):
    pytest.importorskip("lightning", reason="the extra train isn't installed")
    store = open_store(world / "store")
    from pftsleep.models.stager import load_stager
    stager, judged = load_stager(world / "model"), whom_to_judge(store, world / "model")
    p = random_encoder(stager, store, judged, tmp_path / "run", 5)
    assert set(p.predicted) == set(judged.ids) and all(h.probabilities is not None for h in p.predicted.values())
    assert (tmp_path / "run" / "stager" / "split.json").exists()
    pytest.importorskip("yasa", reason="the extra yasa isn't installed")
    rng = np.random.default_rng()
    rec = Recording("x", {"C4": array_channel("C4", .02 * rng.standard_normal(125 * 600), 125, "mV", "EEG"), "E1": array_channel("E1", 20 * rng.standard_normal(100 * 600), 100, "uV", "EOG")})
    q = yasa_stages(rec, 21)
    assert q.shape == (21, 5) and np.allclose(q[:20].sum(1), 1, atol=1e-4) and np.isnan(q[20]).all()


def test_movement_knows_the_clock(world):
    store = open_store(world / "store")
    rec = store[next(iter(store))]
    counts = np.r_[np.zeros(30), np.full(30, 2000.)]
    watch = Recording("w", {"Activity": array_channel("Activity", np.repeat(counts, 2) / 2, 1 / 30, "counts", "ACTIVITY")}) # half minutes are summed
    stages = movement_stages(watch, 120, 30.)
    assert (stages[:50] == Stage.N2).all() and (stages[70:] == Stage.W).all()
    p = baseline("cole_kripke", store, (), [], [rec.id])
    assert p.two_states and set(p.predicted[rec.id].stages) <= {0, 2, -1}
    with pytest.raises(PFTSleepError, match="its activity is in"): movement_stages(Recording("w", {"Activity": array_channel("Activity", counts, 1 / 60, "MIMS")}), 1, 30.)


def test_without_a_channel_the_model_sees_padding(world):
    store, ids = open_store(world / "store"), ["n00"]
    from pftsleep.models.stager import load_stager
    stager = load_stager(world / "model")
    rec = store["n00"]
    alone = stager.stage(Recording("n00", {"EEG": rec["EEG"]}, start=rec.start), allow_missing=True)
    np.testing.assert_array_equal(predict(stager, store, ids, False, without=("EMG",)).predicted["n00"].stages, alone.stages)


# the other tasks

def table(path, **columns): pd.DataFrame(columns).to_csv(path, index=False); return str(path)


def test_binary(tmp_path, rng):
    n = 120
    y = np.arange(n) % 3 == 0
    good, bad = 1 / (1 + np.exp(-(2. * y + rng.standard_normal(n)))), rng.random(n)
    lines = [table(tmp_path / "good.csv", id=range(n), subject=[f"q{k}" for k in range(n)], p=good), table(tmp_path / "bad.csv", id=range(n)[::-1], p=bad[::-1])]
    labels = table(tmp_path / "labels.csv", id=range(n), apnea=y.astype(int))
    people = table(tmp_path / "people.csv", id=range(n), age=rng.uniform(20, 80, n), ahi=rng.uniform(0, 50, n))
    assert main(["evaluate", "classification", *lines, "--labels", labels, "--task", "apnea", "--people", people, "--out", str(tmp_path / "o")]) == 0
    data = told(tmp_path / "o", "classification")
    first, second = data["tables"]["classification"]
    assert first["auc"] == pytest.approx(sk.roc_auc_score(y, good)) and second["auc"] == pytest.approx(sk.roc_auc_score(y, bad)), "rows are matched by id"
    assert first["average_precision"] == pytest.approx(sk.average_precision_score(y, good)) and first["brier"] == pytest.approx(sk.brier_score_loss(y, good))
    assert second["difference_to_first"] == pytest.approx(second["auc"] - first["auc"]) and first["low"] < first["auc"] < first["high"]
    assert data["tables"]["groups"]


def test_several_classes(tmp_path, rng):
    n, names = 90, ["sitting", "walking", "grazing"]
    y, p = rng.integers(0, 3, n), probabilities(rng, n, 3)
    line = table(tmp_path / "x.csv", id=range(n), subject=[f"cow{k // 6}" for k in range(n)], label=[names[k] for k in y], **{f"p_{c}": p[:, k] for k, c in enumerate(names)})
    assert main(["evaluate", "classification", line, "--out", str(tmp_path / "o")]) == 0
    row = told(tmp_path / "o", "classification")["tables"]["classification"][0]
    assert row["macro_f1"] == pytest.approx(sk.f1_score(y, p.argmax(1), average="macro")) and row["kappa"] == pytest.approx(sk.cohen_kappa_score(y, p.argmax(1)))
    assert row["ece"] == pytest.approx(expected_calibration_error(y, p)) and row["macro_f1_low"] < row["macro_f1"] < row["macro_f1_high"]


def test_a_run_of_finetune(tmp_path):
    "Its folder is read: the part test alone, with the weights' hash."
    run, rng = tmp_path / "run", np.random.default_rng(0)
    run.mkdir()
    (run / "run.json").write_text(json.dumps(dict(facts=dict(split="5917"), results=dict(weights="ab12"))))
    table(run / "predictions.csv", id=range(60), subject=[f"s{k}" for k in range(60)], part=["val"] * 20 + ["test"] * 40, label=np.arange(60) % 2, p=rng.random(60))
    assert main(["evaluate", "classification", str(run), "--out", str(tmp_path / "o")]) == 0
    data = told(tmp_path / "o", "classification")
    assert "40 rows" in data["about"] and data["provenance"]["weights of run"] == "ab12" and data["provenance"]["split of run"] == "5917"


def test_retrieval(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 12))
    for name, noise, lost in (("eeg", 0, 0), ("resp", .1, 5)):
        v = x + noise * rng.standard_normal(x.shape)
        pd.DataFrame(dict(id=[f"c{k:02}" for k in range(30)], subject=[f"s{k // 3}" for k in range(30)], **{f"e{j}": v[:, j] for j in range(12)})).iloc[lost:].sample(frac=1, random_state=0).to_parquet(tmp_path / f"{name}.parquet")
    assert main(["evaluate", "retrieval", f"brain={tmp_path / 'eeg.parquet'}", f"breath={tmp_path / 'resp.parquet'}", "--out", str(tmp_path / "o")]) == 0
    rows = told(tmp_path / "o", "retrieval")["tables"]["retrieval"]
    assert {(r["query"], r["gallery"]) for r in rows} == {("brain", "breath"), ("breath", "brain")} and all(r["n"] == 25 for r in rows)
    assert all(r["value"] == 1 for r in rows)


def test_survival(tmp_path):
    sksurv = pytest.importorskip("sksurv.metrics", reason="the extra survival isn't installed")
    rng, n = np.random.default_rng(1), 150
    risk = rng.standard_normal(n)
    t, end = rng.exponential(3000 * np.exp(-risk)), rng.uniform(500, 4000, n)
    time, event, score = np.minimum(t, end), (t <= end).astype(int), risk + rng.standard_normal(n)
    both = lambda s: dict(id=[*range(n)] * 2, label=["stroke"] * n + ["none"] * n, time=[*time] * 2, event=[*event, *np.zeros(n, int)], score=[*s] * 2)
    lines = [table(tmp_path / f"{m}.csv", **both(s)) for m, s in dict(model=score, dice=rng.standard_normal(n)).items()]
    assert main(["evaluate", "survival", *lines, "--out", str(tmp_path / "o"), "--horizon", "5"]) == 0
    rows = {(r["label"], r["model"]): r for r in told(tmp_path / "o", "survival")["tables"]["survival"]}
    assert rows["stroke", "model"]["c"] == pytest.approx(sksurv.concordance_index_censored(event == 1, time, score)[0])
    assert rows["none", "model"]["c"] is None and "few" in rows["none", "model"]["note"]
    assert rows["stroke", "dice"]["gain"] == pytest.approx(rows["stroke", "dice"]["c"] - rows["stroke", "model"]["c"])


def test_a_scoring_without_a_clock_is_named(tmp_path):
    """The message says which scorer's file is meant, and not only that some of hundreds has no clock."""
    (tmp_path / "n1.csv").write_text("stage\nW\nN2\n")
    with pytest.raises(AlignmentError, match=r"n1\.csv: one of two scorings has a clock time"): read_scorers([f"bob={tmp_path}"], {"n1": Hypnogram(np.zeros(2, "int8"), 30., start=datetime(2024, 3, 1, 22))})


def test_events_with_a_time_of_day_alone(tmp_path):
    """Luna's .annot has clock times and no date; whoever scored from another second on is still on the same clock."""
    head = "class\tinstance\tchannel\tstart\tstop\tmeta\n"
    (tmp_path / "a.annot").write_text(head + "N2\t.\t.\t23:59:00\t00:05:00\t.\nobstructive_apnea\t.\t.\t00:01:00\t00:01:20\t.\n")
    (tmp_path / "b.annot").write_text(head + "N2\t.\t.\t00:00:00\t00:05:00\t.\nobstructive_apnea\t.\t.\t00:01:00\t00:01:20\t.\n")
    assert main(["evaluate", "events", str(tmp_path / "a.annot"), str(tmp_path / "b.annot"), "--out", str(tmp_path / "out")]) == 0
    data = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert data["tables"]["events"][0]["f1"] == 1 and data["facts"]["clocks_assumed"] == 0


def test_events_on_their_clocks(tmp_path):
    "The second file begins a minute earlier; its events are the same."
    for name in "ab": (tmp_path / name).mkdir()
    apneas = np.arange(100., 2000, 90)
    start = datetime(2024, 1, 1, 22)
    for where, early in (("a", 0), ("b", 60)):
        e = pd.DataFrame(dict(onset=apneas + early, duration=20., name="Obstructive apnea", channel=""))
        write_annotations(Hypnogram(np.full(80, 2), 30., start=start - timedelta(seconds=early)), e, tmp_path / where / "n1.edf", "edf")
    dated = read_annotations(tmp_path / "b" / "n1.edf").origin is not None
    assert main(["evaluate", "events", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "o"), "--iou", "0.9"]) == 0
    data = told(tmp_path / "o", "events")
    assert dated and data["tables"]["events"][0]["f1"] == 1 and data["facts"]["clocks_assumed"] == 0


def test_real_events_agree_with_themselves(tmp_path):
    files = [f for f in (SHARED / "realdata" / "annotations_xml").glob("*.xml")] if SHARED.exists() else []
    if not files: pytest.skip("real annotations are not here (../shared/realdata/annotations_xml)")
    seen = 0
    for f in files:
        e = read_annotations(f).events
        t = event_agreement([e], [e])
        moved = event_agreement([e], [e.assign(onset=e.onset + 1)])
        for family in t.index:
            seen += 1
            assert t.f1[family] > .95 and moved.f1[family] <= t.f1[family] # events without a duration match nothing
    assert seen


def test_real_scorers():
    "Five people of the Dreem data."
    folder = SHARED / "realdata" / "hypnograms" / "dreem_dodh"
    if not folder.exists(): pytest.skip("the Dreem scorings are not here (../shared/realdata/hypnograms/dreem_dodh)")
    nights: dict[str, list] = {}
    for f in sorted(folder.rglob("*.json")):
        try: s = np.array(json.loads(f.read_text()))
        except ValueError: continue
        if s.ndim == 1 and s.dtype.kind in "iuf": nights.setdefault(f.stem, []).append(Hypnogram(s.astype("int8"), 30.))
    some = [n for n in nights.values() if len(n) > 2]
    if not some: pytest.skip(f"no night with three scorers as plain lists under {folder.name}")
    for scorers in some:
        assert np.median(soft_agreement(scorers)) > .7 # one of five may score in his own way: .40 in a night that we have
        agreed = consensus(scorers)
        pairs = pairwise_agreement({str(k): [h.stages] for k, h in enumerate(scorers)} | dict(consensus=[agreed.stages]))
        assert pairs[pairs.b == "consensus"].kappa.mean() > pairs[pairs.b != "consensus"].kappa.mean()


# what goes wrong is said in one line

FAULTS = {"no such baseline": "evaluate {store} {model} --baselines oracle", "no such scorer": "evaluate {store} {model} --scorers bob={tmp}/nowhere", "no people": "evaluate {store} {model} --people {tmp}/nobody.csv",
    "wrong people": "evaluate {store} {model} --people {tmp}/wrong.csv", "no pretraining": "evaluate {store} {model} --pretraining {tmp}", "no split": "evaluate {store} {model} --split {tmp}/nothing.json",
    "no predictions": "evaluate classification {tmp}/nobody.csv", "no label": "evaluate classification {tmp}/p.csv --task x", "no class": "evaluate classification {tmp}/few.csv",
    "one modality": "evaluate retrieval {tmp}/p.csv", "not parquet": "evaluate retrieval a={tmp}/p.csv b={tmp}/p.csv", "no risks": "evaluate survival {tmp}/p.csv", "no events": "evaluate events {tmp}/nobody {tmp}",
    "file and folder": "evaluate events {tmp} {tmp}/p.csv", "an overlap of two": "evaluate events {a} {a} --iou 2", "into a file": "evaluate classification {tmp}/ok.csv --out {tmp}/p.csv", "twice": "evaluate classification {tmp}/ok.csv x={tmp}/ok.csv ok={tmp}/ok.csv"}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault, world, tmp_path, capsys):
    table(tmp_path / "p.csv", id=[1, 2], p=[.1, .2])
    table(tmp_path / "few.csv", id=[1, 2], label=[0, 1], p=[.1, .2])
    table(tmp_path / "wrong.csv", subject=["zz"], age=[40])
    table(tmp_path / "ok.csv", id=range(40), label=[0, 1] * 20, p=np.linspace(0, 1, 40))
    (tmp_path / "a").mkdir()
    write_annotations(Hypnogram(np.full(9, 2), 30.), pd.DataFrame(dict(onset=[9.], duration=[12.], name=["Hypopnea"], channel=[""])), tmp_path / "a" / "n.xml", "nsrr")
    line = FAULTS[fault].format(store=world / "store", model=world / "model", tmp=tmp_path, a=tmp_path / "a")
    if "--out" not in line: line += f" --out {tmp_path / 'out'}"
    assert main(line.split()) == 1
    err = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(err) and any(e.startswith("pftsleep evaluate") for e in err)
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_every_task_has_help(capsys):
    for name in TASKS:
        assert main([*name.split(), "--help"]) == 0
        said = capsys.readouterr().out
        assert f"usage: pftsleep {name}" in said
        for action in make_parser(name, command(name))._actions: assert action.help, (name, action.dest)
    assert main(["evaluate", "--help"]) == 0 and "classification" in capsys.readouterr().out


def test_latex_is_plain():
    text = latex_table(pd.DataFrame({"a_b": ["50 %", "x & y"], "n": [1.5, np.nan]}, ["{r}", "~"]), "100 % #1")
    assert r"a\_b" in text and r"50 \%" in text and r"x \& y" in text and r"\{r\}" in text and "--" in text and r"\#1" in text
    assert len({line.count("&") - line.count(r"\&") for line in text.splitlines() if line.endswith(r"\\")}) == 1


def test_baselines_are_named():
    assert next(iter(STAGING_BASELINES)) == "majority" and len(set(STAGING_BASELINES.values())) == len(STAGING_BASELINES)
