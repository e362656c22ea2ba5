"""Writes small checkpoints with the code of an earlier commit, for tests/test_backward_compatibility.py.

    python tests/checkpoints/make.py COMMIT ...

The code of each commit is unpacked outside the repository (`git archive`, which changes nothing), and this file is run with it once more. Once written, a folder is never made anew: it stands for what people have on
their disks. After a change of format, add a folder.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def build(commit: str) -> None:
    out = HERE / commit
    if out.exists(): raise SystemExit(f"{out} is there: what was written once stays as it is")
    with tempfile.TemporaryDirectory() as old:
        archive = subprocess.run(["git", "archive", commit, "pftsleep"], cwd=HERE.parents[1], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", old], input=archive, check=True)
        subprocess.run([sys.executable, str(Path(__file__).resolve()), "--inside", str(out)], cwd=old, check=True, env=os.environ | {"PYTHONPATH": old})
    print(f"{out.name}: {sum(p.stat().st_size for p in out.rglob('*') if p.is_file()) / 1e3:.0f} kB")


def inside(out: Path) -> None:
    "With whatever version of the library is on the path. What it doesn't have yet is left out."
    import numpy as np
    import torch
    from pftsleep.data.signals import Recipe
    from pftsleep.models.heads import LinearProbe
    from pftsleep.models.stager import Stager, save_stager
    from pftsleep.models.transformer import PatchConfig, PatchTransformer

    torch.manual_seed(0)
    out.mkdir(parents=True)
    recipe = Recipe(name="old", channels=("EEG", "EOG"), rate=10.)
    small = dict(d_model=16, n_layers=2, d_ff=32)
    x, pad = torch.randn(2, 2, 1200), torch.zeros(2, 2, 1200, dtype=torch.bool)
    pad[0, 1], pad[1, :, 900:] = True, True
    answers: dict[str, np.ndarray] = {"x": x.numpy(), "pad": pad.numpy()}
    facts: dict[str, object] = {"recipe": recipe.to_dict()}

    def lived_in(module):
        for name, b in module.named_buffers():
            if name.endswith("running_mean"): b.normal_(0, .1)
            if name.endswith("running_var"): b.uniform_(.5, 1.5)
        return module.eval()

    def encoder(name: str, config: PatchConfig, samples: int = 1200) -> PatchTransformer:
        model = lived_in(PatchTransformer(config, recipe.to_dict()))
        model.save_pretrained(out / name)
        with torch.no_grad(): answers[name] = model.encode(x[..., :samples], pad[..., :samples]).values.numpy()
        return model

    tiny = encoder("tiny", PatchConfig.tiny(("EEG", "EOG"), 10., **small))
    encoder("pftsleep", PatchConfig.pftsleep(channels=("EEG", "EOG"), rate=10., patch=60, max_patches=20, **small))
    encoder("learned", PatchConfig.tiny(("EEG", "EOG"), 10., position="learned", max_patches=20, embedding="per_channel", norm="batch", residual_attention=True, **small))
    stager = Stager(tiny, lived_in(LinearProbe.of(tiny)), recipe, dict(task="probe")).eval()
    save_stager(stager, out / "stager")
    with torch.no_grad(): answers["stager"] = stager(x, pad).numpy()

    def later(module: str, *names: str):
        try: found = __import__(f"pftsleep.models.{module}", fromlist=names)
        except ImportError: return None
        return [getattr(found, n) for n in names]

    if heads := later("head_parts", "Head"):
        rnn = Stager(tiny, lived_in(heads[0].of(tiny, preset="gru", hidden=8)), recipe, dict(task="probe")).eval()
        save_stager(rnn, out / "stager-gru")
        with torch.no_grad(): answers["stager-gru"] = rnn(x, pad).numpy()
    if bouts := later("aar", "BoutClassifier", "BoutClassifierConfig"):
        model = lived_in(bouts[0](bouts[1](PatchConfig.aar(channels=("EEG", "EOG"), rate=10., patch=60, max_patches=20, d_model=16, d_ff=32, n_layers=1, n_heads=2, head_width=8), ("lying", "walking"), "mean")))
        model.save_pretrained(out / "bouts")
        with torch.no_grad(): answers["bouts"] = model(x, pad).numpy()
    if later("pat", "PAT"):
        from pftsleep.training.finetune import TaskHead, TaskHeadConfig, TaskModel, save_task
        week = PatchTransformer(PatchConfig(("Activity",), 1 / 60, 60, d_model=8, d_ff=16, n_layers=1, n_heads=2, embedding="shared", instance_norm=False, norm_eps=1e-6, activation="relu"))
        task = TaskModel(week, TaskHead(TaskHeadConfig(8, 3, 4)), ("none", "mild", "severe"), None, dict(task="old")).eval()
        save_task(task, out / "task")
        with torch.no_grad(): answers["task"] = task(x[:, :1], pad[:, :1]).numpy()
    (out / "facts.json").write_text(json.dumps(facts, indent=1))
    np.savez(out / "answers.npz", **answers)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]: inside(Path(sys.argv[2]))
    else:
        for each in sys.argv[1:]: build(each)
