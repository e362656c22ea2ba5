"""How cost grows with the number of recordings, and what one night costs: the constants of the page on scale. Prints JSON lines.

    python benchmarks/scale.py                              # cohorts of 1000 and 10 000 short recordings (several minutes), then nights
    python benchmarks/scale.py --cohorts 1000               # other cohorts
    python benchmarks/scale.py --nights 2 --cohorts         # only nights

A cohort: recordings of two minutes, two to a person, through store, manifest, split, loader and one epoch of masked pretraining; each cohort in a process of its own. `flat_mib` is how much memory the epoch took
between its 1000th recording (or a fifth of it, if that comes first) and its end. Nights: simulated, 8 h of the seven channels of PFTSleep; how long one takes from EDF to store and from store to tensor, and the bytes.
`_s` are seconds of the clock, `_cpu_s` of the processor, for other programs may run beside.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from pftsleep.data.cohorts import FOLDER
from pftsleep.data.convert import convert
from pftsleep.data.datasets import WindowDataset, load_window
from pftsleep.data.recording import Hypnogram, Recording, array_channel
from pftsleep.data.signals import Recipe
from pftsleep.data.splits import make_split
from pftsleep.data.store import create_store, open_store

CHANNELS, FS = ("EEG", "EOG"), 10.


def memory() -> float: # MiB of this program now
    return round(int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024, 1)


@contextmanager
def timed(into: dict, name: str):
    began, busy = time.perf_counter(), time.process_time()
    yield
    into |= {f"{name}_s": round(time.perf_counter() - began, 3), f"{name}_cpu_s": round(time.process_time() - busy, 3)}


def short(i: int) -> Recording:
    "Two minutes of two channels, scored."
    noise = np.random.default_rng(i).standard_normal((2, round(120 * FS))).astype("float32")
    channels = {c: array_channel(c, x, FS, "uV", c) for c, x in zip(CHANNELS, noise, strict=True)}
    return Recording(f"r{i:06}", channels, subject=f"s{i // 2:06}", hypnogram=Hypnogram(np.resize(np.array([0, 1, 2, 3, 4], "int8"), 4), 30))


def cohort(n: int) -> dict:
    "Everything that happens to a cohort, step by step."
    from pftsleep.training.pretrain import MaskedPretraining, PretrainConfig, new_encoder
    from pftsleep.training.runs import fit, seeded
    torch.set_num_threads(1)
    found: dict = dict(benchmark="cohort", recordings=n, idle_mib=memory())
    with tempfile.TemporaryDirectory() as folder:
        store = create_store(Path(folder) / "store", Recipe.native())
        with timed(found, "write"):
            for i in range(n): store.add(short(i))
        with timed(found, "sync"): store.sync()
        store = open_store(store.path)
        with timed(found, "manifest"): manifest = store.manifest
        with timed(found, "split"): split = make_split(manifest, dict(train=.9, val=.1), seed=0)
        with timed(found, "check"): split.check(manifest)
        config = PretrainConfig(channels=CHANNELS, epochs=1, batch_size=8, d_model=16, n_layers=1, patch_seconds=6, bands=4, window=4, accelerator="cpu", loggers=())
        with timed(found, "index"): data = {part: WindowDataset(store, split.parts[part], CHANNELS, 4) for part in ("train", "val")}
        seen: list[tuple[int, float]] = []
        class Watched(MaskedPretraining):
            def on_train_batch_end(self, outputs, batch, batch_idx): seen.append((8 * (batch_idx + 1), memory()))
        with seeded(0): task = Watched(new_encoder(store, split.parts["train"], config), config)
        with timed(found, "epoch"): fit(task, data["train"], data["val"], Path(folder) / "run", progress=False)
    after = next(m for done, m in seen if done >= min(1000, len(data["train"]) / 5))
    each = {f"{k}_ms_each": round(1000 * found[f"{k}_cpu_s"] / n, 3) for k in ("write", "sync", "epoch")}
    return found | each | dict(windows=len(data["train"]) + len(data["val"]), first_mib=seen[0][1], warm_mib=after, last_mib=seen[-1][1], flat_mib=round(seen[-1][1] - after, 1))


def nights(n: int) -> list[dict]:
    "From EDF to store and from store to tensor, for the recipe of the published encoder."
    from pftsleep.data.edf import write_edf
    torch.set_num_threads(1)
    names = ("ECG", "EOG left", "chin EMG", "EEG central", "SpO2", "Thorax", "Abdomen")
    rates, units, kinds = (250, 50, 125, 125, 1, 10, 10), ("mV", "uV", "uV", "uV", "%", "", ""), ("ECG", "EOG", "EMG", "EEG", "SPO2", "RESP", "RESP") # as SHHS recorded them
    out = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "edf"; source.mkdir()
        for i in range(n):
            draw = np.random.default_rng(i)
            channels = [array_channel(c, (95 + draw.standard_normal(28800 * fs) if c == "SpO2" else .2 * draw.standard_normal(28800 * fs) if c == "ECG" else 20 * np.cumsum(draw.standard_normal(28800 * fs)) % 60 - 30).astype("float32"), fs, u, k) for c, fs, u, k in zip(names, rates, units, kinds, strict=True)]
            write_edf(Recording(f"n{i}", {c.name: c for c in channels}), source / f"n{i}.edf")
            (source / f"n{i}.csv").write_text("stage\n" + "\n".join(draw.choice(["W", "N1", "N2", "N3", "R"], 960)) + "\n")
        edf = sum(p.stat().st_size for p in source.glob("*.edf")) / n
        for recipe in (Recipe.native(), Recipe.default(channels=names, rate=125.)):
            found: dict = dict(benchmark="nights", recipe=recipe.name, nights=n, hours=8, channels=len(names), edf_mb=round(edf / 1e6, 2))
            with timed(found, "convert"): ledger = convert(FOLDER, source, Path(folder) / recipe.name, recipe, _Here())
            if ledger.failed: raise SystemExit(str(ledger))
            store = open_store(Path(folder) / recipe.name)
            found["store_mb"] = round(store.manifest["bytes"].mean() / 1e6, 2)
            if recipe.name != "native":
                with timed(found, "load"):
                    for i in store: load_window(store[i], names, 0, 960, 30.)
            out.append(found | {f"{k}_cpu_s_each": round(found[f"{k}_cpu_s"] / n, 3) for k in ("convert", "load") if f"{k}_cpu_s" in found})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", type=int, nargs="*", default=[1000, 10_000], metavar="N", help="sizes, in recordings")
    parser.add_argument("--nights", type=int, default=2, help="0 = none")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return print(json.dumps(cohort(args.one)), flush=True)
    found = [json.loads(subprocess.run([sys.executable, __file__, "--one", str(n)], check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1]) for n in args.cohorts]
    for f in found: print(json.dumps(f), flush=True)
    if len(found) > 1: print(json.dumps(dict(benchmark="cohort", what=f"{found[-1]['recordings']} / {found[0]['recordings']} recordings",
        **{f"{k}_ratio": round(found[-1][f"{k}_cpu_s"] / max(found[0][f"{k}_cpu_s"], 1e-3), 2) for k in ("write", "sync", "manifest", "split", "check", "index", "epoch")}, memory_ratio=round(found[-1]["last_mib"] / found[0]["last_mib"], 3))), flush=True)
    if args.nights:
        for f in nights(args.nights): print(json.dumps(f), flush=True)


class _Here:
    "An executor that works at once, in this process, so that its processor time is ours."
    def submit(self, function, *args):
        from concurrent.futures import Future
        done: Future = Future()
        done.set_result(function(*args))
        return done


if __name__ == "__main__": main()
