# ---
# jupyter:
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Errors
# > An error is a message to a tired person at night: which file, which channel, what is wrong, what to do.

# %%
#| default_exp errors

# %% [markdown]
# A library of recordings meets broken files every day. Two habits make that bearable. First, everything that goes wrong because of *data* or
# *settings* raises a subclass of one class, `PFTSleepError`, so that a batch job can write down the failure and go on, while a mistake in our own code
# (a `TypeError`, say) still stops everything. Second, an error carries its facts as fields and not only as prose, so that a ledger of ten thousand
# conversions can be grouped by cause.

# %%
#| hide
from nbdev.showdoc import *

# %%
import pickle

from fastcore.test import test_eq

# %%
#| export
from pathlib import Path

# %%
#| export
class PFTSleepError(Exception):
    "What is wrong with a file, a channel or a setting, and the way out."
    def __init__(self,
        problem: str, # what is wrong, as a sentence without the file's name
        path: str | Path | None = None, # the file or folder concerned
        channel: str | None = None, # the channel concerned, as the file names it
        remedy: str | None = None, # what the reader of the message can do
    ):
        super().__init__(problem, path, channel, remedy)
        self.problem, self.path, self.channel, self.remedy = problem, path, channel, remedy

    def __str__(self):
        where = ", ".join(filter(None, [self.path and str(self.path), self.channel and f"channel '{self.channel}'"]))
        return f"{where + ': ' if where else ''}{self.problem}{' -> ' + self.remedy if self.remedy else ''}"

# %% [markdown]
# The string reads from the outside in: the file, the channel in it, the problem, and after the arrow the remedy.

# %%
e = PFTSleepError("every sample is 0 uV", path="night.edf", channel="EEG C4-M1", remedy="leave the channel out, or check the electrode")
print(e)

# %%
test_eq(str(e), "night.edf, channel 'EEG C4-M1': every sample is 0 uV -> leave the channel out, or check the electrode")
test_eq(str(PFTSleepError("nothing to read")), "nothing to read")

# %% [markdown]
# Conversions run in worker processes, and an exception crosses the process border as a pickle. Exceptions with extra fields are known to break there,
# so we check it: all four arguments are passed on to `Exception`, which is what pickle hands back to the constructor.

# %%
back = pickle.loads(pickle.dumps(e))
test_eq((str(back), back.channel, back.remedy), (str(e), e.channel, e.remedy))

# %% [markdown]
# The subclasses say which step of the journey failed. They add nothing but their names, and those are enough for `except` clauses and ledgers.

# %%
#| export
class ReadError(PFTSleepError): "A file is missing, truncated or not what its format says."
class EDFError(ReadError): "An EDF, EDF+ or BDF file breaks its standard in a way that can't be repaired."
class HypnogramError(ReadError): "Stages that can't be read: unknown words or codes, overlaps, no grid."
class AlignmentError(PFTSleepError): "A hypnogram and a recording that don't meet in time."
class ChannelError(PFTSleepError): "A channel is missing, has no usable unit, or exists twice."
class SignalError(PFTSleepError): "Samples that can't be used: flat, not finite, too few."
class StoreError(PFTSleepError): "A store is missing, damaged, or can't be written."
class SplitError(PFTSleepError): "A split leaks subjects or asks for the impossible."
class ConfigError(PFTSleepError): "Settings that contradict each other or the data."
class ModelError(PFTSleepError): "Weights that don't fit their configuration, or a model that doesn't fit its input."

# %%
kinds = [ReadError, EDFError, HypnogramError, AlignmentError, ChannelError, SignalError, StoreError, SplitError, ConfigError, ModelError]
assert all(issubclass(k, PFTSleepError) for k in kinds)
assert all(type(pickle.loads(pickle.dumps(k("x", path="p")))) is k for k in kinds)
assert issubclass(EDFError, ReadError) and not issubclass(AlignmentError, ReadError)

# %%
#| hide
import nbdev; nbdev.nbdev_export()
