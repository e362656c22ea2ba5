"What goes wrong in a machine room: processes are killed, disks fill, weights rot, databases go away, people pull plugs. Nothing is lost, nothing is answered wrongly, and everybody is told."
import asyncio
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient
from serving import Running, add_encoder, finished, night_edf, registry_with, week_body
from test_jobs_queue import cluster # noqa: F401 (a fixture)

from pftsleep.apps.audit import verify_audit
from pftsleep.apps.jobs import JobQueue
from pftsleep.apps.registry import Registry
from pftsleep.apps.service import Service, ServiceSettings, create_app, pieces, queue_url
from pftsleep.apps.serving import only_one
from pftsleep.apps.vault import Keyring, Vault
from pftsleep.apps.week_requests import parse_week, run_weeks
from pftsleep.errors import ConfigError, RequestError

JSON = {"Content-Type": "application/json"}


class Inside:
    "A service in this process, and clients of it."
    def __init__(self, folder: Path, **settings):
        self.models = settings.pop("models", None) or registry_with(folder)
        self.service = Service(ServiceSettings(self.models, folder / "data", workers=0, **settings))
        self.app = create_app(self.service)
        self.client = TestClient(self.app, raise_server_exceptions=False)
        self.headers = {role: {"Authorization": f"Bearer {self.service.keys.create('main', [role], role)[1]}"} for role in ("clinician", "admin", "auditor")}
    def __enter__(self): self.client.__enter__(); return self
    def __exit__(self, *_): self.client.__exit__(None, None, None)
    def ask(self, method, path, role="clinician", headers=(), **more) -> httpx.Response: return self.client.request(method, path, headers=self.headers[role] | dict(headers), **more)
    def week(self, seed=0, mode="embed", **more) -> httpx.Response: return self.ask("POST", f"/v1/weeks/{mode}", content=week_body(seed), headers=JSON | more)
    def night(self, seed=0, **headers) -> httpx.Response: return self.ask("POST", "/v1/nights", content=night_edf(300., seed), headers=headers)


@pytest.fixture
def inside(tmp_path):
    with Inside(tmp_path) as it: yield it


def vector(models: Path, version: str, seed: int) -> np.ndarray:
    "What this version says about this week."
    registry = Registry(models)
    registry.refresh()
    return np.array(run_weeks("embed", registry.get("pat", version), [parse_week(week_body(seed), "application/json")])[0]["result"]["weeks"][0]["embedding"])


def said(reply: httpx.Response) -> np.ndarray:
    assert reply.status_code == 200, reply.text
    return np.array(reply.json()["result"]["weeks"][0]["embedding"])


def inputs(vault: Vault) -> list[str]: return vault.names("input-") + [p.name for p in (vault.folder / ".parts").glob("*.part")]


def refused(reply: httpx.Response, status: int, code: str) -> dict:
    "A refusal that a program can read, without anything of the server's in it."
    assert (reply.status_code, reply.headers["content-type"], reply.json()["code"]) == (status, "application/problem+json", code), reply.text
    assert reply.json()["request_id"] == reply.headers["x-request-id"] and not re.search(r"(^|[\s'\"])/", reply.json()["detail"])
    return reply.json()


# weights


def rot(file: Path) -> bytes: # what was there
    "One bit."
    data = file.read_bytes()
    file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    return data


def test_weights_that_rot_on_the_disk_answer_nobody(inside):
    add_encoder(inside.models, "1.1", seed=1)
    old, new = vector(inside.models, "1.0", 0), vector(inside.models, "1.1", 0)
    assert inside.ask("POST", "/v1/models/refresh", "admin").json()["changes"]
    np.testing.assert_allclose(said(inside.week()), new, atol=1e-5)
    weights = next((inside.models / "pat/1.1").rglob("model/*.safetensors"))
    data = rot(weights)
    assert said(inside.week(0)) is not None # what is in memory was verified, and goes on until the next look
    inside.ask("POST", "/v1/models/refresh", "admin")
    reply = inside.week()
    np.testing.assert_allclose(said(reply), old, atol=1e-5) # the older version, visibly
    assert reply.json()["about"]["model"]["version"] == "1.0" and reply.json()["about"]["model"]["fallback_from"] == "1.1"
    refused(inside.ask("POST", "/v1/weeks/embed?version=1.1", content=week_body(), headers=JSON), 503, "model_not_ready")
    rows = {r["version"]: r for r in inside.ask("GET", "/v1/models").json()["models"] if r["name"] == "pat"}
    assert rows["1.1"]["state"] == "failed" and "SHA-256" in rows["1.1"]["reason"]
    other = next((inside.models / "pat/1.0").rglob("model/*.safetensors"))
    healthy = rot(other)
    inside.ask("POST", "/v1/models/refresh", "admin")
    refused(inside.week(), 503, "model_not_ready")
    ready = inside.client.get("/readyz")
    assert ready.status_code == 503 and any("pat" in r for r in ready.json()["reasons"]) and inside.client.get("/livez").status_code == 200
    for file, was in ((other, healthy), (weights, data)): file.write_bytes(was)
    inside.ask("POST", "/v1/models/refresh", "admin")
    np.testing.assert_allclose(said(inside.week()), new, atol=1e-5)
    assert inside.client.get("/readyz").status_code == 200
    actions = {r["action"] for r in inside.service.audit.read(0, 1000)}
    assert {"model.load", "model.checksum_failed", "model.fallback"} <= actions
    metrics = inside.ask("GET", "/metrics", "auditor").text
    assert float(re.search(r"^pftsleep_checksum_failures_total (\S+)", metrics, re.M)[1]) >= 2


def test_a_version_that_was_copied_half_is_not_served(inside):
    add_encoder(inside.models, "2.0", seed=2)
    for part in ("manifest.json", "golden.safetensors", "model"): # each way of being half there
        shutil.rmtree(inside.models / "pat/3.0", ignore_errors=True)
        shutil.copytree(inside.models / "pat/2.0", inside.models / "pat/3.0")
        path = inside.models / "pat/3.0" / part
        if path.is_dir(): shutil.rmtree(path)
        else: path.write_bytes(path.read_bytes()[:100])
        inside.ask("POST", "/v1/models/refresh", "admin")
        reply = inside.week(4)
        assert reply.status_code == 200 and reply.json()["about"]["model"]["version"] == "2.0" and reply.json()["about"]["model"]["fallback_from"] == "3.0"
    np.testing.assert_allclose(said(reply), vector(inside.models, "2.0", 4), atol=1e-5)


def test_models_are_exchanged_under_load_and_nobody_notices(inside):
    "Every answer is of the version that it names; none fails while versions come and go."
    add_encoder(inside.models, "1.1", seed=1)
    by = {v: {i: vector(inside.models, v, i) for i in range(4)} for v in ("1.0", "1.1")}
    answers, stop = [], threading.Event()
    def person(who: int) -> None:
        n = 0
        while not stop.is_set():
            n += 1
            answers.append((who % 4, inside.ask("POST", f"/v1/weeks/embed?min_coverage={.5 + (100 * who + n) * 1e-6:.6f}", content=week_body(who % 4), headers=JSON)))
    with ThreadPoolExecutor(4) as pool:
        people = [pool.submit(person, i) for i in range(4)]
        for version in ("1.1", "1.0", "1.1"):
            (inside.models / "pat/default").write_text(version + "\n")
            assert inside.ask("POST", "/v1/models/refresh", "admin").status_code == 200
            seen = len(answers)
            while len(answers) < seen + 12: time.sleep(.01); assert not any(p.done() for p in people)
        stop.set()
        for p in people: p.result()
    versions = [r.json()["about"]["model"]["version"] for _, r in answers]
    for (i, reply), version in zip(answers, versions, strict=True): np.testing.assert_allclose(said(reply), by[version][i], atol=1e-5)
    assert set(versions) == {"1.0", "1.1"}


# uploads


def test_the_same_night_sent_twenty_times_is_one_job(inside):
    with ThreadPoolExecutor(8) as pool: replies = list(pool.map(lambda _: inside.night(0, **{"Idempotency-Key": "night-17"}), range(20)))
    assert {r.status_code for r in replies} == {202} and len({r.json()["id"] for r in replies}) == 1
    assert len(inputs(inside.service.vault)) == 1 and inside.service.queue.depth() == 1
    refused(inside.night(1, **{"Idempotency-Key": "night-17"}), 409, "key_reused")
    refused(inside.night(0, **{"Idempotency-Key": "with space"}), 422, "bad_idempotency_key")
    assert len(inputs(inside.service.vault)) == 1
    assert inside.night(0).json()["id"] != replies[0].json()["id"] # without a key it is another job


def test_an_upload_that_breaks_off_leaves_nothing(inside):
    "At the level of ASGI: the caller has gone after a part."
    body = night_edf(300.)
    async def send_part(n: int) -> list:
        parts, out = [{"type": "http.request", "body": body[:n], "more_body": True}, {"type": "http.disconnect"}], []
        async def receive(): return parts.pop(0)
        async def send(m): out.append(m)
        headers = [(b"authorization", inside.headers["clinician"]["Authorization"].encode()), (b"content-length", str(len(body)).encode())]
        await inside.app(dict(type="http", asgi={"version": "3.0"}, http_version="1.1", method="POST", path="/v1/nights", raw_path=b"/v1/nights", root_path="", scheme="http", query_string=b"", client=("127.0.0.1", 1),
            server=("x", 80), headers=headers), receive, send)
        return out
    for n in (0, 100, 256, 5000, len(body) - 1):
        out = asyncio.run(send_part(n))
        assert out[0]["status"] == 400 and json.loads(out[1]["body"])["code"] == "aborted"
        assert inputs(inside.service.vault) == [] and inside.service.queue.depth() == 0
    assert inside.service.held == 0 and inside.night().status_code == 202


def test_a_body_that_drips_is_not_waited_for():
    request = lambda stream, **headers: SimpleNamespace(headers={k.replace("_", "-"): v for k, v in headers.items()}, stream=stream)
    async def drip():
        for _ in range(1000): await asyncio.sleep(.01); yield b"x"
    async def silent(): yield b"x"; await asyncio.sleep(60); yield b"y"
    async def taken(stream, limit=10_000, **told):
        headers = told.pop("headers", {})
        return [p async for p in pieces(request(stream, **headers), limit, **told)]
    for stream, told, code in ((silent, dict(patience=.05), "too_slow"), (drip, dict(patience=1., total=.1), "too_slow"), (drip, dict(limit=5), "too_large"), (drip, dict(limit=5, headers={"content_length": "6"}), "too_large")):
        with pytest.raises(RequestError) as e: asyncio.run(taken(stream, **told))
        assert e.value.code == code


def test_weeks_that_would_not_fit_in_memory_together_are_refused(inside):
    object.__setattr__(inside.service.settings, "max_held", 1000)
    refused(inside.week(5), 503, "busy")
    object.__setattr__(inside.service.settings, "max_held", 1 << 29)
    assert inside.week(5).status_code == 200 and inside.service.held == 0


# the disk


@contextlib.contextmanager
def full_disk(pid: int, size: int):
    "No file of this process can grow beyond so many bytes, as far as anybody may forbid that without being an administrator."
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally: resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    with Running(registry_with(folder), folder / "data", "--workers", "0", "--per_minute", "1000000") as running: yield running


def test_a_full_disk_refuses_and_recovers(server):
    "Nothing is answered that couldn't be written down, nothing half is kept, and nobody has to start it again."
    doctor = server.client("clinician")
    vault = Vault(server.data / "vault", Keyring.from_file(server.data / "keyring.json"))
    ask = lambda seed: doctor.post("/v1/weeks/embed", content=week_body(seed), headers=JSON)
    assert ask(0).status_code == 200
    for _ in range(12): assert ask(0).status_code == 200 # the log has grown beyond 4 kB
    before = server.client("auditor").get("/v1/audit/verify").json()["records"]
    with full_disk(server.pid, 4096):
        refused(ask(1), 503, "audit_unavailable")
        night = doctor.post("/v1/nights", content=night_edf())
        assert night.status_code == 503 and night.json()["code"] in ("storage_unavailable", "queue_unavailable", "audit_unavailable")
        assert httpx.get(server.url + "/livez").status_code == 200
        ready = httpx.get(server.url + "/readyz")
        assert ready.status_code == 503 and "the audit log can't be written" in ready.json()["reasons"]
    assert inputs(vault) == [] and doctor.get("/v1/jobs").json()["jobs"] == []
    assert ask(1).status_code == 200 and httpx.get(server.url + "/readyz").status_code == 200
    report = server.client("auditor").get("/v1/audit/verify").json()
    assert report["ok"] and report["records"] > before


def test_a_plug_is_pulled_in_an_upload(server):
    body, vault = night_edf(), Vault(server.data / "vault", Keyring.from_file(server.data / "keyring.json"))
    for part in (10, 3000, len(body) // 2):
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            s.sendall(f"POST /v1/nights HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key('clinician')}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body[:part])
            time.sleep(.05)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0") # a reset, not a goodbye
    end = time.monotonic() + 10
    while inputs(vault) and time.monotonic() < end: time.sleep(.05)
    assert inputs(vault) == [] and server.client("clinician").get("/v1/jobs").json()["jobs"] == []


def test_a_second_server_of_the_same_name_does_not_start(server):
    with pytest.raises(ConfigError, match="another name"), only_one(server.data, "main"): pass
    with only_one(server.data, "other"): pass
    for name in ("../x", "", "a/b"):
        with pytest.raises(ConfigError), only_one(server.data, name): pass


def test_it_stops_although_somebody_listens(server):
    "The last one of this server: a stream of events doesn't keep it, and its exit status says that all is well."
    job = server.client("clinician").post("/v1/nights", content=night_edf()).json()["id"]
    with server.client("clinician").stream("GET", f"/v1/jobs/{job}/events") as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: queued"
        server.process.send_signal(signal.SIGINT) # Ctrl-C
        assert any("stopping" in line for line in lines)
    assert server.stop(seconds=25) == 0 and verify(server).ok


def verify(server: Running, instance: str = "main"):
    "The audit log of a server that has ended."
    key = Vault(server.data / "vault", Keyring.from_file(server.data / "keyring.json")).get("service/audit", "audit")
    return verify_audit(server.data / "audit" / instance, key)


# processes


def children(pid: int) -> list[int]: return [int(p) for t in Path(f"/proc/{pid}/task").iterdir() for p in (t / "children").read_text().split()]


def alive(pid: int) -> bool:
    try: return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError: return False


def begun(client: httpx.Client, job: str, seconds: float = 60.) -> None:
    "Wait until a worker has it."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        told = client.get(f"/v1/jobs/{job}").json()
        if told["state"] == "running" and told["progress"] > 0: return
        assert told["state"] in ("queued", "running"), told
        time.sleep(.01)
    raise AssertionError("nobody has begun with it")


LONG = 4 * 3600. # s of a night whose staging can be interrupted


@pytest.mark.slow
def test_a_worker_is_killed_in_mid_job(tmp_path):
    with Running(registry_with(tmp_path), tmp_path / "data", "--workers", "1") as server:
        doctor = server.client("clinician")
        quiet, killed = (doctor.post("/v1/nights", content=night_edf(LONG)).json()["id"] for _ in range(2))
        assert finished(doctor, quiet)["state"] == "done"
        begun(doctor, killed)
        (worker,) = children(server.pid)
        os.kill(worker, signal.SIGKILL)
        told = finished(doctor, killed)
        assert told["state"] == "done" and told["attempts"] == 2
        one, two = (doctor.get(f"/v1/nights/{j}").json() for j in (quiet, killed))
        assert one["stages"] == two["stages"] and one["probabilities"] == two["probabilities"]
        assert float(re.search(r"^pftsleep_worker_restarts_total (\S+)", server.client("auditor").get("/metrics").text, re.M)[1]) >= 1
        jobs = re.findall(r'^pftsleep_jobs_total{outcome="done"} (\S+)', server.client("auditor").get("/metrics").text, re.M)
        assert jobs == ["2.0"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_the_server_ends_in_mid_job_and_comes_back(how, tmp_path):
    models, data = registry_with(tmp_path), tmp_path / "data"
    with Running(models, data, "--workers", "1") as server:
        doctor = server.client("clinician")
        jobs = [doctor.post("/v1/nights", content=night_edf(LONG, i), headers={"Idempotency-Key": f"n{i}"}).json()["id"] for i in range(3)]
        begun(doctor, jobs[0])
        workers = children(server.pid)
        if how == "SIGKILL": server.kill()
        else: assert server.stop(getattr(signal, how)) == 0
        end = time.monotonic() + 20
        while any(map(alive, workers)) and time.monotonic() < end: time.sleep(.1)
        assert not any(map(alive, workers)) # nobody works on for a server that isn't there
    assert verify(server).ok
    with Running(models, data, "--workers", "1") as again:
        doctor = again.client("clinician")
        assert [doctor.post("/v1/nights", content=night_edf(LONG, i), headers={"Idempotency-Key": f"n{i}"}).json()["id"] for i in range(3)] == jobs # sent again, in doubt: still the same jobs
        for job in jobs:
            assert finished(doctor, job, 180)["state"] == "done"
            assert len(doctor.get(f"/v1/nights/{job}").json()["stages"]) == LONG / 30
        vault = Vault(data / "vault", Keyring.from_file(data / "keyring.json"))
        assert len(vault.names("input-")) == 3 and len(vault.names("result-")) == 3 and len(doctor.get("/v1/jobs").json()["jobs"]) == 3
        assert again.client("auditor").get("/v1/audit/verify").json()["ok"]
    assert not list((data / "scratch").rglob("*.edf")) # no decrypted night is left


# the database


def test_the_database_is_away_and_weeks_are_answered(tmp_path, cluster): # noqa: F811
    with Inside(tmp_path, queue=cluster.url) as it:
        job = it.night().json()["id"]
        cluster.stop()
        try:
            refused(it.night(1), 503, "queue_unavailable")
            refused(it.ask("GET", f"/v1/jobs/{job}"), 503, "queue_unavailable")
            assert it.week().status_code == 200
            ready = it.client.get("/readyz")
            assert ready.status_code == 503 and ready.json()["reasons"] == ["the queue can't be reached"]
            assert it.ask("GET", "/metrics", "auditor").status_code == 200
            assert len(inputs(it.service.vault)) == 1 # that of the job; nothing of the refused one
        finally: cluster.start()
        assert it.ask("GET", f"/v1/jobs/{job}").json()["state"] == "queued" and it.client.get("/readyz").status_code == 200
        assert it.night(1).status_code == 202
        it.service.queue.delete([j.id for j in it.service.queue.list("main")])


@pytest.mark.slow
def test_the_database_goes_and_comes_back_while_a_night_is_staged(tmp_path, cluster): # noqa: F811
    with Running(registry_with(tmp_path), tmp_path / "data", "--workers", "1", "--queue", cluster.url) as server:
        doctor = server.client("clinician")
        job = doctor.post("/v1/nights", content=night_edf(LONG)).json()["id"]
        begun(doctor, job)
        cluster.stop()
        try:
            assert doctor.get(f"/v1/jobs/{job}").status_code == 503 and doctor.post("/v1/weeks/embed", content=week_body(), headers=JSON).status_code == 200
            time.sleep(4)
        finally: cluster.start()
        assert finished(doctor, job)["state"] == "done" and len(doctor.get(f"/v1/nights/{job}").json()["stages"]) == LONG / 30
        JobQueue(cluster.url).delete([job])


def test_counting_nights_that_have_ended(inside):
    "Each once, however many look; those that were deleted aren't counted."
    from pftsleep.apps.service import settle
    queue, ids = inside.service.queue, [inside.night(i).json()["id"] for i in range(3)]
    assert settle(inside.service) == 0 and len(inside.service.open) == 3
    for outcome in ("done", "failed"):
        job = queue.claim("w")
        queue.finish(job.id, "w", {}) if outcome == "done" else queue.fail(job.id, "w", dict(code="x", problem="x", remedy=None))
    with ThreadPoolExecutor(8) as pool: assert sum(pool.map(lambda _: settle(inside.service), range(16))) == 2
    queue.delete(ids)
    assert settle(inside.service) == 1 and inside.service.open == {}
    metrics = inside.ask("GET", "/metrics", "auditor").text
    assert re.findall(r'^pftsleep_jobs_total{outcome="(\w+)"} (\S+)', metrics, re.M) == [("done", "1.0"), ("failed", "1.0")]
    assert "pftsleep_job_seconds_count 2.0" in metrics


def test_the_description_of_the_service_is_whole(inside):
    "Every reference leads somewhere, and both forms of a week are there."
    told = inside.client.get("/openapi.json").json()
    named = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(told)))
    assert {"WeekBody", "WeekValues", "WeekRows", "Problem"} <= named <= set(told["components"]["schemas"])
    assert queue_url(inside.service.settings).startswith("sqlite:///")


def test_keys_from_a_program_and_a_scratch_folder_elsewhere(tmp_path):
    "As with a key management service: a night goes the whole way, no key lies in the data folder, and nothing stays decrypted. A keyring that somebody names is never made."
    models = registry_with(tmp_path)
    Keyring.create(ring := tmp_path / "ring.json")
    with Running(models, tmp_path / "data", "--keyring_command", f"{shutil.which('cat')},{ring}", "--scratch", tmp_path / "scratch") as s:
        client = s.client("clinician")
        job = client.post("/v1/nights", content=night_edf(120)).json()
        assert finished(client, job["id"])["state"] == "done" and client.get(f"/v1/nights/{job['id']}").status_code == 200
    assert not (tmp_path / "data" / "keyring.json").exists() and (tmp_path / "scratch" / "main").is_dir()
    assert not any(p.is_file() for p in (tmp_path / "scratch").rglob("*")) and not (tmp_path / "data" / "scratch").exists()
    with pytest.raises(ConfigError): Service(ServiceSettings(models, tmp_path / "other", keyring=tmp_path / "slip.json"))
    assert not (tmp_path / "slip.json").exists()
