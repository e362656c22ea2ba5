"""The audit log: on the disk before anybody is told, and no change unseen."""
import asyncio
import json
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("cryptography", reason="needs the extra 'serve'")
from pftsleep.apps import audit as module
from pftsleep.apps.audit import FACTS, AuditLog, read_audit, verify_audit
from pftsleep.errors import ConfigError, RequestError, StoreError

KEY = bytes(range(32))


def make(folder, n=20, key=KEY, **kwargs):
    with AuditLog(folder, group_seconds=0, key=key, **kwargs) as log:
        for ticket in [log.record("weeks.embed", f"key:{i}", "researcher", "t", model="PAT-S") for i in range(n)]: ticket.result()
        return log.head

def files(folder): return sorted(folder.glob("audit-*.jsonl"))
def lines(folder): return files(folder)[0].read_bytes().splitlines(keepends=True)
def put(folder, new): files(folder)[0].write_bytes(b"".join(new))
def run(code: str, *args, **kwargs): return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)

@pytest.fixture
def folder(tmp_path): return tmp_path / "log"


# --- what was changed is found where it was changed

@pytest.mark.parametrize("key", [KEY, None])
def test_every_change_is_found_at_its_line(folder, key):
    head = make(folder, key=key)
    good = lines(folder); assert len(good) == 20
    cases = {}
    for i in range(20):
        cases[f"changed {i}"] = [*good[:i], good[i].replace(b'"researcher"', b'"clinician"'), *good[i + 1:]], i
        cases[f"garbage {i}"] = [*good[:i], b"garbage\n", *good[i:]], i
        cases[f"repeated {i}"] = [*good[:i + 1], *good[i:]], i + 1
        if i < 19:
            cases[f"removed {i}"] = good[:i] + good[i + 1:], i
            cases[f"moved {i}"] = [*good[:i], good[i + 1], good[i], *good[i + 2:]], i
            cases[f"two removed {i}"] = good[:i] + good[i + 2:], i
    for name, (new, at) in cases.items():
        put(folder, new)
        report = verify_audit(folder, key)
        assert not report.ok and report.records == at, name
        assert (report.file, report.line) == ((files(folder)[0].name, at + 1) if at < len(new) else ("", 0)), f"{name}: {report}"
    put(folder, good)
    report = verify_audit(folder, key, known=head)
    assert report.ok and report.records == 20 and report.head == head and report.torn_bytes == report.recovered == 0


def test_a_flipped_bit_anywhere_is_found(folder):
    make(folder, 4)
    good = files(folder)[0].read_bytes()
    for i in range(len(good)):
        files(folder)[0].write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1:])
        assert not verify_audit(folder, KEY).ok, i


def test_a_cut_end_is_found_and_nobody_goes_on(folder):
    make(folder)
    good = lines(folder)
    for n in range(20):
        put(folder, good[:n])
        report = verify_audit(folder, KEY)
        assert not report.ok and "cut off" in report.broken and report.records == n
        with pytest.raises(StoreError, match="missing at the end"): AuditLog(folder, key=KEY)
    files(folder)[0].unlink()
    assert "cut off" in verify_audit(folder, KEY).broken
    (folder / "anchor.json").unlink()
    assert "anchor" in verify_audit(folder, KEY).broken


def test_a_forged_chain_needs_the_key(folder, tmp_path):
    head = make(folder)
    make(tmp_path / "forged", 5, key=None)
    for p in [*(tmp_path / "forged").iterdir()]: (folder / p.name).write_bytes(p.read_bytes()) # a sound chain, of somebody else
    assert verify_audit(folder).ok and not verify_audit(folder, KEY).ok
    with pytest.raises(StoreError): AuditLog(folder, key=KEY)
    make(tmp_path / "old", 3); (tmp_path / "forged/anchor.json").unlink()
    for p in [*folder.iterdir()]: p.unlink()
    for p in [*(tmp_path / "old").iterdir()]: (folder / p.name).write_bytes(p.read_bytes()) # the whole folder, as it was earlier
    assert verify_audit(folder, KEY).ok and not verify_audit(folder, KEY, known=head).ok


def test_another_key_or_a_lost_anchor_stop_the_start(folder):
    make(folder)
    for key in (None, bytes(32)):
        with pytest.raises(StoreError, match="anchor"): AuditLog(folder, key=key)
    (folder / "anchor.json").unlink()
    with pytest.raises(StoreError, match="anchor"): AuditLog(folder, key=KEY)
    with pytest.raises(ConfigError, match="32 bytes"): AuditLog(folder, key=b"short")
    with pytest.raises(StoreError): verify_audit(folder / "nowhere")


def test_a_log_that_is_cut_under_a_running_server(folder):
    with AuditLog(folder, group_seconds=0, key=KEY) as log:
        for _ in range(5): log.record("a").result()
        put(folder, lines(folder)[:2])
        with pytest.raises(RequestError) as e: log.record("a").result()
        assert e.value.status == 503 and not log.status()["ok"] and "shorter" in log.status()["problem"]


@given(st.binary(max_size=400))
def test_garbage_is_never_a_record(data):
    import tempfile
    from pathlib import Path
    with tempfile.TemporaryDirectory() as tmp:
        make(folder := Path(tmp) / "log", 2)
        whole = files(folder)[0].read_bytes()
        files(folder)[0].write_bytes(data + whole)
        assert verify_audit(folder, KEY).ok == (not data)
        files(folder)[0].write_bytes(whole + data)
        assert verify_audit(folder, KEY).records == 2
        assert len(read_audit(folder)) >= 2
        with AuditLog(folder, key=KEY) as log: log.record("later").result()
        report = verify_audit(folder, KEY) # taken for a torn line, closed and told
        assert report.ok and report.recovered == bool(data)


# --- files, restarts

def test_the_chain_goes_on_over_restarts_sizes_and_days(folder):
    day = [datetime(2026, 5, 1, 23, 59, tzinfo=UTC)]
    for _ in range(3): make(folder, 4, max_bytes=1500, now=lambda: day[0])
    with AuditLog(folder, key=KEY, group_seconds=0, now=lambda: day[0]) as log:
        for step in (1, 0, -2, 3): # the clock may go back
            day[0] += timedelta(days=step); log.record("a").result()
    report = verify_audit(folder, KEY)
    assert report.ok and report.records == 16 and report.files == len(files(folder)) >= 3
    assert [r["seq"] for r in read_audit(folder)] == list(range(1, 17))
    assert files(folder)[-1].stem[-8:] == "20260503"
    files(folder)[1].unlink()
    assert not verify_audit(folder, KEY).ok


def test_a_torn_line_is_closed_and_told(folder):
    make(folder, 3)
    whole = lines(folder)
    for i, torn in enumerate([b"{", whole[-1][:50], whole[-1][:-1], b"\xff\xfe\r", b"x\n"]):
        with files(folder)[0].open("ab") as f: f.write(torn)
        assert (r := verify_audit(folder, KEY)).records == 3 + 2 * i and r.torn_bytes == (0 if torn == b"x\n" else len(torn))
        with AuditLog(folder, key=KEY) as log: assert log.record("a").result() == 5 + 2 * i
        told = read_audit(folder)[-2]
        assert told["action"] == "audit.recovered" and told["facts"]["torn_bytes"] == len(torn)
        assert told["facts"]["torn_sha256"] == sha256(torn if torn.endswith(b"\n") else torn + b" [torn]\n").hexdigest()
        assert (r := verify_audit(folder, KEY)).ok and r.recovered == i + 1
    good = files(folder)[0].read_bytes() # an explanation doesn't cover what is changed later
    files(folder)[0].write_bytes(good.replace(b"\n{ [torn]\n", b"\n[ [torn]\n"))
    assert verify_audit(folder, KEY).records == 3 and not verify_audit(folder, KEY).ok


def test_killed_while_the_torn_line_is_closed(folder):
    make(folder, 3)
    with files(folder)[0].open("ab") as f: f.write(b'{"half\n{"and half of the recovery')
    assert verify_audit(folder, KEY).ok
    with AuditLog(folder, key=KEY) as log: log.record("a").result()
    assert (r := verify_audit(folder, KEY)).ok and r.recovered == 1 and r.records == 5


def test_sigkill_loses_no_record_that_was_acknowledged(folder):
    code = """
        import sys
        from pftsleep.apps.audit import AuditLog
        log = AuditLog(sys.argv[1], group_seconds=0, key=bytes(range(32)))
        while True:
            tickets = [log.record("weeks.embed", f"key:{i}", model="PAT-S") for i in range(7)]
            for t in tickets: print(t.result(), flush=True)
        """
    told = 0
    for wait in (30, 60):
        process, told = run(code, folder), 0
        for line in process.stdout:
            told = int(line)
            if told % 1000 >= wait: break
        process.kill(); rest, _ = process.communicate()
        told = max([told, *map(int, rest.split("\n")[:-1])])
        assert process.returncode == -9
        report = verify_audit(folder, KEY)
        assert report.ok and report.records >= told, str(report)
        if wait == 30:
            with files(folder)[0].open("ab") as f: f.write(b'{"action":"weeks.em') # as if it had been hit in mid-write
    with AuditLog(folder, key=KEY) as log: log.record("a").result()
    report = verify_audit(folder, KEY)
    assert report.ok and report.recovered == 1 and report.records > told


def test_a_kill_inside_the_write_itself(folder):
    make(folder, 3)
    process = run("""
        import os, signal, sys
        from pftsleep.apps.audit import AuditLog
        log, write = AuditLog(sys.argv[1], key=bytes(range(32))), os.write
        def half(fd, data): write(fd, bytes(data)[:len(data) // 2]); os.kill(os.getpid(), signal.SIGKILL)
        os.write = half
        print(log.record("weeks.embed", "key:1").result())
        """, folder)
    out, err = process.communicate()
    assert process.returncode == -9 and out == "", err
    assert (r := verify_audit(folder, KEY)).ok and r.torn_bytes > 50 and r.records == 3
    with AuditLog(folder, key=KEY) as log: assert log.record("a").result() == 5
    assert (r := verify_audit(folder, KEY)).ok and r.recovered == 1


# --- many at once

def test_many_threads_are_all_committed_in_few_groups(folder):
    with AuditLog(folder, group_seconds=.02, key=KEY) as log, ThreadPoolExecutor(16) as pool:
        def work(i): return [log.record("weeks.embed", f"key:{i}", count=j).result() for j in range(5)]
        numbers = [n for found in pool.map(work, range(100)) for n in found]
        assert sorted(numbers) == list(range(1, 501))
        burst = log.fsyncs
        tickets = [log.record("weeks.embed", "key:1") for _ in range(2000)]
        assert [t.result() for t in tickets] == list(range(501, 2501))
        assert log.fsyncs - burst < 40 and burst <= 500 / 4
    report = verify_audit(folder, KEY)
    assert report.ok and report.records == 2500
    seen = {(r["who"], r["facts"].get("count")) for r in read_audit(folder, limit=500)}
    assert seen == {(f"key:{i}", j) for i in range(100) for j in range(5)}


def test_a_record_after_a_pause_does_not_wait_for_company(folder, monkeypatch):
    slept = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    with AuditLog(folder, group_seconds=30, key=KEY) as log: log.record("a").result(timeout=20)
    assert slept == []


def test_many_processes_one_chain(folder):
    code = """
        import sys
        from pftsleep.apps.audit import AuditLog
        with AuditLog(sys.argv[1], group_seconds=0, key=bytes(range(32)), max_bytes=5000) as log:
            print(*[log.record("nights.submit", sys.argv[2]).result() for _ in range(30)])
        """
    running = [run(code, folder, f"worker:{i}") for i in range(3)]
    numbers = [int(n) for p in running for n in p.communicate()[0].split()]
    assert sorted(numbers) == list(range(1, 91))
    report = verify_audit(folder, KEY)
    assert report.ok and report.records == 90 and report.files > 2


def test_checking_while_others_write(folder):
    stop = threading.Event()
    with AuditLog(folder, group_seconds=0, key=KEY, max_bytes=3000) as log:
        def write():
            while not stop.is_set(): log.record("a", "key:1").result()
        writer = threading.Thread(target=write); writer.start()
        try: reports = [log.verify() for _ in range(20)]
        finally: stop.set(); writer.join()
    assert all(r.ok and r.torn_bytes == 0 for r in reports), [str(r) for r in reports if not r.ok]


def test_a_caller_that_gives_up_harms_nobody(folder):
    async def go(log):
        impatient = asyncio.create_task(log.arecord("a", "key:1")); await asyncio.sleep(0); impatient.cancel()
        tickets = [log.record("b") for _ in range(5)]; tickets[0].cancel()
        return [await log.arecord("c", "key:2") for _ in range(3)]
    with AuditLog(folder, group_seconds=.01, key=KEY) as log:
        assert len(asyncio.run(go(log))) == 3
        assert len(log.read()) == 9 and log.status()["ok"]
    with pytest.raises(RequestError): log.record("late")


# --- disk full

def test_full_disk_fails_the_tickets_and_leaves_a_whole_log(folder):
    process = run("""
        import resource, sys
        from pftsleep.apps.audit import AuditLog
        from pftsleep.errors import RequestError
        log = AuditLog(sys.argv[1], group_seconds=0, key=bytes(range(32)))
        for _ in range(10): log.record("a", "key:1").result()
        resource.setrlimit(resource.RLIMIT_FSIZE, (log._chain.end.size + 700, resource.RLIM_INFINITY))
        failed = 0
        for t in [log.record("a", "key:1") for _ in range(50)]:
            try: t.result()
            except RequestError as e: failed += 1; assert (e.status, e.code, e.retry_after) == (503, "audit_unavailable", 5) and "File too large" not in str(e)
        print(failed, log.status()["ok"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(log.record("a", "key:1").result(), log.status()["ok"])
        log.close()
        """, folder)
    out, err = process.communicate()
    assert process.returncode == 0, err
    failed, ok, last, again = out.split()
    assert int(failed) >= 40 and (ok, again) == ("False", "True") and int(last) == 61 - int(failed)
    assert (r := verify_audit(folder, KEY)).ok and r.records == int(last) and r.recovered == 0


def test_a_failing_disk_is_never_an_answer(folder, monkeypatch):
    with AuditLog(folder, group_seconds=0, key=KEY) as log:
        log.record("a").result()
        monkeypatch.setattr(module.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(RequestError): log.record("a").result()
        monkeypatch.undo()
        assert log.record("a").result() == 2
    assert verify_audit(folder, KEY).ok


def test_a_full_queue_refuses(folder, monkeypatch):
    gate = threading.Event()
    append = module._Chain.append
    monkeypatch.setattr(module._Chain, "append", lambda self, records: (gate.wait(), append(self, records))[1])
    with AuditLog(folder, group_seconds=0, key=KEY, max_waiting=5) as log:
        tickets, refused = [], 0
        for _ in range(20):
            try: tickets.append(log.record("a"))
            except RequestError as e: refused += e.status == 503
        gate.set()
        assert refused >= 20 - 5 - 5 and sorted(t.result() for t in tickets) == list(range(1, len(tickets) + 1))


# --- what a record may hold

def test_no_raw_values(folder):
    secrets = ["Jane Doe", "1.5, 2.5, 3.5", "[0.1,0.2]", "jane doe.edf", "/srv/data/Doe, Jane/night.edf", "x" * 200, "a\nb", '","who":"root', "näme", "\ud800", ""]
    with AuditLog(folder, group_seconds=0, key=KEY) as log:
        for s in secrets: log.record("weeks.embed", s, s, s, s, s, s, s, s, model=s, reason=s, job=s).result()
        log.record("weeks.embed", seconds=.0123456789, count=None).result()
    text = files(folder)[0].read_text()
    for s in secrets[:-1]: assert json.dumps(s)[1:-1] not in text
    assert "sha256:" in text and '"seconds":0.0123457' in text and "count" not in text
    assert verify_audit(folder, KEY).ok


@pytest.mark.parametrize("facts", [dict(values=[1.0]), dict(name="x"), dict(count="3"), dict(count=1.5), dict(count=True), dict(seconds="1"), dict(seconds=float("inf")), dict(model=5), dict(model=["a"]),
    dict(model=b"a"), dict(count=10**20), dict(model={"a": 1})])
def test_only_facts_of_the_list(folder, facts):
    with AuditLog(folder, key=KEY) as log, pytest.raises(ConfigError): log.record("a", **facts)
    assert verify_audit(folder, KEY).records == 0


@pytest.mark.parametrize("action", ["", "Weeks", "weeks embed", "a" * 65, "a..b", "a.b.c.d.e", "a\n"])
def test_only_plain_actions(folder, action):
    with AuditLog(folder, key=KEY) as log, pytest.raises(ConfigError): log.record(action)


def test_facts_are_scalars(): assert set(FACTS.values()) <= {int, float, str} and not {"values", "name", "path", "text", "subject"} & set(FACTS)


def test_reading(folder):
    clock = [datetime(2026, 5, 1, tzinfo=UTC)]
    with AuditLog(folder, group_seconds=0, key=KEY, max_bytes=1000, now=lambda: clock[0]) as log:
        for i in range(30): clock[0] += timedelta(minutes=1); log.record("a", tenant="xy"[i % 2]).result()
        assert [r["seq"] for r in log.read(since=27)] == [28, 29, 30]
        assert [r["seq"] for r in log.read(since=20, limit=2, tenant="y")] == [22, 24]
        assert [r["seq"] for r in log.read(since="2026-05-01T00:28:00.5Z")] == [29, 30]
        assert log.read(since=99) == [] and log.read(since="2027-01-01T00:00:00Z") == []
        assert {r["tenant"] for r in log.read(tenant="x")} == {"x"} and len(log.read(limit=0)) == 1
        for bad in ("yesterday", "2026-05-01", "2026-05-01T00:00:00+02:00"):
            with pytest.raises(RequestError) as e: log.read(since=bad)
            assert (e.value.status, e.value.code) == (422, "bad_since")
        assert len(files(folder)) > 5
        assert log.mark("subject-7") == log.mark("subject-7") != log.mark("subject-8") and "subject" not in log.mark("subject-7")
    assert all(p.stat().st_mode & 0o077 == 0 for p in [folder, *folder.iterdir()])
