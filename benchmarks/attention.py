"""Residual attention: fused (`pftsleep.models.transformer.attend`) against naive (scores kept and added), one recording, one channel, published width.

    python benchmarks/attention.py --tokens 1200 4800 --threads 1 --repeats 5

prints one JSON line per way and size, and one with their ratio. Each runs in a process of its own, so that the peak memory is its own. Both are the attention of a whole
encoder (3 layers, 4 heads of width 128), without the projections and the feed-forward part. `spread_s` is the range from the fastest to the slowest repeat.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from pftsleep.models.transformer import attend

LAYERS, HEADS, WIDTH = 3, 4, 128


def naive(queries, keys, values, pad):
    "As the original: a table of scores for each head, kept for the next layer."
    scores, outs, hidden = torch.zeros(()), [], pad[:, None, None]
    for q, k, v in zip(queries, keys, values, strict=True):
        scores = q @ k.mT + scores
        scores.masked_fill_(hidden, -torch.inf)
        outs.append(scores.softmax(-1).masked_fill(hidden, 0) @ v)
    return outs


def fused(queries, keys, values, pad):
    "Queries and keys of all layers so far side by side."
    return [attend(torch.cat(queries[:i + 1], -1), torch.cat(keys[:i + 1], -1), v, pad)[0] for i, v in enumerate(values)]


def peak_mib() -> float: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 # KiB on Linux


@torch.no_grad()
def measure(way: str, tokens: int, repeats: int, threads: int) -> dict:
    "Time and memory of one way; the first run is not counted."
    torch.set_num_threads(threads)
    gen = torch.Generator().manual_seed(0)
    queries, keys, values = ([torch.randn(1, HEADS, tokens, WIDTH, generator=gen) * WIDTH**-.25 for _ in range(LAYERS)] for _ in range(3))
    pad = torch.arange(tokens)[None] >= tokens - tokens // 10
    run, times, before = {"naive": naive, "fused": fused}[way], [], peak_mib()
    for _ in range(repeats + 1):
        start = time.perf_counter()
        outs = run(queries, keys, values, pad)
        times.append(time.perf_counter() - start)
    check = sum(out.double().square().sum().item() for out in outs)
    return dict(benchmark="residual attention", way=way, tokens=tokens, threads=threads, repeats=repeats, median_s=round(statistics.median(times[1:]), 4),
        spread_s=[round(min(times[1:]), 4), round(max(times[1:]), 4)], peak_mib=round(peak_mib() - before, 1), check=check, torch=torch.__version__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1200, 4800])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--way", choices=["naive", "fused"], help="only this one, in this process")
    args = parser.parse_args()
    if args.way: return print(json.dumps(measure(args.way, args.tokens[0], args.repeats, args.threads)))
    for tokens in args.tokens:
        lines = {}
        for way in ("naive", "fused"):
            command = [sys.executable, __file__, "--way", way, "--tokens", str(tokens), "--threads", str(args.threads), "--repeats", str(args.repeats)]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            print(text, flush=True)
            lines[way] = json.loads(text)
        if abs(lines["naive"]["check"] / lines["fused"]["check"] - 1) > 1e-4: raise SystemExit("the two ways disagree")
        print(json.dumps(dict(benchmark="residual attention, naive / fused", tokens=tokens, threads=args.threads,
            time_ratio=round(lines["naive"]["median_s"] / lines["fused"]["median_s"], 2), memory_ratio=round(lines["naive"]["peak_mib"] / lines["fused"]["peak_mib"], 1))), flush=True)


if __name__ == "__main__": main()
