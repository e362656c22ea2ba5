"""What it costs to import parts of the library, each in a fresh process: seconds, whether torch came along, and how that compares with numpy alone and with torch alone.

    python benchmarks/imports.py [MODULE ...]
"""
import argparse
import json
import subprocess
import sys
from statistics import median

MODULES = ["numpy", "pandas", "torch", "pftsleep", "pftsleep.data.edf", "pftsleep.data.hypnograms", "pftsleep.data.store", "pftsleep.data.convert", "pftsleep.evaluation.sleep_stats", "pftsleep.apps.cli", "pftsleep.models.stager"]
CODE = "import sys, time\nt = time.perf_counter()\nimport importlib\nimportlib.import_module(sys.argv[1])\nprint(time.perf_counter() - t, 'torch' in sys.modules)"


def once(module: str) -> tuple[float, bool]:
    out = subprocess.run([sys.executable, "-c", CODE, module], capture_output=True, text=True, check=True).stdout.split()
    return float(out[0]), out[1] == "True"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=MODULES)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    runs: dict[str, list[tuple[float, bool]]] = {m: [] for m in dict.fromkeys(["numpy", "torch", *args.modules])}
    for _ in range(args.repeats):
        for m in runs: runs[m].append(once(m)) # in turns, so that a busy minute hits all of them
    of = {m: median(t for t, _ in found) for m, found in runs.items()}
    for m, found in runs.items():
        times = [t for t, _ in found]
        print(json.dumps(dict(benchmark="import", module=m, seconds=round(of[m], 3), fastest=round(min(times), 3), slowest=round(max(times), 3), torch=found[0][1], times_numpy=round(of[m] / of["numpy"], 2),
            of_torch=round(of[m] / of["torch"], 2))), flush=True)


if __name__ == "__main__": main()
