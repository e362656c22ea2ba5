"""Every script of jobs/animals on small simulated folders in the published layouts, on to a pretrained and a fine-tuned model. The scripts run in this process, and, marked slow, as processes of their own."""
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pftsleep.data.animal_studies import STUDIES, simulate_animals
from pftsleep.data.bouts import find_bouts, open_bout

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
SMALL = ["--d_embedding", 64, "--n_layers", 1, "--patch_size", 10, "--epochs", 1, "--batch_size", 16]
CUT = ["--segment_duration", 1, "--max_window_length", 50]


def run(place: str, *arguments) -> str:
    "As `python jobs/PLACE.py ARGUMENTS`, without the seconds that a process needs to begin; what it prints."
    return _captured(lambda: runpy.run_path(str(ROOT / f"jobs/{place}.py"), run_name="__main__"), [f"{place}.py", *map(str, arguments)])

def _captured(script, argv: list[str]) -> str:
    import contextlib
    import io
    out, before = io.StringIO(), sys.argv
    sys.argv = argv
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out): script()
    except SystemExit as e:
        if e.code not in (None, 0): raise AssertionError(f"{argv[0]}: {e.code}\n{out.getvalue()}") from e
    finally: sys.argv = before
    return out.getvalue()

def process(place: str, *arguments) -> str:
    "The same in a process of its own."
    done = subprocess.run([sys.executable, ROOT / f"jobs/{place}.py", *map(str, arguments)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

def settings(place: str) -> list: return ["--config", ROOT / f"jobs/{place}.yaml"]


def chain(run, name: str, tmp_path: Path, whole: bool = True) -> None:
    "CSV -> bouts -> arrays, and files as they are; `whole`: -> pretrained -> fine-tuned."
    expected, bouts = simulate_animals(name, tmp_path / "csv", 4, 9), tmp_path / "bouts"
    said = run(f"animals/process_{name}", *settings(f"animals/process_{name}"), tmp_path / "csv", bouts / name)
    found = find_bouts(bouts / name)
    assert len(found) == expected and all(b.path.name in said for b in found) and {b.info.fs for b in found} == {STUDIES[name].fs}
    run("animals/data_preparation_pretraining", *settings("animals/data_preparation_pretraining"), "--data_root", bouts, "--output_folder", tmp_path / "pre", "--datasets", name, *CUT)
    x = np.load(tmp_path / "pre/X_train.npy")
    assert x.shape[1:] == (50, 3) and np.isfinite(x).all() and .2 < np.median(np.linalg.norm(x, axis=2)) < 3 # g, whatever the source has
    if not whole: return
    run("model_training/pretrain", *settings("model_training/pretrain"), "--data_path", tmp_path / "pre", "--output_dir", tmp_path / "arrays", *SMALL)
    run("model_training/pretrain", *settings("model_training/pretrain"), "--data_path", bouts, "--datasets", name, "--output_dir", tmp_path / "files", "--oversampling_factor", 2, *CUT, *SMALL)
    models = [next((tmp_path / way).glob("*/model.pt")) for way in ("arrays", "files")]
    prepare = [*settings("animals/data_preparation_finetuning"), "--data_root", bouts, "--output_folder", tmp_path / "fine", "--dataset_name", name, "--n_folds", 2, *CUT]
    if not any(b.labelled for b in found): # the foaling mares have no labels
        with pytest.raises(AssertionError, match="no window of 1 s has one label"): run("animals/data_preparation_finetuning", *prepare)
        return
    run("animals/data_preparation_finetuning", *prepare)
    for k, model in enumerate(models):
        said = run("model_training/finetune_classification", *settings("model_training/finetune_classification"), "--data_path", tmp_path / "fine" / name, "--output_dir", tmp_path / f"tuned{k}", "--pretrained_model_path", model, "--n_classes", 3, *SMALL)
        assert "macro_f1" in said and "by animal" in said
        y, = (tmp_path / f"tuned{k}").rglob("y_pred_fold_0.npy")
        assert len(np.load(y)) == len(np.load(tmp_path / f"fine/{name}/fold_0/y_val.npy"))


@pytest.mark.parametrize("name", STUDIES)
def test_each_data_set(name, tmp_path): chain(run, name, tmp_path, name == "waves_equine_activities") # two sensors, two layouts of file names: the others go all the way below


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_each_data_set_with_processes(name, tmp_path): chain(process, name, tmp_path)


def test_bouts_without_animals_say_so_to_the_end(tmp_path):
    "The layout of the white storks: one row per bout, 40 samples at 10.54 Hz, nobody knows whose."
    rng, n, t = np.random.default_rng(0), 40, np.arange(40) / 10.54
    rows = [[*np.c_[3 * (k % 2) * np.sin(20 * t), rng.normal(0, .2, n), 9.8 + rng.normal(0, .2, n)].reshape(-1).tolist(), f"A_{'FS'[k % 2]}"] for k in range(24)]
    pd.DataFrame(rows, columns=[*(f"{a}{i}" for i in range(n) for a in "xyz"), "behaviour"]).to_csv(tmp_path / "storks.csv", index=False)
    said = run("animals/process_whitestork", *settings("animals/process_whitestork"), tmp_path / "storks.csv", tmp_path / "bouts/storks")
    assert "24 bouts" in said and "m/s2" in said and "doesn't tell" in said
    cut = ["--segment_duration", 40 / 10.54, "--max_window_length", 40, "--rate", 10.54]
    said = run("animals/data_preparation_finetuning", *settings("animals/data_preparation_finetuning"), "--data_root", tmp_path / "bouts", "--output_folder", tmp_path / "fine", "--dataset_name", "storks", "--n_folds", 2, *cut)
    assert "doesn't tell animals apart" in said
    said = run("model_training/finetune_classification", "--data_path", tmp_path / "fine/storks", "--output_dir", tmp_path / "runs", "--avg_pool", *SMALL)
    assert "animals are not known" in said


def test_any_table(tmp_path):
    t = np.arange(500) / 50
    pd.DataFrame(dict(time=t, x=np.sin(t), y=0 * t, z=1 + 0 * t, behaviour="walk")).to_csv(tmp_path / "dog.csv", index=False)
    run("animals/process_csv", *settings("animals/process_csv"), tmp_path / "dog.csv", tmp_path / "dogs", "--time_unit", "s", "--unit", "g")
    bout = open_bout(tmp_path / "dogs/dog_1_ds_0.hdf5")
    assert bout.labelled and bout.n_samples == 500 and bout.info.units == {"acc": "g"}


def test_a_device(tmp_path):
    if not (path := SHARED / "realdata/accelerometer_human/pygt3x/ISM_Enabled.gt3x").exists(): pytest.skip("../shared/realdata is not here")
    said = run("animals/process_device", *settings("animals/process_device"), path, tmp_path)
    assert "human_1_ds_0.hdf5" in said and open_bout(tmp_path / "human_1_ds_0.hdf5").info.fs == 30


@pytest.mark.parametrize("name", [p.stem for p in sorted((ROOT / "jobs/animals").glob("process_*.py"))])
def test_a_mistake_is_one_line(name, tmp_path):
    with pytest.raises(AssertionError) as e: run(f"animals/{name}", *settings(f"animals/{name}"), tmp_path / "nothing", tmp_path / "bouts")
    assert f"{name}: " in str(e.value) and "Traceback" not in str(e.value)
