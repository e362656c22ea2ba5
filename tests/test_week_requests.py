"""Weeks that are sent to a service: every refusal has its code, every number its source, and none of the older service's defects is here."""
import io
import json
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pftsleep.apps.week_requests import (
    BODY_LIMIT,
    MAX_EPOCHS,
    MEDIA,
    MODES,
    UNITS,
    WeekChoices,
    WeekInput,
    attended,
    parse_week,
    prepare_week,
    run_weeks,
    seven_digits,
    unpacked_bytes,
    week_windows,
)
from pftsleep.data.actigraphy import read_actigraphy
from pftsleep.data.recording import Kind, Recording, array_channel
from pftsleep.data.standardise import Standardiser, column_zscore, global_zscore, standardise
from pftsleep.data.weeks import WEEK, Week, to_minutes
from pftsleep.errors import ConfigError, PFTSleepError, RequestError
from pftsleep.evaluation.explanations import attention_profile, flatness
from pftsleep.evaluation.report import RESEARCH_USE
from pftsleep.evaluation.rhythm import RHYTHM_STATISTICS, rest_activity, simulate_activity
from pftsleep.evaluation.sleep_wake import cole_kripke, rescore, sleep_periods, sleep_regularity
from pftsleep.models.pat import PAT, WeekClassifier, ClassifierConfig, pat_config, published_form
from pftsleep.models.transformer import PatchConfig, PatchTransformer
from pftsleep.models.weights import load_published

SHARED = Path(__file__).parents[2] / "shared"
JSON, CSV, PARQUET = MEDIA
START = datetime(2024, 3, 1)
COUNTS = simulate_activity(21, seed=1)
few = settings(max_examples=20)


# --- bodies

def times(n: int, step: float = 60., start: datetime = START) -> list[str]: return [(start + timedelta(seconds=step * i)).isoformat() for i in range(n)]

def as_json(values, start="2024-03-01T00:00:00", unit="counts", epoch=60, **more) -> bytes:
    return json.dumps(dict(start=start, epoch_seconds=epoch, unit=unit, values=list(values)) | more).encode()

def as_rows(stamps, values, media: str, unit: str = "counts") -> bytes:
    "The same rows in any format."
    values = list(values)
    if media == JSON: return json.dumps(dict(unit=unit, data=[dict(timestamp=t, value=v) for t, v in zip(stamps, values, strict=True)])).encode()
    if media == CSV: return "\n".join([f"timestamp,{unit}", *(f"{t},{'' if v is None else v}" for t, v in zip(stamps, values, strict=True))]).encode()
    pq.write_table(pa.table({"timestamp": pa.array(list(stamps), pa.string()), unit: pa.array(values, pa.float64())}), out := io.BytesIO())
    return out.getvalue()

def week_json(values=COUNTS[:WEEK], **kwargs) -> bytes: return as_json([None if np.isnan(v) else v for v in np.asarray(values, float).tolist()], **kwargs)

def refusal(f, *args, **kwargs) -> RequestError:
    with pytest.raises(RequestError) as e: f(*args, **kwargs)
    assert 400 <= e.value.status < 500 and e.value.code and e.value.problem
    return e.value

def code_of(body: bytes, media: str, **kwargs) -> str: return refusal(parse_week, body, media, **kwargs).code


# --- models

def encoder(size="S", seed=0, **changes) -> PatchTransformer:
    torch.manual_seed(seed)
    return PatchTransformer(pat_config(size, **changes)).eval()

def published(size="S", seed=0) -> PatchTransformer:
    torch.manual_seed(seed)
    return PatchTransformer(published_form(getattr(PAT, size))).eval()

def serving(model, kind="week_encoder", scaler=None, manifest=None):
    return SimpleNamespace(kind=kind, model=model, scaler=scaler, manifest=manifest or {}, name="m", version="1", model_hash="0" * 64, about=lambda: dict(name="m", version="1", kind=kind, model_hash="0" * 64, recipe_hash="r", scaler_hash=None, fallback_from=None))

def some_weeks(n=6, start=START, unit="counts") -> list[Week]:
    return [Week(f"w{i}", f"s{i}", "study", simulate_activity(7, seed=50 + i).astype("float32"), np.zeros(WEEK, bool), start, unit) for i in range(n)]

@pytest.fixture(scope="module")
def pat(): return serving(published(), scaler=global_zscore(some_weeks()))

@pytest.fixture(scope="module")
def task(): # a head that was trained, in one short run
    from pftsleep.training.finetune import Examples, FinetuneConfig, finetune, plain_scaler
    weeks = [Week(f"w{i}", f"s{i}", "study", (simulate_activity(7, seed=i, bed=23. + 3 * (i % 2), rise=7. + 3 * (i % 2))).astype("float32"), np.zeros(WEEK, bool), START, "counts") for i in range(8)]
    by = global_zscore(weeks)
    x, pad = standardise(weeks, by)
    part = lambda rows: Examples(x[rows], np.array(rows) % 2, tuple(f"w{i}" for i in rows), tuple(f"s{i}" for i in rows), pad[rows], "study")
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        model = finetune(encoder(), part([0, 1, 2, 3]), part([4, 5, 6, 7]), folder, FinetuneConfig(mode="frozen", epochs=2, patience=2, learning_rate=1e-3), scaler=plain_scaler(by))
    return serving(model, "week_task", by)


# --- every refusal has its code

@few
@given(bad=st.sampled_from(["nan", "inf", "-inf", "NaN", "Infinity"]), place=st.integers(0, 4))
def test_not_finite(bad, place):
    values = ["1", "2", "3", "4", "5"]
    values[place] = bad
    assert code_of(("timestamp,counts\n" + "\n".join(f"{t},{v}" for t, v in zip(times(5), values, strict=True))).encode(), CSV) == "not_finite"
    x = np.arange(1., 6)
    x[place] = float(bad)
    e = refusal(parse_week, as_rows(times(5), x.tolist(), PARQUET), PARQUET)
    assert (e.code, e.where) == ("not_finite", f"{'value' if 'value' in e.where else 'counts'}[{place}]")
    assert code_of(as_json(x.tolist()), JSON) == "not_finite" # Python writes NaN, which is no JSON
    assert code_of(as_rows(times(5), x.tolist(), JSON), JSON) == "not_finite"
    assert code_of(b'{"unit": "counts", "values": [1e999]}', JSON) == "not_finite"

@few
@given(value=st.floats(-1e6, -1e-6), place=st.integers(0, 4), media=st.sampled_from(MEDIA))
def test_negative(value, place, media):
    x = np.arange(1., 6)
    x[place] = value
    for body in (as_rows(times(5), x.tolist(), media), *([as_json(x.tolist())] if media == JSON else [])):
        e = refusal(parse_week, body, media)
        assert e.code == "negative" and e.where.endswith(f"[{place}]") and "z-scores" in e.remedy

@few
@given(a=st.integers(1, 8), media=st.sampled_from(MEDIA))
def test_times_that_go_back_or_come_twice(a, media):
    stamps = times(10)
    back = stamps[:a] + stamps[a:][::-1] if a < 8 else [stamps[1], stamps[0], *stamps[2:]]
    assert code_of(as_rows(back, range(10), media), media) == "unsorted"
    assert code_of(as_rows([*stamps[:a], stamps[a - 1], *stamps[a:]], range(11), media), media) == "duplicated_timestamp"

@few
@given(step=st.sampled_from([7., 61., 90., 120., 300., 3600.]), off=st.integers(1, 59), media=st.sampled_from(MEDIA))
def test_wrong_cadence(step, off, media):
    assert code_of(as_rows(times(10, step), range(10), media), media) == "wrong_cadence"
    stamps = times(10)
    stamps[6:] = times(4, start=START + timedelta(seconds=360 + off))
    assert code_of(as_rows(stamps, range(10), media), media) == "wrong_cadence"

@pytest.mark.parametrize("epoch", [None, 0, -60, 120, 7, "60", True, [60], 1e-300])
def test_wrong_epochs(epoch): assert code_of(as_json([1, 2], epoch=epoch), JSON) == "wrong_cadence"

@few
@given(text=st.sampled_from(["2024-03-01T00:00:00Z", "2024-03-01T00:00:00+01:00", "2024-03-01 00:00-0500", "2024-03-01T00:00:00.5Z"]), media=st.sampled_from(MEDIA))
def test_zones_are_explained(text, media):
    stamps = times(3)
    stamps[1] = text
    e = refusal(parse_week, as_rows(stamps, [1, 2, 3], media), media)
    assert e.code == "bad_timestamp" and e.where.endswith("[1]") and "zone" in e.problem and "zone" in e.remedy
    assert "zone" in refusal(parse_week, as_json([1], start=text), JSON).problem

@few
@given(text=st.one_of(st.text("0123456789-:T ", max_size=20), st.sampled_from(["now", "NaT", "2024-02-30T00:00", "0001-01-01T00:00", "9999-12-31T23:59", "2024-W10-1", "1e5", "today"])))
def test_bad_times(text):
    try: datetime.strptime(text, "%Y-%m-%dT%H:%M")
    except ValueError: pass
    else: return # a time after all
    e = refusal(parse_week, as_json([1], start=text), JSON)
    assert e.code == "bad_timestamp" or datetime.fromisoformat(text)
    stamps = times(3)
    stamps[1] = text
    assert code_of(as_rows(stamps, [1, 2, 3], JSON), JSON) in ("bad_timestamp", "unsorted", "duplicated_timestamp", "wrong_cadence")

def test_a_parquet_file_with_a_zone_is_refused():
    pq.write_table(pa.table({"timestamp": pa.array([START, START + timedelta(minutes=1)], pa.timestamp("us", "Europe/Berlin")), "counts": [1., 2.]}), out := io.BytesIO())
    assert code_of(out.getvalue(), PARQUET) == "bad_timestamp"
    pq.write_table(pa.table({"timestamp": [1, 2], "counts": [1., 2.]}), out := io.BytesIO())
    assert code_of(out.getvalue(), PARQUET) == "bad_timestamp"

def test_no_start():
    assert code_of(b'{"unit": "counts", "epoch_seconds": 60, "values": [1]}', JSON) == "no_start"
    assert code_of(b"value\n1\n", CSV, unit="counts") == "no_start"
    pq.write_table(pa.table({"value": [1., 2.]}), out := io.BytesIO())
    assert code_of(out.getvalue(), PARQUET, unit="counts") == "no_start"

@few
@given(unit=st.one_of(st.text(max_size=30), st.sampled_from(["mg\r\nSet-Cookie: session=1", "counts\x00", "../../etc/passwd", "<script>alert(1)</script>", "Counts", "z-score", "${jndi:ldap://x}"]), st.none(), st.integers(), st.lists(st.integers(), max_size=2)))
def test_bad_unit(unit):
    if isinstance(unit, str) and unit in UNITS: return
    e = refusal(parse_week, as_json([1], unit=unit), JSON)
    assert e.code == "bad_unit" and (not isinstance(unit, str) or len(unit) < 4 or unit not in str(e))
    if isinstance(unit, str) and unit: assert code_of(b"timestamp,value\n2024-03-01T00:00,1\n2024-03-01T00:01,1\n", CSV, unit=unit) == "bad_unit"

def test_units_come_from_one_place():
    assert parse_week(b"timestamp,value\n2024-03-01T00:00,1\n2024-03-01T00:01,1\n", CSV, unit="mg").unit == "mg"
    assert code_of(b"timestamp,value\n2024-03-01T00:00,1\n", CSV) == "bad_unit"
    assert code_of(b"timestamp,mg\n2024-03-01T00:00,1\n", CSV, unit="counts") == "bad_unit"
    assert parse_week(week_json(), JSON, unit="counts").unit == "counts"

@few
@given(n=st.integers(1, WEEK - 1), media=st.sampled_from(["values", JSON, CSV, PARQUET]), mode=st.sampled_from(["embed", "explain", "rhythm"]))
def test_short_input_is_422_and_no_index_error(n, media, mode):
    "Defect 9."
    n = min(n, 300) if n % 2 else n
    body = as_json(COUNTS[:n].tolist()) if media == "values" else as_rows(times(n), COUNTS[:n].tolist(), media)
    def answer(): return run_weeks(mode, serving(published()), [parse_week(body, JSON if media == "values" else media)])
    e = refusal(answer)
    assert (e.code, e.status) == ("wrong_length", 422)

@pytest.mark.parametrize("body", [b'{"values": []}', b'{"unit": "counts", "start": "2024-03-01T00:00", "epoch_seconds": 60, "values": []}', b'{"unit": "counts", "data": []}'])
def test_nothing_at_all(body): refusal(lambda: prepare_week("rhythm", None, parse_week(body, JSON)))

@pytest.mark.parametrize("more", [dict(name="x"), dict(data=[]), dict(Start="2024"), {"__proto__": 1}])
def test_unknown_field(more): assert code_of(as_json([1], **more), JSON) == "unknown_field"

def test_unknown_columns():
    assert code_of(b"timestamp,counts,patient\n2024-03-01T00:00,1,Jane\n", CSV) == "unknown_field"
    assert code_of(json.dumps(dict(unit="counts", data=[dict(timestamp="2024-03-01T00:00", value=1, name="Jane")])).encode(), JSON) == "unknown_field"
    pq.write_table(pa.table({"timestamp": [START], "counts": [1.], "patient": ["Jane"]}), out := io.BytesIO())
    assert code_of(out.getvalue(), PARQUET) == "unknown_field"

@pytest.mark.parametrize("body,media", [(b"", JSON), (b"{}", JSON), (b"[]", JSON), (b"null", JSON), (b"{", JSON), (b"\xff\xfe\x00", JSON), (b'{"unit": "counts", "values": "1,2"}', JSON), (b'{"unit": "counts", "values": ["1"]}', JSON),
    (b'{"unit": "counts", "values": [true]}', JSON), (b'{"unit": "counts", "values": [[1]]}', JSON), (b'{"unit": "counts", "data": [1]}', JSON), (b'{"unit": "counts", "data": [{"timestamp": "2024-03-01T00:00"}]}', JSON),
    (b"timestamp,counts\n2024-03-01T00:00,one\n", CSV), (b"timestamp,counts\n2024-03-01T00:00\n", CSV), (b"timestamp,counts\n2024-03-01T00:00,1,1\n", CSV), (b"\x00" * 100, CSV), (b"PAR1" * 10, PARQUET), (b"PK\x03\x04", PARQUET), (b"<xml/>", PARQUET)])
def test_malformed(body, media): assert code_of(body, media) in ("malformed", "bad_unit", "no_start")

@pytest.mark.parametrize("media", ["", "text/html", "application/xml", "application/json\r\nX: 1", "application/zip"])
def test_other_media(media): assert refusal(parse_week, b"{}", media).status == 415

def test_too_large():
    "100 MB, a nesting of 100 000, many objects, and too many values: refused before much is done."
    for media in MEDIA:
        e = refusal(parse_week, bytes(100 * 10**6), media)
        assert (e.code, e.status) == ("too_large", 413)
    assert code_of(b"[" * 100_000, JSON) == "malformed"
    assert code_of(b'{"a":' * 100_000, JSON) == "malformed"
    assert code_of(b'{"unit": "counts", "data": [' + b"{}," * 500_000 + b"{}]}", JSON) == "too_large"
    assert code_of(b'{"unit": "counts", "values": [' + b"1," * MAX_EPOCHS + b"1]}", JSON) == "too_large"
    assert BODY_LIMIT < 100 * 10**6

def test_parquet_bombs():
    n = 140_000
    for how in (dict(compression="zstd"), dict(compression="gzip", data_page_version="2.0")):
        pq.write_table(pa.table({"timestamp": pa.array(np.arange(n), pa.timestamp("us")), "counts": pa.array(np.zeros(n)), "x": ["x" * 500] * n}), out := io.BytesIO(), use_dictionary=False, **how)
        assert unpacked_bytes(out.getvalue(), pq.ParquetFile(out).metadata) > n * 500
        assert code_of(out.getvalue(), PARQUET) in ("too_large", "unknown_field")
    pq.write_table(pa.table({"timestamp": pa.array(np.zeros(MAX_EPOCHS + 1, "int64"), pa.timestamp("us")), "counts": pa.array(np.zeros(MAX_EPOCHS + 1))}), out := io.BytesIO())
    assert len(out.getvalue()) < 10**5 and code_of(out.getvalue(), PARQUET) == "too_large"

@pytest.mark.parametrize("codec", ["none", "snappy", "zstd", "gzip", "brotli", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_page_headers_are_read_right(codec, version, dictionary):
    "The sum over the headers is what the writer says in the footer."
    table = pa.table({"timestamp": pa.array([START + timedelta(minutes=i) for i in range(5000)]), "counts": pa.array(COUNTS[:5000])})
    pq.write_table(table, out := io.BytesIO(), compression=codec, data_page_version=version, use_dictionary=dictionary, data_page_size=4096, row_group_size=2000)
    found = pq.ParquetFile(out).metadata
    told = sum(found.row_group(i).column(j).total_uncompressed_size for i in range(found.num_row_groups) for j in range(2))
    assert .5 * told < unpacked_bytes(out.getvalue(), found) <= told
    np.testing.assert_array_equal(parse_week(out.getvalue(), PARQUET).values, COUNTS[:5000])

@few
@given(place=st.integers(0, 3000), size=st.integers(3000, 6000))
def test_too_little_coverage(place, size):
    x = COUNTS[:WEEK].copy()
    x[place:place + size] = np.nan
    sent = parse_week(week_json(x), JSON)
    for mode in ("embed", "rhythm"):
        for impute in (True, False): assert refusal(prepare_week, mode, serving(encoder()), sent, WeekChoices(impute=impute)).code == "too_little_coverage"

def test_a_gap_of_years_is_no_recording():
    stamps = [*times(5), *times(5, start=datetime(2034, 1, 1))]
    assert code_of(as_rows(stamps, range(10), CSV), CSV) == "too_little_coverage"

@pytest.mark.parametrize("choice", [dict(window="best"), dict(window="../all"), dict(min_coverage=0.), dict(min_coverage=float("nan"))])
def test_bad_option(choice): assert refusal(WeekChoices, **choice).code == "bad_option"


# --- whatever comes, only refusals; and none repeats what was sent

@settings(max_examples=60)
@given(body=st.one_of(st.binary(max_size=300), st.text(max_size=200).map(str.encode), st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda s: st.lists(s, max_size=4) | st.dictionaries(st.sampled_from(["start", "unit", "values", "data", "epoch_seconds", "timestamp", "value", "x"]), s, max_size=5), max_leaves=12).map(lambda v: json.dumps(v).encode())), media=st.sampled_from(MEDIA))
def test_garbage(body, media):
    try: parse_week(body, media, unit="counts")
    except RequestError as e: assert e.status < 500

@settings(max_examples=60)
@given(data=st.data(), media=st.sampled_from(MEDIA))
def test_damaged_bodies(data, media):
    body = bytearray(as_rows(times(40), range(40), media))
    for _ in range(data.draw(st.integers(1, 6))): body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    body = bytes(body[:data.draw(st.integers(0, len(body)))]) if data.draw(st.booleans()) else bytes(body)
    try: assert isinstance(parse_week(body, media), WeekInput)
    except RequestError as e: assert e.status < 500

def test_text_that_is_no_utf8():
    body = as_rows(times(40), range(40), PARQUET)
    for old in (b"counts", b"2024-03-01T00:00:00", b"timestamp"): # every place in which the name or a text stands
        for where in [i for i in range(len(body)) if body.startswith(old, i)]:
            try: parse_week(body[:where + 2] + b"\xff" + body[where + 3:], PARQUET)
            except RequestError as e: assert e.status == 422

CANARY = "Zebedee-7781"

@pytest.mark.parametrize("body,media", [(as_json([1], unit=CANARY), JSON), (as_json([1], start=CANARY), JSON), (as_json([CANARY]), JSON), (as_json([1], **{CANARY: 1}), JSON), (f'{{"{CANARY}"'.encode(), JSON),
    (f"timestamp,{CANARY}\n".encode(), CSV), (f"timestamp,counts\n{CANARY},1\n".encode(), CSV), (f"timestamp,counts\n2024-03-01T00:00,{CANARY}\n".encode(), CSV), (as_rows([CANARY, CANARY], [1, 2], PARQUET), PARQUET)])
def test_refusals_do_not_repeat_what_was_sent(body, media):
    e = refusal(parse_week, body, media)
    assert CANARY not in str(e) + repr(e.args) and e.__cause__ is None and e.__suppress_context__


# --- what is read is what was sent

@few
@given(n=st.integers(2, 50), seed=st.integers(0, 999), gone=st.sets(st.integers(0, 49), max_size=10), media=st.sampled_from(MEDIA))
def test_values_and_gaps_stay_at_their_times(n, seed, gone, media):
    x = np.random.default_rng(seed).gamma(1, 300, n).round(3)
    sent = [None if i in gone else v for i, v in enumerate(x.tolist())]
    expected = np.array([np.nan if v is None else v for v in sent])
    found = parse_week(as_rows(times(n), sent, media), media)
    np.testing.assert_array_equal(found.values, expected)
    assert found.start == START and found.unit == "counts" and found.timestamps_ok
    there = [i for i in range(n) if i not in gone or i in (0, n - 1)] # rows that aren't there are gaps, too
    if len(there) > 1 and set(np.diff(there).tolist()) & {1}:
        again = parse_week(as_rows([times(n)[i] for i in there], [x[i] for i in there], media), media)
        if np.bincount(np.diff(there)).argmax() == 1: np.testing.assert_array_equal(np.flatnonzero(~np.isnan(again.values)), there)
    if media == JSON: np.testing.assert_array_equal(parse_week(as_json(sent), JSON).values, expected)

@few
@given(epoch=st.sampled_from([5., 10., 15., 20., 30.]), unit=st.sampled_from(UNITS), offset=st.integers(0, 11))
def test_short_epochs_are_brought_to_minutes_as_the_library_does(epoch, unit, offset):
    x, start = np.random.default_rng(0).gamma(1, 300, 240).round(), START + timedelta(seconds=offset * epoch)
    sent = parse_week(as_json(x.tolist(), start=start.isoformat(), unit=unit, epoch=epoch), JSON)
    minutes = to_minutes(Recording("x", {"Activity": array_channel("Activity", x, 1 / epoch, unit, Kind.ACTIVITY)}, start), "sum" if unit in ("counts", "MIMS", "steps") else "mean")
    np.testing.assert_array_equal(sent.values, minutes["Activity"].samples())
    assert sent.start == minutes.start and sent.epoch_seconds == epoch and any("brought to minutes" in w for w in sent.warnings)

@pytest.mark.parametrize("seconds", [0, 10, 29, 30, 31, 59])
def test_minutes_between_the_minutes(seconds):
    x, start = COUNTS[:100], START + timedelta(hours=3, seconds=seconds)
    sent = parse_week(as_json(x.tolist(), start=start.isoformat()), JSON)
    minutes = to_minutes(Recording("x", {"Activity": array_channel("Activity", x, 1 / 60, "counts", Kind.ACTIVITY)}, start))
    assert sent.start == minutes.start and bool(sent.warnings) == bool(seconds)
    np.testing.assert_array_equal(sent.values, minutes["Activity"].samples())

def test_semicolons_tabs_and_marks_of_order():
    rows = "timestamp{0}counts\r\n2024-03-01 00:00{0}1\r\n2024-03-01 00:01{0}2\r\n"
    for between in ",;\t":
        for mark in (b"", b"\xef\xbb\xbf"): assert parse_week(mark + rows.format(between).encode(), "text/csv; charset=utf-8").values.tolist() == [1, 2]
    assert parse_week(b'"timestamp";"counts"\n2024-03-01 00:00;"1,5"\n2024-03-01 00:01;2\n', CSV).values.tolist() == [1.5, 2]

@few
@given(days=st.integers(7, 23), hour=st.integers(0, 23), extra=st.integers(0, 1439), window=st.sampled_from(["latest", "all"]), midnight=st.booleans())
def test_windows(days, hour, extra, window, midnight):
    sent = WeekInput(np.zeros(days * 1440 + extra), START + timedelta(hours=hour, minutes=7 * (hour > 0)), "counts", "")
    try: starts = week_windows(sent, window, midnight)
    except RequestError as e:
        assert midnight and e.code == "not_at_midnight" and days * 1440 + extra - (-(hour * 60 + 7 * (hour > 0)) % 1440) < WEEK
        return
    assert np.diff(starts).tolist() == [WEEK] * (len(starts) - 1) and starts[0] >= 0 and starts[-1] + WEEK <= len(sent.values)
    assert len(sent.values) - starts[-1] - WEEK < (1440 if midnight else 1) # the newest are kept
    assert not midnight or all((sent.start + timedelta(minutes=s)).time() == datetime.min.time() for s in starts)
    if window == "all": assert starts[0] < WEEK + (1440 if midnight else 0) # and all that there are
    assert window == "all" or len(starts) == 1


# --- the model's numbers

def test_embedding_is_that_of_the_model(pat):
    sent = parse_week(week_json(), JSON)
    reply, = run_weeks("embed", pat, [sent])
    week = Week("x", "", None, sent.values, np.zeros(WEEK, bool), START, "counts")
    x, _ = standardise([week], pat.scaler)
    with torch.no_grad(): by_hand = pat.model(torch.from_numpy(x))[0].mean(0).numpy()
    np.testing.assert_allclose(reply["result"]["weeks"][0]["embedding"], by_hand, atol=1e-6)
    with_tokens, = run_weeks("embed", pat, [sent], WeekChoices(tokens=True))
    with torch.no_grad(): np.testing.assert_allclose(with_tokens["result"]["weeks"][0]["tokens"], pat.model(torch.from_numpy(x))[0].numpy(), atol=1e-6)
    assert "tokens" not in reply["result"]["weeks"][0]

@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/fixtures")
def test_embedding_of_published_weights():
    "Defects 1, 5, 12, 13: weights that were loaded, and what the original makes of them."
    folder = SHARED / "fixtures/pat"
    model, ref = load_published(folder / "PAT-S_random_weights.h5"), np.load(folder / "ref_S.npz")
    x = next(ref[k] for k in ref.files if ref[k].ndim == 2 and ref[k].shape[1] == WEEK)
    with torch.no_grad():
        tokens, _ = attended(model, torch.from_numpy(x.astype("float32")))
        direct = model(torch.from_numpy(x.astype("float32")))
    np.testing.assert_allclose(tokens.values[:, 0], direct, atol=5e-6)
    reply, = run_weeks("embed", serving(model), [parse_week(week_json(), JSON)])
    values = COUNTS[:WEEK].astype("float32").astype("float64")
    with torch.no_grad(): by_hand = model(torch.from_numpy(((values - values.mean()) / values.std()).astype("float32"))[None])[0].mean(0)
    np.testing.assert_allclose(reply["result"]["weeks"][0]["embedding"], by_hand, atol=1e-6)

CONFIGS = {"published S": lambda: published(), "published M": lambda: published("M"), "published L": lambda: published("L"), "ours S": lambda: encoder(), "conv": lambda: encoder(conv=True),
    "tiny, rotary, normalised inside": lambda: PatchTransformer(PatchConfig(channels=("Activity",), rate=1 / 60, patch=20, d_model=32, n_heads=2)).eval(),
    "batch norm, learned": lambda: PatchTransformer(PatchConfig(channels=("Activity",), rate=1 / 60, patch=60, d_model=32, n_heads=2, position="learned", max_patches=168, norm="batch", pre_norm=False, final_norm=True, upstream=True)).eval()}

@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "L" in n else n for n in CONFIGS])
def test_explanation_is_that_of_the_library(name):
    "Batched, with sums only, against one week after the other with all that can be kept."
    torch.manual_seed(1)
    model = CONFIGS[name]()
    n = 1 if "L" in name else 2
    x, hidden = torch.randn(n, WEEK), torch.zeros(n, WEEK, dtype=torch.bool)
    hidden[-1, 2000:3000] = True
    for pad in (None, None if model.config.upstream else hidden):
        with torch.inference_mode(): tokens, seen = attended(model, x, pad)
        expected = attention_profile(model, x, START, None if pad is None else pad.numpy())
        gone = None if pad is None else pad.reshape(n, -1, model.config.patch).all(-1)
        given = seen.double().mean(1)
        given = given if gone is None else given.masked_fill(gone, 0)
        np.testing.assert_allclose(given / given.sum(-1, keepdim=True), expected.patch, atol=1e-6)
        with torch.no_grad(): plain = model.encode(x[:, None], pad)
        np.testing.assert_allclose(tokens.values, plain.values, atol=2e-5)
        assert torch.equal(tokens.pad, plain.pad)

def test_what_an_explanation_says(pat):
    sent = parse_week(week_json(), JSON)
    week = run_weeks("explain", pat, [sent])[0]["result"]["weeks"][0]
    x = torch.from_numpy(prepare_week("explain", pat, sent).x)
    expected = attention_profile(pat.model, x, START)
    np.testing.assert_allclose(week["profile"], expected.patch[0], atol=1e-6)
    np.testing.assert_allclose(week["day_profile"], expected.day[0], atol=1e-6)
    flat = flatness(expected.patch).iloc[0]
    assert week["flatness"] == dict(max_mean=pytest.approx(flat.max_mean, 1e-6), entropy=pytest.approx(flat.entropy, 1e-6), flat=bool(flat.flat))
    assert (len(week["profile"]), len(week["day_profile"]), week["patch_minutes"]) == (560, 1440, 18) and sum(week["profile"]) == pytest.approx(1, abs=1e-5)

def test_one_tensor_for_a_batch(pat, monkeypatch):
    "Defect 7, and nobody gets another's numbers."
    sent = [parse_week(week_json(COUNTS[i * 1440:i * 1440 + WEEK]), JSON) for i in range(5)]
    alone = [run_weeks(mode, pat, [s])[0] for mode in ("embed", "explain") for s in sent]
    calls = []
    monkeypatch.setattr(pat.model, "embed", lambda p, f=pat.model.embed: calls.append(len(p)) or f(p))
    together = [r for mode in ("embed", "explain") for r in run_weeks(mode, pat, sent)]
    assert calls == [5, 5]
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(a["result"]["weeks"][0]["embedding"], b["result"]["weeks"][0]["embedding"], atol=2e-6)
        assert a["about"] == b["about"]
    assert len({tuple(r["result"]["weeks"][0]["embedding"]) for r in together[:5]}) == 5

def test_missing_minutes_of_one_do_not_touch_another():
    "Weeks with and without gaps, and one of several weeks, in one call."
    served, holes = serving(encoder()), COUNTS[:WEEK].copy()
    holes[3000:3500] = np.nan
    sent = [parse_week(week_json(v), JSON) for v in (COUNTS[:WEEK], holes, COUNTS)]
    replies = run_weeks("explain", served, [prepare_week("explain", served, s, WeekChoices("all")) for s in sent])
    assert [len(r["result"]["weeks"]) for r in replies] == [1, 1, 3]
    for s, r in zip(sent, replies, strict=True): # to the bit
        assert orjson.dumps(run_weeks("explain", served, [s], WeekChoices("all"))[0]["about"]) == orjson.dumps(r["about"])
        np.testing.assert_allclose(run_weeks("explain", served, [s], WeekChoices("all"))[0]["result"]["weeks"][0]["embedding"], r["result"]["weeks"][0]["embedding"], atol=2e-6)
    assert replies[1]["about"]["quality"]["missing_minutes"] == 500
    assert all(v == 0 for v in replies[1]["result"]["weeks"][0]["profile"][168:194])

def test_same_bytes_same_answer(pat):
    body = week_json()
    for mode in ("embed", "explain", "rhythm"):
        assert orjson.dumps(run_weeks(mode, pat, [parse_week(body, JSON)])) == orjson.dumps(run_weeks(mode, pat, [parse_week(body, JSON)]))

@settings(max_examples=8)
@given(place=st.integers(0, WEEK - 1))
def test_an_edited_minute_changes_hash_and_answer(place):
    "Defect 8: also in the middle."
    served, x = serving(published(), scaler=SCALER), COUNTS[:WEEK].copy()
    x[place] += 5000
    one, other = (parse_week(week_json(v), JSON) for v in (COUNTS[:WEEK], x))
    assert one.sha256 != other.sha256
    a, b = (run_weeks("embed", served, [s])[0]["result"]["weeks"][0]["embedding"] for s in (one, other))
    assert a != b

SCALER = Standardiser("global", np.array([200.]), np.array([400.]), "counts", "study", 10, "split", "train", True, frozenset())

def test_it_is_scaled_once():
    "Defect 9: what the model sees is (x - mean) / sd of its scaler, and nothing else was done to it."
    sent = parse_week(week_json(), JSON)
    np.testing.assert_allclose(prepare_week("embed", serving(published(), scaler=SCALER), sent).x[0], (sent.values - 200) / 400, rtol=1e-5, atol=1e-6)
    inside = serving(PatchTransformer(PatchConfig(channels=("Activity",), rate=1 / 60, patch=20)).eval())
    ready = prepare_week("embed", inside, sent)
    np.testing.assert_array_equal(ready.x[0], sent.values.astype("float32"))
    assert ready.quality["standardised"]["strategy"] == "inside the model"
    alone = prepare_week("embed", serving(published()), sent)
    assert abs(alone.x.mean()) < 1e-4 and alone.x.std() == pytest.approx(1, abs=1e-4) and alone.quality["standardised"]["strategy"] == "subject"
    assert any("by itself" in w for w in alone.quality["warnings"])

def test_the_scaler_must_fit():
    assert refusal(prepare_week, "embed", serving(published(), scaler=SCALER), parse_week(week_json(unit="mg"), JSON)).code == "bad_unit"
    several = serving(published(), scaler={"a": SCALER, "b": SCALER})
    assert refusal(prepare_week, "embed", several, parse_week(week_json(), JSON)).code == "no_cohort"
    assert prepare_week("embed", several, parse_week(week_json(), JSON), WeekChoices(cohort="b")).quality["standardised"]["strategy"] == "global"
    columns = serving(published(), scaler=column_zscore(some_weeks(3)))
    late = parse_week(week_json(start="2024-03-01T07:00:00"), JSON)
    assert refusal(prepare_week, "embed", columns, late).code == "not_at_midnight"
    ready = prepare_week("embed", columns, parse_week(week_json(COUNTS[:WEEK + 1440], start="2024-03-01T07:00:00"), JSON))
    assert ready.weeks[0].start == datetime(2024, 3, 2) and ready.quality["unused_minutes"] == 1440

@settings(max_examples=6)
@given(hour=st.integers(1, 23))
def test_the_clock_matters(hour):
    "Defect 9: times were ignored."
    served, body = serving(published(), scaler=SCALER), week_json()
    at, later = (run_weeks("explain", served, [parse_week(b, JSON)])[0]["result"]["weeks"][0]["day_profile"] for b in (body, body.replace(b"T00:00:00", f"T{hour:02}:00:00".encode())))
    np.testing.assert_allclose(np.roll(at, 60 * hour), later, atol=1e-9)
    assert at != later
    rhythms = [run_weeks("rhythm", None, [parse_week(b, JSON)])[0]["result"]["weeks"][0]["statistics"]["L5_onset_h"]["value"] for b in (body, body.replace(b"T00:00:00", f"T{hour:02}:00:00".encode()))]
    assert (rhythms[1] - rhythms[0]) % 24 == pytest.approx(hour)

def test_every_size_answers():
    "Defect 3: every request for the large model failed."
    sent = parse_week(week_json(), JSON)
    for size, n in (("S", 560), ("M", 560), ("L", 1120)): assert len(run_weeks("explain", serving(published(size)), [sent])[0]["result"]["weeks"][0]["profile"]) == n


# --- missing minutes

def test_imputation_only_when_asked_and_told():
    x = COUNTS[:WEEK].copy()
    x[5000:5500] = np.nan
    sent = parse_week(week_json(x), JSON)
    assert refusal(prepare_week, "embed", serving(published()), sent).code == "missing_minutes"
    hidden = prepare_week("embed", serving(encoder()), sent)
    assert (hidden.quality["missing_minutes"], hidden.quality["imputed_fraction"], hidden.quality["imputation"]) == (500, 0, None) and hidden.weeks[0].pad[5000:5500].all()
    filled = prepare_week("embed", serving(published()), sent, WeekChoices(impute=True)).quality
    assert filled["missing_minutes"] == 0 and filled["imputed_fraction"] == pytest.approx(500 / WEEK) and filled["coverage"] == pytest.approx(1 - 500 / WEEK) and "other days" in filled["imputation"]

def test_imputation_never_uses_what_isnt_there():
    x = COUNTS[:WEEK].copy()
    x.reshape(7, 1440)[:, 600:700] = np.nan
    sent = parse_week(week_json(x), JSON)
    assert refusal(prepare_week, "embed", serving(published()), sent, WeekChoices(impute=True)).code == "missing_minutes"
    assert prepare_week("embed", serving(encoder()), sent, WeekChoices(impute=True)).quality["missing_minutes"] == 700

def test_bad_weeks_among_good_ones_are_left_out_and_named():
    x = COUNTS.copy()
    x[WEEK:2 * WEEK] = np.nan
    reply, = run_weeks("rhythm", None, [parse_week(week_json(x), JSON)], WeekChoices("all"))
    assert [w["start"] for w in reply["result"]["weeks"]] == ["2024-03-01T00:00:00", "2024-03-15T00:00:00"] and any("left out" in w for w in reply["about"]["quality"]["warnings"])


# --- the rhythm

@few
@given(seed=st.integers(0, 999), hour=st.integers(0, 23), holes=st.integers(0, 1500))
def test_rhythm_is_that_of_the_library(seed, hour, holes):
    rng, x = np.random.default_rng(seed), simulate_activity(7, seed=seed).round(2)
    x[rng.choice(WEEK, holes, replace=False)] = np.nan
    start = START + timedelta(hours=hour)
    week = run_weeks("rhythm", None, [parse_week(week_json(x, start=start.isoformat()), JSON)])[0]["result"]["weeks"][0]
    expected = rest_activity(x, 60., start)
    assert {k: v["value"] for k, v in week["statistics"].items()} == {k: v if isinstance(v, str) or np.isfinite(v) else None for k, v in expected.items()}
    assert all(week["statistics"][s.key][k] == getattr(s, k) for s in RHYTHM_STATISTICS for k in ("unit", "definition", "source"))
    bars = x.reshape(-1, 10)
    means = [float(f"{np.nanmean(b):.7g}") if np.isfinite(b).any() else None for b in bars]
    assert week["activity"]["minutes"] == 10 and [v is None for v in week["activity"]["values"]] == [v is None for v in means]
    assert [v for v in week["activity"]["values"] if v is not None] == pytest.approx([v for v in means if v is not None], rel=1e-5)

@pytest.mark.skipif(not (SHARED / "realdata/actigraphy/depresjon").exists(), reason="needs ../shared/realdata")
def test_real_weeks():
    "A file of Depresjon as a table, and its last week."
    files = sorted((SHARED / "realdata/actigraphy/depresjon").rglob("con*_*.csv"))
    if not files: pytest.skip("no file of Depresjon")
    recording = read_actigraphy(files[0])
    x, start = recording["Activity"].samples().astype("float64"), recording.start
    n = len(x) - len(x) % 1440
    if n < WEEK: pytest.skip("it is shorter than a week")
    sent = parse_week(as_rows(times(n, start=start), [None if np.isnan(v) else v for v in x[:n].tolist()], CSV), CSV)
    reply, = run_weeks("rhythm", None, [sent])
    expected = rest_activity(x[n - WEEK:n], 60., start + timedelta(minutes=n - WEEK))
    assert {k: v["value"] for k, v in reply["result"]["weeks"][0]["statistics"].items()} == expected
    print(files[0].name, n, {k: expected[k] for k in ("IS", "IV", "RA")}, len(reply["result"]["weeks"][0]["sleep_wake"]["periods"]))

def test_the_scorer_is_named_and_invents_no_stages():
    "Defects 2 and 4: a constant list of stages, scores of a head that was never trained."
    sent = parse_week(week_json(), JSON)
    week = run_weeks("rhythm", None, [sent])[0]["result"]["weeks"][0]
    found = week["sleep_wake"]
    assert found["scorer"]["name"] == "Cole-Kripke" and "Cole 1992" in found["scorer"]["source"]
    scores = rescore(cole_kripke(sent.values))
    assert [p["in_bed"] for p in found["periods"]] == [t.isoformat() for t in sleep_periods(scores, START).in_bed]
    assert found["SRI"]["value"] == sleep_regularity(scores, 60.)["SRI"] and sum(found["minutes"].values()) == WEEK
    for mode in ("embed", "explain", "rhythm"):
        text = json.dumps(run_weeks(mode, serving(published()), [sent])).lower()
        assert not any(word in text for word in ("rem\"", "n1", "stage", "depression", "mania", "risk", "confidence", "insight"))

@pytest.mark.parametrize("unit", [u for u in UNITS if u != "counts"])
def test_the_scorer_is_for_counts(unit):
    reply, = run_weeks("rhythm", None, [parse_week(week_json(unit=unit), JSON)])
    assert reply["result"]["weeks"][0]["sleep_wake"] is None and any("counts" in w for w in reply["about"]["quality"]["warnings"])

def test_a_watch_on_a_table():
    sent = parse_week(week_json(np.zeros(WEEK)), JSON)
    assert refusal(run_weeks, "rhythm", None, [sent]).code == "no_rhythm"
    assert any("never changes" in w for w in run_weeks("embed", serving(published()), [sent])[0]["about"]["quality"]["warnings"])


# --- predictions

def test_no_prediction_without_a_trained_head(task):
    "Defect 2."
    from pftsleep.training.finetune import TaskHead, TaskHeadConfig, TaskModel
    sent = parse_week(week_json(), JSON)
    untrained = TaskModel(encoder(), TaskHead(TaskHeadConfig(96)), scaler=dict(kind="standardiser")).eval()
    classifier = WeekClassifier(ClassifierConfig(pat_config())).eval()
    for served in (serving(encoder()), serving(encoder(), "week_task"), serving(untrained, "week_task", SCALER), serving(classifier, "week_task", SCALER), serving(task.model, "week_encoder", SCALER)):
        e = refusal(run_weeks, "predict", served, [sent])
        assert (e.code, e.status) == ("no_trained_head", 409)

def test_a_trained_head_answers_with_its_own_figures(task):
    from pftsleep.training.finetune import Examples, predict, scaler_of
    sent = parse_week(week_json(), JSON)
    reply, = run_weeks("predict", task, [sent])
    x, pad = standardise([Week("x", "", None, sent.values, np.zeros(WEEK, bool), START, "counts")], scaler_of(task.model))
    p = predict(task.model, Examples(x, np.array([0]), ("x",), ("x",), pad))[0]
    answer = reply["result"]["weeks"][0]["probabilities"]
    assert answer["yes"] == pytest.approx(p, abs=1e-6) and sum(answer.values()) == pytest.approx(1, abs=1e-6) and reply["result"]["classes"] == ["no", "yes"]
    assert reply["result"]["evaluation"]["figures"]["val_auc"] == task.model.provenance["val_auc"] and "no figure of other people" in reply["result"]["evaluation"]["note"]
    again, = run_weeks("predict", SimpleNamespace(**vars(task) | dict(scaler=None)), [sent]) # the model's own scaler is part of it
    assert again["result"] == reply["result"]

def test_a_head_of_several_classes(task):
    from pftsleep.training.finetune import TaskHead, TaskHeadConfig, TaskModel
    torch.manual_seed(0)
    model = TaskModel(encoder(), TaskHead(TaskHeadConfig(96, 3)), ("a", "b", "c"), provenance=task.model.provenance).eval()
    answer = run_weeks("predict", serving(model, "week_task", SCALER, dict(evaluation=dict(val_auc=.7, test=dict(auc=float("nan"))))), [parse_week(week_json(), JSON)])[0]["result"]
    assert sum(answer["weeks"][0]["probabilities"].values()) == pytest.approx(1, abs=1e-6) and answer["evaluation"]["figures"]["test"] == dict(auc=None) and "test is of others" in answer["evaluation"]["note"]

@pytest.mark.parametrize("mode", [m for m in MODES if m not in ("rhythm", "predict")])
def test_a_model_of_nights_doesnt_read_weeks(mode):
    sent = parse_week(week_json(), JSON)
    assert refusal(run_weeks, mode, serving(encoder(), "stager"), [sent]).status == 409
    night = PatchTransformer(PatchConfig(channels=("EEG", "EOG"), rate=100., patch=600)).eval()
    assert refusal(run_weeks, mode, serving(night), [sent]).status == 409
    deep = PatchTransformer(PatchConfig(channels=("Activity",), rate=1 / 60, patch=20, residual_attention=True)).eval()
    assert mode == "embed" or refusal(run_weeks, mode, serving(deep), [sent]).code == "no_attention"


# --- answers

def numbers(v):
    if isinstance(v, dict): yield from (n for w in v.values() for n in numbers(w))
    elif isinstance(v, list | tuple): yield from (n for w in v for n in numbers(w))
    elif isinstance(v, float): yield v
    else: assert v is None or isinstance(v, str | int | bool), type(v)

@pytest.mark.parametrize("mode", MODES)
def test_every_number_is_finite_or_null(mode, task):
    served = task if mode == "predict" else serving(encoder(), scaler=SCALER)
    for x in (COUNTS, np.where(np.arange(len(COUNTS)) % 11, COUNTS, np.nan), COUNTS * 1e3 % 1e7, np.r_[np.zeros(len(COUNTS) - 1), 1.]):
        try: reply = run_weeks(mode, served, [parse_week(week_json(x), JSON)], WeekChoices("all", tokens=True, impute=True))[0]
        except RequestError as e: assert mode == "rhythm" and e.code == "no_rhythm"; continue
        assert all(np.isfinite(n) for n in numbers(reply)) and json.loads(orjson.dumps(reply)) == reply
        about = reply["about"]
        assert about["statement"] == RESEARCH_USE and about["software"]["name"] == "pftsleep" and about["software"]["version"]
        assert (about["model"] is None) == (mode == "rhythm") and {"unit", "start", "coverage", "imputed_fraction", "missing_minutes", "warnings"} <= about["quality"].keys()

@given(x=st.lists(st.floats(-1e20, 1e20) | st.sampled_from([float("nan"), float("inf"), 0.]), min_size=1, max_size=20))
def test_seven_digits(x):
    for given_, told in zip(x, seven_digits(np.array(x)), strict=True):
        assert told is None if not np.isfinite(given_) else told == pytest.approx(given_, rel=5.1e-7, abs=1e-22) and (abs(given_) < 1e-15 or len(f"{told!r}".split("e")[0].replace(".", "").replace("-", "").strip("0")) <= 7)

def test_modes_dont_mix(pat):
    ready = prepare_week("embed", pat, parse_week(week_json(), JSON))
    with pytest.raises(ConfigError): run_weeks("explain", pat, [ready])
    with pytest.raises(ConfigError): prepare_week("dream", pat, parse_week(week_json(), JSON))
    assert run_weeks("embed", pat, []) == []

def test_a_model_of_the_registry(tmp_path):
    "The real thing: published, verified, and asked."
    registry = pytest.importorskip("pftsleep.apps.registry")
    model = encoder()
    model.save_pretrained(tmp_path / "source")
    try: registry.publish_model(tmp_path / "source", tmp_path / "models", "pat-s", "1.0")
    except PFTSleepError as e: pytest.skip(f"the registry refuses a bare encoder: {e.problem}")
    served = registry.Registry(tmp_path / "models").get("pat-s")
    reply, = run_weeks("embed", served, [parse_week(week_json(), JSON)])
    own, = run_weeks("embed", serving(model), [parse_week(week_json(), JSON)])
    assert reply["result"] == own["result"] and reply["about"]["model"] == json.loads(orjson.dumps(served.about())) and reply["about"]["model"]["model_hash"]

def test_no_training_framework_is_needed():
    code = "import sys; import pftsleep.apps.week_requests, pftsleep.apps.telemetry; assert not [m for m in sys.modules if m.startswith('lightning')], 'lightning'"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]).stderr == ""
