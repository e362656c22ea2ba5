"""SleepFM in inference, against its plain published architecture in eager mode. Prints JSON lines.

    python benchmarks/sleepfm.py [--threads 1] [--repeats 3]     # both parts
    python benchmarks/sleepfm.py --part 2024                     # three encoders, 96 epochs of 30 s, in batches of 8 and of 32
    python benchmarks/sleepfm.py --part clinical                 # 14 channels, one night of 8 h

Times are CPU seconds of the process, since other work may share the machine; the fastest of the repeats. Each way runs in a process of its own, so that the peak memory is its own, and with an allocator that keeps what it has (as the
reference was measured; without that the naive way is slower still). Weights are random, which costs the same. The naive clinical way calls the encoder for each modality and four windows at a time, with torch's own transformer layers and their
fused inference path. `apart` is the largest difference between what the two ways give, as a share of the largest value; the clinical seconds are without pooling five minutes, which staging doesn't need, and `pooled_cpu_s` is with it.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from pftsleep.models.set_transformer import SetConfig, SetTransformer, Tokenizer
from pftsleep.models.sleepfm import PUBLISHED_CHANNELS, SleepFMConfig, SleepFMEncoder

MONTAGE = {"BAS": 5, "RESP": 6, "EKG": 1, "EMG": 2}
KEEP = dict(MALLOC_MMAP_THRESHOLD_="4000000000", MALLOC_TRIM_THRESHOLD_="8000000000", MALLOC_TOP_PAD_="67108864")


def shaken(net):
    "Norms away from the zeros and ones that they begin with, so that the outputs differ."
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d): m.running_mean.normal_(std=.1); m.running_var.uniform_(.1, .2)
    return net.eval()


def naive_2024(net: SleepFMEncoder, x):
    "Layer by layer, as it was published."
    x = net.b0(net.stage1(x))
    for i in range(2, 9):
        x, _ = getattr(net, f"stage{i}")(x)
        if i in (3, 6): x = F.max_pool1d(x, 3, 1, 1)
    return net.fc(net.drop(F.relu(net.stage9(x).mean(-1))))


class NaiveClinical(nn.Module):
    "Torch's own layers under the published names."
    def __init__(self, c: SetConfig):
        super().__init__()
        layer = lambda heads, first: nn.TransformerEncoderLayer(c.d_model, heads, c.d_ff, c.dropout, batch_first=True, norm_first=first)
        self.patch_embedding = Tokenizer(c)
        self.spatial_pooling, self.temporal_pooling = nn.Module(), nn.Module()
        self.spatial_pooling.transformer_layer, self.temporal_pooling.transformer_layer = layer(c.pooling_heads, False), layer(c.pooling_heads, False)
        self.positional_encoding, self.layer_norm = nn.Module(), nn.LayerNorm(c.d_model)
        self.positional_encoding.register_buffer("pe", torch.zeros(1, c.max_patches_in_window, c.d_model))
        self.transformer_encoder = nn.TransformerEncoder(layer(c.n_heads, True), c.n_layers, enable_nested_tensor=False)

    def forward(self, x, pad): # [B,C,T], [B,C]
        b, c, s = x.shape[0], x.shape[1], x.shape[2] // 640
        tokens = self.patch_embedding.tokenizer(x.reshape(b * c * s, 1, 640)).reshape(b, c, s, -1)
        if c == 1: mixed = tokens[:, 0]
        else:
            hidden = pad.unsqueeze(1).expand(b, s, c).reshape(b * s, c)
            sets = self.spatial_pooling.transformer_layer(tokens.transpose(1, 2).reshape(b * s, c, -1), src_key_padding_mask=hidden)
            keep = (~hidden).float().unsqueeze(-1)
            mixed = ((sets * keep).sum(1) / keep.sum(1).clamp(min=1)).reshape(b, s, -1)
        out = self.transformer_encoder(self.layer_norm(mixed + self.positional_encoding.pe[:, :s]))
        return self.temporal_pooling.transformer_layer(out).mean(1), out


def best(f, repeats: int) -> float:
    "CPU seconds; the first run is not counted."
    took = []
    for _ in range(repeats + 1):
        start = time.process_time(); f(); took.append(time.process_time() - start)
    return min(took[1:])


def relative(a, b) -> float: return float(f"{float((a - b).abs().max() / b.abs().max()):.1e}")
def peak_mib() -> float: return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1) # KiB on Linux


def part_2024(way: str, batch: int, repeats: int) -> tuple[dict, torch.Tensor]:
    torch.manual_seed(0)
    nets = [shaken(SleepFMEncoder(SleepFMConfig.published(m))) for m in PUBLISHED_CHANNELS]
    xs = [torch.randn(96, len(net.config.channels), 7680) for net in nets]
    if way == "naive": run = lambda: torch.stack([torch.cat([naive_2024(net, part) for part in x.split(batch)]) for net, x in zip(nets, xs, strict=True)])
    else: run = lambda: torch.stack([net(x) for net, x in zip(nets, xs, strict=True)])
    out = run()
    took = best(run, repeats)
    return dict(benchmark="SleepFM 2024, three encoders", way=way, batch=batch if way == "naive" else "its own", epochs=96, cpu_s=round(took, 3), epochs_per_cpu_s=round(96 / took, 1)), out


def part_clinical(way: str, hours: float, repeats: int) -> tuple[dict, torch.Tensor]:
    torch.manual_seed(0)
    names = [f"{m} {i}" for m, n in MONTAGE.items() for i in range(n)]
    model = shaken(SetTransformer(SetConfig(tuple(names), tuple(n.split()[0] for n in names), upstream=True)))
    x = torch.randn(1, len(names), round(hours * 12) * 38400)
    if way == "naive":
        naive, windows = NaiveClinical(model.config).eval(), x[0].unflatten(-1, (-1, 38400)).transpose(0, 1)
        naive.load_state_dict(model.state_dict())
        slices = [slice(sum(list(MONTAGE.values())[:i]), sum(list(MONTAGE.values())[:i + 1])) for i in range(4)]
        def run():
            done = [[naive(part[:, i], torch.zeros(part[:, i].shape[:2], dtype=torch.bool)) for part in windows.split(4)] for i in slices]
            return torch.stack([torch.cat([s for _, s in d]).flatten(0, 1) for d in done])[None]
        full = run
    else:
        run, full = lambda: model.encode(x).values, lambda: model.pool_windows(model.encode(x)).values
    out = run()
    took = best(run, repeats)
    return dict(benchmark="SleepFM-clinical, one night", way=way, channels=len(names), hours=hours, cpu_s=round(took, 2), pooled_cpu_s=round(best(full, repeats), 2) if way != "naive" else round(took, 2),
        peak_mib=peak_mib(), input_mib=round(x.nbytes / 2**20, 1)), out


def one(args) -> None:
    torch.set_num_threads(args.threads)
    with torch.inference_mode(): line, out = part_2024(args.way, args.batch, args.repeats) if args.part == "2024" else part_clinical(args.way, args.hours, args.repeats)
    torch.save(out.clone(), args.to)
    print(json.dumps(line | dict(threads=args.threads, torch=torch.__version__)))


def alone(args, folder: str, way: str, part: str, *more) -> tuple[dict, torch.Tensor]:
    "One way in a process of its own."
    to = str(Path(folder) / "out.pt")
    command = [sys.executable, __file__, "--part", part, "--way", way, "--threads", str(args.threads), "--repeats", str(args.repeats), "--hours", str(args.hours), "--to", to, *map(str, more)]
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | KEEP | dict(OMP_NUM_THREADS=str(args.threads), OMP_WAIT_POLICY="PASSIVE")).stdout.strip()
    print(text, flush=True)
    return json.loads(text), torch.load(to, weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["2024", "clinical"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hours", type=float, default=8.)
    parser.add_argument("--way", choices=["naive", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=8, help=argparse.SUPPRESS)
    parser.add_argument("--to", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way: return one(args)
    with tempfile.TemporaryDirectory() as folder:
        if args.part != "clinical":
            ours, mine = alone(args, folder, "ours", "2024")
            for batch in (1, 8, 32):
                naive, theirs = alone(args, folder, "naive", "2024", "--batch", batch)
                print(json.dumps(dict(benchmark="SleepFM 2024, ours / naive", batch=batch, speed_ratio=round(naive["cpu_s"] / ours["cpu_s"], 2), apart=relative(mine, theirs))), flush=True)
        if args.part != "2024":
            (ours, mine), (naive, theirs) = alone(args, folder, "ours", "clinical"), alone(args, folder, "naive", "clinical")
            print(json.dumps(dict(benchmark="SleepFM-clinical, ours / naive", cpu_share=round(ours["cpu_s"] / naive["cpu_s"], 2), pooled_cpu_share=round(ours["pooled_cpu_s"] / naive["cpu_s"], 2), apart=relative(mine, theirs))), flush=True)


if __name__ == "__main__": main()
