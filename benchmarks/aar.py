"""Animal activity: one pretraining step at the default size, ours against the naive form, in seconds of the processor and peak memory of the process.

    python benchmarks/aar.py --threads 2 --windows 512

prints one JSON line per form, each from a process of its own, so that the peak memory is its own; the forms take turns, `--repeats` times, and medians are printed. `naive` is the same model with all
attention weights stored, dropout as torch has it, every patch decoded, and all windows at once, as the original does it; `ours` is what `pretrain_bouts` does (some windows at a time, dropout with
16 random bits for each value, the last block's feed-forward network and the decoder for hidden patches only), `ours bf16` with `precision="bf16"`.
Both must give the same loss without dropout. The target, for two quiet cores: at least 1.5 times faster, in half of the memory. On a busy machine look at `cpu_s`, not at `wall_s`.
"""
import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch.nn import functional as F

from pftsleep.models.aar import BoutAutoencoder, aar_config, hide, reconstruction_loss
from pftsleep.training.bouts import PretrainBouts, filling_losses

FORMS = ("naive", "ours", "ours bf16")


def naive(m: BoutAutoencoder, patches: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    "Everything stored, nothing fused."
    e, p = m.encoder, m.encoder.config.dropout if m.training else 0.
    z = (e.embedding(patches.masked_fill(masked[..., None], 0)) + e.positions).flatten(0, 1)
    for b in e.blocks:
        q, k, v = (t.transpose(1, 2) for t in b.attention.qkv(b.norm1(z)).unflatten(-1, (3, b.attention.n_heads, -1)).unbind(2))
        weights = F.dropout((q @ k.mT * b.attention.scale).softmax(-1), p)
        z = z + F.dropout(b.attention.out((weights @ v).transpose(1, 2).flatten(2)), p)
        first, _, _, second = b.feed_forward
        z = z + F.dropout(second(F.dropout(first(b.norm2(z)).relu(), p)), p)
    return m.decoder(e.norm(z)).unflatten(0, patches.shape[:2])


def step(form: str, m: BoutAutoencoder, x: torch.Tensor, optimiser: torch.optim.Optimizer) -> float: # loss
    draws = torch.Generator().manual_seed(0)
    optimiser.zero_grad()
    if form == "naive":
        patches, _, real = m.cut(x)
        masked = hide(torch.rand(patches.shape[:3], generator=draws), .5)
        loss = reconstruction_loss(naive(m, patches, masked), patches, masked, real)
        loss.backward()
        total = loss.item()
    else:
        total = 0.
        for part in filling_losses(m, x, None, PretrainBouts(precision="bf16" if "bf16" in form else "32"), draws): part.backward(); total += part.item()
    optimiser.step()
    return total


def measure(form: str, embedding: str, windows: int, threads: int) -> dict:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    m, x = BoutAutoencoder(aar_config(embedding_type=embedding)), torch.randn(windows, 3, 1000)
    optimiser = torch.optim.AdamW(m.parameters(), 1e-6)
    loss = step(form, m.eval(), x[:16], optimiser) # without dropout all forms give the same
    m.train()
    step(form, m, x[:16], optimiser)
    idle, cpu, wall = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.process_time(), time.perf_counter()
    step(form, m, x, optimiser)
    return dict(form=form, loss=loss, cpu_s=time.process_time() - cpu, wall_s=time.perf_counter() - wall, peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, idle_mib=idle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedding", choices=["linear", "conv"], default="linear")
    parser.add_argument("--windows", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--here", choices=FORMS, help="only this form, in this process")
    a = parser.parse_args()
    if a.here: return print(json.dumps(measure(a.here, a.embedding, a.windows, a.threads)))
    found: dict[str, list[dict]] = {f: [] for f in FORMS}
    for _ in range(a.repeats):
        for f in FORMS:
            command = [sys.executable, __file__, "--here", f, "--embedding", a.embedding, "--windows", str(a.windows), "--threads", str(a.threads)]
            found[f].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(a.threads)}).stdout))
    middle = lambda f, k: statistics.median(r[k] for r in found[f])
    for f in FORMS:
        print(json.dumps(dict(benchmark="AAR pretraining step", form=f, embedding=a.embedding, windows=a.windows, threads=a.threads, repeats=a.repeats, **{k: round(middle(f, k), 2) for k in ("cpu_s", "wall_s", "peak_mib", "idle_mib")},
            faster_cpu=round(middle("naive", "cpu_s") / middle(f, "cpu_s"), 2), faster_wall=round(middle("naive", "wall_s") / middle(f, "wall_s"), 2), memory_share=round(middle(f, "peak_mib") / middle("naive", "peak_mib"), 2),
            loss_difference=round(abs(middle(f, "loss") - middle("naive", "loss")), 6), target_faster=1.5, target_memory=.5, load=round(os.getloadavg()[0], 1), cpu=platform.processor() or platform.machine(), torch=torch.__version__)))


if __name__ == "__main__": main()
