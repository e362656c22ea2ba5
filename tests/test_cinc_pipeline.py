"""SleepFM's pipeline on the CinC 2018 challenge: the original's rows and values, the labels of real files, preprocessing, windows, and the way from files to figures."""
import json
import os
import shutil
import struct
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.utils.data import DataLoader

from pftsleep.data.convert import convert
from pftsleep.data.hypnograms import read_hypnogram
from pftsleep.data.open_cohorts import CINC2018
from pftsleep.data.recording import Hypnogram, Recording, Stage, array_channel
from pftsleep.data.signals import Recipe, apply_recipe
from pftsleep.data.simulate import simulate_night
from pftsleep.data.simulate_open import simulate_open_study
from pftsleep.data.sleepfm_epochs import (EpochDataset, Epochs, StoreNights, UpstreamNights, at_most, converter_steps, epoch_batches, epoch_table, night_epochs, sample_stages,
    stretch, upstream_bouts, upstream_epochs, upstream_skips, upstream_starts)
from pftsleep.data.sleepfm_recipes import CINC_LABELS, SLEEPFM_MODALITIES, clinical_signal
from pftsleep.data.sleepfm_windows import WindowsOf, channel_groups, collate_groups, read_sleepfm_h5, write_sleepfm_h5
from pftsleep.data.store import create_store, open_store
from pftsleep.data.study_formats import read_arousal_mat, read_cinc2018
from pftsleep.data.wfdb_dreem import read_wfdb
from pftsleep.errors import ChannelError, ConfigError, PFTSleepError, StoreError
from pftsleep.models.sleepfm import PUBLISHED_CHANNELS, SleepFMConfig, SleepFMEncoder
from pftsleep.models.transformer import PatchConfig, PatchTransformer
from pftsleep.training.embedding_probe import Embeddings, class_figures, embed_nights, evaluate_probe, features, read_embeddings, upstream_figures

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
STAGES = {int(s): s.name for s in Stage if s >= 0}


@pytest.fixture
def fixtures():
    if not (folder := SHARED / "fixtures" / "sleepfm").is_dir(): pytest.skip("the fixtures of SleepFM aren't beside the clone")
    return folder

@pytest.fixture
def real():
    if not (folder := SHARED / "realdata" / "cinc2018").is_dir(): pytest.skip("the real files of CinC 2018 aren't beside the clone")
    return folder


# the original's epochs

def test_the_originals_epochs_and_values(fixtures):
    "Names, starts and stages of every epoch, what is cut, and the values of three channels."
    wanted, values = json.loads((fixtures / "cinc" / "expected.json").read_text()), np.load(fixtures / "cinc" / "expected_values.npz")
    of_ours = {label: name for name, label in CINC_LABELS.items()}
    rows = [of_ours[c] for c in wanted["value_channels"]]
    assert [list(CINC_LABELS).index(n) for n in rows] == wanted["value_rows"]
    code = {"wake": Stage.W, "nonrem1": Stage.N1, "nonrem2": Stage.N2, "nonrem3": Stage.N3, "rem": Stage.REM, "undefined": Stage.UNSCORED}
    for id, about in wanted["records"].items():
        folder = fixtures / "cinc" / "raw" / id
        stages = sample_stages(folder / f"{id}-arousal.mat")
        if "skipped" in about:
            assert "undefined stage never changes" in upstream_skips(folder)
            with pytest.raises(PFTSleepError, match="never changes"): upstream_epochs(folder)
            continue
        cut, bouts = upstream_bouts(stages)
        assert cut == about["samples_cut_at_start"] and [[b.start, b.length, b.stage] for b in bouts] == [[s, n, code[stage]] for s, n, stage in about["bouts_200hz"]]
        e = upstream_epochs(folder)
        assert len(e) == about["n_epochs"] and e.stages.tolist() == [code[x["stage"]] for x in about["epochs"]]
        assert [round(s * 256) for s in e.starts] == [x["start_sample_256hz"] for x in about["epochs"]]
        assert e.recording["C3-M2"].n_samples == about["resampled_length"]
        x = e.read(rows, scale="as_stored")
        for key, k in ((f"{id}_first", 0), (f"{id}_last", -1)):
            if key in values: assert np.abs(x[k] - values[key]).max() < 1e-4


def test_all_that_the_original_leaves_out(fixtures, tmp_path):
    shutil.copytree(fixtures / "cinc" / "raw", tmp_path / "raw")
    (tmp_path / "raw" / "tr00-0002" / "notes.txt").write_text("a fifth file")
    nights = UpstreamNights(tmp_path)
    assert nights.ids == ["tr00-0001"] and set(nights.skipped) == {"tr00-0002", "tr00-0003"} and "5 files" in nights.skipped["tr00-0002"]
    head = tmp_path / "raw" / "tr00-0001" / "tr00-0001.hea"
    head.chmod(0o644)
    head.write_text(head.read_text().replace("CHEST", "OTHER"))
    assert "no CHEST" in upstream_skips(head.parent)


def test_nothing_is_lost_by_default(fixtures):
    "The fixture's 154 scored seconds: the original finds four half minutes and no REM; a scorer's grid keeps them all."
    folder = fixtures / "cinc" / "raw" / "tr00-0001"
    stages = np.repeat([-1, 0, 1, 2, 2, 3, 4], 30 * 200).astype("int8")
    theirs = upstream_starts(upstream_bouts(stages)[1])[1]
    ours = night_epochs(Recording("n", {"C3-M2": array_channel("C3-M2", np.zeros(len(stages)), 200, "uV", "EEG")}, hypnogram=Hypnogram(stages[::6000], 30)))
    assert theirs.tolist() == [0, 1, 2, 2, 3] and ours.stages.tolist() == [0, 1, 2, 2, 3, 4]
    assert ours.starts.tolist() == [30, 60, 90, 120, 150, 180]
    assert len(upstream_epochs(folder)) == 4


@given(arrays("int8", st.integers(2, 60), elements=st.sampled_from([-1, 0, 1, 2, 3, 4])))
def test_bouts_tile_what_is_kept(stages):
    if not (np.diff(stages == -1) != 0).any():
        with pytest.raises(PFTSleepError, match="never changes"): upstream_bouts(stages)
        return
    cut, bouts = upstream_bouts(stages)
    assert sum(b.length for b in bouts) == len(stages) - cut and all(b.length > 0 for b in bouts)
    assert [b.start for b in bouts] == [0, *np.cumsum([b.length for b in bouts])[:-1]][:len(bouts)]
    for b in bouts: assert stages[cut + max(b.start - 1, 0)] == b.stage # one sample late, but for the first


# labels of real files

def test_real_labels_against_the_challenges_own_truth(real):
    "Half minutes of each stage, by the .arousal annotations, are those of the one-hot vectors of -arousal.mat; changes there are one sample early."
    h = read_cinc2018(real / "tr03-0005.arousal").hypnogram
    counts = {s.name: int((h.stages == s).sum()) for s in Stage}
    with h5py.File(real / "tr03-0005-arousal.mat") as f: seconds = {k: int(v[0].sum()) / 200 for k, v in f["data/sleep_stages"].items()}
    assert counts == dict(W=367, N1=58, N2=267, N3=72, REM=81, UNSCORED=1)
    assert {k: int(seconds[v] // 30) for k, v in dict(N1="nonrem1", N2="nonrem2", N3="nonrem3", REM="rem").items()} == {k: counts[k] for k in ("N1", "N2", "N3", "REM")}
    assert seconds["wake"] // 30 == counts["W"] # and 25 s at the end that are no whole epoch
    assert read_arousal_mat(real / "tr03-0005-arousal.mat").hypnogram.counts() == counts | dict(UNSCORED=13)
    stages = sample_stages(real / "tr03-0005-arousal.mat")
    assert h.onset == 360 and np.flatnonzero(stages >= 0)[0] == 360 * 200 - 1 # a program that counts from one
    cut, bouts = upstream_bouts(stages)
    assert cut == 360 * 200 and all((b.start % 6000) == 0 for b in bouts[:-1]) # so that the original's late bouts are where the scorer put them
    starts, found = upstream_starts(bouts)
    assert {s.name: int((found == s).sum()) for s in Stage if s >= 0} == {k: v for k, v in counts.items() if k != "UNSCORED"}
    assert ((starts + cut) / 200).tolist() == (h.onset + 30. * np.flatnonzero(h.stages >= 0)).tolist()


def stage_coded(folder: Path, header: str, stages: np.ndarray) -> Path:
    "A record whose signals say, sample by sample, which stage it is: 100 steps times (stage + 2)."
    lines = header.splitlines()
    id, n = lines[0].split()[0], int(lines[0].split()[3])
    (folder / id).mkdir(parents=True)
    (folder / id / f"{id}.hea").write_text("\n".join([lines[0], *(" ".join([*line.split()[:6], "0", *line.split()[7:]]) for line in lines[1:])]) + "\n")
    wave = (100 * (stages.astype("int16") + 2)).astype("<i2")
    with (folder / id / f"{id}.mat").open("wb") as f:
        f.write(struct.pack("<5i", 30, 13, n, 0, 4) + b"val\0")
        for a in range(0, n, 100_000): f.write(np.repeat(wave[a:a + 100_000, None], 13, 1).tobytes())
    return folder / id


def test_a_real_night_from_its_files_to_epochs(real, tmp_path):
    "Real header, annotations and truth; only the signal is made, from the real stages: it has to say of every epoch what the label says."
    header = (real / "tr03-0005.hea").read_text()
    truth = sample_stages(real / "tr03-0005-arousal.mat")
    stages = np.r_[truth[:1], truth[:-1]] # counted from zero
    folder = stage_coded(tmp_path / "files", header, stages)
    for name in ("tr03-0005.arousal", "tr03-0005-arousal.mat"): shutil.copy(real / name, folder)
    rec = read_wfdb(folder / "tr03-0005.hea")
    assert len(rec.channels) == 13 and {c.n_samples for c in rec.channels.values()} == {5_147_000} and [c.source_label for c in rec.channels.values()] == list(CINC_LABELS.values())
    theirs = upstream_epochs(folder)
    ledger = convert(CINC2018, tmp_path / "files", tmp_path / "store", Recipe.native(("ECG",)))
    assert not ledger.failed, str(ledger)
    ours = StoreNights(open_store(tmp_path / "store"))["tr03-0005"]
    assert ours.counts() == theirs.counts() == dict(W=367, N1=58, N2=267, N3=72, REM=81)
    some = [0, 1, *range(5, len(ours), 60), len(ours) - 1]
    for k in some:
        x = ours.read(("ECG",), k, k + 1)[0, 0]
        assert abs(np.median(x) - 100 * (int(ours.stages[k]) + 2)) < 1 # a thousandth of a millivolt is a step
    inside = [k for k in some if 0 < k < len(ours) - 1 and ours.stages[k - 1] != ours.stages[k]]
    ecg = stretch(ours.recording["ECG"], 0, 30 * len(ours), 200) * 1000
    changes = np.flatnonzero(np.abs(np.diff(ecg)) > 50) + 1
    assert len(changes) and not (changes % 6000).any(), "every change of stage lies on the grid of epochs: no shift of 5 ms"
    assert inside is not None


def test_the_stages_that_have_no_header_drive_a_simulated_night(real):
    "tr03-0029 has annotations only; the night that they describe is made by the simulator, and its epochs are theirs."
    h = read_hypnogram(real / "tr03-0029.arousal")
    short = Hypnogram(h.stages[80:110], 30.) # a quarter of an hour
    night = simulate_night(short, {"C3-M2": 200., "E1-M2": 200., "ECG": 200.}, seed=1, id="tr03-0029")
    e = night_epochs(night)
    x = e.read(("C3-M2", "Thorax", "ECG"))
    assert x.shape == (30, 3, 7680) and e.stages.tolist() == short.stages.tolist() and np.isnan(x[:, 1]).all() and np.isfinite(x[:, [0, 2]]).all()


# units and streams

def test_names_agree_with_the_encoders(): assert {m: tuple(n) for m, n in SLEEPFM_MODALITIES.items()} == PUBLISHED_CHANNELS

@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "Files in the challenge's layout with -arousal.mat, and a native store of them."
    folder = tmp_path_factory.mktemp("cinc")
    truth = simulate_open_study("cinc2018", folder / "files", n_subjects=14, hours=.05, seed=3)
    for night in truth:
        record = next((folder / "files").rglob(f"{night.id}.hea")).parent
        n = read_wfdb(record / f"{night.id}.hea")["ECG"].n_samples
        stages = np.full(n, -1)
        for k, s in enumerate(night.stages): stages[round((night.onset + 30 * k) * 200) - 1:round((night.onset + 30 * (k + 1)) * 200) - 1] = s
        with h5py.File(record / f"{night.id}-arousal.mat", "w") as f:
            for name, s in dict(wake=0, nonrem1=1, nonrem2=2, nonrem3=3, rem=4, undefined=-1).items(): f[f"data/sleep_stages/{name}"] = (stages == s)[None].astype("uint8")
            f["data/arousals"] = np.zeros((1, n), "int8")
    ledger = convert(CINC2018, folder / "files", folder / "native", Recipe.native())
    assert not ledger.failed, str(ledger)
    return folder, truth


def test_lazy_epochs_are_those_of_a_prepared_store(study, tmp_path):
    folder, _ = study
    native, id = open_store(folder / "native"), open_store(folder / "native").manifest["id"][0]
    channels = [n for names in SLEEPFM_MODALITIES.values() for n in names]
    made = create_store(tmp_path / "s", Recipe.sleepfm_2024())
    made.add(apply_recipe(native[id], Recipe.sleepfm_2024()))
    made.sync()
    lazy, kept = StoreNights(native), StoreNights(made)
    assert kept.scale == "as_stored" and kept.ids == [id]
    a, b = lazy[id].read(channels, scale=lazy.scale), kept[id].read(channels, scale=kept.scale)
    assert a.shape == b.shape and (np.isnan(a) == np.isnan(b)).mean() > .999
    assert np.nanmax(np.abs(a - b)) < 1 # one step: the prepared store keeps 16 bits


def test_ours_and_the_originals_signals_are_one(study):
    "On the same record: the same half minutes, and values that differ by the resampler only."
    folder, truth = study
    theirs, ours = UpstreamNights(folder / "files"), StoreNights(open_store(folder / "native"))
    assert theirs.ids == ours.ids and not theirs.skipped
    id = theirs.ids[0]
    a, b = theirs[id], ours[id]
    begin = (a.starts[:, None] + a.recording.provenance["cut"] / 200 - (b.starts + truth[0].onset)[None]).round(6) == 0
    at = [int(np.flatnonzero(row)[0]) for row in begin if row.any()]
    assert at and b.stages[at].tolist() == a.stages[begin.any(1)].tolist()
    x, y = a.read(("C3-M2", "Thorax", "SpO2"), scale="as_stored")[begin.any(1)], b.read(("C3-M2", "Thorax", "SpO2"))[at]
    assert np.isfinite(y).all() and np.abs(x[:, 2] - y[:, 2]).max() < .3 * 655 # a Fourier transform rings where the saturation steps
    assert np.abs(x[:, 0] / 10 - y[:, 0])[:, 256:-256].max() < .05 * y[:, 0].std() # its grid is stretched by up to half a sample; the simulator's headers have ten steps per microvolt, where the challenge's have one


def test_units_are_never_guessed(study):
    folder, _ = study
    rec = read_wfdb(next((folder / "files").rglob("*.hea")))
    e = Epochs(replace(rec, channels={"Thorax": replace(rec["Thorax"], unit="V")}), np.zeros(1), np.zeros(1, "int8"))
    millions = e.read(("Thorax",))
    assert np.nanmax(np.abs(millions)) > 1e5 * np.nanmax(np.abs(e.read(("Thorax",), scale="as_stored")))
    with pytest.raises(ChannelError, match="Thorax.*not stated"): Epochs(replace(rec, channels={"Thorax": replace(rec["Thorax"], unit="")}), np.zeros(1), np.zeros(1, "int8")).read(("Thorax",))
    steps = converter_steps(rec["SpO2"]).samples(3990, 4010)
    assert steps[-1] == -32768 and np.isnan(rec["SpO2"].samples(4009, 4010)).all() and (steps == np.rint(steps)).all()
    with pytest.raises(ChannelError, match="WFDB"): converter_steps(array_channel("x", np.zeros(3), 1, "uV"))


@settings(max_examples=20)
@given(st.integers(0, 40), st.floats(0, 30), st.sampled_from([100., 128., 200., 512.]))
def test_a_stretch_is_that_of_the_whole(seed, start, fs):
    x = np.random.default_rng(seed).standard_normal(int(fs * 40))
    ch = array_channel("C3-M2", x, fs, "uV", "EEG")
    start = round(start * 256) / 256
    whole, part = stretch(ch, 0, 40, 256), stretch(ch, start, 5, 256)
    first = round(start * 256)
    assert np.nanmax(np.abs(part - whole[first:first + 1280])) < 2e-3


def test_gaps_stay_gaps():
    x = np.random.default_rng(0).standard_normal(200 * 60).astype("float32")
    x[200 * 20:200 * 22] = np.nan
    y = stretch(array_channel("C3-M2", x, 200, "uV", "EEG"), 0, 60, 256)
    assert np.isnan(y).sum() == 512 and np.isnan(y[256 * 20:256 * 22]).all()


def test_a_dataset_for_torchs_loader(study):
    folder, _ = study
    nights = StoreNights(open_store(folder / "native"))
    table = at_most(epoch_table(nights, nights.ids[:3]), 1, seed=1)
    data = EpochDataset(nights, table)
    batch = next(iter(DataLoader(data, batch_size=4)))
    assert batch["ekg"]["x"].shape == (4, 1, 7680) and batch["sleep_stages"]["pad"].dtype == torch.bool and batch["stages"].shape == (4, 1)
    rows = pd.concat([pd.DataFrame(dict(id=b["id"], stage=b["stages"])) for b in epoch_batches(nights, nights.ids[:3], size=3)])
    assert rows["stage"].tolist() == epoch_table(nights, nights.ids[:3])["stage"].tolist()
    with pytest.raises(IndexError): data[len(data)]


# SleepFM-clinical

def test_the_originals_preprocessing(fixtures):
    with np.load(fixtures / "clinical_preproc.npz") as z:
        for i, fs in enumerate(z["rates"]): assert np.abs(clinical_signal(z[f"in{i}"], fs) - z["out"][i]).max() < 1e-9
        channels = {f"c{i}": array_channel(f"c{i}", z[f"in{i}"], fs, "", "OTHER") for i, fs in enumerate(z["rates"][:6])}
        rec = apply_recipe(Recording("n", channels), Recipe.sleepfm_clinical(tuple(channels)))
        for i in range(6): assert np.abs(rec[f"c{i}"].samples() - z["out"][i]).max() < 2e-5 # single precision, as a store keeps it


def test_a_channel_with_a_gap_keeps_its_name_and_its_neighbours(tmp_path):
    "The original drops its signal and not its name."
    rng = np.random.default_rng(0)
    values = {n: rng.standard_normal(256 * 60) for n in ("C3-M2", "ECG", "Chin")}
    values["C3-M2"][1000:3000] = np.nan
    rec = Recording("n", {n: array_channel(n, v, 256, "uV", k) for (n, v), k in zip(values.items(), ("EEG", "ECG", "EMG"), strict=True)})
    made = apply_recipe(rec, Recipe.sleepfm_clinical())
    assert list(made.channels) == list(values) and np.isnan(made["C3-M2"].samples()).sum() == 1000
    assert np.corrcoef(made["ECG"].samples()[:5000], clinical_signal(values["ECG"], 256)[:5000])[0, 1] > .999
    gappy = replace(made, channels={n: made[n] for n in ("ECG", "Chin")})
    assert list(read_sleepfm_h5(write_sleepfm_h5(gappy, tmp_path / "a.hdf5")).channels) == ["Chin", "ECG"]


def test_windows_of_any_channels():
    ch = lambda name, kind, n: array_channel(name, np.arange(n, dtype="float32"), 128, "", kind)
    rich = Recording("rich", {n: ch(n, k, 128 * 700) for n, k in (("C3-M2", "EEG"), ("C4-M1", "EEG"), ("E1", "EOG"), ("ECG", "ECG"), ("Thorax", "RESP"), ("Chin", "EMG"))})
    poor = Recording("poor", {"C3-M2": ch("C3-M2", "EEG", 128 * 100)})
    a, b = (WindowsOf(r, channel_groups(r)) for r in (rich, poor))
    assert (len(a), len(b), len(WindowsOf(poor, channel_groups(poor), whole=True))) == (3, 1, 0)
    batch = collate_groups([a[2], b[0]])
    assert batch["BAS"]["x"].shape == (2, 3, 38400) and batch["EKG"]["missing"].tolist() == [[False], [True]]
    assert batch["BAS"]["pad"][0, 0].sum() == 38400 - 128 * 100 and batch["BAS"]["x"][0, 0, 0] == 128 * 600
    assert (batch["BAS"]["x"][batch["BAS"]["pad"]] == 0).all()


def test_files_that_are_not_to_be_trusted(tmp_path):
    good = tmp_path / "good.hdf5"
    with h5py.File(good, "w") as f:
        f["ECG"] = np.arange(1000, dtype="float16")
        f["soft"], f["far"] = h5py.SoftLink("/ECG"), h5py.ExternalLink("/etc/passwd", "/")
        f.create_dataset("huge", (2**40,), "float16", chunks=(1024,))
        f["words"], f["group/x"] = np.array([b"a", b"b"]), np.zeros(3)
    rec = read_sleepfm_h5(good)
    assert list(rec.channels) == ["ECG"] and len(rec.issues) == 6 and rec["ECG"].samples(5, 7).tolist() == [5, 6]
    for n in range(0, good.stat().st_size, 400): # cut anywhere
        (cut := tmp_path / "cut.hdf5").write_bytes(good.read_bytes()[:n])
        with suppress(PFTSleepError): [c.samples() for c in read_sleepfm_h5(cut).channels.values()]

@settings(max_examples=30)
@given(st.binary(max_size=300), st.integers(0, 2000))
def test_garbage(tmp_path_factory, noise, at):
    folder = tmp_path_factory.mktemp("garbage")
    with h5py.File(folder / "x.hdf5", "w") as f: f["ECG"] = np.arange(300, dtype="float16")
    data = bytearray((folder / "x.hdf5").read_bytes())
    data[at:at + len(noise)] = noise
    (folder / "x.hdf5").write_bytes(bytes(data))
    for read in (lambda p: [c.samples() for c in read_sleepfm_h5(p).channels.values()], sample_stages):
        with suppress(PFTSleepError): read(folder / "x.hdf5")


# figures

def planted(n, first=0, epochs=30, d=6):
    rng = np.random.default_rng([7, first])
    stage = rng.choice(5, n * epochs, p=[.25, .1, .35, .15, .15])
    who = np.repeat([f"s{first + k:02}" for k in range(n)], epochs)
    centre = np.random.default_rng(0).standard_normal((5, d))
    values = {m: (s * centre[stage] + rng.standard_normal((n * epochs, d))).astype("float32") for m, s in (("respiratory", .4), ("ekg", 1.5))}
    return Embeddings(pd.DataFrame(dict(id=who, subject=who, start=0., stage=stage)), values, {})


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_figures_are_those_of_scikit_learn(seed, digits):
    "Also with ties, and with weights as copies of rows."
    rng = np.random.default_rng(seed)
    y, p = rng.integers(0, 3, 60), rng.random((60, 3)).round(digits)
    who = np.repeat(list("abcdef"), 10)
    t = class_figures(y, p, who, {0: "a", 1: "b", 2: "c"}, 5, seed)
    for k, name in enumerate("abc"):
        if not 0 < (y == k).sum() < 60: continue
        assert t.loc[name, "auroc"] == pytest.approx(roc_auc_score(y == k, p[:, k])) and t.loc[name, "auprc"] == pytest.approx(average_precision_score(y == k, p[:, k]))


def test_intervals_are_of_people():
    "A person's epochs that are copies of one another add nothing; the original's draws of epochs believe that they do."
    rng = np.random.default_rng(0)
    y, s = rng.integers(0, 2, 40), rng.random(40)
    p = np.stack([1 - s, s], 1)
    names = {0: "no", 1: "yes"}
    once = class_figures(y, p, [f"s{k}" for k in range(40)], names, 400)
    copies = class_figures(np.repeat(y, 20), np.repeat(p, 20, 0), np.repeat([f"s{k}" for k in range(40)], 20), names, 400)
    width = lambda t: t.loc["yes", "auroc_high"] - t.loc["yes", "auroc_low"]
    assert width(copies) == pytest.approx(width(once)) and width(upstream_figures(np.repeat(y, 20), np.repeat(p, 20, 0), names)) < width(once) / 2


def test_the_originals_fit(tmp_path):
    "Unit vectors, no scaler, 100 iterations, whatever the settings; and an average of middles."
    a, b = planted(8), planted(6, 8)
    table = evaluate_probe(a, b, inputs=["combined"], upstream=True, seed=5).table
    line = LogisticRegression(class_weight="balanced").fit(features(a, upstream=True), a.rows["stage"])
    assert np.allclose(np.linalg.norm(features(a, "ekg", upstream=True), axis=1), 1, atol=1e-5)
    p = line.predict_proba(features(b, upstream=True))
    rows = table[table["model"] == "probe"].set_index("class")
    assert rows.loc["N3", "auroc"] == pytest.approx(roc_auc_score(b.rows["stage"] == 3, p[:, 3]), abs=1e-9)
    assert rows.loc["macro", "auroc"] == pytest.approx(np.mean([(rows.loc[n, "auroc_low"] + rows.loc[n, "auroc_high"]) / 2 for n in STAGES.values()]))
    ours = evaluate_probe(a, b, inputs=["combined"], n_resamples=20, seed=5, split="hash")
    macro = ours.table.query("model == 'probe'").set_index("class")["auroc"]
    assert macro["macro"] == pytest.approx(macro[list(STAGES.values())].mean()) and ours.facts["split"] == "hash" and ours.facts["seed"] == 5
    majority = ours.table.query("model == 'majority'").set_index("class")
    assert (majority["auroc"] == .5).all() and majority.loc["N2", "auprc"] == pytest.approx(majority.loc["N2", "prevalence"])


def test_a_missing_modality_is_no_reason_to_leave_a_night_out():
    a, b = planted(8), planted(6, 8)
    a.values["respiratory"][:60], b.values["respiratory"][b.rows["subject"] == "s09"] = np.nan, np.nan
    for upstream in (False, True): assert evaluate_probe(a, b, upstream=upstream, n_resamples=5).table.query("input == 'combined' and model == 'probe'")["auroc"].min() > .7


def test_embeddings_of_the_published_architecture(study, tmp_path):
    "SleepFM's own encoder in the contract; embedded twice, the second time nothing is done; refused on signals of another recipe."
    folder, _ = study
    nights = StoreNights(open_store(folder / "native"))
    torch.manual_seed(0)
    ekg = SleepFMEncoder(SleepFMConfig.published("ekg")).eval()
    files = embed_nights(nights, {"ekg": ekg}, tmp_path / "e", nights.ids[:1])
    e = read_embeddings(files)
    x = torch.from_numpy(np.nan_to_num(nights[nights.ids[0]].read(("ECG",))))
    with torch.no_grad(): assert np.abs(e.values["ekg"] - ekg(x).numpy()).max() < 1e-3
    stamp = files[0].stat().st_mtime_ns
    embed_nights(nights, {"ekg": ekg}, tmp_path / "e", nights.ids[:1])
    assert files[0].stat().st_mtime_ns == stamp
    other = create_store(tmp_path / "other", Recipe.sleepfm_2024_corrected(("ECG",)))
    with pytest.raises(ConfigError, match="sleepfm_2024 "): embed_nights(StoreNights(other), {"ekg": ekg}, tmp_path / "f", [])
    (tmp_path / "e" / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(StoreError, match="embed the night again"): read_embeddings(tmp_path / "e")


# the scripts

def run(script: str, *arguments) -> str:
    done = subprocess.run([sys.executable, ROOT / "jobs" / "cinc2018" / script, "--config", ROOT / "jobs" / "cinc2018" / script.replace(".py", ".yaml"), *map(str, arguments)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_scripts_from_files_to_figures(study, tmp_path):
    "Each with its own YAML file: extract, prepare, (an encoder that has learned nothing,) embed, evaluate; and the original's table of epochs."
    folder, _ = study
    said = run("extract.py", folder / "files", folder / "native", tmp_path / "epochs", "--workers", 1)
    table = pd.read_csv(tmp_path / "epochs" / "epochs.csv")
    assert "REM" in said and table["id"].nunique() == 14
    run("extract.py", folder / "files", folder / "native", tmp_path / "upstream", "--upstream", "true")
    assert len(pd.read_csv(tmp_path / "upstream" / "epochs.csv")) <= len(table) and not len(pd.read_csv(tmp_path / "upstream" / "skipped.csv"))
    run("prepare.py", folder / "native", tmp_path / "sleepfm", tmp_path, "--split", "drawn", "--test", 2, "--workers", 1)
    store = open_store(tmp_path / "sleepfm")
    assert store.recipe["name"] == "sleepfm_2024_corrected" and len(store) == 14
    for m, channels in (("sleep_stages", PUBLISHED_CHANNELS["sleep_stages"]), ("ekg", ("ECG",))):
        PatchTransformer(PatchConfig.tiny(channels=channels, rate=256., patch=7680, n_layers=0), store.recipe).save_pretrained(tmp_path / "run" / "encoders" / m)
    said = run("embed.py", tmp_path / "sleepfm", tmp_path / "run", tmp_path / "split.json", tmp_path / "embeddings", '["train", "test"]')
    assert "by encoders of sleep_stages, ekg" in said
    people = tmp_path / "people.csv"
    pd.DataFrame(dict(subject=table["subject"].unique())).assign(age=lambda t: 20. + np.arange(len(t)), sex=lambda t: np.arange(len(t)) % 2).to_csv(people, index=False)
    said = run("evaluate.py", tmp_path / "embeddings", tmp_path / "split.json", folder / "native", tmp_path / "results", "--people", people, "--resamples", 5, "--upstream", "true")
    result = pd.read_csv(tmp_path / "results" / "stages.csv")
    assert set(result["model"]) == {"probe", "random encoder", "majority"} and "stages.csv" in said and (tmp_path / "results" / "stages_upstream.csv").exists()
    assert json.loads((tmp_path / "results" / "stages.json").read_text())["split"] == json.loads((tmp_path / "split.json").read_text())["hash"]
