"""Stores under bad conditions: damage, full disks, two writers, old formats, other places. The notebooks show them working."""
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pftsleep.data.archives as archives
import pftsleep.data.store as stores
from pftsleep.data.alignment import align
from pftsleep.data.archives import OriginalStore, is_archive, merge, original_codes, original_hypnogram, prepare, read_original, verify
from pftsleep.data.edf import read_edf, write_edf
from pftsleep.data.recording import Hypnogram, Kind, ReadIssue, Recording, Stage, array_channel
from pftsleep.data.signals import Recipe, apply_recipe
from pftsleep.data.store import COLUMNS, Store, clear_leftovers, create_store, find_damage, locate, open_store, quantise, read_recording, recording_facts, restore, write_recording
from pftsleep.errors import ConfigError, HypnogramError, PFTSleepError, StoreError

SHARED = Path(__file__).parents[2] / "shared"
START = datetime(2024, 3, 1, 22, 30)
NATIVE = Recipe.native()


def night(id: str = "a-1", seed: int = 0, seconds: int = 120, **more) -> Recording:
    rng = np.random.default_rng(seed)
    on_steps = lambda n, step: np.round(20 * rng.standard_normal(n) / step) * step
    channels = [array_channel("C4-M1", on_steps(200 * seconds, .1), 200, "uV", "EEG", resolution=.1, reference="M1"),
        array_channel("Thorax", rng.standard_normal(32 * seconds), 32, "", "RESP"), array_channel("SpO2", rng.integers(90, 99, seconds), 1, "%", "SPO2", resolution=1.)]
    return Recording(id, {c.name: c for c in channels}, START, subject=id.split("-")[0], cohort="demo", hypnogram=Hypnogram(rng.integers(0, 5, seconds // 30), 30, START), **more)


def filled(path, *ids: str, recipe: Recipe = NATIVE) -> Store:
    store = create_store(path, recipe)
    for i in ids: store.add(night(i, seed=hash_of(i)), [dict(name=f"{i}.edf", bytes=1, sha256=i)])
    store.sync()
    return store


def hash_of(id: str) -> int: return sum(map(ord, id))
def files(folder: Path) -> list[Path]: return sorted(p for p in folder.rglob("*") if p.is_file())
def hidden(store: Store) -> list[Path]: return list(store.recordings.glob(".*"))


@pytest.fixture
def store(tmp_path): return filled(tmp_path / "store", "a-1", "a-2", "b-1")


@pytest.fixture
def bucket():
    fs = fsspec.filesystem("memory")
    yield "memory://cohort/store"
    fs.rm("/cohort", recursive=True) if fs.exists("/cohort") else None


# --- samples

finite = st.floats(-1e6, 1e6, width=32)

@given(st.lists(finite | st.just(np.nan), min_size=1, max_size=300), st.sampled_from([None, 1e-3, .1, 1., 1e3]))
@example([0., -0.], .1)
@example([np.nan], 1.)
def test_what_comes_back_is_no_further_off_than_half_a_step(values, resolution):
    x = np.array(values, "float32")
    codes, scale, offset = quantise(x, resolution)
    back = restore(codes, scale, offset)
    assert back.dtype == np.float32 and (np.isnan(back) == np.isnan(x)).all()
    if codes.dtype != np.int16: return np.testing.assert_array_equal(back, x)
    known = ~np.isnan(x)
    assert scale <= resolution * (1 + 1e-6) or not known.any() or x[known].min() == x[known].max()
    assert (np.abs(back[known].astype("float64") - x[known]) <= scale * .501 + np.spacing(np.abs(x[known]))).all()


@given(st.lists(st.integers(-32767, 32767), min_size=1, max_size=400), st.floats(1e-6, 1e4), st.floats(-3, 3))
@example([-32767, 32767], .0122, .5)
def test_samples_on_the_recorders_steps_come_back_unchanged(digital, gain, shift):
    "As a reader of EDF computes them: digital * gain + offset in float64, then float32."
    x = (np.array(digital) * gain + shift * gain).astype("float32")
    codes, scale, offset = quantise(x, gain)
    assert codes.dtype == np.int16
    np.testing.assert_array_equal(restore(codes, scale, offset), x)


@given(st.integers(0, 3 * stores.BLOCK), st.floats(1e-6, 1e3), st.floats(-1e4, 1e4), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_restoring_in_blocks_is_exact_arithmetic_rounded_once(n, scale, offset, seed):
    codes = np.random.default_rng(seed).integers(-32768, 32768, n).astype("int16")
    want = np.where(codes == stores.MISSING, np.nan, codes.astype("float64") * scale + offset).astype("float32")
    np.testing.assert_array_equal(restore(codes, scale, offset), want)


def test_infinite_samples_are_not_taken_for_gaps():
    x = np.array([1, np.inf, 2], "float32")
    np.testing.assert_array_equal(restore(*quantise(x, 1.)), x)


# --- one recording

def test_all_that_a_recording_holds_comes_back(tmp_path):
    stages = np.array([0, 1, 2, -1])
    h = Hypnogram(stages, 30, START, scorer="A", lights_off=12.5, probabilities=np.random.default_rng(0).random((4, 5)))
    gaps = np.arange(12000, dtype="float32"); gaps[100:200] = np.nan
    rec = replace(night(), hypnogram=h, issues=(ReadIssue("noted", "x" * 300),), provenance=dict(policy="crop", alignment=dict(offset=np.float64(3))))
    rec = replace(rec, channels={**rec.channels, "gap": array_channel("gap", gaps, 100, "", "OTHER", resolution=1.), "none": array_channel("none", np.full(1200, np.nan), 10, "", "OTHER", resolution=1.)})
    if "group" in Recording.__dataclass_fields__: rec = replace(rec, group="family 7")
    store = create_store(tmp_path / "s", NATIVE)
    row = store.add(rec, [dict(name="a.edf", bytes=1, sha256="ab")])
    back = store["a-1"]
    for name, ch in rec.channels.items():
        np.testing.assert_array_equal(back[name].samples(), ch.samples())
        assert (back[name].unit, back[name].fs, back[name].reference, back[name].resolution, back[name].kind) == (ch.unit, ch.fs, ch.reference, ch.resolution, ch.kind)
    np.testing.assert_array_equal(back.hypnogram.stages, stages)
    np.testing.assert_allclose(back.hypnogram.probabilities, h.probabilities, atol=1e-6)
    assert (back.hypnogram.lights_off, back.hypnogram.scorer, back.start, back.subject) == (12.5, "A", START, "a")
    assert row["group"] == (getattr(rec, "group", None) or "a") and getattr(back, "group", None) == getattr(rec, "group", None)
    assert row["issues"] == 1 and len(row["issue_text"]) == 200 and row["bytes"] > 0 and len(row["checksum"]) == 64 and list(row) == COLUMNS
    assert back.provenance["alignment"] == dict(offset=3.) and back.provenance["policy"] == "crop"
    assert find_damage(store.recordings / "a-1.zarr") == [] and not len(verify(Store(store.path)).query("problem == 'damaged'"))


def test_a_row_without_group_falls_back_to_the_subject(store):
    assert store.manifest["group"].tolist() == ["a", "a", "b"]
    assert create_store(store.path, NATIVE).add(replace(night("c-1"), subject=None))["group"] == "c-1"


def test_only_recognised_events_are_kept_and_no_free_text(tmp_path):
    events = pd.DataFrame(dict(onset=[1., 2., 3., 4., 5., 6.], duration=[1., np.nan, 3., 4., 5., 6.], name=["Jane Doe slept"] * 6, type=["apnea", "arousal", None, "arousal", "", "apnea"],
        channel=["THOR RES", "C4-M1", "Doe", "Jane Doe EEG", "", None]))
    store = create_store(tmp_path / "s", NATIVE)
    assert store.add(night(events=events))["n_events"] == 4
    back = store["a-1"].events
    assert back["name"].tolist() == back["type"].tolist() == ["apnea", "arousal", "arousal", "apnea"]
    assert back["channel"].tolist() == ["Thorax", "C4-M1", "EEG", ""] and back["onset"].tolist() == [1, 2, 4, 6]
    np.testing.assert_array_equal(back["duration"], [1, np.nan, 4, 6])
    assert not [f for f in files(store.path) if b"Doe" in f.read_bytes()]
    store.add(night(events=events.drop(columns="type"))) # nobody has recognised these
    assert len(store["a-1"].events) == 0 and store.sync()["n_events"].tolist() == [0]
    assert not [f for f in files(store.path) if b"Doe" in f.read_bytes()]


def test_the_checksum_is_that_of_the_content(tmp_path, monkeypatch):
    one = create_store(tmp_path / "1", NATIVE).add(night(), [dict(name="x", sha256="1")])["checksum"]
    monkeypatch.setattr(stores, "CODEC", zarr.codecs.BloscCodec(cname="lz4", clevel=1))
    monkeypatch.setattr(stores, "CHUNK_SECONDS", 60)
    assert create_store(tmp_path / "2", NATIVE).add(night(provenance=dict(policy="crop")), [dict(name="y", sha256="1", changed=7)])["checksum"] == one
    rec = night()
    h = rec.hypnogram
    for other in (night(seed=1), replace(rec, subject="z"), replace(rec, hypnogram=None), replace(rec, hypnogram=replace(h, stages=h.stages[::-1])), replace(rec, start=None),
            replace(rec, channels=dict(reversed(rec.channels.items()))), replace(rec, events=pd.DataFrame([(1., 2., "a", "", "apnea")], columns=["onset", "duration", "name", "channel", "type"]))):
        assert create_store(tmp_path / "3", NATIVE).add(other)["checksum"] != one


def test_an_opened_recording_can_be_sent_to_another_process(store):
    rec = store["a-1"]
    rec["C4-M1"].samples()
    code = "import pickle, sys; r = pickle.load(sys.stdin.buffer); print(float(r['C4-M1'].samples(1000, 2000).sum()), len(r.hypnogram))"
    out = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(rec), capture_output=True, check=True).stdout.split()
    assert float(out[0]) == float(rec["C4-M1"].samples(1000, 2000).sum()) and int(out[1]) == 4


def test_reading_in_threads(store):
    rec, want = store["a-1"], night("a-1", hash_of("a-1"))["C4-M1"].samples()
    with ThreadPoolExecutor(4) as pool:
        for part in pool.map(lambda i: rec["C4-M1"].samples(i * 100, i * 100 + 100) - want[i * 100:i * 100 + 100], range(200)): assert not part.any()


# --- the first format

def first_format(store: Store, rec: Recording) -> None:
    "What the first version wrote: everything about an array in its own attributes, no checksums."
    group = zarr.open_group(store.recordings / f"{rec.id}.zarr", mode="w", zarr_format=3)
    for i, ch in enumerate(rec.channels.values()):
        codes, scale, offset = quantise(ch.samples(), ch.resolution)
        facts = dict(name=ch.name, kind=str(ch.kind), fs=ch.fs, unit=ch.unit, reference=ch.reference, source_label=ch.source_label, resolution=ch.resolution, scale=scale, offset=offset)
        group.create_array(f"{i:02d}_{ch.name}", shape=codes.shape, dtype=codes.dtype, chunks=(1000,), shards=(1000 * -(-len(codes) // 1000),), fill_value=-32768 if codes.dtype == np.int16 else np.nan,
            attributes=facts)[:] = codes
    h = rec.hypnogram
    group.create_array("hypnogram", data=h.stages, attributes=dict(epoch_length=h.epoch_length, start=h.start.isoformat(), onset=h.onset, scorer=None, lights_off=None, lights_on=None))
    if h.probabilities is not None: group.create_array("probabilities", data=np.asarray(h.probabilities, "float32"))
    row = {k: v for k, v in stores.manifest_row(rec, store.recipe_hash).items() if k not in ("group", "n_events", "issue_text", "bytes", "checksum")}
    group.attrs.update(dict(format="pftsleep-recording/1", written_by="0.0.1", id=rec.id, subject=rec.subject, cohort=rec.cohort, start=rec.start.isoformat(), recipe=store.recipe,
        recipe_hash=store.recipe_hash, sources=[dict(name="x.edf", sha256="12")], provenance=dict(policy="crop"), issues=[], row=row))


def test_stores_of_the_first_format_still_open(tmp_path):
    store = create_store(tmp_path / "old", NATIVE)
    rec = night()
    rec = replace(rec, hypnogram=replace(rec.hypnogram, probabilities=np.eye(5)[:4]))
    first_format(store, rec)
    old_columns = [c for c in COLUMNS if c not in ("group", "n_events", "issue_text", "bytes", "checksum")]
    pd.DataFrame([json.loads((store.recordings / "a-1.zarr" / "zarr.json").read_text())["attributes"]["row"]], columns=old_columns).to_parquet(store.path / "manifest.parquet")
    old = open_store(store.path)
    assert list(old.manifest.columns) == COLUMNS and old.manifest["group"].tolist() == ["a"] and old.manifest["checksum"].tolist() == [""]
    back = old["a-1"]
    for name, ch in rec.channels.items(): np.testing.assert_array_equal(back[name].samples(), ch.samples())
    np.testing.assert_array_equal(back.hypnogram.probabilities, np.eye(5)[:4])
    assert back.hypnogram.stages.tolist() == rec.hypnogram.stages.tolist() and back.provenance["sources"][0]["sha256"] == "12"
    assert verify(old)["problem"].tolist() == ["unsealed"]
    assert merge([old], tmp_path / "joined").manifest["id"].tolist() == ["a-1"]
    assert prepare(old, tmp_path / "new", Recipe.default(), ThreadPoolExecutor(1)).of("done")
    assert prepare(old, tmp_path / "new", Recipe.default(), ThreadPoolExecutor(1)).of("skipped")
    (old.recordings / "a-1.zarr" / "00_C4-M1" / "c" / "0").write_bytes(b"short")
    assert "damaged" in verify(old)["problem"].tolist()


# --- damage

@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), which=st.integers(0, 100))
@settings(max_examples=60)
def test_one_wrong_bit_is_found_wherever_it_is(tmp_path_factory, where, bit, which):
    store = open_store(_kept(tmp_path_factory))
    path = (all_ := files(store.recordings / "a-1.zarr"))[which % len(all_)]
    whole = path.read_bytes()
    data = bytearray(whole); data[int(where * len(data))] ^= 1 << bit
    said = json.loads(whole)["attributes"] if path.parent.suffix == ".zarr" else None
    try:
        path.write_bytes(data)
        found = verify(store)
        same = said is not None and not len(found) and json.loads(data)["attributes"] == said # a blank that became a tab
        assert same or "a-1" in found["id"].tolist(), f"{path}: {int(where * len(data))}"
        assert set(found["id"]) <= {"a-1"}
        with suppress(PFTSleepError): # nothing else comes out
            for c in store["a-1"].channels.values(): c.samples()
    finally: path.write_bytes(whole)


_STORES: dict = {}
def _kept(factory) -> Path:
    if "kept" not in _STORES: _STORES["kept"] = filled(factory.mktemp("kept") / "store", "a-1", "a-2").path
    return _STORES["kept"]


def truncate(p: Path) -> None: p.write_bytes(p.read_bytes()[:-20])
def edit(p: Path) -> None: p.write_text(p.read_text().replace('"uV"', '"mV"'))

@pytest.mark.parametrize("harm, where, problem", [
    (truncate, "00_C4-M1/c/0", "damaged"), (Path.unlink, "00_C4-M1/c/0", "damaged"), (Path.unlink, "01_Thorax/zarr.json", "damaged"), (Path.unlink, "zarr.json", "half-written"),
    (lambda p: p.write_text("x"), "00_C4-M1/c/1", "damaged"), (edit, "00_C4-M1/zarr.json", "damaged"), (edit, "zarr.json", "damaged"), (lambda p: p.write_text("{}"), "zarr.json", "half-written"),
    (lambda p: p.write_bytes(b""), "hypnogram/c/0", "damaged"), (lambda p: shutil.rmtree(p), "", "missing"), (lambda p: p.rename(p.with_name("c-9.zarr")), "", "missing")])
def test_damage_is_found_and_nothing_but_our_errors_comes_out(store, harm, where, problem):
    path = store.recordings / "a-2.zarr"
    harm(path / where if where else path)
    found = verify(store)
    assert found[found["id"] == "a-2"]["problem"].tolist() == [problem], found
    if problem != "damaged": # everybody else goes on
        with pytest.warns(UserWarning, match="verify") if problem == "half-written" else nullcontext(): assert set(store.sync()["id"]) >= {"a-1", "b-1"}
    try: [c.samples() for c in store["a-2"].channels.values()]
    except PFTSleepError as e: assert "->" in str(e)


def test_a_recording_under_another_name_is_found(store):
    a, b = (store.recordings / f"{i}.zarr" for i in ("a-1", "a-2"))
    a.rename(store.path / "x"); b.rename(a); (store.path / "x").rename(b)
    assert set(verify(store)["problem"]) >= {"damaged"} and set(verify(store)["id"]) == {"a-1", "a-2"}


def test_verify_in_order_says_nothing(store):
    assert len(verify(store)) == 0
    with ThreadPoolExecutor(2) as pool: assert len(verify(store, pool)) == 0
    (store.path / "manifest.parquet").write_bytes(b"no parquet")
    assert verify(store)["detail"].str.startswith("manifest.parquet").tolist() == [True]
    with pytest.raises(StoreError, match="delete it"): _ = store.manifest
    (store.path / "manifest.parquet").unlink()
    assert verify(store)["problem"].tolist() == ["missing"]
    store.add(night("c-1")); store.sync(); store.add(night("c-1", seed=5))
    assert verify(store)[["id", "problem"]].values.tolist() == [["c-1", "outdated"]]
    write_recording(night("d-1"), store.recordings, {}, "another")
    assert set(verify(store).query("id == 'd-1'")["problem"]) == {"outdated", "extra"}


json_value = st.recursive(st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats() | st.text(max_size=8), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3), max_leaves=6)

@given(data=st.data())
@settings(max_examples=80)
def test_any_attributes_give_a_recording_or_an_error_of_ours(tmp_path_factory, data):
    store = open_store(_kept(tmp_path_factory))
    path = store.recordings / "a-2.zarr" / "zarr.json"
    whole = path.read_text()
    table = json.loads(whole)
    node, key = table, "attributes"
    for _ in range(data.draw(st.integers(0, 4))): # somewhere in the tree
        if not isinstance(node[key], dict | list) or not node[key]: break
        node, key = node[key], data.draw(st.sampled_from(sorted(node[key]) if isinstance(node[key], dict) else range(len(node[key]))))
    node[key] = data.draw(json_value)
    try:
        path.write_text(json.dumps(table))
        assert isinstance(find_damage(path.parent), list)
        stores.recording_rows(store.recordings)
        rec = read_recording(path.parent)
        for c in rec.channels.values():
            if c.n_samples < 1e6: c.samples()
    except PFTSleepError: pass
    finally: path.write_text(whole)


def test_no_array_outside_of_its_recording_is_read(store):
    path = store.recordings / "a-1.zarr" / "zarr.json"
    path.write_text(path.read_text().replace('"00_C4-M1"', '"../a-2.zarr/00_C4-M1"'))
    with pytest.raises(StoreError, match="damaged"): _ = store["a-1"]


# --- writing under bad conditions

def test_a_full_disk_leaves_nothing_behind(tmp_path):
    code = """if 1:
        import resource, sys
        sys.path.insert(0, sys.argv[2])
        from test_store import night, NATIVE, create_store, StoreError
        store = create_store(sys.argv[1], NATIVE)
        store.add(night("a-1"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try: store.add(night("a-2"))
        except StoreError as e: print(e)
    """
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s"), str(Path(__file__).parent)], capture_output=True, text=True, check=True).stdout
    store = open_store(tmp_path / "s")
    assert "free some space" in out and store.sync()["id"].tolist() == ["a-1"] and not hidden(store)


def test_two_processes_write_the_same_recordings(tmp_path):
    code = """if 1:
        import sys
        sys.path.insert(0, sys.argv[2])
        from test_store import night, NATIVE, create_store
        store = create_store(sys.argv[1], NATIVE)
        for i in range(40): store.add(night(f"a-{i % 2}", seconds=30)); store.sync()
    """
    at_work = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "s"), str(Path(__file__).parent)], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate()[1] for p in at_work]
    assert [p.returncode for p in at_work] == [0, 0], said
    store = open_store(tmp_path / "s")
    assert store.sync()["id"].tolist() == ["a-0", "a-1"] and not hidden(store) and len(verify(store)) == 0


def test_leftovers_of_other_machines_stay_for_a_day(store):
    dead, here = 999999999, socket.gethostname().replace(".", "-")
    names = {f".x.zarr.@{here}.{dead}.ab": False, f".x.zarr.@{here}.{dead}.ab.cd.old": False, f".x.zarr.@{here}.{os.getpid()}.ab": True, f".x.zarr.{dead}.ab": False, f".x.zarr.@other.{dead}.ab": True,
        f".x.zarr.@other.{dead}.old": False, ".x.zarr.what": True, ".x.zarr.@other": True, f".x.zarr.@{here}.{10**30}.ab": False}
    for name in names: (store.recordings / name).mkdir()
    os.utime(store.recordings / f".x.zarr.@other.{dead}.old", (0, 0))
    clear_leftovers(store.recordings)
    assert {n: (store.recordings / n).exists() for n in names} == names
    assert (verify(store)["problem"] == "half-written").sum() == sum(names.values())


# --- other places

def test_a_store_in_a_bucket(bucket, tmp_path):
    store = filled(bucket, "a-1", "b-1")
    same = filled(tmp_path / "same", "a-1", "b-1")
    pd.testing.assert_frame_equal(store.manifest, same.manifest)
    assert len(verify(store)) == 0 and list(store) == ["a-1", "b-1"] and len(store) == 2 and store.path.name == "store"
    for name, ch in same["a-1"].channels.items(): np.testing.assert_array_equal(store["a-1"][name].samples(10, 100), ch.samples(10, 100))
    before = store["a-1"]["C4-M1"].samples()
    store.add(night("a-1", seed=77))
    assert (store["a-1"]["C4-M1"].samples() != before).any() and verify(store)["problem"].tolist() == ["outdated"]
    fs = fsspec.filesystem("memory")
    fs.rm_file("/cohort/store/recordings/b-1.zarr/zarr.json") # as if sending had stopped
    with pytest.warns(UserWarning, match="b-1"): assert store.sync()["id"].tolist() == ["a-1"]
    with pytest.raises(StoreError, match="no readable"): _ = store["b-1"]
    assert verify(store)["problem"].tolist() == ["half-written"]
    fs.rm_file("/cohort/store/recordings/a-1.zarr/00_C4-M1/c/0")
    with pytest.raises(StoreError, match="gone"): read_recording(f"{bucket}/recordings/a-1.zarr")["C4-M1"].samples()
    assert "damaged" in verify(store)["problem"].tolist()


def test_from_disk_to_bucket_and_back(store, bucket, tmp_path):
    sent = merge([store], bucket)
    assert len(verify(sent)) == 0
    back = merge([sent], tmp_path / "back")
    pd.testing.assert_frame_equal(back.manifest, store.manifest)
    with ThreadPoolExecutor(1) as pool: assert len(prepare(sent, "memory://cohort/prepared", Recipe.default(), pool).of("done")) == 3
    assert len(verify(open_store("memory://cohort/prepared"))) == 0


def test_urls_of_folders_are_folders(store):
    assert isinstance(open_store(f"file://{store.path}").path, Path) and len(open_store(f"file://{store.path}")) == 3
    assert locate(store.path) == locate(str(store.path)) == store.path
    for url in ("nowhere://x/y", "memory://empty/place"):
        with pytest.raises(StoreError): open_store(url)


# --- merge

def test_merge_refuses_what_would_lose_something(store, tmp_path):
    other = filled(tmp_path / "other", "b-1", "c-1")
    assert merge([store, other], tmp_path / "all").manifest["id"].tolist() == ["a-1", "a-2", "b-1", "c-1"]
    other.add(night("a-1", seed=1234))
    with pytest.raises(StoreError) as e: merge([store, other], tmp_path / "clash")
    assert str(store.path) in str(e.value) and str(other.path) in str(e.value) and not len(open_store(tmp_path / "clash"))
    with pytest.raises(StoreError, match="has this id"): merge([other], tmp_path / "all") # the target has another one
    with pytest.raises(StoreError, match="prepare it as"): merge([store, create_store(tmp_path / "d", Recipe.default())], tmp_path / "x")
    with pytest.raises(ConfigError): merge([], tmp_path / "x")
    truncate(store.recordings / "a-2.zarr" / "00_C4-M1" / "c" / "0")
    with pytest.raises(StoreError, match="is damaged"): merge([store], tmp_path / "y")


def test_merge_goes_on_where_it_stopped(store, tmp_path, monkeypatch):
    real, done = archives.copy_recording, []
    def failing(path, folder):
        if len(done) == 2: raise StoreError("can't be copied: No space left", path=path)
        done.append(real(path, folder))
    monkeypatch.setattr(archives, "copy_recording", failing)
    with pytest.raises(StoreError, match="No space"): merge([store], tmp_path / "all")
    monkeypatch.setattr(archives, "copy_recording", lambda p, f: done.append(real(p, f)))
    joined = merge([store], tmp_path / "all")
    assert len(done) == 3 and len(verify(joined)) == 0 and not hidden(joined)
    (joined.recordings / "a-1.zarr" / "zarr.json").unlink() # half a recording in the target is made whole
    assert len(verify(merge([store], tmp_path / "all"))) == 0


# --- prepare

def contents(store: Store) -> dict: return {i: (f := recording_facts(store.recordings / f"{i}.zarr"))["contents"] | dict(start=f["start"], subject=f["subject"], issues=f["issues"]) for i in store}


def both_ways(rec: Recording, folder: Path, recipe: Recipe) -> tuple[Store, Store]:
    archive, direct = create_store(folder / "archive", NATIVE), create_store(folder / "direct", recipe)
    archive.add(apply_recipe(rec, NATIVE), [dict(name="x.edf", sha256="12")])
    direct.add(apply_recipe(rec, recipe), [dict(name="x.edf", sha256="12")])
    with ThreadPoolExecutor(1) as pool: assert not prepare(archive, folder / "prepared", recipe, pool).failed
    return open_store(folder / "prepared"), open_store(folder / "direct")


@pytest.mark.parametrize("recipe", [Recipe.default(), Recipe.default(rate=64), Recipe.native(channels=["SpO2", "EEG"]), Recipe.default(channels=["RESP", "C4-M1"])], ids=lambda r: r.hash[:6])
def test_preparing_from_an_archive_is_converting_from_the_file_bit_for_bit(tmp_path, recipe):
    rng = np.random.default_rng(3)
    start = replace(night(seconds=300), start=START)
    sweep = array_channel("C3-M2", 150 * np.sin(np.linspace(0, 3000, 300 * 256)) + 5 * rng.standard_normal(300 * 256), 256, "uV", "EEG")
    write_edf(replace(start, hypnogram=None, channels={**start.channels, "C3-M2": sweep}), tmp_path / "a-1.edf")
    rec, _, _ = align(replace(read_edf(tmp_path / "a-1.edf"), subject="a"), Hypnogram(rng.integers(0, 5, 9), 30, START.replace(second=7))) # the crop is not on a sample of every channel
    prepared, direct = both_ways(rec, tmp_path, recipe)
    assert contents(prepared) == contents(direct) # the same codes, calibration and stages, by SHA-256
    assert prepared.manifest["checksum"].tolist() == direct.manifest["checksum"].tolist() and len(verify(prepared)) == 0
    kept = prepared["a-1"].provenance
    assert (kept["archive"]["recipe_hash"], kept["recipe_hash"], kept["sources"]) == (NATIVE.hash, recipe.hash, [dict(name="x.edf", sha256="12")])


@pytest.mark.skipif(not SHARED.exists(), reason="../shared isn't here")
@pytest.mark.parametrize("name", ["realdata/**/sleepedf_SC4001_5min.edf", "fixtures/pftsleep/edf/synth_12min.edf"])
def test_an_archive_of_a_real_file_loses_nothing(name, tmp_path):
    rec = read_edf(next(SHARED.glob(name)))
    archive = create_store(tmp_path / "a", NATIVE)
    archive.add(rec)
    for label, ch in rec.channels.items():
        assert archive[rec.id][label].read.scale == ch.resolution
        np.testing.assert_array_equal(archive[rec.id][label].samples(), ch.samples())
    prepared, direct = both_ways(rec, tmp_path / "b", Recipe.default(channels=["EEG", "EOG"]))
    assert contents(prepared) == contents(direct)


def test_prepare_resumes_and_keeps_a_ledger(store, tmp_path):
    odd, recipe = night("f-1"), Recipe.default(channels=["EEG"])
    store.add(replace(odd, channels={**odd.channels, "C4-M1": replace(odd["C4-M1"], unit="furlong")}))
    with ThreadPoolExecutor(2) as pool:
        ledger = prepare(store, tmp_path / "p", recipe, pool)
        assert [o.status for o in ledger.outcomes] == ["done"] * 3 + ["failed"] and "furlong" in ledger.failed[0].message and not ledger.failed[0].trace
        assert [o.status for o in prepare(store, tmp_path / "p", recipe, pool).outcomes] == ["skipped"] * 3 + ["failed"]
        (tmp_path / "p/recordings/a-2.zarr/zarr.json").unlink()
        with pytest.warns(UserWarning, match="a-2"): open_store(tmp_path / "p").sync()
        assert [o.status for o in prepare(store, tmp_path / "p", recipe, pool).outcomes][:3] == ["skipped", "done", "skipped"]
    assert len((tmp_path / "p/ledger.jsonl").read_text().splitlines()) == 12
    assert len(verify(open_store(tmp_path / "p"))) == 0


def test_prepare_with_processes_of_its_own(store, tmp_path):
    assert len(prepare(store, tmp_path / "p", Recipe.native(channels=["EEG"])).of("done")) == 3


def test_only_an_archive_is_prepared_from(store, tmp_path):
    assert is_archive(store) and is_archive(create_store(tmp_path / "n", Recipe.native(channels=["EEG"])))
    for recipe in (Recipe.default(), Recipe("r", rate=100), Recipe("u", units={"EEG": "uV"}), Recipe("m", median={"EEG": 3})):
        made = create_store(tmp_path / recipe.name, recipe)
        assert not is_archive(made)
        with pytest.raises(StoreError, match="isn't an archive"): prepare(made, tmp_path / "x", Recipe.native())
        with pytest.raises(StoreError, match="use it as it is"): prepare(made, tmp_path / "x", recipe)


# --- stores of the original

FIXTURE = SHARED / "fixtures/pftsleep"

@pytest.mark.skipif(not FIXTURE.exists(), reason="../shared isn't here")
def test_a_store_written_by_the_original(tmp_path):
    edf = read_edf(FIXTURE / "edf/synth_12min.edf")
    store = open_store(FIXTURE / "zarr", codes="mapped")
    rec = store["synth_12min"]
    assert isinstance(store, OriginalStore) and list(store) == ["synth_12min"] and rec.start == datetime(2020, 1, 2, 22, 30)
    for ch in rec.channels.values():
        same = next(c for c in edf.channels.values() if c.source_label == ch.source_label)
        assert (ch.name, ch.kind, ch.unit, ch.fs, ch.n_samples, ch.reference) == (same.name, same.kind, same.unit, same.fs, same.n_samples, same.reference)
        np.testing.assert_allclose(ch.samples(), same.samples(), rtol=2**-11, atol=6e-8) # what float16 leaves
        assert ch.resolution == pytest.approx(same.resolution)
    lines = [int(line.rpartition(",")[2]) for line in (FIXTURE / "edf/synth_12min-hyp.csv").read_text().split()]
    assert rec.hypnogram.stages.tolist() == lines and not rec.issues
    with pytest.raises(HypnogramError, match="4 can be stage 4 or REM"): _ = open_store(FIXTURE / "zarr")["synth_12min"]
    assert (open_store(FIXTURE / "zarr", codes="nsrr")["synth_12min"].hypnogram.stages == Stage.REM).sum() == 0
    assert store.manifest[["id", "subject", "epochs", "n_rem"]].values.tolist() == [["synth_12min", "synth_12min", 24, lines.count(4)]]
    with ThreadPoolExecutor(1) as pool:
        assert str(prepare(store, tmp_path / "p", Recipe.native(), pool)) == "1 done, 0 skipped, 0 failed"
        assert str(prepare(store, tmp_path / "p", Recipe.native(), pool)) == "0 done, 1 skipped, 0 failed"
    assert pickle.loads(pickle.dumps(rec))["ECG"].n_samples == rec["ECG"].n_samples
    with pytest.raises(StoreError, match="only read"): store.add(rec)


@pytest.fixture
def original(tmp_path):
    group = zarr.open_group(tmp_path / "o" / "s-1.zarr", mode="w", zarr_format=2, attributes=dict(header=dict(patientname="Jane Doe", startdate="bad")))
    header = dict(dimension="mV", sample_rate=100, physical_min=-1, physical_max=1, digital_min=-1000, digital_max=1000)
    group.create_array("EEG", data=np.ones(6000, "float16"), chunks=(2500,), attributes=dict(signal_header=header))
    group.create_array("derived", data=np.ones(600, "float16"), chunks=(600,), attributes=dict(signal_header=dict(header, physical_min=0, physical_max=0, dimension="furlong", sample_frequency=10)))
    group.create_array("nothing", data=np.ones(60, "float16"), chunks=(60,))
    group.create_array("hypnogram", data=np.repeat([0, 5], 30), chunks=(60,))
    return tmp_path / "o" / "s-1.zarr"


def test_what_an_original_can_lack(original):
    rec = read_original(original)
    assert rec.start is None and rec["EEG"].unit == "uV" and rec["EEG"].samples(0, 2).tolist() == [1000, 1000] and rec["EEG"].resolution == pytest.approx(1) and rec["derived"].resolution is None
    assert [i.channel for i in rec.issues] == ["derived", "nothing", None] and rec.hypnogram.stages.tolist() == [0, 4] and rec.hypnogram.start is None
    assert "Doe" not in repr(rec) + str(rec.provenance) + str(rec.issues)
    (original / "EEG" / "1").unlink()
    assert len(rec["EEG"].samples(0, 2500)) == 2500
    with pytest.raises(StoreError, match="restore"): rec["EEG"].samples(0, 2501) # zarr would say 0
    shutil.rmtree(original / "hypnogram")
    assert read_original(original).hypnogram is None
    with pytest.raises(StoreError, match="whose recording"): read_original(original, subject=r"x(?P<subject>\d)")
    with pytest.raises(StoreError, match="no recording"): _ = open_store(original.parent)["../x"]
    with pytest.raises(ConfigError): original_codes(np.array([0]), "aasm")
    with pytest.raises(StoreError): read_original(original.parent / "nobody.zarr")


@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")
@given(data=st.data())
@settings(max_examples=60)
def test_any_original_gives_a_recording_or_an_error_of_ours(tmp_path_factory, data):
    if "original" not in _STORES:
        _STORES["original"] = tmp_path_factory.mktemp("original")
        g = zarr.open_group(_STORES["original"] / "s-1.zarr", mode="w", zarr_format=2, attributes=dict(header=dict(startdate="2020-01-01 22:00:00")))
        g.create_array("EEG", data=np.ones(60, "float16"), attributes=dict(signal_header=dict(dimension="uV", sample_frequency=1, physical_min=-1, physical_max=1, digital_min=-9, digital_max=9)))
        g.create_array("hypnogram", data=np.repeat([0, 5], 30))
    path = _STORES["original"] / "s-1.zarr"
    target = path / data.draw(st.sampled_from([".zattrs", ".zgroup", "EEG/.zattrs", "EEG/.zarray", "EEG/0", "hypnogram/.zarray", "hypnogram/0"]))
    whole = target.read_bytes()
    try:
        if target.name == "0" or data.draw(st.booleans()):
            noise = bytearray(whole); noise[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255)); target.write_bytes(noise)
        else:
            table = json.loads(whole)
            node = table["signal_header"] if "signal_header" in table else table.get("header", table)
            node[data.draw(st.sampled_from(sorted(node)))] = data.draw(json_value)
            if not _small(table): return
            target.write_text(json.dumps(table))
        rec = read_original(path)
        for c in rec.channels.values():
            if c.n_samples < 1e6: c.samples()
    except PFTSleepError: pass
    finally: target.write_bytes(whole)


def _small(table) -> bool: return all(isinstance(n, int) and n < 1e6 for k in ("shape", "chunks") if isinstance(table.get(k), list) for n in table[k] if isinstance(n, int | float))


@given(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 9, -100, -1, 7]), max_size=400), st.sampled_from([1, 2, 100]), st.sampled_from([None, "nsrr", "mapped"]))
def test_any_numbers_give_stages_or_an_error_of_ours(numbers, per_second, codes):
    try: h, _ = original_hypnogram(np.array(numbers, "int64"), per_second, len(numbers) / per_second, codes)
    except HypnogramError: return
    assert len(h) == len(numbers) // (30 * per_second)


def test_a_resampled_original_has_a_stage_per_sample(tmp_path):
    group = zarr.open_group(tmp_path / "s.zarr", mode="w", zarr_format=2, attributes=dict(header={}))
    group.create_array("EEG", data=np.ones(6000, "float16"), attributes=dict(signal_header=dict(dimension="uV", sample_frequency=100)))
    group.create_array("hypnogram", data=np.repeat([0, 5], 3000))
    assert read_original(tmp_path / "s.zarr").hypnogram.stages.tolist() == [Stage.W, Stage.REM]


def test_kinds_of_events_channels():
    assert stores._event_channel("LAT leg of Mr Doe", set()) in (str(Kind.EMG), "") and stores._event_channel(float("nan"), set()) == ""
