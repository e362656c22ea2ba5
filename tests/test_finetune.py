"Fine-tuning, probes, baselines and their figures: oracles, faults, and the published models end to end."
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from pftsleep.data.standardise import Standardiser
from pftsleep.errors import ConfigError, ModelError, PFTSleepError, SplitError
from pftsleep.evaluation.discrimination import auc, auc_interval, average_precision, bootstrap_interval, calibration, delong, delong_test, discrimination, operating_point, youden
from pftsleep.models.baselines import Baseline, BaselineConfig, ConvLSTM, LastState, hard_sigmoid
from pftsleep.models.pat import PAT, MaskedAutoencoder
from pftsleep.models.transformer import PatchConfig, PatchTransformer, n_parameters
from pftsleep.training import finetune as ft
from pftsleep.training.finetune import (Examples, FinetuneConfig, TaskHead, TaskHeadConfig, TaskModel, estimator, finetune, finetuning, from_scratch, guard_benchmark, label_curve,
    load_task, nested_subsets, plain_scaler, rest, save_task, scaler_of, stratified_split, wavelets)
from pftsleep.training.masked_weeks import WeeksConfig, masked_loss, pretrain_weeks
from pftsleep.training.runs import seeded, weights_hash

torch.set_num_threads(1)


# --- figures

scored = st.integers(2, 40).flatmap(lambda n: st.tuples(st.lists(st.booleans(), min_size=n, max_size=n).filter(lambda y: 2 <= sum(y) <= len(y) - 2),
    st.lists(st.integers(-4, 4), min_size=n, max_size=n), st.lists(st.integers(-4, 4), min_size=n, max_size=n), st.lists(st.integers(0, 3), min_size=n, max_size=n)))


@given(scored)
def test_auc_and_average_precision_are_those_of_scikit_learn(case):
    y, a, _, w = map(np.array, case)
    assert auc(y, a, at_least=1) == pytest.approx(roc_auc_score(y, a), abs=1e-12)
    assert average_precision(y, a, at_least=1) == pytest.approx(average_precision_score(y, a), abs=1e-12)
    if (w * y).sum() and (w * ~y).sum():
        again = np.repeat(np.arange(len(y)), w)
        assert auc(y, a, w, at_least=1) == pytest.approx(roc_auc_score(y[again], a[again]), abs=1e-12)
        assert average_precision(y, a, w, at_least=1) == pytest.approx(average_precision_score(y[again], a[again]), abs=1e-12)


def naive_delong(y, scores):
    "As DeLong, DeLong and Clarke-Pearson write it, pair by pair."
    kernel = np.array([[[(p > q) + .5 * (p == q) for q in s[~y]] for p in s[y]] for s in scores])
    return kernel.mean((1, 2)), np.cov(kernel.mean(2)) / y.sum() + np.cov(kernel.mean(1)) / (~y).sum()


@given(scored)
def test_delong_from_ranks_is_delong_from_pairs(case):
    y, a, b, _ = map(np.array, case)
    for got, want in zip(delong(y, np.stack([a, b]), at_least=2), naive_delong(y, [a, b]), strict=True): np.testing.assert_allclose(got, want, atol=1e-12)


@given(st.lists(st.sampled_from([0, 1, 2, -1, float("nan"), None, "x", True]), max_size=12), st.lists(st.floats(allow_nan=True), max_size=12))
def test_nonsense_is_a_typed_error(y, score):
    for figure in (auc, average_precision, auc_interval, calibration, discrimination, youden):
        with suppress(PFTSleepError): figure(y, score)


def test_seventeen_people_and_one_positive_get_no_auc():
    y, p = np.arange(17) == 3, np.linspace(.1, .9, 17)
    for figure in (auc, auc_interval, average_precision, discrimination):
        with pytest.raises(ConfigError, match="1 positive and 16 negative: too few"): figure(y, p)
    with pytest.raises(ConfigError, match="too few"): delong_test(y, p, 1 - p)
    with pytest.raises(ConfigError, match="too few"): bootstrap_interval(y, p, range(17))
    assert operating_point(y, p, .5).n["sensitivity"] == 1 # counts may be told, with the interval that one person deserves
    assert operating_point(y, p, .5).loc["sensitivity", "high"] - operating_point(y, p, .5).loc["sensitivity", "low"] > .7


def test_the_difference_of_two_models_has_its_nominal_error():
    "Two equally good models on the same people: p < .05 in about 5 of 100 studies."
    found, apart = 0, 1.2
    for seed in range(400):
        rng = np.random.default_rng(seed)
        y = np.arange(200) < 40
        person = rng.normal(size=200) + apart * y
        found += delong_test(y, person + .7 * rng.normal(size=200), person + .7 * rng.normal(size=200))["p"] < .05
    assert 8 <= found <= 34


# --- baselines

def test_the_convolutional_lstm_step_by_step():
    "Against the definition, with loops in place of convolutions; the even kernel is padded at the end."
    torch.manual_seed(0)
    cell = ConvLSTM(2, 3, 2, relu=True)
    x = torch.randn(1, 2, 2, 4, 5)
    with torch.inference_mode():
        h = c = torch.zeros(3, 3, 4)
        for t in range(2):
            padded = torch.zeros(3, 4, 5); padded[:, :3, :4] = h
            gates = torch.stack([torch.stack([(cell.see.weight * x[0, t, :, r:r + 2, q:q + 2]).sum((1, 2, 3)) + cell.see.bias + (cell.recall.weight * padded[:, r:r + 2, q:q + 2]).sum((1, 2, 3))
                for q in range(4)], -1) for r in range(3)], -2)
            i, f, g, o = gates.chunk(4)
            c = hard_sigmoid(f) * c + hard_sigmoid(i) * torch.relu(g)
            h = hard_sigmoid(o) * torch.relu(c)
        np.testing.assert_allclose(cell(x)[0].numpy(), h.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind, n", [("lstm", 15_601), ("cnn1d", 10_561), ("cnn3d", 793_793), ("convlstm", 1_759_689)])
def test_baselines_have_the_published_size_and_learn(kind, n, tmp_path):
    with seeded(0): model = Baseline(BaselineConfig(kind))
    assert n_parameters(model) == n == sum(p.numel() for p in model.parameters() if p.requires_grad)
    x = torch.randn(2, 10_080)
    model.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    again = Baseline.from_pretrained(model.save_pretrained(tmp_path))
    with torch.inference_mode(): assert torch.equal(again(x[:1]), model.eval()(x[:1]))


def test_forget_gates_begin_open():
    for bias in (LastState(1, 4).bias, Baseline(BaselineConfig("convlstm")).body[1].see.bias):
        h = len(bias) // 4
        assert bias[h:2 * h].eq(1).all() and bias[:h].eq(0).all() and bias[2 * h:].eq(0).all()


# --- splits

@given(st.lists(st.tuples(st.integers(0, 25), st.integers(0, 1)), min_size=12, max_size=60), st.integers(0, 5))
@settings(max_examples=60)
def test_no_split_ever_divides_a_person(rows, seed):
    manifest = pd.DataFrame([dict(id=f"w{k}", subject=f"p{s}", label=y) for k, (s, y) in enumerate(rows)])
    try: split = stratified_split(manifest, dict(train=.6, val=.2, test=.2), seed)
    except SplitError: return
    assert sorted(i for ids in split.parts.values() for i in ids) == sorted(manifest.id)
    split.check(manifest)
    people = manifest.groupby("subject").label.max()
    for ids in split.parts.values():
        assert people[manifest.set_index("id").subject[list(ids)].unique()].nunique() == people.nunique() # some of each class in each part


@given(st.integers(1, 30), st.integers(30, 200), st.integers(0, 9))
@settings(max_examples=40)
def test_subsets_are_nested_and_stratified(positives, n, seed):
    manifest = pd.DataFrame(dict(subject=[f"p{k}" for k in range(n)], label=(np.arange(n) < positives).astype(int)))
    before = set()
    for size, rows in nested_subsets(manifest, (10, 25, 60, None), seed).items():
        assert len(rows) == len(set(rows)) == size and before <= set(rows)
        assert abs(manifest.label[rows].sum() - positives * size / n) <= 1
        before = set(rows)


# --- runs

def people(n, seed, t=600, k=2, prefix=""):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % k
    values = (labels[:, None] * np.sin(np.arange(t) / 30) + rng.normal(size=(n, t))).astype("float32")
    return Examples(values, labels, [f"{prefix}w{i}" for i in range(n)], [f"{prefix}p{i}" for i in range(n)])


def encoder(norm="layer", **changes):
    c = dict(d_model=8, n_layers=2, n_heads=2, d_ff=16, embedding="shared", position="sine", instance_norm=False, dropout=.2, norm=norm)
    with seeded(1): return PatchTransformer(PatchConfig(("Activity",), 1 / 60, 60, **c | changes)).eval()


QUICK = FinetuneConfig(learning_rate=1e-2, batch_size=8, epochs=8, patience=8)
TRAIN, VAL, TEST = people(24, 0), people(12, 1, prefix="v"), people(30, 2, prefix="t")


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a_frozen_encoder_is_byte_identical_afterwards(tmp_path, norm):
    e = encoder(norm)
    before = {k: v.clone() for k, v in e.state_dict().items()}
    model = finetune(e, TRAIN, VAL, tmp_path, replace(QUICK, mode="frozen"))
    assert weights_hash(model.encoder) == weights_hash(e) and model.provenance["trained_parameters"] == n_parameters(model.head)
    assert all(torch.equal(v, before[k]) for k, v in model.encoder.state_dict().items())


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_resting_blocks_keep_their_weights_and_their_statistics(tmp_path, norm):
    e = encoder(norm)
    model = finetune(e, TRAIN, VAL, tmp_path, replace(QUICK, mode="last_k", last_k=1))
    old, new = e.state_dict(), model.encoder.state_dict()
    moved = {k.split(".")[0] + "." + k.split(".")[1] for k in old if not torch.equal(old[k], new[k])}
    assert moved and all(k.startswith(("blocks.1", "norm")) for k in moved)


def test_full_training_moves_everything_and_not_the_encoder_that_was_given(tmp_path):
    e = encoder()
    before = weights_hash(e)
    model = finetune(e, TRAIN, VAL, tmp_path, QUICK)
    assert weights_hash(e) == before != weights_hash(model.encoder)


class Stop(Exception): "As a power cut."


@pytest.mark.parametrize("mode", ["full", "frozen"])
@pytest.mark.parametrize("how", [KeyboardInterrupt, Stop])
def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path, monkeypatch, mode, how):
    config = replace(QUICK, mode=mode)
    whole = finetune(encoder(), TRAIN, VAL, tmp_path / "whole", config)
    epoch, calls = ft._epoch, []
    def until(*args):
        if len(calls) == 5: raise how
        calls.append(1)
        return epoch(*args)
    monkeypatch.setattr(ft, "_SAVE_SECONDS", -1)
    monkeypatch.setattr(ft, "_epoch", until)
    with pytest.raises(how): finetune(encoder(), TRAIN, VAL, tmp_path / "cut", config)
    monkeypatch.setattr(ft, "_epoch", epoch)
    assert finetune(encoder(), TRAIN, VAL, tmp_path / "cut", config).hash == whole.hash
    assert (tmp_path / "cut/history.csv").read_text() == (tmp_path / "whole/history.csv").read_text()


def test_runs_don_t_influence_each_other(tmp_path):
    "The published notebook keeps the moments of the optimiser from one size to the next."
    alone = finetune(encoder(), TRAIN, VAL, tmp_path / "a", QUICK).hash
    torch.manual_seed(99); torch.randn(5)
    finetune(encoder(), people(16, 5), VAL, tmp_path / "b", QUICK)
    assert finetune(encoder(), TRAIN, VAL, tmp_path / "c", QUICK).hash == alone
    assert finetune(encoder(), TRAIN, VAL, tmp_path / "d", replace(QUICK, seed=1)).hash != alone


def test_best_weights_come_back_and_waiting_ends(tmp_path):
    model = finetune(encoder(), TRAIN, VAL, tmp_path, replace(QUICK, epochs=60, patience=3))
    curve = pd.read_csv(tmp_path / "history.csv")
    best = model.provenance["best_epoch"]
    assert curve.val_auc.max() == curve.val_auc[best] and best == curve.val_auc.idxmax() # the first of the best, as Keras
    assert len(curve) == min(60, best + 4)
    assert auc(VAL.labels, model.predict(VAL)) == pytest.approx(curve.val_auc[best])


def test_three_classes(tmp_path):
    model = finetune(encoder(), people(30, 0, k=3), people(12, 1, k=3, prefix="v"), tmp_path, QUICK, classes=("rest", "walk", "run"))
    p = model.predict(people(6, 2, k=3))
    assert p.shape == (6, 3) and np.allclose(p.sum(1), 1) and load_task(tmp_path / "model").classes == ("rest", "walk", "run")


def test_padding_changes_no_prediction():
    model = TaskModel(encoder(), TaskHead(TaskHeadConfig(8)))
    pad = np.zeros(TEST.values.shape, bool); pad[:, :240] = True
    other = TEST.values.copy(); other[:, :240] = np.nan
    a, b = model.predict(replace(TEST, pad=pad)), model.predict(replace(TEST, values=other, pad=pad))
    np.testing.assert_array_equal(a, b)


def test_who_is_learned_from_is_not_judged(tmp_path):
    with pytest.raises(SplitError, match="split people"): finetune(encoder(), TRAIN, TRAIN.take([0, 1]), tmp_path, QUICK)
    with pytest.raises(SplitError, match="split people"): label_curve({}, TRAIN, replace(TEST, subjects=TRAIN.subjects + ("x",) * 6), tmp_path)
    with pytest.raises(ConfigError, match=r"\[12, 0\]"): finetune(encoder(), TRAIN.take(np.flatnonzero(TRAIN.labels == 0)), VAL, tmp_path, QUICK)
    with pytest.raises(ConfigError, match=r"\[6, 0\]"): finetune(encoder(), TRAIN, VAL.take(np.flatnonzero(VAL.labels == 0)), tmp_path, QUICK)


def test_a_run_that_diverges_says_so(tmp_path):
    with pytest.raises(ConfigError, match="learning rate|NaN"): finetune(encoder(), TRAIN, VAL, tmp_path, replace(QUICK, learning_rate=1e30))


# --- bundles

def test_a_bundle_whose_parts_were_exchanged_or_damaged_is_refused(tmp_path):
    by = Standardiser("column", np.linspace(0, 1, 600), np.ones(600), "MIMS", "made up", 3, "", "", True, frozenset({"a"}))
    model = TaskModel(encoder(), TaskHead(TaskHeadConfig(8)), scaler=plain_scaler(by), provenance=dict(seed=0))
    folder = save_task(model, tmp_path / "m")
    assert np.array_equal(scaler_of(load_task(folder)).mean, by.mean)
    for file in ("task.json", "head/model.safetensors", "head/config.json", "encoder/model.safetensors", "encoder/config.json"):
        path, rng = folder / file, np.random.default_rng(0)
        whole = path.read_bytes()
        for damage in (b"", whole[:-9], whole[:len(whole) // 2], b"[]", b"{}", *(whole[:k] + bytes([whole[k] ^ 255]) + whole[k + 1:] for k in rng.integers(len(whole), size=8))):
            path.write_bytes(damage)
            with suppress(ModelError): assert load_task(folder).hash == model.hash # a byte of the provenance or of white space may be all that changed
        path.unlink()
        with pytest.raises(ModelError): load_task(folder)
        path.write_bytes(whole)
    about = json.loads((folder / "task.json").read_text())
    for key, value in dict(classes=["yes", "no"], scaler=plain_scaler(replace(by, mean=by.mean + 1e-12))).items():
        (folder / "task.json").write_text(json.dumps(about | {key: value}))
        with pytest.raises(ModelError, match="trained together"): load_task(folder)


# --- benchmarks

def test_29k_weights_are_refused_where_they_have_seen_the_people(tmp_path):
    pool, test = replace(TRAIN, cohort="NHANES 2013-2014"), replace(TEST, cohort="NHANES 2013-2014")
    e = encoder()
    for file in ("PAT-S_29k_weights.h5", "PAT-L_29k_weights.h5"):
        e.provenance = dict(file=file, sha256="0" * 64)
        with pytest.raises(ConfigError, match="21k"): label_curve({"PAT": finetuning(e, QUICK)}, pool, test, tmp_path, sizes=(None,), seeds=(0,))
    e.provenance = dict(file="encoder.h5", sha256="37b3c530b8d9d89416d28fddbb4545de568cc52ddf6f5c700eeb4aa78f1c3616")
    with pytest.raises(ConfigError, match="21k"): guard_benchmark(e, "NHANES 2013-2014")
    e.provenance["sha256"] = "0" * 64
    with pytest.raises(ConfigError, match="nobody knows"): guard_benchmark(e, "NHANES 2013-2014")
    served = label_curve({"PAT": finetuning(e, QUICK, benchmark=False)}, pool, test, tmp_path, sizes=(None,), seeds=(0,))
    assert served.auc.notna().all()
    own = encoder(); own.recipe = dict(pretrained_on=["NHANES 2013-2014"])
    with pytest.raises(ConfigError, match="don't call it a benchmark"): guard_benchmark(own, "NHANES 2013-2014")


def test_a_row_says_all_that_its_figure_depends_on(tmp_path):
    learners = {"probe": finetuning(encoder(), replace(QUICK, mode="frozen"), dict(kind="made up"))}
    rows = label_curve(learners, TRAIN, TEST, tmp_path, sizes=(12, None), seeds=(0, 1))
    assert set(rows.n) == {12, 24} and set(rows.seed) == {0, 1} and rows.model.nunique() == 4
    for column in ("encoder", "scaler", "split", "test", "model", "seed", "encoder_parameters", "head_parameters", "trained_parameters", "n_train", "positive_val", "low", "high", "pretrained_on"): assert rows[column].notna().all()
    with pytest.raises(ConfigError, match="other settings"): label_curve({"probe": finetuning(encoder(), replace(QUICK, mode="frozen", hidden=7))}, TRAIN, TEST, tmp_path, sizes=(12,), seeds=(0,))
    drawn = label_curve({"probe": finetuning(encoder(), replace(QUICK, mode="frozen", upstream=True))}, TRAIN, TEST, tmp_path / "up", replace(QUICK, upstream=True), sizes=(12,), seeds=(0,))
    assert drawn.n_train[0] + drawn.n_val[0] == 12 and drawn.upstream.all()


def weeks(n, seed, prefix=""):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    values = (np.cos(2 * np.pi * (np.arange(10_080) - 300 * labels[:, None]) / 1440) + rng.normal(size=(n, 10_080))).astype("float32")
    return Examples(values, labels, [f"{prefix}w{i}" for i in range(n)], [f"{prefix}p{i}" for i in range(n)])


def test_baselines_in_the_same_table(tmp_path):
    config = replace(QUICK, epochs=2, learning_rate=1e-3)
    learners = {"cnn1d": from_scratch("cnn1d", config), "wavelet": wavelets(), "mean": estimator(lambda seed: wavelets_free(), lambda e: e.values[:, :60].mean(1, keepdims=True), "mean")}
    rows = label_curve(learners, weeks(20, 0), weeks(20, 1, "t"), tmp_path, sizes=(None,), seeds=(0,)).set_index("learner")
    assert rows.trained_parameters["cnn1d"] == 10_561 and rows.auc["wavelet"] > .9 and rows.split.nunique() == 1
    again = label_curve(learners, weeks(20, 0), weeks(20, 1, "t"), tmp_path, sizes=(None,), seeds=(0,)).set_index("learner")
    assert again.auc.equals(rows.auc)


def wavelets_free():
    from sklearn.linear_model import LogisticRegression
    return LogisticRegression()


# --- the published architecture, end to end

def test_pat_is_pretrained_fine_tuned_and_comes_back(tmp_path):
    x, v = weeks(4, 0), weeks(4, 1, "v")
    gone = np.zeros(x.values.shape, bool); gone[0, :1440] = True
    e = pretrain_weeks(PAT.S, (x.values, gone), (v.values, None), tmp_path / "pre", WeeksConfig.pat("S", epochs=1, batch_size=2), ["NHANES 2003-2004"])
    assert n_parameters(e) == 274_720 and n_parameters(MaskedAutoencoder.from_pretrained(tmp_path / "pre/autoencoder")) == 549_458
    model = finetune(e, replace(x, pad=gone), v, tmp_path / "tuned", FinetuneConfig.pat("S", epochs=1))
    assert (model.provenance["encoder_parameters"], model.provenance["head_parameters"], model.provenance["trained_parameters"]) == (274_720, 12_545, 287_265)
    again = load_task(tmp_path / "tuned/model")
    np.testing.assert_array_equal(again.predict(v), model.predict(v))
    assert again.encoder.recipe["pretrained_on"] == ["NHANES 2003-2004"]
    step = 1e-5 # one step of Adam moves a weight by at most its rate
    assert max((a - b).abs().max().item() for a, b in zip(model.encoder.parameters(), e.parameters(), strict=True)) <= 1.01 * step


def test_masks_of_a_batch(tmp_path):
    "Corrected: everybody has another mask; published: one for all. The masked error sees exactly the hidden patches."
    small = PatchConfig(("Activity",), 1 / 60, 30, d_model=8, n_layers=1, n_heads=2, d_ff=16, embedding="shared", position="sine", instance_norm=False, pre_norm=False, final_norm=False)
    with seeded(0): model = MaskedAutoencoder(small).eval()
    x = torch.randn(3, 600)
    for upstream, n_masks in ((False, 3), (True, 1)):
        orders = []
        forward = model.forward
        model.forward = lambda x, pad, order, k, f=forward, o=orders: (o.append((order, k)), f(x, pad, order, k))[1]
        masked_loss(model, x, None, WeeksConfig(upstream=upstream), torch.Generator().manual_seed(0))
        del model.forward
        order, k = orders[0]
        assert k == 18 and len({tuple(r.tolist()) for r in order.expand(3, -1)}) == n_masks


def test_interrupted_pretraining_goes_on_to_the_same_curve(tmp_path, monkeypatch):
    small = PatchConfig(("Activity",), 1 / 60, 30, d_model=8, n_layers=1, n_heads=2, d_ff=16, embedding="shared", position="sine", instance_norm=False, pre_norm=False, final_norm=False, dropout=.1)
    data, config = [(people(n, n).values, None) for n in (20, 8)], WeeksConfig(learning_rate=1e-2, batch_size=8, epochs=9, plateau=2, lowest_rate=1e-3, patience=9)
    whole = pretrain_weeks(small, *data, tmp_path / "whole", config)
    epoch, calls = ft._epoch, []
    def until(*args):
        if len(calls) == 4: raise KeyboardInterrupt
        calls.append(1)
        return epoch(*args)
    monkeypatch.setattr(ft, "_SAVE_SECONDS", -1)
    monkeypatch.setattr(ft, "_epoch", until)
    with pytest.raises(KeyboardInterrupt): pretrain_weeks(small, *data, tmp_path / "cut", config)
    monkeypatch.setattr(ft, "_epoch", epoch)
    assert weights_hash(pretrain_weeks(small, *data, tmp_path / "cut", config)) == weights_hash(whole)
    assert (Path(tmp_path) / "cut/history.csv").read_text() == (Path(tmp_path) / "whole/history.csv").read_text()


def test_rest_names_what_is_trained():
    model = TaskModel(encoder(), TaskHead(TaskHeadConfig(8)))
    for mode, n in (("full", n_parameters(model)), ("frozen", n_parameters(model.head))):
        # the scale of attention is stored as a parameter and never trained
        trained = sum(p.numel() for p in rest(model, mode).parameters() if p.requires_grad)
        assert n - 2 <= trained <= n, mode
