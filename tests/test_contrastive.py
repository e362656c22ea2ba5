"""Contrastive objectives, their training and retrieval: the original's recorded values, naive oracles, two processes, and runs that can be continued."""
import json
import math
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from pftsleep.data import datasets
from pftsleep.data.datasets import MultiModalDataset, WindowDataset, _open, opened
from pftsleep.data.recording import Recording, array_channel
from pftsleep.data.samplers import step_generator
from pftsleep.data.signals import Recipe, apply_recipe
from pftsleep.data.simulate import simulate_hypnogram, simulate_night
from pftsleep.data.splits import make_split
from pftsleep.data.store import create_store
from pftsleep.errors import ConfigError, ModelError
from pftsleep.evaluation import retrieval as retrieval_module
from pftsleep.evaluation.retrieval import pair_ranks, retrieval, retrieval_figures
from pftsleep.models.sleepfm import SleepFMEncoder
from pftsleep.models.transformer import PatchTransformer
from pftsleep.training import contrastive
from pftsleep.training.contrastive import contrastive_loss
from pftsleep.training.contrastive_pretraining import (
    ContrastiveConfig, ContrastivePretraining, ModalityTowers, clips, collate_modalities, embed_clips, new_towers, night_numbers, pretrain_contrastive)
from pftsleep.training.pretrain import MaskedPretraining
from pftsleep.training.runs import history, weights_hash

FIXTURES = Path(__file__).parents[2] / "shared/fixtures/sleepfm/contrastive_losses.npz"
MODES = "pairwise", "leave_one_out"


# ---- the objective ----

def naive(embeddings, t, mode, missing=None, nights=None) -> float:
    "Loops over clips, in double precision, straight from the definition."
    B, M = len(embeddings[0]), len(embeddings)
    has = lambda b, m: missing is None or not missing[b, m]
    unit = lambda b, m: (e := embeddings[m][b].double()) / max(e.norm(), 1e-12)
    one = lambda m: [unit(b, m) if has(b, m) else None for b in range(B)]
    def mean(ms):
        rows = [[unit(b, m) for m in ms if has(b, m)] for b in range(B)]
        return [sum(r) / len(r) if r else None for r in rows]
    pairs = [(one(i), one(j)) for i, j in combinations(range(M), 2)] if mode == "pairwise" else [(one(i), mean([j for j in range(M) if j != i])) for i in range(M)]
    terms = []
    for sides in pairs:
        for q, k in (sides, sides[::-1]):
            for b in range(B):
                if q[b] is None or k[b] is None: continue
                seen = [c for c in range(B) if k[c] is not None and (c == b or nights is None or nights[c] != nights[b])]
                s = torch.stack([(q[b] @ k[c]) * math.exp(t) for c in seen])
                terms.append((s.logsumexp(0) - s[seen.index(b)]).item())
    return sum(terms) / max(1, len(terms))


def differentiated(embeddings, t, mode, **kw):
    e = [x.clone().requires_grad_() for x in embeddings]
    scale = torch.tensor(t, dtype=e[0].dtype, requires_grad=True)
    loss = contrastive_loss(e, scale, mode, **kw)
    return [loss.detach(), *torch.autograd.grad(loss, [*e, scale])]


@pytest.mark.skipif(not FIXTURES.exists(), reason="../shared isn't here")
@pytest.mark.parametrize("blockwise", [False, True, None])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name,t", [("t0", 0.), ("t1", 1.), ("t2p5", 2.5)])
def test_the_published_values(name, t, mode, blockwise, monkeypatch):
    monkeypatch.setattr(contrastive, "_BLOCK", 7 * 32)
    recorded = np.load(FIXTURES)
    of = lambda what: recorded[f"m3_{name}_{'loo' if mode == 'leave_one_out' else mode}_{what}"]
    loss, grad, *_, grad_t = differentiated(torch.from_numpy(recorded["m3_raw"]), t, mode, blockwise=blockwise)
    assert loss.item() == pytest.approx(float(of("loss_per_sample")), rel=1e-6)
    assert grad_t.item() == pytest.approx(float(of("grad_temp")), rel=1e-6)
    assert np.abs(grad.numpy() - of("grad_emb0")).max() <= 1e-6 * np.abs(of("grad_emb0")).max()


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(2, 4), st.sampled_from(MODES), st.floats(-1, 3), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_plain_and_blockwise_are_the_definition(B, M, mode, t, holes, grouped, seed):
    g = torch.Generator().manual_seed(seed)
    e = [torch.randn(B, 5, generator=g, dtype=torch.float64) for _ in range(M)]
    missing = torch.rand(B, M, generator=g) < .4 if holes else None
    nights = torch.randint(3, (B,), generator=g) if grouped else None
    before, contrastive._BLOCK = contrastive._BLOCK, 3 * B # some rows at a time
    try: plain, blocks = (differentiated(e, t, mode, missing=missing, nights=nights, blockwise=way) for way in (False, True))
    finally: contrastive._BLOCK = before
    assert plain[0].item() == pytest.approx(naive(e, t, mode, missing, nights), rel=1e-9, abs=1e-12)
    for a, b in zip(plain, blocks, strict=True): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    if missing is not None:
        for m, grad in enumerate(plain[1:-1]): assert not grad[missing[:, m]].any()


def test_gradients_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(contrastive, "_BLOCK", 10)
    g = torch.Generator().manual_seed(0)
    e = [torch.randn(5, 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    t = torch.tensor(.7, dtype=torch.float64, requires_grad=True)
    missing = torch.zeros(5, 3, dtype=torch.bool); missing[0, 1] = missing[3, 0] = True
    nights = torch.tensor([0, 0, 1, 2, 2])
    for mode in MODES: assert torch.autograd.gradcheck(lambda *z, mode=mode: contrastive_loss(z[:3], z[3], mode, missing, nights, blockwise=True), (*e, t))


def test_the_form_is_chosen_by_size(monkeypatch):
    used = []
    for name, way in (("plain_sum", contrastive.plain_sum), ("blockwise_sum", contrastive.blockwise_sum)):
        monkeypatch.setattr(contrastive, name, lambda *a, name=name, way=way: (used.append(name), way(*a))[1])
    monkeypatch.setattr(contrastive, "_LARGE", 100)
    for B in (10, 11): contrastive_loss([torch.randn(B, 4)] * 2, torch.zeros(()), "pairwise")
    assert used == ["plain_sum", "blockwise_sum"]


def test_nan_is_never_mistaken_for_an_answer():
    for blockwise in (False, True):
        e = [torch.full((4, 3), torch.nan)] * 2
        assert contrastive_loss(e, torch.zeros(()), "pairwise", blockwise=blockwise).isnan()


def test_half_precision_is_summed_in_single(monkeypatch):
    g = torch.Generator().manual_seed(0)
    e = [torch.randn(40, 8, generator=g).bfloat16() for _ in range(3)]
    for blockwise in (False, True):
        with torch.autocast("cpu", torch.bfloat16): half = differentiated(e, 1., "pairwise", blockwise=blockwise)
        assert half[0].dtype == torch.float32 and half[0].item() == pytest.approx(naive(e, 1., "pairwise"), rel=1e-5)
        assert all(grad.dtype == torch.bfloat16 and grad.isfinite().all() for grad in half[1:])


# ---- several processes ----

CASE = dict(B=12, M=3, D=6)

def _case():
    g = torch.Generator().manual_seed(3)
    e = [torch.randn(CASE["B"], CASE["D"], generator=g) for _ in range(CASE["M"])]
    missing = torch.rand(CASE["B"], CASE["M"], generator=g) < .3
    return e, missing, torch.arange(CASE["B"]) // 3


def _variants():
    e, missing, nights = _case()
    for mode in MODES:
        for holes, grouped in ((None, None), (missing, nights)):
            for blockwise in (False, True): yield e, mode, holes, grouped, blockwise


def _process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    half, out = slice(rank * CASE["B"] // 2, (rank + 1) * CASE["B"] // 2), []
    part = lambda t: None if t is None else t[half]
    for e, mode, missing, nights, blockwise in _variants():
        out.append(differentiated([x[half] for x in e], .8, mode, missing=part(missing), nights=part(nights), blockwise=blockwise, gather=True))
    try: contrastive_loss([torch.randn(3 + rank, 4)] * 2, torch.zeros(()), gather=True)
    except ConfigError as error: out.append(str(error))
    torch.save(out, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one_batch(tmp_path):
    "Loss, gradients (averaged, as DDP does) and the scale's gradient are those of one process on all clips."
    mp.spawn(_process, (str(tmp_path),), 2)
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for (e, mode, missing, nights, blockwise), one, two in zip(_variants(), a[:-1], b[:-1], strict=True):
        loss, *grads, grad_t = differentiated(e, .8, mode, missing=missing, nights=nights, blockwise=blockwise)
        for part in (one, two): torch.testing.assert_close(part[0], loss, rtol=1e-6, atol=0)
        for whole, *parts in zip(grads, one[1:-1], two[1:-1], strict=True): torch.testing.assert_close(torch.cat(parts) / 2, whole, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close((one[-1] + two[-1]) / 2, grad_t, rtol=1e-5, atol=1e-7)
    assert "batches of [3, 4]" in a[-1] == b[-1]


# ---- training ----

CHANNELS = dict(brain=("EEG", "EOG"), breath=("Thorax",), heart=("ECG",))
FAST = dict(modalities=CHANNELS, patch_seconds=6, d_model=16, n_layers=1, width=8, instance_norm=False, epochs=2, batch_size=8, learning_rate=1e-2, accelerator="cpu", loggers=())

KINDS = dict(EEG="EEG", EOG="EOG", Thorax="RESP", ECG="ECG")


def night(i, minutes=4, fs=20, lacks=()) -> Recording:
    "A state of each half minute that all channels show, each in its own way: how loud it is."
    rng = np.random.default_rng(i)
    state = np.repeat(rng.uniform(.2, 3, 2 * minutes), 30 * fs)
    return Recording(f"n{i}", {c: array_channel(c, state * rng.standard_normal(len(state)), fs, "uV", KINDS[c]) for m in CHANNELS.values() for c in m if c not in lacks}, subject=f"s{i}")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = create_store(tmp_path_factory.mktemp("contrastive") / "store", Recipe.native())
    for i in range(8): store.add(night(i, lacks=("ECG",) if i in (1, 2) else ()))
    store.sync()
    return store


@pytest.fixture(scope="module")
def split(store): return make_split(store.manifest, dict(train=.5, val=.25, test=.25), seed=0)


def test_a_stopped_run_goes_on_to_the_same_weights_and_the_best_epoch_is_kept(store, split, tmp_path, monkeypatch):
    config = ContrastiveConfig(**FAST | dict(epochs=4, learning_rate=.05, other_nights=True)) # so fast that later epochs may be worse
    whole = pretrain_contrastive(store, split, tmp_path / "whole", config, progress=False)
    curve = history(tmp_path / "whole")
    run = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert run["results"]["losses"]["val_loss"] == curve["val_loss"].min() and run["results"]["weights"] == weights_hash(whole) and run["results"]["log_scale"] >= 0
    assert weights_hash(PatchTransformer.from_pretrained(tmp_path / "whole" / "encoder")) == weights_hash(whole.encoder)
    kept = ContrastivePretraining(whole, config).eval() # what was kept has the loss that is reported
    val = clips(store, split.parts["val"], config)
    order = torch.randperm(len(val), generator=step_generator(0, 0, "validation order")).tolist()
    losses = []
    with torch.no_grad():
        kept.log_scale.fill_(run["results"]["log_scale"])
        for k in range(0, len(order), 8):
            items = [val[i] for i in order[k:k + 8]]
            batch = dict(x=torch.stack([w["x"] for w in items]), pad=torch.stack([w["pad"] for w in items]), id=[w["id"] for w in items])
            losses += [kept.batch_loss(batch, torch.Generator()).item()] * len(items)
    assert np.mean(losses) == pytest.approx(curve["val_loss"].min(), rel=1e-5)
    before = ContrastivePretraining.on_train_epoch_end
    def killed(self):
        before(self)
        if self.current_epoch == 2: raise RuntimeError("killed") # the best may be written, its checkpoint isn't
    with monkeypatch.context() as m, pytest.raises(RuntimeError, match="killed"):
        m.setattr(ContrastivePretraining, "on_train_epoch_end", killed)
        pretrain_contrastive(store, split, tmp_path / "parts", config, progress=False)
    assert weights_hash(pretrain_contrastive(store, split, tmp_path / "parts", config, progress=False)) == weights_hash(whole)
    with pytest.raises(ConfigError, match="config differ"): pretrain_contrastive(store, split, tmp_path / "whole", replace(config, mode="pairwise"), progress=False)


def test_the_joint_objective_is_the_sum_of_both(store, split, tmp_path):
    config = ContrastiveConfig(**FAST | dict(objective="joint", contrastive_weight=.5, mode="pairwise", epochs=1))
    tower = new_towers(store, split.parts["train"], config)
    task, data = ContrastivePretraining(tower, config).eval(), clips(store, split.parts["train"], config)
    batch = {k: torch.stack([data[i][k] for i in range(6)]) for k in ("x", "pad")} | dict(id=list("aabbcc"))
    alone = MaskedPretraining(tower.encoder, config).eval()
    alone.decoder.load_state_dict(task.masked.decoder.state_dict())
    draw = lambda: step_generator(0, 0, "x")
    with torch.no_grad():
        z, missing = tower(batch)
        parts = alone.batch_loss(batch, draw()), contrastive_loss(z, task.log_scale, "pairwise", missing)
        torch.testing.assert_close(task.batch_loss(batch, draw()), parts[0] + .5 * parts[1])
    pretrain_contrastive(store, split, tmp_path, config, progress=False)
    assert (tmp_path / "encoder" / "config.json").exists() and history(tmp_path)["val_loss"].notna().all()


def test_an_encoder_of_convolutions_for_each_modality(store, split, tmp_path):
    "SleepFM's design, with its optimiser; people without an ECG are used for the rest."
    config = ContrastiveConfig.sleepfm(CHANNELS, epochs=1, width=16, batch_size=8, accelerator="cpu", loggers=())
    towers = pretrain_contrastive(store, split, tmp_path, config, progress=False)
    assert isinstance(towers, ModalityTowers) and set(towers.encoders) == set(CHANNELS)
    for name, encoder in towers.encoders.items(): assert weights_hash(SleepFMEncoder.from_pretrained(tmp_path / "encoders" / name)) == weights_hash(encoder)
    ids = ["n0", "n1"]
    z, missing, rows = embed_clips(towers, clips(store, ids, config), 5)
    assert {k: v.shape for k, v in z.items()} == dict.fromkeys(CHANNELS, (16, 16)) and rows["id"].tolist() == ["n0"] * 8 + ["n1"] * 8
    assert missing.T.tolist() == [[False] * 16, [False] * 16, [False] * 8 + [True] * 8]
    optimiser = ContrastivePretraining(towers, config).configure_optimizers()
    assert isinstance(optimiser["optimizer"], torch.optim.SGD) and optimiser["lr_scheduler"].step_size == 5


@pytest.mark.slow
def test_any_module_can_be_an_encoder_and_goes_on_from_where_it_is(store, split, tmp_path):
    class Loudness(nn.Module):
        def __init__(self, channels): super().__init__(); self.norm, self.fc = nn.BatchNorm1d(channels), nn.Linear(channels, 8)
        def forward(self, x): return self.fc(self.norm(x.square().mean(-1).log1p()))
    config = ContrastiveConfig(**FAST | dict(encoder="sleepfm", epochs=30, log_scale=2.3, modalities=dict(list(CHANNELS.items())[:2])))
    torch.manual_seed(0)
    towers = ModalityTowers({name: Loudness(len(channels)) for name, channels in config.modalities.items()})
    data = clips(store, split.parts["test"], config)
    def found(): return retrieval(embed_clips(towers.eval(), data)[0], n_resamples=0, ks=(1, 3)).query("figure == 'R@3'")
    before = found()["value"].mean()
    assert pretrain_contrastive(store, split, tmp_path, config, towers, progress=False) is towers
    after = found()
    assert after["value"].mean() > 2.5 * after["chance"].mean() and after["value"].mean() > before # the state is known, and found
    again = collate_modalities([data[0], data[1]])
    again["brain"]["pad"][:] = True
    stats = towers.encoders["brain"].norm.running_mean.clone()
    z, missing = towers.train()(again)
    sum(v.sum() for v in z).backward()
    assert missing[:, 0].all() and not z[0].any() and all(p.grad is not None for p in towers.parameters())
    assert torch.equal(towers.encoders["brain"].norm.running_mean, stats)


def test_one_encoder_learns_what_is_shared(store, split, tmp_path):
    config = ContrastiveConfig(**FAST | dict(epochs=15))
    data = clips(store, [f"n{i}" for i in (0, 3, 4, 5, 6, 7) if f"n{i}" in split.parts["test"]] or ["n0"], config)
    found = lambda towers: retrieval(embed_clips(towers, data)[0], n_resamples=0, ks=(1, 3)).query("figure == 'R@3'")
    after = found(pretrain_contrastive(store, split, tmp_path, config, progress=False))
    assert after["value"].mean() > 2 * after["chance"].mean()


def test_the_scale_has_a_floor_and_a_beginning(store, split, tmp_path):
    "With signals that share nothing the scale wants to fall."
    wrong = create_store(tmp_path / "store", Recipe.native())
    for i in range(6):
        rec, other = night(i), night(100 + i)
        wrong.add(replace(rec, channels={**rec.channels, "ECG": other["ECG"], "Thorax": night(200 + i)["Thorax"]}))
    wrong.sync()
    split = make_split(wrong.manifest, dict(train=.7, val=.3), seed=0)
    scales = {}
    for floor in (True, False):
        pretrain_contrastive(wrong, split, tmp_path / str(floor), ContrastiveConfig(**FAST | dict(log_scale=.005, scale_floor=floor, epochs=3)), progress=False)
        run = [torch.load(p, weights_only=True)["state_dict"]["log_scale"].item() for p in (tmp_path / str(floor)).glob("checkpoints/last.ckpt")]
        scales[floor] = run[0]
    assert scales[True] >= 0 and scales[False] < scales[True]


def test_a_loss_that_is_no_number_is_an_error(store, split, tmp_path):
    class Broken(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(8))
        def forward(self, x): return x.mean((1, 2))[:, None] * self.w / 0.
    config = ContrastiveConfig(**FAST | dict(encoder="sleepfm", epochs=1))
    with pytest.raises(ModelError, match="never a number"): pretrain_contrastive(store, split, tmp_path, config, ModalityTowers({name: Broken() for name in CHANNELS}), progress=False)


def test_settings_come_back_from_json():
    config = ContrastiveConfig(**FAST)
    assert config.channels == ("EEG", "EOG", "Thorax", "ECG") and replace(config, seed=1).channels == config.channels
    assert night_numbers(["a", "b", "a"]).unique().numel() == 2
    for wrong in (dict(modalities=dict(a=("EEG",))), dict(modalities={"a/b": ("EEG",), "c": ("EOG",)}), dict(encoder="cnn"), dict(width=0), dict(objective="both"), dict(strategy="fsdp")):
        with pytest.raises(ConfigError): ContrastiveConfig(**FAST | wrong)


SCRIPT = """
import sys
from pftsleep.data.splits import Split
from pftsleep.data.store import open_store
from pftsleep.training.contrastive_pretraining import ContrastiveConfig, pretrain_contrastive
if __name__ == "__main__":
    modalities = dict(brain=("EEG", "EOG"), breath=("Thorax",), heart=("ECG",))
    config = ContrastiveConfig(modalities=modalities, patch_seconds=6, d_model=16, n_layers=1, width=8, epochs=2, batch_size=4, objective="joint", accelerator="cpu", devices=2, strategy="ddp", loggers=())
    pretrain_contrastive(open_store(sys.argv[1]), Split.load(sys.argv[2]), sys.argv[3], config, progress=False)
"""

def test_two_processes_train_together(store, split, tmp_path):
    split.save(tmp_path / "split.json")
    (tmp_path / "job.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, *map(str, (tmp_path / "job.py", store.path, tmp_path / "split.json", tmp_path / "run"))], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(history(tmp_path / "run")) == 2 and run["results"]["losses"]["val_loss"] == history(tmp_path / "run")["val_loss"].min()


# ---- retrieval ----

def oracle(a, b) -> list[float]:
    out = []
    unit = lambda v: v / max(np.linalg.norm(v), 1e-12)
    for i in range(len(a)):
        s = [float(unit(a[i].astype(float)) @ unit(b[j].astype(float))) for j in range(len(b))]
        others = [s[j] - s[i] for j in range(len(b)) if j != i]
        out.append(1 + sum(d > 1e-6 for d in others) + sum(abs(d) <= 1e-6 for d in others) / 2)
    return out


@settings(max_examples=30)
@given(st.integers(1, 25), st.integers(1, 4), st.booleans(), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_ranks_are_those_of_loops_whatever_the_tiles(n, d, ties, rows, columns, seed):
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(-1, 2, (n, d)).astype("float32") if ties else rng.standard_normal((n, d)).astype("float32") for _ in range(2))
    before, retrieval_module._TILE = retrieval_module._TILE, (rows, columns)
    try: there, back = pair_ranks(a, b)
    finally: retrieval_module._TILE = before
    assert there.tolist() == oracle(a, b) and back.tolist() == oracle(b, a)


def test_the_table_is_that_of_loops_with_missing_modalities():
    rng = np.random.default_rng(0)
    z = {k: rng.standard_normal((30, 4)).astype("float32") for k in "abc"}
    lacks = rng.random((30, 3)) < .2
    subjects = np.repeat(list("uvwxyz"), 5)
    for k, gone in zip("abc", lacks.T, strict=True): z[k][gone] = np.nan
    table = retrieval(z, lacks, subjects.tolist(), ks=(1, 5), n_resamples=50).set_index(["query", "gallery", "figure"])
    unit = {k: v / np.linalg.norm(v, axis=1, keepdims=True) for k, v in z.items()}
    for i, k in enumerate("abc"):
        others = [j for j in range(3) if j != i]
        rows = [r for r in range(30) if not lacks[r, i] and not lacks[r, others].all()]
        mean = np.stack([sum(unit["abc"[j]][r] for j in others if not lacks[r, j]) for r in rows])
        for query, gallery, ranks in ((k, "mean of others", oracle(z[k][rows], mean)), ("mean of others", k, oracle(mean, z[k][rows]))):
            of = lambda figure, query=query, gallery=gallery: table.loc[(query, gallery, figure)]
            assert of("R@5")["value"] == pytest.approx(np.mean(np.array(ranks) <= 5)) and of("median rank")["value"] == np.median(ranks)
            assert of("R@5")["n"] == len(rows) and of("R@5")["chance"] == 5 / len(rows) and of("R@1")["low"] <= of("R@1")["value"] <= of("R@1")["high"]
    assert len(table) == (6 + 6) * 3


def test_intervals_draw_subjects():
    "One draw, counted by hand; and clips of one subject don't make it more certain."
    ranks, subjects = np.array([1., 4, 2, 9, 1]), list("aabbc")
    row = retrieval_figures(ranks, subjects, (1,), n_resamples=1, seed=5)
    who = np.random.default_rng(5).integers(3, size=3) # of the subjects in the order of their best clips
    order = [*dict.fromkeys(np.array(subjects)[np.argsort(ranks)])]
    drawn = np.concatenate([ranks[[s == order[k] for s in subjects]] for k in who])
    assert row["low"].tolist() == row["high"].tolist() == [np.mean(drawn <= 1), np.median(drawn)]
    width = lambda r, s: (t := retrieval_figures(r, s, (1,), 300).iloc[0])["high"] - t["low"]
    rng = np.random.default_rng(0)
    base = rng.choice([1., 5.], 20)
    assert width(np.repeat(base, 50), np.repeat(np.arange(20), 50).tolist()) == pytest.approx(width(base, list(range(20))), abs=.11)
    assert retrieval_figures(base, ["one"] * 20)["low"].isna().all()


def test_retrieval_needs_memory_for_a_tile_only():
    "12 000 clips: the table would take 576 MB."
    code = ("import numpy as np, resource, pftsleep.evaluation.retrieval as r\n"
        "a, b = np.random.default_rng(0).standard_normal((2, 12000, 8), dtype='float32')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nr.pair_ranks(a, b)\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert int(done.stdout) < 300_000 # KiB


def test_the_blockwise_loss_needs_memory_for_a_block_only():
    "5000 clips of three modalities: one table takes 100 MB, and the plain form keeps several of each comparison."
    code = ("import torch, resource\nfrom pftsleep.training.contrastive import contrastive_loss\ntorch.set_num_threads(1)\n"
        "e = [torch.randn(5000, 8, requires_grad=True) for _ in range(3)]\nt = torch.zeros((), requires_grad=True)\ncontrastive_loss([x[:64] for x in e], t).backward()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\ncontrastive_loss(e, t).backward()\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert int(done.stdout) < 130_000 # KiB


# recordings stay open

def _in_a_child(store, out): out.put([opened(store, "n0") is opened(store, "n0"), len(_open[store][1])])

def test_recordings_stay_open_each_process_its_own(tmp_path, monkeypatch):
    "Clips don't open their night again; the least used goes first; a forked child and a spawned one begin anew, and read the same."
    store = create_store(tmp_path / "s", Recipe("small", rate=16.))
    for i in range(3):
        h = simulate_hypnogram(.05, np.random.default_rng(i))
        store.add(apply_recipe(replace(simulate_night(h, {"EEG": 16., "EMG": 16.}, seed=i, id=f"n{i}", subject=f"s{i}"), hypnogram=h), Recipe("small", rate=16.)))
    store.sync()
    asked = []
    read = type(store).__getitem__
    monkeypatch.setattr(type(store), "__getitem__", lambda self, id: asked.append(id) or read(self, id))
    ids = ["n0", "n1", "n2"]
    windows, both = WindowDataset(store, ids, ["EEG"], 1), MultiModalDataset(store, ids, dict(a=("EEG",), b=("EMG",)))
    plain = [windows[k]["x"] for k in range(len(windows))]
    for k in range(len(both)): assert torch.equal(both[k]["a"]["x"], plain[k])
    assert asked == ids
    for method in ("fork", "spawn"):
        loader = DataLoader(windows, 1, num_workers=1, multiprocessing_context=method)
        assert all(torch.equal(b["x"][0], x) for b, x in zip(loader, plain, strict=True))
    process = multiprocessing.get_context("fork").Process(target=_in_a_child, args=(store, out := multiprocessing.get_context("fork").SimpleQueue()))
    process.start(); process.join(60)
    assert out.get() == [True, 1] and len(_open[store][1]) == 3
    monkeypatch.setattr(datasets, "_KEPT", 2)
    for i in ids: opened(store, i)
    assert list(_open[store][1]) == ["n1", "n2"]
