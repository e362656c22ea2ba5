"""One 8-h night through the published PFTSleep encoder and probe: ours beside the original's way of attention. Prints one JSON line per way, and their ratios.

    python benchmarks/night.py [--threads 2] [--repeats 3] [--precision float32 bf16]
    python benchmarks/night.py --train --precision float32         # a training step of the encoder, with padding: plain, and `frugal`
    python benchmarks/night.py --lengths 2 4 8 12                  # the encoder at these lengths (hours) and with 1 to 7 channels, for each preset

Weights are random, of the published size (14.6 M and 49.3 M parameters); the input is noise, its last half hour padding. The naive way keeps a table of scores for all channels and heads and adds it to the next layer's, as the original
does; everything else is the same module. `_s` are seconds of the clock, `_cpu_s` of the processor: where other programs run beside, only the latter tell something, best with one thread. Each way runs in a process of its own, so that its peak memory is its own; `peak_mib` counts everything, `idle_mib` is what Python, the weights and the input take.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from pftsleep.models import transformer
from pftsleep.models.head_parts import Head, HeadConfig
from pftsleep.models.transformer import Attention, PatchConfig, PatchTransformer, Reconstruction, n_parameters, rotate

T = 3_600_000 # samples: 8 h at 125 Hz


def naive_attention(self, x, pad=None, angle=None, past=None, return_attention=False):
    "As the original: a table of scores for each channel and head, kept for the next layer."
    q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
    if angle is not None: q, k = rotate(q, angle), rotate(k, angle)
    scores = q @ k.mT * self.scale
    if past is not None and self.residual: scores = scores + past
    if pad is not None: scores.masked_fill_(pad[:, None, None], -torch.inf)
    weights = scores.softmax(-1)
    if pad is not None: weights = weights.masked_fill(pad[:, None, None], 0)
    return self.out((weights @ v).transpose(1, 2).flatten(2)), scores, None


def memory(what: str) -> float: # MiB of this program; 'VmHWM' is its peak
    return round(int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0]) / 1024, 1)


@torch.inference_mode()
def measure(way: str, precision: str, threads: int, repeats: int) -> dict:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    encoder, head = PatchTransformer(PatchConfig.pftsleep()).eval(), Head(HeadConfig.pftsleep()).eval()
    if way == "naive": Attention.forward, transformer.by_rows = naive_attention, lambda *_: False
    x, pad = torch.randn(1, 7, T), torch.zeros(1, T, dtype=torch.bool)
    pad[:, -125 * 1800:] = True
    idle, took = memory("VmRSS"), {"encoder": [], "probe": [], "encoder_cpu": [], "probe_cpu": []}
    for _ in range(repeats + 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            began, busy = time.perf_counter(), time.process_time(); tokens = encoder.encode(x, pad)
            took["encoder"].append(time.perf_counter() - began); took["encoder_cpu"].append(time.process_time() - busy)
            began, busy = time.perf_counter(), time.process_time(); logits = head(tokens)
            took["probe"].append(time.perf_counter() - began); took["probe_cpu"].append(time.process_time() - busy)
    facts = {f"{k}_s": round(statistics.median(v[1:] or v), 2) for k, v in took.items()} | {f"{k}_spread_s": round(max(v[1:] or v) - min(v[1:] or v), 2) for k, v in took.items()}
    return dict(benchmark="night", way=way, precision=precision, threads=threads, repeats=repeats, **facts, total_s=round(facts["encoder_s"] + facts["probe_s"], 2), idle_mib=idle, peak_mib=memory("VmHWM"),
        check=logits.double().square().sum().item(), torch=torch.__version__)


def step(frugal: bool, precision: str, threads: int, repeats: int) -> dict:
    "One training step of the encoder and its reconstruction: forward, backward, AdamW, at batch 1 with padding."
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    encoder, decoder = PatchTransformer(PatchConfig.pftsleep()).frugal(frugal), Reconstruction(PatchConfig.pftsleep())
    optimiser = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()])
    x, pad = torch.randn(1, 7, T), torch.zeros(1, T, dtype=torch.bool)
    pad[:, -125 * 1800:] = True
    idle, took, worked = memory("VmRSS"), [], []
    for _ in range(repeats):
        began, busy = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            patches, hidden = encoder.patches(x, pad)
            loss = (decoder(encoder.run(encoder.embed(patches), hidden)) - patches.detach()).square().mean(-1)[~hidden].mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        took.append(time.perf_counter() - began); worked.append(time.process_time() - busy)
    return dict(benchmark="training step", frugal=frugal, precision=precision, threads=threads, repeats=repeats, step_s=round(statistics.median(took), 2), step_cpu_s=round(statistics.median(worked), 2), idle_mib=idle, peak_mib=memory("VmHWM"), loss=round(loss.item(), 5),
        torch=torch.__version__)


@torch.inference_mode()
def cost(preset: str, hours: float, channels: int, precision: str, threads: int, repeats: int) -> dict:
    "The encoder alone, at another length and number of channels."
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    names, settings = tuple(f"channel {i}" for i in range(channels)), dict(max_patches=round(hours * 600)) if preset == "pftsleep" else {}
    encoder = PatchTransformer(getattr(PatchConfig, preset)(channels=names, rate=125., **settings)).eval()
    x, idle, took, worked = torch.randn(1, channels, round(hours * 3600 * 125)), memory("VmRSS"), [], []
    for _ in range(repeats):
        began, busy = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"): encoder.encode(x)
        took.append(time.perf_counter() - began); worked.append(time.process_time() - busy)
    return dict(benchmark="cost", preset=preset, hours=hours, channels=channels, precision=precision, threads=threads, repeats=repeats, parameters=n_parameters(encoder), encoder_s=round(statistics.median(took), 2),
        encoder_cpu_s=round(statistics.median(worked), 2), idle_mib=idle, peak_mib=memory("VmHWM"), torch=torch.__version__)


def alone(*args) -> str: # one line of JSON
    "This program with other arguments, in a process of its own."
    return subprocess.run([sys.executable, __file__, *map(str, args)], check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", nargs="+", choices=["float32", "bf16"], default=["float32", "bf16"])
    parser.add_argument("--way", choices=["naive", "ours"], help="only this one, in this process")
    parser.add_argument("--train", action="store_true", help="a training step instead, plain and frugal")
    parser.add_argument("--lengths", type=float, nargs="+", metavar="HOURS", help="the encoder's cost at these lengths instead, and with 1, 2, 4 and 7 channels at the first of them")
    parser.add_argument("--presets", nargs="+", choices=["tiny", "base", "pftsleep"], default=["tiny", "base", "pftsleep"], help="whose cost")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    same = ("--threads", args.threads, "--repeats", args.repeats)
    if args.one and args.one[0] == "step": return print(json.dumps(step(args.one[1] == "frugal", args.precision[0], args.threads, args.repeats)))
    if args.one: return print(json.dumps(cost(args.one[0], float(args.one[1]), int(args.one[2]), args.precision[0], args.threads, args.repeats)))
    if args.train:
        for kind in ("plain", "frugal"): print(alone("--one", "step", kind, "--precision", args.precision[0], *same), flush=True)
        return
    if args.lengths:
        for preset in args.presets:
            for hours, channels in dict.fromkeys([*((h, 7) for h in args.lengths), *((args.lengths[0], c) for c in (1, 2, 4, 7))]):
                for p in args.precision: print(alone("--one", preset, hours, channels, "--precision", p, *same), flush=True)
        return
    if args.way: return print(json.dumps(measure(args.way, args.precision[0], args.threads, args.repeats)))
    found = {}
    for way, precision in [("naive", "float32"), *(("ours", p) for p in args.precision)]:
        text = alone("--way", way, "--precision", precision, *same)
        print(text, flush=True)
        found[way, precision] = json.loads(text)
    base = found["naive", "float32"]
    for (way, precision), f in found.items():
        if way == "naive": continue
        if abs(f["check"] / base["check"] - 1) > (1e-3 if precision == "float32" else .1): raise SystemExit(f"the two ways disagree: {base['check']} and {f['check']}")
        print(json.dumps(dict(benchmark="night", what=f"naive float32 / ours {precision}", encoder_ratio=round(base["encoder_s"] / f["encoder_s"], 2), encoder_cpu_ratio=round(base["encoder_cpu_s"] / f["encoder_cpu_s"], 2), total_ratio=round(base["total_s"] / f["total_s"], 2),
            memory_ratio=round(base["peak_mib"] / f["peak_mib"], 2))), flush=True)


if __name__ == "__main__": main()
