"""Conversion under bad conditions: kills, full disks, broken files. The notebook shows it working; here it has to survive."""
import json
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pftsleep.data.cohorts import FOLDER
from pftsleep.data.convert import convert, dask_workers, worker_pool
from pftsleep.data.edf import write_edf
from pftsleep.data.recording import Recording, array_channel
from pftsleep.data.signals import Recipe
from pftsleep.data.store import open_store
from pftsleep.errors import PFTSleepError

RECIPE = Recipe.default(channels=("EEG", "EOG"))
START = datetime(2024, 3, 1, 22, 30)


def write_night(folder: Path, name: str, seed: int, seconds: int = 600, rates=(200, 128)) -> None:
    rng = np.random.default_rng(seed)
    eeg, eog = (array_channel(label, 20 * rng.standard_normal(int(seconds * fs)), fs=fs, unit="uV", kind=label[:3]) for label, fs in zip(("EEG C4-M1", "EOG E1-M2"), rates, strict=True))
    write_edf(Recording(name, {eeg.name: eeg, eog.name: eog}, start=START), folder / f"{name}.edf")
    (folder / f"{name}.csv").write_text("stage\n" + "\n".join(rng.choice(["W", "N1", "N2", "N3", "R"], seconds // 30)) + "\n")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for i in range(12): write_night(folder, f"n{i:02d}", i, seconds=1800)
    return folder


def contents(store) -> dict:
    return {i: (store[i].hypnogram.stages.tolist(), [c.samples().tobytes() for c in store[i].channels.values()]) for i in store}


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "store"
    with ThreadPoolExecutor(1) as pool: ledger = convert(FOLDER, source, path, RECIPE, pool)
    assert [o.status for o in ledger.outcomes] == ["done"] * 12, str(ledger)
    return contents(open_store(path))


SCRIPT = """
import sys
from pftsleep.data.cohorts import FOLDER
from pftsleep.data.convert import convert
from pftsleep.data.signals import Recipe
if __name__ == "__main__":
    print(convert(FOLDER, sys.argv[1], sys.argv[2], Recipe.default(channels=("EEG", "EOG"))))
"""


def start_convert(source, store, tmp_path, also=lambda: None):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    def prepare(): # a shell in the background hands down an ignored SIGINT
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        also()
    return subprocess.Popen([sys.executable, script, source, store], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=prepare)


def finished(store: Path) -> list[Path]: return sorted((store / "recordings").glob("*.zarr"))


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None or condition(), process.stderr.read().decode()[-2000:]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(.005)


@pytest.mark.parametrize("kill_after", [0, 1, 3, 7])
def test_killed_convert_leaves_whole_recordings_and_resumes(source, reference, tmp_path, kill_after):
    store = tmp_path / "store"
    process = start_convert(source, store, tmp_path)
    # a moment after the n-th recording appeared another one is being written
    wait_for(lambda: len(finished(store)) >= kill_after and (store / "store.json").exists(), process)
    time.sleep(.02 * kill_after)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for path in finished(store): # whatever bears a final name is complete and right
        rec = open_store(store)[path.stem]
        assert (rec.hypnogram.stages.tolist(), [c.samples().tobytes() for c in rec.channels.values()]) == reference[path.stem]
    kept = len(finished(store))
    with ThreadPoolExecutor(1) as pool: ledger = convert(FOLDER, source, store, RECIPE, pool)
    assert len(ledger.of("skipped")) == kept and not ledger.failed
    assert contents(open_store(store)) == reference
    assert not list((store / "recordings").glob(".*"))


def test_interrupt_keeps_what_is_finished(source, reference, tmp_path):
    store = tmp_path / "store"
    process = start_convert(source, store, tmp_path)
    wait_for(lambda: len(finished(store)) >= 2, process)
    os.killpg(process.pid, signal.SIGINT) # Ctrl-C reaches the whole group, as in a terminal
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and b"KeyboardInterrupt" in err
    manifest = open_store(store).manifest
    assert len(manifest) == len(finished(store)) >= 2 # the manifest knows what was finished
    with ThreadPoolExecutor(1) as pool: convert(FOLDER, source, store, RECIPE, pool)
    assert contents(open_store(store)) == reference


def test_full_disk(source, tmp_path):
    """A file-size limit stands in for a full disk: the write fails with an OSError in mid-recording."""
    store = tmp_path / "store"
    limit = lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)))
    process = start_convert(source, store, tmp_path, limit)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()[-2000:]
    assert b"0 done, 0 skipped, 12 failed" in out and b"StoreError" in out and b"free some space" in out
    assert not finished(store) and not list((store / "recordings").glob(".*"))
    with ThreadPoolExecutor(1) as pool: assert len(convert(FOLDER, source, store, RECIPE, pool).of("done")) == 12


def test_bad_files_land_in_the_ledger_and_the_rest_goes_on(tmp_path):
    folder, store = tmp_path / "files", tmp_path / "store"
    folder.mkdir()
    for i, name in enumerate(["good", "truncated_header", "truncated_data", "bad_word", "overlap", "flat", "no_channel", "empty"]): write_night(folder, name, i)
    def cut(name, n): (folder / f"{name}.edf").write_bytes((folder / f"{name}.edf").read_bytes()[:n])
    cut("truncated_header", 300); cut("empty", 0)
    cut("truncated_data", (folder / "truncated_data.edf").stat().st_size // 2)
    (folder / "bad_word.csv").write_text("stage\nW\nN2\nsleepy\n")
    (folder / "overlap.csv").write_text("onset,duration,stage\n0,60,W\n30,60,N2\n")
    flat = array_channel("EEG C4-M1", np.zeros(60_000), fs=100, unit="uV", kind="EEG")
    eog = array_channel("EOG E1-M2", np.random.default_rng(0).standard_normal(60_000), fs=100, unit="uV", kind="EOG")
    write_edf(Recording("flat", {flat.name: flat, eog.name: eog}, start=START), folder / "flat.edf")
    write_edf(Recording("no_channel", {eog.name: eog}, start=START), folder / "no_channel.edf")

    with ThreadPoolExecutor(2) as pool: ledger = convert(FOLDER, folder, store, RECIPE, pool)
    by_id = {o.id: o for o in ledger.outcomes}
    assert {i for i, o in by_id.items() if o.status == "done"} == {"good", "truncated_data"}, str(ledger)
    for name, says in {"truncated_header": "truncated_header.edf", "empty": "empty.edf", "bad_word": "sleepy", "overlap": "overlap.csv", "flat": "C4-M1", "no_channel": "EEG"}.items():
        o = by_id[name]
        assert o.status == "failed" and says in o.message and name in o.message and not o.trace, o # a trace would mean that it wasn't a PFTSleepError
    assert open_store(store).manifest["id"].tolist() == ["good", "truncated_data"]
    assert open_store(store)["truncated_data"].issues # what was missing is said
    lines = [json.loads(x) for x in (store / "ledger.jsonl").read_text().splitlines()]
    assert {x["id"] for x in lines} == set(by_id)


@pytest.mark.slow
def test_a_killed_worker_costs_nothing(source, reference, tmp_path):
    """A worker that is killed from outside (as by the kernel when memory runs out) doesn't take the run along: its nights are tried again."""
    store = tmp_path / "store"
    process = start_convert(source, store, tmp_path)
    wait_for(lambda: len(finished(store)) >= 1, process)
    children = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    workers = [p for p in children if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err.decode()[-2000:]
    assert b" 0 failed" in out, out
    assert contents(open_store(store)) == reference


DEADLY = """
import os, sys
from pftsleep.data import archives, convert as c
from pftsleep.data.cohorts import FOLDER
from pftsleep.data.signals import Recipe
from pftsleep.data.store import open_store
honest, done_before = c.prepare_night, archives._prepared
def prepare_night(night, *a): return os.kill(os.getpid(), 9) if night.id == "n03" else honest(night, *a)
def _prepared(job): return os.kill(os.getpid(), 9) if job.id == "n03" else done_before(job)
if sys.argv[3] == "convert": c.prepare_night = prepare_night
archives._prepared = _prepared
if __name__ == "__main__":
    pool = c.worker_pool(2) if sys.argv[4] == "given" else None
    if sys.argv[3] == "convert": print(c.convert(FOLDER, sys.argv[1], sys.argv[2], Recipe.default(channels=("EEG", "EOG")), pool))
    else:
        print(c.convert(FOLDER, sys.argv[1], sys.argv[2], Recipe.native()))
        print(archives.prepare(open_store(sys.argv[2]), sys.argv[2] + "2", Recipe.default(channels=("EEG", "EOG")), pool))
"""


@pytest.mark.parametrize(("what", "workers"), [("convert", "own"), *(pytest.param(*p, marks=pytest.mark.slow) for p in (("convert", "given"), ("prepare", "own"), ("prepare", "given")))])
def test_a_night_that_kills_its_worker_fails_alone(source, tmp_path, what, workers):
    (tmp_path / "deadly.py").write_text(DEADLY)
    done = subprocess.run([sys.executable, tmp_path / "deadly.py", source, tmp_path / "store", what, workers], capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "11 done, 0 skipped, 1 failed" in done.stdout and "n03: BrokenProcessPool" in done.stdout and "a worker process died" in done.stdout, done.stdout


def test_a_pool_that_is_broken_before_it_takes_a_night(tmp_path):
    "Handing out the nights fails, too; another pool does them."
    (tmp_path / "files").mkdir()
    write_night(tmp_path / "files", "a", 0)
    with worker_pool(1) as pool:
        with pytest.raises(BrokenExecutor): pool.submit(os._exit, 1).result(60)
        ledger = convert(FOLDER, tmp_path / "files", tmp_path / "store", RECIPE, pool)
    assert [(o.id, o.status) for o in ledger.outcomes] == [("a", "done")]


def test_no_identity_in_the_store(tmp_path):
    """Planted name, birth date and code of the header: nowhere in the store's bytes."""
    folder, store = tmp_path / "files", tmp_path / "store"
    folder.mkdir()
    write_night(folder, "a", 0)
    raw = bytearray((folder / "a.edf").read_bytes())
    raw[8:88] = b"MCH-0234567 F 02-MAY-1951 Haagse_Harry".ljust(80)
    raw[88:168] = b"Startdate 01-MAR-2024 PSG-1234/2002 NN Telemetry03".ljust(80)
    (folder / "a.edf").write_bytes(raw)
    with ThreadPoolExecutor(1) as pool: assert not convert(FOLDER, folder, store, RECIPE, pool).failed
    everything = b"".join(p.read_bytes() for p in store.rglob("*") if p.is_file())
    for secret in (b"Haagse", b"Harry", b"MCH-0234567", b"1951", b"PSG-1234", b"Telemetry03"): assert secret not in everything


def test_missing_source_and_unwritable_target(source, tmp_path):
    with pytest.raises(PFTSleepError, match="no such folder"): convert(FOLDER, tmp_path / "nowhere", tmp_path / "store", RECIPE)
    with pytest.raises(PFTSleepError, match="can't be made"): convert(FOLDER, source, "/dev/null/store", RECIPE)


@pytest.fixture
def dask_cluster(tmp_path):
    "A scheduler and two workers, each a process of its own as on a cluster; yields the address and the workers."
    pytest.importorskip("distributed", reason="Dask (extra `scale`) isn't installed")
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    file = tmp_path / "scheduler.json"
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler"], [sys.executable, "-m", "distributed.cli.dask_worker"]
    processes = [subprocess.Popen([*dask[0], "--port", "0", "--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(file)], **quiet)]
    try:
        processes += [subprocess.Popen([*dask[1], "--scheduler-file", str(file), "--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(tmp_path / f"w{i}")], **quiet) for i in range(2)]
        address = eventually(lambda: file.exists() and json.loads(file.read_text() or "{}").get("address"))
        from distributed import Client
        with Client(address, timeout=60) as client: client.wait_for_workers(2, timeout=120)
        yield address, processes[1:]
    finally:
        for p in processes: p.kill(); p.wait()


def eventually(what, seconds: float = 120.):
    "Whatever true value `what` gives at last."
    for _ in range(round(seconds / .05)):
        if value := what(): return value
        time.sleep(.05)
    raise TimeoutError("it didn't happen")


def test_dask_with_a_worker_that_dies(source, reference, tmp_path, dask_cluster):
    "Half way a worker is killed: the scheduler gives its nights to the other one, and the store comes out complete and identical."
    address, workers = dask_cluster
    ledger_file = tmp_path / "store" / "ledger.jsonl"

    def kill_one():
        eventually(lambda: ledger_file.exists() and len(ledger_file.read_text().splitlines()) >= 3)
        workers[0].send_signal(signal.SIGKILL)
    with ThreadPoolExecutor(1) as killer, dask_workers(address) as executor:
        killed = killer.submit(kill_one)
        ledger = convert(FOLDER, source, tmp_path / "store", RECIPE, executor)
        killed.result()
    assert workers[0].wait(10) == -signal.SIGKILL and workers[1].poll() is None
    assert not ledger.failed and len(ledger.outcomes) == 12, str(ledger)
    store = open_store(tmp_path / "store")
    assert contents(store) == reference
    assert len(store.manifest) == 12 and not list(store.recordings.glob(".*")) # nothing half-written is left of the dead worker
    with dask_workers(address) as executor: assert {o.status for o in convert(FOLDER, source, tmp_path / "store", RECIPE, executor).outcomes} == {"skipped"}


def test_no_dask_scheduler():
    pytest.importorskip("distributed", reason="Dask (extra `scale`) isn't installed")
    with pytest.raises(PFTSleepError, match="start one with `dask scheduler`"), dask_workers("nonsense://somewhere"): pass


def test_the_ledger_of_all_runs_is_a_table(tmp_path):
    files = tmp_path / "files"; files.mkdir()
    write_night(files, "good", 0)
    (files / "bad.edf").write_bytes(b"0" * 100)
    for _ in range(2): convert(FOLDER, files, tmp_path / "store", RECIPE)
    table = pd.read_parquet(tmp_path / "store" / "ledger.parquet")
    assert table["status"].tolist().count("failed") == 2 and sorted(table["status"])[0] == "done" and "skipped" in table["status"].tolist()
    assert table.loc[table["status"] == "failed", "message"].str.contains("bad.edf").all()
