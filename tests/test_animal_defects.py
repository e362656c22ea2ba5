"""The animal-activity model: which test keeps which defect of the original away (shared/reference/aar.md, section 8), and tests of those that the other files don't cover.

    item  what the original does                                             test
    1     NaN reach the network in fine-tuning and in the CNN                test_aar: test_padding_never_reaches_the_network_and_other_nan_are_refused
          `unknown` becomes a class; labels (n, 1) crash the loader          test_segments: test_1_no_nan_no_unknown_and_labels_of_two_dimensions; test_bouts: test_the_originals_files_are_read
    2     average pooling raises, the dropout argument is ignored            test_aar: test_every_pool_works_in_both_modes
          unlocked_layers 0 means the opposite                               test_aar: test_freezing_as_the_seed_says
    3     no resampling, no units                                            test_segments: test_3_one_rate_and_one_unit, test_3_a_file_without_unit_is_measured_or_refused
          padding is seen and counted                                        test_aar: test_padding_is_masked_in_attention_and_loss
          the last patch that is pooled is padding                           here: test_3_the_last_patch_is_never_padding
    4     validation and training unseeded, splits by directory order        test_segments: test_4_everything_is_seeded_and_no_listing_order_counts; test_aar: test_the_same_seed_gives_the_same_run; test_bouts: test_listing_order_and_ten_after_nine
    5     quotas by recording, validation oversampled, last start never      test_segments: test_5_quotas, test_5_the_last_start_and_the_exact_length
          used, exact lengths dropped, quotas lost                           test_segments: test_5_what_is_too_short_gives_its_quota_to_others
    6     mixed axes crash, sensors are mixed, gyroscopes never used         test_segments: test_6_sensors_are_samples_of_their_own; test_bouts: test_goats_sensors_stay_apart
    7     float64 arrays in memory, nothing lazy, no chunks                  test_segments: test_7_nothing_is_held; test_bouts: test_a_stream_is_the_same_as_one_piece; here: test_7_pretraining_draws_from_files
    8     exceptions swallowed, an empty result crashes                      test_segments: test_8_nothing_is_swallowed
    9     weights loaded non-strictly                                        test_aar: test_loading_is_strict
          positions tied to the window, the patch must divide it             test_aar: test_other_windows_and_patches, test_a_published_encoder_is_tuned_on_longer_windows
    10    Noam can't be checkpointed, no resume                              test_aar: test_a_killed_run_goes_on_to_the_same_weights
          last weights, no early stopping                                    test_aar: test_the_best_weights_are_kept_and_patience_ends_the_run
          no mixed precision, no clipping                                    here: test_10_bfloat16_gives_nearly_the_same_gradient, test_10_a_step_is_clipped
          no class weights                                                   test_aar: test_class_weights_make_classes_equal
          no macro-F1, no confusion matrix                                   here: test_10_macro_f1_and_confusion
          the reported fold chooses the epoch                                test_aar: test_the_reported_fold_never_chooses_anything
    11    one dense step over everything                                     test_aar: test_parts_of_a_batch_add_up; here: test_11_what_is_not_hidden_is_not_computed_to_the_end
    12    paths of one laboratory                                            here: test_12_no_default_is_a_place_on_somebodys_disk
          imports that clash, relative to the script                         here: test_12_scripts_run_from_anywhere
          names of runs collide within a second                              test_aar: test_two_runs_of_one_second_have_folders_of_their_own
          arrays of objects that need pickle                                 test_segments: test_12_arrays_need_no_pickle; test_aar: test_pickled_labels_are_never_opened
"""
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import f1_score

from pftsleep.data.bouts import dataset_to_hdf5
from pftsleep.data.segments import prepare_finetuning, prepare_pretraining
from pftsleep.models.aar import BoutAutoencoder, Pool, aar_config, hide, reconstruction_loss
from pftsleep.training import cross_validation as module
from pftsleep.training.bouts import Bouts, PretrainBouts, TuneBouts, filling_losses, pretrain_bouts
from pftsleep.training.cross_validation import activity_metrics, confusion_table, cross_validate, finetune_arrays, pretrain_arrays, pretraining

ROOT = Path(__file__).parents[1]
SCRIPTS = [*(ROOT / "jobs/animals").glob("*.py"), *(ROOT / "jobs/model_training").glob("pretrain.py"), *(ROOT / "jobs/model_training").glob("finetune_classification.py")]
SMALL = dict(d_embedding=64, n_layers=2, patch_size=10, window=50)


def cattle(folder: Path, animals=4, seconds=30) -> Path:
    t = np.arange(seconds * 25) / 25
    for i in range(1, animals + 1):
        x = np.stack([.3 * np.sin(2 * np.pi * (1 + i / 4) * t), .2 * np.cos(2 * np.pi * t), np.ones_like(t)], 1)
        dataset_to_hdf5(folder, i, 0, dict(acc=x, label=np.where(t < seconds / 2, "walk", "stand")), 25, "neck", "cow", dict(acc="g"))
    return folder


def test_the_table_names_every_item_and_tests_that_exist():
    items = {int(m) for m in re.findall(r"^ {4}(\d+) ", __doc__, re.M)}
    assert items == set(range(1, 13))
    known = {name: set(re.findall(r"^def (test_\w+)", (ROOT / f"tests/{name}.py").read_text(), re.M)) for name in ("test_aar", "test_segments", "test_bouts")} | {"here": {n for n in globals() if n.startswith("test_")}}
    place, named = "", 0
    for word in re.findall(r"test_\w+:?|here:", __doc__):
        if word.endswith(":"): place = word[:-1]
        else: assert word in known[place], f"{place}: {word}"; named += 1
    assert named > 30


def test_3_the_last_patch_is_never_padding():
    values, pad = torch.arange(2 * 3 * 5 * 4.).reshape(2, 3, 5, 4), torch.zeros(2, 3, 5, dtype=torch.bool)
    pad[0, :, 2:] = True # a quarter of a window, as at 25 Hz
    out = Pool("last", 4)(values, pad)
    assert torch.equal(out[0], values[0, :, 1]) and torch.equal(out[1], values[1, :, 4])


def test_7_pretraining_draws_from_files(tmp_path, monkeypatch):
    "Each epoch draws other segments; nothing is written beforehand; rate and rule stay with the encoder; arrays work as before."
    cattle(tmp_path / "cows")
    seen = []
    draw = module.Pretraining.segments
    monkeypatch.setattr(module.Pretraining, "segments", lambda self, part, epoch=0: seen.append((part, epoch)) or draw(self, part, epoch))
    small = dict(d_embedding=64, n_layers=1, patch_size=10, batch_size=16, epochs=3, warmup_steps=5, max_window_length=50, segment_duration=2.)
    out = pretrain_arrays(str(tmp_path), str(tmp_path / "runs"), datasets=["cows"], oversampling_factor=1., **small)
    assert {(p, e) for p, e in seen} == {("train", 0), ("train", 1), ("train", 2), ("val", 0)} and not list(tmp_path.rglob("*.npy"))
    config = json.loads((out / "encoder/config.json").read_text())
    assert config["config"]["rate"] == 25 and config["recipe"]["duration"] == 2 and (out / "model.pt").exists()
    about = json.loads((out / "preparation.json").read_text())
    assert not set(about["subjects"]["train"]) & set(about["subjects"]["val"]) and len(about["subjects"]["train"]) == 2
    prepare_pretraining(str(tmp_path), str(tmp_path / "arrays"), ["cows"], oversampling_factor=1., segment_duration=2., max_window_length=50)
    assert json.loads((tmp_path / "arrays/preparation.json").read_text()) == about # the same animals, the same rule
    prepare_finetuning(str(tmp_path), str(tmp_path / "folds"), "cows", 2., 50, n_folds=2)
    tuned = finetune_arrays(str(tmp_path / "folds/cows"), str(tmp_path / "tuned"), str(out), d_embedding=64, n_layers=1, patch_size=10, epochs=1)
    assert (tuned / "fold_0/y_pred_fold_0.npy").exists() and "by animal" in (tuned / "table.csv").read_text()


def test_few_labels_and_all_the_rest_without_them(tmp_path, monkeypatch):
    "What the labels are taken from is all looked at in pretraining; the reported part is not."
    rng, label = np.random.default_rng(0), np.arange(60) // 6 % 2
    bouts = Bouts(rng.normal(size=(60, 3, 50)), label, ("a", "b"), subjects=np.array([f"s{i % 6}" for i in range(60)]))
    seen, real = [], pretrain_bouts
    monkeypatch.setattr(module, "pretrain_bouts", lambda encoder, train, val, *a, **k: seen.append((set(train.rows), set(val.rows))) or real(encoder, train, val, *a, **k))
    learn = pretraining(aar_config(**SMALL | dict(n_layers=1)), PretrainBouts(epochs=1, batch_size=32, plot_every=0), TuneBouts(epochs=1, batch_size=16))
    tuned, fit = [], module.tune_bouts
    monkeypatch.setattr(module, "tune_bouts", lambda base, train, *a: tuned.append(len(train)) or fit(base, train, *a))
    cross_validate(bouts, dict(p=learn), tmp_path, 2, max_samples=3)
    folds = module.nested_folds(label, bouts.subjects, 2)
    assert seen == [(set(f.train), set(f.select)) for f in folds] and tuned == [6, 6]


def test_subjects_are_known_or_not_by_a_field(tmp_path):
    from pftsleep.data.segments import labelled_segments
    cattle(tmp_path / "cows", 2)
    dataset_to_hdf5(tmp_path / "storks", 0, 0, dict(acc=np.ones((200, 3)), label=["fly"] * 100 + ["sit"] * 100), 25, "back", "stork", dict(acc="g"), subject_known=False)
    rule = module.SegmentRule(2., 50)
    known, unknown = (labelled_segments(tmp_path / d, rule)[0] for d in ("cows", "storks"))
    assert module.subjects_known(known) and not module.subjects_known(unknown) and not module.subjects_known(module.Part(unknown, np.arange(2)))


def test_10_bfloat16_gives_nearly_the_same_gradient():
    torch.manual_seed(0)
    m, x = BoutAutoencoder(aar_config(**SMALL, dropout=0.)), torch.randn(8, 3, 50)
    def gradient(precision):
        m.zero_grad()
        for loss in filling_losses(m, x, None, PretrainBouts(precision=precision), torch.Generator().manual_seed(0)): loss.backward()
        return torch.cat([p.grad.flatten() for p in m.parameters()])
    a, b = gradient("32"), gradient("bf16")
    assert a.dtype == b.dtype == torch.float32 and 0 < (a - b).norm() < .05 * a.norm()


def test_10_a_step_is_clipped(tmp_path, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    def watched(parameters, most):
        clip(parameters := list(parameters), most)
        norms.append(torch.cat([p.grad.flatten() for p in parameters]).norm().item())
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    loud = Bouts(100 * np.random.default_rng(0).normal(size=(20, 3, 50)), np.full(20, -1))
    pretrain_bouts(aar_config(**SMALL), loud, loud, tmp_path, PretrainBouts(epochs=1, batch_size=10, plot_every=0))
    assert norms == pytest.approx([1., 1.], rel=1e-3)


def test_10_macro_f1_and_confusion():
    rng = np.random.default_rng(0)
    truth, said = rng.integers(0, 3, 200), rng.integers(0, 3, 200)
    table = activity_metrics(truth, said, 3)
    assert table.loc["macro_f1", "value"] == pytest.approx(f1_score(truth, said, average="macro"))
    cells = confusion_table(truth, said, ("a", "b", "c"))
    assert {"share", "low", "high"} <= set(cells.columns) and (cells["low"] <= cells["share"]).all() and cells.groupby("truth")["share"].sum().round(6).eq(1).all()


@pytest.mark.parametrize("embedding", ["linear", "conv"])
def test_11_what_is_not_hidden_is_not_computed_to_the_end(embedding):
    "The same loss and gradient as that of all patches, padding or not; the last block's feed-forward network reads hidden patches alone."
    torch.manual_seed(0)
    m, x = BoutAutoencoder(aar_config(**SMALL | dict(patch_size=13), embedding_type=embedding, dropout=0.)), torch.randn(4, 3, 50)
    read = []
    m.encoder.blocks[-1].feed_forward.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[:-1].numel()))
    for pad in (None, torch.arange(50).expand(4, 50) >= torch.tensor([50, 30, 12, 45])[:, None]):
        patches, hidden, real = m.cut(x, pad)
        masked = hide(torch.rand(patches.shape[:3]), .5, hidden)
        every = reconstruction_loss(m(patches, hidden, masked), patches, masked, real)
        a = torch.autograd.grad(every, list(m.parameters()))
        few = reconstruction_loss(m.fill_in(patches, hidden, masked), patches[masked], masked[masked], real[masked])
        b = torch.autograd.grad(few, list(m.parameters()))
        assert read[-2:] == [masked.numel(), masked.sum()] and torch.allclose(every, few, rtol=1e-5)
        for p, q in zip(a, b, strict=True): torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-4)


def test_12_no_default_is_a_place_on_somebodys_disk():
    from pftsleep.data.animal_studies import convert_csv, convert_device, convert_rabc, convert_study
    for job in (pretrain_arrays, finetune_arrays, prepare_pretraining, prepare_finetuning, convert_study, convert_csv, convert_device, convert_rabc):
        for name, p in inspect.signature(job).parameters.items(): assert not (isinstance(p.default, str) and re.search(r"[/\\]|^~", p.default.replace("m/s2", ""))), f"{job.__name__}({name})"
    for script in SCRIPTS:
        for name, value in yaml.safe_load(script.with_suffix(".yaml").read_text()).items():
            if isinstance(value, str): assert not re.match(r"[/~]|\w:\\|\.\.", value), f"{script.stem}: {name}"
        assert not re.search(r"sys\.path|^(from|import) utils", script.read_text(), re.M), script.stem


@pytest.mark.slow
def test_12_scripts_run_from_anywhere(tmp_path):
    "A folder with a `utils.py` of its own changes nothing."
    (tmp_path / "utils.py").write_text("raise SystemExit('the wrong one')")
    for script in SCRIPTS:
        done = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
        assert done.returncode == 0 and "--config" in done.stdout, f"{script.stem}: {done.stderr}"
