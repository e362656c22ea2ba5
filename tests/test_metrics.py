"Staging metrics against scikit-learn and a naive bootstrap."
from itertools import chain

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from pftsleep.data.recording import SCORED_STAGES, Stage
from pftsleep.errors import ConfigError
from pftsleep.evaluation.metrics import compare_table, confusion_matrix, confusion_metrics, staging_metrics

LABELS = list(range(5))
epoch = st.tuples(st.integers(-1, 4), st.integers(-1, 4))
night = st.lists(epoch, max_size=40).map(lambda pairs: ([t for t, _ in pairs], [p for _, p in pairs]))
nights = st.lists(night, min_size=1, max_size=6)


def cohort(n_subjects, seed=0, nights_each=2, epochs=60):
    rng = np.random.default_rng(seed)
    true = [rng.integers(-1, 5, epochs) for _ in range(n_subjects * nights_each)]
    pred = [np.where(rng.random(epochs) < .7, t, rng.integers(-1, 5, epochs)) for t in true]
    return true, pred, [f"s{i // nights_each}" for i in range(len(true))]


def naive(true, pred):
    "The definitions written out with scikit-learn; NaN where a fraction has no denominator."
    keep = [(t, p) for t, p in zip(true, pred, strict=True) if t != -1]
    t, p = [a for a, _ in keep], [b for _, b in keep]
    if not keep: return {"kappa": np.nan, "accuracy": np.nan, "macro_f1": np.nan}
    one_class = len({*t, *p}) == 1
    f1 = sk.f1_score(t, p, labels=LABELS, average=None, zero_division=0)
    seen = [s in t or s in p for s in LABELS]
    out = {"kappa": np.nan if one_class else sk.cohen_kappa_score(t, p), "accuracy": sk.accuracy_score(t, p), "macro_f1": f1[seen].mean()}
    precision, recall = (f(t, p, labels=LABELS, average=None, zero_division=np.nan) for f in (sk.precision_score, sk.recall_score))
    for s in SCORED_STAGES:
        out |= {f"f1_{s.name}": f1[s] if seen[s] else np.nan, f"precision_{s.name}": precision[s], f"recall_{s.name}": recall[s]}
    return out


@settings(max_examples=80, deadline=None)
@given(night)
def test_one_night_agrees_with_sklearn(pair):
    table = staging_metrics(*pair)
    for name, value in naive(*pair).items():
        np.testing.assert_allclose(table.loc[name, ["pooled", "night_median"]], [value, value], atol=1e-12, err_msg=name)


@settings(max_examples=30, deadline=None)
@given(nights)
def test_nights_pool_and_have_quartiles(pairs):
    true, pred = [t for t, _ in pairs], [p for _, p in pairs]
    table = staging_metrics(true, pred)
    pooled, each = naive(list(chain(*true)), list(chain(*pred))), [naive(t, p) for t, p in pairs if any(e != -1 for e in t)]
    for name, value in pooled.items():
        np.testing.assert_allclose(table.loc[name, "pooled"], value, atol=1e-12, err_msg=name)
        values = [e[name] for e in each if not np.isnan(e[name])]
        quartiles = np.percentile(values, [50, 25, 75]) if values else [np.nan] * 3
        np.testing.assert_allclose(table.loc[name, ["night_median", "night_q25", "night_q75"]], quartiles, atol=1e-12, err_msg=name)
    scored = [(a, b) for t, p in pairs for a, b in zip(t, p, strict=True) if a != -1]
    assert table.pooled.n_epochs == len(scored)
    assert table.pooled.n_abstained == sum(b == -1 for _, b in scored)
    assert table.pooled.n_nights == len(each)


def test_bootstrap_is_the_naive_loop():
    true, pred, subjects = cohort(7)
    table = staging_metrics(true, pred, subjects, n_resamples=40, rng=5)
    nights_of = {s: [i for i, who in enumerate(subjects) if who == s] for s in dict.fromkeys(subjects)}
    results = []
    for drawn in np.random.default_rng(5).integers(7, size=(40, 7)):
        chosen = [i for d in drawn for i in list(nights_of.values())[d]]
        results.append(naive(np.concatenate([true[i] for i in chosen]), np.concatenate([pred[i] for i in chosen])))
    for name, values in pd.DataFrame(results).items():
        np.testing.assert_allclose(table.loc[name, ["ci_low", "ci_high"]], np.nanquantile(values, [.025, .975]), atol=1e-12, err_msg=str(name))
    assert table.attrs == {"interval": "95 % percentile bootstrap over subjects", "n_resamples": 40}


def test_rare_stage_has_an_interval_from_the_draws_that_contain_it():
    true, pred = [[0, 1], [0, 1], [0, 3]], [[0, 1], [1, 1], [0, 3]]
    low, high = staging_metrics(true, pred, "abc").loc["f1_N3", ["ci_low", "ci_high"]]
    assert (low, high) == (1, 1)


def test_flat_equals_lists_when_every_subject_has_one_night():
    true, pred, subjects = cohort(5, nights_each=1)
    lists = staging_metrics(true, pred, subjects)
    order = np.random.default_rng(0).permutation(300) # epochs of one subject needn't stand together
    labels = np.repeat(subjects, 60)
    first = list(dict.fromkeys(labels[order])) # draws refer to subjects in the order of their first appearance
    flat = staging_metrics(np.concatenate(true)[order], np.concatenate(pred)[order], labels[order])
    again = staging_metrics(*zip(*[(true[subjects.index(s)], pred[subjects.index(s)]) for s in first], strict=True), first)
    pd.testing.assert_frame_equal(flat, again)
    pd.testing.assert_frame_equal(flat.iloc[:, :4], lists.iloc[:, :4])


@pytest.mark.parametrize("make", [np.asarray, list, tuple, pd.Series, lambda x: np.asarray(x, float), lambda x: [Stage(s) for s in x]])
def test_any_kind_of_array(make):
    true, pred = [0, 1, 2, 3, 4, -1], [0, 1, 2, 2, 4, 0]
    assert staging_metrics(make(true), make(pred)).pooled.accuracy == .8
    assert staging_metrics([make(true)] * 2, [make(pred)] * 2, ["a", "b"]).pooled.n_nights == 2


def test_abstaining_never_helps():
    true, pred, _ = cohort(1, nights_each=1)
    before = staging_metrics(true, pred).pooled
    wrong = (pred[0] != true[0]) & (true[0] >= 0) & (pred[0] >= 0)
    silent = staging_metrics(true, [np.where(wrong, -1, pred[0])]).pooled
    assert silent.accuracy == before.accuracy
    assert silent.n_abstained == before.n_abstained + wrong.sum()
    right = np.flatnonzero((pred[0] == true[0]) & (true[0] >= 0))[:5]
    shy = pred[0].copy()
    shy[right] = -1
    assert staging_metrics(true, [shy]).pooled.kappa < before.kappa


def test_a_shift_of_one_epoch_is_seen():
    true = np.repeat([0, 1, 2, 3, 4] * 4, 6)
    assert staging_metrics(true, true).pooled.kappa == 1
    assert staging_metrics(true, np.roll(true, 1)).pooled.kappa < .85


def test_kappa_of_one_class():
    assert np.isnan(staging_metrics([2, 2], [2, 2]).pooled.kappa)
    assert staging_metrics([2, 2], [2, 1]).pooled.kappa == 0 # one class in the truth, two in the answer: exactly chance
    assert staging_metrics([2, 2], [1, 1]).pooled.kappa == 0


@pytest.mark.parametrize("subjects", [None, ["a", "a"]])
def test_no_interval_without_people(subjects):
    true, pred, _ = cohort(1)
    table = staging_metrics(true, pred, subjects)
    assert table[["ci_low", "ci_high"]].isna().all(axis=None)
    assert table.attrs["n_resamples"] == 0


def test_subject_without_a_scored_epoch_is_not_a_subject():
    true, pred = [[0, 1], [-1, -1], [2, 3]], [[0, 1], [0, 0], [2, 2]]
    with_ghost, without = staging_metrics(true, pred, "abc"), staging_metrics([true[0], true[2]], [pred[0], pred[2]], "ac")
    pd.testing.assert_frame_equal(with_ghost, without)
    assert with_ghost.pooled.n_subjects == 2


@pytest.mark.parametrize("y", [[], [[]], [[], []], [-1, -1]])
def test_nothing_scored(y):
    table = staging_metrics(y, y)
    assert table.pooled.n_epochs == 0
    assert table.drop(["n_epochs", "n_abstained", "n_nights", "n_subjects"]).isna().all(axis=None)
    assert compare_table({"nothing": table}).eq("n/a").all(axis=None)


@pytest.mark.parametrize(("args", "message"), [
    (([0, 1], [0]), "2 true and 1 predicted"),
    (([[0]], [[0], [1]]), "y_true has 1 nights"),
    (([0, 7], [0, 1]), r"y_true has the stage codes \[7\]"),
    (([0, 1], [0, -2]), r"y_pred has the stage codes \[-2\]"),
    (([0, 1], [0, 1.5]), "1.5"),
    (([0, 1], [0, np.nan]), "nan"),
    (([0, 1], ["W", "N1"]), "W"),
    (([0, 1], np.full((2, 5), .2)), r"0.2.*probabilities"),
    (([0, 1], [0, 1], ["a"]), "1 subjects for 2 epochs"),
    (([[0, 1]], [[0, 1]], ["a", "b"]), "2 subjects for 1 nights"),
    (([0, 1], [0, 1], ["a", np.nan]), "missing"),
])
def test_bad_input_is_named(args, message):
    with pytest.raises(ConfigError, match=message) as caught: staging_metrics(*args)
    assert caught.value.remedy


@settings(max_examples=50, deadline=None)
@given(night)
def test_confusion_matrix_is_sklearns(pair):
    true, pred = pair
    keep = [i for i, t in enumerate(true) if t != -1]
    six = confusion_matrix(true, pred, abstained=True)
    assert six.sum() == len(keep)
    if keep:
        ours = [*LABELS, -1]
        expected = sk.confusion_matrix([true[i] for i in keep], [pred[i] for i in keep], labels=ours)
        np.testing.assert_array_equal(six, expected[:5])
    if six[:, 5].any():
        with pytest.raises(ConfigError, match="unscored"): confusion_matrix(true, pred)
    else: np.testing.assert_array_equal(confusion_matrix(true, pred), six[:, :5])


def test_five_columns_are_enough_without_abstentions():
    m = np.random.default_rng(0).integers(0, 9, (4, 5, 5))
    six = np.concatenate([m, np.zeros((4, 5, 1), int)], -1)
    for name, values in confusion_metrics(m).items(): np.testing.assert_array_equal(values, confusion_metrics(six)[name])


def test_compare_table_says_what_it_knows():
    true, pred, subjects = cohort(6)
    table = compare_table({"a": staging_metrics(true, pred, subjects), "b": staging_metrics(true, pred)}, ["kappa", "f1_N1"])
    assert table.loc["a", "kappa"].startswith(table.loc["b", "kappa"] + " [")
    assert list(table.columns) == ["kappa", "f1_N1"]
