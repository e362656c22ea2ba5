"""Signals against oracles: scipy in float64, a sinc written out, loops. And against the clock, since a slipped signal is a mislabelled one."""
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import signal

from pftsleep.data.recording import Channel, Kind, Recording, array_channel
from pftsleep.data.signals import (LINEAR, PHYSIOLOGICAL, Recipe, apply_recipe, causal, finite_stretches, interpolate_invalid, process_channel, resample, resample_steps,
    select_channels, unit_factor, usable_band, zero_phase)
from pftsleep.errors import ChannelError, ConfigError, EDFError, SignalError

REALDATA = Path(__file__).parents[2] / "shared" / "realdata"
real = pytest.mark.skipif(not REALDATA.exists(), reason="../shared/realdata is not here")
RATES = [1.0, 10.0, 10.54, 12.8, 25.0, 32.0, 50.0, 99.99, 100.0, 125.0, 127.3, 128.0, 200.0, 512 / 3, 256.0, 500.0, 512.0]
PLAIN = Recipe("only a rate", rate=100.)


def recording(*channels, **kwargs):
    return Recording("night-7", {c.name: c for c in channels}, **kwargs)


def eeg(values, fs=256., name="Cz", unit="uV", kind="EEG", **kwargs):
    return array_channel(name, values, fs, unit, kind, **kwargs)


def run(values, fs, recipe, kind="EEG", unit="uV"):
    return apply_recipe(recording(eeg(values, fs, kind=kind, unit=unit)), recipe)["Cz"].samples()


# recipes

kinds = st.sampled_from([k.value for k in Kind])
names = st.text("abzABZ019-_()#.äµß⠿😴", min_size=1, max_size=5)
edges = st.floats(.01, 200)
bands = st.one_of(st.tuples(edges, st.none()), st.tuples(st.none(), edges), st.builds(lambda low, by: (low, low * by), edges, st.floats(1.1, 10)))
ranges = st.builds(lambda low, by: (low, low + by), st.floats(-1e4, 1e4), st.floats(.1, 1e4))
recipes = st.builds(Recipe, name=names, channels=st.none() | st.lists(names, min_size=1, max_size=3), rate=st.none() | st.floats(.1, 1000),
    units=st.dictionaries(kinds, names, max_size=3), median=st.dictionaries(kinds, st.sampled_from([3, 5, 7]), max_size=3), clip=st.dictionaries(kinds, ranges, max_size=3),
    valid=st.dictionaries(kinds, ranges, max_size=3), bands=st.dictionaries(kinds, bands, max_size=3), order=st.integers(1, 8),
    phase=st.sampled_from(["zero", "causal"]), resampler=st.sampled_from(["soxr", "sinc", "fourier"]), partial=st.booleans())


@given(recipes)
@settings(max_examples=60, deadline=None)
def test_a_recipe_survives_json_and_pickle(recipe):
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe == pickle.loads(pickle.dumps(recipe))
    assert again.hash == recipe.hash == pickle.loads(pickle.dumps(recipe)).hash and hash(again) == hash(recipe)


@given(recipes, recipes, st.sampled_from(list(Recipe("x").to_dict())))
@settings(max_examples=60, deadline=None)
def test_equal_recipes_and_only_those_have_equal_hashes(a, b, field):
    b = replace(a, **{field: getattr(b, field)})
    assert (a.hash == b.hash) == (a == b)


@given(recipes)
@settings(max_examples=30, deadline=None)
def test_spelling_doesnt_change_the_hash(recipe):
    spelt = {k: dict(reversed(v.items())) if isinstance(v, dict) else v for k, v in reversed(recipe.to_dict().items())}
    spelt["bands"] = {k.lower(): [int(e) if e is not None and e == int(e) else e for e in band] for k, band in spelt["bands"].items()}
    shorter = {k: v for k, v in spelt.items() if k == "name" or v != Recipe("x").to_dict()[k]}
    assert Recipe.from_dict(spelt).hash == Recipe.from_dict(shorter).hash == recipe.hash


def test_the_hashes_of_the_presets_are_what_they_were():
    assert Recipe.default().hash == "c5c97dd29369580a"
    assert Recipe.native().hash == "2300683da892e3be"
    assert Recipe.default(("EEG", "EOG"), rate=128).hash == "90ae1bfb12e7c91d"


def test_the_hash_is_the_same_in_another_process():
    code = "from pftsleep.data.signals import Recipe; print(Recipe.default(('EEG',), rate=64).hash)"
    hashes = {subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": s}, capture_output=True, text=True, check=True).stdout.strip() for s in "17"}
    assert hashes == {Recipe.default(("EEG",), rate=64).hash}


@pytest.mark.parametrize("field", ["rate", "order", "bands", "units", "valid", "clip", "median", "channels", "name", "phase", "resampler", "partial"])
def test_every_field_counts(field):
    other = dict(rate=64, order=2, bands={"EEG": (1, 2)}, units={}, valid={}, clip={"EEG": (-1, 1)}, median={"EEG": 3}, channels=("EEG",), name="other", phase="causal", resampler="sinc", partial=True)
    assert replace(Recipe.default(), **{field: other[field]}).hash != Recipe.default().hash


@pytest.mark.parametrize("wrong", [dict(rate=-1), dict(rate="fast"), dict(rate=math.inf), dict(channels="EEG"), dict(channels=[]), dict(channels=["EEG", " "]),
    dict(bands={"EEG": (35, .3)}), dict(bands={"EEG": (None, None)}), dict(bands={"EEG": 35}), dict(bands={"NOSE": (1, 2)}), dict(bands={"EEG": (0, 35)}), dict(bands=[1]),
    dict(median={"EEG": 2}), dict(median={"EEG": 3.5}), dict(clip={"EEG": (1, 1)}), dict(valid={"SPO2": (50, math.nan)}), dict(order=0), dict(order=2.5), dict(name=""), dict(name=None)])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))): Recipe(**{"name": "x", **wrong})


def test_unknown_and_missing_settings():
    with pytest.raises(ConfigError, match="no setting filters, rats"): Recipe.from_dict({"name": "x", "rats": 3, "filters": {}})
    with pytest.raises(ConfigError, match="without a name"): Recipe.from_dict({})


# which channels

def test_requests_in_order_case_and_exactness():
    rec = recording(eeg([0., 1], name="F3-M2", source_label="EEG F3-A2"), eeg([0., 1], name="C4-M1", source_label="eeg"), eeg([0., 1], name="EOG", kind="EOG"))
    names = lambda *requests: [c.name for c in select_channels(rec, requests)]
    assert names("EOG", "f3-m2") == ["EOG", "F3-M2"]
    assert names("EEG") == ["C4-M1"] # a label goes before a kind
    assert names("EEG", "EEG") == ["C4-M1", "F3-M2"]
    assert names("eeg", "c4-m1") == ["F3-M2", "C4-M1"]


@given(st.lists(st.sampled_from(["EEG", "EOG", "C4-M1", "F3-M2", "EEG(sec)", "SPO2", "x"]), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_no_channel_is_taken_twice(requests):
    rec = recording(eeg([0.], name="F3-M2"), eeg([0.], name="C4-M1", source_label="EEG(sec)"), eeg([0.], name="E1", kind="EOG"), eeg([0.], name="EOG", kind="EOG"))
    try: got = [c.name for c in select_channels(rec, requests)]
    except ChannelError as e: assert any(f"'{r}'" in e.problem for r in requests) and "F3-M2 (EEG" in str(e) and e.path == "night-7"
    else: assert len(set(got)) == len(got) == len(requests)


def test_none_means_every_physiological_channel():
    rec = recording(*(eeg([0., 1], name=k.value, kind=k) for k in Kind))
    assert {c.kind for c in select_channels(rec, None)} == PHYSIOLOGICAL
    with pytest.raises(ChannelError, match="every physiological one"): select_channels(recording(eeg([0.], kind="EVENT")), None)


def test_roles_are_vaguer_than_names_and_labels_and_more_exact_than_kinds():
    rec = recording(eeg([0., 1], name="O1-M2"), eeg([0., 1], name="C4"), eeg([0., 1], name="C3-M2", source_label="chin EMG"), eeg([0., 1], name="E1", kind="EOG", source_label="EEG"), eeg([0., 1], name="Chin", kind="EMG"))
    names = lambda *requests: [c.name for c in select_channels(rec, requests)]
    assert names("EEG central") == names("eeg CENTRAL ") == names("c3-a2") == names("C3_M2") == ["C3-M2"] # with its reference before without
    assert names("EEG central", "EEG central") == ["C3-M2", "C4"]
    assert names("EEG", "EEG central") == ["E1", "C3-M2"] # a label goes before all roles and kinds
    assert names("chin EMG") == ["C3-M2"] and names("EEG occipital", "EMG") == ["O1-M2", "Chin"]
    with pytest.raises(ChannelError, match=r"'EEG frontal'.*O1-M2 \(EEG occipital\); C4 \(EEG central\)"): names("EEG frontal")


def test_a_role_is_a_name_in_every_study():
    made = lambda *channels: apply_recipe(recording(*channels), Recipe("r", channels=("EEG central", "EOG left", "chin EMG", "thorax", "ECG"), rate=64.))
    x = np.random.default_rng(0).normal(size=2560)
    a = made(eeg(x, name="C4-M1"), eeg(x, name="E1-M2", kind="EOG"), eeg(x, name="Chin", kind="EMG"), eeg(x, name="Thorax", kind="RESP", unit=""), eeg(x, name="ECG", kind="ECG"))
    b = made(eeg(x, name="ECG", kind="ECG"), eeg(x, name="THOR RES", kind="RESP"), eeg(x, name="EMG", kind="EMG"), eeg(x, name="LOC", kind="EOG"), eeg(x, name="c3_m2"))
    assert list(a.channels) == list(b.channels) == ["EEG central", "EOG left", "chin EMG", "Thorax", "ECG"]
    assert [i.problem for i in b.issues] == [f"{n}, is the recording's '{r}'" for n, r in [("c3_m2", "EEG central"), ("LOC", "EOG left"), ("EMG", "chin EMG"), ("THOR RES", "Thorax")]]


def test_a_role_is_the_best_there_is_even_where_it_is_a_spelling_of_a_name():
    "'EOG left' is what some files call E1; asked for, it means the eye with its reference, which a montage has put beside the bare electrode."
    rec = recording(*(eeg([0., 1], name=n, kind=k) for n, k in [("E1", "EOG"), ("E2", "EOG"), ("E1-M2", "EOG"), ("E2-M2", "EOG"), ("Chin1", "EMG"), ("Chin", "EMG"), ("ECG L", "ECG"), ("ECG II", "ECG")]))
    assert [c.name for c in select_channels(rec, ("EOG left", "eog RIGHT", "chin EMG", "ECG"))] == ["E1-M2", "E2-M2", "Chin", "ECG II"]
    assert [c.name for c in select_channels(rec, ("E1", "EOG(R)", "EOG left"))] == ["E1", "E2", "E1-M2"]
    bare = eeg([0., 1], name="E1", kind="EOG", source_label="EOG Left")
    assert [c.name for c in select_channels(recording(bare, eeg([0., 1], name="E1-M2", kind="EOG")), ["EOG left"])] == ["E1-M2"]
    assert [c.name for c in select_channels(recording(bare), ["EOG left"])] == ["E1"]


@given(st.lists(st.sampled_from(["EEG", "EOG", "C4-M1", "F3-M2", "EEG central", "SPO2", "x"]), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_partial_recipe_gives_what_there_is_and_names_the_rest(requests):
    x = np.random.default_rng(0).normal(size=99)
    rec = recording(eeg(x, name="F3-M2"), eeg(x, name="C4-M1"), eeg(x * 0, name="EOG", kind="EOG"))
    recipe = Recipe("r", channels=requests, partial=True)
    try: done = apply_recipe(rec, recipe)
    except (ChannelError, SignalError): return
    skipped = [i.channel for i in done.issues if i.action == "skipped"]
    assert len(done.channels) + len(skipped) == len(requests) and "EOG" not in done.channels
    try: strict = apply_recipe(rec, replace(recipe, partial=False))
    except (ChannelError, SignalError): assert skipped
    else: assert not skipped and list(strict.channels) == list(done.channels)


# filters against scipy, in float64

@given(st.integers(0, 2**32), st.sampled_from(RATES[5:]), st.integers(1, 6), st.sampled_from([(.3, 35.), (.5, None), (None, 5.), (1., 11.)]), st.integers(1, 3000))
@settings(max_examples=40, deadline=None)
def test_a_causal_filter_is_scipys(seed, fs, order, band, n):
    band = usable_band(band, fs, fs); assume(band != (None, None))
    x = np.random.default_rng(seed).normal(3, 20, n)
    edges = [e for e in band if e]
    sos = signal.butter(order, edges if len(edges) == 2 else edges[0], {2: "band"}.get(len(edges), "low" if band[0] is None else "high"), fs=fs, output="sos")
    before = x.copy()
    np.testing.assert_array_equal(causal(x, fs, band, order), signal.sosfilt(sos, x))
    np.testing.assert_array_equal(x, before)


@given(st.integers(0, 2**32), st.sampled_from(RATES[5:]), st.integers(1, 6), st.sampled_from([(.3, 35.), (.5, None), (None, 5.), (1., 11.)]), st.integers(2, 3000))
@settings(max_examples=60, deadline=None)
def test_filter_against_one_written_out(seed, fs, order, band, n):
    band = usable_band(band, fs, fs); assume(band != (None, None))
    x = np.random.default_rng(seed).normal(3, 20, n)
    edges = [e for e in band if e]
    sos = signal.butter(order, np.array(edges) / (fs / 2) if len(edges) == 2 else edges[0] / (fs / 2), {2: "band"}.get(len(edges), "low" if band[0] is None else "high"), output="sos")
    pad = min(n - 1, math.ceil(3 * fs / edges[0]))
    y = np.concatenate([x[pad:0:-1], x, x[-2:-pad - 2:-1]])
    for _ in range(2): y = signal.sosfilt(sos, y, zi=signal.sosfilt_zi(sos) * y[0])[0][::-1]
    np.testing.assert_allclose(zero_phase(x, fs, band, order), y[pad:pad + n], atol=1e-6)


@given(st.sampled_from([64., 100., 128., 99.99, 200., 256., 512., 2000.]), st.integers(1, 6), st.floats(.1, 10), st.floats(1.5, 3))
@settings(max_examples=40, deadline=None)
def test_edges_are_half_amplitude_points(fs, order, low, ratio):
    for band, at in [((low, None), [low]), ((None, low), [low]), ((low, low * ratio), [low, low * ratio])]:
        x = np.zeros(2 * math.ceil(30 * fs / low) + 1); x[len(x) // 2] = 1
        spectrum = lambda f, y: np.exp(-2j * np.pi * f / fs * (np.arange(len(y)) - len(y) // 2)) @ y
        h = np.array([spectrum(f, zero_phase(x, fs, band, order)) for f in at])
        np.testing.assert_allclose(h, .5, atol=2e-3) # real and positive: no phase at all


def test_sides_are_not_mixed_up():
    t = np.arange(0, 60, 1 / 128)
    slow, fast = np.sin(2 * np.pi * .1 * t), np.sin(2 * np.pi * 20 * t)
    mid = slice(len(t) // 4, -len(t) // 4)
    np.testing.assert_allclose(zero_phase(slow + fast, 128, (2., None))[mid], fast[mid], atol=1e-3)
    np.testing.assert_allclose(zero_phase(slow + fast, 128, (None, 2.))[mid], slow[mid], atol=1e-3)


@pytest.mark.parametrize("n", [2, 3, 10, 26, 27, 28, 100, 511, 1000])
def test_short_signals_are_filtered_as_they_are(n):
    y = zero_phase(np.random.default_rng(n).normal(size=n), 100, (.3, 35.))
    assert y.shape == (n,) and np.isfinite(y).all()


def test_the_band_that_a_channel_can_support():
    assert usable_band((.3, 35.), 70, 100) == (.3, None)
    assert usable_band((None, 35.), 70, 100) == (None, None)
    for band in [(10., 100.), (10., None)]:
        with pytest.raises(SignalError, match="leave the channel out"): usable_band(band, 1, 100)


def test_a_dropped_edge_is_noted_and_the_rest_applied():
    x = np.random.default_rng(0).normal(100, 20, 50 * 60)
    done = apply_recipe(recording(eeg(x, 50, kind="EOG")), Recipe.default())
    assert [(i.action, i.channel) for i in done.issues] == [("noted", "Cz")] and "high-pass 0.3 Hz" in done.issues[0].problem
    expected = zero_phase(resample(np.float32(x).astype(float), 50, 100), 100, (.3, None))
    np.testing.assert_allclose(done["Cz"].samples(), expected, atol=1e-4)


def test_a_rectified_emg_once_a_second_is_refused():
    with pytest.raises(SignalError) as e: run(np.random.default_rng(0).random(300), 1, Recipe.default(), "EMG")
    assert (e.value.path, e.value.channel) == ("night-7", "Cz") and "leave the channel out" in e.value.remedy


# resampling against a sinc, in float64

def sinc_resample(x, fs, rate, times, reach=400):
    "Band-limited interpolation written out: a sinc at the lower one of the two rates under a Kaiser window."
    rho, out = min(1, rate / fs), []
    for t in times:
        i = np.arange(max(0, math.ceil(t * fs - reach / rho)), min(len(x), math.floor(t * fs + reach / rho) + 1))
        u = (t * fs - i) * rho
        out.append(x[i] @ (rho * np.sinc(u) * np.i0(14 * np.sqrt(np.maximum(0, 1 - (u / reach)**2))) / np.i0(14)))
    return np.array(out)


@pytest.mark.parametrize("fs,rate", [(256, 100), (512, 100), (100, 128), (200, 125), (10.54, 100), (12.8, 25), (99.99, 100), (128, 99.99), (512 / 3, 100), (32, 100), (100, 10.54)])
def test_resampling_against_a_sinc(fs, rate):
    rng = np.random.default_rng(int(fs * rate))
    low = .4 * min(fs, rate) # noise without the band in which the two filters may differ
    n = math.ceil(2500 * max(1, fs / rate))
    x = signal.sosfiltfilt(signal.butter(10, low * .8, fs=fs, output="sos"), rng.normal(size=n))
    y = resample(x, fs, rate)
    assert len(y) == round(n * rate / fs)
    j = np.arange(round(500 * rate / min(fs, rate)), len(y) - round(500 * rate / min(fs, rate)))[::7]
    error = np.abs(y[j] - sinc_resample(x, fs, rate, j / rate)).max() / x.std()
    assert error < 2e-3, error


def test_resampling_against_scipy_poly():
    x = np.random.default_rng(1).normal(size=25600)
    window = signal.firwin(64 * 201 + 1, .9 / 64, window=("kaiser", 12)) # scipy's own default is short, and soft above 0.8 of Nyquist
    both = signal.butter(8, 35, fs=100, output="sos")
    ours, poly = (signal.sosfiltfilt(both, y) for y in (resample(x, 256, 100), signal.resample_poly(x, 25, 64, window=window)))
    np.testing.assert_allclose(ours[500:-500], poly[500:-500], atol=2e-3)


@given(st.floats(.9, 520), st.sampled_from([10., 12.8, 64., 99.99, 100., 125., 128., 256.]), st.integers(0, 10**6), st.floats(.35, .65))
@settings(max_examples=80, deadline=None)
def test_an_event_stays_where_it_was(fs, rate, first, where):
    "A bump at a known time, at any pair of rates, behind any gap: its centre of gravity moves by less than a twentieth of a sample."
    coarse = min(fs, rate)
    n = math.ceil(800 * fs / coarse)
    t, middle = (first + np.arange(n)) / fs, (first + where * n) / fs
    start, stop = math.ceil(first * rate / fs), math.ceil((first + n) * rate / fs)
    y = resample(np.exp(-.5 * ((t - middle) * coarse / 3)**2), fs, rate, first, (start, stop))
    assert len(y) == stop - start
    at = np.arange(start, stop) / rate - middle
    limit = .05 if _meet(first, fs, rate) else .5 # rates that never meet but for an instant: the promise is half a sample
    assert abs((at * y).sum() / y.sum()) * rate < limit


def _meet(first, fs, rate):
    at = (first - np.arange(130 * max(1, fs / rate), 10_000)) * rate / fs
    return len(at) and np.abs(at - np.round(at)).min() < .04


@pytest.mark.parametrize("fs,rate", [p for p in itertools.product(RATES, [12.8, 99.99, 100., 128., 256.]) if p[0] != p[1]])
def test_an_impulse_stays_where_it_was(fs, rate):
    n = math.ceil(700 * max(1, fs / rate)); x = np.zeros(n); x[n // 2] = 1.
    y = run(x, fs, Recipe("r", rate=rate))
    assert abs(np.argmax(y) / rate - (n // 2) / fs) * rate <= .5 + 1e-6


@pytest.mark.parametrize("fs,rate", [(99.99, 100), (256, 100), (512 / 3, 100), (127.3, 128), (10.54, 12.8)])
def test_no_drift_at_the_end_of_a_night(fs, rate):
    f, n = .2 * min(fs, rate), round(8 * 3600 * fs)
    y = resample(np.sin(2 * np.pi * f * np.arange(n) / fs), fs, rate)
    j = np.arange(len(y) - 3000, len(y) - 1000)
    phase = np.angle((y[j] * np.exp(-2j * np.pi * f * j / rate)).mean() * 1j)
    assert abs(phase) / (2 * np.pi * f) * rate < .01 # of a sample, after eight hours


# numbers in steps

@given(st.lists(st.floats(50, 100, width=32), min_size=20, max_size=60), st.sampled_from([.5, 1., 3., 10.]), st.sampled_from([1., 12.8, 100.]), st.sampled_from(sorted(LINEAR)))
@settings(max_examples=60, deadline=None)
def test_steps_never_overshoot(values, fs, rate, kind):
    assume(len(set(values)) > 1)
    y = run(values, fs, Recipe("r", channels=(kind.value,), rate=rate), kind, "")
    assert np.float32(min(values)) <= y.min() and y.max() <= np.float32(max(values))
    t = np.arange(len(y)) / rate
    np.testing.assert_allclose(y, np.interp(t, np.arange(len(values)) / fs, values), rtol=1e-6)


def test_codes_are_held():
    assert resample_steps(np.array([1., 3, 2]), 1, 2, hold=True).tolist() == [1, 1, 3, 3, 2, 2]
    assert run([1., 3, 3, 2], 1, Recipe("r", channels=("POSITION",), rate=4), "POSITION", "").tolist() == [1] * 4 + [3] * 8 + [2] * 4


# gaps

@given(st.data(), st.sampled_from([(256., 100.), (100., 128.), (10.54, 100.), (100., 100.), (99.99, 100.)]))
@settings(max_examples=40, deadline=None)
def test_gaps_stay_gaps_and_stretches_stay_apart(data, rates):
    fs, rate = rates
    n = round(30 * fs)
    a = data.draw(st.integers(round(8 * fs), round(12 * fs))); b = data.draw(st.integers(a + 1, round(20 * fs)))
    x = np.random.default_rng(0).normal(5, 20, n).astype("float32"); x[a:b] = np.nan
    recipe = Recipe("r", rate=rate, bands={"EEG": (.5, 4.)})
    y = run(x, fs, recipe)
    t = np.arange(len(y)) / rate * fs
    np.testing.assert_array_equal(np.isnan(y), (t > a - 1e-6) & (t < b - 1e-6))
    other = x.copy(); other[b:] *= -3
    np.testing.assert_array_equal(run(other, fs, recipe)[t < a], y[t < a]) # the other side of the gap has no say
    if fs < rate: return # filtered after up-sampling; the last sample of a recording of its own may be rounded away, and the mirror stands elsewhere
    alone = run(x[:a], fs, recipe)
    np.testing.assert_allclose(y[:len(alone) - 1], alone[:len(alone) - 1], atol=1e-5)


def test_events_after_a_gap_keep_their_time():
    for fs, gap in itertools.product([256., 99.99, 10.54, 200.], [(101, 173), (1000, 1001), (777, 1531)]):
        n = 4000; t = np.arange(n) / fs; f = fs / 20
        x = np.sin(2 * np.pi * f * t); x[slice(*gap)] = np.nan
        y = run(x, fs, PLAIN); j = np.arange(round((gap[1] + 300) / fs * 100), round(3600 / fs * 100))
        np.testing.assert_allclose(y[j], np.sin(2 * np.pi * f * j / 100), atol=1e-3)


def test_scraps_become_gaps_and_are_reported():
    x = np.random.default_rng(0).normal(size=3000); x[1000:1005] = x[1020:1030] = np.nan
    done = apply_recipe(recording(eeg(x, 100)), Recipe.default())
    assert np.isnan(done["Cz"].samples()).tolist() == [1000 <= i < 1030 for i in range(3000)]
    assert [i.action for i in done.issues] == ["dropped"] and "0.15 s" in done.issues[0].problem


def test_finite_stretches():
    rng = np.random.default_rng(0)
    for _ in range(50):
        x = np.where(rng.random(40) < .3, np.nan, 1.); seen = np.zeros(40, bool)
        for a, b in finite_stretches(x): seen[a:b] = True; assert (a == 0 or np.isnan(x[a - 1])) and (b == 40 or np.isnan(x[b]))
        np.testing.assert_array_equal(seen, np.isfinite(x))


# lengths

@given(st.lists(st.tuples(st.sampled_from(RATES), st.floats(20, 40)), min_size=1, max_size=4), st.sampled_from([12.8, 99.99, 100., 128.]))
@settings(max_examples=40, deadline=None)
def test_channels_stack(specs, rate):
    rng = np.random.default_rng(0)
    rec = recording(*(eeg(rng.normal(size=round(fs * s)), fs, name=f"c{i}") for i, (fs, s) in enumerate(specs)))
    done = apply_recipe(rec, Recipe("r", rate=rate))
    assert {c.n_samples for c in done.channels.values()} == {round(rec.duration * rate)}
    for name, ch in rec.channels.items():
        finite = np.flatnonzero(np.isfinite(done[name].samples()))
        assert abs(len(finite) / rate - ch.duration) <= 1 / ch.fs + 1.5 / rate and (np.diff(finite) == 1).all()
        if len(finite) < done[name].n_samples: assert any("the rest is a gap" in i.problem and i.channel == name for i in done.issues)


def test_a_channel_of_the_same_rate_that_is_one_sample_short():
    done = apply_recipe(recording(eeg(np.arange(999.), 100, name="a"), eeg(np.arange(1000.), 100, name="b")), PLAIN)
    assert done["a"].samples().tolist() == [*range(999), 998] and done["b"].samples().tolist() == list(range(1000))


# units, spikes, limits

@pytest.mark.parametrize("unit,factor", [("uV", 1), ("mV", 1e3), ("V", 1e6), ("nV", 1e-3)])
def test_the_unit_of_the_source_doesnt_matter(unit, factor):
    x = np.random.default_rng(0).normal(size=2560)
    np.testing.assert_allclose(run(x / factor, 256, Recipe.default(), unit=unit), run(x, 256, Recipe.default()), atol=1e-5)


def test_units_that_cant_be_converted():
    x = np.random.default_rng(0).normal(size=2560)
    for unit in ["", "%", "uv", "bpm"]:
        with pytest.raises(ChannelError) as e: run(x, 256, Recipe.default(), unit=unit)
        assert (e.value.path, e.value.channel) == ("night-7", "Cz") and "uV" in e.value.remedy and (unit or "not stated") in e.value.problem
    assert unit_factor("%", "%") == 1 and unit_factor("uV", "mV") == 1e-3


def test_resolution_and_names_come_along():
    ch = eeg(np.random.default_rng(0).normal(size=2560) / 1000, unit="mV", reference="M1", source_label="EEG C4", resolution=.0001)
    done, _ = process_channel(ch, Recipe.default(), ch.duration)
    assert (done.unit, done.reference, done.source_label, done.kind) == ("uV", "M1", "EEG C4", Kind.EEG) and done.resolution == pytest.approx(.1)


def test_median_against_a_loop():
    x = np.random.default_rng(0).normal(size=200).astype("float32")
    y = run(x, 100, Recipe("r", median={"EEG": 5}))
    np.testing.assert_array_equal(y, [np.median(np.r_[[x[0]] * 2, x, [x[-1]] * 2][i:i + 5]) for i in range(200)])


def test_clip_sets_to_the_limit_and_valid_draws_a_line():
    x = np.array([0, 50, 900, -900, 10.])
    assert run(x, 100, Recipe("r", clip={"EEG": (-100, 200)})).tolist() == [0, 50, 200, -100, 10]
    np.testing.assert_allclose(run(x, 100, Recipe("r", valid={"EEG": (-100, 200)})), [0, 50, 110 / 3, 70 / 3, 10], rtol=1e-6)


@given(st.lists(st.integers(45, 105), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_interpolation_against_a_loop(values):
    x = np.array(values, float)
    y, n = interpolate_invalid(x, 50, 100)
    good = [i for i, v in enumerate(values) if 50 <= v <= 100]
    assert n == len(values) - len(good)
    for i, v in enumerate(y):
        before, after = [g for g in good if g <= i], [g for g in good if g >= i]
        if not good: assert np.isnan(v)
        elif not before or not after: assert v == x[after[0] if not before else before[-1]]
        elif before[-1] == after[0]: assert v == x[i]
        else: assert v == pytest.approx(x[before[-1]] + (x[after[0]] - x[before[-1]]) * (i - before[-1]) / (after[0] - before[-1]))


def test_a_probe_that_was_off_all_the_time():
    with pytest.raises(SignalError, match="holds a valid value"): run(np.r_[np.zeros(50), np.full(50, 12.)], 1, Recipe.default(), "SPO2", "%")


# what can't be used

@pytest.mark.parametrize("values,says", [([1., np.inf, 2], "1 samples are infinite"), ([np.nan] * 3, "one finite"), ([], "one finite"), ([7.] * 300, "every sample is 7"), ([7., np.nan, 7.], "flat")])
@pytest.mark.parametrize("recipe", [Recipe.default(), Recipe.native()])
def test_unusable_samples(values, says, recipe):
    rec = recording(eeg(np.random.default_rng(0).normal(size=999)), eeg(values, name="C4-M1", source_label="EEG"))
    with pytest.raises(SignalError, match=says) as e: apply_recipe(rec, replace(recipe, channels=("Cz", "C4-M1")))
    assert (e.value.path, e.value.channel) == ("night-7", "C4-M1") and e.value.remedy
    done = apply_recipe(rec, recipe) # nobody has asked for this channel: the night goes on without it
    assert list(done.channels) == ["Cz"] and [(i.action, i.channel) for i in done.issues] == [("skipped", "EEG")] and says in done.issues[0].problem and e.value.remedy in done.issues[0].problem


@given(st.permutations(["good", "flat", "dead", "unitless", "slow"]), st.sets(st.sampled_from(["good", "flat", "dead", "unitless", "slow"]), min_size=1))
@settings(max_examples=40, deadline=None)
def test_what_cant_be_used_is_left_out_and_named(order, there):
    x = np.random.default_rng(0).normal(0, 20, 2560).astype("float32")
    made = dict(good=eeg(x, name="good"), flat=eeg(np.full(2560, 3.), name="flat"), dead=eeg(np.full(2560, np.nan), name="dead"), unitless=eeg(x, name="unitless", unit=""),
        slow=eeg(x[:10], 1., name="slow", kind="EMG"))
    rec = recording(*(made[n] for n in order if n in there))
    if "good" not in there:
        with pytest.raises((SignalError, ChannelError)) as e: apply_recipe(rec, Recipe.default())
        assert all(n in str(e.value) for n in there) and e.value.path == "night-7"
        return
    done = apply_recipe(rec, Recipe.default())
    assert list(done.channels) == ["good"] and {i.channel for i in done.issues if i.action == "skipped"} == there - {"good"}
    np.testing.assert_array_equal(done["good"].samples(), apply_recipe(recording(made["good"]), Recipe.default())["good"].samples()) # the others left no trace
    for n in there - {"good"}:
        with pytest.raises((SignalError, ChannelError)): apply_recipe(rec, Recipe.default(channels=(n,)))


def test_a_damaged_file_is_no_dead_channel():
    def broken(a, b): raise EDFError("the file had 9 bytes when it was opened and has 8 now")
    rec = recording(eeg(np.arange(999.)), Channel("C4", Kind.EEG, 256., "uV", 999, broken))
    with pytest.raises(EDFError, match="night-7, channel 'C4': the file had"): apply_recipe(rec, Recipe.default())


@pytest.mark.parametrize("seconds", [.6, 1, 2, 3, 5])
def test_a_few_seconds_are_enough(seconds):
    y = run(np.random.default_rng(0).normal(size=round(seconds * 256)), 256, Recipe.default())
    assert len(y) == round(seconds * 100) and np.isfinite(y).all()


# the whole

def test_linear_and_indifferent_to_shifts():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 20, (2, 256 * 60)).astype("float32")
    out = lambda x: run(x, 256, Recipe.default())
    np.testing.assert_allclose(out(2 * a - 3 * b), 2 * out(a) - 3 * out(b), atol=1e-3)
    np.testing.assert_allclose(out(a + 500), out(a), atol=1e-3) # an offset is no signal
    np.testing.assert_allclose(out(a[64 * 4:])[2000:-1000], out(a)[2100:-1000], atol=1e-3) # one second later


def test_provenance_order_and_everything_else_is_kept():
    rec = recording(eeg(np.arange(999.), name="a"), eeg(np.arange(999.), name="b"), subject="s", cohort="c", provenance={"format": "EDF"})
    done = apply_recipe(rec, Recipe("mine", channels=("b", "a"), rate=64))
    assert list(done.channels) == ["b", "a"] and (done.id, done.subject, done.cohort) == ("night-7", "s", "c")
    assert done.provenance == {"format": "EDF", "recipe": "mine", "recipe_hash": Recipe("mine", channels=("b", "a"), rate=64).hash}
    assert rec.provenance == {"format": "EDF"} and rec["a"].fs == 256


def test_native_changes_nothing():
    x = np.random.default_rng(0).normal(size=999).astype("float32"); x[3:8] = np.nan
    np.testing.assert_array_equal(run(x, 99.99, Recipe.native(), unit=""), x)


def test_one_channel_at_a_time():
    "Memory grows by the results only, not by what is needed to make them."
    n = 256 * 1800
    lazy = lambda i: Channel(f"c{i}", Kind.EEG, 256., "uV", n, lambda a, b: np.random.default_rng(i).normal(size=b - a).astype("float32"))
    def peak(count):
        tracemalloc.start()
        try: apply_recipe(recording(*map(lazy, range(count))), Recipe.default()); return tracemalloc.get_traced_memory()[1]
        finally: tracemalloc.stop()
    peak(1)
    one, six = peak(1), peak(6)
    assert six - one < 5 * (4 * 100 * 1800) * 1.1, (one, six)


# real recordings

@real
def test_sleep_edf():
    from pftsleep.data.edf import read_edf
    rec = read_edf(REALDATA / "psg_edf" / "sleepedf_SC4001_5min.edf")
    done = apply_recipe(rec, Recipe.default(channels=("EEG", "EEG", "EOG"), rate=128))
    x = np.stack([c.samples() for c in done.channels.values()])
    assert x.shape == (3, 300 * 128) and np.isfinite(x).all() and (x.std(1) > 3).all()
    raw = rec[next(iter(done.channels))].samples().astype(float)
    ours = resample(x[0].astype(float), 128, 100)
    lag = signal.correlate(ours, zero_phase(raw, 100, (.3, 35.)), "same").argmax() - len(raw) // 2
    assert lag == 0
    with pytest.raises(SignalError, match="leave the channel out"): apply_recipe(rec, Recipe.default(channels=("EMG",)))


@real
def test_a_real_fractional_rate():
    "A block wave that switches every 2.5 s, sampled at 12.8 Hz beside 100 Hz: it still switches then."
    from pftsleep.data.edf import read_edf
    rec = read_edf(REALDATA / "psg_edf" / "format_quirks" / "mne_test_uneven_samp.edf")
    done = apply_recipe(rec, Recipe("r", channels=tuple(rec.channels), rate=100.))
    x = np.stack([c.samples() for c in done.channels.values()])
    assert x.shape == (2, 11000) and {c.fs for c in rec.channels.values()} == {12.8, 100.}
    raw = next(c for c in rec.channels.values() if c.fs == 12.8).samples()
    middle = (raw.max() + raw.min()) / 2
    before = (np.flatnonzero(np.diff(raw > middle)) + .5) / 12.8
    after = (np.flatnonzero(np.diff(x[1] > middle)) + .5) / 100
    assert len(before) == len(after) > 20 and np.abs(before - after).max() <= .5 / 12.8 + .5 / 100


def test_what_would_fold_is_removed():
    y = resample(np.sin(2 * np.pi * 101 * np.arange(25600) / 256), 256, 100)
    assert np.abs(y[500:-500]).max() < 1e-5
