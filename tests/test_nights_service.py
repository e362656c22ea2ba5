"""Nights in the service: no name gets in, nothing of a failed upload stays, and no file makes it fall over."""
import asyncio
import io
import json
import re
import resource
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("cryptography")
from pftsleep.apps.jobs import Job, JobCancelled, JobQueue, JobReporter, WorkerPool, WorkerSettings, job_error
from pftsleep.apps.nights import EDFCleaner, correct, hypnogram_of, intake, intake_file, model_stages, night_exports, night_job, night_result, records_of, stage_night
from pftsleep.apps.registry import publish_model
from pftsleep.apps.vault import Keyring, Vault
from pftsleep.data.edf import read_edf, write_edf
from pftsleep.data.hypnograms import read_hypnogram
from pftsleep.data.privacy import deidentify
from pftsleep.data.recording import Hypnogram, Recording, Stage, array_channel, named_channels
from pftsleep.data.signals import Recipe
from pftsleep.errors import PFTSleepError, RequestError, StoreError
from pftsleep.evaluation.report import RESEARCH_USE
from pftsleep.evaluation.sleep_stats import sleep_statistics
from pftsleep.models.heads import LinearProbe
from pftsleep.models.stager import Stager, save_stager, weights_hash
from pftsleep.models.transformer import PatchConfig, PatchTransformer

REAL = Path(__file__).parents[2] / "shared/realdata/psg_edf"
CHANNELS = ("C4-M1", "E1-M2")
WORDS = ("Musterfrau", "Elfriede", "778812", "1951", "Bahnhofstr", "Oberarzt", "Kowalski")
BIG = 10**9


def made(*channels: str) -> Stager:
    torch.manual_seed(0)
    encoder = PatchTransformer(PatchConfig.tiny(channels, 100., d_model=32, n_layers=1))
    stager = Stager(encoder, LinearProbe.of(encoder), Recipe.default(channels), dict(task="test")).eval()
    stager.provenance["weights"] = weights_hash(stager) # what `pftsleep probe` writes
    return stager

def told(stager) -> SimpleNamespace: return SimpleNamespace(model=stager, kind="stager", about=lambda: dict(name="tiny", version="1.0", kind="stager", model_hash="ab" * 32, recipe_hash=stager.recipe.hash, scaler_hash=None, fallback_from=None))

def night(seconds: float = 300., labels=CHANNELS, seed: int = 0) -> Recording:
    rng = np.random.default_rng(seed)
    return Recording("night", named_channels([array_channel(c, 20 * rng.standard_normal(round(seconds * 100)), 100., "uV") for c in labels]), start=datetime(2024, 3, 1, 22, 30, 5))

def edf(labels=("EEG C4-M1", "EOG E1-M2"), n: int = 300, per: int = 100, seconds: str = "1", records: int = 60, claimed: str | None = None, reserved: str = "", patient: str = "X X X X", about: str = "Startdate X X X X X",
        transducer: str = "", tals=None, width: int = 2, magic: bytes = b"0       ", samples: bytes | None = None, n_signals: str | None = None, per_text: str | None = None) -> bytes:
    "A file, byte by byte; `tals` are the annotations of each record."
    labels = [*labels, *(["EDF Annotations" if width == 2 else "BDF Annotations"] if tals is not None else [])]
    field = lambda values, w: b"".join(str(v).encode("latin-1")[:w].ljust(w) for v in values)
    k, counts = len(labels), [per_text or per] * (len(labels) - (tals is not None)) + ([60] if tals is not None else [])
    top = "32767" if width == 2 else "8388607"
    low = "-32768" if width == 2 else "-8388608"
    head = magic + field([patient], 80) + field([about], 80) + b"01.03.2422.30.05" + field([256 * (k + 1)], 8) + field([reserved], 44) + field([claimed if claimed is not None else records], 8) + field([seconds], 8) + field([n_signals or k], 4)
    head += field(labels, 16) + field([transducer] * k, 80) + field(["uV"] * k, 8) + field(["-200"] * k, 8) + field(["200"] * k, 8) + field([low] * k, 8) + field([top] * k, 8) + field([""] * k, 80) + field(counts, 8) + field([""] * k, 32)
    rng, body = np.random.default_rng(0), bytearray()
    for i in range(records):
        body += rng.integers(0, 200, per * width * (k - (tals is not None)), dtype="uint8").tobytes() if samples is None else samples
        if tals is not None: body += tals(i).ljust(60 * width, b"\0")
    return head + bytes(body)

def named() -> bytes:
    "A name, a birth date and a code in all the places where people have found them."
    tals = lambda i: f"+{i}\x14\x14\0".encode() + (b"+3\x14Musterfrau moved, Oberarzt Kowalski\x14\0" if i == 3 else b"+5\x1530\x14Sleep stage W\x14\0" if i == 5 else b"")
    return edf(("EEG C4-M1", "EOG E1-M2", "Kowalski Bahnhof"), patient="MRN-778812 F 04-JUL-1951 Elfriede_Musterfrau", about="Startdate 01-MAR-2024 PSG-778812 Oberarzt_Kowalski Bahnhofstr", reserved="EDF+C Musterfrau", transducer="Musterfrau's cap", tals=tals)

def clean(data: bytes, step: int = 65536, labels=()) -> bytes:
    c = EDFCleaner(labels)
    out = b"".join(c.feed(data[i:i + step]) for i in range(0, len(data), step))
    c.close()
    return out

def refused(code: str, call) -> RequestError:
    with pytest.raises(RequestError) as e: call()
    assert e.value.code == code, e.value
    return e.value

def empty(vault: Vault) -> bool: return vault.names() == [] and not [p for p in vault.folder.rglob("*.part")]


@pytest.fixture(scope="module")
def stager(): return made(*CHANNELS)

@pytest.fixture
def vault(tmp_path): return Vault(tmp_path / "vault", Keyring.create(tmp_path / "keyring.json"))

@pytest.fixture(scope="module")
def result(stager, tmp_path_factory):
    path = tmp_path_factory.mktemp("night") / "night.edf"
    write_edf(night(600), path)
    return stage_night(path, told(stager), "0" * 32, "S-001")


# no name gets in

@pytest.mark.parametrize("step", [1, 7, 255, 1000, 10**6])
def test_no_identity_in_any_byte(step):
    data = named() if step > 1 else named()[:30000]
    out = clean(data, step)
    for word in WORDS:
        for form in (word, word.upper(), word.lower()):
            assert form.encode() in data.replace(b"MUSTER", b"") or form.encode() not in out
            for codec in ("utf-8", "utf-16-le"): assert form.encode(codec) not in out, form
    assert b"Sleep stage W" in out and b"signal 3" in out and b"EEG C4-M1" in out


def test_no_identity_in_vault_or_result(vault, stager, tmp_path):
    got = intake_file([named()], vault, "input-1", "t/1", BIG)
    path = vault.decrypt_to("input-1", "t/1", tmp_path / "plain.edf")
    result = stage_night(path, told(stager), "1", None, notes=got.notes)
    exports = b"".join(night_exports(result, f)[0] for f in ("csv", "edf", "json"))
    everything = path.read_bytes() + exports + repr(got).encode() + b"".join(p.read_bytes() for p in vault.folder.rglob("*") if p.is_file())
    assert not [w for w in WORDS if w.encode() in everything or w.casefold().encode() in everything.lower()]
    assert result["recording"]["start"] == "1985-01-01T22:30:05", "the date is nobody's, the time of day is kept"
    assert result["about"]["quality"]["notes"] and any("replaced" in n for n in got.notes)


def test_labels(tmp_path):
    "Channel names stay, what the caller has named stays, and anything else becomes a number."
    labels = ("EEG C4-M1", "../../etc/passwd", "Mueller", "'; DROP TABLE", "X7", "=cmd|' /C calc'")
    path = tmp_path / "x.edf"
    path.write_bytes(clean(edf(labels, records=5), labels=["x7"]))
    assert [c.source_label for c in read_edf(path).channels.values()] == ["EEG C4-M1", "signal 2", "signal 3", "signal 4", "X7", "signal 6"]


def test_as_deidentify_does(tmp_path):
    write_edf(night(60), tmp_path / "a.edf")
    deidentify(tmp_path / "a.edf", tmp_path / "b.edf")
    assert clean((tmp_path / "a.edf").read_bytes()) == (tmp_path / "b.edf").read_bytes()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2000), max_size=12))
def test_pieces_dont_matter(cuts):
    data = named()[:9000]
    c, at, out = EDFCleaner(), 0, b""
    for n in cuts: out += c.feed(data[at:at + n]); at += n
    out += c.feed(data[at:])
    c.close()
    assert out == clean(data, 10**6)


@pytest.mark.parametrize("file", ["bdf", "unknown count", "cut", "more than claimed"])
def test_odd_files_that_are_nights(file, tmp_path):
    data = dict(bdf=edf(width=3, magic=b"\xffBIOSEMI", reserved="24BIT"), cut=edf()[:-150]) | {"unknown count": edf(claimed="-1"), "more than claimed": edf(claimed="40")}
    path = tmp_path / "x.edf"
    path.write_bytes(clean(data[file], 999))
    rec = read_edf(path)
    assert rec.duration == {"cut": 59, "more than claimed": 40}.get(file, 60)
    (tmp_path / "source.edf").write_bytes(data[file])
    np.testing.assert_array_equal(rec["C4-M1"].samples(0, 3900), read_edf(tmp_path / "source.edf")["C4-M1"].samples(0, 3900))


def test_a_name_among_the_samples():
    e = refused("identity", lambda: clean(edf(patient="X F X Musterfrau", samples=b"Musterfrau" * 40, records=3)))
    assert "Musterfrau" not in str(e)


# what is refused

CORPUS = {
    "nothing": (b"", "empty_body"), "half a header": (edf()[:300], "bad_edf"), "a fixed header alone": (edf()[:256], "bad_edf"), "no records": (edf(records=0, claimed="0"), "bad_edf"), "less than a record": (edf()[:768 + 100], "bad_edf"),
    "zip": (b"PK\x03\x04" + bytes(500), "not_edf"), "gzip": (b"\x1f\x8b\x08" + bytes(500), "not_edf"), "png": (b"\x89PNG\r\n" + bytes(500), "not_edf"), "csv": (b"timestamp,value\n" * 50, "not_edf"), "xml": (b"<?xml version='1.0'?>" + bytes(500), "not_edf"),
    "zeros": (bytes(2000), "not_edf"), "0 signals": (edf(n_signals="0"), "bad_edf"), "-1 signals": (edf(n_signals="-1"), "bad_edf"), "9999 signals": (edf(n_signals="9999"), "bad_edf"), "words": (edf(n_signals="two"), "bad_edf"),
    "wrong header size": (edf(n_signals="1"), "bad_edf"), "huge records": (edf(per_text="99999999"), "bad_edf"), "samples: words": (edf(per_text="many"), "bad_edf"), "negative": (edf(per_text="-5"), "bad_edf"), "no samples": (edf(per_text="0", per=0), "bad_edf"),
    "0 s": (edf(seconds="0"), "bad_edf"), "nan s": (edf(seconds="nan"), "bad_edf"), "1e9 s": (edf(seconds="1e9"), "bad_edf"), "years": (edf(seconds="9999999"), "too_long"), "years, unsaid": (edf(seconds="9999999", claimed="-1"), "too_long"),
    "0 claimed": (edf(claimed="0"), "bad_edf"), "annotations only": (edf((), tals=lambda i: b"+0\x14\x14\0"), "no_signals")}

@pytest.mark.parametrize("name", CORPUS)
def test_refused(name, vault):
    data, code = CORPUS[name]
    for step in (100, 10**6):
        e = refused(code, lambda s=step: intake_file([data[i:i + s] for i in range(0, len(data), s)], vault, "input-1", "t/1", BIG))
        assert e.status in (415, 422) and empty(vault) and "upload" not in str(e) and "'two'" not in str(e)


def test_pauses_of_years(stager, tmp_path):
    "A file of 60 s with a pause in it of 30 years, which the reader doesn't believe, or of days: nothing fills it."
    path = tmp_path / "x.edf"
    paused = lambda gap: path.write_bytes(clean(edf(reserved="EDF+D", tals=lambda i: f"+{i if i < 30 else gap + i}\x14\x14\0".encode())))
    paused(200_000)
    refused("too_long", lambda: stage_night(path, told(stager), "1"))
    paused(10**9)
    assert stage_night(path, told(stager), "1")["recording"]["duration_s"] == 60


HEADER, GOOD = 256 * 4, named()

@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=12)), max_size=6), st.lists(st.tuples(st.integers(160, HEADER), st.sampled_from([b"-1", b"99999999", b"1e-6", b"nan", b"\0\0\0\0", b"\xff\xfe", b"0", b"EDF+D", b"%s%n"])), max_size=4), st.none() | st.integers(0, len(GOOD)))
def test_damaged_files(stager, tmp_path_factory, edits, fields, cut):
    "Whatever is wrong, it has a code."
    data = bytearray(GOOD)
    for at, piece in (*edits, *fields): data[at:at + len(piece)] = piece
    path = tmp_path_factory.mktemp("x") / "x.edf"
    try:
        path.write_bytes(clean(bytes(data[:cut])))
        result = stage_night(path, told(stager), "1", allow_missing=True)
    except PFTSleepError as e: assert job_error(e)["code"] != "internal" and not [w for w in ("Musterfrau", "Elfriede", "778812") if w in json.dumps(job_error(e))]
    else: json.dumps(result, allow_nan=False)
    finally: path.unlink(missing_ok=True)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=3000), st.booleans())
def test_garbage(data, like_edf):
    try: clean((b"0       " if like_edf else b"") + data)
    except RequestError as e: assert e.status in (415, 422)


# uploads

async def pieces(data: bytes, fail: Exception | None = None, wait: float = 0., after: int = 2):
    for i in range(0, len(data), 4096):
        if i // 4096 == after:
            if fail: raise fail
            if wait: await asyncio.sleep(wait)
        yield data[i:i + 4096]


def test_intake(vault):
    data = named()
    got = asyncio.run(intake(pieces(data), vault, "input-1", "t/1", len(data)))
    assert vault.get("input-1", "t/1") == clean(data) and got.size == len(data) and got.records == 60 and got.sha256 == __import__("hashlib").sha256(clean(data)).hexdigest()
    with pytest.raises(StoreError): vault.get("input-1", "other/1")
    assert asyncio.run(intake(pieces(data), vault, "input-2", "t/2", BIG)).sha256 == got.sha256


@pytest.mark.parametrize("how", ["aborted", "too large", "too slow", "not in time", "cancelled", "nonsense"])
def test_nothing_is_left_of_a_failed_upload(vault, how, monkeypatch):
    monkeypatch.setattr("pftsleep.apps.nights._PIECE", 4096) # so that something was written before
    data = named()
    run = lambda body, limit=BIG, **kw: asyncio.run(intake(body, vault, "input-1", "t/1", limit, **kw))
    if how == "aborted":
        with pytest.raises(ConnectionResetError): run(pieces(data, ConnectionResetError()))
    elif how == "too large": assert refused("too_large", lambda: run(pieces(data), 10000)).status == 413
    elif how == "too slow": assert refused("too_slow", lambda: run(pieces(data, wait=60), idle=.05)).status == 408
    elif how == "not in time": refused("too_slow", lambda: run(pieces(data, wait=60), total=.3))
    elif how == "nonsense": refused("bad_edf", lambda: run(pieces(data[:252] + b"abc " + data[256:])))
    else:
        async def main():
            task = asyncio.create_task(intake(pieces(data, wait=60), vault, "input-1", "t/1", BIG))
            while not list(vault.folder.rglob("*.part")): await asyncio.sleep(.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError): await task
        asyncio.run(main())
    assert empty(vault)


def test_a_full_disk(vault):
    "The system refuses to make the file any longer."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = __import__("signal").signal(__import__("signal").SIGXFSZ, __import__("signal").SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        e = refused("storage_unavailable", lambda: intake_file([edf(records=3000)], vault, "input-1", "t/1", BIG))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        __import__("signal").signal(__import__("signal").SIGXFSZ, old)
    assert e.status == 503 and e.retry_after and empty(vault)
    assert intake_file([edf()], vault, "input-1", "t/1", BIG).records == 60


def test_many_uploads_at_once(vault):
    "Each gets its own bytes."
    files = [edf(records=40 + i) for i in range(8)]
    async def main(): return await asyncio.gather(*(intake(pieces(f), vault, f"input-{i}", f"t/{i}", BIG) for i, f in enumerate(files)))
    assert [u.records for u in asyncio.run(main())] == [40 + i for i in range(8)]
    assert [vault.get(f"input-{i}", f"t/{i}") for i in range(8)] == [clean(f) for f in files]


def test_the_server_needs_no_torch_for_uploads():
    done = subprocess.run([sys.executable, "-c", "import sys, pftsleep.apps.nights; print([m for m in ('torch', 'lightning', 'fastapi') if m in sys.modules])"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# results

def test_result(result, stager, tmp_path):
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["id"] == "0" * 32 and result["kind"] == "night" and result["subject"] == "S-001" and result["about"]["statement"] == RESEARCH_USE and result["about"]["model"]["model_hash"] == "ab" * 32
    assert len(result["stages"]) == len(result["probabilities"]) == len(result["confidence"]) == 20 and result["epoch_seconds"] == 30 and result["onset_s"] == 0
    assert [max(p) for p in result["probabilities"]] == result["confidence"] and all(abs(sum(p) - 1) < 1e-3 for p in result["probabilities"])
    assert [c["name"] for c in result["recording"]["channels"]] == list(CHANNELS) and result["recording"]["channels"][0]["fs"] == 100
    s = result["spectrogram"]
    assert len(s["db"]) == 20 and {len(c) for c in s["db"]} == {len(s["frequencies"])} and s["frequencies"][0] < 1 and 29 < s["frequencies"][-1] <= 30 and s["seconds_per_column"] == 30
    write_edf(night(600), tmp_path / "n.edf")
    from pftsleep.apps.staging import stage_file
    h = stage_file(tmp_path / "n.edf", stager)[1]
    assert [Stage(x).name for x in h.stages] == result["stages"], "what `pftsleep stage` says"
    assert {k: v["value"] for k, v in result["statistics"].items()} == {k: None if v != v else round(v, 4) if isinstance(v, float) else v for k, v in sleep_statistics(h).items()}


def test_the_spectrogram_shows_what_is_there(stager):
    t = np.arange(30000) / 100
    rec = Recording("x", named_channels([array_channel("C4-M1", 50 * np.sin(2 * np.pi * 10.25 * t), 100., "uV", "EEG")]))
    s = night_result(rec, Hypnogram([0] * 10, 30.), told(stager), "1")["spectrogram"]
    assert {s["frequencies"][int(np.argmax(col))] for col in s["db"]} <= {10.0, 10.125, 10.25, 10.375, 10.5, 10.625} and s["channel"] == "C4-M1"


def test_gaps_are_null(stager):
    x = np.random.default_rng(0).standard_normal(30000).astype("float32")
    x[6000:9100] = np.nan
    rec = Recording("x", named_channels([array_channel("C4-M1", x, 100., "uV", "EEG")]), start=datetime(2024, 1, 1, 23))
    p = np.full((10, 5), .2, "float32"); p[2] = np.nan
    r = night_result(rec, Hypnogram([2, 2, -1, 2, 0, 0, 1, 4, 4, 3], 30., rec.start, probabilities=p), told(stager), "1")
    assert json.loads(json.dumps(r, allow_nan=False)) == r
    assert r["probabilities"][2] is None and r["confidence"][2] is None and r["stages"][2] == "UNSCORED" and r["spectrogram"]["db"][2] is None and r["spectrogram"]["db"][1] is not None
    for f in ("csv", "edf", "pdf", "json"): assert night_exports(r, f)[0]
    nothing = night_result(rec, Hypnogram([-1] * 10, 30.), told(stager), "1")
    assert nothing["statistics"]["tst_min"]["value"] is None and nothing["about"]["quality"]["mean_confidence"] is None
    for f in ("csv", "edf", "pdf", "json"): assert night_exports(nothing, f)[0]


# corrections

@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.lists(st.tuples(st.integers(0, 19), st.sampled_from(list(Stage.__members__))), max_size=12))
def test_corrections(result, changes):
    now, before = result, json.dumps(result)
    for epoch, stage in changes: now = correct(now, epoch, stage, "key-1")
    assert json.dumps(result) == before, "the old result isn't touched"
    expected = list(result["stages"])
    for epoch, stage in changes: expected[epoch] = stage
    assert now["stages"] == expected and model_stages(now) == result["stages"] and now["probabilities"] == result["probabilities"] and now["confidence"] == result["confidence"]
    assert {k: v["value"] for k, v in now["statistics"].items()} == {k: None if v != v else round(v, 4) if isinstance(v, float) else v for k, v in sleep_statistics(hypnogram_of(now)).items()}
    for c in now["corrections"]: assert set(c) == {"epoch", "from", "to", "by", "at"} and c["from"] != c["to"] and c["by"] == "key-1" and c["at"].endswith("Z")
    assert json.loads(json.dumps(now, allow_nan=False)) == now


def test_corrections_that_make_no_sense(result):
    for epoch in (-1, 20, 10**9, True, 1.5, "3", None): refused("no_such_epoch", lambda e=epoch: correct(result, e, "W", "k"))
    for stage in ("", "w", "S4", "4", "W\0"): refused("bad_stage", lambda s=stage: correct(result, 0, s, "k"))
    assert correct(result, 0, result["stages"][0], "k") == result, "nothing changes, nothing is written down"


def test_lights_stay(result):
    lit = result | {"lights": {"off": 60., "on": 540.}}
    now = correct(lit, 5, "N3" if result["stages"][5] != "N3" else "W", "k")
    assert now["statistics"]["lights_off_s"]["value"] == 60 and now["statistics"]["tib_min"]["value"] == 8 and now["statistics"]["lights_off_source"]["value"] == "file"


# exports

def test_exports(result, tmp_path):
    pyedflib = pytest.importorskip("pyedflib")
    now = correct(correct(result, 3, "REM", "k"), 4, "UNSCORED", "k")
    data, media, name = night_exports(now, "csv")
    table = pd.read_csv(io.BytesIO(data), keep_default_na=True)
    assert media == "text/csv" and name == f"night-{'0' * 32}.csv" and table["stage"].tolist() == now["stages"] and table["model_stage"].tolist() == result["stages"]
    assert table["clock"][1] == "2024-03-01 22:30:35" and table["p_W"].tolist() == [p[0] for p in result["probabilities"]] and table["onset_s"].tolist() == [30. * i for i in range(20)]
    path = tmp_path / "s.edf"
    path.write_bytes(night_exports(now, "edf")[0])
    h = read_hypnogram(path)
    assert [Stage(s).name for s in h.stages] == now["stages"] and h.start == datetime(2024, 3, 1, 22, 30, 5)
    with pyedflib.EdfReader(str(path)) as f: assert "Sleep stage R" in f.readAnnotations()[2]
    assert json.loads(night_exports(now, "json")[0]) == now
    pdf = night_exports(now, "pdf")
    assert pdf[0].startswith(b"%PDF") and len(re.findall(rb"/Type /Page\b", pdf[0])) == 2 and pdf[1] == "application/pdf" and pdf[0] == night_exports(now, "pdf")[0] and b"CreationDate" not in pdf[0]
    for bad in ("doc", "", "../csv"): refused("bad_format", lambda b=bad: night_exports(now, b))


def test_words_that_matplotlib_would_take_for_formulas(result):
    odd = result | dict(id="$\\frac{", warnings=["$x_{", "100 % $"], corrections=[{"epoch": 1, "from": "W", "to": result["stages"][1], "by": "$\\bad{", "at": "2026-01-01T00:00:00.000000Z"}] * 40)
    assert night_exports(odd, "pdf")[0].startswith(b"%PDF")


# the worker's part

@pytest.fixture
def place(tmp_path, vault, stager):
    "A registry with a model, a vault with a night, and the options of a worker."
    publish_model(save_stager(stager, tmp_path / "stager"), tmp_path / "models", "tiny", "1.0")
    intake_file([edf()], vault, "input-n1", "hospital/n1", BIG)
    (tmp_path / "scratch").mkdir()
    return dict(vault=str(tmp_path / "vault"), keyring=str(tmp_path / "keyring.json"), registry=str(tmp_path / "models"))

def a_job(attempts: int = 1, tenant: str = "hospital", **payload) -> Job:
    return Job("a" * 32, tenant, "key", "S-1", "night", "running", 0., "", attempts, "", "", dict(id="n1", input="input-n1", model="tiny", version="1.0") | payload)

def run(job: Job, place: dict, tmp_path: Path, beat=lambda progress, message: True): return night_job(job, JobReporter(beat, place, tmp_path / "scratch"))


def test_night_job(place, vault, tmp_path):
    said = []
    done = run(a_job(), place, tmp_path, lambda p, m: said.append((p, m)) or True)
    assert done == dict(result="result-n1-1", epochs=2, warnings=done["warnings"]) and said == sorted(said) and len(said) >= 5
    result = json.loads(vault.get("result-n1-1", "hospital/n1"))
    assert result["about"]["model"]["name"] == "tiny" and re.fullmatch("[0-9a-f]{64}", result["about"]["model"]["model_hash"]) and result["subject"] == "S-1" and result["id"] == "a" * 32
    assert night_exports(result, "pdf")[0].startswith(b"%PDF")
    again = run(a_job(2), place, tmp_path)
    assert again["result"] == "result-n1-2" and vault.names("result") == ["result-n1-2"], "what the lost attempt has left is gone"
    assert {k: v for k, v in json.loads(vault.get("result-n1-2", "hospital/n1")).items()} == result, "the same night, the same answer"
    assert records_of(vault, replace(a_job(2), result=again)) == ["input-n1", "result-n1-2"]


def test_a_cancelled_night_leaves_no_result(place, vault, tmp_path):
    for stop in ("decrypting", "reading", "staging", "summarising", "storing"):
        with pytest.raises(JobCancelled): run(a_job(), place, tmp_path, lambda p, m, s=stop: m != s)
        assert vault.names("result") == []
        for p in (tmp_path / "scratch").iterdir(): p.unlink()


def test_night_jobs_that_fail(place, vault, tmp_path):
    def code(**payload):
        with pytest.raises(PFTSleepError) as e: run(a_job(**payload), place, tmp_path)
        return job_error(e.value)["code"]
    assert code(version="9.9") == "registry_error" and code(input="input-n2") == "store_error" and code(channels=["C4-M1=nothing"]) == "channel_error" and code(channels=["nonsense"]) == "config_error"
    with pytest.raises(StoreError): run(a_job(tenant="other"), place, tmp_path)
    intake_file([edf(("Pulse", "Snore"))], vault, "input-n1", "hospital/n1", BIG)
    assert code() in ("channel_error", "model_error") and vault.names("result") == []


def test_a_night_from_upload_to_result(place, vault, tmp_path):
    "With a real worker process."
    queue = JobQueue(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    submit = lambda **payload: queue.submit("night", "hospital", "key", "S-1", dict(id="n1", input="input-n1", model="tiny", version="1.0") | payload)
    good, bad = submit(), submit(channels=["C4-M1=nothing"])
    with WorkerPool(1, WorkerSettings(f"sqlite:///{tmp_path / 'jobs.sqlite'}", {"night": "pftsleep.apps.nights:night_job"}, str(tmp_path / "scratch"), place, poll=.05)) as pool:
        end = time.monotonic() + 120
        while not (queue.get(good.id, "hospital").finished and queue.get(bad.id, "hospital").finished): assert time.monotonic() < end; time.sleep(.05)
        assert pool.restarts == 0
    done = queue.get(good.id, "hospital")
    assert done.state == "done" and len(json.loads(vault.get(done.result["result"], "hospital/n1"))["stages"]) == 2
    assert queue.get(bad.id, "hospital").error["code"] == "channel_error" and "EEG C4-M1" in queue.get(bad.id, "hospital").error["remedy"]
    assert not [p for p in (tmp_path / "scratch").rglob("*") if p.is_file()]
    queue.close()


# real files

@pytest.mark.skipif(not REAL.exists(), reason="../shared/realdata isn't here")
@pytest.mark.parametrize("path", sorted([*REAL.glob("*.edf"), *REAL.glob("*.bdf"), *REAL.glob("*.EDF")])[:20], ids=lambda p: p.name)
def test_real_files(path, tmp_path):
    "What `deidentify` accepts goes in, with the same samples."
    if path.stat().st_size > 8e6: pytest.skip("larger than 8 MB")
    data = path.read_bytes()
    try: out = clean(data)
    except RequestError as e: assert e.code in ("no_signals", "bad_edf", "too_long") and (e.code != "bad_edf" or len(read_edf(path).channels) == 0 or read_edf(path).duration == 0 or read_edf(path).issues); return
    (tmp_path / "x.edf").write_bytes(out)
    a, b = read_edf(path), read_edf(tmp_path / "x.edf")
    assert len(a.channels) == len(b.channels)
    for x, y in zip(a.channels.values(), b.channels.values(), strict=True):
        n = min(x.n_samples, y.n_samples)
        np.testing.assert_array_equal(x.samples(0, n), y.samples(0, n))
