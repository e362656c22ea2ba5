"""PAT: latency of one week, weeks a second in batches, memory of the process, and what share of the machine's matrix products that is.

    python benchmarks/pat.py --sizes S M L --threads 2 --calls 200

prints one JSON line per size and precision, from a process of its own, so that the peak memory is its own. `naive` is the same model with all attention weights stored and q, k and v projected one after
the other, measured in the same process, in turns with ours. The peak is that of a product of two square matrices on the same threads. The targets are for two quiet cores.
"""
import argparse
import json
import platform
import resource
import subprocess
import sys
import time

import numpy as np
import torch

from pftsleep.models.pat import PAT, WEEK
from pftsleep.models.transformer import PatchTransformer, n_parameters

GFLOP = {"S": 1.0, "M": 4.0, "L": 27.5} # one week, multiply-adds counted twice (reference 1.5)
TARGETS = {"S": (12, 100), "M": (35, 25), "L": (220, 4)} # p95 in ms of one week; weeks a second


def naive(m: PatchTransformer, x: torch.Tensor) -> torch.Tensor:
    "As it is written in the paper: nothing fused, everything stored."
    z = m.embed(x.unflatten(1, (-1, m.config.patch))[:, None])[:, 0]
    for b in m.blocks:
        a = b.attention
        q, k, v = (torch.nn.functional.linear(z, w, bias).unflatten(-1, (a.n_heads, -1)).transpose(1, 2) for w, bias in zip(a.qkv.weight.chunk(3), a.qkv.bias.chunk(3), strict=True))
        weights = (q * a.scale @ k.mT).softmax(-1)
        z = b.norm1(z + a.out((weights @ v).transpose(1, 2).flatten(2)))
        z = b.norm2(z + b.feed_forward(z))
    return z


def peak_gflops(dtype: torch.dtype, n: int = 1536) -> float:
    "The fastest of ten products of square matrices."
    a, times = torch.randn(n, n).to(dtype), []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times) / 1e9


def milliseconds(run, calls: int) -> np.ndarray:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return np.array(times)


@torch.no_grad()
def measure(size: str, precision: str, threads: int, calls: int, batch: int) -> dict:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    m, gen = PatchTransformer(getattr(PAT, size)).eval(), torch.Generator().manual_seed(0)
    one, many = torch.randn(1, WEEK, generator=gen), torch.randn(batch, WEEK, generator=gen)
    half = precision == "bfloat16"
    exact = m(one)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        for _ in range(3): m(one)
        single = milliseconds(lambda: m(one), calls)
        m(many)
        seconds = milliseconds(lambda: m(many), max(3, calls // (4 * batch))) / 1e3
        peak_mb, error = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, float((m(one).float() - exact).abs().max())
        turns = [(milliseconds(lambda: naive(m, one), 1)[0], milliseconds(lambda: m(one), 1)[0]) for _ in range(max(5, calls // 10))]
    gemm, (p50, p95, p99) = peak_gflops(torch.bfloat16 if half else torch.float32), np.percentile(single, (50, 95, 99))
    speed = batch / float(np.median(seconds))
    return dict(benchmark="PAT", size=size, precision=precision, parameters=n_parameters(m), threads=threads, batch=batch, calls=calls, p50_ms=round(p50, 2), p95_ms=round(p95, 2), p99_ms=round(p99, 2), fastest_ms=round(single.min(), 2),
        weeks_per_s=round(speed, 1), peak_process_mb=round(peak_mb), gemm_gflops=round(gemm), share_of_gemm_latency=round(GFLOP[size] / p50 * 1e3 / gemm, 2), share_of_gemm_batch=round(GFLOP[size] * speed / gemm, 2),
        naive_over_ours=round(float(np.median([a / b for a, b in turns])), 2), largest_error_of_tokens=round(error, 5),
        target_p95_ms=TARGETS[size][0], target_weeks_per_s=10 if (size, half) == ("L", True) else TARGETS[size][1], cpu=platform.processor() or platform.machine(), torch=torch.__version__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(GFLOP), default=list(GFLOP))
    parser.add_argument("--precisions", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--calls", type=int, default=200, help="single weeks that are timed")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--here", action="store_true", help="only the first size and precision, in this process")
    args = parser.parse_args()
    if args.here: return print(json.dumps(measure(args.sizes[0], args.precisions[0], args.threads, args.calls, args.batch)))
    for size in args.sizes:
        for precision in args.precisions:
            command = [sys.executable, __file__, "--here", "--sizes", size, "--precisions", precision, "--threads", str(args.threads), "--calls", str(args.calls), "--batch", str(args.batch)]
            print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


if __name__ == "__main__": main()
