"""The first real night, from its files to the store: are the stages where the brain was?"""
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.signal import welch
from scipy.stats import rankdata

from pftsleep.data.cohorts import Cohort
from pftsleep.data.convert import convert
from pftsleep.data.edf import write_edf
from pftsleep.data.recording import Recording, Stage, array_channel
from pftsleep.data.signals import Recipe, zero_phase
from pftsleep.data.store import open_store

REALDATA = Path(__file__).parents[2] / "shared" / "realdata"
pytestmark = pytest.mark.skipif(not REALDATA.exists(), reason="../shared/realdata is not here")
FIRST = 10.01 # s: the changes stand at 40.01, 70.01, ..., and one more whole epoch fits before them


@pytest.fixture(scope="module")
def raw(): return pd.read_csv(REALDATA / "eeg_segments" / "pydynamo_segment_data.csv", header=None)[0].to_numpy("float64")


@pytest.fixture(scope="module")
def night(raw, tmp_path_factory):
    "The extract as the store keeps it."
    folder = tmp_path_factory.mktemp("extract")
    (folder / "files").mkdir()
    write_edf(Recording("extract", {"EEG": array_channel("EEG", raw.astype("float32"), fs=100, unit="uV", kind="EEG")}), folder / "files" / "extract.edf")
    (folder / "files" / "extract.csv").write_bytes((REALDATA / "eeg_segments" / "pydynamo_segment_stages.csv").read_bytes())
    cohort = Cohort("extract", annotations=("{stem}.csv",), hypnogram_format="csv_pydynamo", verified="read on a real file")
    with ThreadPoolExecutor(1) as pool: ledger = convert(cohort, folder / "files", folder / "store", Recipe.default(channels=("EEG",)), pool)
    assert len(ledger.of("done")) == 1, str(ledger)
    return open_store(folder / "store")["extract"]


def stage_at(t: float) -> int:
    "The stage at a time, looked up in the table of changes."
    changes = pd.read_csv(REALDATA / "eeg_segments" / "pydynamo_segment_stages.csv").to_numpy()
    return {1: Stage.N3, 2: Stage.N2, 3: Stage.N1, 4: Stage.REM, 5: Stage.W}[int(changes[np.searchsorted(changes[:, 0], t, side="right") - 1, 1])]


def test_counts_and_stages(night):
    h = night.hypnogram
    assert h.counts() == {"W": 2, "N1": 7, "N2": 95, "N3": 37, "REM": 26}
    assert h.stages.tolist() == [stage_at(FIRST + 30 * k + 15) for k in range(167)]
    report = night.provenance["alignment"]
    assert report["basis"] == "assumed" and report["signal_cut_before"] == pytest.approx(FIRST, abs=1e-6) and report["epochs_kept"] == 167


def test_every_epoch_has_its_own_signal(raw, night):
    "Epoch k of the store is the filtered raw signal from 10.01 + 30 k seconds on, apart from the filter's ends."
    stored, filtered = night["EEG"].samples(), zero_phase(raw, 100, (.3, 35.))
    assert len(stored) == 167 * 3000
    step = (raw.max() - raw.min()) / 65535 # of the EDF file
    away = [np.abs(stored[k * 3000:(k + 1) * 3000] - filtered[round((FIRST + 30 * k) * 100):][:3000]).max() for k in range(167)]
    assert max(away[2:-2]) < 3 * step, max(away[2:-2])
    beside = [np.abs(stored[k * 3000:(k + 1) * 3000] - filtered[round((FIRST + 30 * k) * 100) + 1:][:3000]).max() for k in range(2, 165)]
    assert min(beside) > 50 * step # one sample off would be seen in each epoch


def log_power(night, low: float, high: float) -> np.ndarray: # [epochs] log10 uV^2
    "Median over the windows of an epoch, since movements swamp the mean of some."
    f, p = welch(night["EEG"].samples().reshape(-1, 3000), 100, nperseg=400, average="median")
    return np.log10(p[:, (f >= low) & (f <= high)].sum(1))


def auc(values: np.ndarray, stages: np.ndarray, higher: Stage, lower: Stage) -> float:
    "How often an epoch of one stage has the larger value (Mann-Whitney)."
    a, b = values[stages == higher], values[stages == lower]
    return (rankdata(np.r_[a, b])[:len(a)].sum() - len(a) * (len(a) + 1) / 2) / (len(a) * len(b))


def test_the_brain_agrees_with_the_labels(night):
    "Slow waves deepen from REM over N2 to N3; spindles belong to N2 (AASM manual)."
    stages, delta, sigma = night.hypnogram.stages, log_power(night, .5, 4), log_power(night, 12, 15)
    median = lambda x, s: np.median(x[stages == s])
    assert median(delta, Stage.N3) > median(delta, Stage.N2) > median(delta, Stage.REM)
    assert median(sigma, Stage.N2) > median(sigma, Stage.REM)


@pytest.mark.parametrize("shift", [-2, -1, 1, 2])
def test_shifted_labels_fit_less(night, shift):
    "One epoch off, and N3 and N2 differ less in slow waves."
    stages, delta = night.hypnogram.stages, log_power(night, .5, 4)
    shifted = np.full_like(stages, Stage.UNSCORED)
    shifted[max(0, shift):len(stages) + min(0, shift)] = stages[max(0, -shift):len(stages) - max(0, shift)]
    assert auc(delta, stages, Stage.N3, Stage.N2) > .97
    assert auc(delta, shifted, Stage.N3, Stage.N2) < auc(delta, stages, Stage.N3, Stage.N2) - .005


def test_five_minutes_of_signal_and_24_hours_of_labels_through_convert(tmp_path):
    (tmp_path / "files").mkdir()
    for name, path in {"SC4001E0-PSG.edf": "psg_edf/sleepedf_SC4001_5min.edf", "SC4001EC-Hypnogram.edf": "hypnograms/sleep_edf/SC4001EC-Hypnogram.edf"}.items():
        (tmp_path / "files" / name).write_bytes((REALDATA / path).read_bytes())
    cohort = Cohort("sleep_edf", signals="*-psg.edf", annotations=("SC4001EC-Hypnogram.edf",), subject=r"(?P<subject>SC\d{3}).*")
    with ThreadPoolExecutor(1) as pool: ledger = convert(cohort, tmp_path / "files", tmp_path / "store", Recipe.default(channels=("EEG", "EEG", "EOG")), pool)
    assert len(ledger.of("done")) == 1, str(ledger)
    store = open_store(tmp_path / "store")
    night = store["SC4001E0-PSG"]
    assert night.hypnogram.stages.tolist() == [Stage.W] * 10 and night.subject == "SC400" and night.duration == 300
    report = night.provenance["alignment"]
    assert (report["basis"], report["epochs_kept"], report["epochs_cut_before"], report["epochs_cut_after"]) == ("clock", 10, 0, 2870)
    assert store.manifest.loc[0, ["epochs", "n_w", "n_n1", "n_unscored"]].tolist() == [10, 10, 0, 0]
    assert all(len(c.samples()) == 30_000 for c in night.channels.values()) and len(night.channels) == 3
