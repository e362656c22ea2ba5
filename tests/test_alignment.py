"Every sample must carry the stage that was scored at its time, whatever the rates, offsets, records and epochs are."
from dataclasses import replace
from datetime import datetime, timedelta
from fractions import Fraction
from math import floor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from pftsleep.data.alignment import POLICIES, align, sample_at
from pftsleep.data.recording import Hypnogram, Recording, array_channel
from pftsleep.errors import AlignmentError, ConfigError

REALDATA = Path(__file__).parents[2] / "shared" / "realdata"
needs_realdata = pytest.mark.skipif(not REALDATA.exists(), reason="../shared/realdata is not here")
TOLERANCE = Fraction(1, 10**6) # samples
BEGIN = datetime(2024, 3, 1, 23, 59, 31, 125000)


class Night:
    "A recording of data records, as EDF has them, whose samples hold their own number; all quantities are also kept as exact fractions."
    def __init__(self, record, n_records, per_record, offset, epoch, stages, clock):
        self.duration, self.offset, self.epoch, self.stages = record * n_records, offset, epoch, np.array(stages, "int8")
        self.rates = {f"c{i}": Fraction(n) / record for i, n in enumerate(per_record)}
        channels = {name: array_channel(name, np.arange(n * n_records), float(fs), "") for (name, fs), n in zip(self.rates.items(), per_record, strict=True)}
        self.recording = Recording("night", channels, start=BEGIN)
        where = dict(start=BEGIN + timedelta(microseconds=int(offset * 10**6)), onset=-999.) if clock else dict(onset=float(offset))
        self.hypnogram = Hypnogram(self.stages, float(epoch), **where)

    def __repr__(self): # an example that can be pasted
        samples, clock = [int(fs * self.duration) for fs in self.rates.values()], self.hypnogram.start is not None
        return f"Night({self.duration!r}, 1, {samples}, {self.offset!r}, {self.epoch!r}, {self.stages.tolist()}, {clock})"

    def epochs(self, policy):
        "Numbers of the epochs that must be kept, found one by one; a millionth of a sample counts as nothing."
        slack = TOLERANCE / max(self.rates.values())
        inside = [k for k in range(floor(-self.offset / self.epoch) - 2, floor((self.duration - self.offset) / self.epoch) + 3)
                  if self.offset + k * self.epoch >= -slack and self.offset + (k + 1) * self.epoch <= self.duration + slack]
        scored = [k for k in inside if 0 <= k < len(self.stages)]
        return inside if policy == "pad_unscored" and scored else scored

    def scored_at(self, numbers, fs):
        "The stage at the time of these samples, -1 where nothing was scored."
        k = np.array([floor(((int(i) + TOLERANCE) / fs - self.offset) / self.epoch) for i in numbers], int)
        return np.where((k >= 0) & (k < len(self.stages)), self.stages[np.clip(k, 0, len(self.stages) - 1)], -1)


def check(night, recording, hypnogram, report):
    "Each sample that was kept lies in an epoch that has the stage scored at the sample's own time, and no sample of a kept epoch is missing."
    for name, fs in night.rates.items():
        numbers = recording[name].samples().astype(int)
        begin = Fraction(report.remainder[name]).limit_denominator(10**9) # the first sample's time in its epoch; the rest is counted
        epoch = np.array([floor((begin + (i + TOLERANCE) / fs) / night.epoch) for i in range(len(numbers))], int)
        assert (epoch < len(hypnogram)).all()
        np.testing.assert_array_equal(hypnogram.stages[epoch], night.scored_at(numbers, fs))
        assert len(numbers) == 0 or (np.diff(numbers) == 1).all()
        assert abs(len(numbers) - len(hypnogram) * night.epoch * fs) <= 1 # under one sample at each end
        assert 0 <= report.remainder[name] < 1 / fs


@st.composite
def nights(draw):
    record = draw(st.sampled_from([Fraction(1), Fraction(2), Fraction(30), Fraction(1, 2), Fraction(5, 4), Fraction(10, 3)]))
    epoch = draw(st.sampled_from([Fraction(30), Fraction(20), Fraction(10), Fraction(4), Fraction(15, 2), Fraction(64, 25)]))
    n_records = draw(st.integers(1, int(200 / record)))
    per_record = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    fine = st.integers(-250 * 10**4, 250 * 10**4).map(lambda n: Fraction(n, 10**4)) # not finer: exactly a millionth of a sample could go either way
    seconds = st.one_of(st.integers(-250, 250).map(Fraction), fine, st.integers(-50, 50).map(lambda k: k * epoch))
    stages = draw(st.lists(st.sampled_from([-1, 0, 1, 2, 3, 4]), min_size=1, max_size=40))
    return Night(record, n_records, per_record, draw(seconds), epoch, stages, draw(st.booleans()))


@given(nights(), st.sampled_from(POLICIES))
@example(Night(Fraction(1), 300, [100, 1], Fraction(0), Fraction(30), [0] * 2880, True), "crop")
@example(Night(Fraction(30), 1, [384], Fraction(0), Fraction(30), [2], True), "crop") # 384 samples at 12.8 Hz are 29.999999999999996 s
@example(Night(Fraction(1), 60, [7], Fraction(-30), Fraction(30), [0, 1, 2, 3], False), "pad_unscored")
@settings(max_examples=250, deadline=None)
def test_every_sample_has_the_stage_of_its_time(night, policy):
    expected = night.epochs(policy)
    if not expected:
        with pytest.raises(AlignmentError): align(night.recording, night.hypnogram, policy)
        return
    recording, hypnogram, report = align(night.recording, night.hypnogram, policy)
    check(night, recording, hypnogram, report)
    assert hypnogram.stages.tolist() == [night.stages[k] if 0 <= k < len(night.stages) else -1 for k in expected] # all of them, no phantoms
    assert recording.hypnogram is hypnogram and hypnogram.onset == 0
    first = night.offset + expected[0] * night.epoch
    assert abs((recording.start - BEGIN) / timedelta(seconds=1) - float(first)) < 2e-6
    if night.hypnogram.start: assert hypnogram.start == recording.start
    assert report.epochs_kept == len(expected) == len(hypnogram)
    assert report.epochs_cut_before + report.epochs_cut_after + report.epochs_kept - report.epochs_added_before - report.epochs_added_after == len(night.stages)
    assert report.signal_cut_before + report.signal_cut_after + float(len(expected) * night.epoch) == pytest.approx(float(night.duration), abs=1e-4)
    assert report.unscored_kept == (hypnogram.stages == -1).sum()


@given(st.integers(-20, 20), st.sampled_from([1, 3, 30, 384, 3000]), st.sampled_from(POLICIES))
@settings(max_examples=200, deadline=None)
def test_an_offset_of_microseconds_counts_from_a_millionth_of_a_sample_on(us, n, policy):
    "Regression: at exactly a millionth of a sample two comparisons disagreed, and the last epoch ended one sample behind the signal."
    night = Night(Fraction(30), 2, [n], Fraction(us, 10**6), Fraction(30), [1, 2], True)
    recording, hypnogram, _ = align(night.recording, night.hypnogram, policy)
    samples = abs(us) * n / 30 # in millionths
    if samples < .99: assert (hypnogram.stages.tolist(), recording["c0"].n_samples) == ([1, 2], 2 * n)
    if samples > 1.01: assert (hypnogram.stages.tolist(), recording["c0"].n_samples) == ([1] if us > 0 else [2], n)


@given(nights(), st.sampled_from(POLICIES))
@settings(max_examples=40, deadline=None)
def test_the_check_sees_a_shift_by_one_epoch(night, policy):
    "A check that can't fail proves nothing: shift stages or signal by one epoch and it must."
    assume(len(night.epochs(policy)) > 1)
    recording, hypnogram, report = align(night.recording, night.hypnogram, policy)
    step = max(1, round(night.epoch * max(night.rates.values())))
    for by in (1, -1):
        rolled = np.roll(hypnogram.stages, by)
        if (rolled != hypnogram.stages).any() and min(night.rates.values()) * night.epoch >= 2:
            with pytest.raises(AssertionError): check(night, recording, replace(hypnogram, stages=rolled), report)
        wrong = {n: array_channel(n, c.samples() + by * step, c.fs, "") for n, c in recording.channels.items()} # the signal of the epoch after, or before
        if any((night.scored_at(recording[n].samples(), fs) != night.scored_at(wrong[n].samples(), fs)).any() for n, fs in night.rates.items()):
            with pytest.raises(AssertionError): check(night, replace(recording, channels=wrong), hypnogram, report)


@given(nights(), st.sampled_from(POLICIES))
@settings(max_examples=60, deadline=None)
def test_aligning_twice_changes_nothing(night, policy):
    assume(night.epochs(policy))
    once, hypnogram, _ = align(night.recording, night.hypnogram, policy)
    remainder = {n: sample_at(0, c.fs) for n, c in once.channels.items()}
    assert set(remainder.values()) == {0}
    exact = all(abs(len(hypnogram) * hypnogram.epoch_length * c.fs - c.n_samples) < 1e-6 for c in once.channels.values())
    assume(exact) # else a channel ends up to a sample before its last epoch does
    twice, again, report = align(once, hypnogram, policy)
    assert again.stages.tolist() == hypnogram.stages.tolist() and twice.start == once.start
    assert (report.epochs_cut_before, report.epochs_cut_after, report.epochs_added_before, report.epochs_added_after) == (0, 0, 0, 0)


@given(st.floats(0, 7 * 86400, allow_nan=False), st.sampled_from([1., 10, 12.8, 99.5, 100, 128, 200, 250, 256, 500, 512, 1000, 10.54, 1 / 3, 1 / 60]))
@settings(max_examples=300, deadline=None)
def test_sample_at_is_the_first_sample_not_before(t, fs):
    i = sample_at(t, fs)
    assert i >= t * fs - 1e-6
    assert i - 1 < t * fs - 1e-6 + 1e-9


@given(st.integers(0, 10**8), st.sampled_from([1., 10, 12.8, 99.5, 100, 128, 200, 256, 512, 1000, 10.54]))
def test_a_sample_on_the_boundary_is_not_lost(i, fs):
    assert sample_at(i / fs, fs) == i


def recording(seconds=300, **kwargs):
    return Recording("r", {
        "a": array_channel("a", np.arange(seconds * 10), 10, "uV"), "b": array_channel("b", np.arange(seconds), 1, "")}, start=BEGIN, **kwargs)


def test_events_keep_their_clock_time_and_those_outside_are_counted():
    events = pd.DataFrame({"onset": [0., 40, 100, 290, 299], "duration": [10., 20, 0, 30, 0], "name": list("abcde"), "channel": ""})
    out, _, report = align(recording(events=events), Hypnogram([0] * 8, 30, start=BEGIN + timedelta(seconds=45)))
    assert out.events["name"].tolist() == ["b", "c"] and report.events_dropped == 3 # the 8 epochs end at 285 s
    assert [out.start + timedelta(seconds=t) for t in out.events["onset"]] == [BEGIN + timedelta(seconds=s) for s in (40, 100)]


def test_what_was_known_before_stays_known():
    rec = recording(subject="p1", cohort="c", provenance={"format": "EDF"})
    h = Hypnogram([0, 1, 2], 30, start=BEGIN - timedelta(seconds=30), scorer="s", lights_off=15., lights_on=75., probabilities=np.full((3, 5), .2))
    out, aligned, report = align(rec, h)
    assert (out.id, out.subject, out.cohort, out.provenance["format"], out.provenance["alignment"]) == ("r", "p1", "c", "EDF", report.to_dict())
    assert (aligned.scorer, aligned.lights_off, aligned.lights_on, aligned.probabilities.shape) == ("s", -15, 45, (2, 5))
    padded = align(rec, h, "pad_unscored")[1]
    assert len(padded) == 10 and np.isnan(padded.probabilities[2:]).all() and (padded.probabilities[:2] == np.float32(.2)).all()
    assert rec.hypnogram is None and len(rec.channels["a"].samples()) == 3000 # the original is as it was


def test_nothing_is_read():
    def refuse(a, b): raise AssertionError("samples were read")
    rec = recording()
    rec = replace(rec, channels={n: replace(c, read=refuse) for n, c in rec.channels.items()})
    assert len(align(rec, Hypnogram([0] * 20, 30, start=BEGIN))[1]) == 10


@pytest.mark.parametrize(("shift", "says"), [
    (timedelta(days=-365, seconds=120), "the dates differ by 365 days"), (timedelta(hours=9, seconds=-20), "the clocks differ by 9 hours"),
    (timedelta(hours=9, minutes=30), "different nights"), (timedelta(days=1), "the dates differ by 1 day")])
def test_no_overlap_says_what_it_looks_like(shift, says):
    h = Hypnogram([0] * 10, 30, start=BEGIN + shift)
    for policy in POLICIES:
        with pytest.raises(AlignmentError) as e: align(recording(), h, policy)
        for text in (says, str(BEGIN), str(h.start), "->"): assert text in str(e.value)


def test_settings_and_channels():
    h = Hypnogram([0] * 10, 30, start=BEGIN)
    with pytest.raises(ConfigError, match="stretch"): align(recording(), h, "stretch")
    with pytest.raises(AlignmentError, match="no channels"): align(Recording("r", {}), h)
    with pytest.raises(AlignmentError, match="channel 'b': it lasts 200 s"):
        align(replace(recording(), channels=recording().channels | {"b": array_channel("b", np.zeros(200), 1, "")}), h)
    with pytest.raises(AlignmentError, match="no whole epoch"): align(recording(20), h) # shorter than one epoch
    slow = recording(290).channels | {"slow": array_channel("slow", np.zeros(4), 1 / 60, "")} # a fifth sample would stand for 240 to 300 s
    assert len(align(replace(recording(290), channels=slow), h)[1]) == 8


@needs_realdata
def test_five_minutes_of_signal_and_24_hours_of_labels():
    from pftsleep.data.edf import read_edf
    from pftsleep.data.hypnograms import read_hypnogram
    rec = read_edf(REALDATA / "psg_edf/sleepedf_SC4001_5min.edf")
    whole = read_hypnogram(REALDATA / "hypnograms/sleep_edf/SC4001EC-Hypnogram.edf")
    out, h, report = align(rec, whole)
    assert (len(whole), len(h), h.counts()) == (2880, 10, {"W": 10}) # 24 hours
    assert (report.basis, report.offset, report.epochs_kept, report.epochs_cut_before, report.epochs_cut_after) == ("clock", 0, 10, 0, len(whole) - 10)
    assert f"{len(whole) - 10} after" in str(report)
    assert out.start == rec.start == datetime(1989, 4, 24, 16, 13) and out.duration == 300
    for name, ch in out.channels.items(): np.testing.assert_array_equal(ch.samples(), rec[name].samples())
    later = align(rec, replace(whole, start=whole.start + timedelta(seconds=100)))
    assert len(later[1]) == 6 and later[2].signal_cut_before == 100 and later[2].signal_cut_after == 20
