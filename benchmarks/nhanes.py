"""From a SAS transport file of minutes to weeks: minute-rows per second of one core, and memory, beside pandas. Prints one JSON line per measurement.

    python benchmarks/nhanes.py [--people 40 160] [--repeats 3] [--store 10]

The files are simulated in the survey's layout, PAXMIN (119 bytes a row) and PAXRAW, for a few and for many people: memory should be the same for both. Each way runs in a process of its own, with one thread.

    read        the columns that a week needs, as arrays, with `read_xpt`
    recordings  one `Recording` per person
    weeks       cut at midnight and written to one file, with `write_weeks`: what training reads
    store       one zarr group per person, with `convert_nhanes`; of the first `--store` people only, since files cost most here
    pandas      `pandas.read_sas` in pieces of as many rows, nothing done with them

`cpu_rows_s` counts processor time, which other work on the machine disturbs less than the clock's; `spread` is the range over the repeats. `ratio` is `cpu_rows_s` over that of pandas in the same run. `peak_mib` counts everything, Python
and the libraries included (`imports_mib`). Files are read from the page cache.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1" # before numpy is loaded

import pandas as pd

from pftsleep.data.nhanes import CHUNK, COUNT_COLUMNS, MIMS_COLUMNS, convert_nhanes, nhanes_recordings, nhanes_weeks, read_xpt, write_weeks
from pftsleep.data.simulate_nhanes import simulate_nhanes

WAYS = ("pandas", "read", "recordings", "weeks")


def peak() -> float: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 # KiB on Linux


def work(way: str, path: Path, out: Path) -> None:
    warnings.simplefilter("ignore") # pandas announces another default
    if way == "pandas": sum(len(t) for t in pd.read_sas(path, format="xport", chunksize=CHUNK))
    if way == "read": sum(len(t) for t in read_xpt(path, COUNT_COLUMNS if path.stem.startswith("PAXRAW") else MIMS_COLUMNS))
    if way == "recordings": sum(r["Activity"].n_samples for r in nhanes_recordings(path))
    if way == "weeks": write_weeks(nhanes_weeks(path), out / "weeks.h5")
    if way == "store" and convert_nhanes(path, out / f"store{time.time_ns()}").failed: sys.exit("somebody failed")


def measure(way: str, path: Path, rows: int, repeats: int) -> dict:
    imports, rates, walls = peak(), [], []
    with tempfile.TemporaryDirectory() as out:
        for _ in range(repeats):
            began, used = time.perf_counter(), time.process_time()
            work(way, path, Path(out))
            rates.append(rows / (time.process_time() - used)); walls.append(rows / (time.perf_counter() - began))
    rates, walls = sorted(rates), sorted(walls)
    return dict(cpu_rows_s=round(rates[len(rates) // 2]), spread=[round(rates[0]), round(rates[-1])], rows_s=round(walls[len(walls) // 2]), peak_mib=round(peak()), imports_mib=round(imports))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--people", type=int, nargs="+", default=[40, 160])
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--store", type=int, default=10)
    p.add_argument("--one", nargs=3, metavar=("WAY", "FILE", "ROWS"), help="only this one, in this process")
    args = p.parse_args()
    if args.one: return print(json.dumps(measure(args.one[0], Path(args.one[1]), int(args.one[2]), args.repeats)))
    for people in [*args.people, args.store]:
        for cycle in ("H", "D"):
            with tempfile.TemporaryDirectory() as d:
                worn = int(simulate_nhanes(d, cycle, people)["worn"].sum())
                path, rows = next(Path(d).glob("PAXRAW*" if cycle == "D" else "PAXMIN*")), worn * (10080 if cycle == "D" else 11528)
                base = None
                for way in ("store",) if people == args.store else WAYS:
                    command = [sys.executable, __file__, "--repeats", str(args.repeats), "--one", way, str(path), str(rows)]
                    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                    base = base or found["cpu_rows_s"]
                    print(json.dumps(dict(benchmark="nhanes", way=way, file=path.name, people=worn, rows=rows, mib=round(path.stat().st_size / 2**20)) | found | (dict(ratio=round(found["cpu_rows_s"] / base, 2)) if way != "store" else {})), flush=True)


if __name__ == "__main__": main()
