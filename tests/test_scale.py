"""Several processes, lost processes, large cohorts: what a run on a cluster relies on. Two processes of this machine (gloo) stand in for GPUs."""
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pftsleep.data.cohorts import FOLDER
from pftsleep.data.convert import convert, dask_workers
from pftsleep.data.datasets import WindowDataset
from pftsleep.data.edf import write_edf
from pftsleep.data.recording import Hypnogram, Recording, array_channel
from pftsleep.data.samplers import step_generator
from pftsleep.data.signals import Recipe
from pftsleep.data.splits import make_split
from pftsleep.data.store import create_store, find_damage, manifest_row, open_store
from pftsleep.models.transformer import PatchConfig, PatchTransformer
from pftsleep.training.losses import patch_loss
from pftsleep.training.pretrain import MaskedPretraining, PretrainConfig
from pftsleep.training.runs import _global_norms, fit, history, seeded, weights_hash

ROOT, CHANNELS = Path(__file__).parents[1], ("EEG", "EOG")
LEARN = dict(channels=CHANNELS, patch_seconds=2., mask_block=2, accelerator="cpu", loggers=())
PADDING = ("equal", "unequal", "nothing")
DESIGNS = dict(tiny=dict(), batch=dict(norm="batch"), base=dict(preset="base", d_model=32, n_heads=4, d_ff=64, n_layers=2), original=dict(norm="batch", pre_norm=False, final_norm=False, residual_attention=True, embedding="per_channel"))


def task_of(design: str, region=.1, **learn) -> MaskedPretraining:
    settings = dict(d_model=16, n_layers=2, dropout=0.) | DESIGNS[design]
    config = PatchConfig.tiny if settings.pop("preset", "tiny") == "tiny" else PatchConfig.base
    with seeded(0): return MaskedPretraining(PatchTransformer(config(CHANNELS, 50., patch=100, **settings)), PretrainConfig(region=region, **LEARN | learn))


def batch_of(rank: int, padding: str) -> dict:
    "Two recordings of 40 patches; on the second process they may be shorter, or nothing at all."
    x, pad = torch.randn(2, 2, 4000, generator=torch.Generator().manual_seed(rank)) * (1 + rank), torch.zeros(2, 2, 4000, dtype=torch.bool)
    if rank and padding == "unequal": pad[0, :, 500:], pad[1, 0], pad[1, 1, 2000:] = True, True, True
    if rank and padding == "nothing": pad[:] = True
    return dict(x=x.masked_fill(pad, 0), pad=pad)


def gradients(task) -> dict: return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in task.named_parameters() if p.requires_grad}


# ---- gradients: two processes against one ----

class Step(torch.nn.Module): # DDP looks at `forward`
    def __init__(self, task): super().__init__(); self.task = task
    def forward(self, batch, generator): return self.task.batch_loss(batch, generator)


def work(rank: int, folder: Path) -> None:
    "What each of two processes does: one step of every design, with every padding."
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    found = {}
    for design in DESIGNS:
        for padding in PADDING:
            batchwise = DESIGNS[design].get("norm") == "batch"
            task = task_of(design, **dict(region="all", mask_ratio=0.) if batchwise else {}).train()
            with _global_norms(task):
                step = torch.nn.parallel.DistributedDataParallel(Step(task))
                loss = step(batch_of(rank, padding), step_generator(0, 0, f"train {rank}"))
                loss.backward()
            found[f"{design} {padding}"] = dict(loss=loss.detach(), gradients=gradients(task), buffers={n: b.clone() for n, b in task.named_buffers()})
    torch.distributed.barrier()
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    processes = [subprocess.Popen([sys.executable, __file__, "work", str(rank), str(folder)], stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}) for rank in range(2)]
    try: errors = [p.communicate(timeout=240)[1] for p in processes]
    finally:
        for p in processes: p.kill()
    assert not any(p.returncode for p in processes), "".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def alone(design: str, padding: str) -> tuple[MaskedPretraining, torch.Tensor]:
    "One process that has both batches: the loss over all of their patches, with the masks that the two processes drew."
    batches = [batch_of(rank, padding) for rank in range(2)]
    if DESIGNS[design].get("norm") == "batch": # its statistics need all in one go
        task = task_of(design, region="all", mask_ratio=0.).train()
        loss = task.batch_loss({k: torch.cat([b[k] for b in batches]) for k in ("x", "pad")}, torch.Generator())
    else:
        task = task_of(design).train()
        parts = [task.predict(b["x"], b["pad"], step_generator(0, 0, f"train {rank}")) for rank, b in enumerate(batches)]
        loss = patch_loss(*map(torch.cat, zip(*parts, strict=True)), task.config.kind, task.config.region)
    loss.backward()
    return task, loss.detach()


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("design", DESIGNS)
def test_two_processes_give_the_gradient_of_one(two, design, padding):
    "Also where one of them has less signal, or none at all; with batch norm too, since its statistics are shared."
    task, loss = alone(design, padding)
    wanted, (first, second) = gradients(task), (found[f"{design} {padding}"] for found in two)
    size, within = max(g.abs().max() for g in wanted.values()), 1e-5 if DESIGNS[design].get("norm") == "batch" else 1e-6 # a variance is summed in another order
    assert size > 1e-3
    for name, g in wanted.items():
        assert torch.equal(first["gradients"][name], second["gradients"][name]), name
        torch.testing.assert_close(first["gradients"][name], g, rtol=within, atol=within * max(1., size.item()), msg=lambda m, name=name: f"{name}: {m}")
    assert (first["loss"] + second["loss"]).item() / 2 == pytest.approx(loss.item(), rel=1e-6)
    if padding == "nothing": assert second["loss"] == 0 and all(torch.isfinite(g).all() for g in second["gradients"].values())
    for name, b in task.named_buffers(): torch.testing.assert_close(first["buffers"][name], b, rtol=1e-5, atol=1e-6)


def test_the_mean_of_means_would_be_another_gradient():
    "The test above can fail: averaging each process's own mean is off by far more than rounding."
    task, _ = alone("tiny", "unequal")
    wanted, other = gradients(task), task_of("tiny").train()
    sum(other.batch_loss(batch_of(rank, "unequal"), step_generator(0, 0, f"train {rank}")) / 2 for rank in range(2)).backward()
    off = max((wanted[n] - g).abs().max() for n, g in gradients(other).items()) / max(g.abs().max() for g in wanted.values())
    assert off > .05


def test_norms_are_ordinary_again_afterwards():
    task = task_of("original")
    before = [type(m) for m in task.modules()]
    with pytest.raises(RuntimeError, match="stop"), _global_norms(task): raise RuntimeError("stop")
    assert [type(m) for m in task.modules()] == before


# ---- whole runs of two processes ----

def windows(n: int, seconds: int = 60) -> list[dict]:
    draw = torch.Generator().manual_seed(1)
    return [dict(x=torch.randn(2, 50 * seconds, generator=draw), pad=torch.zeros(2, 50 * seconds, dtype=torch.bool), stages=torch.zeros(2).long(), id=str(i), first=0) for i in range(n)]


def whole_run(settings: dict, out: Path) -> None:
    "What each process of a run does; the first one says what came out."
    torch.set_num_threads(1)
    task = task_of("tiny", **settings)
    curve = fit(task, windows(8), windows(4), out, progress=False)
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0: (out / "result.json").write_text(json.dumps(dict(hash=weights_hash(task.encoder), losses=curve["train_loss"].tolist(), weights=[p.double().abs().sum().item() for p in task.parameters()])))


def command(settings: dict, out: Path, launcher: str = "lightning") -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"] if launcher == "torchrun" else []
    return [sys.executable, *torchrun, __file__, "run", json.dumps(settings), str(out)]


def run(settings: dict, out: Path, launcher: str = "lightning") -> dict:
    done = subprocess.run(command(settings, out, launcher), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "result.json").read_text())


@pytest.mark.slow
def test_sharded_on_cpus_is_the_same_run_and_can_be_continued(tmp_path):
    "FSDP 2 on two CPU processes: the weights of DDP but for rounding; stopped after two epochs it goes on from one whole checkpoint."
    settings = dict(devices=2, batch_size=2, learning_rate=1e-2, epochs=3)
    ddp, fsdp = (run(settings | dict(strategy=s), tmp_path / s) for s in ("ddp", "fsdp2"))
    assert fsdp["losses"] == pytest.approx(ddp["losses"], rel=1e-5) and fsdp["weights"] == pytest.approx(ddp["weights"], rel=1e-4)
    frugal = run(settings | dict(strategy="fsdp2", frugal=True), tmp_path / "frugal")
    assert frugal["losses"] == pytest.approx(fsdp["losses"], rel=1e-6)
    state = torch.load(tmp_path / "fsdp2" / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    assert {k: tuple(v.shape) for k, v in state.items()} == {k: tuple(v.shape) for k, v in task_of("tiny").state_dict().items()} # whole, not a shard
    again = run(settings | dict(strategy="fsdp2"), tmp_path / "fsdp2") # finished: nothing happens
    assert again["hash"] == fsdp["hash"]


def processes_of(out: Path) -> dict[int, int]:
    "rank -> process id, of the run in this folder."
    found = {}
    for p in Path("/proc").glob("[0-9]*"):
        try: words, env = (p / "cmdline").read_bytes().decode().split("\0"), (p / "environ").read_bytes().decode().split("\0")
        except OSError: continue
        if str(out) in words and "torch.distributed.run" not in words: found[next((int(e[11:]) for e in env if e.startswith("LOCAL_RANK=")), 0)] = int(p.name)
    return found


def wait_until(what, process, seconds: float = 240.) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(.02)


@contextmanager
def started(*args):
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    try: yield process
    finally:
        process.kill(); process.communicate()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes of a run in /proc")
@pytest.mark.parametrize("launcher, victim", [("lightning", 1), ("lightning", 0), ("torchrun", 1), ("torchrun", 0)])
def test_a_killed_process_ends_the_run_and_the_same_command_goes_on(tmp_path, launcher, victim):
    settings = dict(devices=2, strategy="ddp", batch_size=2, learning_rate=1e-2, epochs=40)
    whole = run(settings, tmp_path / "whole", launcher)
    out = tmp_path / "killed"
    with started(*command(settings, out, launcher)) as process:
        wait_until(lambda: (out / "checkpoints" / "last.ckpt").exists() and len(processes_of(out)) == 2, process)
        os.kill(processes_of(out)[victim], 9)
        said = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and not (out / "result.json").exists()
    assert "another process of this run is gone" in said or "Child process" in said or "Signal 9 (SIGKILL)" in said, said[-3000:]
    until = time.monotonic() + 60
    while processes_of(out) and time.monotonic() < until: time.sleep(.1)
    assert not processes_of(out) # nobody is left waiting
    assert 0 < len(history(out)) < 40
    resumed = run(settings, out, launcher)
    assert resumed == whole and len(history(out)) == 40


@pytest.mark.slow
def test_two_machines(tmp_path):
    "Two launchers with one process each, as on two machines: `nodes` makes one run of them, the same as one machine's."
    settings = dict(strategy="ddp", batch_size=2, learning_rate=1e-2, epochs=2)
    port = free_port()
    words = lambda node: [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", __file__, "run", json.dumps(settings | dict(devices=1, nodes=2)), str(tmp_path / "two")]
    with started(*words(0)) as first, started(*words(1)) as second:
        said = [p.communicate(timeout=200)[0] for p in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), "".join(said)
    assert json.loads((tmp_path / "two" / "result.json").read_text()) == run(settings | dict(devices=2), tmp_path / "one")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- conversion with a worker that dies and comes back ----

@pytest.mark.slow
def test_a_lost_dask_worker_loses_nothing_and_doubles_nothing(tmp_path):
    "As in test_convert.py, but under a nanny, which starts a new worker in the place of the dead one; every night stands once in store, manifest and ledger."
    distributed = pytest.importorskip("distributed", reason="Dask (extra `scale`) isn't installed")
    (tmp_path / "edf").mkdir()
    for i in range(16):
        x = np.random.default_rng(i).standard_normal((2, 300 * 128)) * 20
        write_edf(Recording(f"n{i:02}", {c: array_channel(c, v, 128, "uV", c) for c, v in zip(CHANNELS, x, strict=True)}), tmp_path / "edf" / f"n{i:02}.edf")
        (tmp_path / "edf" / f"n{i:02}.csv").write_text("stage\n" + "N2\n" * 10)
    ids, recipe, store = [f"n{i:02}" for i in range(16)], Recipe.default(channels=CHANNELS), tmp_path / "store"
    log = store / "ledger.jsonl"
    with distributed.LocalCluster(2, processes=True, threads_per_worker=1, dashboard_address=None, local_directory=str(tmp_path / "dask")) as cluster:
        workers = [w.pid for w in cluster.workers.values()]
        def kill() -> None:
            until = time.monotonic() + 120
            while time.monotonic() < until and not (log.exists() and len(log.read_text().splitlines()) >= 3): time.sleep(.01)
            os.kill(workers[0], 9)
        with ThreadPoolExecutor(1) as killer, dask_workers(cluster.scheduler_address) as executor:
            killed = killer.submit(kill)
            ledger = convert(FOLDER, tmp_path / "edf", store, recipe, executor)
            killed.result()
        assert [o.id for o in ledger.outcomes] == ids and not ledger.failed, str(ledger)
        assert sorted(json.loads(line)["id"] for line in log.read_text().splitlines()) == ids
        assert sorted(pd.read_parquet(store / "ledger.parquet")["id"]) == ids
        assert open_store(store).manifest["id"].tolist() == ids and sorted(p.name for p in (store / "recordings").iterdir()) == [f"{i}.zarr" for i in ids]
        with dask_workers(cluster.scheduler_address) as executor: assert {o.status for o in convert(FOLDER, tmp_path / "edf", store, recipe, executor).outcomes} == {"skipped"}
    assert not [i for i in ids if find_damage(store / "recordings" / f"{i}.zarr")]


# ---- large cohorts ----

@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_an_epoch_over_a_thousand_recordings_takes_no_more_memory_at_its_end():
    "The same with 10 000: `python benchmarks/scale.py --cohorts 10000`."
    done = subprocess.run([sys.executable, ROOT / "benchmarks/scale.py", "--one", "1000"], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["windows"] == 1000 and found["flat_mib"] < 48, found


def test_an_index_of_ten_thousand_recordings_is_small(tmp_path):
    "Manifest, split and windows of a large cohort, without its signals."
    store, n = create_store(tmp_path / "store", Recipe.native()), 10_000
    rec = Recording("r", {c: array_channel(c, np.zeros(1200), 10, "uV", c) for c in CHANNELS}, hypnogram=Hypnogram(np.zeros(4, "int8"), 30))
    row = manifest_row(rec, store.recipe_hash)
    table = pd.DataFrame([row | dict(id=f"r{i:05}", subject=f"s{i // 2}", group=f"s{i // 2}") for i in range(n)])
    table.to_parquet(store.path / "manifest.parquet")
    split = make_split(store.manifest, dict(train=.9, val=.1), seed=0)
    split.check(store.manifest)
    assert sum(len(ids) for ids in split.parts.values()) == n and not {split.subjects[i] for i in split.parts["train"]} & {split.subjects[i] for i in split.parts["val"]}
    data = WindowDataset(store, split.parts["train"], CHANNELS, 2)
    assert len(data) == 2 * len(split.parts["train"]) and data.index[1] == (split.parts["train"][0], 2, 2)


if __name__ == "__main__":
    if sys.argv[1] == "work": work(int(sys.argv[2]), Path(sys.argv[3]))
    else: whole_run(json.loads(sys.argv[2]), Path(sys.argv[3]))
