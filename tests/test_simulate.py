"""The simulator: physiology over several people, alignment through files, determinism, resuming, bad settings."""
import json
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import butter, find_peaks, sosfiltfilt, welch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pftsleep.data import simulate
from pftsleep.data.alignment import align
from pftsleep.data.edf import read_edf
from pftsleep.data.hypnograms import read_hypnogram
from pftsleep.data.recording import SCORED_STAGES, Hypnogram, crop_hypnogram
from pftsleep.data.simulate import MONTAGES, Lead, draw_traits, simulate_cohort, simulate_hypnogram, simulate_night, write_nsrr_xml
from pftsleep.errors import ChannelError, ConfigError, PFTSleepError, StoreError

REALDATA = Path(__file__).parents[2] / "shared" / "realdata"
real = pytest.mark.skipif(not REALDATA.exists(), reason="../shared/realdata is not here")
W, N1, N2, N3, REM = SCORED_STAGES


def hypnogram(hours=8., seed=0, epoch_length=30.): return simulate_hypnogram(hours, np.random.default_rng(seed), epoch_length)

def epochs(x, fs, seconds): return x[:len(x) // round(seconds * fs) * round(seconds * fs)].reshape(-1, round(seconds * fs))

def bands(x, fs, *edges, seconds=30., window=4):
    "Power of each band in each epoch, in squared units: [n_epochs, n_bands]."
    f, p = welch(epochs(x, fs, seconds), fs, nperseg=int(window * fs))
    return np.stack([p[:, (f >= low) & (f < high)].sum(1) * (f[1] - f[0]) for low, high in edges], 1)

def band(x, fs, low, high, **kwargs): return bands(x, fs, (low, high), **kwargs)[:, 0]


# ---------------------------------------------------------------- hypnograms

def shares(hours, n=80, epoch_length=30.):
    return np.array([np.bincount(hypnogram(hours, s, epoch_length).stages, minlength=5) / (hours * 3600 / epoch_length) for s in range(n)]) * 100

@pytest.mark.parametrize("hours", [7, 8])
@pytest.mark.parametrize("epoch_length", [30., 20., 10.])
def test_a_night_has_the_usual_proportions(hours, epoch_length):
    mean, spread = (f(shares(hours, epoch_length=epoch_length), axis=0) for f in (np.mean, np.std))
    for stage, (low, high) in {W: (10, 25), N1: (5, 8), N2: (44, 55), N3: (12, 22), REM: (15, 22)}.items(): assert low <= mean[stage] <= high, (stage, mean)
    assert (spread > [2, .7, 2.5, 2, 1.5]).all() # people and nights differ

@pytest.mark.parametrize("hours", [1, 1.5, 2])
def test_short_recordings_hold_all_stages(hours): assert (shares(hours) > 0).all(1).mean() > .95

def test_architecture():
    "Sleep begins awake and through N1, N3 comes early, REM late and after about an hour or more; the night is neither unbroken nor shattered."
    early, latency, breaks = [], [], []
    for s in range(40):
        x = hypnogram(8, s).stages
        onset = np.flatnonzero(x != W)[0]
        assert x[0] == W and x[onset] == N1
        half = len(x) // 2
        early.append([(x[:half] == N3).mean() - (x[half:] == N3).mean(), (x[half:] == REM).mean() - (x[:half] == REM).mean()])
        latency.append((np.flatnonzero(x == REM)[0] - onset) / 2)
        breaks.append((np.diff(x) != 0).sum())
        assert not ((x[:-1] == W) & (x[1:] == N3)).any()
    assert (np.mean(early, axis=0) > .1).all()
    assert 55 < np.median(latency) < 110
    assert 50 < np.mean(breaks) < 150

@given(st.floats(.01, 10), st.sampled_from([1., 4., 10., 20., 30., 29.7]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_any_length_and_epoch(hours, epoch_length, seed):
    if hours * 3600 < epoch_length:
        with pytest.raises(ConfigError): hypnogram(hours, seed, epoch_length)
        return
    h = hypnogram(hours, seed, epoch_length)
    assert abs(h.duration - hours * 3600) < epoch_length + 1e-6 and h.duration <= hours * 3600 + 1e-6
    assert set(h.stages.tolist()) <= set(range(5)) and h.epoch_length == epoch_length
    np.testing.assert_array_equal(h.stages, hypnogram(hours, seed, epoch_length).stages)

def test_the_plan_does_not_depend_on_the_epoch_length():
    fine, coarse = hypnogram(8, 1, 10.), hypnogram(8, 1, 30.)
    assert (np.repeat(coarse.stages, 3) == fine.stages).mean() > .93


# ---------------------------------------------------------------- physiology

PHYSIOLOGY = {"C4-M1": 100, "O2-M1": 100, "E1-M2": 100, "E2-M1": 100, "Chin": 100, "ECG": 200, "Flow": 10, "Thorax": 10, "Abdomen": 10, "SpO2": 1, "HR": 1}

@pytest.fixture(scope="module", params=[1, 2, 3])
def night(request): return simulate_night(hypnogram(6, request.param), PHYSIOLOGY, request.param, replace(draw_traits(request.param), ahi=25., central=.15))

def by_stage(rec, values, f=np.median): return {s: float(f(values[rec.hypnogram.stages == s])) for s in SCORED_STAGES}

def test_eeg(night):
    c4, o2 = night["C4-M1"].samples(), night["O2-M1"].samples()
    delta, alpha = by_stage(night, band(c4, 100, .5, 2)), by_stage(night, band(o2, 100, 8.5, 11.5))
    assert delta[N3] > 2.5 * delta[N2] > 2.5 * 1.5 * delta[W] and delta[N2] > 1.5 * delta[REM]
    assert alpha[W] > 1.7 * alpha[N1] and alpha[W] > 1.7 * alpha[N2] and alpha[W] > 1.7 * alpha[REM]
    assert by_stage(night, band(o2, 100, 8.5, 11.5))[W] > by_stage(night, band(c4, 100, 8.5, 11.5))[W] # alpha is posterior
    hz = night.provenance["traits"]["spindle_hz"]
    spindles = by_stage(night, band(c4, 100, hz - 1, hz + 1), np.mean)
    assert spindles[N2] > 1.7 * spindles[REM] and spindles[N2] > 1.5 * spindles[N1] and spindles[N2] > spindles[N3]
    theta = by_stage(night, band(c4, 100, 4, 8))
    assert theta[N1] > 1.3 * theta[W] or alpha[W] > 10 * alpha[N1] # the skirt of a strong alpha lies over theta
    rms = by_stage(night, epochs(c4, 100, 30).std(1))
    assert 6 < rms[REM] < 25 and 18 < rms[N3] < 70 # uV

def slow_wave_share(rec):
    "Share of each epoch covered by waves of 0.5 to 2 Hz with more than 75 uV from peak to peak (AASM manual, N3)."
    x = sosfiltfilt(butter(2, [.3, 4], "bandpass", fs=100, output="sos"), rec["C4-M1"].samples())
    up = np.flatnonzero((x[:-1] < 0) & (x[1:] >= 0))
    out = np.zeros(len(x), bool)
    for a, b in pairwise(up): out[a:b] = np.ptp(x[a:b]) > 75 and 50 <= b - a <= 200
    return epochs(out, 100, 30).mean(1)

def test_slow_waves_follow_the_aasm_rule():
    n3, n2, rem = [], [], []
    for seed in range(4):
        rec = simulate_night(hypnogram(3, seed), {"C4-M1": 100}, seed)
        share, x = slow_wave_share(rec), rec.hypnogram.stages
        n3.append(np.mean(share[x == N3] >= .2)); n2.append(np.mean(share[x == N2] >= .2)); rem.append(np.mean(share[x == REM] >= .2))
    print("share of epochs with slow waves over a fifth: N3", np.round(n3, 2), "N2", np.round(n2, 2), "REM", np.round(rem, 2))
    assert np.mean(n3) > .6 and np.mean(n2) < .15 and max(rem) < .02

def test_eyes(night):
    left, right = night["E1-M2"].samples(), night["E2-M1"].samples()
    fast, rolling = band(left - right, 100, 1, 5), band(left - right, 100, .15, .55, window=15)
    assert by_stage(night, fast, np.mean)[REM] > 5 * by_stage(night, fast, np.mean)[N2]
    assert by_stage(night, rolling, np.mean)[N1] > 4 * by_stage(night, rolling, np.mean)[N2]
    r = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(epochs(left, 100, 30), epochs(right, 100, 30), strict=True)])
    rem = night.hypnogram.stages == REM
    busy = rem & (fast > np.quantile(fast[rem], .7))
    assert np.median(r[busy]) < -.6 # eyes turn together, so the electrodes see opposite signs
    assert np.median(r[night.hypnogram.stages == N3]) > .5 # brain waves reach both alike

def test_tone_falls_from_wake_to_rem():
    "In the average person clearly; a single person's tone may lie flat (an overlap that a stager has to bear)."
    people = [simulate_night(hypnogram(3, s), {"Chin": 100}, s) for s in range(8)]
    tone = np.log([list(by_stage(p, epochs(p["Chin"].samples(), 100, 30).std(1)).values()) for p in people])
    steps = -np.diff(tone, axis=1)
    assert (steps.mean(0) > np.log([1.25, 1.1, 1.1, 1.5])).all(), np.exp(steps.mean(0))
    assert (tone[:, W] > tone[:, N2]).all() and (tone[:, N2] > tone[:, REM]).all()
    assert np.std(tone[:, N2]) > .2 # electrodes and people differ as much as stages do

def test_twitches(night):
    seconds = epochs(night["Chin"].samples(), 100, 1).std(1).reshape(-1, 30)
    twitches = (seconds.max(1) / np.median(seconds, axis=1))
    assert np.mean(twitches[night.hypnogram.stages == REM] > 3) > 3 * np.mean(twitches[night.hypnogram.stages == N2] > 3)

def r_waves(rec):
    fs = rec["ECG"].fs
    x = sosfiltfilt(butter(2, [5, 30], "bandpass", fs=fs, output="sos"), rec["ECG"].samples())
    return find_peaks(x, height=.4 * np.quantile(x, .995), distance=int(.35 * fs))[0] / fs

def tachogram(rec):
    beats = r_waves(rec)
    rr = np.diff(beats)
    return np.interp(np.arange(0, rec.duration, .25), beats[1:], rr), rr

def test_heart(night):
    x, rr = tachogram(night)
    assert rr.min() > .4 and rr.max() < 2 # every beat found, none invented
    rate = by_stage(night, 60 / x.reshape(-1, 120).mean(1))
    assert rate[W] > rate[REM] > rate[N3] > 40
    assert abs(np.median(night["HR"].samples()) - np.median(60 / rr)) < 2
    f, p = welch(epochs(x - x.mean(), 4, 60)[np.repeat(True, len(x) // 240) & (night.hypnogram.stages[1::2][:len(x) // 240] == N2)], 4, nperseg=240)
    peak = f[(f > .12) & (f < .45)][np.argmax(p.mean(0)[(f > .12) & (f < .45)])]
    assert abs(peak - night.provenance["traits"]["breath_hz"]) < .04 # the heart follows the breath

def test_sinus_arrhythmia_is_what_makes_the_heart_follow_the_breath():
    h, t = Hypnogram(np.full(120, N3), 30.), draw_traits(1)
    power = []
    for depth in (0., .06):
        x, _ = tachogram(simulate_night(h, {"ECG": 250}, 1, replace(t, sinus_arrhythmia=depth, ahi=0.)))
        f, p = welch(x - x.mean(), 4, nperseg=480)
        power.append(p[np.abs(f - t.breath_hz) < .03].sum())
    assert power[1] > 5 * power[0]

def test_breath_is_regular_in_nrem_and_not_in_rem():
    def irregularity(stage):
        x = simulate_night(Hypnogram(np.full(60, stage), 30.), {"Thorax": 10}, 5, replace(draw_traits(5), ahi=0.))["Thorax"].samples()
        return np.std(np.diff(find_peaks(x, distance=15, prominence=.5 * x.std())[0]) / 10)
    assert irregularity(REM) > 1.5 * irregularity(N2) > 1.5 * irregularity(N3)

def test_desaturations_follow_events(night):
    spo2, e = night["SpO2"].samples(), night.events
    apneas = e[e.name.str.contains("pnea")]
    end = (apneas.onset + apneas.duration).to_numpy()
    alone = apneas[(np.diff(apneas.onset, append=np.inf) > 110) & (np.diff(end, prepend=-np.inf) > 110) & (end < night.duration - 60)]
    assert len(alone) > 10
    fall, lag = [], []
    for o, d in zip(alone.onset, alone.duration, strict=True):
        after = spo2[int(o + d):int(o + d) + 45]
        fall.append(np.median(spo2[int(o) - 20:int(o)]) - after.min()); lag.append(np.flatnonzero(after == after.min()).mean())
    assert np.mean(np.array(fall) >= 2) > .8
    assert 15 <= np.median(np.array(lag)[np.array(fall) >= 3]) <= 30
    assert np.unique(spo2 % 1).tolist() == [0]
    obstructive = e[e.name == "Obstructive apnea"]
    pieces = lambda ch: [night[ch].samples(int((o + 3) * 10), int((o + d - 3) * 10)) for o, d in zip(obstructive.onset, obstructive.duration, strict=True)]
    quiet = np.mean([np.abs(p).mean() for p in pieces("Flow")]) / np.abs(night["Flow"].samples()).mean()
    against = np.median([np.corrcoef(a, b)[0, 1] for a, b in zip(pieces("Thorax"), pieces("Abdomen"), strict=True) if len(a) > 60])
    assert quiet < .25 and against < -.3 # no air, and chest against abdomen
    assert np.corrcoef(night["Thorax"].samples(), night["Abdomen"].samples())[0, 1] > .4 # together otherwise

def test_who_breathes_well_keeps_the_saturation():
    rec = simulate_night(hypnogram(6, 1), {"SpO2": 1, "Flow": 10}, 1, replace(draw_traits(1), ahi=0.))
    assert np.ptp(rec["SpO2"].samples()) <= 4 and not rec.events.name.str.contains("pnea|SpO2").any()

def test_events_are_in_sleep(night):
    starts = night.events[night.events.name.str.contains("pnea|Arousal")].onset.to_numpy()
    assert np.mean(night.hypnogram.stages[(starts // 30).astype(int)] != W) > .93
    index = night.events.name.str.contains("pnea").sum() / ((night.hypnogram.stages > 0).sum() / 120)
    assert 12 < index < 45 # asked for 25
    assert (night.events.duration > 0).all() and (night.events.onset >= 0).all()


# ---------------------------------------------------------------- how hard it is

def features(rec):
    edges = ((.5, 2), (2, 4), (4, 8), (8, 11), (11, 16), (16, 30))
    powers = [bands(rec[c].samples(), rec[c].fs, *edges[:n]) for c, n in (("EEG", 6), ("EOG(L)", 5))]
    return np.log(np.concatenate([*powers, epochs(rec["EMG"].samples(), rec["EMG"].fs, 30).std(1, keepdims=True)], 1))

def across_people(x, y, folds=4):
    "Predictions for people that the classifier has not seen."
    truth, guess = [], []
    for k in range(folds):
        train, test = ([i for i in range(len(x)) if (i % folds == k) == side] for side in (False, True))
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=400))
        model.fit(np.concatenate([x[i] for i in train]), np.concatenate([y[i] for i in train]))
        truth += [y[i] for i in test]; guess += [model.predict(x[i]) for i in test]
    return np.concatenate(truth), np.concatenate(guess)

def test_a_linear_probe_finds_it_neither_trivial_nor_hopeless():
    people = [simulate_night(hypnogram(4, s), {"EEG": 100, "EOG(L)": 50, "EMG": 100}, s) for s in range(12)]
    y = [p.hypnogram.stages for p in people]
    truth, guess = across_people([features(p) for p in people], y)
    kappa, f1 = cohen_kappa_score(truth, guess), f1_score(truth, guess, average=None)
    print(f"kappa {kappa:.3f}, F1 {np.round(f1, 2)}")
    assert .6 < kappa < .9
    assert np.argmin(f1) == N1 and .25 < f1[N1] < .85
    means = [np.stack([epochs(p[c].samples(), p[c].fs, 30).mean(1) for c in p.channels], 1) for p in people]
    assert cohen_kappa_score(*across_people(means, y)) < .1 # no stage hides a constant

def test_nights_of_one_person_are_alike():
    def signature(seed, traits):
        rec = simulate_night(hypnogram(1.5, seed), {"O2-M1": 100}, seed, traits)
        f, p = welch(rec["O2-M1"].samples(), 100, nperseg=400)
        return np.log(p[(f >= 1) & (f < 30)])
    traits = [draw_traits(s) for s in range(8)]
    first, second = ([signature(100 * k + s, t) for s, t in enumerate(traits)] for k in (1, 2))
    distance = np.array([[np.abs(a - b).mean() for b in second] for a in first])
    assert distance.diagonal().mean() < .7 * distance[~np.eye(8, dtype=bool)].mean()
    assert np.mean(distance.argmin(1) == np.arange(8)) > .5


# ---------------------------------------------------------------- recordings

@pytest.mark.parametrize("name", MONTAGES)
def test_presets(name):
    rec = simulate_night(hypnogram(.5, 1), name, 1)
    assert list(rec.channels) == list(MONTAGES[name])
    for c in rec.channels.values():
        assert c.n_samples == round(rec.duration * c.fs) and np.isfinite(c.samples()).all()
        assert c.kind == "LIGHT" or c.samples().std() > 0 or c.kind == "POSITION"

KINDS = ["EEG", "EOG", "EMG", "ECG", "RESP", "SPO2", "HR", "TEMP", "POSITION", "LIGHT"]
RATES = [.5, 1., 7.3, 10., 12.8, 50., 64., 99.9, 125., 128., 200., 256., 512.]

@given(st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(RATES)), min_size=1, max_size=3), st.sampled_from([10., 20., 30., 7.7]), st.floats(0, 40))
@settings(max_examples=25, deadline=None)
def test_any_montage(kinds, epoch_length, offset):
    h = Hypnogram([0, 1, 2, 3, 4, -1, 2], epoch_length)
    rec = simulate_night(h, {f"ch {i}": Lead(fs, kind) for i, (kind, fs) in enumerate(kinds)}, 3, offset=offset)
    assert rec.duration >= offset + h.duration - 1e-6
    assert len({c.duration for c in rec.channels.values()}) == 1 # whole data records
    for (kind, fs), c in zip(kinds, rec.channels.values(), strict=True):
        assert (c.kind, c.fs) == (kind, fs) and np.isfinite(c.samples()).all()

@pytest.mark.parametrize("montage, words", [({"gibberish": 100}, "doesn't tell"), ({"EEG": -1}, "sampling rate"),
    ({"x": Lead(100, "SNORE")}, "can't be simulated"), ({"EMG": Lead(100, site="ear")}, "no site")])
def test_impossible_channels(montage, words):
    with pytest.raises(ChannelError, match=words) as e: simulate_night(hypnogram(.1), montage)
    assert e.value.channel in montage and e.value.remedy

def test_a_rate_is_only_a_way_of_sampling():
    "The same night at 64, 100 and 256 Hz: the same waves at the same time."
    rec = [simulate_night(hypnogram(.5, 2), {"EEG": fs, "Thorax": fs}, 2) for fs in (64, 100, 256)]
    for name in ("EEG", "Thorax"):
        grid = np.arange(1, 1799, .05)
        x = [np.interp(grid, np.arange(r[name].n_samples) / r[name].fs, sosfiltfilt(butter(3, 8, fs=r[name].fs, output="sos"), r[name].samples())) for r in rec]
        assert np.corrcoef(x).min() > .98

def test_amplifier_noise_differs_between_channels():
    rec = simulate_night(hypnogram(1, 2), {"C3-M2": 100, "C4-M1": 100, "F4-M1": 100}, 2)
    r = np.corrcoef([c.samples() for c in rec.channels.values()])[np.triu_indices(3, 1)]
    assert (r > .5).all() and (r < .98).all() # one brain, several electrodes

@pytest.mark.parametrize("epoch_length", [10., 20., 30.])
def test_labels_lie_where_the_signal_changes(epoch_length):
    "Blocks of N3 and wake: delta power and labels agree best without a shift, whatever the epoch length and the offset."
    stages = np.repeat(np.tile([W, N3], 8), int(300 / epoch_length))
    rec = simulate_night(Hypnogram(stages, epoch_length), {"EEG": 100}, 4, offset=13.)
    step = 5.
    delta = np.log(band(rec["EEG"].samples(13 * 100), 100, .5, 2, seconds=step, window=step))
    label = np.repeat(stages == N3, int(epoch_length / step)).astype(float)
    lags = np.arange(-8, 9)
    score = [np.corrcoef(np.roll(label, k)[40:-40], delta[:len(label)][40:-40])[0, 1] for k in lags]
    assert abs(lags[np.argmax(score)] * step) <= epoch_length / 2

def test_unscored_is_restless():
    rec = simulate_night(Hypnogram([N2] * 20 + [-1] * 20, 30.), {"EMG": 100}, 1)
    tone = epochs(rec["EMG"].samples(), 100, 30).std(1)
    assert tone[20:].mean() > 2 * tone[:20].mean()

@real
def test_a_real_hypnogram_drives_a_night():
    path = sorted((REALDATA / "hypnograms" / "sleep_edf").glob("SC4001*-Hypnogram.edf"))[0]
    whole = read_hypnogram(path)
    asleep = np.flatnonzero(whole.stages > 0)
    h = crop_hypnogram(whole, asleep[0] - 20, asleep[-1] + 20)
    rec = simulate_night(replace(h, onset=0.), {"EEG Fpz-Cz": 100, "EMG submental": 1, "EOG horizontal": 100}, 1)
    delta, tone = np.log(band(rec["EEG Fpz-Cz"].samples(), 100, .5, 2)), rec["EMG submental"].samples().reshape(-1, 30).mean(1)
    assert len(delta) == len(h)
    assert np.median(delta[h.stages == N3]) > np.median(delta[h.stages == N2]) + .7 > np.median(delta[h.stages == W]) + .7
    assert np.median(tone[h.stages == REM]) < np.median(tone[h.stages == N2]) < np.median(tone[h.stages == W])
    np.testing.assert_array_equal(rec.hypnogram.stages, h.stages)


# ---------------------------------------------------------------- files

@pytest.mark.parametrize("epoch_length, offset, montage", [(30., 0., "shhs"), (30., 7.5, {"EEG": 125, "SpO2": 1}),
    (20., 13., {"EEG": 12.8, "Thorax": 10}), (10., 61., "sleep_edf")])
def test_through_files(tmp_path, epoch_length, offset, montage):
    table = simulate_cohort(tmp_path, 1, hours=.7, seed=3, montage=montage, epoch_length=epoch_length, hypnogram_offset=offset)
    rec, h = read_edf(tmp_path / table.signals[0]), read_hypnogram(tmp_path / table.annotation[0])
    leads = {k: simulate._lead(k, v) for k, v in simulate._montage(montage).items()}
    truth = simulate._recording(simulate._Job(tmp_path, 1, 1, .7, 3, leads, epoch_length, offset))
    assert rec.start == truth.start and abs(rec.duration - table.seconds[0]) < 1e-6 and rec.hypnogram is None and rec.events.empty
    assert h.epoch_length == epoch_length
    both, aligned, _ = align(rec, h)
    n = len(aligned)
    assert n == len(truth.hypnogram)
    np.testing.assert_array_equal(aligned.stages, truth.hypnogram.stages[:n])
    for got, want in zip(both.channels.values(), truth.channels.values(), strict=True):
        first = int(np.ceil(round(offset * want.fs, 6)))
        x, y = got.samples(), want.samples()[first:first + got.n_samples]
        assert got.fs == want.fs and got.unit == want.unit and np.abs(x - y).max() <= np.ptp(want.samples()) / 60000 + 1e-6

def test_no_identity_and_no_labels_in_the_signals(tmp_path):
    table = simulate_cohort(tmp_path, 1, hours=.3, montage={"EEG": 100})
    data = (tmp_path / table.signals[0]).read_bytes()
    assert re.fullmatch(rb"X X X X *", data[8:88]) and b"Sleep stage" not in data and b"pnea" not in data

def test_xml_as_the_nsrr_writes_it(tmp_path):
    h = Hypnogram([0, 0, 2, 2, 3, 4, -1], 30., start=datetime(2024, 5, 1, 22, 30, 12))
    events = pd.DataFrame([(50., 20.5, "Obstructive apnea", "flow"), (10., 3., "Arousal", "")], columns=["onset", "duration", "name", "channel"])
    write_nsrr_xml(h, events, tmp_path / "x-nsrr.xml", datetime(2024, 5, 1, 22, 30), 300.)
    text = (tmp_path / "x-nsrr.xml").read_text()
    stages = ["Wake|0", "Stage 2 sleep|2", "Stage 3 sleep|3", "REM sleep|5", "Unscored|9"]
    assert re.findall("<EventConcept>(.*)<", text) == ["Recording Start Time", "Arousal|Arousal ()", "Obstructive apnea|Obstructive Apnea", *stages]
    back = read_hypnogram(tmp_path / "x-nsrr.xml")
    assert back.stages.tolist() == h.stages.tolist() and back.epoch_length == 30
    assert (back.start, back.onset) == (h.start, 12)

def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

def test_order_number_and_workers_change_nothing(tmp_path):
    common = dict(nights=2, hours=.25, seed=9, montage="pftsleep", hypnogram_offset=4.)
    simulate_cohort(tmp_path / "a", 3, **common)
    simulate_cohort(tmp_path / "b", 1, **common); simulate_cohort(tmp_path / "b", 3, **common)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool: simulate_cohort(tmp_path / "c", 3, executor=pool, **common)
    job = simulate._Job(tmp_path / "d", 3, 2, .25, 9, {k: simulate._lead(k, v) for k, v in MONTAGES["pftsleep"].items()}, 30., 4.)
    for p in (*job.files().values(), job.receipt): p.parent.mkdir(parents=True, exist_ok=True)
    simulate._write_night(job) # the last night, alone
    a, b, c, d = (contents(tmp_path / x) for x in "abcd")
    assert a == b == c and len(a) == 3 * 2 * 3
    assert {k: v for k, v in a.items() if "sim-0003-v2" in k} == d
    assert len({v for k, v in a.items() if k.endswith("edf")}) == 6
    simulate_cohort(tmp_path / "e", 1, **{**common, "seed": 10})
    assert contents(tmp_path / "e")["edfs/sim-0001-v1.edf"] != a["edfs/sim-0001-v1.edf"]

@pytest.mark.parametrize("harm", ["truncate", "no xml", "no receipt", "bad receipt", "flip"])
def test_a_harmed_night_is_made_again(tmp_path, harm):
    make = lambda: simulate_cohort(tmp_path, 2, hours=.25, montage={"EEG": 50})
    make()
    before = contents(tmp_path)
    edf, receipt = tmp_path / "edfs/sim-0001-v1.edf", tmp_path / ".simulated/sim-0001-v1.json"
    if harm == "truncate": edf.write_bytes(edf.read_bytes()[:-1000])
    if harm == "flip": edf.write_bytes(edf.read_bytes()[:-1] + bytes([edf.read_bytes()[-1] ^ 1]))
    if harm == "no xml": next(tmp_path.rglob("sim-0001-v1-nsrr.xml")).unlink()
    if harm == "no receipt": receipt.unlink()
    if harm == "bad receipt": receipt.write_text(json.dumps([1]))
    other = (tmp_path / "edfs/sim-0002-v1.edf").stat().st_mtime_ns
    make()
    assert contents(tmp_path) == before and (tmp_path / "edfs/sim-0002-v1.edf").stat().st_mtime_ns == other

def test_two_simulations_never_share_a_folder(tmp_path):
    simulate_cohort(tmp_path, 2, hours=.25, montage={"EEG": 50})
    before = contents(tmp_path)
    with pytest.raises(StoreError, match="other settings"): simulate_cohort(tmp_path, 1, hours=.25, montage={"EEG": 50}, seed=1)
    assert contents(tmp_path) == before
    assert len(simulate_cohort(tmp_path, 1, hours=.25, montage={"EEG": 50})) == 1 # fewer of the same is no contradiction

def test_other_settings_make_it_again(tmp_path):
    first = simulate_cohort(tmp_path, 1, hours=.25, montage={"EEG": 50})
    before = contents(tmp_path)
    longer = simulate_cohort(tmp_path, 1, hours=.3, montage={"EEG": 50})
    assert (first.seconds[0], longer.seconds[0]) == (900, 1080)
    assert contents(tmp_path)["edfs/sim-0001-v1.edf"] != before["edfs/sim-0001-v1.edf"]

def test_a_full_disk_leaves_nothing_half_done(tmp_path, monkeypatch):
    def full(self, *a, **k): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(Path, "write_text", full)
        with pytest.raises(StoreError, match="No space left"): simulate_cohort(tmp_path, 1, hours=.25, montage={"EEG": 50})
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".part", ".json", ".xml")]
    simulate_cohort(tmp_path, 1, hours=.25, montage={"EEG": 50})
    assert len(contents(tmp_path)) == 3

@pytest.mark.parametrize("kwargs", [dict(n_subjects=0), dict(nights=0), dict(seed=-1), dict(hours=0.), dict(montage="nothing"), dict(epoch_length=0.),
    dict(hypnogram_offset=-1.)])
def test_impossible_settings(tmp_path, kwargs):
    with pytest.raises(PFTSleepError): simulate_cohort(tmp_path, **{"n_subjects": 1, "hours": .25, "montage": {"EEG": 50}, **kwargs})
    assert not list(tmp_path.rglob("*.edf"))
