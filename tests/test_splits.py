"""Splits: nobody on two sides, the same on every machine, and a file that can't be changed unnoticed."""
import errno
import itertools
import json
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pftsleep.data.splits import Split, block_folds, fold_counts, make_folds, make_split
from pftsleep.errors import SplitError

REALDATA = Path(__file__).parents[2] / "shared" / "realdata"
real = pytest.mark.skipif(not REALDATA.exists(), reason="../shared/realdata is not here")
THREE = {"train": .7, "val": .15, "test": .15}


def table(sizes):
    return pd.DataFrame([dict(id=f"p{s}-n{v}", subject=f"p{s}") for s, n in enumerate(sizes) for v in range(n)])


def sizes_of(split):
    return {name: len(ids) for name, ids in split.parts.items()}


nights = st.lists(st.integers(1, 5), min_size=3, max_size=30)
shares = st.sampled_from([THREE, {"train": .5, "test": .5}, {"train": .8, "val": .2, "test": 0}, {"a": .97, "b": .02, "c": .01}, {"only": 1}])


@given(nights, shares, st.integers(0, 2**32), st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_whole_subjects_whatever_the_order_of_the_rows(sizes, fractions, seed, random):
    m = table(sizes)
    split = make_split(m, fractions, seed)
    assert sorted(i for ids in split.parts.values() for i in ids) == sorted(m.id)
    subject = dict(zip(m.id, m.subject, strict=True))
    sides = [{subject[i] for i in ids} for ids in split.parts.values()]
    assert sum(map(len, sides)) == len(sizes) and len(set().union(*sides)) == len(sizes)
    for name, f in fractions.items(): assert bool(split.parts[name]) == (f > 0)
    rows = list(range(len(m))); random.shuffle(rows)
    again = make_split(m.iloc[rows], dict(reversed(fractions.items())), seed)
    assert again == split and again.hash == split.hash
    split.check(m)


@given(nights, shares, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_no_move_and_no_exchange_would_bring_it_nearer(sizes, fractions, seed):
    split = make_split(table(sizes), fractions, seed)
    names = [n for n, f in fractions.items() if f > 0]
    people = {n: Counter(split.subjects[i] for i in split.parts[n]) for n in names}
    off = {n: sum(people[n].values()) - fractions[n] * sum(sizes) for n in names}
    for a, b in itertools.permutations(names, 2):
        gives = sorted(set(people[a].values()))
        for s, t in itertools.product(gives, [*set(people[b].values()), *([0] if len(people[a]) > 1 else [])]):
            now, then = off[a]**2 + off[b]**2, (off[a] - s + t)**2 + (off[b] + s - t)**2
            assert then >= now - 1e-6, (a, b, s, t)


def test_how_near_to_the_best_possible():
    "Against all assignments of small studies: the best in nearly every case, never more than two recordings worse in sum."
    rng, best_found, worst = np.random.default_rng(0), 0, 0.
    for trial in range(60):
        sizes = rng.integers(1, 5, rng.integers(4, 8)).tolist()
        goal = np.array([THREE[n] * sum(sizes) for n in sorted(THREE)])
        distance = lambda counts, goal=goal: np.abs(np.array(counts) - goal).sum()
        possible = [[sum(s for s, p in zip(sizes, where, strict=True) if p == q) for q in range(3)] for where in itertools.product(range(3), repeat=len(sizes)) if len(set(where)) == 3]
        ours = sizes_of(make_split(table(sizes), THREE, trial))
        gap = distance([ours[n] for n in sorted(THREE)]) - min(map(distance, possible))
        best_found += gap < 1e-9; worst = max(worst, gap)
    assert best_found >= 54 and worst <= 2 + 1e-9, (best_found, worst)


def test_the_same_split_as_ever():
    "Literals: a split that changes with a version of numpy, or of ours, would silently mix up what was held out."
    assert make_split(table([1, 2, 1, 3, 1, 1, 2, 1, 1, 2]), THREE, 5).hash == "499c53436769edd3"
    assert {n: len(p) for n, p in make_split(table([1] * 100)).parts.items()} == {"train": 70, "val": 15, "test": 15}


def test_seeds_differ():
    m = table([1] * 40)
    assert len({make_split(m, THREE, seed).parts["test"] for seed in range(20)}) == 20


def test_every_subject_has_its_chance_to_be_tested():
    tested = Counter(s for seed in range(300) for i in make_split(table([1, 1, 2, 2, 3, 3, 4, 4]), {"train": .75, "test": .25}, seed).parts["test"] for s in [i.split("-")[0]])
    assert set(tested) == {f"p{i}" for i in range(8)}


@pytest.mark.parametrize("fractions", [{"a": .5, "b": .6}, {"a": -.1, "b": 1.1}, {"a": float("nan"), "b": 1}, {}])
def test_impossible_fractions(fractions):
    with pytest.raises(SplitError, match="sum to 1"): make_split(table([1] * 9), fractions)


def test_too_few_subjects():
    with pytest.raises(SplitError, match="2 subjects can't fill 3 parts"): make_split(table([9, 9]), THREE)
    with pytest.raises(SplitError): make_split(table([]).reindex(columns=["id", "subject"]), THREE)


def test_manifests_that_cant_be_used():
    m = table([1, 2, 3])
    for broken, says in [(m.drop(columns="subject"), "no column subject"), (m.assign(subject=None), "without id or subject"), (pd.concat([m, m[2:3]]), "p1-n1 twice")]:
        with pytest.raises(SplitError, match=says): make_split(broken)
        with pytest.raises(SplitError, match=says): make_split(m, {"train": .5, "test": .5}).check(broken)


def test_numbers_as_subjects():
    m = pd.DataFrame(dict(id=[1, 2, 3, 4], subject=[7, 7, 8, 9]))
    split = make_split(m, {"train": .5, "test": .5})
    assert split.subjects == {"1": "7", "2": "7", "3": "8", "4": "9"}
    split.check(m)


@given(nights, st.integers(2, 6), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_folds(sizes, k, seed):
    m = table(sizes)
    if len(sizes) < k:
        with pytest.raises(SplitError): make_folds(m, k, seed)
        return
    folds = make_folds(m, k, seed)
    assert sorted(i for f in folds for i in f.parts["test"]) == sorted(m.id) and len(folds) == k
    for f in folds: assert sorted(f.parts["train"] + f.parts["test"]) == sorted(m.id); f.check(m)


# the file

@pytest.fixture
def split(): return make_split(table([1, 2, 1, 3, 1, 1, 2, 1, 1, 2]), THREE, 5)


def test_there_and_back(split, tmp_path):
    split.save(tmp_path / "s.json")
    assert Split.load(tmp_path / "s.json") == split == pickle.loads(pickle.dumps(split))
    assert Split.load(str(tmp_path / "s.json")).hash == split.hash and hash(split) == hash(pickle.loads(pickle.dumps(split)))
    assert list(tmp_path.iterdir()) == [tmp_path / "s.json"]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_no_change_goes_unnoticed(tmp_path_factory, data):
    split = make_split(table([1, 2, 1, 3]), THREE, 5)
    path = tmp_path_factory.mktemp("split") / "s.json"
    split.save(path); text = path.read_text()
    at = data.draw(st.integers(0, len(text) - 1)); new = data.draw(st.sampled_from('019abc"{}[],: \n-.'))
    path.write_text(text[:at] + new + text[at + 1:])
    try: assert Split.load(path) == split # white space, or the same character
    except SplitError as e: assert str(path) in str(e)


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"3", b"{}", b'{"parts": 3}', b"\xff\xfe\x00", b"[" * 100_000, b'{"format": "pftsleep-split/1", "hash": "", "parts": {"a": 3}, "subjects": {}, "seed": 0, "fractions": {}}'])
def test_files_that_are_no_splits(tmp_path, content):
    (tmp_path / "s.json").write_bytes(content)
    with pytest.raises(SplitError, match=r"s\.json"): Split.load(tmp_path / "s.json")


def test_missing_files_and_folders(split, tmp_path):
    with pytest.raises(SplitError, match="can't be read"): Split.load(tmp_path / "none.json")
    with pytest.raises(SplitError, match="can't be read"): Split.load(tmp_path)
    (tmp_path / "file").write_text("x")
    for path in [tmp_path / "none" / "s.json", tmp_path / "file" / "s.json"]:
        with pytest.raises(SplitError, match="can't be written"): split.save(path)


def test_a_full_disk_leaves_the_old_file(split, tmp_path, monkeypatch):
    path = tmp_path / "s.json"; split.save(path); before = path.read_bytes()
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SplitError, match="No space left"): make_split(table([1] * 9), THREE).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_edited_file_that_leaks(split, tmp_path):
    split.save(tmp_path / "s.json"); d = json.loads((tmp_path / "s.json").read_text())
    d["parts"]["train"].append(d["parts"]["test"].pop()); (tmp_path / "s.json").write_text(json.dumps(d))
    with pytest.raises(SplitError): Split.load(tmp_path / "s.json")


def test_leaks_and_repetitions_by_hand():
    for parts, subjects in [({"a": ["1"], "b": ["1"]}, {"1": "x"}), ({"a": ["1", "1"], "b": ["2"]}, {"1": "x", "2": "y"}), ({"a": ["1"], "b": ["2"]}, {"1": "x", "2": "x"}),
        ({"a": ["1"]}, {}), ({"a": []}, {"1": "x"})]:
        with pytest.raises(SplitError): Split(parts, subjects)


def test_check_against_a_later_manifest(split):
    m = table([1, 2, 1, 3, 1, 1, 2, 1, 1, 2])
    split.check(m); split.check(pd.concat([m, pd.DataFrame([dict(id="new", subject="p99")])]))
    with pytest.raises(SplitError, match="doesn't know"): split.check(m[1:])
    one, other = (split.subjects[split.parts[p][0]] for p in ("train", "test"))
    with pytest.raises(SplitError, match="stands in test and train"): split.check(m.assign(subject=m.subject.replace(one, other)))
    renamed = m.assign(subject="x" + m.subject)
    split.check(renamed) # new names for the same people leak nothing


# one night

hypnograms = st.lists(st.tuples(st.integers(-1, 4), st.integers(1, 20)), min_size=3, max_size=25).map(lambda runs: np.repeat(*np.array(runs).T))


@given(hypnograms, st.integers(2, 5), st.integers(1, 12), st.integers(0, 3), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_blocks(stages, k, length, gap, seed):
    try: folds = block_folds(stages, k, length, gap, seed)
    except SplitError as e: assert "can't fill" in e.problem or "without training" in e.problem; return
    scored = np.flatnonzero(stages >= 0)
    np.testing.assert_array_equal(np.sort(np.concatenate([test for _, test in folds])), scored) # every scored epoch is tested once
    for train, test in folds:
        assert len(train) and len(test)
        distance = np.abs(np.subtract.outer(scored, test)).min(1)
        np.testing.assert_array_equal(train, scored[distance > gap]) # nothing within the gap, and nothing else is lost
    again = block_folds(list(stages), k, length, gap, seed)
    assert all(np.array_equal(x, y) for a, b in zip(folds, again, strict=True) for x, y in zip(a, b, strict=True))


@given(hypnograms, st.integers(2, 4), st.integers(2, 12), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_blocks_are_contiguous(stages, k, length, seed):
    try: folds = block_folds(stages, k, length, 0, seed)
    except SplitError: assume(False)
    fold_of = np.full(len(stages), -1)
    for f, (_, test) in enumerate(folds): fold_of[test] = f
    for start in range(0, max(len(stages) - length // 2, 1), length):
        block = fold_of[start:start + length] if start + length + length // 2 < len(stages) else fold_of[start:]
        assert len(set(block[block >= 0])) <= 1


def test_a_stage_in_enough_blocks_is_in_every_fold():
    rng = np.random.default_rng(0)
    for seed in range(30):
        stages = np.full(200, 2); stages[[5, 45, 85, 125, 165]] = 1; stages[rng.choice(np.arange(0, 200, 10), 8, replace=False) + 1] = 4
        counts = fold_counts(stages, block_folds(stages, 5, 10, 1, seed)).xs("test", level="set")
        assert (counts["N1"] == 1).all() and (counts["REM"] >= 1).all() and np.ptp(counts["N2"]) <= 12


@real
def test_the_eighty_four_minutes():
    runs = pd.read_csv(REALDATA / "eeg_segments" / "pydynamo_segment_stages.csv").to_numpy()
    code = {0: -1, 1: 3, 2: 2, 3: 1, 4: 4, 5: 0, 6: -1}
    starts = np.arange(40.01, 5026 - 30, 30)
    stages = np.array([code[int(runs[np.searchsorted(runs[:, 0], t + 1e-6, "right") - 1, 1])] for t in starts])
    folds = block_folds(stages, 4, 6)
    counts = fold_counts(stages, folds)
    print(counts)
    tested = counts.xs("test", level="set")
    assert tested.sum().tolist() == [(stages == s).sum() for s in range(5)] and 0 < tested["W"].sum() <= 3 and 5 <= tested["N1"].sum() <= 9
    assert (tested[["N2", "N3", "REM"]] > 0).all(axis=None) and all(np.abs(train[:, None] - test).min() > 1 for train, test in folds)
