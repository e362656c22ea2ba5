"""From an EDF file to a store: seconds and memory of one worker, beside the original's way. Prints one JSON line per measurement.

    python benchmarks/convert.py [--hours 8] [--repeats 5]     # a night, each way in a process of its own, so that its peak memory is its own
    python benchmarks/convert.py --scaling                     # 10, 100 and 1000 short recordings through `convert`, index and manifest included

The file has 14 channels, ten at 256 Hz, three at 32 Hz and one at 1 Hz, of which seven are wanted (four, two and one of these rates), as the timing that we compare with had. Ours reads, aligns with a hypnogram, filters,
resamples to 100 Hz, compresses, and writes with checksums; one thread. The original's way is re-created from its specification: read all samples, round them to float16 and write them as zarr 2; then, at each access, filter and
resample to 125 Hz (`naive_load` in store.py). It needs both before a model sees anything, so its time is the sum. `peak_rss_mb` counts everything, Python and the libraries included (`imports_mb`).
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Executor, Future
from datetime import datetime
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1" # before numpy is loaded

import numpy as np

from pftsleep.data.cohorts import FOLDER
from pftsleep.data.convert import convert
from pftsleep.data.edf import write_edf
from pftsleep.data.recording import Recording, array_channel
from pftsleep.data.signals import Recipe
from pftsleep.data.store import open_store

WANTED = [("C4-M1", "EEG", 256, "uV"), ("ECG", "ECG", 256, "mV"), ("E1-M2", "EOG", 256, "uV"), ("Chin", "EMG", 256, "uV"), ("SpO2", "SPO2", 1, "%"), ("Thorax", "RESP", 32, ""), ("Abdomen", "RESP", 32, "")]
OTHERS = [("C3-M2", "EEG", 256, "uV"), ("F4-M1", "EEG", 256, "uV"), ("O2-M1", "EEG", 256, "uV"), ("E2-M2", "EOG", 256, "uV"), ("Leg L", "EMG", 256, "uV"), ("Leg R", "EMG", 256, "uV"), ("Airflow", "RESP", 32, "")]
ORIGINAL = dict(zip(("EEG", "ECG", "EOG", "EMG", "SpO2", "Thorax", "Abdomen"), (name for name, *_ in WANTED), strict=True)) # names of `naive_load`
RECIPE = Recipe.default(channels=[name for name, *_ in WANTED])


def write_night(folder: Path, name: str, hours: float, montage, seed: int = 0) -> None:
    rng, seconds = np.random.default_rng(seed), round(hours * 3600)
    walk = lambda n: 20 * np.convolve(rng.standard_normal(n), [.4, .3, .2, .1], "same").astype("float32")
    values = lambda kind, fs: (95 + rng.integers(-3, 3, seconds * fs)) if kind == "SPO2" else walk(seconds * fs)
    write_edf(Recording(name, {n: array_channel(n, values(kind, fs), fs, unit, kind) for n, kind, fs, unit in montage}, start=datetime(2024, 3, 1, 22)), folder / f"{name}.edf")
    (folder / f"{name}.csv").write_text("stage\n" + "\n".join(rng.choice(["W", "N1", "N2", "N3", "R"], seconds // 30)) + "\n")


class Here(Executor):
    "Does the work in the main thread, as a worker process does, so that its memory can be read."
    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def ours(files: Path, out: Path) -> None:
    ledger = convert(FOLDER, files, out, RECIPE, Here())
    if ledger.failed: sys.exit(str(ledger))


def original(files: Path, out: Path) -> None:
    "Everything to float16 in zarr 2, and one access."
    import pyedflib
    import zarr
    from numcodecs import Blosc

    from store import naive_load
    with pyedflib.EdfReader(str(next(files.glob("*.edf")))) as f: signals = {label: f.readSignal(i).astype("float16") for i, label in enumerate(f.getSignalLabels()) if label in ORIGINAL.values()}
    for name, label in ORIGINAL.items():
        zarr.create_array(out / name, data=signals[label], chunks=(len(signals[label]),), zarr_format=2, compressors=[Blosc("lz4", 5, Blosc.SHUFFLE)])
    naive_load(out)


def rss() -> int:
    "Peak memory of this program in MB; what getrusage says would include the parent's, from before this program was started."
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024


def measure(what: str, files: Path, repeats: int) -> dict:
    seconds, cpu = [], []
    base = rss()
    for _ in range(repeats + 1):
        with tempfile.TemporaryDirectory() as out:
            began, used = time.perf_counter(), time.process_time()
            {"ours": ours, "original": original}[what](files, Path(out))
            seconds.append(time.perf_counter() - began); cpu.append(time.process_time() - used)
    seconds = sorted(seconds[1:]) # the first one warms up
    return dict(benchmark="convert", what=what, threads=1, repeats=repeats, median_s=round(float(np.median(seconds)), 3), min_s=round(seconds[0], 3), max_s=round(seconds[-1], 3),
        cpu_s=round(float(np.median(cpu[1:])), 3), peak_rss_mb=rss(), imports_mb=base)


def night(hours: float, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_night(Path(folder), "night", hours, [*WANTED, *OTHERS])
        size, found = (Path(folder) / "night.edf").stat().st_size, {}
        for what in ("ours", "original"):
            line = subprocess.run([sys.executable, __file__, "--only", what, "--files", folder, "--repeats", str(repeats)], check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1]
            found[what] = json.loads(line)
            print(json.dumps(found[what] | dict(hours=hours, channels="7 of 14", edf_mb=size >> 20)), flush=True)
        ratio = lambda key: round(found["original"][key] / found["ours"][key], 2)
        print(json.dumps(dict(benchmark="convert", what="original / ours", time_ratio=ratio("median_s"), cpu_ratio=ratio("cpu_s"), memory_ratio=ratio("peak_rss_mb"))))


def scaling(counts=(10, 100, 1000)) -> None:
    montage, per = [("C4-M1", "EEG", 100, "uV"), ("E1-M2", "EOG", 100, "uV")], {}
    with tempfile.TemporaryDirectory() as folder:
        for n in counts:
            files, store = Path(folder) / f"files{n}", Path(folder) / f"store{n}"
            files.mkdir()
            for i in range(n): write_night(files, f"r{i:05d}", 1 / 30, montage, seed=i)
            began = time.perf_counter()
            convert(FOLDER, files, store, Recipe.default(channels=["C4-M1", "E1-M2"]), Here())
            converted = time.perf_counter() - began
            began = time.perf_counter()
            convert(FOLDER, files, store, Recipe.default(channels=["C4-M1", "E1-M2"]), Here())
            again = time.perf_counter() - began
            began = time.perf_counter()
            assert len(open_store(store).manifest) == n
            per[n] = converted / n
            print(json.dumps(dict(benchmark="convert", what="scaling", recordings=n, convert_ms_each=round(1000 * converted / n, 2), nothing_new_ms_each=round(1000 * again / n, 2),
                manifest_ms=round(1000 * (time.perf_counter() - began), 1))), flush=True)
    print(json.dumps(dict(benchmark="convert", what=f"cost of a recording among {counts[-1]} / among {counts[0]}", ratio=round(per[counts[-1]] / per[counts[0]], 2))))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=8.)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scaling", action="store_true", help="many short recordings in place of one night")
    parser.add_argument("--only", help="one way, in this process")
    parser.add_argument("--files", type=Path, help="for --only: the folder with the night")
    args = parser.parse_args()
    if args.only: print(json.dumps(measure(args.only, args.files, args.repeats)))
    elif args.scaling: scaling()
    else: night(args.hours, args.repeats)


if __name__ == "__main__": main()
