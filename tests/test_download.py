"""Downloads from a server that misbehaves: every fault is played by a real one in a thread. The notebook shows how it is meant to go."""
import contextlib
import csv
import hashlib
import json
import logging
import os
import posixpath
import signal
import subprocess
import sys
import threading
import time
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pftsleep.apps import downloading
from pftsleep.data import download as module
from pftsleep.data.download import (
    NotAuthorised,
    RemoteFile,
    Transfers,
    Site,
    Token,
    download,
    fetch,
    find_token,
    list_files,
    plan_download,
    read_manifest,
    safe_path,
    select_files,
)
from pftsleep.errors import ConfigError, DownloadError, PFTSleepError

SECRET = "-".join(["4711", "Geheim", "nis", "xyz"]) # what nobody may ever read
PAGE = b"<!DOCTYPE html>\n<html lang='en'><head><title>Sign in</title></head><body>Please sign in</body></html>"
NIGHT = b"0       " + bytes(range(256)) * 400 # 102408 bytes


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    def do_CONNECT(self):
        self.server.nsrr.requests.append(("CONNECT", self.path, dict(self.headers)))
        self.send_error(502)
    def do_GET(self):
        nsrr, url = self.server.nsrr, urlsplit(self.path)
        nsrr.requests.append(("GET", self.path, dict(self.headers)))
        self.close_connection = True
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        if url.path.startswith("/api/"): return nsrr.api(self, url.path, query)
        if not (name := nsrr.file_of(url.path)): return self.reply(PAGE, kind="text/html")
        step = nsrr.script[name].pop(0) if nsrr.script.get(name) else nsrr.always.get(name)
        (step or nsrr.send)(self, name)
    def reply(self, body, status=200, kind="application/octet-stream", length=None, cut=None, **headers):
        "An answer; `length` is what it claims, `cut` where the connection breaks."
        self.send_response(status)
        for k, v in {"Content-Type": kind, "Content-Length": len(body) if length is None else length, **headers}.items():
            if v != "": self.send_header(k.replace("_", "-"), str(v))
        self.end_headers()
        with contextlib.suppress(ConnectionError, TimeoutError): self.wfile.write(body[:cut])


class NSRR:
    "The server; `script[path]` holds what it does to a file in its next answers, `always[path]` what it does ever after."
    def __init__(self):
        self.files = {"polysomnography/edfs/a-1.edf": NIGHT, "polysomnography/edfs/a-2.edf": NIGHT[::-1], "polysomnography/annotations/a-1.xml": b"<a/>", "datasets/a-dataset-0.9.0.csv": b"id\n1\n",
            "datasets/a-dataset-0.10.1.csv": b"id\n1\n2\n", "empty.txt": b""}
        self.requests, self.script, self.always, self.extra, self.listed, self.archived = [], {}, {}, [], {}, set()
        self.tag, self.ranges, self.page_size, self.known, self.private = '"v1"', True, 10**9, {SECRET}, True
        self.api_script, self.raw_listing, self.hold = [], None, threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.nsrr, self.server.daemon_threads = self, True
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=.01), daemon=True).start()
    @property
    def base(self): return f"http://127.0.0.1:{self.server.server_port}"
    def close(self):
        self.hold.set()
        self.server.shutdown()
        self.server.server_close()
    def site(self, **kw): return Site(**{**dict(base=self.base, token=Token(SECRET), timeout=5, tries=3, pause=0), **kw})
    def file_of(self, path):
        parts = unquote(path).split("/")
        assert parts[1:4] == ["datasets", "a", "files"], path
        rest = parts[4:]
        if rest[0] == "a": rest = rest[2:]
        assert rest[0] == "m" and rest[1].startswith("pftsleep-v"), path
        return name if (name := "/".join(rest[2:])) in {*self.files, *self.always, *self.script} else None
    def entry(self, p):
        data = self.files.get(p)
        return dict(dataset="a", full_path=p, folder=posixpath.dirname(p) + "/", file_name=posixpath.basename(p), is_file=data is not None, file_size=len(data or b"") if data is not None else 102,
            file_checksum_md5=None if data is None else hashlib.md5(data).hexdigest(), archived=p in self.archived) | self.listed.get(p, {})
    def api(self, h, path, query):
        if self.api_script: return self.api_script.pop(0)(h, "")
        if path.endswith("profile.json"): return h.reply(json.dumps({"authenticated": query.get("auth_token") in self.known, "email": "someone@example.org"}).encode(), kind="application/json")
        if path == "/api/v1/datasets/a.json": return h.reply(b'{"name": "A", "slug": "a", "updated_at": "2024-05-01T10:00:00.000-04:00"}', kind="application/json")
        if path != "/api/v1/datasets/a/files.json": return h.reply(b"", 204, length="")
        if self.raw_listing is not None: return h.reply(self.raw_listing, kind="application/json")
        folder = query.get("path", "")
        depth = folder.count("/") + 2 if folder else 1
        inside = [folder] if folder in self.files else sorted({"/".join(p.split("/")[:depth]) for p in self.files if p.startswith(f"{folder}/" if folder else "")})
        entries = [self.entry(p) for p in inside] + [e for f, e in self.extra if f == folder]
        k = (int(query.get("page", 1)) - 1) * self.page_size if self.page_size < 10**9 else 0 # like the real one, which knows no pages, it ignores the number
        return h.reply(json.dumps(entries[k:k + self.page_size]).encode(), kind="application/json; charset=utf-8")
    def send(self, h, name):
        "What a server in good health does."
        data, start, token = self.files[name], 0, SECRET in h.path
        if self.private and name.startswith("poly") and not token: return h.reply(b"", 302, Location="/datasets/a/files/polysomnography/edfs")
        wanted, same = h.headers.get("Range"), h.headers.get("If-Range") in (None, self.tag)
        if self.ranges and wanted and same: start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if not start: return h.reply(data, ETag=self.tag)
        if start >= len(data): return h.reply(b"", 416)
        return h.reply(data[start:], 206, ETag=self.tag, Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}")
    def cut(self, at):
        "Breaks the connection after `at` bytes."
        return lambda h, name: h.reply(self.files[name], cut=at, ETag=self.tag)
    def asked(self, part): return [(p, h) for _, p, h in self.requests if part in p]


EDF1, EDF2 = "polysomnography/edfs/a-1.edf", "polysomnography/edfs/a-2.edf"
def status(code, **headers): return lambda h, name: h.reply(b"<p>no</p>", code, **headers)
def page(code=200, **headers): return lambda h, name: h.reply(PAGE, code, **headers)
def error(report: Transfers, path: str): return next((o.error, o.message) for o in report.failed if o.path == path)
def parts(folder: Path): return sorted(p.name for p in folder.rglob("*.part*"))
def failures(folder: Path): return {r["path"]: r["error"] for r in csv.DictReader((folder / "failed.csv").open())} if (folder / "failed.csv").exists() else {}


@pytest.fixture
def nsrr(monkeypatch):
    monkeypatch.delenv("NSRR_TOKEN", raising=False)
    server = NSRR()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def the_token_is_never_seen(tmp_path, capfd, caplog):
    "Whatever a test does: afterwards no output, log or file holds the token."
    caplog.set_level(logging.DEBUG)
    yield
    out = capfd.readouterr()
    for where, text in {"stdout": out.out, "stderr": out.err, "log": caplog.text}.items(): assert SECRET not in text, where
    for p in tmp_path.rglob("*"):
        assert SECRET not in str(p)
        if p.is_file() and p.name != "token.txt" and p.stat().st_size < 10**7: assert SECRET.encode() not in p.read_bytes(), p


def read(capfd) -> str:
    "What was printed, after a look at it."
    out = "".join(capfd.readouterr())
    assert SECRET not in out
    return out


def raised(call, kind=DownloadError) -> str:
    "The message of an error, after a look at everything that a traceback would print."
    with pytest.raises(kind) as e: call()
    full = "".join(traceback.format_exception(e.value))
    assert SECRET not in full and SECRET not in repr(e.value)
    return str(e.value)


# --- as it should be

def test_everything_arrives_with_its_path_and_a_manifest(nsrr, tmp_path):
    report = download(nsrr.site(), "a", ".", tmp_path)
    assert not report.failed and len(report.of("done")) == 6
    for p, data in nsrr.files.items(): assert (tmp_path / p).read_bytes() == data
    rows = read_manifest(tmp_path)
    assert set(rows) == set(nsrr.files)
    row = rows[EDF1]
    assert (row["bytes"], row["md5"], row["sha256"]) == (str(len(NIGHT)), hashlib.md5(NIGHT).hexdigest(), hashlib.sha256(NIGHT).hexdigest())
    assert (row["version"], row["dataset"], row["checked"], row["updated"]) == ("0.10.1", "a", "md5", "2024-05-01T10:00:00.000-04:00") # 0.10 comes after 0.9
    assert not parts(tmp_path) and not (tmp_path / "failed.csv").exists()


def test_what_is_there_is_skipped_without_a_request(nsrr, tmp_path):
    download(nsrr.site(), "a", ".", tmp_path)
    before = (tmp_path / "manifest.csv").read_text()
    nsrr.requests.clear()
    report = download(nsrr.site(), "a", ".", tmp_path)
    assert len(report.of("skipped")) == 6 and not nsrr.asked("/files/a/")
    assert (tmp_path / "manifest.csv").read_text() == before


def test_verify_reads_again_and_repairs(nsrr, tmp_path):
    download(nsrr.site(), "a", ".", tmp_path)
    damaged = bytearray(NIGHT)
    damaged[5000] ^= 1
    (tmp_path / EDF1).write_bytes(damaged) # the size is right, and the manifest says that all is well
    assert len(download(nsrr.site(), "a", ".", tmp_path).of("skipped")) == 6
    report = download(nsrr.site(), "a", ".", tmp_path, verify=True)
    assert [o.path for o in report.of("done")] == [EDF1] and (tmp_path / EDF1).read_bytes() == NIGHT


def test_files_of_another_downloader_are_compared_and_kept(nsrr, tmp_path):
    (tmp_path / EDF1).parent.mkdir(parents=True)
    (tmp_path / EDF1).write_bytes(NIGHT)
    (tmp_path / EDF2).write_bytes(NIGHT) # the right size, the wrong night
    report = download(nsrr.site(), "a", "polysomnography/edfs", tmp_path)
    assert {o.path: o.status for o in report.outcomes} == {EDF1: "skipped", EDF2: "done"}
    assert read_manifest(tmp_path)[EDF1]["sha256"] == hashlib.sha256(NIGHT).hexdigest()


def test_a_dry_run_leaves_no_trace(nsrr, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("NSRR_TOKEN", SECRET)
    target = tmp_path / "new"
    assert downloading.download("a", ".", str(target), dry_run=True, site=nsrr.base) == 0
    assert not target.exists() and not nsrr.asked("/datasets/a/files/a/")
    assert f"6 files, {module._size(sum(map(len, nsrr.files.values())))}" in read(capfd)


@pytest.mark.parametrize(("path", "selection", "expected"), [
    ("polysomnography", {}, 3), ("polysomnography/edfs", {}, 2), (EDF1, {}, 1), (".", dict(include="*.EDF,*.xml"), 3), (".", dict(exclude="polysomnography/*"), 3),
    ("", dict(include="*.edf", exclude="*-2*"), 1), ("polysomnography/*/a-1.*", {}, 2), ("polysomnography/edfs/a-[2-9].edf", {}, 1), ("/polysomnography/edfs/", {}, 2)])
def test_selection(nsrr, tmp_path, path, selection, expected):
    assert len(plan_download(nsrr.site(), "a", path, tmp_path, **selection).files) == expected


def test_archived_files_only_on_request(nsrr, tmp_path):
    nsrr.archived = {"datasets/a-dataset-0.10.1.csv"}
    plan = plan_download(nsrr.site(), "a", "datasets", tmp_path)
    assert [f.path for f in plan.files] == ["datasets/a-dataset-0.9.0.csv"] and plan.release.version == "0.9.0"
    assert len(plan_download(nsrr.site(), "a", "datasets", tmp_path, archived=True).files) == 2


def test_pages_of_a_listing_are_followed(nsrr, tmp_path):
    nsrr.files = {f"edfs/{k:03d}.edf": bytes([k]) for k in range(50)}
    nsrr.page_size = 18
    files, refused = list_files(nsrr.site(), "a")
    assert len(files) == 50 and not refused


def test_public_files_need_no_token(nsrr, tmp_path):
    report = download(nsrr.site(token=None), "a", "datasets", tmp_path)
    assert len(report.of("done")) == 2
    assert all("/a/files/m/pftsleep-v" in p for p, _ in nsrr.asked("/a/files/"))


def test_eight_connections_bring_the_same(nsrr, tmp_path):
    nsrr.files = {f"edfs/{k:03d}.edf": os.urandom(3000) for k in range(60)}
    report = download(nsrr.site(), "a", "edfs", tmp_path, connections=8)
    assert len(report.of("done")) == 60 and {p: (tmp_path / p).read_bytes() for p in nsrr.files} == nsrr.files
    assert len(read_manifest(tmp_path)) == 60
    raised(lambda: download(nsrr.site(), "a", "edfs", tmp_path, connections=9), ConfigError)


# --- going on

def test_a_broken_transfer_goes_on_where_it_broke(nsrr, tmp_path):
    nsrr.script[EDF1] = [nsrr.cut(40_000)]
    report = download(nsrr.site(), "a", EDF1, tmp_path)
    assert not report.failed and (tmp_path / EDF1).read_bytes() == NIGHT and not parts(tmp_path)
    (_, first), (_, second) = nsrr.asked("a-1.edf")[-2:]
    assert "Range" not in first and (second["Range"], second["If-Range"]) == ("bytes=40000-", '"v1"')


def test_the_next_run_goes_on_where_the_last_gave_up(nsrr, tmp_path):
    nsrr.script[EDF1] = [nsrr.cut(40_000), *[status(503)] * 3]
    first = download(nsrr.site(), "a", EDF1, tmp_path)
    assert error(first, EDF1)[0] == "DownloadError" and "given up after 3 attempts" in error(first, EDF1)[1]
    assert parts(tmp_path) == ["a-1.edf.part", "a-1.edf.part.json"] and not (tmp_path / EDF1).exists() and failures(tmp_path) == {EDF1: "DownloadError"}
    plan = plan_download(nsrr.site(), "a", EDF1, tmp_path)
    assert (plan.states, plan.missing()) == (("part",), len(NIGHT) - 40_000)
    assert not fetch(nsrr.site(), plan).failed and (tmp_path / EDF1).read_bytes() == NIGHT
    assert nsrr.asked("a-1.edf")[-1][1]["Range"] == "bytes=40000-"
    assert failures(tmp_path) == {} and not parts(tmp_path)


def begin(nsrr, tmp_path, data=NIGHT[:40_000]):
    "A part as a run that was killed leaves it."
    nsrr.script[EDF1] = [nsrr.cut(len(data)), *[status(503)] * 2]
    download(nsrr.site(tries=2), "a", EDF1, tmp_path)
    nsrr.script.clear()
    part = tmp_path / (EDF1 + ".part")
    part.write_bytes(data)
    return part


def test_a_server_without_ranges_sends_it_all_again(nsrr, tmp_path):
    begin(nsrr, tmp_path)
    nsrr.ranges = False
    assert not download(nsrr.site(), "a", EDF1, tmp_path).failed
    assert nsrr.asked("a-1.edf")[-1][1]["Range"] and (tmp_path / EDF1).read_bytes() == NIGHT


def test_a_file_that_has_changed_on_the_server_is_begun_anew(nsrr, tmp_path):
    "Same listing, another ETag: the server answers If-Range with the whole file."
    begin(nsrr, tmp_path, b"x" * 40_000)
    nsrr.tag = '"v2"'
    assert not download(nsrr.site(), "a", EDF1, tmp_path).failed
    assert nsrr.asked("a-1.edf")[-1][1]["If-Range"] == '"v1"' and (tmp_path / EDF1).read_bytes() == NIGHT


def test_a_part_of_another_release_is_not_continued(nsrr, tmp_path):
    begin(nsrr, tmp_path)
    nsrr.files[EDF1] = NIGHT[::-1]
    nsrr.requests.clear()
    assert not download(nsrr.site(), "a", EDF1, tmp_path).failed
    assert not any("Range" in headers for _, headers in nsrr.asked("a-1.edf")) and (tmp_path / EDF1).read_bytes() == NIGHT[::-1]


@pytest.mark.parametrize("note", ["", "{", "[]", "null", '{"size": 1}', '{"size": "x", "md5": [], "mark": {}}', "\x00", "[" * 100_000])
def test_a_damaged_note_means_from_the_beginning(nsrr, tmp_path, note):
    part = begin(nsrr, tmp_path)
    part.with_name(part.name + ".json").write_text(note)
    assert not download(nsrr.site(), "a", EDF1, tmp_path).failed
    assert "Range" not in nsrr.asked("a-1.edf")[-1][1] and (tmp_path / EDF1).read_bytes() == NIGHT


@pytest.mark.parametrize("data", [b"x" * 40_000, NIGHT + b"more", b"", NIGHT, b"x" * len(NIGHT)], ids=["damaged", "too long", "empty", "complete", "complete but damaged"])
def test_whatever_the_part_holds_the_result_is_right(nsrr, tmp_path, data):
    begin(nsrr, tmp_path)
    (tmp_path / (EDF1 + ".part")).write_bytes(data)
    assert not download(nsrr.site(), "a", EDF1, tmp_path).failed
    assert (tmp_path / EDF1).read_bytes() == NIGHT and not parts(tmp_path)


def test_without_an_etag_the_date_is_sent_and_a_weak_one_is_not(nsrr, tmp_path):
    date = "Wed, 01 May 2024 10:00:00 GMT"
    nsrr.script[EDF1] = [lambda h, n: h.reply(NIGHT, cut=30_000, ETag='W/"v1"', Last_Modified=date)]
    assert not download(nsrr.site(), "a", EDF1, tmp_path).failed
    assert nsrr.asked("a-1.edf")[-1][1]["If-Range"] == date and (tmp_path / EDF1).read_bytes() == NIGHT


@pytest.mark.parametrize("answer", ["bytes 0-99/102408", "bytes 40001-102407/102408", "bytes 40000-102407/999999", "nonsense", ""])
def test_another_part_than_asked_for_is_not_appended(nsrr, tmp_path, answer):
    nsrr.listed[EDF1] = dict(file_checksum_md5=None) # so that no checksum saves us
    begin(nsrr, tmp_path)
    nsrr.script[EDF1] = [lambda h, n: h.reply(b"x" * len(NIGHT[40_000:]), 206, Content_Range=answer)]
    assert not download(nsrr.site(), "a", EDF1, tmp_path).failed and (tmp_path / EDF1).read_bytes() == NIGHT


def test_a_range_that_cannot_be_satisfied(nsrr, tmp_path):
    begin(nsrr, tmp_path)
    nsrr.script[EDF1] = [status(416)]
    assert not download(nsrr.site(), "a", EDF1, tmp_path).failed and (tmp_path / EDF1).read_bytes() == NIGHT


def test_many_breaks_are_no_failure_as_long_as_something_arrives(nsrr, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PROGRESS", 5_000)
    def few(h, name):
        start = int((h.headers.get("Range") or "bytes=0-")[6:-1])
        end = dict(Content_Range=f"bytes {start}-{len(NIGHT) - 1}/{len(NIGHT)}") if start else {}
        h.reply(NIGHT[start:], 206 if start else 200, cut=6_000, ETag='"v1"', **end)
    nsrr.always[EDF1] = few
    assert not download(nsrr.site(tries=2), "a", EDF1, tmp_path).failed
    assert (tmp_path / EDF1).read_bytes() == NIGHT and len(nsrr.asked("a-1.edf")) > 15


# --- sign-in pages and other ways of saying no

@pytest.mark.parametrize("answer", [page(), page(kind="text/html; charset=utf-8"), lambda h, n: h.reply(b"\xef\xbb\xbf \n<HTML><body>login", kind="application/octet-stream"),
    lambda h, n: h.reply(b"Please log in", kind="text/html"), lambda h, n: h.reply(PAGE.ljust(len(NIGHT))), status(302, Location="/login"), status(302, Location="/datasets/a/files/polysomnography/edfs"),
    status(303, Location="/"), status(401), status(403), lambda h, n: h.reply(PAGE, length="", Transfer_Encoding="identity")])
def test_a_page_in_place_of_a_night(nsrr, tmp_path, answer):
    nsrr.always[EDF1] = answer
    report = download(nsrr.site(), "a", "polysomnography", tmp_path)
    kind, message = error(report, EDF1)
    assert kind == "NotAuthorised" and "token" in message and "checksum" not in message
    assert not (tmp_path / EDF1).exists() and not parts(tmp_path) and failures(tmp_path) == {EDF1: "NotAuthorised"}
    assert len(report.of("done")) == 2 # the others came
    assert len(nsrr.asked("a-1.edf")) == 1 # a no is a no


def test_a_page_does_not_spoil_what_has_come_already(nsrr, tmp_path):
    part = begin(nsrr, tmp_path)
    nsrr.always[EDF1] = page()
    assert error(download(nsrr.site(), "a", EDF1, tmp_path), EDF1)[0] == "NotAuthorised"
    nsrr.always[EDF1] = lambda h, n: h.reply(PAGE, 206, kind="text/html", Content_Range=f"bytes 40000-{len(NIGHT) - 1}/{len(NIGHT)}")
    assert error(download(nsrr.site(), "a", EDF1, tmp_path), EDF1)[0] == "NotAuthorised"
    assert part.read_bytes() == NIGHT[:40_000]


def test_a_web_page_that_is_wanted_is_kept(nsrr, tmp_path):
    nsrr.files["docs/manual.html"] = PAGE
    nsrr.always["docs/manual.html"] = page(kind="text/html")
    assert not download(nsrr.site(), "a", "docs", tmp_path).failed and (tmp_path / "docs/manual.html").read_bytes() == PAGE


def test_a_token_that_is_not_known(nsrr, tmp_path):
    nsrr.known = set()
    message = raised(lambda: download(nsrr.site(), "a", ".", tmp_path / "x"), NotAuthorised)
    assert "doesn't accept the token" in message and not (tmp_path / "x").exists()


def test_a_data_set_that_is_not_there_and_one_of_which_nothing_is(nsrr, tmp_path):
    assert "no such data set" in raised(lambda: download(nsrr.site(), "b", ".", tmp_path))
    assert "a/edfs: nothing is listed there" in raised(lambda: download(nsrr.site(), "a", "edfs", tmp_path))
    assert "none of 6 files fits" in raised(lambda: download(nsrr.site(), "a", ".", tmp_path, include="*.bdf"))
    for slug in ("", "../x", "a/b", "a b", "a?x", "x" * 101): assert "no name of a data set" in raised(lambda s=slug: list_files(nsrr.site(), s), ConfigError)


def test_a_token_that_runs_out_on_the_way_is_noticed(nsrr, tmp_path):
    nsrr.files = {f"edfs/{k:03d}.edf": bytes([k]) * 99 for k in range(40)}
    for k in range(3, 40): nsrr.always[f"edfs/{k:03d}.edf"] = page(kind="text/html")
    report = download(nsrr.site(), "a", "edfs", tmp_path, connections=1)
    assert len(report.of("done")) == 3 and len(report.failed) == 37 and "refused 5 files in a row" in str(report)
    assert len(nsrr.asked("/a/files/a/")) <= 3 + 5 + 1 # the one that was on its way when the fifth was counted
    assert {"NotAuthorised", "NotTried"} == set(failures(tmp_path).values())
    nsrr.always.clear()
    assert len(download(nsrr.site(), "a", "edfs", tmp_path).of("done")) == 37 and failures(tmp_path) == {}


# --- servers in trouble

@pytest.mark.parametrize("code", [500, 502, 503, 504, 429, 408])
def test_a_server_in_trouble_is_asked_again(nsrr, tmp_path, code):
    nsrr.script[EDF1] = [status(code), status(code)]
    assert not download(nsrr.site(), "a", EDF1, tmp_path).failed and len(nsrr.asked("a-1.edf")) == 2 + 1 + sum("files.json" in p for p, _ in nsrr.asked("a-1.edf"))


@pytest.mark.parametrize("code", [400, 404, 410, 418])
def test_a_no_is_not_asked_again(nsrr, tmp_path, code):
    nsrr.always[EDF1] = status(code)
    report = download(nsrr.site(), "a", "polysomnography/edfs", tmp_path)
    assert str(code) in error(report, EDF1)[1] and len(report.of("done")) == 1 and len(nsrr.asked("a-1.edf")) == 1


class Clock(threading.Event):
    "Notes the pauses in place of waiting."
    def __init__(self): super().__init__(); self.seen = []
    def wait(self, timeout=None): self.seen.append(timeout); return self.is_set()


def bring(site, tmp_path):
    plan = plan_download(site, "a", EDF1, tmp_path)
    return module._bring(module._Job(site, plan.release, tmp_path, lambda n: None), plan.files[0], plan.states[0])


def test_pauses_double_and_are_bounded(nsrr, tmp_path):
    nsrr.always[EDF1], clock = status(503), Clock()
    assert bring(nsrr.site(pause=1., tries=9, stop=clock), tmp_path).status == "failed"
    assert clock.seen == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize("header", ["7", None])
def test_retry_after_is_obeyed(nsrr, tmp_path, header):
    text, clock = header or format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True), Clock()
    nsrr.script[EDF1] = [status(429, Retry_After=text)]
    assert bring(nsrr.site(stop=clock), tmp_path).status == "done"
    assert clock.seen == [7] if header else len(clock.seen) == 1 and 0 < clock.seen[0] <= 100


def test_a_pause_beyond_patience_is_a_failure_that_says_so(nsrr, tmp_path):
    nsrr.always[EDF1] = status(429, Retry_After="86400")
    assert "asks for a pause of 86400 s" in error(download(nsrr.site(), "a", EDF1, tmp_path), EDF1)[1]


def test_silence_ends_by_time_out(nsrr, tmp_path):
    def silent(h, name):
        h.reply(NIGHT, cut=1_000, ETag='"v1"')
        h.wfile.flush()
        nsrr.hold.wait(30)
    nsrr.script[EDF1] = [silent]
    assert not download(nsrr.site(timeout=.3), "a", EDF1, tmp_path).failed and (tmp_path / EDF1).read_bytes() == NIGHT
    nsrr.always[EDF1] = lambda h, name: nsrr.hold.wait(30)
    (tmp_path / EDF1).unlink()
    assert "connection to 127.0.0.1 failed" in error(download(nsrr.site(timeout=.2, tries=2), "a", EDF1, tmp_path), EDF1)[1]


@pytest.mark.parametrize("junk", [b"", b"\x00\xff" * 100, b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc", b"HTTP/1.1 302 Found\r\nLocation: http://[\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n", b"HTTP/1.1 302 Found\r\n\r\n", b"HTTP/1.1 999 What\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n"])
def test_junk_instead_of_http(nsrr, tmp_path, junk):
    nsrr.always[EDF1] = lambda h, name: (h.wfile.write(junk), h.wfile.flush())
    report = download(nsrr.site(), "a", "polysomnography/edfs", tmp_path)
    assert [o.path for o in report.failed] == [EDF1] and not (tmp_path / EDF1).exists()


@pytest.mark.parametrize("answer", [*[status(c) for c in (400, 401, 403, 404, 429, 500)], status(302, Location="/login"), status(302, Location="http://example.org/files.json"), status(302, Location="http://["),
    lambda h, n: h.wfile.write(b"\xff" * 99), lambda h, n: None, lambda h, n: h.reply(b"[" + h.path.encode())])
def test_no_error_about_a_listing_quotes_its_address(nsrr, answer):
    nsrr.api_script = [answer] * 9
    assert "http" not in raised(lambda: list_files(nsrr.site(), "a")).replace("https://sleepdata.org/token", "")


def test_a_server_that_is_not_there(tmp_path):
    dead = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port = dead.server_port
    dead.server_close()
    said = raised(lambda: download(Site(f"http://127.0.0.1:{port}", Token(SECRET), tries=2, pause=0), "a", ".", tmp_path))
    assert "the connection to 127.0.0.1 failed" in said and SECRET not in said


def test_a_storage_service_that_is_not_there_is_named(nsrr, tmp_path):
    "Not the server that was asked, but the one that it sent us to."
    nsrr.always[EDF1] = status(302, Location=f"http://localhost:{nsrr.server.server_port}/bucket/{SECRET}")
    nsrr.server.RequestHandlerClass = type("Storage", (Handler,), dict(do_GET=lambda h: h.connection.close() if h.path.startswith("/bucket") else Handler.do_GET(h)))
    kind, message = error(download(nsrr.site(), "a", EDF1, tmp_path), EDF1)
    assert kind == "DownloadError" and "the connection to localhost failed" in message and SECRET not in message


@pytest.mark.parametrize("n", [99, 0, -1])
def test_too_many_connections_are_refused_before_anything_starts(nsrr, tmp_path, n):
    assert "1 to 8" in raised(lambda: download(nsrr.site(), "a", ".", tmp_path / "d", connections=n), ConfigError)
    assert "1 to 8" in raised(lambda: downloading.download("a", ".", str(tmp_path / "d"), dry_run=True, token_file="nowhere", connections=n, site=nsrr.base), ConfigError)
    assert not nsrr.requests and not (tmp_path / "d").exists()


# --- redirections

def test_a_storage_service_elsewhere_is_followed_without_the_token(nsrr, tmp_path):
    other = NSRR()
    other.server.RequestHandlerClass = type("Storage", (Handler,), dict(do_GET=lambda h: (other.requests.append(("GET", h.path, dict(h.headers))), h.reply(NIGHT, ETag='"v1"'))))
    nsrr.always[EDF1] = status(302, Location=f"{other.base}/bucket/7f3a?signature=1")
    try: assert not download(nsrr.site(), "a", EDF1, tmp_path).failed
    finally: other.close()
    assert (tmp_path / EDF1).read_bytes() == NIGHT and SECRET not in repr(other.requests)


@pytest.mark.parametrize("target", ["http://example.org/a-1.edf", "ftp://example.org/a-1.edf"])
def test_no_redirection_out_of_encryption(nsrr, tmp_path, target):
    nsrr.always[EDF1] = status(302, Location=target)
    kind, message = error(download(nsrr.site(), "a", EDF1, tmp_path), EDF1)
    assert kind == "DownloadError" and "example.org" not in message


def test_a_circle_of_redirections_ends(nsrr, tmp_path):
    nsrr.always[EDF1] = lambda h, n: h.reply(b"", 302, Location=h.path)
    assert download(nsrr.site(), "a", EDF1, tmp_path).failed and len(nsrr.asked("a-1.edf")) < 40


@pytest.mark.parametrize("base", ["http://sleepdata.org", "http://localhost.evil.org", "http://localhost@evil.org", "https://user:pw@sleepdata.org", "https://sleepdata.org/x", "", "https://", "https://[", "file:///etc", "https://a b"])
def test_only_https_or_this_machine(base): assert "must be https" in raised(lambda: Site(base, Token(SECRET)), ConfigError)


def test_proxies_of_the_environment_are_used_for_https_and_not_for_this_machine(nsrr, tmp_path, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy"): monkeypatch.setenv(name, nsrr.base)
    for name in ("no_proxy", "NO_PROXY"): monkeypatch.delenv(name, raising=False)
    raised(lambda: plan_download(Site("https://nsrr.invalid", Token(SECRET), tries=1, pause=0), "a", ".", tmp_path))
    assert [(m, p) for m, p, _ in nsrr.requests] == [("CONNECT", "nsrr.invalid:443")] and SECRET not in repr(nsrr.requests)
    assert len(plan_download(nsrr.site(), "a", ".", tmp_path).files) == 6
    assert not any(p.startswith("http") for _, p, _ in nsrr.requests) # a proxy would be asked for whole addresses


# --- wrong content

def test_a_checksum_that_is_wrong_once_is_forgiven(nsrr, tmp_path):
    nsrr.script[EDF1] = [lambda h, n: h.reply(b"x" * len(NIGHT))]
    assert not download(nsrr.site(), "a", EDF1, tmp_path).failed and (tmp_path / EDF1).read_bytes() == NIGHT


@pytest.mark.parametrize("answer", [lambda h, n: h.reply(b"x" * len(NIGHT)), lambda h, n: h.reply(NIGHT + b"!"), lambda h, n: h.reply(NIGHT[:-1]), lambda h, n: h.reply(NIGHT * 3, length="")],
    ids=["other content", "longer", "shorter", "longer without saying so"])
def test_a_checksum_that_is_wrong_twice_is_a_failure_and_others_go_on(nsrr, tmp_path, answer):
    nsrr.always[EDF1] = answer
    report = download(nsrr.site(), "a", "polysomnography", tmp_path)
    kind, message = error(report, EDF1)
    assert kind == "DownloadError" and "twice" in message and len(report.of("done")) == 2
    assert not (tmp_path / EDF1).exists() and not parts(tmp_path) and failures(tmp_path) == {EDF1: "DownloadError"} and len(nsrr.asked("a-1.edf")) == 2
    assert EDF1 not in read_manifest(tmp_path)


@pytest.mark.parametrize("answer", [lambda h, n: h.reply(NIGHT * 3, length=""), lambda h, n: h.reply(NIGHT + b"!"), lambda h, n: h.reply(NIGHT[:-1])])
def test_never_more_bytes_than_listed(nsrr, tmp_path, answer):
    nsrr.listed[EDF1] = dict(file_checksum_md5=None)
    nsrr.always[EDF1] = answer
    assert "twice" in error(download(nsrr.site(), "a", EDF1, tmp_path), EDF1)[1] and not (tmp_path / EDF1).exists()


def test_a_listing_without_checksum_is_checked_by_size_and_says_so(nsrr, tmp_path):
    nsrr.listed[EDF1] = dict(file_checksum_md5=None)
    assert not download(nsrr.site(), "a", EDF1, tmp_path).failed
    row = read_manifest(tmp_path)[EDF1]
    assert (row["checked"], row["md5"]) == ("size", hashlib.md5(NIGHT).hexdigest())
    assert len(download(nsrr.site(), "a", EDF1, tmp_path).of("skipped")) == 1


def test_a_new_release_replaces_what_changed_and_both_are_on_record(nsrr, tmp_path):
    download(nsrr.site(), "a", ".", tmp_path)
    nsrr.files[EDF1] = NIGHT[::-1]
    nsrr.files["datasets/a-dataset-0.11.0.csv"] = nsrr.files.pop("datasets/a-dataset-0.10.1.csv")
    plan = plan_download(nsrr.site(), "a", "polysomnography", tmp_path)
    assert dict(zip((f.path for f in plan.files), plan.states, strict=True))[EDF1] == "changed" and plan.missing() == len(NIGHT)
    report = fetch(nsrr.site(), plan)
    assert [o.path for o in report.of("done")] == [EDF1] and (tmp_path / EDF1).read_bytes() == NIGHT[::-1]
    lines = list(csv.DictReader((tmp_path / "manifest.csv").open()))
    assert [r["version"] for r in lines if r["path"] == EDF1] == ["0.10.1", "0.11.0"]
    assert [r["version"] for r in lines if r["path"] == EDF2] == ["0.10.1", "0.11.0"] # unchanged, but belongs to the new release too
    assert read_manifest(tmp_path)[EDF2]["sha256"] == hashlib.sha256(NIGHT[::-1]).hexdigest()
    before = (tmp_path / "manifest.csv").read_text()
    fetch(nsrr.site(), plan_download(nsrr.site(), "a", "polysomnography", tmp_path))
    assert (tmp_path / "manifest.csv").read_text() == before


def test_the_old_file_stays_until_the_new_one_is_complete(nsrr, tmp_path):
    download(nsrr.site(), "a", EDF1, tmp_path)
    nsrr.files[EDF1] = NIGHT + b"new"
    nsrr.always[EDF1] = status(503)
    assert download(nsrr.site(), "a", EDF1, tmp_path).failed and (tmp_path / EDF1).read_bytes() == NIGHT


# --- names that attack

@pytest.mark.parametrize("name", ["../evil.edf", "../../etc/cron.d/evil", "/etc/evil", "polysomnography/edfs/../../../evil", "polysomnography/edfs/..\\evil", "C:evil", "polysomnography/edfs/a\x00b", "polysomnography/edfs/a\nb",
    "polysomnography/edfs/x.part", "manifest.csv", "polysomnography/edfs/" + "x" * 300, "", None, 5, ["x"], "polysomnography/edfs/\x1b[31mred", "polysomnography/edfs//x", "other/folder.edf"])
def test_evil_names_are_refused_and_listed_as_failures(nsrr, tmp_path, name):
    nsrr.extra = [("polysomnography/edfs", {**nsrr.entry(EDF1), "full_path": name})]
    target = tmp_path / "deep" / "target"
    report = download(nsrr.site(), "a", "polysomnography/edfs", target)
    assert len(report.of("done")) == 2 and len(report.failed) == 1 and len(failures(target)) == 1
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == {f"deep/target/{p}" for p in (EDF1, EDF2, "manifest.csv", "failed.csv")}
    assert "\x1b" not in str(report) + str(plan_download(nsrr.site(), "a", "polysomnography/edfs", target))
    nsrr.extra = []
    assert not download(nsrr.site(), "a", "polysomnography/edfs", target).failed and failures(target) == {}


@given(st.text(max_size=60) | st.none() | st.integers() | st.lists(st.sampled_from(["..", ".", "", "a", "C:", "x.edf", "~", " ", "-"]), max_size=6).map("/".join))
def test_a_safe_path_stays_inside(path):
    try: p = safe_path(path)
    except DownloadError as e:
        assert str(e).isprintable()
        return
    assert Path("/t", p).resolve().is_relative_to("/t") and Path("/t", p) == Path("/t") / p and ".." not in p.split("/")


def test_folders_that_contain_themselves_end(nsrr):
    nsrr.raw_listing = json.dumps([dict(full_path="polysomnography", is_file=False)]).encode()
    files, refused = list_files(nsrr.site(), "a")
    assert not files and len(refused) == 1


def test_a_name_listed_twice(nsrr, tmp_path):
    nsrr.extra = [("polysomnography/edfs", {**nsrr.entry(EDF1), "full_path": EDF1.upper().replace("POLYSOMNOGRAPHY/EDFS", "polysomnography/edfs")})]
    files, refused = list_files(nsrr.site(), "a", "polysomnography/edfs")
    assert len(files) == 2 and len(refused) == 1 and "listed twice" in str(refused[0])


# --- listings that are none

@pytest.mark.parametrize("body", [b"[1, 2", b"nonsense", b'{"error": "x"}', b'"text"', b"\xff\xfe", b"[" * 200_000, b"1" * 5000])
def test_a_listing_that_is_none(nsrr, tmp_path, body):
    nsrr.raw_listing = body
    raised(lambda: list_files(nsrr.site(), "a"))


def test_a_sign_in_page_in_place_of_a_listing(nsrr, tmp_path):
    nsrr.raw_listing = PAGE
    raised(lambda: list_files(nsrr.site(), "a"), NotAuthorised)
    nsrr.api_script = [status(302, Location="/login")]
    raised(lambda: list_files(nsrr.site(), "a"), NotAuthorised)


def test_a_listing_is_asked_for_again_too(nsrr):
    nsrr.api_script = [status(503), lambda h, n: h.reply(b"[{}", length=500)]
    assert len(list_files(nsrr.site(), "a")[0]) == 6


def test_a_listing_without_end(nsrr, monkeypatch):
    monkeypatch.setattr(module, "_MAX_LISTING", 1000)
    nsrr.raw_listing = b" " * 2000
    assert "too long" in raised(lambda: list_files(nsrr.site(), "a"))
    monkeypatch.setattr(module, "_MAX_LISTING", 10**6)
    monkeypatch.setattr(module, "_MAX_ENTRIES", 5)
    nsrr.raw_listing = json.dumps([dict(full_path=f"f{k}", is_file=True, file_size=1) for k in range(9)]).encode()
    assert "doesn't end" in raised(lambda: list_files(nsrr.site(), "a"))


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["full_path", "is_file", "file_size", "file_checksum_md5", "x"]), x, max_size=5))

@given(JSON | st.lists(st.fixed_dictionaries(dict(full_path=JSON, is_file=JSON, file_size=JSON, file_checksum_md5=JSON)), max_size=4))
def test_any_json_is_a_listing_or_an_error(value):
    patched = pytest.MonkeyPatch()
    patched.setattr(module, "_json", lambda *args, **query: value)
    try: files, refused = list_files(Site(), "a")
    except PFTSleepError: return
    finally: patched.undo()
    assert all(isinstance(f, RemoteFile) and f.size >= 0 and isinstance(f.md5, str | None) for f in files) and all(isinstance(e, DownloadError) for e in refused)


# --- disks

@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_stops_everything_and_says_so(nsrr, tmp_path):
    nsrr.files = {f"edfs/{k:03d}.edf": bytes([k]) * 99 for k in range(30)}
    plan = plan_download(nsrr.site(), "a", "edfs", tmp_path)
    patched = pytest.MonkeyPatch()
    patched.setattr(module, "_part", lambda final: Path("/dev/full") if final.name == "004.edf" else final.with_name(final.name + ".part"))
    patched.setattr(module, "_discard", lambda job, final: None)
    try: report = fetch(nsrr.site(), plan, connections=1)
    finally: patched.undo()
    assert error(report, "edfs/004.edf")[0] == "DiskFull" and "free some space" in error(report, "edfs/004.edf")[1]
    assert 4 <= len(report.of("done")) <= 6 and "ended early: the disk is full" in str(report) and "NotTried" in failures(tmp_path).values()
    assert not download(nsrr.site(), "a", "edfs", tmp_path).failed


def test_a_disk_that_is_too_small_is_noticed_before(nsrr, tmp_path):
    nsrr.listed[EDF1] = dict(file_size=10**18)
    assert "are to come" in raised(lambda: download(nsrr.site(), "a", ".", tmp_path)) and not nsrr.asked("/a/files/a/")


def test_a_folder_that_cannot_be_made(nsrr, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "can't be made" in raised(lambda: download(nsrr.site(), "a", ".", tmp_path / "file" / "data"))
    (tmp_path / "polysomnography").write_text("in the way too")
    report = download(nsrr.site(), "a", ".", tmp_path)
    assert len(report.of("done")) == 3 and {o.error for o in report.failed} == {"DiskError"}


def test_a_manifest_that_cannot_be_written_is_no_secret(nsrr, tmp_path):
    (tmp_path / "manifest.csv").mkdir()
    assert "manifest" in raised(lambda: download(nsrr.site(), "a", ".", tmp_path))


@pytest.mark.parametrize("damage", ["path,bytes\n1", "", "\n\n\n", '"', "\x00\x00", "path,bytes,md5,sha256,checked,dataset,version,updated,fetched\na,b,c", "x" * 200_000])
def test_a_damaged_manifest_costs_time_not_data(nsrr, tmp_path, damage):
    download(nsrr.site(), "a", ".", tmp_path)
    (tmp_path / "manifest.csv").write_text(damage)
    (tmp_path / "failed.csv").write_text(damage)
    try: report = download(nsrr.site(), "a", ".", tmp_path)
    except DownloadError as e: assert "damaged" in str(e) and len(damage) > 10**5; return
    assert len(report.of("skipped")) == 6


def test_a_line_cut_by_a_crash_does_not_spoil_the_next(nsrr, tmp_path):
    download(nsrr.site(), "a", "datasets", tmp_path)
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(manifest.read_text()[:-60])
    download(nsrr.site(), "a", ".", tmp_path)
    assert set(read_manifest(tmp_path)) == set(nsrr.files)


def test_failures_of_other_folders_are_kept(nsrr, tmp_path):
    nsrr.always[EDF1] = status(404)
    download(nsrr.site(), "a", EDF1, tmp_path)
    download(nsrr.site(), "a", EDF2, tmp_path)
    assert failures(tmp_path) == {EDF1: "DownloadError"}
    nsrr.always.clear()
    download(nsrr.site(), "a", ".", tmp_path)
    assert failures(tmp_path) == {}


# --- the command

SCRIPT = "import sys; from pftsleep.apps.downloading import download; from pftsleep.errors import PFTSleepError\ntry: sys.exit(download('a', '.', 'data', site=sys.argv[1]))\nexcept PFTSleepError as e: sys.exit(str(e))\nexcept KeyboardInterrupt: sys.exit(130)"

def run(nsrr, folder, **env): # a shell in the background hands down an ignored SIGINT
    return subprocess.Popen([sys.executable, "-c", SCRIPT, nsrr.base], cwd=folder, env={**os.environ, "NSRR_TOKEN": SECRET, "PYTHONPATH": str(Path(__file__).parents[1]), **env}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_download_goes_on(nsrr, tmp_path, how):
    def half(h, name):
        h.reply(NIGHT, cut=60_000, ETag='"v1"')
        h.wfile.flush()
        nsrr.hold.wait(30)
        h.wfile.write(NIGHT[60_000:60_001])
    nsrr.script[EDF1] = [half]
    process = run(nsrr, tmp_path)
    deadline = time.monotonic() + 60
    part = tmp_path / "data" / (EDF1 + ".part")
    finished = lambda: len(list((tmp_path / "data").rglob("*.*"))) >= 5 + 2
    while not (nsrr.asked("a-1.edf") and part.exists() and finished()):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(.02)
    process.send_signal(how)
    nsrr.hold.set()
    out = process.communicate(timeout=60)[0].decode()
    assert process.returncode == (130 if how == signal.SIGINT else -9) and SECRET not in out
    assert part.exists() and not (tmp_path / "data" / EDF1).exists()
    again = run(nsrr, tmp_path)
    out = again.communicate(timeout=60)[0].decode()
    assert again.returncode == 0 and SECRET not in out and "0 failed" in out
    assert {p: (tmp_path / "data" / p).read_bytes() for p in nsrr.files} == nsrr.files and not parts(tmp_path)


def test_exit_codes_and_the_file_with_the_token(nsrr, tmp_path, monkeypatch, capfd):
    (tmp_path / "token.txt").write_text(SECRET + "\n")
    token = str(tmp_path / "token.txt")
    nsrr.always[EDF1] = page()
    assert downloading.download("a", ".", str(tmp_path / "d"), token_file=token, site=nsrr.base) == 1
    assert f"NotAuthorised: {EDF1}" in read(capfd)
    nsrr.always.clear()
    assert downloading.download("a", ".", str(tmp_path / "d"), token_file=token, site=nsrr.base) == 0
    monkeypatch.chdir(tmp_path)
    assert downloading.download("a", "datasets", site=nsrr.base) == 0 and (tmp_path / "a" / "datasets").is_dir()
    assert "can't be read" in raised(lambda: downloading.download("a", ".", token_file="nowhere"), ConfigError)


def test_tokens(monkeypatch, tmp_path):
    monkeypatch.setenv("NSRR_TOKEN", f" {SECRET}\n")
    assert find_token().reveal() == SECRET and SECRET not in f"{find_token()}{find_token()!r}{Site(token=find_token())!r}"
    monkeypatch.setenv("NSRR_TOKEN", "  ")
    assert find_token() is None
    for bad in ("", "a b", "a\nb", "ä", "x" * 501): raised(lambda b=bad: Token(b), ConfigError)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    raised(lambda: find_token(tmp_path / "binary"), ConfigError)


def test_a_token_with_odd_characters_is_quoted(nsrr, tmp_path):
    odd = "7-a/b?c#d%e&f+g"
    nsrr.known, nsrr.private = {odd}, False
    nsrr.file_of = lambda path: next((p for p in nsrr.files if path.endswith(p)), None)
    assert not download(nsrr.site(token=Token(odd)), "a", EDF1, tmp_path).failed
    assert "/a/7-a%2Fb%3Fc%23d%25e%26f%2Bg/m/" in nsrr.asked("a-1.edf")[-1][0]


def test_patterns():
    files = [RemoteFile("x/A.EDF", 1), RemoteFile("x/a.xml", 1), RemoteFile("y/old.edf", 1, archived=True)]
    assert [f.path for f in select_files(files, "*.edf")] == ["x/A.EDF"]
    assert [f.path for f in select_files(files, " *.edf , *.xml ", "", True)] == ["x/A.EDF", "x/a.xml", "y/old.edf"]
    assert [f.path for f in select_files(files, exclude="x/*", archived=True)] == ["y/old.edf"]
    assert select_files(files, "") == []
