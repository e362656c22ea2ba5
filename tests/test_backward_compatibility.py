"""What an earlier version wrote, today's reads, and it answers as it did. The folders of tests/checkpoints/ were written by the code of the commit that they are named after (tests/checkpoints/make.py)."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pftsleep.data.signals import Recipe
from pftsleep.models.aar import BoutClassifier
from pftsleep.models.stager import load_stager, save_stager
from pftsleep.models.transformer import PatchTransformer

HERE = Path(__file__).parent / "checkpoints"
COMMITS = sorted(p.name for p in HERE.iterdir() if (p / "answers.npz").is_file())
MODELS = [(c, m.name) for c in COMMITS for m in sorted((HERE / c).iterdir()) if m.is_dir()]


def load(folder: Path):
    if (folder / "task.json").exists():
        pytest.importorskip("lightning", reason="the extra `train` is not installed")
        from pftsleep.training.finetune import load_task
        return load_task(folder)
    if (folder / "stager.json").exists(): return load_stager(folder)
    kind = json.loads((folder / "config.json").read_text())["class"]
    return {"BoutClassifier": BoutClassifier, "PatchTransformer": PatchTransformer}[kind].from_pretrained(folder)


def answer(model, x: torch.Tensor, pad: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        if isinstance(model, PatchTransformer): return model.encode(x, pad).values.numpy()
        n = len(model.encoder.config.channels)
        return model(x[:, :n], pad[:, :n]).numpy()


def test_there_is_something_to_read():
    assert len(COMMITS) >= 3 and {"tiny", "stager", "stager-gru", "bouts", "task"} <= {m for _, m in MODELS}


@pytest.mark.parametrize("commit, name", MODELS)
def test_a_checkpoint_answers_as_when_it_was_written(commit, name):
    with np.load(HERE / commit / "answers.npz", allow_pickle=False) as kept: x, pad, wanted = (torch.from_numpy(kept["x"]), torch.from_numpy(kept["pad"]), kept[name])
    np.testing.assert_allclose(answer(load(HERE / commit / name), x, pad), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("commit, name", MODELS)
def test_a_checkpoint_that_is_saved_again_is_the_same(commit, name, tmp_path):
    model = load(HERE / commit / name)
    if isinstance(model, PatchTransformer | BoutClassifier): model.save_pretrained(tmp_path)
    elif (HERE / commit / name / "stager.json").exists(): save_stager(model, tmp_path)
    else:
        from pftsleep.training.finetune import save_task
        save_task(model, tmp_path)
    again = load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("commit", COMMITS)
def test_an_old_recipe_prepares_as_it_did(commit):
    "Settings that came later have to mean what was done before them."
    old = json.loads((HERE / commit / "facts.json").read_text())["recipe"]
    recipe = Recipe.from_dict(old)
    assert (recipe.name, recipe.channels, recipe.rate) == ("old", ("EEG", "EOG"), 10.) and Recipe.from_dict(recipe.to_dict()) == recipe
    assert load_stager(HERE / commit / "stager").recipe.hash == recipe.hash


@pytest.mark.parametrize("commit", COMMITS)
def test_checkpoints_are_small_and_tell_nothing_of_the_machine(commit):
    files = [p for p in (HERE / commit).rglob("*") if p.is_file()]
    assert all(p.stat().st_size < 100_000 for p in files), [p.name for p in files]
    assert not any(word in p.read_bytes() for p in files for word in [b"/%s/" % w for w in (b"root", b"home", b"tmp", b"work")])
