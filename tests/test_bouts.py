"""Files of bouts: the layout, untrusted bytes, converters, and what the original did wrong in them (shared/reference/aar.md, section 8)."""
import json
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pftsleep.data.animal_studies import STUDIES, convert_csv, convert_device, convert_rabc, convert_study, simulate_animals
from pftsleep.data.bouts import BoutName, bout_name, dataset_to_hdf5, find_bouts, open_bout, read_bout, read_labels
from pftsleep.errors import ConfigError, PFTSleepError, ReadError, StoreError

SHARED = Path(__file__).parents[2] / "shared"
RNG = np.random.default_rng(0)


def noise(n: int) -> np.ndarray: return RNG.normal([0, 0, 1], .1, (n, 3))


@pytest.mark.parametrize("compression", [None, "lzf", "gzip"])
@pytest.mark.parametrize("n", [1, 1000, 5000])
def test_what_is_written_is_read(tmp_path, compression, n):
    x, words = noise(n), RNG.choice(["a", "b", "unknown"], n)
    x[n // 3:n // 3 + n // 10] = np.nan
    bout = open_bout(dataset_to_hdf5(tmp_path, 2, 7, dict(acc=x, gyr=x, label=words), 10.54, "back", "Stork", dict(acc="g"), provenance=dict(a=1), compression=compression))
    codes, names = read_labels(bout)
    rec = read_bout(bout.path)
    np.testing.assert_array_equal(np.stack([rec[f"acc {a}"].samples() for a in "XYZ"], 1), x.astype("float32"))
    assert [(*names, "unknown")[c] for c in codes] == words.tolist() and bout.info.fs == 10.54 and bout.info.provenance == {"a": 1} and bout.name == BoutName("stork", 2, 7)
    assert bout.sensors["acc"].gaps.tolist() == ([[n // 3, n // 3 + n // 10]] if n >= 10 else [])


def test_a_stream_is_the_same_as_one_piece(tmp_path):
    x = noise(7001)
    x[999:1001] = x[-1] = np.nan
    one = dataset_to_hdf5(tmp_path / "one", 1, 0, dict(acc=x), 25, "neck", "cow")
    many = dataset_to_hdf5(tmp_path / "many", 1, 0, (dict(acc=part) for part in np.split(x, [1, 1000, 1000, 5000])), 25, "neck", "cow")
    with h5py.File(one) as a, h5py.File(many) as b:
        np.testing.assert_array_equal(a["acc"], b["acc"])
        assert a["gaps/acc"][()].tolist() == b["gaps/acc"][()].tolist() == [[999, 1001], [7000, 7001]]
        assert b["acc"].chunks == (512, 3) and b["acc"].compression == "lzf" and b["acc"].dtype == "float32"


def test_nothing_half_written(tmp_path):
    def blocks():
        yield dict(acc=noise(10))
        yield dict(acc=noise(10), gyr=noise(10))
    with pytest.raises(StoreError, match="same sensors"): dataset_to_hdf5(tmp_path, 1, 0, blocks(), 25, "neck", "cow")
    assert not list(tmp_path.iterdir())


def test_the_originals_files_are_read(tmp_path):
    "Defect 1: labels as bytes or text, (n,) or (n, 1); `unknown` is no class. Zeros are what was missing."
    for k, (label, kind) in enumerate((([["walk"]] * 50 + [["unknown"]] * 50, h5py.string_dtype()), ([b"walk"] * 50 + [b"unknown"] * 50, None))):
        with h5py.File(tmp_path / f"cow_1_ds_{k}.hdf5", "w") as f:
            f.attrs.update(sr=25, loc="neck", species="cow")
            x = noise(100)
            x[10:20] = 0
            f["acc"] = x
            if kind: f.create_dataset("label", data=np.array(label, object), dtype=kind)
            else: f["label"] = label
    for bout in find_bouts(tmp_path):
        codes, names = read_labels(bout)
        assert names == ("walk",) and codes.tolist() == [0] * 50 + [-1] * 50
        assert np.isnan(read_bout(bout.path)["acc X"].samples()).nonzero()[0].tolist() == list(range(10, 20))


def test_species_with_equal_numbers_are_different_animals(tmp_path):
    for species in ("horse", "cow"): dataset_to_hdf5(tmp_path, 1, 0, dict(acc=noise(10)), 25, "neck", species)
    assert {b.subject for b in find_bouts(tmp_path)} == {"horse_1", "cow_1"}


def test_fixtures_of_the_original():
    if not (folder := SHARED / "fixtures/aar/hdf5").exists(): pytest.skip("no ../shared/fixtures")
    for name, shape in (("horses", 6), ("calves", 4)):
        bouts = find_bouts(folder / name)
        assert len(bouts) == shape and {b.info.fs for b in bouts} == {25.} and all(read_labels(b)[1] == ("standing", "trotting", "walking") for b in bouts)


# --- bytes from anywhere

VALUE = st.sampled_from([np.arange(5.), np.arange(6.).reshape(2, 3), np.zeros((0, 3)), np.zeros((4, 3, 2)), np.array(3.), np.array([b"x", b"yz"]), np.array([[1j, 1, 2]]), np.array([[np.nan] * 3, [1e300] * 3]), np.array([[0, 9**9]]), np.array([[3, 1]]), np.array([7, -2]),
    h5py.Empty("f8"), "text", float("nan"), b"\xff\xfe", "[" * 10_000, "2022-13-45", np.zeros((5, 3)), np.zeros((5, 70)), h5py.SoftLink("/acc"), h5py.SoftLink("/nowhere"), h5py.ExternalLink("other.h5", "/x"), None])

@given(changes=st.lists(st.tuples(st.sampled_from(["acc", "gyr", "label", "gaps", "gaps/acc", "more", "@sr", "@species", "@start", "@provenance", "@format", "@subject_known", "@loc"]), VALUE), max_size=5))
@settings(max_examples=100)
def test_anything_that_hdf5_can_hold(tmp_path_factory, changes):
    path = dataset_to_hdf5(tmp_path_factory.getbasetemp() / "fuzz", 1, 0, dict(acc=noise(5), label=["a"] * 5), 25, "neck", "cow")
    with h5py.File(path, "a") as f:
        for place, value in changes:
            with suppress(KeyError, ValueError, TypeError, OSError, RuntimeError):
                if place[0] == "@": f.attrs[place[1:]] = value; continue
                if place in f: del f[place]
                if value is not None: f[place] = value
    with suppress(PFTSleepError):
        rec = read_bout(path)
        for c in rec.channels.values(): c.samples()


@given(st.binary(max_size=300))
def test_garbage_is_an_error_of_ours(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "cow_1_ds_0.hdf5"
    path.write_bytes(data)
    with pytest.raises(ReadError): open_bout(path)


@given(st.text(max_size=60))
def test_a_name_is_parsed_or_not(text):
    name = bout_name(text)
    assert name is None or str(name) == text or str(name.individual) != text.split("_")[1] or str(name.number) not in text


# --- converters

@pytest.mark.parametrize("name", STUDIES)
def test_each_layout(tmp_path, name):
    expected = simulate_animals(name, tmp_path / "csv", 2, 12)
    table = convert_study(name, tmp_path / "csv", tmp_path / "bouts")
    assert len(table) == expected == len(find_bouts(tmp_path / "bouts")) and table["subject"].nunique() == 2
    for b in find_bouts(tmp_path / "bouts"):
        assert b.info.fs == STUDIES[name].fs and b.info.provenance["study"] == name and all(s.unit in ("g", "m/s2") for s in b.sensors.values() if s.kind == "acc")


def test_listing_order_and_ten_after_nine(tmp_path):
    "Defect 4 in the converters: numbers come from names, and part 10 comes after part 9."
    simulate_animals("horsing_around", tmp_path / "csv", 1, 12)
    convert_study("horsing_around", tmp_path / "csv", tmp_path / "bouts")
    first = pd.read_csv(tmp_path / "csv/subject_1_ride_part_9.csv")["Ax"].to_numpy("float32")
    np.testing.assert_allclose(read_bout(tmp_path / "bouts/horse_1_ds_0.hdf5")["acc X"].samples(), first)


def test_goats_sensors_stay_apart(tmp_path):
    "Defect 6: the keys tell normal and high-range accelerometers, and the labels are those that the devices agree on."
    simulate_animals("kamminga_goats", tmp_path / "csv", 1, 6)
    t = pd.read_csv(path := tmp_path / "csv/G1/pos_B.csv")
    t.loc[:9, "label"] = "jumping"
    t.to_csv(path, index=False)
    convert_study("kamminga_goats", tmp_path / "csv", tmp_path / "bouts")
    bout = open_bout(tmp_path / "bouts/goat_0_ds_0.hdf5")
    assert [s.kind for s in bout.sensors.values()] == ["acc", "acc", "acc_high", "acc_high", "gyr", "gyr"]
    assert (read_labels(bout)[0][:10] == -1).all() and (read_labels(bout)[0][10:] >= 0).all()


def test_missing_values_stay_missing(tmp_path):
    (tmp_path / "a.csv").write_text("x,y,z\n" + "0,0,1\n" * 30 + ",,\n" * 5 + "0,1,0\n" * 10)
    t = convert_csv(tmp_path / "a.csv", tmp_path / "b", dict(acc=("x", "y", "z")), 25, 1, "dog", "neck")
    assert t["missing_s"].tolist() == [.2] and open_bout(tmp_path / "b/dog_1_ds_0.hdf5").sensors["acc"].gaps.tolist() == [[30, 35]]
    with pytest.raises(ConfigError, match="this is g"): convert_csv(tmp_path / "a.csv", tmp_path / "b", dict(acc=("x", "y", "z")), 25, 1, "dog", "neck", "m/s2")
    with pytest.raises(ReadError, match="it has x, y, z"): convert_csv(tmp_path / "a.csv", tmp_path / "b", dict(acc=("ax", "y", "z")), 25, 1, "dog", "neck")


@given(st.text(alphabet="xyz,;\n\"'0123456789.-e ", max_size=200))
def test_no_table_breaks_the_reader(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "a.csv"
    path.write_text("x,y,z\n" + text)
    with suppress(PFTSleepError): convert_csv(path, path.parent / "tables", dict(acc=("x", "y", "z")), 25, 1, "dog", "neck", "g")


# --- real files

def test_storks(tmp_path):
    if not (path := SHARED / "realdata/accelerometer_animal/whitestork_acc.rda").exists(): pytest.skip("no ../shared/realdata")
    pytest.importorskip("rdata", reason="the extra wear isn't installed")
    t = convert_rabc(path, tmp_path)
    assert len(t) == 1746 and set(t["unit"]) == {"m/s2"} and t["subject"].nunique() == 1746 # m/s2, and nobody knows whose
    rec = read_bout(tmp_path / "stork_0_ds_0.hdf5")
    assert rec["acc X"].fs == 10.54 and rec["acc X"].n_samples == 40 and rec.events["name"].tolist() == ["A_FLIGHT"]
    np.testing.assert_allclose([rec[f"acc {a}"].samples()[0] for a in "XYZ"], [-4.053191, -2.749085, -11.343038], rtol=1e-6)
    assert "which animal" in str(rec.issues) and json.dumps(dict(rec.provenance))


@pytest.mark.parametrize(("file", "n", "fs"), [("skdh/ax3_sample.cwa", 58800, 197.24), ("pygt3x/ISM_Enabled.gt3x", 9000, 30.)])
def test_devices(tmp_path, file, n, fs):
    if not (path := SHARED / "realdata/accelerometer_human" / file).exists(): pytest.skip("no ../shared/realdata")
    bout = open_bout(convert_device(path, tmp_path, 1))
    assert abs(bout.info.fs - fs) < .1 and abs(bout.n_samples - n) <= 3 * fs and bout.info.units == {"acc": "g"} and bout.info.start
    if "ISM" in file: assert len(bout.sensors["acc"].gaps) > 0
