"""Training: heads, losses and harder nights by name, schedules under accumulation, several processes, and what must never change."""
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pftsleep.data.datasets import WindowDataset
from pftsleep.data.recording import Hypnogram, Recording, array_channel
from pftsleep.data.samplers import step_generator
from pftsleep.data.signals import Recipe
from pftsleep.data.splits import make_split
from pftsleep.data.store import create_store
from pftsleep.errors import ConfigError
from pftsleep.models.stager import load_stager
from pftsleep.models.transformer import PatchConfig, PatchTransformer, Tokens
from pftsleep.training.losses import cross_entropy, focal_loss, patch_errors
from pftsleep.training.pretrain import MaskedPretraining, PretrainConfig, drop_channels, new_encoder, pretrain
from pftsleep.training.probe import EpochTokens, ProbeTraining, StagingConfig, collate_tokens, new_head, seconds_read, spoil, train_probe, train_supervised
from pftsleep.training import runs
from pftsleep.training.runs import LoopConfig, Training, fit, history, one_cycle, seeded, stored_bytes, weights_hash

HEADS = get_args(get_type_hints(StagingConfig)["head"])
FAST = dict(batch_size=2, accelerator="cpu", loggers=())
CHANNELS = ("EEG", "EOG")


def night(i, minutes=6, fs=50, channels=CHANNELS) -> Recording:
    "Slow waves are N3, fast ones W; in both channels."
    rng = np.random.default_rng(i)
    stages = np.repeat(np.resize([0, 3], minutes), 2)
    t = np.arange(len(stages) * 30 * fs) / fs
    wave = np.where(np.repeat(stages, 30 * fs) == 3, np.sin(2 * np.pi * 1.1 * t), np.sin(2 * np.pi * 9 * t))
    return Recording(f"n{i}", {c: array_channel(c, rng.uniform(10, 60) * (wave + .3 * rng.standard_normal(len(t))), fs, "uV", c) for c in channels}, subject=f"s{i}", hypnogram=Hypnogram(stages, 30))


def store_of(folder, nights):
    store = create_store(folder, Recipe.native())
    for rec in nights: store.add(rec)
    store.sync()
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory): return store_of(tmp_path_factory.mktemp("training") / "store", [night(i, 6 + 2 * (i % 2)) for i in range(8)])


@pytest.fixture(scope="module")
def split(store): return make_split(store.manifest, dict(train=.5, val=.25, test=.25), seed=0)


@pytest.fixture(scope="module")
def encoder(store, split): return new_encoder(store, split.parts["train"], PretrainConfig(patch_seconds=6, d_model=16, n_layers=1, preset="tiny"))


# ---- heads ----

@pytest.mark.parametrize("head", HEADS)
def test_every_head_learns_saves_and_loads(head, store, split, encoder, tmp_path):
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    config = StagingConfig(epochs=8 if head != "pftsleep" else 30, learning_rate=1e-2, head=head, hidden=None if head == "linear" else 16, loss="focal", cutmix=.5, channel_dropout=.2, **FAST)
    stager = train_probe(store, split, encoder, tmp_path / "run", config, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items()) and weights_hash(stager.encoder) == weights_hash(encoder)
    curve = history(tmp_path / "run")["val_loss"]
    assert curve.iloc[-1] < .7 * curve.iloc[0]
    back, rec = load_stager(tmp_path / "run" / "stager"), store[split.parts["test"][0]]
    assert weights_hash(back) == weights_hash(stager) and not getattr(back.head.config, "upstream", False)
    assert np.array_equal(back.stage(rec).probabilities, stager.stage(rec).probabilities)
    assert (back.stage(rec).stages == rec.hypnogram.stages).mean() > .8
    less = replace(rec, channels={"EEG": rec["EEG"]})
    assert len(back.stage(less, allow_missing=True).stages) == len(rec.hypnogram)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["facts"]["config"]["head"] == head and facts["results"]["head_parameters"] == sum(p.numel() for p in stager.head.parameters())


def test_training_together_takes_any_head(store, split, encoder, tmp_path):
    config = StagingConfig(epochs=2, learning_rate=1e-3, head="attention_pool", cutmix=1., channel_dropout=.3, loss="kl", **FAST)
    before = weights_hash(encoder)
    stager = train_supervised(store, split, encoder, tmp_path, config, progress=False)
    assert weights_hash(encoder) == before != weights_hash(stager.encoder)
    assert weights_hash(load_stager(tmp_path / "stager")) == weights_hash(stager)


@pytest.mark.parametrize("head", HEADS)
def test_what_a_head_is_trained_on_is_what_it_will_read(head, store, split, encoder):
    "Kept tokens, collated with a longer night, give the logits that the stager gives for the signal."
    config = StagingConfig(head=head, **FAST)
    windows, made = WindowDataset(store, split.parts["train"], CHANNELS, None), new_head(encoder, config).eval()
    kept = EpochTokens(encoder, windows, seconds=seconds_read(made))
    batch = collate_tokens([kept[k] for k in range(len(kept))])
    E, N = max(len(w["stages"]) for w in windows), batch["x"].shape[2]
    assert batch["stages"].shape == (len(kept), E) and (E if seconds_read(made) == 30 else 5 * E) == N
    task = ProbeTraining(made, config).eval()
    seen = {}
    task.loss = lambda logits, stages: seen.setdefault("logits", logits).sum()
    with torch.no_grad(): task.batch_loss(batch, torch.Generator())
    for k, w in enumerate(windows):
        with torch.no_grad(): alone = made(encoder.encode(w["x"][None], w["pad"][None]))[0]
        torch.testing.assert_close(seen["logits"][k, :len(alone)], alone, rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_one_named(encoder):
    batch = dict(x=torch.randn(2, 2, 6, 16), pad=torch.zeros(2, 2, 6, dtype=torch.bool), stages=torch.tensor([[0, 1, 2, 3, 4, -1]] * 2))
    loss = lambda name: ProbeTraining(head, StagingConfig(loss=name)).eval().batch_loss(batch, torch.Generator())
    head = new_head(encoder, StagingConfig()).eval()
    logits = head(Tokens(batch["x"], batch["pad"], 30.))
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["stages"].flatten(), ignore_index=-1)
    torch.testing.assert_close(loss("cross_entropy"), plain)
    torch.testing.assert_close(loss("kl"), plain) # of hard labels
    assert torch.equal(loss("focal"), focal_loss(logits, batch["stages"])) and torch.equal(loss("cross_entropy"), cross_entropy(logits, batch["stages"]))
    with pytest.raises(ConfigError): loss("hinge")


# ---- harder nights ----

@settings(deadline=None)
@given(st.integers(1, 6), st.floats(0, .99), st.integers(0, 2**31), st.integers(0, 1000), st.data())
def test_channel_dropout_never_takes_all_and_is_known_from_seed_and_step(C, chance, seed, step, data):
    gone = torch.tensor(data.draw(st.lists(st.booleans(), min_size=C, max_size=C)))
    pad = torch.zeros(4, C, 7, dtype=torch.bool) | gone[None, :, None]
    pad[0, :, 5:] = True # the end of a short night
    draw = lambda step: drop_channels(pad, chance, step_generator(seed, step, "train 0"))
    out = draw(step)
    assert torch.equal(out, draw(step))
    assert (out | pad).equal(out) # nothing comes back
    assert gone.all() or not out.all(-1).all(1).any()
    whole = out.all(-1)
    assert out[~whole].equal(pad[~whole]) # a channel goes as a whole or not at all


def test_channel_dropout_has_the_rate_it_says():
    pad = torch.zeros(4000, 5, 2, dtype=torch.bool)
    gone = drop_channels(pad, .3, torch.Generator().manual_seed(0)).all(-1).float()
    assert abs(gone.mean() - .3) < .015 and gone.mean(0).std() < .02
    assert not torch.equal(gone, drop_channels(pad, .3, torch.Generator().manual_seed(1)).all(-1).float())
    for wrong in (-.1, 1, 2.):
        with pytest.raises(ConfigError): drop_channels(pad, wrong, torch.Generator())


def test_harder_nights_are_for_training_only(encoder):
    batch = dict(x=torch.randn(2, 2, 6, 16), pad=torch.zeros(2, 2, 6, dtype=torch.bool), stages=torch.tensor([[0, 1, 2, 3, 4, -1]] * 2))
    plain, hard = (ProbeTraining(new_head(encoder, StagingConfig()), c) for c in (StagingConfig(), StagingConfig(cutmix=1., channel_dropout=.9)))
    loss = lambda task: task.batch_loss(batch, torch.Generator().manual_seed(0)).item()
    assert loss(plain.eval()) == loss(hard.eval()) and loss(plain.train()) != loss(hard.train())


def test_spoiling_keeps_tokens_padding_and_stages_together():
    g, stages = torch.Generator().manual_seed(0), torch.randint(-1, 5, (3, 30), generator=torch.Generator().manual_seed(1))
    x = stages.float().repeat_interleave(5, 1)[:, None, None].expand(3, 2, 4, 150).clone()
    pad = torch.zeros(3, 2, 150, dtype=torch.bool)
    pad[0, :, 100:] = True
    x, pad, moved = spoil(x.masked_fill(pad[:, :, None], 9), pad, stages, StagingConfig(cutmix=1., channel_dropout=.5), g)
    there = ~(x[:, 0, 0] == 9)
    assert (x[:, 0, 0] == moved.float().repeat_interleave(5, 1))[there].all() and (x[:, :, 0] == 9)[:, 0].logical_and(~pad.all(1)).sum() == 0


def test_a_recording_may_lack_channels_where_dropout_prepares_for_it(encoder, tmp_path):
    store = store_of(tmp_path / "store", [night(i, 4, channels=CHANNELS[:1 + i % 2]) for i in range(8)])
    split = make_split(store.manifest, dict(train=.5, val=.5), seed=0)
    robust = dict(channel_dropout=.3, epochs=1, **FAST)
    config = PretrainConfig(channels=CHANNELS, d_model=16, n_layers=1, **robust)
    learned = pretrain(store, split, tmp_path / "pre", config, progress=False)
    assert learned.config.channels == CHANNELS
    assert train_probe(store, split, learned, tmp_path / "probe", StagingConfig(**robust), progress=False).channels == CHANNELS
    with pytest.raises(Exception, match="EOG"): pretrain(store, split, tmp_path / "no", replace(config, channel_dropout=0.), progress=False)


# ---- pretraining ----

def task_of(config: PretrainConfig) -> MaskedPretraining:
    with seeded(0): return MaskedPretraining(PatchTransformer(PatchConfig.tiny(CHANNELS, 50., patch=100, d_model=16, n_layers=1)), config).eval()


def batch_of():
    x, pad = torch.randn(2, 2, 2000, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 2, 2000, dtype=torch.bool)
    pad[1, :, 1200:] = True
    return x, pad


@pytest.mark.parametrize("target", ["samples", "spectrum"])
@pytest.mark.parametrize("kind", ["mse", "mae", "huber", "cosine"])
@pytest.mark.parametrize("region", ["masked", "all", .25])
def test_region_and_kind_of_the_loss(target, kind, region):
    config = PretrainConfig(channels=CHANNELS, target=target, kind=kind, region=region, mask_block=2)
    task, (x, pad) = task_of(config), batch_of()
    again = lambda: torch.Generator().manual_seed(4)
    with torch.no_grad():
        pred, wanted, mask, hidden = task.predict(x, pad, again())
        error = patch_errors(pred, wanted, kind).mean(-1)
        weight = torch.where(mask, 1., {"masked": 0., "all": 1.}.get(region, region)) * ~hidden
        torch.testing.assert_close(task.batch_loss(dict(x=x, pad=pad), again()), (error * weight).sum() / weight.sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", [("jitter_zero",), ("patch_mask", "reverse"), ("random_mask", "shuffle_channels", "shuffle_patches")])
def test_augmentations_never_touch_the_target_and_follow_the_generator(names):
    config = PretrainConfig(channels=CHANNELS, target="samples", region="all", mask_ratio=0., augmentations=names, channel_dropout=.4)
    task, (x, pad) = task_of(config), batch_of()
    look = lambda seed, x=x: task.predict(x, pad, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        one, same, other = look(0), look(0), look(1)
        assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True)) and not torch.equal(one[0], other[0])
        kept = ~one[3]
        torch.testing.assert_close(one[1][kept], task.encoder.patches(x, pad)[0][kept])
        noise = torch.where(pad, torch.randn(x.shape), x)
        torch.testing.assert_close(task.batch_loss(dict(x=noise, pad=pad), torch.Generator().manual_seed(0)), task.batch_loss(dict(x=x, pad=pad), torch.Generator().manual_seed(0)))


def test_a_task_without_a_question_is_refused():
    for wrong in (dict(mask_ratio=0., region="masked"), dict(region="some"), dict(region=2.), dict(warmup=1.), dict(accumulate=0), dict(loggers=("fax",))):
        with pytest.raises(ConfigError): PretrainConfig(**wrong)


def test_presets_give_the_sizes_they_name(store):
    ids = list(store.manifest["id"])
    ours = new_encoder(store, ids, PretrainConfig(preset="pftsleep")).config
    named = PatchConfig.pftsleep(channels=CHANNELS, rate=50., patch=300, upstream=False)
    assert ours == named and (ours.d_model, ours.n_layers, ours.d_ff, ours.max_patches) == (512, 3, 2048, 4800)
    assert new_encoder(store, ids, PretrainConfig(preset="pftsleep", d_model=32)).config == replace(named, d_model=32, d_ff=128)
    assert new_encoder(store, ids, PretrainConfig()).config == PatchConfig.tiny(CHANNELS, 50.)


# ---- the loop ----

class Numbers(Training):
    def __init__(self, config):
        super().__init__(config)
        with seeded(0): self.net = torch.nn.Linear(4, 1)
        self.rates, self.seeds = [], []
    def batch_loss(self, batch, generator):
        self.seeds.append(generator.initial_seed())
        return (self.net(batch["x"][:, 0, :4]) - 1).square().mean()
    def optimizer_step(self, *args, **kwargs):
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        super().optimizer_step(*args, **kwargs)


def windows(n): return [dict(x=torch.randn(1, 8, generator=torch.Generator().manual_seed(i)), pad=torch.zeros(1, 8, dtype=torch.bool), stages=torch.zeros(1).long(), id=str(i), first=0) for i in range(n)]


@pytest.mark.parametrize(("n", "batch", "accumulate"), [(24, 3, 8), (13, 2, 3), (5, 1, 8), (12, 4, 1)])
def test_the_rate_anneals_over_the_steps_of_the_optimiser(n, batch, accumulate, tmp_path):
    "D9: the original's cycle counted batches, and a sixteenth of it was used."
    epochs = 6
    config = LoopConfig(epochs=epochs, batch_size=batch, accumulate=accumulate, learning_rate=.01, warmup=.3, accelerator="cpu", loggers=())
    fit(task := Numbers(config), windows(n), [], tmp_path, progress=False)
    steps = epochs * math.ceil(math.ceil(n / batch) / accumulate)
    assert len(task.rates) == task.global_step == steps
    assert task.rates == pytest.approx([.01 * one_cycle(i, steps, .3) for i in range(steps)])
    assert max(task.rates) > .007 and task.lr_schedulers().get_last_lr()[0] == pytest.approx(0, abs=1e-12)
    assert len(set(task.seeds)) == epochs * math.ceil(n / batch) # each batch has draws of its own


def test_accumulated_batches_are_one_large_batch(tmp_path):
    learn = dict(epochs=3, learning_rate=.05, accelerator="cpu", loggers=())
    one, parts = Numbers(LoopConfig(batch_size=8, **learn)), Numbers(LoopConfig(batch_size=2, accumulate=4, **learn))
    fit(one, windows(16), [], tmp_path / "one", progress=False); fit(parts, windows(16), [], tmp_path / "parts", progress=False)
    for a, b in zip(one.parameters(), parts.parameters(), strict=True): torch.testing.assert_close(a, b)


def test_only_what_was_asked_for_is_logged(tmp_path):
    fit(Numbers(LoopConfig(epochs=1, **FAST)), windows(4), [], tmp_path, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "logs"]


def test_wandb_says_what_is_missing(tmp_path):
    try: import wandb # noqa: F401
    except ModuleNotFoundError: pass
    else: pytest.skip("wandb is installed")
    config = LoopConfig(epochs=1, accelerator="cpu", loggers=("wandb_offline",))
    with pytest.raises(ConfigError, match="package wandb"): fit(Numbers(config), windows(4), [], tmp_path, progress=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to shard over")
def test_sharding_without_a_gpu_says_so(tmp_path):
    with pytest.raises(ConfigError, match="can't train so"): fit(Numbers(LoopConfig(epochs=1, strategy="fsdp", **FAST)), windows(4), [], tmp_path, progress=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FSDP needs a GPU")
def test_sharded_training_is_the_same_training(tmp_path):
    learn = dict(epochs=3, learning_rate=.05, clip=.1, batch_size=4, accelerator="gpu", loggers=())
    one, shards = Numbers(LoopConfig(**learn)), Numbers(LoopConfig(strategy="fsdp", **learn))
    fit(one, windows(16), [], tmp_path / "one", progress=False); fit(shards, windows(16), [], tmp_path / "shards", progress=False)
    for a, b in zip(one.cpu().parameters(), shards.parameters(), strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- memory ----

def test_frugal_training_gives_the_same_weights(store, split, tmp_path):
    "To the last bit: dropout, masks and batch statistics are those of the plain step."
    config = PretrainConfig(epochs=2, d_model=16, n_layers=2, channel_dropout=.2, **FAST)
    plain, frugal = (pretrain(store, split, tmp_path / str(on), replace(config, frugal=on), progress=False) for on in (False, True))
    assert weights_hash(plain) == weights_hash(frugal)
    assert not any(m.frugal for m in plain.blocks) and all(m.frugal for m in frugal.blocks)
    staged = [train_supervised(store, split, frugal, tmp_path / f"stages {on}", StagingConfig(epochs=1, frugal=on, **FAST), progress=False) for on in (False, True)]
    assert weights_hash(staged[0]) == weights_hash(staged[1]) and not staged[0].encoder.blocks[0].frugal and staged[1].encoder.blocks[0].frugal


def test_a_large_batch_is_frugal_by_itself(encoder, monkeypatch):
    task, batch = MaskedPretraining(encoder, PretrainConfig(channels=CHANNELS)), dict(x=torch.zeros(2, 2, 3000))
    monkeypatch.setattr(MaskedPretraining, "draws", lambda *_: torch.Generator())
    need = stored_bytes(encoder.config, 2, 3000)
    for much, frugal in ((need, False), (need - 1, True)):
        monkeypatch.setattr(runs, "_MUCH", much)
        task.on_train_batch_start(batch, 0)
        assert encoder.blocks[0].frugal == frugal
    gib = lambda c, hours: stored_bytes(c, 1, round(hours * 3600 * c.rate)) / 2**30
    assert gib(PatchConfig.pftsleep(), 8) > 2 < gib(PatchConfig.base(("EEG", "EOG", "EMG")), 8) and gib(PatchConfig.tiny(PatchConfig.pftsleep().channels), 8) < 2


# ---- the curve ----

def test_a_stop_at_any_moment_tears_no_line_and_loses_none(tmp_path, monkeypatch):
    "Lightning's CSV file lost its head to a Ctrl-C, and the line of an epoch to a kill behind the epoch's checkpoint."
    learn = LoopConfig(epochs=4, learning_rate=.05, **FAST)
    whole = fit(Numbers(learn), windows(4), windows(2), tmp_path / "whole", progress=False)
    assert len(whole) == 4 and whole.notna().all(axis=None)
    write, save = runs.write_whole, runs.ModelCheckpoint._save_checkpoint
    for where in ("before the line", "after the line", "before the checkpoint", "after the checkpoint"):
        for epoch in range(3):
            out, calls = tmp_path / f"{where} {epoch}", {"line": 0, "checkpoint": 0}
            def interrupt(what, moment):
                if where == f"{moment} the {what}" and calls[what] == epoch + 1: raise RuntimeError("killed") # noqa: B023
            def line(*args):
                calls["line"] += 1; interrupt("line", "before"); write(*args); interrupt("line", "after") # noqa: B023
            def checkpoint(self, trainer, path):
                if not path.endswith("last.ckpt"): calls["checkpoint"] += 1; interrupt("checkpoint", "before") # noqa: B023
                save(self, trainer, path)
                if path.endswith("last.ckpt"): interrupt("checkpoint", "after")
            with monkeypatch.context() as m, pytest.raises(RuntimeError, match="killed"):
                m.setattr(runs, "write_whole", line); m.setattr(runs.ModelCheckpoint, "_save_checkpoint", checkpoint)
                fit(Numbers(learn), windows(4), windows(2), out, progress=False)
            for file in out.glob("logs/*/*"): assert file.name == "metrics.csv" and {"epoch", "step", "train_loss", "val_loss"} <= {*pd.read_csv(file)}
            pd.testing.assert_frame_equal(fit(Numbers(learn), windows(4), windows(2), out, progress=False), whole)


def test_two_processes_train_one_encoder(store, split, tmp_path):
    "DDP through the command; one run.json, one encoder, one curve."
    split.save(tmp_path / "split.json")
    settings = tmp_path / "two.yaml"
    settings.write_text(yaml.safe_dump(dict(train=dict(epochs=2, batch_size=1, d_model=16, n_layers=1, accelerator="cpu", devices=2, strategy="ddp", loggers=[]))))
    command = [sys.executable, Path(__file__).parents[1] / "jobs/model_training/train_transformer.py", "--config", settings, "--split", tmp_path / "split.json", store.path, tmp_path / "run"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["results"]["weights"] == weights_hash(PatchTransformer.from_pretrained(tmp_path / "run" / "encoder"))
    assert len(history(tmp_path / "run")) == 2 and not list((tmp_path / "run").glob("*.tmp"))
