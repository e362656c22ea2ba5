"""Runs every script of benchmarks/ and collects what they print, one JSON object a line, in benchmarks/results/, with the hardware named. Then makes a page of all results, build/benchmarks.md; the site has the same.

    python tools/bench.py [NAME ...]     # all, or the named ones without .py; 'night-cost' and 'night-train' are runs of night.py with other arguments
    python tools/bench.py night-cost -- --threads 1 --repeats 1    # what follows -- goes to the script
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

import bench_page
from processed import ROOT

BENCHMARKS = ROOT / "benchmarks"
MORE = {"night-train": ("night", "--train", "--precision", "float32"), "night-cost": ("night", "--lengths", "2", "4", "8", "12")} # name of the results -> script and arguments


def hardware() -> dict[str, object]:
    "What the figures were measured on."
    import torch
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    fast = [f for f in ("avx512_bf16", "amx_bf16") if cpuinfo.exists() and re.search(rf"\b{f}\b", cpuinfo.read_text())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model[1] if model else platform.processor(), "cores": cores, "bf16": " ".join(fast) or None, "memory_gib": round(memory, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "os": f"{platform.system()} {platform.machine()}", "python": platform.python_version(),
        "torch": torch.__version__, "threads": os.environ.get("OMP_NUM_THREADS")}


def measure(name: str, script: Path, arguments: list[str], about: dict[str, object]) -> bool:
    "Runs one script; its JSON lines go to a file of the name, with the machine and how busy it was. Lines of a run that failed are shown and not kept."
    print(f"{name} ...", flush=True)
    lines = []
    with subprocess.Popen([sys.executable, str(script), *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout or ():
            print(f"  {line.rstrip()}", flush=True)
            if line.lstrip().startswith("{"): lines.append({**json.loads(line), "load": round(os.getloadavg()[0], 1), "hardware": about, "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")})
    if running.returncode or not lines:
        print(f"  failed (exit status {running.returncode}, {len(lines)} figures)")
        return False
    target = BENCHMARKS / "results" / f"{name}.jsonl"
    target.parent.mkdir(exist_ok=True)
    target.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return True


def write_page() -> Path:
    target = ROOT / "build" / "benchmarks.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text(bench_page.page(BENCHMARKS / "results"))
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    given = sys.argv[1:]
    ours, theirs = (given[:given.index("--")], given[given.index("--") + 1:]) if "--" in given else (given, [])
    names = parser.parse_args(ours).names
    there = {p.stem: (p.stem,) for p in sorted(BENCHMARKS.glob("[!_]*.py"))} | MORE
    if unknown := set(names) - set(there): sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(there) or 'none'}")
    about = hardware()
    results = [measure(name, BENCHMARKS / f"{there[name][0]}.py", [*there[name][1:], *theirs], about) for name in names or there]
    print(f"{sum(results)} of {len(results)} benchmarks ran; results in {(BENCHMARKS / 'results').relative_to(ROOT)}, the page of them in {write_page().relative_to(ROOT)}")
    sys.exit(not all(results))


if __name__ == "__main__": main()
