"""The queue and its workers, on SQLite and on PostgreSQL: killed, restarted, cancelled, without a database, with a full disk."""
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pftsleep.apps import jobs
from pftsleep.apps.jobs import JobQueue, WorkerPool, WorkerSettings, job_error
from pftsleep.errors import ChannelError, ConfigError, PFTSleepError, RequestError

BIN = next((p for p in (Path(f"/usr/lib/postgresql/{v}/bin") for v in range(20, 11, -1)) if (p / "initdb").exists()), Path(shutil.which("initdb") or "/nowhere").parent)
T, WHO = "hospital", "key-1"
HANDLERS = '''
import os, time
from pathlib import Path
from pftsleep.errors import EDFError
def told(report, line):
    with open(Path(report.options["folder"]) / "log", "a") as f: f.write(line + "\\n")
def gate(job, report):
    told(report, f"start {os.getpid()}")
    (report.scratch / "signals").write_text("a night")
    while not (Path(report.options["folder"]) / "go").exists():
        report(.5, "waiting")
        time.sleep(.02)
    told(report, "end")
    return {"x": job.payload.get("x"), "attempt": job.attempts}
def deaf(job, report):
    told(report, f"start {os.getpid()}")
    time.sleep(600)
def refuses(job, report): raise EDFError("it begins with 'Mueller'", "/somewhere/mueller.edf")
def breaks(job, report):
    told(report, "start")
    raise ValueError("Mueller")
def odd(job, report): return {"x": float("nan")}
'''


class Cluster:
    "A PostgreSQL server of our own, on a socket."
    def __init__(self, folder: Path):
        self.folder = folder
        self.url = f"postgresql://pftsleep@/postgres?host={folder}"
        self.run("initdb", "-D", str(folder / "data"), "-A", "trust", "-U", "pftsleep", "--no-sync", "-E", "UTF8", "--locale=C")
        self.start()
    def run(self, *command: str) -> None:
        who = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
        subprocess.run([*who, str(BIN / command[0]), *command[1:]], check=True, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60)
    def start(self) -> None:
        self.run("pg_ctl", "-D", str(self.folder / "data"), "-w", "-l", str(self.folder / "log"), "-o", f"-c listen_addresses='' -c unix_socket_directories={self.folder} -c fsync=off -c shared_buffers=16MB", "start")
    def stop(self) -> None: self.run("pg_ctl", "-D", str(self.folder / "data"), "-w", "-m", "immediate", "stop")


@pytest.fixture(scope="session")
def cluster():
    if not (BIN / "initdb").exists(): pytest.skip("PostgreSQL isn't installed (apt-get install postgresql)")
    pytest.importorskip("psycopg")
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    if os.getuid() == 0:
        import pwd
        try: os.chown(folder, pwd.getpwnam("postgres").pw_uid, -1)
        except KeyError: pytest.skip("PostgreSQL doesn't run as root, and there is no user postgres")
    try: c = Cluster(folder)
    except (subprocess.SubprocessError, OSError) as e: shutil.rmtree(folder, ignore_errors=True); pytest.skip(f"PostgreSQL doesn't start here: {e}")
    yield c
    with suppress(subprocess.SubprocessError): c.stop()
    shutil.rmtree(folder, ignore_errors=True)


ALSO_ON_A_SERVER = ("test_sigkill_of_a_worker", "test_workers_wait_for_the_database", "test_sigkill_of_everything") # the other tests with processes take longer there than they tell

def pytest_generate_tests(metafunc):
    "Everything on both databases."
    if "url" not in metafunc.fixturenames: return
    late = [pytest.mark.slow] if "work" in metafunc.fixturenames and metafunc.function.__name__ not in ALSO_ON_A_SERVER else []
    metafunc.parametrize("url", ["sqlite", pytest.param("postgresql", marks=late)], indirect=True)

@pytest.fixture
def url(request, tmp_path):
    if request.param == "sqlite": return f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    cluster = request.getfixturevalue("cluster")
    q = JobQueue(cluster.url)
    q._rows("DROP TABLE IF EXISTS pftsleep_jobs")
    q.close()
    return cluster.url

@pytest.fixture
def queue(url):
    q = JobQueue(url, backoff=0., patience=10.)
    yield q
    q.close()

@pytest.fixture
def sqlite(tmp_path):
    q = JobQueue(f"sqlite:///{tmp_path / 'jobs.sqlite'}", backoff=0., patience=.2)
    yield q
    q.close()


def refused(code: str, call, status: int | None = None) -> RequestError:
    with pytest.raises(RequestError) as e: call()
    assert e.value.code == code and status in (None, e.value.status)
    return e.value

def until(true, seconds: float = 60.) -> None:
    "Wait for other processes; only a hang makes this fail."
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it doesn't come"
        time.sleep(.02)

def alive(pid: int) -> bool:
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z" if Path("/proc/self/stat").exists() else not os.kill(pid, 0)
    except (OSError, ProcessLookupError): return False


# the queue

def test_a_job_from_begin_to_end(queue):
    a, b = queue.submit("night", T, WHO, "S1", {"x": [1, "ü", None]}), queue.submit("night", T, WHO, None, {})
    assert (a.state, a.progress, a.attempts, a.payload, a.subject, b.subject) == ("queued", 0, 0, {"x": [1, "ü", None]}, "S1", None)
    assert a.created == a.updated and a.created.endswith("Z") and datetime.fromisoformat(a.created).tzinfo
    got = queue.claim("w")
    assert (got.id, got.state, got.attempts) == (a.id, "running", 1)
    assert queue.heartbeat(a.id, "w", .25, "reading") and queue.heartbeat(a.id, "w")
    assert (queue.get(a.id, T).progress, queue.get(a.id, T).message) == (.25, "reading")
    assert queue.finish(a.id, "w", {"y": 1.5})
    done = queue.get(a.id, T)
    assert (done.state, done.progress, done.result, done.error, done.finished) == ("done", 1, {"y": 1.5}, None, True) and done.updated >= a.updated
    assert queue.claim("w").id == b.id and queue.claim("w") is None
    assert queue.depths() == {"queued": 0, "running": 1, "done": 1, "failed": 0, "cancelled": 0}
    assert [j.id for j in queue.list(T)] == [b.id, a.id] and [j.id for j in queue.list(T, "S1")] == [a.id] and len(queue.list(T, limit=1)) == 1


def test_tenants_dont_see_each_other(queue):
    a = queue.submit("night", T, WHO, "S1", {}, key="k")
    b = queue.submit("night", "other", WHO, "S1", {}, key="k")
    assert a.id != b.id and queue.list("other") == [b] and queue.by_subject(T, "S1") == [a]
    for call in (queue.get, queue.cancel): refused("no_such_job", lambda c=call: c(a.id, "other"), 404)
    assert not queue.swap(a.id, "other", {}, {})
    for id in ("", "x", "' OR 1=1 --", "\0" * 32, a.id.upper(), a.id + "\n"): refused("no_such_job", lambda i=id: queue.get(i, T), 404)


def test_kinds(queue):
    queue.submit("night", T, WHO, None, {})
    assert queue.claim("w", kinds=["week"]) is None and queue.claim("w", kinds=["week", "night"]) is not None


def test_a_lost_lease(queue):
    a = queue.submit("night", T, WHO, None, {})
    queue.claim("one", lease=-1)
    assert queue.heartbeat(a.id, "one"), "nobody else has it yet"
    assert queue.expire() == 1 and queue.get(a.id, T).state == "queued"
    assert not queue.finish(a.id, "one", {}) and not queue.heartbeat(a.id, "one") and not queue.fail(a.id, "one", {"code": "x"}) and not queue.release(a.id, "one")
    two = queue.claim("two")
    assert (two.id, two.attempts) == (a.id, 2) and not queue.finish(a.id, "one", {"by": 1}) and queue.finish(a.id, "two", {"by": 2})
    assert not queue.finish(a.id, "two", {"by": 3}) and queue.get(a.id, T).result == {"by": 2}
    assert queue.expire("two") == 0


def test_three_attempts(queue):
    a = queue.submit("night", T, WHO, None, {})
    for n in (1, 2, 3): assert queue.claim(f"w{n}", lease=-1).attempts == n
    assert queue.claim("w") is None
    failed = queue.get(a.id, T)
    assert (failed.state, failed.error["code"]) == ("failed", "worker_lost") and failed.error["remedy"]


def test_a_dead_worker_is_known_at_once(queue):
    a, b = (queue.submit("night", T, WHO, None, {}) for _ in range(2))
    queue.claim("dead"), queue.claim("well")
    assert queue.expire("dead") == 1
    assert [queue.get(j.id, T).state for j in (a, b)] == ["queued", "running"]


def test_failures(url):
    queue = JobQueue(url, backoff=1000.)
    a = queue.submit("night", T, WHO, None, {})
    queue.claim("w")
    assert queue.fail(a.id, "w", {"code": "internal"}, retry=True)
    assert queue.get(a.id, T).state == "queued" and queue.get(a.id, T).error == {"code": "internal"} and queue.claim("w") is None, "not before the pause"
    at_once = JobQueue(url, backoff=0.)
    b = at_once.submit("night", T, WHO, None, {})
    for n in (1, 2, 3):
        assert at_once.claim("w").attempts == n
        assert at_once.fail(b.id, "w", {"code": "internal", "n": n}, retry=True)
    assert at_once.get(b.id, T).state == "failed" and at_once.get(b.id, T).error["n"] == 3
    c = at_once.submit("night", T, WHO, None, {})
    at_once.claim("w")
    assert at_once.fail(c.id, "w", {"code": "edf_error"}) and at_once.get(c.id, T).state == "failed" and not at_once.fail(c.id, "w", {})
    queue.close(), at_once.close()


def test_giving_back_is_no_attempt(queue):
    a = queue.submit("night", T, WHO, None, {})
    for _ in range(5): assert queue.claim("w").attempts == 1 and queue.release(a.id, "w")


def test_cancel(queue):
    a, b, c = (queue.submit("night", T, WHO, None, {}) for _ in range(3))
    assert queue.claim("w").id == a.id
    assert queue.cancel(a.id, T).state == queue.cancel(b.id, T).state == queue.cancel(b.id, T).state == "cancelled"
    assert not queue.heartbeat(a.id, "w", .9) and not queue.finish(a.id, "w", {}) and not queue.fail(a.id, "w", {}, retry=True) and not queue.release(a.id, "w")
    assert queue.claim("w").id == c.id and queue.finish(c.id, "w", {})
    refused("job_finished", lambda: queue.cancel(c.id, T), 409)
    assert queue.get(a.id, T).result is None


def test_the_same_request_twice(queue):
    a = queue.submit("night", T, WHO, "S1", {"input": "1", "input_hash": "h"}, key="k")
    assert queue.submit("night", T, "somebody else", "S1", {"input": "2", "input_hash": "h"}, key="k") == a
    queue.claim("w"), queue.finish(a.id, "w", {})
    assert queue.submit("night", T, WHO, "S1", {"input_hash": "h"}, key="k").state == "done", "also when it is done"
    for other in (("week", "S1", "h"), ("night", "S2", "h"), ("night", "S1", "other")):
        refused("key_reused", lambda o=other: queue.submit(o[0], T, WHO, o[1], {"input_hash": o[2]}, key="k"), 409)
    assert len(queue.list(T)) == 1


def test_the_same_request_at_the_same_moment(queue, url):
    "From 8 threads here and 4 in each of 2 other processes."
    code = "import sys; from concurrent.futures import ThreadPoolExecutor as P; from pftsleep.apps.jobs import JobQueue; q = JobQueue(sys.argv[1]); " \
        "print(*P(4).map(lambda i: q.submit('night', 'hospital', 'key-1', 'S1', {'i': i}, key='k').id, range(8)))"
    others = [subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool: ids = set(pool.map(lambda i: queue.submit("night", T, WHO, "S1", {"i": i}, key="k").id, range(24)))
    ids |= {id for p in others for id in p.communicate()[0].split()}
    assert len(ids) == 1 and queue.depths()["queued"] == 1 and {p.returncode for p in others} == {0}


def test_each_job_goes_to_one_worker(queue):
    all_ids = {queue.submit("night", T, WHO, None, {}).id for _ in range(40)}
    def take(worker):
        mine = []
        while job := queue.claim(f"w{worker}"): mine.append(job.id); assert queue.finish(job.id, f"w{worker}", {"by": worker})
        return mine
    with ThreadPoolExecutor(6) as pool: taken = [i for ids in pool.map(take, range(6)) for i in ids]
    assert len(taken) == 40 and set(taken) == all_ids and queue.depths()["done"] == 40


def test_cancel_and_finish_at_the_same_moment(queue):
    "One of them happens."
    for _ in range(10):
        a, start = queue.submit("night", T, WHO, None, {}), threading.Barrier(2)
        queue.claim("w")
        def cancel(a=a, start=start):
            start.wait()
            try: return queue.cancel(a.id, T).state == "cancelled"
            except RequestError as e: assert e.code == "job_finished"; return False
        def finish(a=a, start=start): start.wait(); return queue.finish(a.id, "w", {})
        with ThreadPoolExecutor(2) as pool: one, other = pool.submit(cancel), pool.submit(finish)
        assert one.result() != other.result() and queue.get(a.id, T).state == ("cancelled" if one.result() else "done")


def test_the_result_is_exchanged_by_one(queue):
    a = queue.submit("night", T, WHO, None, {})
    assert not queue.swap(a.id, T, {}, {})
    queue.claim("w"), queue.finish(a.id, "w", {"name": "n0"})
    with ThreadPoolExecutor(6) as pool: won = list(pool.map(lambda i: queue.swap(a.id, T, {"name": "n0"}, {"name": f"n{i}"}), range(1, 7)))
    assert sum(won) == 1 and queue.get(a.id, T).result == {"name": f"n{won.index(True) + 1}"}


def test_housekeeping(queue):
    a, b, c = (queue.submit("night", T, WHO, s, {}) for s in ("S1", "S1", "S2"))
    queue.claim("w"), queue.finish(a.id, "w", {}), queue.cancel(c.id, T)
    now = datetime.now(UTC)
    assert queue.older_than(now - timedelta(hours=1)) == [] and {j.id for j in queue.older_than(now + timedelta(hours=1))} == {a.id, c.id}, "what waits isn't old"
    with pytest.raises(ConfigError): queue.older_than(datetime(2026, 1, 1))
    assert [j.id for j in queue.by_subject(T, "S1")] == [a.id, b.id]
    assert set(queue.known([a.id, "0" * 32, a.id])) == {a.id} and queue.known([]) == {}
    assert queue.delete([a.id, a.id, "0" * 32]) == 1 and queue.delete([]) == 0
    refused("no_such_job", lambda: queue.get(a.id, T))


def test_a_result_that_was_there_at_once(queue):
    a = queue.record("week.embed", T, WHO, "S1", {"result": "result-1"}, "0" * 32)
    assert (a.state, a.result, a.progress, a.payload) == ("done", {"result": "result-1"}, 1, {}) and queue.by_subject(T, "S1") == [a] and queue.claim("w") is None and queue.depth() == 0
    assert queue.record("week.embed", T, WHO, "S1", {}, a.id) == a, "sent twice"


def test_a_deleted_job_is_not_delivered(queue):
    a = queue.submit("night", T, WHO, None, {})
    queue.claim("w"), queue.delete([a.id])
    assert not queue.heartbeat(a.id, "w") and not queue.finish(a.id, "w", {}) and queue.list(T) == []


def test_another_service_goes_on(url):
    one = JobQueue(url)
    a, b = (one.submit("night", T, WHO, None, {}) for _ in range(2))
    one.claim("w", lease=-1), one.close()
    two = JobQueue(url)
    assert {two.claim("x").id, two.claim("x").id} == {a.id, b.id}
    two.close()


def test_any_text(queue):
    @settings(max_examples=40, deadline=None)
    @given(st.text(max_size=230), st.none() | st.text(max_size=30))
    def check(subject, key):
        try: job = queue.submit("night", T, WHO, subject, {"text": subject}, key=key)
        except RequestError as e: assert e.code in ("bad_text", "key_reused")
        else: assert job.subject == job.payload["text"] == subject
    check()


def test_text_that_a_database_cant_hold(queue):
    for bad in ("", "a\0b", "a\nb", "\ud800", "x" * 201, "\x1b[31m"):
        refused("bad_text", lambda b=bad: queue.submit("night", T, WHO, b, {}), 422)
        refused("bad_text", lambda b=bad: queue.submit("night", T, WHO, None, {}, key=b), 422)
    a = queue.submit("night", T, WHO, "'; DROP TABLE pftsleep_jobs; -- %s ? {now}", {"a": "\0 %s ? {now} \ud800"})
    assert queue.get(a.id, T).payload == a.payload == {"a": "\0 %s ? {now} \ud800"} and queue.list(T)[0].subject.startswith("';")


def test_an_address_is_not_shown(tmp_path):
    assert "jobs" not in repr(JobQueue(f"sqlite:///{tmp_path}/jobs.sqlite")).casefold().replace("jobqueue", "")
    for bad in ("", "sqlite:///", "mysql://a", "/tmp/x"):
        with pytest.raises(ConfigError) as e: JobQueue(bad)
        assert "mysql" not in str(e.value) and "/tmp" not in str(e.value)
    assert (tmp_path / "jobs.sqlite").stat().st_mode & 0o777 == 0o600


def test_the_queue_is_light():
    done = subprocess.run([sys.executable, "-c", "import sys, pftsleep.apps.jobs; print([m for m in ('torch', 'lightning', 'matplotlib', 'psycopg', 'fastapi') if m in sys.modules])"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# without a database

def test_postgresql_gone_and_back(cluster, url):
    if url.startswith("sqlite"): pytest.skip("about the server")
    queue = JobQueue(url, patience=1.)
    a = queue.submit("night", T, WHO, None, {}, key="k")
    queue.claim("w")
    cluster.stop()
    try:
        for call in (lambda: queue.submit("night", T, WHO, None, {}), lambda: queue.get(a.id, T), queue.depth, queue.ping, lambda: queue.claim("w"), lambda: queue.finish(a.id, "w", {}), lambda: queue.cancel(a.id, T)):
            e = refused("queue_unavailable", call, 503)
            assert e.retry_after and url not in str(e)
    finally: cluster.start()
    assert queue.ping() and queue.submit("night", T, WHO, None, {}, key="k").id == a.id and queue.finish(a.id, "w", {"x": 1})
    cluster.stop(), cluster.start() # a connection that was lost between two calls costs nobody anything
    assert queue.get(a.id, T).result == {"x": 1}
    queue.close()


def test_an_answer_that_was_lost(queue, monkeypatch):
    "The statement was carried out, and the connection broke before we heard: asked again, the queue says so."
    a = queue.submit("night", T, WHO, None, {})
    queue.claim("w")
    real, calls = queue._db.fetch, []
    class Broken(queue._db.errors[0]): pass
    def fetch(c, sql, values):
        rows = real(c, sql, values)
        calls.append(sql)
        if len(calls) == 1: raise Broken("connection lost")
        return rows
    monkeypatch.setattr(queue._db, "fetch", fetch)
    monkeypatch.setattr(queue._db, "lost", lambda e: True)
    assert queue.finish(a.id, "w", {"x": 1}) and len(calls) >= 3
    calls.clear()
    b = queue.submit("night", T, WHO, None, {})
    assert queue.depths()["queued"] == 1 and queue.get(b.id, T).id == b.id


def test_sqlite_moved_deleted_and_back(sqlite, tmp_path):
    file = tmp_path / "jobs.sqlite"
    a = sqlite.submit("night", T, WHO, None, {})
    file.rename(tmp_path / "away")
    for call in (sqlite.depth, sqlite.ping, lambda: sqlite.submit("night", T, WHO, None, {})): refused("queue_unavailable", call, 503)
    assert not file.exists(), "no new one is made in its place"
    (tmp_path / "away").rename(file)
    assert sqlite.get(a.id, T) == a


def test_sqlite_locked(sqlite, tmp_path):
    a = sqlite.submit("night", T, WHO, None, {})
    other = sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    refused("queue_unavailable", lambda: sqlite.submit("night", T, WHO, None, {}), 503)
    assert sqlite.get(a.id, T) == a, "reading goes on"
    other.execute("ROLLBACK")
    assert sqlite.submit("night", T, WHO, None, {}).state == "queued"
    other.close()


def test_sqlite_full(sqlite):
    "Nothing is promised that isn't on the disk."
    a = sqlite.submit("night", T, WHO, None, {})
    pages = sqlite._rows("PRAGMA page_count")[0]["page_count"]
    sqlite._rows(f"PRAGMA max_page_count = {pages}")
    refused("queue_unavailable", lambda: sqlite.submit("night", T, WHO, None, {"x": "x" * 100_000}), 503)
    assert sqlite.list(T) == [a] and sqlite.submit("night", T, WHO, None, {"x": "x" * 100_000}).state == "queued", "another connection, with space again"


def test_sqlite_damaged(tmp_path):
    (tmp_path / "jobs.sqlite").write_bytes(b"this is no database" * 1000)
    refused("queue_unavailable", JobQueue(f"sqlite:///{tmp_path / 'jobs.sqlite'}").depth, 503)


def test_sqlite_keeps_nothing_of_what_was_deleted(sqlite, tmp_path):
    a = sqlite.submit("night", T, WHO, "SUBJECT-4711", {"note": "PAYLOAD-4711"})
    assert any(b"4711" in p.read_bytes() for p in tmp_path.glob("jobs.sqlite*"))
    sqlite.delete([a.id])
    assert not any(b"4711" in p.read_bytes() for p in tmp_path.glob("jobs.sqlite*"))


def test_no_address_of_a_server():
    pytest.importorskip("psycopg")
    with pytest.raises(ConfigError, match="no address"): JobQueue("postgresql://host/db?nonsense=1")
    refused("queue_unavailable", JobQueue("postgresql://nobody@/none?host=/nowhere", patience=.1).ping, 503)


# workers

@pytest.fixture
def work(url, tmp_path, monkeypatch):
    "Settings for workers that take their handlers from a file."
    (tmp_path / "night_handlers.py").write_text(HANDLERS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}")
    kinds = {k: f"night_handlers:{k}" for k in ("gate", "deaf", "refuses", "breaks", "odd", "absent")}
    return lambda **kw: WorkerSettings(**dict(queue=url, handlers=kinds, scratch=str(tmp_path / "scratch"), options={"folder": str(tmp_path)}, poll=.05, grace=5., backoff=0.) | kw)

def lines(folder: Path) -> list[str]: return (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
def started(folder: Path, n: int = 1): return lambda: sum(line.startswith("start") for line in lines(folder)) >= n
def leftovers(folder: Path) -> list[Path]: return [p for p in (folder / "scratch").rglob("*") if p.is_file()]


def test_sigkill_of_a_worker(queue, work, tmp_path):
    a = queue.submit("gate", T, WHO, None, {"x": 7})
    with WorkerPool(1, work()) as pool:
        until(started(tmp_path))
        victim, = pool.pids
        assert leftovers(tmp_path), "what the next one has to clear away"
        os.kill(victim, signal.SIGKILL)
        until(started(tmp_path, 2))
        assert pool.restarts == 1 and pool.pids != [victim] and queue.get(a.id, T).attempts == 2
        (tmp_path / "go").touch()
        until(lambda: queue.get(a.id, T).finished)
    assert queue.get(a.id, T).result == {"x": 7, "attempt": 2} and lines(tmp_path).count("end") == 1 and not leftovers(tmp_path)


def test_sigstop_of_a_worker(queue, work, tmp_path):
    "One that hangs loses its lease; when it wakes up again, its result isn't taken."
    a = queue.submit("gate", T, WHO, None, {})
    with WorkerPool(1, work(lease=2.)) as slow:
        until(started(tmp_path))
        os.kill(slow.pids[0], signal.SIGSTOP)
        until(lambda: queue.expire() or queue.get(a.id, T).state == "queued")
        (tmp_path / "go").touch()
        assert queue.claim("other").attempts == 2 and queue.finish(a.id, "other", {"by": "other"})
        os.kill(slow.pids[0], signal.SIGCONT)
    assert queue.get(a.id, T).result == {"by": "other"}


SUPERVISOR = """
import json, sys, time
from pftsleep.apps.jobs import WorkerPool, WorkerSettings
pool = WorkerPool(2, WorkerSettings(**json.loads(sys.argv[1]))).start()
print(json.dumps(pool.pids), flush=True)
time.sleep(600)
"""

def supervisor(s: WorkerSettings) -> tuple[subprocess.Popen, list[int]]:
    from dataclasses import asdict
    p = subprocess.Popen([sys.executable, "-c", SUPERVISOR, json.dumps(asdict(s))], stdout=subprocess.PIPE, text=True)
    return p, json.loads(p.stdout.readline())


def test_sigkill_of_everything(queue, work, tmp_path):
    "The supervisor dies without a word: no orphan stays, and the next one does what was left, queued and running."
    ids = [queue.submit("gate", T, WHO, None, {"x": x}).id for x in range(3)]
    p, pids = supervisor(work(handlers={"gate": "night_handlers:gate"}))
    until(started(tmp_path, 2))
    p.kill(), p.wait(), p.stdout.close()
    until(lambda: not any(map(alive, pids)))
    until(lambda: queue.depths()["queued"] == 3) # given back, since they had time to
    assert {queue.get(i, T).attempts for i in ids} == {0} and not leftovers(tmp_path)
    (tmp_path / "go").touch()
    with WorkerPool(2, work()): until(lambda: queue.depths()["done"] == 3)
    assert [queue.get(i, T).result["x"] for i in ids] == [0, 1, 2] and lines(tmp_path).count("end") == 3


def test_sigkill_of_everything_at_once(queue, work, tmp_path):
    "Also the workers: nobody can give anything back, the leases run out."
    ids = [queue.submit("gate", T, WHO, None, {"x": x}).id for x in range(3)]
    p, pids = supervisor(work(lease=3.))
    until(started(tmp_path, 2))
    for pid in (p.pid, *pids): os.kill(pid, signal.SIGKILL)
    p.wait(), p.stdout.close()
    assert queue.depths() == {"queued": 1, "running": 2, "done": 0, "failed": 0, "cancelled": 0}
    (tmp_path / "go").touch()
    with WorkerPool(2, work()): until(lambda: queue.depths()["done"] == 3)
    assert sorted(queue.get(i, T).attempts for i in ids) == [1, 2, 2] and not leftovers(tmp_path)


def test_sigterm_lets_finish(queue, work, tmp_path):
    a = queue.submit("gate", T, WHO, None, {})
    pool = WorkerPool(1, work(grace=30.)).start()
    until(started(tmp_path))
    stopping = threading.Thread(target=pool.stop)
    stopping.start(), (tmp_path / "go").touch(), stopping.join()
    assert queue.get(a.id, T).state == "done" and pool.pids == []


def test_sigterm_gives_back(queue, work, tmp_path):
    a = queue.submit("deaf", T, WHO, None, {})
    with WorkerPool(1, work(grace=.1)) as pool: until(started(tmp_path)); pid, = pool.pids
    assert (queue.get(a.id, T).state, queue.get(a.id, T).attempts) == ("queued", 0) and not alive(pid)


@pytest.mark.parametrize("kind", ["gate", "deaf"])
def test_cancel_while_running(queue, work, tmp_path, kind):
    "One handler listens, the other has to be ended."
    a = queue.submit(kind, T, WHO, None, {})
    with WorkerPool(1, work(grace=.1, lease=.6)) as pool:
        until(started(tmp_path))
        pid, = pool.pids
        queue.cancel(a.id, T)
        b = queue.submit("refuses", T, WHO, None, {})
        until(lambda: queue.get(b.id, T).finished) # there is a worker for the next
        assert alive(pid) == (kind == "gate")
    assert queue.get(a.id, T).state == "cancelled" and "end" not in lines(tmp_path) and not leftovers(tmp_path)


def test_a_job_that_never_ends(queue, work, tmp_path):
    a = queue.submit("deaf", T, WHO, None, {})
    with WorkerPool(1, work(limit=.5, lease=.6)): until(lambda: queue.get(a.id, T).finished)
    assert queue.get(a.id, T).error["code"] == "too_slow" and len(lines(tmp_path)) == 1


def test_what_handlers_raise(queue, work, tmp_path, capfd):
    a = {k: queue.submit(k, T, WHO, None, {}).id for k in ("refuses", "breaks", "odd", "absent")}
    other = queue.submit("of another worker", T, WHO, None, {})
    with WorkerPool(1, work()): until(lambda: all(queue.get(i, T).finished for i in a.values()))
    told = {k: queue.get(i, T) for k, i in a.items()}
    assert {k: (j.state, j.error["code"], j.attempts) for k, j in told.items()} == {"refuses": ("failed", "edf_error", 1), "breaks": ("failed", "internal", 3), "odd": ("failed", "internal", 3), "absent": ("failed", "config_error", 1)}
    assert queue.get(other.id, T).state == "queued" and sum(line == "start" for line in lines(tmp_path)) == 3
    err = capfd.readouterr().err
    assert "ValueError at night_handlers.py:" in err and "Mueller" not in err + str(told), "neither the log nor the answer quotes anything"


def test_errors_in_words():
    e = job_error(ChannelError("there is no such label", "night", "EEG X", "the file has EEG Y"))
    assert e == {"code": "channel_error", "problem": "there is no such label (channel 'EEG X')", "remedy": "the file has EEG Y"}
    assert {job_error(c("x"))["code"] for c in PFTSleepError.__subclasses__() if c is not RequestError} >= {"read_error", "alignment_error", "store_error", "config_error", "model_error"}


def test_workers_wait_for_the_database(url, work, tmp_path, request):
    "It goes while a job runs, and comes back after the job's end."
    queue = JobQueue(url, patience=1.)
    a = queue.submit("gate", T, WHO, None, {"x": 1})
    b = queue.submit("gate", T, WHO, None, {"x": 2})
    file = tmp_path / "jobs.sqlite"
    with WorkerPool(1, work(lease=60.)) as pool:
        until(started(tmp_path))
        before = pool.pids
        file.rename(tmp_path / "away") if url.startswith("sqlite") else request.getfixturevalue("cluster").stop()
        refused("queue_unavailable", queue.ping, 503)
        (tmp_path / "go").touch()
        until(lambda: "end" in lines(tmp_path))
        (tmp_path / "away").rename(file) if url.startswith("sqlite") else request.getfixturevalue("cluster").start()
        until(lambda: queue.depths()["done"] == 2)
        assert pool.pids == before and pool.restarts == 0
    assert [queue.get(j.id, T).result for j in (a, b)] == [{"x": 1, "attempt": 1}, {"x": 2, "attempt": 1}]
    queue.close()


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_a_worker_shows_no_address(work, tmp_path, monkeypatch):
    "The address of the queue, which may hold a password, is in neither arguments nor environment."
    with WorkerPool(1, work(options={"folder": str(tmp_path), "word": "geheim-4711"})) as pool:
        pid, = pool.pids
        shown = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    assert b"geheim-4711" not in shown and b"jobs.sqlite" not in shown and b"pg-" not in shown


def test_workers_that_cant_start_are_not_started_in_a_rush(work, monkeypatch):
    monkeypatch.setattr(jobs, "_STARTER", "raise SystemExit(3)")
    with WorkerPool(1, work()) as pool: until(lambda: pool.restarts >= 2); pauses = dict(pool._pause)
    assert pauses[0] >= .4
