"""Contrastive loss in blocks against the plain form, and retrieval among many candidates.

    python benchmarks/contrastive.py                       # loss at 1024, 2048 and 4096 clips, 4 modalities; retrieval among 10 000
    python benchmarks/contrastive.py --candidates 90000    # the size that SleepFM's authors report; minutes

prints one JSON line per measurement, and one that compares. Each runs in a process of its own, so that the peak memory is its own: `peak_mib` is what it adds to that of its inputs.
A call of the loss is value and gradients. Retrieval is one pair of modalities, both directions; `rss_mib` is the whole process, torch and vectors included.
"""
import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from pftsleep.evaluation.retrieval import pair_ranks
from pftsleep.training.contrastive import contrastive_loss


def peak_mib() -> float: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 # KiB on Linux


def measure_loss(way: str, mode: str, batch: int, modalities: int, width: int, repeats: int) -> dict:
    "Memory of a call, and the median CPU seconds of all."
    g = torch.Generator().manual_seed(0)
    e = [torch.randn(batch, width, generator=g).requires_grad_() for _ in range(modalities)]
    t, times = torch.tensor(1., requires_grad=True), []
    contrastive_loss([x[:64] for x in e], t, mode, blockwise=way == "blockwise").backward() # libraries are loaded
    before = peak_mib()
    for _ in range(repeats):
        for x in (*e, t): x.grad = None
        start = time.process_time()
        loss = contrastive_loss(e, t, mode, blockwise=way == "blockwise")
        loss.backward()
        times.append(time.process_time() - start)
    check = [loss.item(), t.grad.item(), sum(x.grad.double().square().sum().item() for x in e) ** .5]
    return dict(benchmark="contrastive loss", way=way, mode=mode, batch=batch, modalities=modalities, width=width, cpu_s=round(sorted(times)[len(times) // 2], 3), peak_mib=round(peak_mib() - before, 1), check=check)


def measure_retrieval(candidates: int, width: int) -> dict:
    "One pair, both directions; noise so strong that ranks are spread."
    g = torch.Generator().manual_seed(0)
    a = torch.randn(candidates, width, generator=g)
    b = torch.randn(candidates, width, generator=g).mul_(8).add_(a)
    before, start, wall = peak_mib(), time.process_time(), time.perf_counter()
    there, _ = pair_ranks(a, b)
    return dict(benchmark="retrieval", candidates=candidates, width=width, cpu_s=round(time.process_time() - start, 1), wall_s=round(time.perf_counter() - wall, 1), peak_mib=round(peak_mib() - before, 1),
        rss_mib=round(peak_mib(), 1), table_mib=round(candidates**2 * 4 / 2**20), recall_1=round(float((there <= 1).mean()), 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="*", default=[1024, 2048, 4096])
    parser.add_argument("--modalities", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--modes", nargs="+", default=["pairwise", "leave_one_out"])
    parser.add_argument("--candidates", type=int, default=10_000, help="0 leaves retrieval out")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--here", help="one measurement in this process, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.here: return print(json.dumps((measure_loss if "way" in (one := json.loads(args.here)) else measure_retrieval)(**one)))

    def alone(**one) -> dict:
        done = subprocess.run([sys.executable, __file__, "--threads", str(args.threads), "--here", json.dumps(one)], check=True, capture_output=True, text=True)
        print(done.stdout.strip(), flush=True)
        return json.loads(done.stdout)
    for mode in args.modes:
        for batch in args.batches:
            plain, blocks = (alone(way=way, mode=mode, batch=batch, modalities=args.modalities, width=args.width, repeats=args.repeats) for way in ("plain", "blockwise"))
            if any(abs(a / b - 1) > 1e-5 for a, b in zip(plain["check"], blocks["check"], strict=True)): raise SystemExit("the two ways disagree")
            print(json.dumps(dict(benchmark="contrastive loss, plain / blockwise", mode=mode, batch=batch, cpu_ratio=round(plain["cpu_s"] / blocks["cpu_s"], 2),
                memory_ratio=round(plain["peak_mib"] / max(blocks["peak_mib"], .1), 1), largest_difference=max(abs(a / b - 1) for a, b in zip(plain["check"], blocks["check"], strict=True)))), flush=True)
    if args.candidates: alone(candidates=args.candidates, width=args.width)


if __name__ == "__main__": main()
