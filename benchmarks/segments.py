"""A batch of 512 segments from files of bouts: time, memory, and the same in the naive form. Prints one JSON line per measurement.

    python benchmarks/segments.py [--cohorts 8 64] [--minutes 20] [--batches 20] [--workers 0 2]

Cohorts are simulated: as many animals at 100 Hz (and, `rate25`, at 25 Hz in m/s2), one recording each of `--minutes`, for a few and for many animals: memory should be the same for both. Each way runs in a process of its own, with one thread.

    plain       files in one piece, as the original writes them
    lzf         compressed chunks, as `dataset_to_hdf5` writes them
    rate25      compressed, and resampled from 25 to 100 Hz and from m/s2 to g
    naive       what the original does beforehand for its arrays, for the same segments: one h5py slice of float64 each, padded with NaN, and then NaN to zero, transposed, float32
    arrays      a batch from X_train.npy, exported beforehand

`ms` is the clock's median per batch of 512, `cpu_ms` processor time of the drawing processes per batch; with `workers` n processes draw ahead and hand batches over in shared memory, as PyTorch's DataLoader does, and `ms` is the time between batches.
`held_mib` is the memory of the process that draws, beyond what it had after its imports, at the end. Files are read from the page cache. `ratio` is `cpu_ms` of naive over that of the way, of the same cohort.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1" # before numpy is loaded

import h5py
import numpy as np

from pftsleep.data.bouts import dataset_to_hdf5
from pftsleep.data.segments import SegmentRule, export_pretraining, open_arrays, pretraining_segments

SIZE = 512
WAYS = ("naive", "plain", "lzf", "rate25", "arrays")


def peak() -> float: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 # KiB on Linux


def simulate(folder: Path, animals: int, minutes: float, way: str) -> None:
    rng, fs, one = np.random.default_rng(0), 25 if way == "rate25" else 100, 9.80665 if way == "rate25" else 1.
    n = round(minutes * 60 * fs)
    t = np.arange(n) / fs
    for i in range(animals):
        x = (np.stack([.3 * np.sin(2 * np.pi * t), .2 * np.cos(2 * np.pi * t), np.ones(n)], 1) + rng.normal(0, .05, (n, 3))).round(2) * one
        path = dataset_to_hdf5(folder, i, 0, dict(acc=x), fs, "neck", "cow", dict(acc="m/s2" if way == "rate25" else "g"))
        if way in ("naive", "plain"):
            with h5py.File(path, "a") as f: # in one piece; float64 for the naive form, as the original writes it
                del f["acc"]
                f.create_dataset("acc", data=x.astype("float64" if way == "naive" else "float32")).attrs["unit"] = "g"


def naive(segments, index: np.ndarray) -> np.ndarray:
    out = []
    for k in index:
        with h5py.File(segments.sources[segments.source[k]].path) as f: x = f["acc"][segments.start[k]:segments.start[k] + 1000]
        out.append(np.pad(x, ((0, 1000 - len(x)), (0, 0)), constant_values=np.nan))
    return np.nan_to_num(np.stack(out)).transpose(0, 2, 1).astype("float32")


def measure(way: str, folder: Path, batches: int, workers: int) -> dict:
    pre = pretraining_segments(folder, ["cows"], SegmentRule(), oversampling_factor=5., train_ratio=1.)
    segments = pre.train
    if way == "arrays": segments = open_arrays(export_pretraining(pre, folder / "arrays"))
    order = np.random.default_rng(0).permutation(len(segments))
    lists = [np.resize(np.roll(order, -SIZE * k), SIZE) for k in range(batches + 4)]
    draw = (lambda i: naive(segments, i)) if way == "naive" else segments.draw
    times, cpu = [], []
    if not workers:
        before = peak()
        for i in lists:
            began, used = time.perf_counter(), time.process_time()
            draw(i)
            times.append(time.perf_counter() - began); cpu.append(time.process_time() - used)
        return dict(ms=round(1e3 * float(np.median(times[4:])), 1), cpu_ms=round(1e3 * float(np.median(cpu[4:])), 1), held_mib=round(peak() - before, 1), segments=len(segments))
    from torch.utils.data import DataLoader
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    loader = iter(DataLoader(segments, sampler=lists, batch_size=None, num_workers=workers, prefetch_factor=4, collate_fn=_plain))
    began = time.perf_counter()
    for _ in lists:
        next(loader)
        times.append(time.perf_counter() - began)
    del loader
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return dict(ms=round(1e3 * (times[-1] - times[3]) / (len(times) - 4), 1), cpu_ms=round(1e3 * (now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime) / len(lists), 1), segments=len(segments))


def _plain(batch):
    import torch
    return tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in (batch.values, batch.pad, batch.label))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cohorts", type=int, nargs="+", default=[8, 64])
    p.add_argument("--minutes", type=float, default=20)
    p.add_argument("--batches", type=int, default=20)
    p.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    p.add_argument("--one", nargs=3, metavar=("WAY", "FOLDER", "WORKERS"), help="only this one, in this process")
    args = p.parse_args()
    if args.one: return print(json.dumps(measure(args.one[0], Path(args.one[1]), args.batches, int(args.one[2]))))
    for animals in args.cohorts:
        base = None
        for way in WAYS:
            if way == "arrays" and animals > min(args.cohorts): continue # gigabytes
            with tempfile.TemporaryDirectory() as d:
                simulate(Path(d) / "cows", animals, args.minutes, way)
                size = sum(f.stat().st_size for f in Path(d).rglob("*.hdf5"))
                for workers in args.workers:
                    if way == "naive" and workers: continue
                    found = json.loads(subprocess.run([sys.executable, __file__, "--batches", str(args.batches), "--one", way, d, str(workers)], check=True, capture_output=True, text=True).stdout)
                    base = base or found["cpu_ms"]
                    print(json.dumps(dict(benchmark="segments", way=way, animals=animals, hours=round(animals * args.minutes / 60, 1), mib=round(size / 2**20), workers=workers) | found | dict(ratio=round(base / found["cpu_ms"], 1))), flush=True)


if __name__ == "__main__": main()
