"Whatever is sent: a refusal with a code, nothing kept, nothing of it repeated, and no more memory than allowed."
import asyncio
import functools
import gzip
import io
import json
import logging
import re
import socket
import tempfile
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("fastapi")
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from serving import Running, night_edf, registry_with, week_body, week_values
from test_nights_service import edf
from test_service_access import EDF, JSON, ROUTES, World, resident

from pftsleep.apps import service as module

MARK, NUMBER = "Musterfrau4711", 918273.25 # stand for somebody's name and values: they may come back nowhere
CSV, PARQUET = {"Content-Type": "text/csv"}, {"Content-Type": "application/vnd.apache.parquet"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    w = World(tmp_path_factory.mktemp("world"), task=True, max_upload=5 << 20, max_body=2 << 20)
    w.done = w.staged()
    return w

@pytest.fixture
def quiet(world, caplog):
    "The service; afterwards nothing was kept and nothing repeated in logs."
    caplog.set_level(logging.DEBUG)
    before = sorted(world.service.vault.names()), world.service.queue.depths()
    yield world
    assert (sorted(world.service.vault.names()), world.service.queue.depths()) == before
    assert not [p for p in world.service.vault.folder.rglob("*") if p.suffix == ".part"]
    told = "\n".join(f"{r.getMessage()} {vars(r)}" for r in caplog.records)
    assert MARK not in told and str(NUMBER) not in told
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR], "something escaped"

def refused(reply, *codes: str) -> dict:
    "A refusal that is the caller's fault, in the one form."
    assert 400 <= reply.status_code < 500, (reply.status_code, reply.text[:300])
    told = reply.json()
    assert reply.headers["content-type"] == "application/problem+json" and told["status"] == reply.status_code and told["request_id"] == reply.headers["x-request-id"]
    assert re.fullmatch(r"[a-z][a-z_]{2,40}", told["code"]) and told["detail"] and reply.headers["x-research-use"], told
    assert not codes or told["code"] in codes, told
    assert MARK not in reply.text and str(NUMBER) not in reply.text and MARK not in str(reply.headers)
    assert "Traceback" not in reply.text and "/work" not in reply.text and tempfile.gettempdir() + "/" not in reply.text
    return told

def altered(f) -> bytes: # the body of a good week, changed
    told = json.loads(week_body(1))
    return json.dumps(f(told) or told).encode()

def with_value(i: int, value, f=None): return altered(lambda t: t["values"].__setitem__(i, value))

def rows(times, values) -> list[dict]: return [dict(timestamp=t, value=v) for t, v in zip(times, values, strict=True)]

def minutes(n: int = 10_080) -> list[str]: return [t.isoformat() for t in (np.datetime64("2026-03-02T00:00:00") + np.arange(n) * np.timedelta64(1, "m")).tolist()]

def stamped(times=None, values=None, **more) -> bytes: return json.dumps(dict(data=rows(times or minutes(), values or week_values(1)), unit="counts") | more).encode()

def table(times=None, values=None, head: str = "timestamp,value", between: str = ",") -> bytes:
    return "\n".join([head.replace(",", between), *(f"{t}{between}{v}" for t, v in zip(times or minutes(), values or week_values(1), strict=False))]).encode()

def parquet(columns=None, **how) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns or dict(timestamp=pa.array(np.array(minutes(), "datetime64[us]")), value=week_values(1))), out, **how)
    return out.getvalue()

def swapped(x: list, i: int, j: int) -> list: return [x[j] if k == i else x[i] if k == j else v for k, v in enumerate(x)]

def bomb(n: int) -> bytes: # zeros, packed
    return parquet(dict(timestamp=pa.array(np.zeros(n, "int64"), pa.timestamp("us")), value=pa.array(np.zeros(n))), compression="zstd")

XML = b'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "aaaaaaaaaa">' + b"".join(b'<!ENTITY a%d "%s">' % (i, b"&a%d;" % (i - 1) * 10 if i else b"&a;" * 10) for i in range(9)) + b"]><l>&a8;</l>"

def zipped(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z: z.writestr("night.edf", data)
    return out.getvalue()

WEEKS = { # name -> body, headers, codes
    "nan": (altered(lambda t: None).replace(b"3.0", b"NaN", 1), JSON, "not_finite"), "infinity": (altered(lambda t: None).replace(b"3.0", b"Infinity", 1), JSON, "not_finite"),
    "1e999": (altered(lambda t: None).replace(b"3.0", b"1e999", 1), JSON, "not_finite malformed"), "negative": (with_value(77, -NUMBER), JSON, "negative"), "absurd": (with_value(77, NUMBER * 1e6), JSON, "out_of_range"),
    "text among values": (with_value(77, MARK), JSON, "malformed"), "true among values": (with_value(77, True), JSON, "malformed"), "a list among values": (with_value(77, [NUMBER]), JSON, "malformed"),
    "huge integer": (altered(lambda t: None).replace(b"3.0", b"9" * 5000, 1), JSON, "malformed not_finite out_of_range"), "surrogate": (with_value(3, "\ud800"), JSON, "malformed"), "nothing missing but all": (altered(lambda t: t.update(values=[None] * 10_080)), JSON, "too_little_coverage"),
    "an hour": (altered(lambda t: t.update(values=t["values"][:60])), JSON, "wrong_length"), "one minute short": (altered(lambda t: t.update(values=t["values"][:-1])), JSON, "wrong_length"), "no values": (altered(lambda t: t.update(values=[])), JSON, "wrong_length"),
    "values a word": (altered(lambda t: t.update(values=MARK)), JSON, "malformed"), "values null": (altered(lambda t: t.update(values=None)), JSON, "malformed"), "no start": (altered(lambda t: t.pop("start") and None), JSON, "no_start"),
    "start with a zone": (altered(lambda t: t.update(start="2026-03-02T00:00:00+01:00")), JSON, "bad_timestamp"), "start of another kind": (altered(lambda t: t.update(start=[MARK])), JSON, "bad_timestamp"), "start in year 9999": (altered(lambda t: t.update(start="9999-12-31T23:59:00")), JSON, "bad_timestamp"),
    "start a word": (altered(lambda t: t.update(start=MARK)), JSON, "bad_timestamp"), "epoch of 0": (altered(lambda t: t.update(epoch_seconds=0)), JSON, "wrong_cadence"), "epoch of an hour": (altered(lambda t: t.update(epoch_seconds=3600)), JSON, "wrong_cadence"),
    "epoch null": (altered(lambda t: t.update(epoch_seconds=None)), JSON, "wrong_cadence"), "epoch -60": (altered(lambda t: t.update(epoch_seconds=-60)), JSON, "wrong_cadence"), "no unit": (altered(lambda t: t.pop("unit") and None), JSON, "bad_unit"),
    "unknown unit": (altered(lambda t: t.update(unit=MARK)), JSON, "bad_unit"), "unit a list": (altered(lambda t: t.update(unit=[MARK])), JSON, "bad_unit"), "unknown field": (altered(lambda t: t.update({MARK: NUMBER})), JSON, "unknown_field"),
    "both forms": (stamped(values=week_values(1), **{"start": "2026-03-02T00:00:00"}), JSON, "unknown_field"), "unsorted": (stamped(swapped(minutes(), 50, 51)), JSON, "unsorted"), "duplicated": (stamped([*minutes()[:-1], minutes()[-2]]), JSON, "duplicated_timestamp"),
    "other cadence": (stamped([*minutes()[:-1], minutes()[-1][:-2] + "17"]), JSON, "wrong_cadence"), "a time missing": (stamped([*minutes()[:-1], None]), JSON, "bad_timestamp"), "a time with a zone": (stamped([*minutes()[:-1], minutes()[-1] + "Z"]), JSON, "bad_timestamp"),
    "31 February": (stamped([*minutes()[:-1], "2026-02-31T00:00:00"]), JSON, "bad_timestamp"), "a time a word": (stamped([*minutes()[:-1], MARK]), JSON, "bad_timestamp"), "more in an entry": (json.dumps(dict(data=[dict(timestamp=minutes()[0], value=1, name=MARK)] * 3, unit="counts")).encode(), JSON, "unknown_field"),
    "entries are words": (json.dumps(dict(data=[MARK] * 3, unit="counts")).encode(), JSON, "malformed"), "no JSON": (MARK.encode(), JSON, "malformed"), "cut JSON": (week_body(1)[:-7], JSON, "malformed"), "empty": (b"", JSON, "malformed"),
    "a list": (b"[1,2]", JSON, "malformed"), "null": (b"null", JSON, "malformed"), "a number": (str(NUMBER).encode(), JSON, "malformed"), "deep lists": (b"[" * 200_000, JSON, "malformed too_large"), "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, JSON, "malformed too_large"),
    "deep values": (b'{"values":' + b"[" * 900 + b"]" * 900 + b"}", JSON, "malformed bad_unit"), "not UTF-8": (b'{"start":"\xff\xfe"}', JSON, "malformed"), "UTF-16": (week_body(1).decode().encode("utf-16"), JSON, "malformed"), "two in one": (week_body(1) + week_body(1), JSON, "malformed"),
    "too large": (b"[" + b"1," * (1 << 20) + b"1]", JSON, "too_large"), "duplicate keys": (b'{"unit":"counts",' + week_body(1)[1:].replace(b'"unit":"counts"', b'"unit":"%s"' % MARK.encode()), JSON, "bad_unit"),
    "no type": (week_body(1), {}, "unsupported_media_type"), "another type": (week_body(1), {"Content-Type": "application/xml"}, "unsupported_media_type"), "form": (week_body(1), {"Content-Type": "multipart/form-data; boundary=x"}, "unsupported_media_type"),
    "type of a name": (week_body(1), {"Content-Type": MARK}, "unsupported_media_type"), "packed JSON": (gzip.compress(week_body(1)), JSON | {"Content-Encoding": "gzip"}, "malformed unsupported_media_type"), "XML bomb": (XML, CSV, "no_start malformed unknown_field"), "XML bomb as JSON": (XML, JSON, "malformed"),
    "csv without head": (table(head=f"{MARK},{NUMBER}"), CSV, "no_start"), "csv of a column": (table(head="timestamp", values=week_values(1)), CSV, "malformed"), "csv of a word": (table(values=[*week_values(1)[:-1], MARK], head="timestamp,counts"), CSV, "malformed"), "csv nan": (table(values=[*week_values(1)[:-1], "nan"], head="timestamp,counts"), CSV, "not_finite malformed"),
    "csv inf": (table(values=[*week_values(1)[:-1], "-inf"], head="timestamp,counts"), CSV, "not_finite malformed negative"), "csv negative": (table(values=[*week_values(1)[:-1], -NUMBER], head="timestamp,counts"), CSV, "negative"), "csv of names": (table(head=f"timestamp,value,{MARK}"), CSV, "unknown_field"), "csv unsorted": (table(swapped(minutes(), 9, 10), head="timestamp,counts"), CSV, "unsorted"),
    "csv twice": (table([*minutes()[:-1], minutes()[-2]], head="timestamp,counts"), CSV, "duplicated_timestamp"), "csv short": (table(minutes(99), head="timestamp,counts"), CSV, "wrong_length"), "csv of NUL": (table(head="timestamp,counts") + b"\n\0,\0", CSV, "malformed bad_timestamp"), "csv in Latin": (b"timestamp,counts\n2026-03-02T00:00:00,\xe9\n", CSV, "malformed"),
    "csv quote that never ends": (b'timestamp,counts\n"' + b"a" * 100_000, CSV, "malformed bad_timestamp"), "csv line without end": (b"a" * 1_000_000, CSV, "no_start malformed"), "csv of nothing": (b"\n" * 1_000_000, CSV, "no_start malformed wrong_length"), "csv of commas": (b"timestamp,counts\n" + b",\n" * 900_000, CSV, "bad_timestamp malformed too_large"),
    "formula": (table(values=[*week_values(1)[:-1], "=HYPERLINK(1)"], head="timestamp,counts"), CSV, "malformed"), "parquet of text": (b"PAR1" + MARK.encode() * 99 + b"PAR1", PARQUET, "malformed"), "cut parquet": (parquet()[:-50], PARQUET, "malformed"), "parquet bomb": (bomb(40_000_000), PARQUET, "too_large"),
    "parquet nan": (parquet(dict(timestamp=pa.array(np.array(minutes(), "datetime64[us]")), counts=[*week_values(1)[:-1], float("nan")])), PARQUET, "not_finite"), "parquet of words": (parquet(dict(timestamp=minutes(9), counts=[MARK] * 9)), PARQUET, "malformed"),
    "parquet with a zone": (parquet(dict(timestamp=pa.array(np.array(minutes(9), "datetime64[us]")).cast(pa.timestamp("us", "UTC")), counts=[1.] * 9)), PARQUET, "bad_timestamp"), "parquet in parquet": (parquet(dict(timestamp=[[1]] * 9, counts=[[[NUMBER]]] * 9)), PARQUET, "bad_timestamp malformed unknown_field"),
    "parquet of many columns": (parquet({f"{MARK}{i}": [1.] for i in range(300)}), PARQUET, "unknown_field no_start malformed"), "zip as parquet": (zipped(b"x"), PARQUET, "malformed"),
}

@pytest.mark.parametrize("name", WEEKS)
def test_weeks_that_are_refused(quiet, name):
    body, headers, codes = WEEKS[name]
    told = refused(quiet.week("rhythm", body, headers={"Content-Type": ""} | headers, subject=MARK), *codes.split())
    refused(quiet.week("embed", body, headers={"Content-Type": ""} | headers), *codes.split(), "bad_unit")
    if told["code"] == "too_large": assert told["status"] == 413
    if told["code"] == "unsupported_media_type": assert told["status"] == 415


NIGHTS = { # name -> body, codes
    "empty": (b"", "empty_body"), "a word": (MARK.encode(), "bad_edf not_edf"), "a word, long": (MARK.encode() * 99, "not_edf"), "zip": (zipped(night_edf()), "not_edf"), "gzip": (gzip.compress(night_edf()), "not_edf"), "zip bomb": (zipped(bytes(50_000_000)), "not_edf"),
    "XML bomb": (XML * 3, "not_edf"), "JSON": (week_body(), "not_edf"), "PDF": (b"%PDF-1.7" + bytes(999), "not_edf"), "header only": (night_edf()[:int(night_edf()[184:192])], "bad_edf"), "cut in the header": (night_edf()[:500], "bad_edf"), "half a record": (night_edf()[:int(night_edf()[184:192]) + 50], "bad_edf"),
    "no signals": (edf(n_signals="0"), "bad_edf no_signals"), "negative signals": (edf(n_signals="-5"), "bad_edf"), "9999 signals": (edf(n_signals="9999"), "bad_edf"), "signals a word": (edf(n_signals="abcd"), "bad_edf"), "records of nan s": (edf(seconds="nan"), "bad_edf"), "records of inf s": (edf(seconds="inf"), "bad_edf"),
    "records of -1 s": (edf(seconds="-1"), "bad_edf"), "records of 1e300 s": (edf(seconds="1e300"), "bad_edf too_long"), "samples a word": (edf(per_text="many"), "bad_edf"), "no samples": (edf(per_text="0"), "bad_edf no_signals"), "samples 99999999": (edf(per_text="99999999"), "bad_edf"),
    "year-long": (edf(claimed="99999999"), "too_long bad_edf"), "only annotations": (edf(labels=(), tals=lambda i: f"+{i}\x14\x14\0".encode()), "no_signals bad_edf"), "NUL": (b"0       " + bytes(5000), "bad_edf"), "spaces": (b"0" + b" " * 5000, "bad_edf"), "0xff": (b"\xff" * 5000, "not_edf bad_edf"),
    "too large": (night_edf() + bytes(6 << 20), "too_large"), "name of the person among the samples": (edf(patient=f"X F X {MARK}", samples=(MARK.encode() * 40)[:400]), "identity"),
}

@pytest.mark.parametrize("name", NIGHTS)
def test_nights_that_are_refused(quiet, name):
    body, codes = NIGHTS[name]
    refused(quiet.ask("POST", "/v1/nights", headers=EDF, content=body, params=dict(subject=MARK)), *codes.split())


QUERIES = ("model=../../etc/passwd", "model=%2e%2e%2fmodels", f"model={MARK}", "model=", "version=../1.0", "version=%00", "version=1.0%0d%0aX-Evil:1", f"window={MARK}", "tokens=perhaps", f"impute={MARK}", "min_coverage=nan", "min_coverage=-1", "min_coverage=1e999", f"cohort={MARK}", f"unit={MARK}", f"model={'a' * 5000}",
    f"subject={'a' * 5000}", "min_coverage=", "window=latest&window=wrong")

@pytest.mark.parametrize("query", QUERIES)
def test_queries_that_are_refused(quiet, query):
    reply = quiet.ask("POST", f"/v1/weeks/embed?{query}", headers=JSON, content=week_body())
    if query in ("model=", f"cohort={MARK}", "impute=true"): assert reply.status_code == 200 and MARK not in reply.text # the only one; a cohort that no model asks for
    else: refused(reply)

@pytest.mark.parametrize("channels", [MARK, f"{MARK}=EEG", "=", "C4-M1=", "=EEG2", f"C4-M1={MARK},C4-M1=b", "C4-M1=a\r\nX-Evil: 1", "a" * 5000])
def test_channels_that_are_refused(quiet, channels): refused(quiet.ask("POST", "/v1/nights", headers=EDF, content=night_edf(), params=dict(channels=channels)), "bad_channels", "invalid")

@pytest.mark.parametrize("path", ["/v1/nights/..%2f..%2fkeys.json", "/v1/nights/%00", "/v1/results/..%2Fkeyring", "/v1/jobs/%2e%2e", "/v1/nights/" + "f" * 3000, f"/v1/jobs/{MARK}", "/v1/results/' OR 1=1 --", "/v1/jobs/%25s", "/v1/jobs/%f0%9f%98%b4", "/v1/nights/{id}/export?format=exe",
    "/v1/nights/{id}/export?format=..%2fpdf", f"/v1/nights/{{id}}/export?format={MARK}", "/v1/jobs?limit=0", "/v1/jobs?limit=999999999999", f"/v1/jobs?limit={MARK}", "/static/..%2f..%2fkeys.json", "/static/%2e%2e/service.py", "//etc/passwd", "/v1//me", f"/{MARK}"])
def test_paths_that_are_refused(quiet, path): refused(quiet.ask("GET", path.replace("{id}", quiet.done)))

@pytest.mark.parametrize("body,codes", [(b"", "invalid"), (b"{", "invalid malformed"), (b"null", "invalid"), (b"[]", "invalid"), (b'{"epoch":0}', "invalid"), (b'{"epoch":-1,"stage":"W"}', "invalid"), (b'{"epoch":"0","stage":"W"}', "invalid"), (b'{"epoch":true,"stage":"W"}', "invalid"), (b'{"epoch":1.5,"stage":"W"}', "invalid"),
    (b'{"epoch":99999,"stage":"W"}', "no_such_epoch"), (b'{"epoch":' + b"9" * 5000 + b',"stage":"W"}', "invalid malformed no_such_epoch"), (b'{"epoch":0,"stage":"N4"}', "invalid"), (b'{"epoch":0,"stage":"' + MARK.encode() + b'"}', "invalid"), (b'{"epoch":0,"stage":"W","' + MARK.encode() + b'":1}', "invalid"),
    (b'{"epoch":0,"stage":"W","after":7}', "changed_meanwhile"), (b'{"epoch":0,"stage":"W","after":-1}', "invalid"), (b'{"\\ud800":0,"epoch":0,"stage":"W"}', "invalid"), (b'{"epoch":NaN,"stage":"W"}', "invalid malformed"), (b"[" * 60_000, "invalid malformed"), (b'{"epoch":0,' + b" " * 70_000 + b'"stage":"W"}', "too_large")])
def test_corrections_that_are_refused(quiet, body, codes):
    before = quiet.ask("GET", f"/v1/nights/{quiet.done}").content
    refused(quiet.ask("POST", f"/v1/nights/{quiet.done}/corrections", headers=JSON, content=body), *codes.split())
    assert quiet.ask("GET", f"/v1/nights/{quiet.done}").content == before

@pytest.mark.parametrize("body", [dict(name=""), dict(name="a" * 500), dict(name="a\nb"), dict(name="=cmd|' /C'!A0"), dict(name="<script>"), dict(roles=[]), dict(roles=[MARK]), dict(roles=["admin"] * 5), dict(roles="admin"), dict(days=0), dict(days=-1), dict(days=1e9), dict(days="5"), dict(tenant="ward-8"), dict(name=None), dict(name=["a"])])
def test_new_keys_that_are_refused(quiet, body):
    before = quiet.service.keys.list()
    quiet.key("admin")
    refused(quiet.ask("POST", "/v1/keys", "admin", json=dict(name="a", roles=["auditor"]) | body))
    assert len(quiet.service.keys.list()) <= len(before) + 1

@pytest.mark.parametrize("kind", [{"Content-Type": "text/plain"}, {"Content-Type": ""}, {"Content-Type": "application/x-www-form-urlencoded"}])
def test_a_correction_of_another_type(quiet, kind): refused(quiet.ask("POST", f"/v1/nights/{quiet.done}/corrections", headers=kind, content=b'{"epoch":0,"stage":"W"}'), "unsupported_media_type", "invalid")


# below the client: bytes as they come

def talk(w, path: str, headers=(), pieces=(b"",), method: str = "POST", role: str | None = "clinician", gone: bool = False, stall: bool = False, query: bytes = b"") -> tuple[int, dict, bytes, int]:
    "Status, headers, body, and how many pieces were read. The caller goes away, or falls silent, after the last piece."
    left, sent, taken = list(pieces), [], [0]
    async def receive():
        if not left: # nothing comes any more
            if gone: return {"type": "http.disconnect"}
            await asyncio.sleep(3600)
        taken[0] += 1
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left) or gone or stall}
    async def send(m): sent.append(m)
    head = [(k.lower().encode(), v.encode("latin-1")) for k, v in w.head(role).items()] + [(k.lower().encode(), v if isinstance(v, bytes) else v.encode("latin-1")) for k, v in headers]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": query, "root_path": "", "headers": head, "client": ("127.0.0.1", 1), "server": ("test", 80)}
    asyncio.run(asyncio.wait_for(w.app(scope, receive, send), 30))
    start = next(m for m in sent if m["type"] == "http.response.start")
    return start["status"], {k.decode(): v for k, v in start["headers"]}, b"".join(m.get("body", b"") for m in sent if m["type"] == "http.response.body"), taken[0]

EVIL = (b"x\r\nX-Evil: 1", b"x\nSet-Cookie: a=b", b"x\r\n\r\n<html>", b"\0", b"a b", b"\xff\xfe", b"a" * 300, b"../../etc/passwd", b"%0d%0aX-Evil:1", MARK.encode() + b" ")

@pytest.mark.parametrize("value", EVIL)
def test_request_ids_that_arent(quiet, value):
    status, headers, body, _ = talk(quiet, "/v1/me", [("X-Request-ID", value)], method="GET")
    assert status == 200 and re.fullmatch(rb"[\w-]{1,64}", headers["x-request-id"]) and headers["x-request-id"] not in value and "x-evil" not in headers and "set-cookie" not in headers
    status, headers, body, _ = talk(quiet, "/v1/nothing", [("X-Request-ID", value)], method="GET")
    assert status == 404 and json.loads(body)["request_id"].encode() == headers["x-request-id"] and MARK.encode() not in body

def test_a_request_id_that_is_one(quiet):
    assert quiet.client.get("/livez", headers={"X-Request-ID": "night-17_b"}).headers["x-request-id"] == "night-17_b"

@pytest.mark.parametrize("value", [v for v in EVIL if v != b"../../etc/passwd" and not v.startswith(b"%0d")])
def test_idempotency_keys_that_arent(quiet, value):
    status, headers, body, taken = talk(quiet, "/v1/nights", [("Idempotency-Key", value), *EDF.items()], [night_edf()])
    assert status == 422 and json.loads(body)["code"] == "bad_idempotency_key" and not taken and "x-evil" not in headers and MARK.encode() not in body

@pytest.mark.parametrize("length", [b"9" * 5000, b"9" * 18, b"-1", b"", b"1e3", b"\xb2", b"0x10", b"5, 6", b" 7"])
def test_content_lengths_that_arent(quiet, length):
    "A server in front has its own opinion; ours is that nothing falls over."
    for path, kind in (("/v1/weeks/rhythm", JSON), ("/v1/nights", EDF)):
        status, _, body, _ = talk(quiet, path, [("Content-Length", length), *kind.items()], [b"{}"])
        assert 400 <= status < 500 and json.loads(body)["code"], (path, body)
        if set(length) == {ord("9")}: assert status == 413

@pytest.mark.parametrize("path,kind,limit", [("/v1/weeks/rhythm", JSON, 2 << 20), ("/v1/weeks/embed", CSV, 2 << 20), ("/v1/nights", EDF, 5 << 20), ("/v1/keys", JSON, 1 << 16), ("/v1/nights/{id}/corrections", JSON, 1 << 16)])
def test_bodies_without_an_end(quiet, path, kind, limit):
    "No Content-Length: reading stops soon after the limit, and so does the memory."
    size, role = 1 << 14, "admin" if "keys" in path else "clinician"
    first = [night_edf()[:1024] + bytes(size - 1024)] if "nights" in path and "corrections" not in path else []
    pieces = [*first, *[b" " * size] * (16 * limit // size)]
    quiet.key(role)
    tracemalloc.start()
    status, _, body, taken = talk(quiet, path.replace("{id}", quiet.done), kind.items(), pieces, role=role)
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert status == 413 and json.loads(body)["code"] == "too_large" and taken * size <= limit + (2 << 20) + 2 * size and peak < 4 * limit + (8 << 20)

@pytest.mark.parametrize("path,kind,role", [("/v1/keys", JSON, "admin"), ("/v1/nights/{id}/corrections", JSON, "clinician"), ("/v1/weeks/rhythm", JSON, "clinician"), ("/v1/nights", EDF, "clinician")])
def test_strangers_bodies_arent_read(quiet, path, kind, role):
    status, _, _, taken = talk(quiet, path.replace("{id}", quiet.done), kind.items(), [b" " * 1000] * 100, role=None)
    assert status == 401 and taken == 0
    status, _, _, taken = talk(quiet, path.replace("{id}", quiet.done), kind.items(), [b" " * 1000] * 100, role="auditor")
    assert status == 403 and taken == 0

@pytest.mark.parametrize("path,kind,start", [("/v1/weeks/rhythm", JSON, b'{"values":['), ("/v1/nights", EDF, None)])
def test_callers_that_go_away(quiet, path, kind, start):
    status, _, body, _ = talk(quiet, path, kind.items(), [start or night_edf()[:20_000]], gone=True)
    assert (status, json.loads(body)["code"]) == (400, "aborted")

@pytest.mark.parametrize("path,kind,start", [("/v1/weeks/rhythm", JSON, b'{"values":['), ("/v1/nights", EDF, None)])
def test_callers_that_fall_silent(quiet, monkeypatch, path, kind, start):
    "After 30 s; here after a fraction of one."
    monkeypatch.setattr(module, "pieces", functools.partial(module.pieces, patience=.05))
    status, _, body, _ = talk(quiet, path, kind.items(), [start or night_edf()[:20_000]], stall=True)
    assert (status, json.loads(body)["code"]) == (408, "too_slow")


def peak_mb(call) -> float: # MB above what was there
    "Peak of the resident memory during a call, the pages of compiled code included."
    try: Path("/proc/self/clear_refs").write_text("5")
    except OSError: pytest.skip("this kernel doesn't tell the peak of the memory")
    read = lambda name: int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    before = read("VmRSS")
    call()
    return read("VmHWM") - before

@pytest.mark.parametrize("name", ["parquet bomb", "deep lists", "deep objects", "csv of commas", "too large", "csv of nothing"])
def test_memory_of_bombs(world, name):
    body, headers, codes = WEEKS[name]
    assert peak_mb(lambda: refused(world.week("rhythm", body, headers=headers), *codes.split())) < 150

def test_large_tables_in_small_parquet_stay_bounded(world):
    "A hundred row groups and a dictionary page of 512 MB of one repeated string."
    one = pa.array(["x" * (1 << 20)] * 60)
    body = parquet(dict(timestamp=one, counts=pa.array(np.zeros(60))), compression="zstd", use_dictionary=False, data_page_size=1 << 26)
    assert len(body) < 1 << 20
    assert peak_mb(lambda: refused(world.week("rhythm", body, headers=PARQUET), "too_large", "bad_timestamp", "malformed")) < 250


# every route, by its own description

CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance", "response_schema_conformance")

@pytest.fixture(scope="module")
def document(world):
    st_ = pytest.importorskip("schemathesis")
    async def app(scope, receive, send): # its clients would start and stop the service again and again
        if scope["type"] != "lifespan": return await world.app(scope, receive, send)
        while (m := await receive())["type"] != "lifespan.shutdown": await send({"type": f"{m['type']}.complete"})
        await send({"type": "lifespan.shutdown.complete"})
    schema = st_.openapi.from_asgi("/openapi.json", app)
    return {r.ok().label: r.ok() for r in schema.get_all_operations()} # raises where the document is no OpenAPI

def described(world, operation, examples: int) -> None:
    import schemathesis
    from schemathesis.checks import CHECKS as known
    checks, key = [known.get_one(c) if hasattr(known, "get_one") else known[c] for c in CHECKS], world.key("admin+clinician+researcher+auditor")
    cases = [operation.as_strategy(m) for m in schemathesis.GenerationMode]
    if "{id}" in operation.label: cases += [operation.as_strategy(schemathesis.GenerationMode.POSITIVE, path_parameters=dict(id=world.done))]
    @settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(case=st.one_of(cases), authorised=st.integers(0, 9))
    def holds(case, authorised):
        reply = case.call(headers={"Authorization": f"Bearer {key}"} if authorised else {})
        case.validate_response(reply, checks=checks)
        if reply.status_code >= 400: assert reply.headers["content-type"] == ["application/problem+json"] and re.fullmatch("[a-z_]+", reply.json()["code"])
        assert reply.headers["x-research-use"]
    holds()

@pytest.mark.parametrize("route", [r for r in ROUTES if r.split()[1] != "/readyz"])
def test_as_described(world, document, route): described(world, document[route], 12)

@pytest.mark.slow
@pytest.mark.parametrize("route", [r for r in ROUTES if r.split()[1] != "/readyz"])
def test_as_described_at_length(world, document, route): described(world, document[route], 400)

@pytest.mark.slow
@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "edf"])
def test_damaged_bytes(world, kind):
    "A good body with some bytes changed, cut, or doubled: an answer, or a refusal."
    good = dict(json=week_body(1), csv=table(head="timestamp,counts"), parquet=parquet(dict(timestamp=pa.array(np.array(minutes(), "datetime64[us]")), counts=week_values(1))), edf=night_edf(60.))[kind]
    headers = dict(json=JSON, csv=CSV, parquet=PARQUET, edf=EDF)[kind]
    @settings(max_examples=300, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=0, max_size=8)), max_size=4), cut=st.one_of(st.none(), st.integers(0, 10**6)), near=st.booleans())
    def holds(changes, cut, near):
        body = bytearray(good)
        for at, data in changes: at %= 800 if near else len(body); body[at:at + len(data)] = data
        if cut is not None: del body[cut % len(body):]
        reply = world.week("rhythm", bytes(body), headers=headers) if kind != "edf" else world.ask("POST", "/v1/nights", headers=headers, content=bytes(body))
        if reply.status_code == 202: world.ask("DELETE", f"/v1/jobs/{reply.json()['id']}")
        elif reply.status_code != 200: refused(reply)
    holds()


# a real server

def raw(server, data: bytes, wait: float = 10.) -> bytes:
    "What it says to bytes that are no request."
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as c:
        try:
            c.sendall(data)
            c.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: c.recv(65536), b""))
        except OSError: return b""

GARBAGE = (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GARBAGE\r\n\r\n", b"\0" * 10_000, b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /v1/me HTTP/1.1\r\n\r\n", b"POST /v1/nights HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/nights HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", b"POST /v1/weeks/rhythm HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 60 + b"\r\n\r\n", b"GET /v1/me HTTP/1.1\r\nHost: x\r\nX-A: b\r\n\tc\r\nAuthorization : Bearer x\r\n\r\n",
    b"GET /v1/me HTTP/1.1\r\nHost: x\r\nX-Request-ID: a\rSet-Cookie: x=1\r\n\r\n", b"GET http://169.254.169.254/latest HTTP/1.1\r\nHost: x\r\n\r\n", b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n", b"TRACE /v1/me HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /" + b"a" * 2_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/weeks/rhythm HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nx\r\n", b"GET /../../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /static/../../keys.json HTTP/1.1\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /v1/me HTTP/9.9\r\nHost: x\r\n\r\n")

@pytest.mark.slow
def test_a_real_server_under_bad_input(tmp_path):
    "Bytes that are no HTTP, headers without an end, bombs from many at once, uploads that stop half-way: it answers, forgets, and stays small."
    with Running(registry_with(tmp_path), tmp_path / "data", "--workers", "0", "--max_upload_gb", "0.01", "--per_minute", "100000") as server, server.client("clinician") as c:
        assert c.post("/v1/weeks/rhythm", content=week_body(), headers=JSON).status_code == 200
        kept, before = sorted(p.name for p in (tmp_path / "data/vault").rglob("*") if p.is_file()), resident(server.pid)
        for data in GARBAGE:
            said = raw(server, data)
            assert not said or re.match(rb"HTTP/1.[01] 4\d\d", said), (data[:60], said[:200])
            assert b"Set-Cookie" not in said and b"root:" not in said and b"200 OK" not in said
        said = raw(server, b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: a\r\n" % i for i in range(200_000)) + b"\r\n")
        assert b"200 OK" not in said
        assert resident(server.pid) < before + 60
        def ask(name):
            body, headers, codes = WEEKS[name]
            with server.client("clinician") as mine:
                reply = mine.post("/v1/weeks/rhythm", content=body, headers=headers)
                if reply.status_code != 503: refused(reply, *codes.split(), "too_large") # so many at once may be turned away
                return reply.status_code
        with ThreadPoolExecutor(24) as together: assert set(together.map(ask, ("parquet bomb", "csv of commas", "deep objects", "csv line without end", "XML bomb") * 8)) <= {413, 422, 503}
        for _ in range(10): # uploads that stop
            with socket.create_connection(("127.0.0.1", server.port)) as half:
                half.sendall(f"POST /v1/nights HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key('clinician')}\r\nContent-Length: 120000\r\n\r\n".encode() + night_edf()[:60_000])
        def lots():
            for _ in range(400): yield bytes(65536)
        refused(c.post("/v1/nights", content=(p for part in ([night_edf()], lots()) for p in part), headers=EDF), "too_large")
        end = time.monotonic() + 20
        while time.monotonic() < end and sorted(p.name for p in (tmp_path / "data/vault").rglob("*") if p.is_file()) != kept: time.sleep(.1)
        assert sorted(p.name for p in (tmp_path / "data/vault").rglob("*") if p.is_file()) == kept
        assert resident(server.pid) < before + 600 and c.get("/readyz").status_code == 200 and c.get("/v1/jobs").json() == dict(jobs=[])
        assert c.post("/v1/weeks/rhythm", content=week_body(2), headers=JSON).status_code == 200
        log = server.log()
    assert MARK not in log and str(NUMBER) not in log and "unexpected" not in log and "Traceback" not in log
