"""Every reader behind one door: `GROUPS[group][name](data, folder)` reads `data`, whatever it is. Run as a script it feeds them what atheris makes up."""
import argparse
import random
import re
import resource
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

SEPARATOR = b"\n----\n" # between two files that belong together
MAX_SAMPLES = 10**6 # read at a time
Reader = Callable[[bytes, Path], object]


def load() -> tuple[type[Exception], Mapping[str, Mapping[str, Reader]]]: # what may come out; readers
    "Imports the package, so that whoever calls this may have it instrumented."
    from pftsleep.data.cohorts import find_nights
    from pftsleep.data.edf import read_edf
    from pftsleep.data.hypnograms import FORMATS, read_annotations
    from pftsleep.data.mesa_actigraphy import actigraphy_overlap, read_mesa_actigraphy
    from pftsleep.data.nsrr import CFS
    from pftsleep.data.privacy import deidentify
    from pftsleep.data.recording import Hypnogram, Recording, array_channel
    from pftsleep.data.signals import Recipe
    from pftsleep.data.splits import Split
    from pftsleep.data.store import create_store, find_damage, open_store
    from pftsleep.data.wfdb_dreem import read_dreem_h5, read_wfdb
    from pftsleep.errors import PFTSleepError

    def kept(path: Path, data: bytes) -> Path: path.parent.mkdir(parents=True, exist_ok=True); path.write_bytes(data); return path

    def samples(recording) -> None:
        "Some at the begin, in the middle and at the end of each channel."
        for c in recording.channels.values():
            for a in sorted({0, c.n_samples // 2, max(0, c.n_samples - 10)}):
                b = min(c.n_samples, a + (MAX_SAMPLES if a == 0 else 10))
                assert c.samples(a, b).shape == (b - a,)
        assert np.isfinite(recording.duration) and recording.events.shape[1] >= 4
        repr(recording)

    def scoring(format: str | None) -> Reader:
        def read(data: bytes, folder: Path):
            kept(folder / "x.hea", b"x 1 200 1000000\n") # beside the annotations of WFDB
            s = read_annotations(kept(folder / "x", data), format)
            assert np.isfinite(s.events["onset"]).all() and s.events["onset"].is_monotonic_increasing and not (s.events["duration"] < 0).any()
            assert s.hypnogram is None or set(s.hypnogram.counts()) <= {"W", "N1", "N2", "N3", "REM", "UNSCORED"}
        return read

    def record(data: bytes, folder: Path):
        head, _, body = data.partition(SEPARATOR)
        for name in ("rec.dat", "rec.mat"): kept(folder / name, body or bytes(range(256)) * 4)
        samples(read_wfdb(kept(folder / "rec.hea", head)))

    def whole_store(path: Path) -> Path:
        "A store of one short recording, made once."
        if not path.exists():
            store = create_store(path, Recipe.default())
            store.add(Recording("a", {"C3": array_channel("C3", np.arange(600), 10, "uV", "EEG", resolution=1.)}, hypnogram=Hypnogram(np.array([0, 2]), 30.)))
            store.sync()
        return path

    def stored(where: str) -> Reader:
        "A store with one damaged file."
        def read(data: bytes, folder: Path):
            shutil.rmtree(folder / "store", ignore_errors=True)
            shutil.copytree(whole_store(folder / "whole"), folder / "store")
            kept(folder / "store" / where, data)
            store = open_store(folder / "store")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore") # recordings that are left out of the manifest are warned about
                find_damage(store.recordings / "a.zarr"); store.manifest["id"].tolist(); samples(store["a"]); repr(store)
        return read

    def family(data: bytes, folder: Path):
        kept(folder / "cfs" / "cfs-visit5-800001.edf", b"")
        kept(folder / "cfs" / "cfs-visit5-dataset-0.7.0.csv", data)
        assert len(find_nights(CFS, folder / "cfs")) == 1

    def without_identity(ending: str) -> Reader:
        def read(data: bytes, folder: Path):
            with suppress(FileNotFoundError): (folder / f"new{ending}").unlink()
            try: deidentify(kept(folder / f"old{ending}", data), folder / f"new{ending}")
            except PFTSleepError: assert not (folder / f"new{ending}").exists(); raise
        return read

    return PFTSleepError, {
        "edf": {"signals": lambda data, folder: samples(read_edf(kept(folder / "x.edf", data))), "scoring": scoring("edf"), "deidentify": without_identity(".edf")},
        "scoring": {name or "detected": scoring(name) for name in (None, *FORMATS) if name not in ("edf", "cinc2018_mat")},
        "records": {"wfdb": record},
        "hdf5": {"dreem_h5": lambda data, folder: samples(read_dreem_h5(kept(folder / "x.h5", data))), "cinc2018_mat": scoring("cinc2018_mat")},
        "tables": {"week": lambda data, folder: samples(read_mesa_actigraphy(kept(folder / "mesa-sleep-0001.csv", data))), "overlap": lambda data, folder: actigraphy_overlap(kept(folder / "overlap.csv", data)),
            "families": family, "split": lambda data, folder: Split.load(kept(folder / "split.json", data)), **{f"deidentify {e}": without_identity(e) for e in (".xml", ".csv", ".json")}},
        "store": {where: stored(where) for where in ("store.json", "manifest.parquet", "recordings/a.zarr/zarr.json", "recordings/a.zarr/00_C3/zarr.json")}}


def main() -> None:
    "Feeds one group: the first byte of an input names the reader, the rest is the file. Whatever comes out that isn't a `PFTSleepError` ends the process with its traceback."
    p = argparse.ArgumentParser()
    p.add_argument("group"); p.add_argument("words", type=Path); p.add_argument("seeds", type=Path); p.add_argument("folder", type=Path)
    p.add_argument("--runs", type=int, required=True); p.add_argument("--seed", type=int, default=1); p.add_argument("--memory", type=int, default=2**30, help="bytes more than the imports take")
    a = p.parse_args()
    import atheris
    with atheris.instrument_imports(include=["pftsleep.data"]): ours, groups = load()
    names = list(groups[a.group])
    (a.folder / "corpus").mkdir(parents=True, exist_ok=True)

    def one(data: bytes) -> None:
        if not data: return
        with suppress(ours): groups[a.group][names[data[0] % len(names)]](data[1:], a.folder)

    def mutated(data: bytes, most: int, seed: int) -> bytes:
        "The same reader with another file: a few bytes, as libFuzzer likes, or a few words."
        rng = random.Random(seed)
        if rng.random() < .5: return data[:1] + bytes(atheris.Mutate(data[1:], most - 1))
        parts = re.split(rb"([^\w.+-]+)", data[1:])
        for _ in range(rng.choice((1, 1, 2, 3))): parts[rng.randrange(len(parts))] = rng.choice(words + parts)
        return (data[:1] + b"".join(parts))[:most]
    words = [bytes.fromhex(w) for w in a.words.read_text().split()]
    warnings.filterwarnings("error", category=RuntimeWarning, module=r"pftsleep\.") # an overflow is a wrong value
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + a.memory, pages + a.memory))
    atheris.Setup([sys.argv[0], f"-runs={a.runs}", f"-seed={a.seed}", "-timeout=60", "-rss_limit_mb=0", "-max_len=20000", "-len_control=0", "-mutate_depth=2", "-verbosity=0", f"-artifact_prefix={a.folder}/",
        str(a.folder / "corpus"), str(a.seeds)], one, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__": main()
