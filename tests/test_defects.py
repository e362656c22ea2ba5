"""An index of the original PFTSleep's defects: D1 to D12 of the reference's section 10, and the nine bugs of `anchors.md` A6. Each has a test of its name, here or beside what it tests."""
import math
import re
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.model_selection import GroupShuffleSplit

from pftsleep.data.alignment import align
from pftsleep.data.published_splits import pftsleep_split
from pftsleep.data.recording import Hypnogram, Recording, Stage, array_channel
from pftsleep.data.signals import Recipe, apply_recipe
from pftsleep.data.store import create_store
from pftsleep.models.heads import LinearProbe, ProbeConfig
from pftsleep.models.transformer import Block, InstanceNorm, PatchConfig, PatchTransformer
from pftsleep.training.runs import one_cycle

START = datetime(2020, 1, 1, 22)
SAME = {"a6_1": "d4", "a6_3": "d2", "a6_4": "d1", "a6_5": "d5", "a6_8": "d7_a_cosine", "a6_9": "d7_a_masked_loss"} # bugs of A6 that are defects of the reference as well


def test_every_defect_has_a_test():
    names = re.findall(r"^def test_(\w+)", "\n".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py")), re.MULTILINE)
    wanted = [f"d{i}" for i in range(1, 13)] + [SAME.get(f"a6_{i}", f"a6_{i}") for i in range(1, 10)]
    assert not [w for w in wanted if not any(n.startswith(w + "_") for n in names)]


def rand(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- D9: divisions, schedule, clipping ----

def manifest(n: int) -> pd.DataFrame: return pd.DataFrame([dict(id=f"p{i:03}", subject=f"p{i:03}") for i in range(n)])


def test_d9_validation_is_a_tenth_of_what_isnt_tested():
    split = pftsleep_split(manifest(200))
    assert {k: len(v) for k, v in split.parts.items()} == {"train": 126, "val": 14, "test": 60}
    rest, _ = next(GroupShuffleSplit(1, train_size=.7, random_state=126).split(range(140), groups=range(140))) # the original calls its splitter for 70 % again
    assert len(rest) == 98 # and validates on 42


def test_d9_the_test_nights_do_not_depend_on_the_file_system():
    rows = manifest(200)
    as_listed = rows.sample(frac=1, random_state=5) # as a folder may list them
    assert pftsleep_split(rows, first_hundred=True).parts == pftsleep_split(as_listed, first_hundred=True).parts
    original = [np.random.default_rng(123).permutation(r.id.to_numpy())[:100] for r in (rows, as_listed)] # shuffled without having been sorted
    assert set(original[0]) != set(original[1])


def test_d9_the_schedule_anneals_within_the_steps_that_are_made():
    "The original counts batches, and steps once in 8 of them."
    batches, accumulate = 800, 8
    steps = batches // accumulate
    ours, theirs = one_cycle(steps - 1, steps, .1), one_cycle(steps - 1, batches, .1)
    assert ours < .01 < .9 < theirs


def test_d9_clipping_clips():
    x = np.where(np.arange(6000) % 1000 == 0, 900., 20.)
    rec = Recording("c", {"EEG": array_channel("EEG", x, 100, "uV", "EEG")}, START)
    clipped, free = (apply_recipe(rec, r)["EEG"].samples() for r in (Recipe("clipped", clip={"EEG": (-200, 200)}), Recipe("free")))
    assert free.max() == 900 and clipped.max() == 200


# ---- D10: padding in the statistics ----

def test_d10_padding_changes_no_statistic_and_no_token():
    torch.manual_seed(0)
    x, config = rand(1, 1, 3000) * 30 + 5, PatchConfig.tiny(norm="batch")
    longer, pad = torch.cat([x, torch.zeros(1, 1, 6000)], -1), torch.arange(9000)[None] >= 3000
    original = lambda v: (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    assert (original(longer)[..., :3000] - original(x)).abs().max() > .5
    assert torch.allclose(InstanceNorm(1)(longer, pad[:, None])[..., :3000], InstanceNorm(1)(x), atol=1e-5)
    for train in (False, True): # in training, the statistics of batch norm as well
        ours, alone = (PatchTransformer(config).train(train) for _ in range(2))
        alone.load_state_dict(ours.state_dict())
        for m in (ours, alone):
            for d in m.modules():
                if isinstance(d, torch.nn.Dropout): d.p = 0.
        assert torch.allclose(ours(longer, pad)[:, :, :5], alone(x), atol=1e-4)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours.buffers(), alone.buffers(), strict=True))


# ---- D11: short inputs ----

@pytest.mark.parametrize("seconds", [6, 30, 600, 30000])
def test_d11_any_length_is_encoded(seconds):
    "The original adds 4800 positions to whatever number of tokens there is."
    with torch.no_grad(): assert PatchTransformer(PatchConfig.tiny(rate=10., d_model=8, d_ff=8)).eval()(rand(1, 1, 10 * seconds)).shape == (1, 1, seconds // 6, 8)
    if 6 < seconds < 28800: # and fails unless there is one, which is stretched
        with pytest.raises(RuntimeError, match="must match"): _ = rand(1, 1, seconds // 6, 8) + rand(4800, 8)


def test_d11_a_night_of_padding_has_no_stages_and_the_right_length():
    torch.manual_seed(0)
    encoder = PatchTransformer(PatchConfig.tiny()).eval()
    probe = LinearProbe(ProbeConfig(("EEG",), 64, 6.)).eval()
    with torch.no_grad(): logits = probe(encoder.encode(rand(1, 1, 12_000), torch.ones(1, 12_000, dtype=torch.bool)))
    assert logits.shape == (1, 4, 5) and torch.isfinite(logits).all()


# ---- A6 ----

def test_a6_2_a_short_hypnogram_is_kept():
    "The original slices its list of stages like a table, swallows the error, and stores the night without any."
    stages = [0, 2, 2, 3, 4]
    with pytest.raises(TypeError): _ = stages[:, :3]
    rec = Recording("n", {"EEG": array_channel("EEG", np.zeros(100 * 240), 100, "uV", "EEG")}, START) # 8 epochs
    for policy, wanted in (("crop", stages), ("pad_unscored", stages + [-1] * 3)):
        out, _, report = align(rec, Hypnogram(stages, 30, START), policy)
        assert out.hypnogram is not None and out.hypnogram.stages.tolist() == wanted and report.policy == policy
    late = Hypnogram(stages, 30, START + timedelta(seconds=30))
    assert align(rec, late, "pad_unscored")[0].hypnogram.stages.tolist() == [Stage.UNSCORED, *stages, -1, -1]


def test_a6_6_samples_beyond_float16_are_stored(tmp_path):
    x = np.array([-70_000., 2049, 4099, 30_001] * 750)
    with np.errstate(over="ignore"): half = x.astype("float16").astype("float64")
    assert np.isneginf(half[0]) and (half[1:4] != x[1:4]).all()
    store = create_store(tmp_path / "s", Recipe.native())
    store.add(Recording("n", {"EEG": array_channel("EEG", x, 100, "uV", "EEG")}, START), [dict(name="n.edf", bytes=1, sha256="0")])
    store.sync()
    np.testing.assert_array_equal(store["n"]["EEG"].samples(), x)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a6_7_a_block_that_does_nothing_is_the_identity(norm):
    block, x = Block(PatchConfig.tiny(norm=norm)).eval(), rand(2, 7, 64) * 5 + 3
    for p in (*block.attention.parameters(), *block.feed_forward.parameters()): p.data.zero_()
    with torch.no_grad(): out, original = block(x)[0], block.norm2(torch.nn.LayerNorm(64)(x)) # which goes on with what it has normalised
    assert torch.equal(out, x) and (original - x).abs().max() > 1 and math.isfinite(out.sum())
