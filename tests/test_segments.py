"""Segments of bouts: sampling, units, padding, splits, exports, and a test for each item of shared/reference/aar.md, section 8, that concerns data."""
import pickle
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pftsleep.data import segments as module
from pftsleep.data.animal_studies import convert_rabc, convert_study, simulate_animals
from pftsleep.data.bouts import dataset_to_hdf5
from pftsleep.data.segments import SegmentRule, deal, find_sources, folds, labelled_segments, open_arrays, prepare_finetuning, prepare_pretraining, pretraining_segments, quotas
from pftsleep.data.signals import resample
from pftsleep.errors import ConfigError, PFTSleepError, ReadError, SplitError, StoreError

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def wave(seconds: float, fs: float, step: float = 1.3) -> np.ndarray: # [n, 3], in g
    t = np.arange(round(seconds * fs)) / fs
    return np.stack([.3 * np.sin(2 * np.pi * step * t), .2 * np.cos(2 * np.pi * step * t), np.ones_like(t)], 1)


def make(folder: Path, species: str, subjects: int, seconds=(40.,), fs=25., unit="g", label=("walk", "stand"), **kwargs) -> None:
    for i in range(1, subjects + 1):
        for k, s in enumerate(seconds):
            x = wave(s, fs, 1 + i / 10)
            words = np.resize(np.repeat(label, round(12 * fs)), len(x))
            dataset_to_hdf5(folder, i, k, dict(acc=x * dict(g=1, mg=1000).get(unit, 9.80665), label=words), fs, "neck", species, dict(acc=unit), **kwargs)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "Six horses with two recordings each at 25 Hz, in m/s2; five cows at 100 Hz, in g."
    root = tmp_path_factory.mktemp("bouts")
    make(root / "horses", "horse", 6, (40., 70.), 25., "m/s2")
    make(root / "cows", "cow", 5, (60.,), 100., "g")
    return root


# --- drawing

@pytest.mark.parametrize("compression", [None, "lzf", "gzip"])
@pytest.mark.parametrize("fs", [100, 25, 10.54, 200])
def test_a_draw_is_what_stands_in_the_file(tmp_path, compression, fs):
    make(tmp_path / "d", "cow", 1, (61,), fs, compression=compression)
    s, _ = labelled_segments(tmp_path / "d", SegmentRule(5., 500))
    b = s.draw(np.arange(len(s))[::-1])
    x = wave(61, fs, 1.1).astype("float64")
    for i, k in enumerate(range(len(s))[::-1]):
        a = int(s.start[k])
        if fs == 10.54 and not 30 < a < len(x) - 90: continue # soxr takes the ends of the file for silence
        want = np.stack([resample(x[:, c], fs, 100., -a, (0, 500)) for c in range(3)]) if fs != 100 else x[a:a + 500].T
        np.testing.assert_allclose(b.values[i], want, atol=.01 if fs != 100 else 1e-6)
    assert not b.pad.any() and b.label.tolist() == s.label[::-1].tolist()


def test_layouts_of_files_give_the_same(tmp_path):
    "Contiguous or chunked, float32 or float64, in one piece or as one of six axes."
    x, drawn = wave(30, 50).astype("float32"), []
    for k, (dtype, extra, chunks) in enumerate([("<f4", 0, None), ("<f8", 0, None), (">f8", 0, None), ("<f4", 0, (100, 3)), ("<f8", 3, None), ("<f4", 3, (64, 6))]):
        (tmp_path / str(k)).mkdir()
        with h5py.File(tmp_path / str(k) / "cow_1_ds_0.hdf5", "w") as f:
            f.attrs.update(sr=50, loc="neck", species="cow")
            f.create_dataset("acc", data=np.concatenate([x, x[:, :extra] * 2], 1).astype(dtype), chunks=chunks)
        sources = find_sources(tmp_path / str(k), SegmentRule(10, 500))[0]
        assert len(sources) == 1 + (extra == 3)
        drawn.append(module.Segments(tuple(sources[:1]), SegmentRule(10, 500), np.zeros(3, "int32"), np.array([0, 7, 1000]), np.full(3, -1)).draw([2, 0, 1]).values)
    for d in drawn[1:]: np.testing.assert_array_equal(d, drawn[0])


def test_gaps_are_padding_at_every_rate(tmp_path):
    x = wave(40, 25)
    x[100:110] = np.nan # .4 s, bridged
    x[500:600] = np.nan # 4 s, which ends the stretch
    dataset_to_hdf5(tmp_path, 1, 0, dict(acc=x, label=["a"] * 1000), 25, "neck", "cow", dict(acc="g"))
    for rate in (25, 50, 100):
        s, why = labelled_segments(tmp_path, SegmentRule(10, 1000, rate))
        b = s.draw(range(len(s)))
        assert len(s) == 3 and why["short"][0] == 0 and np.isfinite(b.values).all()
        length = 10 * rate
        assert b.pad[:, length:].all() and not b.pad[1:, :length].any()
        assert abs(b.pad[0, :length].sum() / rate - .4) < .05 and not b.values[:, :, length:].any() and not b.values[0][:, b.pad[0]].any()


def test_nothing_rings_beside_a_gap(tmp_path):
    x = np.tile([0., 0., 1.], (1000, 1))
    x[400:405] = np.nan
    dataset_to_hdf5(tmp_path, 1, 0, dict(acc=x, label=["a"] * 1000), 25, "neck", "cow", dict(acc="g"))
    b = labelled_segments(tmp_path)[0].draw(range(4))
    np.testing.assert_allclose(b.values[:, 2][~b.pad], 1, atol=1e-5)


def test_segments_travel_to_other_processes(root):
    p = pretraining_segments(root, ["horses", "cows"])
    here = p.train.draw(range(20)) # files are open here when the others begin
    for how in ("fork", "spawn"):
        with ProcessPoolExecutor(2, get_context(how)) as pool:
            for b in pool.map(p.train.draw, [range(20)] * 3): np.testing.assert_array_equal(b.values, here.values)
    assert len(pickle.dumps(p.train)) < 60 * len(p.train) + 30_000


def test_a_file_that_changes_or_goes_is_an_error(tmp_path):
    make(tmp_path, "cow", 2, (30.,))
    s, _ = labelled_segments(tmp_path)
    (tmp_path / "cow_1_ds_0.hdf5").unlink()
    make(tmp_path, "cow", 1, (35.,))
    module._open.files.clear()
    with pytest.raises(ReadError, match="has changed"): s.draw([0])
    (tmp_path / "cow_1_ds_0.hdf5").unlink()
    with pytest.raises(ReadError, match="can't be opened"): s.draw([0])
    assert len(s.draw([len(s) - 1])) == 1


# --- section 8, item by item

def test_1_no_nan_no_unknown_and_labels_of_two_dimensions(tmp_path):
    simulate_animals("calf", tmp_path / "csv", 4, 30)
    convert_study("calf", tmp_path / "csv", tmp_path / "calf")
    for p in (tmp_path / "calf").iterdir():
        with h5py.File(p, "a") as f: # as the original has it
            words = f["label"][()].astype(object)[:, None]
            words[:60] = b"unknown"
            del f["label"]
            f.create_dataset("label", data=words, dtype=h5py.string_dtype())
    s, _, why = prepare_finetuning(str(tmp_path), str(tmp_path / "out"), "calf", segment_duration=2., n_folds=4, rate=25.)
    assert "unknown" not in s.names and why["unlabelled"][0] > 0
    for f in range(4):
        a = open_arrays(tmp_path / f"out/calf/fold_{f}", "val", s.names)
        b = a.draw(np.arange(len(a)))
        assert np.isfinite(b.values).all() and (b.label >= 0).all() and b.pad[:, 50:].all() and not b.pad[:, :50].all()


def test_3_one_rate_and_one_unit(root):
    p = pretraining_segments(root, ["horses", "cows"])
    for b in p.train.batches(100):
        np.testing.assert_allclose(b.values[:, 2], 1, atol=1e-4) # gravity in g, from m/s2 and g alike
        assert not b.pad.any() # 25 Hz fill the window too
    freq = lambda v: np.fft.rfftfreq(1000, .01)[np.abs(np.fft.rfft(v)).argmax()]
    horse = next(i for i, s in enumerate(p.train.subjects) if s.startswith("horse"))
    assert abs(freq(p.train.draw([horse]).values[0, 0]) - (1 + int(p.train.subjects[horse][-1]) / 10)) < .11


def test_3_a_file_without_unit_is_measured_or_refused(tmp_path):
    for name, scale in (("g", 1), ("ms", 9.8), ("odd", 3)):
        (tmp_path / name).mkdir()
        with h5py.File(tmp_path / name / "cow_1_ds_0.hdf5", "w") as f:
            f.attrs.update(sr=25, loc="neck", species="cow")
            f["acc"] = wave(30, 25) * scale
    assert find_sources(tmp_path / "g", SegmentRule())[1] and abs(find_sources(tmp_path / "ms", SegmentRule())[0][0].factor * 9.80665 - 1) < 1e-9
    with pytest.raises(ConfigError, match="shows no gravity"): find_sources(tmp_path / "odd", SegmentRule())
    assert find_sources(tmp_path / "odd", SegmentRule(unit="keep"))[0][0].factor == 1


def test_4_everything_is_seeded_and_no_listing_order_counts(root, monkeypatch):
    make_them = lambda seed: pretraining_segments(root, ["horses", "cows"], random_seed=seed)
    a = make_them(3)
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(listed(self), reverse=True)))
    b, c = make_them(3), make_them(4)
    for part in ("train", "val"):
        x, y, z = (p.segments(part) for p in (a, b, c))
        np.testing.assert_array_equal(x.start, y.start)
        np.testing.assert_array_equal(x.recordings, y.recordings)
        assert len(x) != len(z) or (x.start != z.start).any()
    assert (a.segments("val", 1).start != a.val.start).any()
    f, g = (folds(labelled_segments(root / "horses")[0], 3, 5) for _ in range(2))
    assert all((x.train == y.train).all() and (x.val == y.val).all() for x, y in zip(f, g, strict=True))


def test_5_quotas(root):
    p = pretraining_segments(root, ["horses", "cows"], train_ratio=.5, max_dataset_imbalance=1.2, oversampling_factor=2)
    t = p.report.set_index(["part", "dataset"])
    assert t.loc[("train", "horses"), "usable_s"] == 330 and t.loc[("train", "cows"), "usable_s"] == 120
    assert t["segments"].to_dict() == {("train", "horses"): 28, ("train", "cows"): 24, ("val", "horses"): 21, ("val", "cows"): 18} # 1.2 x 240 s; 1.2 x 180 s, not oversampled
    names = p.train.recordings
    short, long = (np.mean([(names == n).sum() for n in set(names) if n.startswith("horse") and f"ds_{k}" in n]) for k in (0, 1))
    assert long > 1.4 * short # 70 s and 40 s


def test_5_the_last_start_and_the_exact_length(tmp_path):
    make(tmp_path / "d", "cow", 2, (10.,), 25.) # exactly one window
    p = pretraining_segments(tmp_path, ["d"], oversampling_factor=4)
    assert len(p.train) == 4 and not p.train.start.any()
    make(tmp_path / "e", "cow", 2, (10.12,), 25.) # four possible starts
    assert set(pretraining_segments(tmp_path, ["e"], oversampling_factor=60).train.start) == {0, 1, 2, 3}


def test_5_what_is_too_short_gives_its_quota_to_others(tmp_path):
    make(tmp_path / "d", "cow", 2, (4., 40.), 25.)
    p = pretraining_segments(tmp_path, ["d"], oversampling_factor=2)
    assert len(p.train) == 8 and p.report["recorded_s"].tolist() == [44., 44.] and p.report["usable_s"].tolist() == [40., 40.]
    with_short = pretraining_segments(tmp_path, ["d"], SegmentRule(shortest=3), oversampling_factor=2)
    assert any("ds_0" in r for r in with_short.train.recordings)
    b = with_short.train.draw([i for i, r in enumerate(with_short.train.recordings) if "ds_0" in r][:1])
    assert b.pad[0].tolist() == [False] * 400 + [True] * 600


def test_6_sensors_are_samples_of_their_own(tmp_path):
    for name in ("kamminga_goats", "waves_equine_activities", "calf"):
        simulate_animals(name, tmp_path / "csv" / name, 2, 15)
        convert_study(name, tmp_path / "csv" / name, tmp_path / name)
    p = pretraining_segments(tmp_path, ["kamminga_goats", "waves_equine_activities", "calf"], SegmentRule(5, 500))
    assert {s.key for s in p.sources} == {"acc", "acc_0", "acc_1", "acc_l", "acc_r"} # no high-range ones, no gyroscopes
    assert next(p.train.batches(30)).values.shape == (30, 3, 500)
    assert {s.key for s in find_sources(tmp_path / "kamminga_goats", SegmentRule(sensors=("acc_high", "gyr")))[0]} == {"acc_high_0", "acc_high_1", "gyr_0", "gyr_1"}
    dataset_to_hdf5(tmp_path / "two", 1, 0, dict(acc=np.ones((100, 2))), 25, "neck", "cow", dict(acc="g"))
    with pytest.raises(ConfigError, match="2 axes"): find_sources(tmp_path / "two", SegmentRule())


def test_7_nothing_is_held(root, tmp_path):
    "An index, whatever the cohort's size; arrays are float32 and written in batches."
    p = pretraining_segments(root, ["horses", "cows"], oversampling_factor=50)
    held = p.train.source.nbytes + p.train.start.nbytes + p.train.label.nbytes
    assert held == 14 * len(p.train) # bytes per segment; 24000 in the original
    prepare_pretraining(str(root), str(tmp_path), ["cows"], oversampling_factor=.5)
    x = np.load(tmp_path / "X_train.npy", mmap_mode="r")
    assert x.dtype == "float32" and x.shape[1:] == (1000, 3)


def test_8_nothing_is_swallowed(root, tmp_path):
    make(tmp_path / "d", "cow", 2)
    (tmp_path / "d/cow_9_ds_0.hdf5").write_bytes(b"not HDF5")
    with pytest.raises(ReadError, match="cow_9"): pretraining_segments(tmp_path, ["d"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReadError, match="no file like"): pretraining_segments(tmp_path, ["empty"])
    with pytest.raises(ConfigError, match="nothing to learn from"): pretraining_segments(root, ["cows"], SegmentRule(100))
    with pytest.raises(ConfigError, match="no window"): labelled_segments(root / "cows", SegmentRule(30))
    with pytest.raises(SplitError, match="7 folds of 6 animals"): folds(labelled_segments(root / "horses")[0], 7)
    with pytest.raises(ConfigError, match="each data set once"): pretraining_segments(root, ["cows", "cows"])
    p = pretraining_segments(root, ["horses", "cows"], SegmentRule(65, 1000, 15))
    assert "cows, train: no stretch of 65 s" in " ".join(p.notes)


def test_12_arrays_need_no_pickle(root, tmp_path):
    prepare_finetuning(str(root), str(tmp_path), "horses", n_folds=2)
    for p in (tmp_path / "horses").rglob("*.npy"): np.load(p, allow_pickle=False)
    assert sorted(p.name for p in (tmp_path / "horses").iterdir()) == ["fold_0", "fold_1", "preparation.json"]
    with pytest.raises(StoreError, match="of another preparation"): labels = prepare_finetuning(str(root), str(tmp_path), "horses", n_folds=3) and prepare_finetuning(str(root), str(tmp_path), "horses", n_folds=2) # noqa: F841
    assert not list(tmp_path.rglob("*.part"))


# --- properties

@given(total=st.integers(0, 10_000), weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_a_deal_is_exact_and_fair(total, weights):
    out = deal(total, weights)
    if sum(weights) == 0: assert not out.any(); return
    assert out.sum() == total and (abs(out - total * np.array(weights) / sum(weights)) < 1 + 1e-6).all()


@given(hours=st.dictionaries(st.sampled_from("abcd"), st.floats(1, 1000), min_size=1), over=st.floats(.1, 10), imbalance=st.floats(1, 10))
def test_quotas_keep_the_imbalance(hours, over, imbalance):
    q = quotas(hours, over, imbalance)
    assert max(q.values()) <= min(q.values()) * imbalance * (1 + 1e-9) and all(q[k] <= hours[k] * over * (1 + 1e-9) for k in q)


@given(gaps=st.lists(st.integers(0, 400), max_size=8, unique=True), seconds=st.sampled_from([1., 2.5, 4.]), rate=st.sampled_from([25., 40., 100.]), seed=st.integers(0, 99))
def test_a_random_segment_lies_within_its_stretch(tmp_path_factory, gaps, seconds, rate, seed):
    edges = sorted(gaps)[:len(gaps) // 2 * 2]
    x = wave(16, 25)
    for a, b in zip(edges[::2], edges[1::2], strict=True): x[a:b] = np.nan
    folder = tmp_path_factory.getbasetemp() / "stretches"
    dataset_to_hdf5(folder / "d", 1, 0, dict(acc=x), 25, "neck", "cow", dict(acc="g"))
    module._open.files.clear()
    try: s = pretraining_segments(folder, ["d"], SegmentRule(seconds, 400, rate, bridge=0), train_ratio=1., random_seed=seed).train
    except PFTSleepError as e: assert "nothing to learn" in str(e); return
    b = s.draw(range(len(s)))
    assert not b.pad[:, :round(seconds * rate)].any() and np.isfinite(b.values).all()
    assert abs(b.values[:, 2, :round(seconds * rate)] - 1).max() < .02


# --- real storks, and the scripts

def test_storks_are_split_by_bout_and_say_so(tmp_path):
    if not (path := SHARED / "realdata/accelerometer_animal/whitestork_acc.rda").exists(): pytest.skip("no ../shared/realdata")
    pytest.importorskip("rdata", reason="the extra wear isn't installed")
    convert_rabc(path, tmp_path / "storks")
    s, why = labelled_segments(tmp_path / "storks", SegmentRule(40 / 10.54, 40))
    assert s.counts() == dict(A_FLIGHT=77, P_FLIGHT=96, SITTING=273, STND=863, WALK=437) and why["kept"][0] == 1746
    assert "same animal may stand on both sides" in s.notes[0]
    parts = folds(s)
    assert sum(len(f.val) for f in parts) == 1746 and all(18 <= (s.label[f.val] == 0).sum() <= 21 for f in parts) # balanced in the rarest class
    b = s.draw(range(1746))
    assert not b.pad.any() and abs(np.median(np.linalg.norm(b.values.mean(2), axis=1)) - 9.8934 / 9.80665) < 1e-3


SEED = dict(data_preparation_pretraining=dict(data_root=None, output_folder=None, datasets=None, train_ratio=.5, max_dataset_imbalance=4., oversampling_factor=5., segment_duration=10., max_window_length=1000, random_seed=578),
    data_preparation_finetuning=dict(data_root=None, output_folder=None, dataset_name=None, segment_duration=10., max_window_length=1000, n_folds=4, random_seed=578))


def script(name: str, *arguments) -> str:
    done = subprocess.run([sys.executable, ROOT / f"jobs/animals/{name}.py", *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", SEED)
def test_every_parameter_of_the_seed(name):
    said, config = script(name, "--help"), yaml.safe_load((ROOT / f"jobs/animals/{name}.yaml").read_text())
    for parameter, default in SEED[name].items():
        assert parameter in config and (default is None or config[parameter] == default)
        assert (m := re.search(rf"\n +--{parameter} .*?(?=\n +--|\Z)", said, re.S)) and (default is None or f"default: {default}" in m[0]), parameter


def test_the_seeds_commands(root, tmp_path):
    said = script("data_preparation_pretraining", "--data_root", root, "--output_folder", tmp_path / "p", "--datasets", "horses", "cows", "--train_ratio", ".50", "--max_dataset_imbalance", 5, "--oversampling_factor", 4, "--segment_duration", 20, "--max_window_length", 2000)
    assert "horses" in said and np.load(tmp_path / "p/X_train.npy", mmap_mode="r").shape == (330 * 4 // 20 + 120 * 4 // 20, 2000, 3)
    said = script("data_preparation_finetuning", "--config", ROOT / "jobs/animals/data_preparation_finetuning.yaml", "--data_root", root, "--output_folder", tmp_path / "f", "--dataset_name", "horses", "--segment_duration", 5, "--max_window_length", 500)
    assert "fold 3" in said and (tmp_path / "f/horses/fold_3/y_val.npy").exists()


def test_a_converter_script(tmp_path):
    simulate_animals("cats", tmp_path / "csv", 2, 9)
    assert "cat_1_ds_2.hdf5" in script("process_cats", "--config", ROOT / "jobs/animals/process_cats.yaml", tmp_path / "csv", tmp_path / "bouts")
