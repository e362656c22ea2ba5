"""Everything that is checked before a change is accepted; `make test` and `make test-slow` call it.

    python tools/check.py          # the checks of every change
    python tools/check.py --slow   # tests and notebook cells marked slow
    python tools/check.py --gpu    # those that need a GPU

Jobs run two at a time, each in a process of its own, the long ones first. Every job runs, whatever became of the others. Ends with the
line `N passed, M failed`: tests of pytest, notebooks, and checks together.
"""
import argparse
import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from processed import ROOT, notebooks

LOGS = ROOT / "build" / "check"
PY = sys.executable


@dataclass
class Job:
    "One command, and what came of it."
    name: str
    command: list[str] # empty for a notebook
    notebook: dict[str, str] | None = None # path, skip, force: see tools/notebooks.py
    step: str = "" # line of the summary; several jobs may share one
    timeout: float = 900 # s
    after: str = "" # name of a job that has to end first
    junit: Path | None = None # pytest's result file
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0
    note: str = ""
    done: Future = field(default_factory=Future)


def fast_jobs(logs: Path) -> list[Job]:
    return [
        Job("docs build", [PY, "docs/build.py"]),
        *(Job(f"pytest {i}", [PY, "-m", "pytest", *files, "-m", "not slow and not gpu", "--continue-on-collection-errors", f"--junitxml={logs / f'pytest-{i}.xml'}",
            "--cov=pftsleep", "--cov-report=", "--durations=15"], step="pytest", timeout=1800, after="docs build" if "tests/test_docs_site.py" in files else "", junit=logs / f"pytest-{i}.xml")
            for i, files in enumerate(halves(), 1)),
        Job("mypy", [PY, "-m", "mypy"]),
        *notebook_jobs(notebooks(), flags=""),
        Job("export in sync", [PY, "tools/sync.py", "export", "--check"]),
        Job("notebooks clean", [PY, "tools/sync.py", "clean", "--check"]),
        Job("README in sync", [PY, "tools/sync.py", "readme", "--check"]),
        Job("ruff", [PY, "-m", "ruff", "check", "."]),
    ]


LONG = {"docs_site": 130, "jobs": 90, "convert": 75, "journey": 75, "contrastive": 48, "embed": 38, "export": 32, "store": 32, "training": 32, "finetune_cli": 30, "cinc_pipeline": 25, "staging": 23, "fuzz": 22, "segments": 22, "sleepfm": 21, "registry": 21, "house": 19, "download": 19, "simulate": 19, "jobs_queue": 18, "week_requests": 18, "service_defects": 17, "service_page": 17, "events": 17, "pat": 16, "service_load": 15, "bouts": 14, "weights": 14} # s; the others take about 8


SLOW = {"scale": 200, "cinc_chain": 150, "service_inputs": 150, "animal_scripts": 150, "export": 120, "fuzz": 100, "packaging": 90, "service_load": 90, "jobs": 70, "jobs_queue": 60, "service_faults": 60, "convert": 60, "cinc_pipeline": 50, "docs_site": 45, "aar": 40} # s of the tests that are marked slow


def halves(known: dict[str, int] = LONG, otherwise: int = 8) -> list[list[str]]:
    "The files of tests in two parts that take about the same time, so that both cores have something to do."
    parts: list[list[Path]] = [[], []]
    seconds = lambda path: known.get(path.stem.removeprefix("test_"), otherwise)
    for path in sorted((ROOT / "tests").glob("test_*.py"), key=lambda p: (-seconds(p), p)): min(parts, key=lambda part: sum(map(seconds, part))).append(path)
    return sorted(([p.relative_to(ROOT).as_posix() for p in sorted(part)] for part in parts), key=lambda part: "tests/test_docs_site.py" in part) # that one waits for the site


def coverage(logs: Path) -> str: # such as '95%'; '' where nothing was measured
    found = [str(p) for p in logs.glob("coverage.*")]
    env = {**os.environ, "COVERAGE_FILE": str(logs / "all-coverage")}
    if not found or subprocess.run([PY, "-m", "coverage", "combine", "--keep", "-q", *found], cwd=ROOT, env=env).returncode: return ""
    said = subprocess.run([PY, "-m", "coverage", "report"], cwd=ROOT, env=env, capture_output=True, text=True).stdout
    (logs / "coverage.txt").write_text(said)
    return total[1] if (total := re.search(r"^TOTAL\s.*?(\d+%)", said, re.M)) else ""


def marked_jobs(logs: Path, mark: str, others: list[str]) -> list[Job]:
    "Tests with a mark, and the notebooks that have cells with the flag of that name."
    flagged = [nb for nb in notebooks() if re.search(rf'"#\s*\|\s*{mark}\b', nb.read_text())]
    selection = " and ".join([mark, *(f"not {other}" for other in others)])
    return [*(Job(f"pytest -m {mark} {i}", [PY, "-m", "pytest", *files, "-m", selection, f"--junitxml={junit}", "--durations=15"], step=f"pytest -m {mark}", timeout=5400, junit=junit)
            for i, files in enumerate(halves(SLOW, 4), 1) for junit in [logs / f"pytest-{i}.xml"]),
        *notebook_jobs(flagged, flags=mark, timeout=1800)]


def notebook_jobs(paths: list[Path], flags: str, timeout: float = 300) -> list[Job]:
    "Longest first, going by size, since the last job to start decides when all are done."
    import configparser
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf8")
    skip = config["DEFAULT"]["tst_flags"]
    names = [p.relative_to(ROOT).as_posix() for p in sorted(paths, key=lambda p: -p.stat().st_size)]
    return [Job(name, [], dict(path=name, skip=skip, force=flags), step="notebooks", timeout=timeout) for name in names]


ENV = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PFTSLEEP_SITE": str(ROOT / "_docs")}
OWN = threading.local() # of each thread that runs jobs: the process that executes its notebooks


def executor() -> subprocess.Popen:
    "The process that forks notebooks for this thread; a new one when the last has died."
    if (process := getattr(OWN, "process", None)) is None or process.poll() is not None:
        OWN.process = process = subprocess.Popen([PY, "tools/notebooks.py"], cwd=ROOT, env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) # unbuffered, for `select`
    return process


def run_notebook(job: Job, log: Path) -> int: # exit status; -1 when it was stopped
    process = executor()
    process.stdin.write(json.dumps(job.notebook | {"log": str(log)}).encode() + b"\n")
    pid = int(process.stdout.readline())
    if select.select([process.stdout], [], [], job.timeout)[0]: code = int(process.stdout.readline())
    else: job.note, code = f"stopped after {job.timeout:g} s", -1
    with contextlib.suppress(ProcessLookupError): os.killpg(pid, signal.SIGKILL) # and what it left behind
    if code == -1: process.stdout.readline()
    return code


def run(job: Job, jobs: dict[str, Job], logs: Path) -> None:
    if job.after in jobs: jobs[job.after].done.result()
    started = time.monotonic()
    log = logs / (re.sub(r"\W+", "-", job.name) + ".log")
    code = run_notebook(job, log) if job.notebook else run_command(job, log, logs)
    job.seconds = time.monotonic() - started
    judge(job, code)
    report(job, log)


def run_command(job: Job, log: Path, logs: Path) -> int: # exit status; -1 when it was stopped
    env = ENV | {"COVERAGE_FILE": str(logs / f"coverage.{log.stem}")}
    with log.open("w") as out:
        process = subprocess.Popen(job.command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try: code = process.wait(job.timeout)
        except subprocess.TimeoutExpired:
            code, job.note = -1, f"stopped after {job.timeout:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL) # and what it left behind
            process.wait()
    return code


def judge(job: Job, code: int) -> None:
    "Counts what passed; a job that ends badly fails at least once, whatever it counted."
    if job.junit is None: job.passed, job.failed = int(code == 0), int(code != 0)
    elif job.junit.exists():
        for case in ET.parse(job.junit).iter("testcase"):
            kinds = {child.tag for child in case}
            if kinds & {"failure", "error"}: job.failed += 1
            elif "skipped" in kinds: job.skipped += 1
            else: job.passed += 1
        job.note = job.note or (f"{job.skipped} skipped" if job.skipped else "")
    nothing_selected = job.junit is not None and code == 5
    if code != 0 and not job.failed and not nothing_selected: job.failed = 1


def report(job: Job, log: Path) -> None:
    word = "FAIL" if job.failed else "ok"
    print(f"{word:4}  {job.name:44}  {job.seconds:6.1f} s  {job.note}", flush=True)
    if not job.failed: return
    text = log.read_text(errors="replace").splitlines()
    told = failures(job) or text[-150:]
    for line in told: print(f"      | {line[:300]}")
    print(f"      (all of it: {os.path.relpath(log)})", flush=True)


def failures(job: Job) -> list[str]:
    "Name and end of the traceback of each test that failed; the rest of a log of pytest is warnings and coverage."
    if job.junit is None or not job.junit.exists(): return []
    bad = [(case, child) for case in ET.parse(job.junit).iter("testcase") for child in case if child.tag in ("failure", "error")]
    return [line for case, child in bad[:20] for line in (f"FAILED {case.get('classname')}::{case.get('name')}", *(child.text or "").splitlines()[-25:])]


def skipped_tests(jobs: list[Job]) -> list[str]:
    reasons: dict[str, int] = {}
    for job in jobs:
        if job.junit is None or not job.junit.exists(): continue
        for skip in ET.parse(job.junit).iter("skipped"):
            reason = skip.get("message") or "no reason given"
            reasons[reason] = reasons.get(reason, 0) + 1
    return [f"{n:4} skipped: {reason}" for reason, n in sorted(reasons.items())]


def summary(jobs: list[Job], seconds: float) -> int: # how many failed
    print(f"\n{'step':24} {'passed':>7} {'failed':>7} {'seconds':>8}")
    steps = list(dict.fromkeys(job.step or job.name for job in jobs))
    for step in steps:
        own = [job for job in jobs if (job.step or job.name) == step]
        bad = [Path(job.name).name for job in own if job.failed and job.step]
        note = ", ".join(bad) if bad else next((j.note for j in own if j.note), "")
        print(f"{step:24} {sum(j.passed for j in own):7} {sum(j.failed for j in own):7} {sum(j.seconds for j in own):8.1f}  {note}")
    print(f"{'(by the clock)':24} {'':7} {'':7} {seconds:8.1f}")
    for line in skipped_tests(jobs): print(line)
    for job in jobs:
        for line in failures(job):
            if line.startswith("FAILED"): print(line[:300])
    passed, failed = sum(j.passed for j in jobs), sum(j.failed for j in jobs)
    print(f"\n{passed} passed, {failed} failed", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", action="store_true", help="what is marked slow, in place of the usual checks")
    parser.add_argument("--gpu", action="store_true", help="what needs a GPU, in place of the usual checks")
    parser.add_argument("--workers", type=int, default=2, help="jobs at a time")
    args = parser.parse_args()
    os.chdir(ROOT)
    logs = LOGS / ("slow" if args.slow else "gpu" if args.gpu else "test")
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    jobs = marked_jobs(logs, "slow", ["gpu"]) if args.slow else marked_jobs(logs, "gpu", []) if args.gpu else fast_jobs(logs)
    by_name = {job.name: job for job in jobs}
    begun = time.monotonic()
    with ThreadPoolExecutor(args.workers) as pool:
        def finish(job: Job) -> None:
            try: run(job, by_name, logs)
            except Exception as e:
                job.failed, job.note = max(job.failed, 1), f"{type(e).__name__}: {e}"
                print(f"FAIL  {job.name}: {job.note}", flush=True)
            finally: job.done.set_result(None)
        list(pool.map(finish, jobs))
    if covered := coverage(logs): print(f"\ncoverage {covered}")
    sys.exit(bool(summary(jobs, time.monotonic() - begun)))


if __name__ == "__main__": main()
