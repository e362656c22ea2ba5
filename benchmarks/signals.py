"""A night of 8 h through a recipe, beside the naive form of the default one. Prints one JSON line per measurement.

Four channels at 256 Hz, two at 32 Hz and one at 1 Hz, in memory. The naive form filters with scipy's defaults and resamples each whole channel by Fourier transform, as
float64, all channels at once: what one gets by writing the obvious ten lines. Each measurement runs in a process of its own, so that its peak memory is its own.

    python benchmarks/signals.py [--hours 8] [--repeats 5]
    python benchmarks/signals.py --recipe pftsleep          the same night, its first EEG as the ECG
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import soxr
from scipy import signal

from pftsleep.data.recording import Recording, array_channel
from pftsleep.data.signals import Recipe, apply_recipe, resample, zero_phase

MONTAGE = [("C4-M1", "EEG", 256, "uV"), ("C3-M2", "EEG", 256, "uV"), ("E1-M2", "EOG", 256, "uV"), ("Chin", "EMG", 256, "uV"), ("Thorax", "RESP", 32, ""), ("Abdomen", "RESP", 32, ""),
    ("SpO2", "SPO2", 1, "%")]


def night(hours: float) -> Recording:
    rng = np.random.default_rng(0)
    values = lambda kind, n: 95 + rng.integers(-3, 3, n) if kind == "SPO2" else rng.normal(100, 20, n)
    return Recording("bench", {name: array_channel(name, values(kind, round(hours * 3600 * fs)), fs, unit, kind) for name, kind, fs, unit in MONTAGE})


def ours(rec: Recording):
    return apply_recipe(rec, Recipe.default())


def pftsleep(name: str):
    "The seven channels of PFTSleep: the second EEG and what else there is, with the first EEG in place of an ECG."
    def run(rec: Recording):
        ecg = array_channel("ECG", rec["C4-M1"].read.values, 256, "mV", "ECG")
        return apply_recipe(Recording("bench", {"ECG": ecg, **{n: c for n, c in rec.channels.items() if n != "C4-M1"}}), getattr(Recipe, name)())
    return run


PFTSLEEP = ("pftsleep", "pftsleep_edf", "pftsleep_corrected")


def naive(rec: Recording):
    "Every channel in float64, filtered with scipy's default ends, resampled as a whole by Fourier transform."
    bands, n = Recipe.default().bands, round(rec.duration * 100)
    x = {name: ch.samples().astype("float64") for name, ch in rec.channels.items()}
    for name, ch in rec.channels.items():
        if edges := [e for e in bands.get(ch.kind, ()) if e]:
            x[name] = signal.sosfiltfilt(signal.butter(4, edges if len(edges) == 2 else edges[0], "bandpass" if len(edges) == 2 else "highpass", fs=ch.fs, output="sos"), x[name])
    return {name: signal.resample(v, n) for name, v in x.items()}


def steps(rec: Recording):
    "One 256-Hz channel, step by step; each entry is a function to time."
    x = rec["C4-M1"].samples().astype("float64")
    return {"filter 0.3-35 Hz": lambda _: zero_phase(x, 256, (.3, 35.)), "resample, ours (soxr VHQ)": lambda _: resample(x, 256, 100),
        "resample, soxr HQ": lambda _: soxr.resample(x, 256, 100, quality="HQ"), "resample, scipy polyphase": lambda _: signal.resample_poly(x, 25, 64),
        "resample, scipy Fourier": lambda _: signal.resample(x, len(x) * 100 // 256)}


def measure(what: str, hours: float, repeats: int) -> dict:
    rec = night(hours)
    run = {"recipe": ours, "naive": naive, **{n: pftsleep(n) for n in PFTSLEEP}}.get(what) or steps(rec)[what]
    base, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(repeats + 1):
        began = time.perf_counter(); run(rec); seconds.append(time.perf_counter() - began)
    seconds = sorted(seconds[1:]) # the first one warms up
    return dict(benchmark="signals", what=what, hours=hours, channels=len(MONTAGE) if what in ("recipe", "naive", *PFTSLEEP) else 1, threads=int(os.environ["OMP_NUM_THREADS"]), repeats=repeats,
        median_s=round(float(np.median(seconds)), 3), min_s=round(seconds[0], 3), max_s=round(seconds[-1], 3), peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        input_rss_mb=base // 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=8.)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--recipe", choices=PFTSLEEP, help="only this recipe")
    parser.add_argument("--only", help="one measurement, in this process")
    args = parser.parse_args()
    if args.recipe: args.only = args.recipe
    if args.only: return print(json.dumps(measure(args.only, args.hours, args.repeats)))
    found = {}
    for what in ["recipe", "naive", *steps(night(.01))]:
        line = subprocess.run([sys.executable, __file__, "--only", what, "--hours", str(args.hours), "--repeats", str(args.repeats)], check=True, capture_output=True, text=True).stdout.strip()
        found[what] = json.loads(line); print(line, flush=True)
    print(json.dumps(dict(benchmark="signals", what="naive / recipe", ratio=round(found["naive"]["median_s"] / found["recipe"]["median_s"], 2),
        extra_memory_ratio=round((found["naive"]["peak_rss_mb"] - found["naive"]["input_rss_mb"]) / (found["recipe"]["peak_rss_mb"] - found["recipe"]["input_rss_mb"]), 2))))


if __name__ == "__main__":
    main()
