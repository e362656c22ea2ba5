# ---
# jupyter:
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Recordings
# > The words that everything else is said in: stages, channels, hypnograms, recordings.

# %%
#| default_exp data.recording

# %% [markdown]
# A sleep laboratory writes one file with twenty signals at five sampling rates; an actigraph writes a number a minute for a week; a collar on a cow writes
# three axes for a few seconds. All of them are a **recording**: channels, each at its *own* rate, on one clock, perhaps with a **hypnogram**, the row of
# sleep stages that somebody scored. This notebook defines these words and nothing more. It reads no file and knows no study.

# %%
#| hide
from nbdev.showdoc import *

# %%
import pickle
import numpy as np
from fastcore.test import test_eq, test_fail

# %%
#| export
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import IntEnum, StrEnum

import numpy as np
import pandas as pd

from pftsleep.errors import ChannelError, HypnogramError, SignalError

# %% [markdown]
# ## Stages
#
# The AASM manual names five stages. Older scorings (Rechtschaffen and Kales) split deep sleep in two and count movement time as a class of its own; files use
# 4 or 5 or 'R' for REM. Inside this library there is one numbering, and each reader owes an explicit map to it. `UNSCORED` is -1 everywhere, and every metric
# and loss ignores it.

# %%
#| export
class Stage(IntEnum):
    "Sleep stages of the AASM manual (2.6, chapter IV); -1 marks an epoch without a usable score."
    W, N1, N2, N3, REM = range(5)
    UNSCORED = -1

SCORED_STAGES = tuple(s for s in Stage if s >= 0) # the five classes, in the order of every confusion matrix

# %%
test_eq([int(s) for s in SCORED_STAGES], [0, 1, 2, 3, 4])
test_eq(Stage(-1).name, "UNSCORED")
test_eq(np.array([Stage.W, Stage.REM], "int8").tolist(), [0, 4])
test_fail(lambda: Stage(5)) # five classes, no sixth: an unknown code is an error and never a class

# %% [markdown]
# ## Hypnograms
#
# A hypnogram is an array of stages, and three facts without which the array is worthless: how long an epoch is, when the first one starts, and who scored it.
# The start is a clock time where the file has one. Many formats have none and count from the start of the recording; then `start` is None and `onset` holds the
# seconds after the recording's start. The difference matters, since an `onset` is somebody's promise and a clock time can be checked.

# %%
#| export
@dataclass(frozen=True, eq=False)
class Hypnogram:
    "Sleep stages on a regular grid of epochs."
    stages: np.ndarray # [E] int8, values of `Stage`
    epoch_length: float # s
    start: datetime | None = None # clock time of the first epoch, naive local time; None where the file has none
    onset: float = 0. # s from the recording's start to the first epoch; only used when `start` is None
    scorer: str | None = None # who scored it, as the file says
    lights_off: float | None = None # s from the start of the first epoch
    lights_on: float | None = None # s from the start of the first epoch
    probabilities: np.ndarray | None = None # [E, 5] float32, where a model did the scoring

    def __post_init__(self):
        object.__setattr__(self, "stages", _checked_stages(self.stages))
        if not (self.epoch_length > 0 and math.isfinite(self.epoch_length)): raise HypnogramError(f"an epoch of {self.epoch_length} s", remedy="give its length in seconds")
        if not math.isfinite(self.onset): raise HypnogramError(f"an onset of {self.onset} s", remedy="give the seconds after the recording's start")
        if self.probabilities is not None and np.shape(self.probabilities) != (len(self), 5):
            raise HypnogramError(f"probabilities have shape {np.shape(self.probabilities)}, not ({len(self)}, 5)", remedy="give five per epoch")

    def __len__(self): return len(self.stages)
    def __repr__(self):
        when = f"start={self.start}" if self.start else f"onset={self.onset:g} s"
        return f"Hypnogram({len(self)} epochs of {self.epoch_length:g} s, {when}, {self.counts()})"
    @property
    def duration(self) -> float: return len(self) * self.epoch_length # s
    def counts(self) -> dict[str, int]:
        "Number of epochs of each stage that occurs."
        return {s.name: n for s in Stage if (n := int((self.stages == s).sum()))}

# %%
#| exporti
def _checked_stages(stages) -> np.ndarray: # [E] int8
    "`stages` as int8, or an error that names the codes that are none of ours."
    stages = np.asarray(stages)
    if stages.ndim != 1: raise HypnogramError(f"stages have shape {stages.shape}", remedy="pass one stage per epoch")
    if unknown := sorted(set(stages.tolist()) - {int(s) for s in Stage}):
        raise HypnogramError(f"stage codes {unknown[:9]} are unknown", remedy="map the source's codes to `Stage` first")
    return stages.astype("int8")

# %% [markdown]
# Wrong stages can't even be constructed, so no later step has to check them again. The printed form begins with what one should look at first in any new
# file: how many epochs of each stage there are. A night without REM, or with 400 minutes of N1, was probably read with the wrong map.

# %%
h = Hypnogram([0, 0, 1, 2, 2, 3, 2, 4, -1], epoch_length=30, start=datetime(2024, 3, 1, 22, 30))
h

# %%
test_eq(h.stages.dtype, np.int8)
test_eq(h.duration, 270)
test_eq(h.counts(), {"W": 2, "N1": 1, "N2": 3, "N3": 1, "REM": 1, "UNSCORED": 1})
test_fail(lambda: Hypnogram([0, 5], 30), contains="[5] are unknown")
test_fail(lambda: Hypnogram([0, np.nan], 30), contains="unknown")
test_fail(lambda: Hypnogram([[0, 1]], 30), contains="shape")
test_fail(lambda: Hypnogram([0], 0), contains="epoch of 0")
test_fail(lambda: Hypnogram([0], 30, onset=float("nan")), contains="onset")
test_fail(lambda: Hypnogram([0, 1], 30, probabilities=np.ones((3, 5))), contains="(2, 5)")

# %% [markdown]
# Cutting a hypnogram is where labels go wrong: the start must move along with the stages, whichever form it has, and so must the lights and the
# probabilities. It is therefore done in one place. `crop_hypnogram` counts in epochs, so it can't cut one in half.

# %%
#| export
def crop_hypnogram(
    h: Hypnogram,
    first: int, # first epoch to keep
    stop: int, # one past the last epoch to keep
) -> Hypnogram: # with start, onset and lights moved by `first` epochs
    "Epochs `first` to `stop` (exclusive)."
    if not 0 <= first <= stop <= len(h): raise HypnogramError(f"can't cut epochs {first} to {stop} out of {len(h)}")
    shift = first * h.epoch_length
    move = lambda t: None if t is None else t - shift
    return replace(h, stages=h.stages[first:stop], start=h.start and h.start + timedelta(seconds=shift), onset=h.onset + shift,
        lights_off=move(h.lights_off), lights_on=move(h.lights_on), probabilities=None if h.probabilities is None else h.probabilities[first:stop])

# %%
c = crop_hypnogram(replace(h, lights_off=60.), 2, 5)
test_eq(c.stages.tolist(), [1, 2, 2])
test_eq(c.start, datetime(2024, 3, 1, 22, 31)) # two epochs later than before
test_eq(c.lights_off, 0)
test_eq(crop_hypnogram(Hypnogram([0, 1, 2], 20, onset=5), 1, 3).onset, 25)
test_fail(lambda: crop_hypnogram(h, 0, 10), contains="out of 9")

# %% [markdown]
# ## Channels
#
# A channel knows its kind, its unit and its own sampling rate. Its samples stay in the file until somebody asks for them, and one may ask for a part: staging
# a night in windows must not load the night. The function that fetches them, `read(start, stop)`, is supplied by whoever made the channel.
#
# Units are a short closed list, written in ASCII (`uV`, not `µV`) because half of the files in the world are read with the wrong character set.
# Bringing a file's unit to this list is the reader's task.

# %%
#| export
class Kind(StrEnum):
    "What a channel measures."
    EEG, EOG, EMG, ECG, RESP, SPO2, HR, TEMP, POSITION, SNORE, CPAP, LIGHT, ACC, ACTIVITY, EVENT, OTHER = (
        "EEG", "EOG", "EMG", "ECG", "RESP", "SPO2", "HR", "TEMP", "POSITION", "SNORE", "CPAP", "LIGHT", "ACC", "ACTIVITY", "EVENT", "OTHER")

# %%
#| export
@dataclass(frozen=True, eq=False)
class Channel:
    "One signal at its own rate; samples are fetched on request."
    name: str # canonical name where one is known, else the source's label
    kind: Kind # what it measures
    fs: float # Hz; need not be an integer
    unit: str # 'uV', 'mV', '%', 'bpm', ... in ASCII; '' where the source states none
    n_samples: int # length of the whole channel
    read: Callable[[int, int], np.ndarray] # (start, stop) -> samples, in `unit`
    reference: str | None = None # the electrode subtracted, where known
    source_label: str = "" # the label in the file, unchanged
    resolution: float | None = None # smallest step of the source, in `unit`; None where unknown

    def __post_init__(self):
        if not (self.fs > 0 and math.isfinite(self.fs)): raise ChannelError(f"a sampling rate of {self.fs} Hz", channel=self.name)

    @property
    def duration(self) -> float: return self.n_samples / self.fs # s
    def __repr__(self): return f"Channel({self.name}, {self.kind}, {self.fs:g} Hz, {self.duration:g} s, {self.unit or 'no unit'})"
    def samples(self, start: int = 0, stop: int | None = None) -> np.ndarray: # [T] float32, in `unit`
        "Samples `start` to `stop` (exclusive); NaN where the source has a gap."
        stop = self.n_samples if stop is None else stop
        if not 0 <= start <= stop <= self.n_samples: raise SignalError(f"samples {start} to {stop} of {self.n_samples} don't exist", channel=self.name)
        out = np.ascontiguousarray(self.read(start, stop), "float32")
        if out.shape != (stop - start,): raise SignalError(f"asked for {stop - start} samples, got {out.shape}", channel=self.name, remedy="the file may have been cut while it was open")
        return out

# %% [markdown]
# The most usual source besides a file is an array that is there already.

# %%
#| export
def array_channel(
    name: str, # canonical name
    values: np.ndarray, # [T] in `unit`
    fs: float, # Hz
    unit: str, # see `Channel`
    kind: Kind | str = Kind.OTHER, # what it measures
    **kwargs, # further fields of `Channel`
) -> Channel:
    "A channel whose samples are in memory."
    values = np.asarray(values, "float32")
    if values.ndim != 1: raise ChannelError(f"samples have shape {values.shape}, not [T]", channel=name)
    return Channel(name, Kind(kind), float(fs), unit, len(values), _Slice(values), source_label=kwargs.pop("source_label", name), **kwargs)

# %%
#| exporti
@dataclass(frozen=True, eq=False)
class _Slice:
    "Reads a part of an array; a class, since a closure can't be sent to a worker process."
    values: np.ndarray
    def __call__(self, start: int, stop: int) -> np.ndarray: return self.values[start:stop]

# %%
eeg = array_channel("C4-M1", np.arange(1000), fs=100, unit="uV", kind="EEG", reference="M1")
print(eeg)
test_eq(eeg.duration, 10)
test_eq(eeg.samples(5, 8).tolist(), [5, 6, 7])
test_eq(eeg.samples().dtype, np.float32)
test_eq(pickle.loads(pickle.dumps(eeg)).samples().sum(), eeg.samples().sum())
test_fail(lambda: eeg.samples(0, 1001), contains="don't exist")
test_fail(lambda: array_channel("x", np.zeros((2, 3)), 1, ""), contains="shape")
test_fail(lambda: array_channel("x", np.zeros(3), 0, ""), contains="0.0 Hz")

# %% [markdown]
# `crop_channel` keeps samples and stays lazy: it remembers where to begin and reads nothing.

# %%
#| export
def crop_channel(
    ch: Channel,
    first: int, # first sample to keep
    stop: int, # one past the last sample to keep
) -> Channel: # reads from `ch` on request
    "Samples `first` to `stop` (exclusive) as a channel of its own."
    if not 0 <= first <= stop <= ch.n_samples: raise SignalError(f"can't cut samples {first} to {stop} out of {ch.n_samples}", channel=ch.name)
    return replace(ch, n_samples=stop - first, read=_Shifted(ch.read, first))

# %%
#| exporti
@dataclass(frozen=True, eq=False)
class _Shifted:
    read: Callable[[int, int], np.ndarray]
    by: int
    def __call__(self, start: int, stop: int) -> np.ndarray: return self.read(start + self.by, stop + self.by)

# %%
part = crop_channel(crop_channel(eeg, 100, 900), 10, 20)
test_eq(part.samples().tolist(), list(range(110, 120)))
test_eq(part.duration, .1)
test_fail(lambda: crop_channel(eeg, 0, 1001), contains="out of 1000")

# %% [markdown]
# ## Recordings
#
# A recording holds channels under their names, in the order of the file. `issues` lists what the reader had to repair or leave out, so that nothing is dropped
# in silence; `events` is a table of everything else that was annotated. Nothing in it identifies a person: `subject` is the study's own key, used to keep
# all nights of one person on one side of a split.

# %%
#| export
@dataclass(frozen=True)
class ReadIssue:
    "Something a reader noticed and dealt with."
    action: str # 'repaired', 'skipped', 'dropped' or 'noted'
    problem: str # what was found and what was done
    channel: str | None = None # the channel's label in the file
    def __str__(self): return f"{self.action}: {f'{self.channel}: ' if self.channel else ''}{self.problem}"

EVENT_COLUMNS = ["onset", "duration", "name", "channel"] # s after the recording's start, s, the source's word, the source's label or ''

# %%
#| export
@dataclass(frozen=True, eq=False)
class Recording:
    "A night, a week or a bout: channels on one clock."
    id: str # unique within its cohort
    channels: Mapping[str, Channel] # by name, in the order of the source
    start: datetime | None = None # naive local time of the first sample
    subject: str | None = None # the study's key of the person or animal; `id` where None
    cohort: str | None = None # the study
    hypnogram: Hypnogram | None = None # stages, once aligned
    events: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=EVENT_COLUMNS)) # everything else that was annotated
    issues: tuple[ReadIssue, ...] = () # what the reader repaired, skipped or dropped
    provenance: Mapping[str, object] = field(default_factory=dict) # format, source hash, alignment, recipe

    @property
    def duration(self) -> float: return max((c.duration for c in self.channels.values()), default=0.) # s
    def __repr__(self):
        return f"Recording({self.id}, {self.duration:g} s from {self.start or 'an unknown time'}, {len(self.channels)} channels: {', '.join(self.channels)})"
    def __getitem__(self, name: str) -> Channel:
        if name not in self.channels: raise ChannelError(f"no channel '{name}'", path=self.id, remedy=f"this recording has {', '.join(self.channels) or 'none'}")
        return self.channels[name]

# %%
resp = array_channel("Thorax", np.sin(np.arange(100)), fs=10, unit="", kind="RESP")
rec = Recording("night-1", {c.name: c for c in [eeg, resp]}, start=datetime(2024, 3, 1, 22, 30), subject="p1", issues=(ReadIssue("dropped", "2 records of 10", "Snore"),))
rec

# %%
test_eq(rec.duration, 10)
test_eq(rec["C4-M1"].fs, 100)
test_eq(str(rec.issues[0]), "dropped: Snore: 2 records of 10")
test_eq(Recording("empty", {}).duration, 0)
test_fail(lambda: rec["C3-M2"], contains="this recording has C4-M1, Thorax")

# %% [markdown]
# Two channels of a file may carry the same label. Both are kept: the second is called `label #2`. `named_channels` builds the mapping of a recording with
# that rule, so that every reader applies the same one.

# %%
#| export
def named_channels(channels) -> dict[str, Channel]:
    "Channels by name; a repeated name gets ` #2`, ` #3`, ..."
    out: dict[str, Channel] = {}
    for ch in channels:
        name, n = ch.name, 1
        while name in out: name, n = f"{ch.name} #{n + 1}", n + 1
        out[name] = replace(ch, name=name)
    return out

# %%
twins = named_channels([eeg, eeg, resp, eeg])
test_eq(list(twins), ["C4-M1", "C4-M1 #2", "Thorax", "C4-M1 #3"])
test_eq(twins["C4-M1 #2"].name, "C4-M1 #2")
test_eq(twins["C4-M1 #2"].source_label, "C4-M1")

# %%
#| hide
import nbdev; nbdev.nbdev_export()
