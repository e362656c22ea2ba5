"""Staging, judged by its result. Prints JSON lines.

    python benchmarks/stage.py [--threads 2] [--repeats 3]     # both parts
    python benchmarks/stage.py --agreement                     # bf16 beside float32: the stages of `pft-base`, trained here on simulated nights with all five stages
    python benchmarks/stage.py --end-to-end                    # `pft-tiny`, from the EDF file of an 8-h night to its hypnogram, in seconds

The agreement is counted over unseen whole nights of 8 h: in total, and for each class the share of the epochs to which float32 gives it that bf16 gives it as well. `_cpu_s` are seconds of the processor (see `night.py`). The model is trained for as long as it takes to stage
reasonably (kappa above .6): a model that is unsure of everything would say more about rounding than about sleep. The naive way keeps all scores of all channels and heads, as in `night.py`; everything else is the same.
"""
import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from night import memory, naive_attention

from pftsleep.apps.staging import stage_file
from pftsleep.data.cohorts import FOLDER, SIMULATED
from pftsleep.data.convert import convert
from pftsleep.data.edf import write_edf
from pftsleep.data.montage import apply_montage
from pftsleep.data.readers import read_signals
from pftsleep.data.recording import SCORED_STAGES
from pftsleep.data.signals import Recipe, apply_recipe
from pftsleep.data.simulate import simulate_cohort, simulate_hypnogram, simulate_night
from pftsleep.data.splits import Split
from pftsleep.data.store import open_store
from pftsleep.evaluation.metrics import staging_metrics
from pftsleep.models import transformer
from pftsleep.models.heads import LinearProbe
from pftsleep.models.stager import Stager
from pftsleep.models.transformer import Attention, PatchConfig, PatchTransformer, n_parameters
from pftsleep.training.pretrain import PretrainConfig, new_encoder
from pftsleep.training.probe import StagingConfig, train_supervised

CHANNELS = ("EEG", "EOG", "EMG")
MONTAGE = {"EEG": 125, "EOG(L)": 50, "EMG": 125}
SEVEN = ("EEG", "EOG", "EMG", "ECG", "SpO2", "Thorax", "Abdomen")


def nights(folder: Path, name: str, n: int, hours: float, seed: int):
    "A store of simulated nights."
    simulate_cohort(folder / name, n, hours=hours, seed=seed, montage=MONTAGE)
    ledger = convert(SIMULATED, folder / name, folder / f"{name}-store", Recipe.default(channels=CHANNELS))
    if ledger.failed: raise SystemExit(str(ledger))
    return open_store(folder / f"{name}-store")


def trained(folder: Path, epochs: int) -> Stager:
    "`pft-base` with a linear head, all of it trained on the stages of 24 persons' nights of 2 h."
    store = nights(folder, "learn", 26, 2., seed=1)
    ids = list(store.manifest["id"])
    split = Split(dict(train=tuple(ids[:24]), val=tuple(ids[24:])), dict(zip(ids, store.manifest["subject"], strict=True)))
    encoder = new_encoder(store, ids[:24], PretrainConfig(preset="base")) # the channels as the store calls them
    learn = StagingConfig(epochs=epochs, batch_size=4, window=60, learning_rate=5e-4, accelerator="cpu", loggers=(), precision="bf16-mixed")
    return train_supervised(store, split, encoder, folder / "run", learn, progress=False)


def agreement(threads: int, epochs: int, n: int) -> dict:
    "Stages of unseen nights in both precisions."
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as d:
        began = time.perf_counter()
        stager = trained(Path(d), epochs)
        trained_s = time.perf_counter() - began
        store, took, staged = nights(Path(d), "judge", n, 8., seed=2), {"float32": [], "bf16": []}, {"float32": [], "bf16": []}
        truth = [store[i].hypnogram.stages for i in store.manifest["id"]]
        for rec in (store[i] for i in store.manifest["id"]):
            for precision in took:
                began = time.perf_counter(); staged[precision].append(stager.stage(rec, precision=precision))
                took[precision].append(time.perf_counter() - began)
    cut = lambda hs: np.concatenate([h.stages[:len(t)] for h, t in zip(hs, truth, strict=True)])
    single, half, reference = cut(staged["float32"]), cut(staged["bf16"]), np.concatenate(truth)
    kappa = {p: float(staging_metrics(reference, s).loc["kappa", "pooled"]) for p, s in (("float32", single), ("bf16", half))}
    margin = np.concatenate([np.diff(np.sort(h.probabilities[:len(t)], -1)[:, -2:], axis=-1)[:, 0] for h, t in zip(staged["float32"], truth, strict=True)])
    classes = {s.name: round(100 * float((half == s)[single == s].mean()), 3) if (single == s).any() else None for s in SCORED_STAGES}
    return dict(benchmark="agreement", preset="base", parameters=n_parameters(stager.encoder), nights=n, epochs=len(single), agreement=round(100 * float((single == half).mean()), 3), by_class=classes,
        counts={s.name: int((single == s).sum()) for s in SCORED_STAGES}, within_a_hundredth=round(100 * float((margin < .01).mean()), 3), kappa_float32=round(kappa["float32"], 4), kappa_bf16=round(kappa["bf16"], 4),
        float32_s=round(statistics.median(took["float32"]), 2), bf16_s=round(statistics.median(took["bf16"]), 2), trained_s=round(trained_s, 1), threads=threads, torch=torch.__version__)


def end_to_end(file: str, way: str, channels: int, threads: int, repeats: int) -> dict:
    "From file to hypnogram; its weights are as they were drawn, which costs the same."
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    wanted = Recipe.default(channels=SEVEN[:channels])
    recipe = Recipe.default(channels=tuple(apply_recipe(apply_montage(read_signals(file), FOLDER.montage, FOLDER.ignored), wanted).channels)) # as the montage calls them
    encoder = PatchTransformer(PatchConfig.tiny(recipe.channels, recipe.rate), recipe.to_dict())
    stager = Stager(encoder, LinearProbe.of(encoder), recipe).eval()
    if way == "naive": Attention.forward, transformer.by_rows = naive_attention, lambda *_: False
    idle, total, network, clocks = memory("VmRSS"), [], [], lambda: np.array([time.perf_counter(), time.process_time()])
    for _ in range(repeats + 1):
        began = clocks(); rec, h = stage_file(file, stager); total.append(clocks() - began)
        began = clocks(); stager.stage(rec); network.append(clocks() - began)
    facts = {f"{name}{unit}": round(float(x), 2) for name, v in (("total", total), ("network", network)) for unit, x in zip(("_s", "_cpu_s"), np.median(v[1:] or v, axis=0), strict=True)}
    return dict(benchmark="end to end", preset="tiny", way=way, channels=channels, hours=h.duration / 3600, **facts, idle_mib=idle, peak_mib=memory("VmHWM"),
        parameters=n_parameters(stager), repeats=repeats, threads=threads, check=float(np.square(h.probabilities).sum()), torch=torch.__version__)


def alone(*args) -> dict:
    "This program with other arguments, in a process of its own; its line is printed here as well."
    line = subprocess.run([sys.executable, __file__, *map(str, args)], check=True, stdout=subprocess.PIPE, text=True).stdout.strip().splitlines()[-1]
    print(line, flush=True)
    return json.loads(line)


def both_ways(threads: int, repeats: int) -> None:
    "Ours and the naive way, with three and with seven channels."
    with tempfile.TemporaryDirectory() as d:
        file = Path(d) / "night.edf"
        write_edf(simulate_night(simulate_hypnogram(8., np.random.default_rng(0)), "shhs", seed=0), file)
        for channels in (3, 7):
            ours, naive = (alone("--one", way, file, channels, "--threads", threads, "--repeats", repeats) for way in ("ours", "naive"))
            if abs(ours["check"] / naive["check"] - 1) > 1e-3: raise SystemExit("the two ways disagree")
            print(json.dumps(dict(benchmark="end to end", what="naive / ours", channels=channels, total_ratio=round(naive["total_s"] / ours["total_s"], 2), total_cpu_ratio=round(naive["total_cpu_s"] / ours["total_cpu_s"], 2),
                memory_ratio=round(naive["peak_mib"] / ours["peak_mib"], 2))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--agreement", action="store_true")
    parser.add_argument("--end-to-end", action="store_true")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the training nights")
    parser.add_argument("--nights", type=int, default=6, help="that are staged in both precisions")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore"); logging.disable(logging.WARNING)
    if args.one: return print(json.dumps(end_to_end(args.one[1], args.one[0], int(args.one[2]), args.threads, args.repeats)))
    if args.end_to_end or not args.agreement: both_ways(args.threads, args.repeats)
    if args.agreement or not args.end_to_end: print(json.dumps(agreement(args.threads, args.epochs, args.nights)), flush=True)


if __name__ == "__main__": main()
