"""Runs every script of benchmarks/ and collects what they print, one JSON object a line, in benchmarks/results/, with the hardware named.

    python tools/bench.py [NAME ...]     # all, or the named ones without .py
"""
import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from processed import ROOT

BENCHMARKS = ROOT / "benchmarks"


def hardware() -> dict[str, object]:
    "What the figures were measured on."
    import torch
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model[1] if model else platform.processor(), "cores": cores, "memory_gib": round(memory, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "os": f"{platform.system()} {platform.machine()}", "python": platform.python_version(),
        "torch": torch.__version__, "threads": os.environ.get("OMP_NUM_THREADS")}


def measure(script: Path, about: dict[str, object]) -> bool:
    "Runs one script; its JSON lines go to a file named after it."
    print(f"{script.name} ...", flush=True)
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    lines = [line for line in done.stdout.splitlines() if line.lstrip().startswith("{")]
    if done.returncode or not lines:
        print(f"  failed (exit status {done.returncode}, {len(lines)} figures)\n{done.stdout[-2000:]}")
        return False
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    target = BENCHMARKS / "results" / f"{script.stem}.jsonl"
    target.parent.mkdir(exist_ok=True)
    target.write_text("".join(json.dumps({**json.loads(line), "hardware": about, "measured": when}) + "\n" for line in lines))
    print("\n".join(f"  {line}" for line in lines))
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    there = {p.stem: p for p in sorted(BENCHMARKS.glob("[!_]*.py"))}
    if unknown := set(args.names) - set(there): sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(there) or 'none'}")
    about = hardware()
    results = [measure(there[name], about) for name in args.names or there]
    print(f"{sum(results)} of {len(results)} benchmarks ran; results in {(BENCHMARKS / 'results').relative_to(ROOT)}")
    sys.exit(not all(results))


if __name__ == "__main__": main()
