"""What is saved beside a model, a study or a report is replaced in one step: a disk that fills up leaves the old file, and nothing else."""
import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from pftsleep.data.signals import Recipe
from pftsleep.errors import StoreError
from pftsleep.evaluation.report import Report
from pftsleep.models.heads import LinearProbe, ProbeConfig
from pftsleep.models.stager import Stager, save_stager
from pftsleep.models.transformer import PatchConfig, PatchTransformer

RECIPE = Recipe.default(channels=("EEG",))


def stager() -> Stager:
    encoder = PatchTransformer(PatchConfig(("EEG",), RECIPE.rate, 100, 16, 1, 2))
    return Stager(encoder, LinearProbe(ProbeConfig(("EEG",), 16, 100 / RECIPE.rate)), RECIPE, {})


def study(folder: Path) -> None:
    pytest.importorskip("optuna", reason="the extra `scale` is not installed")
    pytest.importorskip("lightning", reason="the extra `train` is not installed")
    from pftsleep.apps.training import write_study
    write_study(SimpleNamespace(get_trials=lambda **_: []), SimpleNamespace(out=folder))


WRITERS = {"stager.json": lambda d: save_stager(stager(), d), "report.html": lambda d: Report("x").save(d / "report.html"), "trials.csv": study}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, name):
    WRITERS[name](tmp_path)
    before = {p.relative_to(tmp_path) for p in tmp_path.rglob("*")}
    (tmp_path / name).write_text("old")
    replace = Path.replace
    def full(part, target):
        if Path(target).name == name: raise OSError(errno.ENOSPC, "No space left on device")
        return replace(part, target)
    with monkeypatch.context() as m:
        m.setattr(Path, "replace", full)
        with pytest.raises((OSError, StoreError)): WRITERS[name](tmp_path)
    assert (tmp_path / name).read_text() == "old" and {p.relative_to(tmp_path) for p in tmp_path.rglob("*")} == before
    WRITERS[name](tmp_path)
    assert (tmp_path / name).read_text() != "old"
