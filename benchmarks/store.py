"""What a store costs: codecs, chunks, loading a night, many recordings. Prints one JSON line per measurement.

    python benchmarks/store.py [--hours 8] [--repeats 7] [--threads 1]     # codecs, chunk lengths, loading a prepared night beside filtering at access
    python benchmarks/store.py --scaling                                   # 10, 100 and 1000 short recordings

The signals are a simulated night in the montage of the published encoders, seven channels. "prepared" is that night after the default recipe, "native" its own samples. Files are read
from the page cache, as in every epoch of training but the first. `spread_s` is the range from the fastest to the slowest repeat; `cpu_s` the processor time, which other work on the machine disturbs less.

The naive form is the original's algorithm: float16 at native rates in zarr 2, one chunk per channel (here uncompressed, which only helps it); at each access a median filter, a causal Butterworth filter, and torchaudio's default
sinc resampler to 125 Hz. Its night has four channels at 256 Hz, two at 32 Hz and one at 1 Hz, as the timing that we compare with had.
"""
import argparse
import json
import math
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

THREADS = sys.argv[sys.argv.index("--threads") + 1] if "--threads" in sys.argv else "1"
os.environ["OMP_NUM_THREADS"] = THREADS # before numpy and torch are loaded

import numpy as np
import torch
import zarr
from scipy.ndimage import median_filter
from scipy.signal import butter, sosfilt
from zarr.codecs import BloscCodec

from pftsleep.data import store as stores
from pftsleep.data.datasets import load_window
from pftsleep.data.recording import Recording, array_channel
from pftsleep.data.signals import Recipe, apply_recipe
from pftsleep.data.simulate import simulate_hypnogram, simulate_night
from pftsleep.data.store import create_store, open_store, quantise

torch.set_num_threads(int(THREADS))
NATIVE = [("ECG", 256, (.5, 40)), ("EOG", 256, (.3, 30)), ("EMG", 256, (.3, 30)), ("EEG", 256, (.3, 30)), ("SpO2", 1, (None, .4)), ("Thorax", 32, (None, .5)), ("Abdomen", 32, (None, .5))]


def timed(run, repeats: int) -> dict:
    seconds, cpu = [], []
    for _ in range(repeats + 1):
        began, used = time.perf_counter(), time.process_time()
        run()
        seconds.append(time.perf_counter() - began); cpu.append(time.process_time() - used)
    seconds = sorted(seconds[1:]) # the first one warms up
    return dict(median_s=round(float(np.median(seconds)), 5), spread_s=round(seconds[-1] - seconds[0], 5), cpu_s=round(float(np.median(cpu[1:])), 5), repeats=repeats)


def say(**facts) -> dict:
    print(json.dumps(dict(benchmark="store", threads=int(THREADS)) | facts), flush=True)
    return facts


STEPS = dict(EEG=.1, EOG=.1, EMG=.1, ECG=.002, RESP=.01, SPO2=1.) # of a recorder, in the channel's unit

def digitised(rec: Recording) -> Recording:
    "As a recorder would have written it."
    at = lambda c: (np.rint(c.samples().astype("float64") / STEPS[c.kind]) * STEPS[c.kind]).astype("float32")
    return replace(rec, channels={n: array_channel(n, at(c), c.fs, c.unit, c.kind, resolution=STEPS[c.kind]) for n, c in rec.channels.items()})


# --- codecs and chunks

def write(folder: Path, channels: dict, seconds: float, codec) -> None:
    for name, (codes, fs) in channels.items():
        chunk = max(1, min(len(codes), round(seconds * fs)))
        zarr.create_array(folder / name, shape=codes.shape, dtype=codes.dtype, chunks=(chunk,), shards=(chunk * -(-len(codes) // chunk),), compressors=codec and [codec], overwrite=True)[:] = codes


def codecs(night: dict[str, Recording], repeats: int) -> None:
    for kind, rec in night.items():
        channels = {n: (quantise(c.samples(), c.resolution)[0], c.fs) for n, c in rec.channels.items()}
        raw = sum(c.nbytes for c, _ in channels.values())
        for cname, level, shuffle in [("lz4", 1, "shuffle"), ("lz4", 5, "shuffle"), ("lz4", 5, "bitshuffle"), ("zstd", 1, "shuffle"), ("zstd", 1, "bitshuffle"), ("zstd", 3, "noshuffle"), ("zstd", 3, "shuffle"),
                ("zstd", 3, "bitshuffle"), ("zstd", 5, "bitshuffle"), ("zstd", 9, "bitshuffle")]:
            with tempfile.TemporaryDirectory() as folder:
                began = time.process_time()
                write(Path(folder), channels, stores.CHUNK_SECONDS, BloscCodec(cname=cname, clevel=level, shuffle=shuffle))
                written = time.process_time() - began
                size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
                arrays = [zarr.open_array(Path(folder) / n, mode="r") for n in channels]
                read = timed(lambda arrays=arrays: [a[:] for a in arrays], repeats)
            say(what="codec", signals=kind, codec=f"{cname} {level} {shuffle}", mb=round(raw / 1e6, 1), ratio=round(raw / size, 2), write_mb_s=round(raw / 1e6 / written), read_ms_per_night=round(1000 * read["median_s"], 1),
                spread_ms=round(1000 * read["spread_s"], 1), read_cpu_ms=round(1000 * read["cpu_s"], 1))


def _pair(t: dict) -> list[tuple[str, float]]: return [("ms", t["median_s"]), ("cpu_ms", t["cpu_s"])]


def chunks(rec: Recording, repeats: int) -> None:
    channels = {n: (quantise(c.samples(), c.resolution)[0], c.fs) for n, c in rec.channels.items()}
    for seconds in (60, 600, 1800, 3600, 8 * 3600):
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
            write(Path(folder), channels, seconds, stores.CODEC)
            arrays = [zarr.open_array(Path(folder) / n, mode="r") for n in channels]
            part = lambda first, stop, arrays=arrays: [a[first:stop] for a in arrays]
            ms = {"night": lambda part=part: part(0, None), "night_two_threads": lambda arrays=arrays, pool=pool: list(pool.map(lambda a: a[:], arrays)),
                "10_minutes": lambda part=part: part(60000, 120000), "30_s": lambda part=part: part(60000, 63000)}
            say(what="chunk", seconds=seconds, **{f"{k}_{of}": round(1000 * v, 1) for k, f in ms.items() for of, v in _pair(timed(f, repeats))})


# --- loading

def sinc_resample(x: torch.Tensor, fs: int, rate: int = 125) -> torch.Tensor: # [T], [T']
    "torchaudio's default: a windowed sinc, one kernel for each output phase."
    g = math.gcd(fs, rate)
    o, n = fs // g, rate // g
    base = .99 * min(o, n)
    width = math.ceil(6 * o / base)
    taps = torch.arange(-width, width + o, dtype=x.dtype)[None] / o
    u = ((taps - torch.arange(n, dtype=x.dtype)[:, None] / n) * base).clamp(-6, 6)
    kernels = torch.sinc(u) * torch.cos(math.pi * u / 12) ** 2 * base / o
    padded = torch.nn.functional.pad(x[None, None], (width, width + o))
    return torch.nn.functional.conv1d(padded, kernels[:, None], stride=o)[0].T.reshape(-1)[:math.ceil(n * len(x) / o)]


def naive_load(folder: Path, rate: int = 125) -> torch.Tensor: # [7, T]
    rows = []
    for name, fs, (low, high) in NATIVE:
        x = zarr.open_array(folder / name, mode="r", zarr_format=2)[:].astype("float32")
        sos = lambda at, low=low, high=high: butter(2, high if low is None else (low, high), "lowpass" if low is None else "bandpass", fs=at, output="sos")
        if fs < rate: rows.append(torch.from_numpy(sosfilt(sos(rate), median_filter(sinc_resample(torch.from_numpy(x), fs).numpy(), 3, mode="nearest"))).float())
        else: rows.append(sinc_resample(torch.from_numpy(sosfilt(sos(fs), median_filter(x, 3, mode="nearest"))), fs).float())
    return torch.stack(rows)


def loading(hours: float, repeats: int) -> None:
    rng = np.random.default_rng(0)
    seconds = round(hours * 3600)
    epochs = seconds // 30
    with tempfile.TemporaryDirectory() as folder:
        for name, fs, _ in NATIVE:
            x = (30 * rng.standard_normal(seconds * fs)).astype("float16")
            zarr.create_array(Path(folder) / "original" / name, data=x, chunks=(len(x),), zarr_format=2, compressors=None)
        naive = say(what="load a night: filtering at access (the original)", hours=hours, channels=7, rate=125, **timed(lambda: naive_load(Path(folder) / "original"), max(2, repeats // 2)))
        for rate in (100, 125):
            store = create_store(Path(folder) / f"{rate}", Recipe.default(rate=rate))
            store.add(Recording("n", {name: array_channel(name, np.convolve(30 * rng.standard_normal(seconds * rate), [.4, .3, .2, .1], "same"), rate, "uV", "EEG", resolution=.05) for name, _, _ in NATIVE}))
            names = [name for name, _, _ in NATIVE]
            ways = {"load_window, opening included": lambda store=store, names=names: load_window(store["n"], names, 0, epochs, 30.),
                "samples alone": lambda store=store: [c.samples() for c in store["n"].channels.values()], "opening alone": lambda store=store: store["n"]}
            for way, run in ways.items():
                ours = say(what=f"load a prepared night: {way}", hours=hours, channels=7, rate=rate, **timed(run, repeats))
                if way.startswith("load_window"): say(what="original / prepared", rate=rate, ratio=round(naive["median_s"] / ours["median_s"], 1), cpu_ratio=round(naive["cpu_s"] / ours["cpu_s"], 1))


# --- many recordings

def scaling(counts=(10, 100, 1000)) -> None:
    rng, per = np.random.default_rng(0), {}
    channels = {n: array_channel(n, 30 * rng.standard_normal(100 * 60), 100, "uV", "EEG", resolution=.1) for n in ("C4-M1", "C3-M2")}
    for n in counts:
        with tempfile.TemporaryDirectory() as folder:
            store, took = create_store(Path(folder) / "s", Recipe.native()), {}
            def step(name, run, took=took):
                began = time.perf_counter(); run(); took[name] = time.perf_counter() - began
            step("write", lambda store=store, n=n: [store.add(Recording(f"r{i:05d}", channels)) for i in range(n)])
            step("sync", store.sync)
            step("manifest", lambda store=store: open_store(store.path).manifest)
            step("open", lambda store=store: [store[i] for i in store.manifest["id"]])
        per[n] = sum(took.values()) / n
        say(what="scaling", recordings=n, total_s=round(sum(took.values()), 3), **{f"{k}_ms_each": round(1000 * v / n, 3) for k, v in took.items()})
    say(what=f"cost of a recording among {counts[-1]} / among {counts[1]}", ratio=round(per[counts[-1]] / per[counts[1]], 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=8.)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of numpy and torch")
    parser.add_argument("--scaling", action="store_true", help="only 10, 100 and 1000 short recordings")
    args = parser.parse_args()
    if args.scaling: return scaling()
    native = digitised(simulate_night(simulate_hypnogram(args.hours, np.random.default_rng(0)), "pftsleep", seed=0))
    night = dict(prepared=apply_recipe(native, Recipe.default()), native=native)
    codecs(night, args.repeats)
    chunks(night["prepared"], args.repeats)
    loading(args.hours, args.repeats)


if __name__ == "__main__":
    main()
