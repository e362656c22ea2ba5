"""PFTSleep's preprocessing against what the original computed, and one test for each of its faults that has to do with signals and labels."""
import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal
from scipy.ndimage import median_filter

from pftsleep.data.archives import prepare, read_original
from pftsleep.data.cohorts import FOLDER
from pftsleep.data.convert import convert
from pftsleep.data.datasets import load_window
from pftsleep.data.edf import read_edf, write_edf
from pftsleep.data.hypnograms import read_hypnogram
from pftsleep.data.montage import Derivation, apply_montage
from pftsleep.data.nsrr import SHHS
from pftsleep.data.pftsleep_recipes import PFTSLEEP_BANDS, PFTSLEEP_CHANNELS, _kernel, _ratio, resample_fourier, resample_sinc, windows_of
from pftsleep.data.readers import read_signals
from pftsleep.data.recording import Channel, Kind, Recording, Stage, array_channel
from pftsleep.data.signals import Recipe, apply_recipe, causal
from pftsleep.data.store import open_store
from pftsleep.errors import ChannelError, ConfigError, HypnogramError, SignalError

FIXTURES = Path(__file__).parents[2] / "shared/fixtures/pftsleep"
fixture = pytest.mark.skipif(not FIXTURES.exists(), reason="../shared/fixtures isn't here")
LABELS = ("ECG", "EOG(L)", "EMG", "EEG", "SaO2", "THOR RES", "ABDO RES")
PRESETS = [Recipe.pftsleep, Recipe.pftsleep_edf, Recipe.pftsleep_corrected]
each = pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.__name__)
RATES = {"ECG": 256, "EOG left": 128, "chin EMG": 125, "EEG central": 200, "SpO2": 1, "Thorax": 32, "Abdomen": 10}
KINDS = dict(zip(PFTSLEEP_CHANNELS, ("ECG", "EOG", "EMG", "EEG", "SPO2", "RESP", "RESP"), strict=True))
NAMES = dict(zip(PFTSLEEP_CHANNELS, ("ECG", "E1-M2", "Chin", "C4-M1", "SpO2", "Thorax", "Abdomen"), strict=True))
UNITS = {"ECG": "mV", "SPO2": "%", "RESP": ""}


def z(name): return np.load(FIXTURES / f"{name}.npz", allow_pickle=False)
def rows(rec): return np.stack([c.samples() for c in rec.channels.values()])
def step(x): return np.spacing(np.abs(x).max()) # of float32 at the greatest value


def night(seconds=60, seed=0, without=()):
    rng = np.random.default_rng(seed)
    x = {n: rng.normal(95 if n == "SpO2" else 0, 1 if n in ("ECG", "SpO2") else 20, seconds * fs) for n, fs in RATES.items()}
    return Recording("n-1", {NAMES[n]: array_channel(NAMES[n], x[n], fs, UNITS.get(KINDS[n], "uV"), KINDS[n]) for n, fs in RATES.items() if n not in without}, datetime(2020, 1, 1, 22))


# --- against the original

@fixture
@pytest.mark.parametrize("name,fs,band", [("bw_low0.4_125", 125, (None, .4)), ("bw_band0.3_30_125", 125, (.3, 30)), ("bw_band0.5_40_256", 256, (.5, 40))])
def test_filters_are_the_originals_to_the_last_bit(name, fs, band):
    np.testing.assert_array_equal(causal(z("pft_aug_dsp")["bw_in"].astype(float), fs, band), z("pft_aug_dsp")[name])


@fixture
def test_the_median_is_the_originals_to_the_last_bit():
    x = z("pft_aug_dsp")["bw_in"]
    done = apply_recipe(Recording("r", {"x": array_channel("x", x, 125, "uV", "EEG")}), Recipe("m", rate=125., median={"EEG": 3}))
    np.testing.assert_array_equal(done["x"].samples(), z("pft_aug_dsp")["median3"])


@fixture
@pytest.mark.parametrize("fs", [200, 256, 512])
def test_sinc_in_double_precision_within_1e_14_of_the_greatest_value(fs):
    y, expected = resample_sinc(z("pft_aug_dsp")["bw_in"].astype(float), fs, 125), z("pft_aug_dsp")[f"ta64_{fs}_125"]
    assert y.shape == expected.shape and np.abs(y - expected).max() < 1e-14 * np.abs(expected).max()


@fixture
@pytest.mark.parametrize("fs", [1, 10, 32, 50, 64, 100])
def test_sinc_of_slow_channels_within_3e_5_of_the_originals_single_precision(fs):
    "Eight steps of float32 at the greatest value, 63: the original's kernel and sums are single, ours double."
    y, expected = resample_sinc(z("pft_aug_dsp")["bw_in"].astype(float), fs, 125), z("pft_aug_dsp")[f"ta_{fs}_125"]
    assert y.shape == expected.shape and np.abs(y - expected).max() < 3e-5


def sinc_in_single(x, o, n):
    "The original's resampler in its own precision: a kernel for each phase, computed in float32."
    g = np.gcd(o, n); o, n = o // g, n // g
    f, base = np.float32, min(o, n) * .99
    width = int(np.ceil(6 * o / base))
    t = (np.arange(0, -n, -1, dtype=f)[:, None] / f(n) + np.arange(-width, width + o, dtype=f) / f(o)) * f(base)
    t = np.clip(t, -6, 6)
    kernel = np.where(t == 0, f(1), np.sin(t * f(np.pi)) / np.where(t == 0, f(1), t * f(np.pi))) * np.cos(t * f(np.pi) / f(6) / f(2))**2 * f(base / o)
    padded = np.pad(x, (width, width + o))
    return (np.lib.stride_tricks.sliding_window_view(padded, 2 * width + o)[::o] @ kernel.T).ravel()[:-(-n * len(x) // o)]


@fixture
@pytest.mark.parametrize("fs", [1, 10, 32, 50, 64, 100, 128, 200, 256, 512])
def test_sinc_in_single_precision_within_2e_5(fs):
    "Where the original worked in float32 on fast channels, which its data set never did, its kernel is off by more than ours could be: written out in float32, the formula gives its numbers."
    x, expected = z("pft_aug_dsp")["bw_in"], z("pft_aug_dsp")[f"ta_{fs}_125"]
    assert np.abs(sinc_in_single(x, fs, 125) - expected).max() < 4e-5 # of 63
    assert np.abs(resample_sinc(x.astype(float), fs, 125) - expected).max() < 2e-4


@fixture
def test_the_training_path_from_the_originals_store():
    "To the last bit where the rate comes down or stays; the ECG, in mV, is scaled before the filter and not after it; what goes up is within one step of float32."
    rec = read_original(FIXTURES / "zarr/synth_12min.zarr", codes="mapped")
    for seconds, every in ((720, 6), (600, 20)):
        expected = z("pft_dataset_getitem")[f"X_{seconds}_every{every}"]
        y = rows(apply_recipe(cut(rec, seconds), Recipe.pftsleep(LABELS)))[:, ::every]
        for i in (1, 2, 3): np.testing.assert_array_equal(y[i], expected[i])
        assert (y[0] == expected[0]).mean() > .999
        for a, b in zip(y, expected, strict=True): assert np.abs(a - b).max() <= min(step(b), 8e-6)


def cut(rec, seconds):
    return replace(rec, channels={n: array_channel(n, c.samples(0, round(seconds * c.fs)), c.fs, c.unit, c.kind, source_label=c.source_label) for n, c in rec.channels.items()}, hypnogram=None)


@fixture
def test_the_inference_path_within_one_step_of_single_precision():
    x = rows(apply_recipe(read_edf(FIXTURES / "edf/synth_12min.edf"), Recipe.pftsleep_edf(LABELS)))
    expected = z("pft_process_edf")["signals_900_every6"]
    assert x.shape == (7, 90_000) and not expected[:, 15_000:].any() # behind the end: zeros, which are the window's
    for a, b in zip(x[:, ::6], expected, strict=True): assert np.abs(a - b[:15_000]).max() <= step(b)


@fixture
def test_the_inference_path_to_the_last_bit_from_double_samples():
    "Its reader gave double precision and rounded after the Fourier transform; with that, our pieces give its very numbers."
    pyedflib = pytest.importorskip("pyedflib")
    with pyedflib.EdfReader(str(FIXTURES / "edf/synth_12min.edf")) as f:
        for label, kind, expected in zip(LABELS, KINDS.values(), z("pft_process_edf")["signals_900_every6"], strict=True):
            i = f.getSignalLabels().index(label)
            x, fs = f.readSignal(i), f.getSampleFrequency(i)
            if fs != 125: x = resample_fourier(x, fs, 125)
            y = causal(median_filter(x.astype("float32"), 3, mode="nearest").astype(float), 125, PFTSLEEP_BANDS[kind])
            np.testing.assert_array_equal(y.astype("float32")[::6], expected[:15_000])


@fixture
def test_what_float16_does_to_the_training_path():
    "It isn't part of the recipe: from the EDF, signals differ by far less than 1 % of their standard deviation."
    a, b = (rows(apply_recipe(rec, Recipe.pftsleep(LABELS))) for rec in (read_original(FIXTURES / "zarr/synth_12min.zarr", codes="mapped"), read_edf(FIXTURES / "edf/synth_12min.edf")))
    assert (np.sqrt(((a - b)**2).mean(1)) < .003 * b.std(1)).all()


@fixture
def test_a_store_of_the_original_becomes_one_of_ours(tmp_path):
    source = open_store(FIXTURES / "zarr", codes="mapped")
    assert str(prepare(source, tmp_path / "s", Recipe.pftsleep(LABELS))) == "1 done, 0 skipped, 0 failed"
    stored, made = open_store(tmp_path / "s")["synth_12min"], apply_recipe(source["synth_12min"], Recipe.pftsleep(LABELS))
    for a, b in zip(stored.channels.values(), made.channels.values(), strict=True): assert np.abs(a.samples() - b.samples()).max() < .51 * b.resolution # 16 bits, no coarser than the recorder's


@fixture
def test_the_montage_of_shhs_finds_the_seven():
    rec = apply_montage(read_edf(FIXTURES / "edf/synth_12min.edf"), SHHS.montage)
    done = apply_recipe(rec, Recipe.pftsleep())
    assert tuple(done.channels) == PFTSLEEP_CHANNELS and tuple(c.source_label for c in done.channels.values()) == LABELS
    np.testing.assert_array_equal(rows(done), rows(apply_recipe(read_edf(FIXTURES / "edf/synth_12min.edf"), Recipe.pftsleep(LABELS))))


# --- the presets

def test_the_hashes_are_what_they_were():
    assert [p().hash for p in PRESETS] == ["bc36bea7f0549bbe", "953ce703c3580e7e", "f6ddf1f6165b97f4"]
    assert [Recipe.default().hash, Recipe.native().hash] == ["c5c97dd29369580a", "2300683da892e3be"]
    for p in PRESETS: assert Recipe.from_dict(json.loads(json.dumps(p().to_dict()))) == p() and p(None) == p(PFTSLEEP_CHANNELS)


@each
def test_the_order_is_the_weights_whatever_the_files(preset):
    rec = night(20)
    for order in (list(rec.channels), list(rec.channels)[::-1], sorted(rec.channels)):
        done = apply_recipe(replace(rec, channels={n: rec[n] for n in order}), preset())
        assert tuple(done.channels) == PFTSLEEP_CHANNELS and {c.fs for c in done.channels.values()} == {125.} and {c.n_samples for c in done.channels.values()} == {2500}
        np.testing.assert_array_equal(rows(done), rows(apply_recipe(rec, preset())))


def test_an_ecg_of_another_name_is_the_ecg():
    rec = night(20)
    for name in ("ECG II", "ECG L"):
        other = replace(rec, channels={name if n == "ECG" else n: replace(c, name=name if n == "ECG" else n) for n, c in rec.channels.items()})
        assert tuple(apply_recipe(other, Recipe.pftsleep()).channels) == PFTSLEEP_CHANNELS


@each
@pytest.mark.parametrize("unit,factor", [("mV", 1e-3), ("V", 1e-6)])
def test_the_unit_of_the_file_doesnt_matter(preset, unit, factor):
    rec = night(20)
    other = replace(rec, channels={n: array_channel(n, c.samples() * np.float32(factor), c.fs, unit, c.kind) if c.unit == "uV" else c for n, c in rec.channels.items()})
    a, b = apply_recipe(rec, preset()), apply_recipe(other, preset())
    for n in PFTSLEEP_CHANNELS:
        scale = factor if a[n].unit != b[n].unit else 1. # the inference path converts nothing
        np.testing.assert_allclose(b[n].samples() / scale, a[n].samples(), atol=2e-6 * np.abs(a[n].samples()).max())
    if preset().units: assert [c.unit for c in a.channels.values()] == [c.unit for c in b.channels.values()]


@given(st.integers(0, 2**32), st.sampled_from([50., 64., 100., 125., 128., 200., 256., 512.]), st.sampled_from(list(PFTSLEEP_BANDS)))
@settings(max_examples=30, deadline=None)
def test_the_training_path_against_one_written_out(seed, fs, kind):
    x = np.random.default_rng(seed).normal(50, 20, round(8 * fs)).astype("float32")
    done = apply_recipe(Recording("r", {"x": array_channel("x", x, fs, UNITS.get(kind, "uV"), kind)}), Recipe.pftsleep(["x"]))["x"].samples()
    low, high = PFTSLEEP_BANDS[kind]
    def tidy(y, at): return signal.sosfilt(signal.butter(2, [low, high] if low else high, "bandpass" if low else "lowpass", fs=at, output="sos"), median_filter(y, 3, mode="nearest"))
    def change(y):
        g = np.gcd(int(fs), 125); o, n = int(fs) // g, 125 // g
        at = np.arange(-(-len(y) * n // o))[:, None] / n
        base = .99 * min(o, n)
        u = np.clip((np.arange(len(y)) / o - at) * base, -6, 6)
        return (np.sinc(u) * np.cos(np.pi * u / 12)**2 * base / o) @ y
    y = x.astype(float)
    y = tidy(y, 125) if fs == 125 else change(tidy(y, fs)) if fs > 125 else tidy(change(y), 125)
    np.testing.assert_allclose(done, y * (1000 if kind == "ECG" else 1), rtol=2e-6, atol=1e-4)


@given(st.integers(2, 400), st.sampled_from([1., 10., 12.8, 50., 99.99, 100., 128., 256., 512 / 3]), st.integers(0, 5000))
@settings(max_examples=60, deadline=None)
def test_a_stretch_stands_where_it_belongs(n, fs, first):
    "Behind a gap the sinc gives what it gives for a recording that is zero until there."
    x = np.random.default_rng(n).normal(size=n)
    start, stop = -(-first * 125 // fs), (first + n) * 125 // fs
    if stop <= start: return
    out = (int(start), int(stop))
    y = resample_sinc(np.r_[np.zeros(first), x], fs, 125, 0, out)
    np.testing.assert_allclose(resample_sinc(x, fs, 125, first, out), y, atol=1e-9)


def test_gaps():
    rec = night(20)
    x = rec["C4-M1"].samples().copy(); x[1000:1400] = np.nan
    gappy = replace(rec, channels={**rec.channels, "C4-M1": array_channel("C4-M1", x, 200, "uV", "EEG")})
    done = apply_recipe(gappy, Recipe.pftsleep())
    assert np.isnan(done["EEG central"].samples()).sum() == 250 and np.isfinite(done["ECG"].samples()).all()
    with pytest.raises(SignalError, match="channel 'EEG central': a Fourier transform needs a whole recording"): apply_recipe(gappy, Recipe.pftsleep_edf())


def test_rates_without_a_common_measure():
    with pytest.raises(SignalError, match="no common measure"): _ratio(100 * np.pi, 125., 10**8)
    y = apply_recipe(Recording("r", {"x": array_channel("x", np.sin(np.arange(5000) / 50), 100 * np.pi, "uV", "EEG")}), Recipe("r", rate=125., resampler="sinc"))["x"].samples()
    np.testing.assert_allclose(y[50:-50], np.sin(np.arange(len(y)) / 125 * 100 * np.pi / 50)[50:-50], atol=2e-3)


@pytest.mark.parametrize("wrong", [dict(phase="linear"), dict(phase=None), dict(resampler="fft"), dict(partial="no"), dict(partial=1)])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))): Recipe("x", **wrong)


def test_the_kernel_keeps_an_offset():
    for n, o in ((125, 256), (125, 1), (5, 2), (125, 128)): assert abs(_kernel(n, o).sum() / n - 1) < 2e-3


# --- the original's faults

@given(st.integers(1, 3000), st.integers(1, 1200))
def test_d1_no_epoch_is_lost_and_every_window_is_full(n, size):
    spans = windows_of(n, size)
    seen = np.zeros(n, int)
    for a, b in spans: seen[a:b] += 1; assert b - a == min(n, size)
    assert seen.min() == 1 and seen.max() <= 2 and spans[0][0] == 0 and spans[-1][1] == n and spans == sorted(set(spans))


def test_d1_a_night_longer_than_eight_hours_is_prepared_whole():
    "The original cut channels instead of samples; what came after 8 h was never staged, and its values shifted all others by the normalisation."
    hours = 8.5
    x = np.random.default_rng(0).normal(95, 1, round(hours * 3600)).astype("float32")
    rec = Recording("long", {"SpO2": array_channel("SpO2", x, 1, "%", "SPO2")})
    done = apply_recipe(rec, replace(Recipe.pftsleep(), partial=True))
    assert done.duration == hours * 3600 and np.isfinite(done["SpO2"].samples()).all()
    windows = [load_window(done, PFTSLEEP_CHANNELS, a, 960, 30., missing=True) for a, _ in windows_of(round(hours * 120), 960)]
    assert [w["x"].shape for w in windows] == [(7, 3_600_000)] * 2 and [w["first"] for w in windows] == [0, 60]
    np.testing.assert_array_equal(windows[1]["x"][4].numpy(), done["SpO2"].samples()[60 * 3750:])
    assert not any(w["pad"][4].any() for w in windows)


def test_d2_references_are_really_subtracted(tmp_path):
    "In the original a reference raised, or was silently ignored with names in lower case."
    rng = np.random.default_rng(0)
    common, c4, e1 = rng.normal(0, 50, (3, 200 * 30)).round(1)
    labels = {"c4": c4 + common, "m1": common, "E1": e1 + common, "M2": common}
    rec = Recording("ref", {n: array_channel(n, x, 200, "uV", "EOG" if n == "E1" else "EEG", resolution=.1) for n, x in labels.items()}, datetime(2020, 1, 1, 22))
    write_edf(rec, tmp_path / "ref.edf")
    montage = (Derivation("C4-M1", ("C4 - A1|M1",)), Derivation("E1-M2", ("E1 - A2|M2",)))
    read = read_signals(tmp_path / "ref.edf")
    assert {c.source_label for c in read.channels.values()} == set(labels)
    for preset in PRESETS:
        recipe = preset(("EEG central", "EOG left"))
        done, bare = apply_recipe(apply_montage(read, montage), recipe), apply_recipe(read, recipe)
        truth = apply_recipe(Recording("t", {"C4-M1": array_channel("C4-M1", c4, 200, "uV", "EEG"), "E1-M2": array_channel("E1-M2", e1, 200, "uV", "EOG")}), recipe)
        np.testing.assert_allclose(rows(done), rows(truth), atol=.2)
        assert (np.abs(rows(bare) - rows(truth)).max(1) > 20).all()


@each
@pytest.mark.parametrize("missing", PFTSLEEP_CHANNELS)
def test_d3_a_missing_channel_shifts_no_filter(preset, missing):
    "The original paired filters with the channels that were left: without an ECG the eye was filtered as a heart, and the saturation as an EEG."
    whole = apply_recipe(night(20), preset())
    done = apply_recipe(night(20, without=(missing,)), replace(preset(), partial=True))
    assert tuple(done.channels) == tuple(n for n in PFTSLEEP_CHANNELS if n != missing)
    for n, ch in done.channels.items(): np.testing.assert_array_equal(ch.samples(), whole[n].samples())
    assert [i.channel for i in done.issues if i.action == "skipped"] == [missing]
    w = load_window(done, PFTSLEEP_CHANNELS, 0, 1, 30., missing=True)
    row = PFTSLEEP_CHANNELS.index(missing)
    assert not w["x"][row].any() and w["pad"][row].all() and w["pad"].all(0).sum() == 1250 # a row of zeros, as the published weights know a missing channel; 20 of 30 s
    with pytest.raises(ChannelError, match=f"for '{missing}'"): apply_recipe(night(20, without=(missing,)), preset())


def test_d3_a_dead_channel_is_a_missing_one():
    rec = night(20)
    dead = replace(rec, channels={**rec.channels, "ECG": array_channel("ECG", np.zeros(5120), 256, "mV", "ECG")})
    done = apply_recipe(dead, replace(Recipe.pftsleep(), partial=True))
    assert tuple(done.channels) == PFTSLEEP_CHANNELS[1:] and [(i.action, i.channel) for i in done.issues if "flat" in i.problem] == [("skipped", "ECG")]
    with pytest.raises(SignalError, match="flat"): apply_recipe(dead, Recipe.pftsleep())
    with pytest.raises(ChannelError, match="for 'ECG'"): apply_recipe(Recording("n", {}), replace(Recipe.pftsleep(), partial=True))


def test_d3_nobody_else_takes_the_place_of_a_missing_channel():
    rec = night(20, without=("EEG central", "EOG left", "chin EMG", "Thorax"))
    x = np.random.default_rng(1).normal(size=4000)
    others = {n: array_channel(n, x, 200, "uV", k) for n, k in (("O1-M2", "EEG"), ("M1", "EEG"), ("E2-M2", "EOG"), ("Leg L", "EMG"), ("Airflow", "RESP"))}
    done = apply_recipe(replace(rec, channels={**others, **rec.channels}), replace(Recipe.pftsleep(), partial=True))
    assert tuple(done.channels) == ("ECG", "SpO2", "Abdomen")


HEADERS = [",1\n0,0\n1,0\n2,2\n", "0,1\n1,0\n2,0\n3,2\n", ",0,1\n0,1,0\n1,2,0\n2,3,2\n", ",class,1\n0,W,0\n1,W,0\n2,N2,2\n"]

@pytest.mark.parametrize("text", HEADERS)
@pytest.mark.parametrize("format", [None, "csv", "csv_nsrr"])
def test_d4_a_header_line_is_no_stage(tmp_path, text, format):
    "The original's files for MrOS, APPLES and WSC begin with a line whose last cell is the name '1'; read as N1, it shifts all labels by an epoch."
    path = tmp_path / "n-1-hyp.csv"; path.write_text(text)
    try: stages = read_hypnogram(path, format=format).stages.tolist()
    except HypnogramError: return # nothing says what the columns are: to refuse is right
    assert stages == [Stage.W, Stage.W, Stage.N2]


def test_d4_a_named_header_is_read_and_what_isnt_a_stage_refused(tmp_path):
    path = tmp_path / "n-1-hyp.csv"
    path.write_text("epoch,stage\n0,0\n1,0\n2,2\n")
    assert read_hypnogram(path).stages.tolist() == [Stage.W, Stage.W, Stage.N2]
    path.write_text("0\n-1\n2\n") # the -1 of WSC tripped the original, or slipped through into the loss
    assert read_hypnogram(path).stages.tolist() == [Stage.W, Stage.UNSCORED, Stage.N2]


def original(folder, duration="28800.0", hypnogram=None, **header):
    "A store as the original writes it, here with what newer EDF readers make of its headers."
    group = zarr.open_group(folder / "s-1.zarr", mode="w", zarr_format=2, attributes=dict(header=dict(Duration=duration, startdate="2020-01-01 22:00:00")))
    for label, fs in (("EEG", 125), ("SaO2", 1)):
        facts = dict(label=label, dimension="uV" if label == "EEG" else "%", physical_min=-100, physical_max=100, digital_min=-1000, digital_max=1000) | (header or dict(sample_frequency=float(fs)))
        if "sample_rate" in facts: facts["sample_rate"] = fs
        group.create_array(label, data=np.random.default_rng(0).normal(0, 20, fs * 90).astype("float16"), attributes=dict(signal_header=facts))
    group.create_array("hypnogram", data=np.repeat([0, 2, 5] if hypnogram is None else hypnogram, 30))
    return folder / "s-1.zarr"


def test_d4_a_shifted_hypnogram_in_an_original_store_is_noticed(tmp_path):
    rec = read_original(original(tmp_path, hypnogram=[1, 0, 2, 5]))
    assert any("30 s longer than the signals; its first stage may be a header line" in i.problem for i in rec.issues)


def test_d6_training_and_inference_see_the_same_samples(tmp_path):
    "Training reads a store that `convert` made, inference applies the recipe to the file: the same function in our recipes, so the same samples. The original had two programs."
    folder = tmp_path / "edf"; folder.mkdir()
    rec = night(60)
    write_edf(replace(rec, channels={n: replace(c, resolution=.001 if n == "ECG" else .1) for n, c in rec.channels.items()}), folder / "n-1.edf")
    for preset in PRESETS:
        ledger = convert(FOLDER, folder, tmp_path / preset.__name__, preset())
        assert str(ledger).startswith("1 done"), ledger
        trained = open_store(tmp_path / preset.__name__)["n-1"]
        staged = apply_recipe(apply_montage(read_signals(folder / "n-1.edf"), FOLDER.montage, FOLDER.ignored), preset())
        assert tuple(trained.channels) == tuple(staged.channels) == PFTSLEEP_CHANNELS
        for n in PFTSLEEP_CHANNELS: # the store may keep 16 bits with steps no coarser than the recorder's
            assert np.abs(trained[n].samples() - staged[n].samples()).max() <= (staged[n].resolution or 0) * .51 + step(staged[n].samples())


@pytest.mark.parametrize("duration", ["28800", "28800.0", "2.88e4", "", None, "eight hours"])
def test_d12_the_duration_is_counted_not_parsed(tmp_path, duration):
    "A current EDF reader makes '28800.0' of it, on which the original's index of samples died."
    rec = read_original(original(tmp_path, duration))
    assert rec.duration == 90 and rec.hypnogram.stages.tolist() == [Stage.W, Stage.N2, Stage.REM]


@pytest.mark.parametrize("header", [dict(sample_frequency=125.), dict(sample_rate=125)])
def test_d12_either_name_of_the_rate_will_do(tmp_path, header):
    path = original(tmp_path, **header)
    assert read_original(path)["EEG"].fs == 125


def test_one_channel_at_a_time_and_no_second_night_in_memory():
    import tracemalloc
    n = 256 * 1800
    lazy = Channel("ECG", Kind.ECG, 256., "uV", n, lambda a, b: np.random.default_rng(0).normal(size=b - a).astype("float32"))
    tracemalloc.start()
    try: apply_recipe(Recording("r", {"ECG": lazy}), Recipe.pftsleep(["ECG"])); peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert peak < 8 * n * 2.6, peak / (8 * n) # one night in double, its half at 125 Hz, and what a block needs
