"Who may do what: every route of the service for every role, for nobody, for keys that are no longer good, and for people of other hospitals."
import asyncio
import datetime as dt
import http.server
import ipaddress
import json
import re

import socket
import ssl
import tempfile
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi")
jwt = pytest.importorskip("jwt")
pytest.importorskip("cryptography")
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from fastapi.testclient import TestClient
from serving import Running, night_edf, registry_with, week_body

from pftsleep.apps.jobs import JobReporter
from pftsleep.apps.nights import night_job
from pftsleep.apps.registry import publish_model
from pftsleep.apps.service import Service, ServiceSettings, create_app

from pftsleep.models.pat import PAT
from pftsleep.models.transformer import PatchTransformer

ROLES = ("admin", "clinician", "researcher", "auditor")
JSON = {"Content-Type": "application/json"}
EDF = {"Content-Type": "application/octet-stream"}


@cache
def task_source() -> Path:
    "A model with a head, as `pftsleep finetune` writes it."
    ft = pytest.importorskip("pftsleep.training.finetune")
    import numpy as np
    import torch

    from pftsleep.data.standardise import Standardiser
    torch.manual_seed(3)
    scaler = ft.plain_scaler(Standardiser("global", np.array([250.]), np.array([400.]), "counts", "example", 9, "", "", True, frozenset()))
    model = ft.TaskModel(PatchTransformer(PAT.S), ft.TaskHead(ft.TaskHeadConfig(96)), ("no", "tired"), scaler).eval()
    model.provenance = dict(model=model.hash, epochs=3, best_epoch=2, val_auc=.61, cohort="example")
    folder = Path(tempfile.mkdtemp(prefix="pftsleep-task-")) / "task"
    ft.save_task(model, folder)
    return folder


class World:
    "A service in this process, with people of two wards, and workers that are called by hand."
    def __init__(self, tmp: Path, task: bool = False, models: Path | None = None, **settings):
        self.models = models or registry_with(tmp)
        if task: publish_model(task_source(), self.models, "tired", "1.0")
        self.service = Service(ServiceSettings(self.models, tmp / "data", workers=0, **dict(per_minute=10**9, burst=10**9) | settings))
        self.data, self.app, self._keys = tmp / "data", create_app(self.service), {}
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def key(self, role: str, tenant: str = "ward-7") -> str:
        if (role, tenant) not in self._keys: self._keys[role, tenant] = self.service.keys.create(tenant, role.split("+"), role)[1]
        return self._keys[role, tenant]

    def head(self, role: str | None, tenant: str = "ward-7") -> dict: return {"Authorization": f"Bearer {self.key(role, tenant)}"} if role else {}

    def ask(self, method: str, url: str, role: str | None = "clinician", tenant: str = "ward-7", headers=None, **more) -> httpx.Response:
        return self.client.request(method, url, headers={**self.head(role, tenant), **(headers or {})}, **more)

    def week(self, mode: str = "embed", body: bytes | None = None, role: str = "clinician", tenant: str = "ward-7", headers=None, **params) -> httpx.Response:
        if mode in ("embed", "explain"): params = {"model": "pat"} | params
        return self.ask("POST", f"/v1/weeks/{mode}", role, tenant, JSON | (headers or {}), content=week_body() if body is None else body, params=params)

    def night(self, edf: bytes | None = None, role: str = "clinician", tenant: str = "ward-7", headers=None, **params) -> dict:
        reply = self.ask("POST", "/v1/nights", role, tenant, EDF | (headers or {}), content=night_edf() if edf is None else edf, params=params)
        assert reply.status_code == 202, reply.text
        return reply.json()

    def work(self) -> int:
        "What the workers do, once."
        done, queue = 0, self.service.queue
        options = dict(vault=str(self.service.vault.folder), keyring=str(self.service.keyring.source), registry=str(self.models))
        while (job := queue.claim("test")) is not None:
            (scratch := self.data / "scratch").mkdir(exist_ok=True)
            queue.finish(job.id, "test", night_job(job, JobReporter(lambda *_: True, options, scratch)))
            for left in scratch.iterdir(): left.unlink()
            done += 1
        return done

    def staged(self, **more) -> str: # id of a night
        id = self.night(**more)["id"]
        self.work()
        return id

    def audited(self) -> list[dict]: return self.service.audit.read(0, 10_000)


@pytest.fixture(scope="module")
def world(tmp_path_factory): return World(tmp_path_factory.mktemp("world"), task=True)


# every route x every role. Written down by hand from the contract, not computed from the table that the service itself uses

def kept(w): return w.week("rhythm", keep=True).headers["location"]

ROUTES = { # route -> who may, status for them, the request
    "POST /v1/weeks/embed": ("clinician researcher", 200, lambda w: ("/v1/weeks/embed?model=pat", dict(content=week_body(), headers=JSON))),
    "POST /v1/weeks/explain": ("clinician researcher", 200, lambda w: ("/v1/weeks/explain?model=pat", dict(content=week_body(), headers=JSON))),
    "POST /v1/weeks/rhythm": ("clinician researcher", 200, lambda w: ("/v1/weeks/rhythm", dict(content=week_body(), headers=JSON))),
    "POST /v1/weeks/predict/{model}": ("clinician researcher", 200, lambda w: ("/v1/weeks/predict/tired", dict(content=week_body(), headers=JSON))),
    "POST /v1/nights": ("clinician researcher", 202, lambda w: ("/v1/nights", dict(content=night_edf(), headers=EDF))),
    "GET /v1/nights/{id}": ("clinician researcher", 200, lambda w: (f"/v1/nights/{w.done}", {})),
    "GET /v1/nights/{id}/export": ("clinician researcher", 200, lambda w: (f"/v1/nights/{w.done}/export?format=csv", {})),
    "POST /v1/nights/{id}/corrections": ("clinician", 200, lambda w: (f"/v1/nights/{w.done}/corrections", dict(json=dict(epoch=1, stage="N2")))),
    "GET /v1/jobs": ("clinician researcher", 200, lambda w: ("/v1/jobs", {})),
    "GET /v1/jobs/{id}": ("clinician researcher", 200, lambda w: (f"/v1/jobs/{w.done}", {})),
    "GET /v1/jobs/{id}/events": ("clinician researcher", 200, lambda w: (f"/v1/jobs/{w.done}/events", {})),
    "DELETE /v1/jobs/{id}": ("admin clinician researcher", 200, lambda w: (f"/v1/jobs/{w.night()['id']}", {})),
    "GET /v1/results/{id}": ("clinician researcher", 200, lambda w: (kept(w), {})),
    "DELETE /v1/subjects/{subject}": ("admin", 200, lambda w: ("/v1/subjects/P-99", {})),
    "GET /v1/me": ("admin clinician researcher auditor", 200, lambda w: ("/v1/me", {})),
    "GET /v1/models": ("admin clinician researcher auditor", 200, lambda w: ("/v1/models", {})),
    "POST /v1/models/refresh": ("admin", 200, lambda w: ("/v1/models/refresh", {})),
    "GET /v1/stats": ("admin auditor", 200, lambda w: ("/v1/stats", {})),
    "GET /v1/audit": ("admin auditor", 200, lambda w: ("/v1/audit", {})),
    "GET /v1/audit/verify": ("admin auditor", 200, lambda w: ("/v1/audit/verify", {})),
    "GET /v1/keys": ("admin", 200, lambda w: ("/v1/keys", {})),
    "POST /v1/keys": ("admin", 201, lambda w: ("/v1/keys", dict(json=dict(name="new", roles=["researcher"])))),
    "DELETE /v1/keys/{id}": ("admin", 200, lambda w: (f"/v1/keys/{w.service.keys.create('ward-7', ['auditor'], 'short')[0]}", {})),
    "GET /metrics": ("admin auditor", 200, lambda w: ("/metrics", {})),
    "GET /livez": ("anybody", 200, lambda w: ("/livez", {})),
    "GET /readyz": ("anybody", 200, lambda w: ("/readyz", {})),
}

@pytest.fixture(scope="module")
def busy(world):
    "The same world with a night that is done."
    world.done = world.staged(subject="P-1")
    return world

def bad_callers(w) -> dict[str, dict]:
    "Headers of those whom nobody knows."
    keys, good = w.service.keys, w.key("admin+clinician+researcher+auditor")
    revoked_id, revoked = keys.create("ward-7", list(ROLES), "revoked")
    keys.revoke(revoked_id)
    expired = keys.create("ward-7", list(ROLES), "expired", days=1e-9)[1]
    other = keys.create("ward-7", list(ROLES), "other")[1]
    said = {"nothing": None, "basic": f"Basic {good}", "no scheme": good, "empty": "Bearer ", "garbage": "Bearer pfts_x", "unknown": "Bearer pfts_" + "0" * 12 + "_" + "A" * 43, "changed": f"Bearer {good[:-2]}{'AA' if good[-2:] != 'AA' else 'BB'}",
        "secret of another": f"Bearer {good[:18]}{other[18:]}", "revoked": f"Bearer {revoked}", "expired": f"Bearer {expired}", "a token, and no issuer": "Bearer " + jwt.encode({"sub": "x", "roles": ["admin"], "tenant": "ward-7"}, "k" * 32),
        "two keys": f"Bearer {good},{good}", "in Latin": b"Bearer pfts_\xe9\xff", "long": "Bearer " + "a" * 100_000}
    return {name: {} if value is None else {"Authorization": value} for name, value in said.items()}

def documented(w) -> dict: return {f"{method.upper()} {path}": about for path, methods in w.app.openapi()["paths"].items() for method, about in methods.items()}

def traces(w) -> tuple: # what a refused request must leave as it is
    return sorted(w.service.vault.names()), w.service.queue.depths(), w.service.keys.list(), sorted(r["name"] + r["version"] for r in w.service.registry.status())


def test_the_table_has_every_route(world):
    assert set(documented(world)) == set(ROUTES)

def test_no_route_hides_from_the_document(world):
    "Besides those that everybody may see: the page, its files, the document."
    def walk(routes):
        for r in routes:
            inside = getattr(r, "routes", None) or getattr(getattr(r, "original_router", None), "routes", None)
            if inside: yield from walk(inside)
            elif hasattr(r, "path"): yield r.path.replace(":path}", "}")
    hidden = set(walk(world.app.routes)) - {r.split()[1] for r in ROUTES}
    assert hidden <= {"/", "/static/{name}", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/static-offline-docs", "/static-offline-docs/{path}"}, hidden
    for path in ("/redoc", "/v1", "/v1/", "/admin", "/debug", "/v2/me", "/static/", "/static/..%2fservice.py", "/static/%2e%2e%2fservice.py", "/static-offline-docs/..%2f..%2fservice.py", "/v1/users"):
        assert world.client.get(path).status_code == 404, path

@pytest.mark.parametrize("route", ROUTES)
def test_route_for_every_role(busy, route):
    who, status, request = ROUTES[route]
    method = route.split()[0]
    if who == "anybody":
        url, more = request(busy)
        assert busy.ask(method, url, None, **more).status_code == status
        return
    for role in ROLES:
        (url, more), _ = request(busy), busy.key(role)
        before = traces(busy)
        reply = busy.ask(method, url, role, **more)
        if role in who.split(): assert reply.status_code == status, (role, reply.text)
        else:
            assert (reply.status_code, reply.json()["code"]) == (403, "forbidden"), (role, reply.text)
            assert reply.headers["content-type"] == "application/problem+json" and traces(busy) == before
            told = busy.audited()[-1]
            assert (told["action"], told["outcome"], told["role"], told["facts"]["route"].replace(":path}", "}")) == ("forbidden", "refused", role, route.split()[1])

@pytest.mark.parametrize("route", [r for r, (who, *_) in ROUTES.items() if who != "anybody"])
def test_route_for_those_whom_nobody_knows(busy, route):
    method, (url, more) = route.split()[0], ROUTES[route][2](busy)
    callers, answers = bad_callers(busy), set()
    before = traces(busy)
    for name, headers in callers.items():
        reply = busy.client.request(method, url, **more | dict(headers={**more.get("headers", {}), **headers}))
        assert reply.status_code == 401, (name, reply.text)
        assert reply.headers["www-authenticate"] == "Bearer" and reply.headers["content-type"] == "application/problem+json"
        answers.add(json.dumps({k: v for k, v in reply.json().items() if k != "request_id"}))
    assert len(answers) == 1 # nothing tells an expired key from an unknown one
    assert traces(busy) == before

def test_refused_before_anything_is_read_or_looked_up(busy):
    "A stranger and a role that may not learn nothing about what exists, and what is wrong with their request isn't looked at."
    nobody = "f" * 32
    for url in (f"/v1/nights/{busy.done}", f"/v1/nights/{nobody}", "/v1/jobs/x", f"/v1/nights/{busy.done}/export?format=wrong"):
        assert busy.ask("GET", url, None).status_code == 401 and busy.ask("GET", url, "auditor").status_code == 403
    for url in ("/v1/keys", f"/v1/nights/{nobody}/corrections", "/v1/weeks/embed?window=wrong", "/v1/nights"):
        assert busy.ask("POST", url, None, headers=JSON, content=b"{").status_code == 401, url
        assert busy.ask("POST", url, "auditor", headers=JSON, content=b"{").status_code == 403, url

def test_somebody_without_a_role(tmp_path):
    w = signed_in(tmp_path)
    head = {"Authorization": f"Bearer {token(w, roles=[])}"}
    w.done = "f" * 32
    for route, (who, _, request) in ROUTES.items():
        url, more = {"GET /v1/results/{id}": (f"/v1/results/{w.done}", {}), "DELETE /v1/jobs/{id}": (f"/v1/jobs/{w.done}", {})}.get(route) or request(w)
        reply = w.client.request(route.split()[0], url, **more | dict(headers={**more.get("headers", {}), **head}))
        assert reply.status_code == (200 if who == "anybody" else 403), (route, reply.text)

def test_roles_add_up(busy):
    assert busy.ask("GET", "/v1/audit", "clinician+auditor").status_code == 200 and busy.ask("GET", f"/v1/nights/{busy.done}", "clinician+auditor").status_code == 200
    assert busy.ask("GET", "/v1/keys", "clinician+auditor").status_code == 403
    told = busy.ask("GET", "/v1/me", "clinician+auditor").json()
    assert told["roles"] == ["auditor", "clinician"] and "nights.correct" in told["actions"] and "keys.manage" not in told["actions"]


# keys

def test_a_key_that_is_revoked_stops_at_once(world):
    made = world.ask("POST", "/v1/keys", "admin", json=dict(name="visitor", roles=["researcher"], days=1))
    head = {"Authorization": f"Bearer {made.json()['secret']}"}
    assert world.client.get("/v1/me", headers=head).json()["roles"] == ["researcher"]
    assert made.json()["secret"] not in world.ask("GET", "/v1/keys", "admin").text and made.json()["id"] in world.ask("GET", "/v1/keys", "admin").text
    assert made.json()["secret"].encode() not in b"".join(p.read_bytes() for p in world.data.rglob("*") if p.is_file())
    assert world.ask("DELETE", f"/v1/keys/{made.json()['id']}", "admin").status_code == 200
    assert world.client.get("/v1/me", headers=head).status_code == 401
    assert [(r["action"], r["resource"]) for r in world.audited() if r["action"].startswith("keys.")][-2:] == [("keys.create", made.json()["id"]), ("keys.revoke", made.json()["id"])]

def test_the_log_says_which_roles_a_new_key_has(world):
    "An administrator may not read results, but can make a key that may: the auditor sees it."
    made = world.ask("POST", "/v1/keys", "admin", json=dict(name="more", roles=["clinician", "admin"])).json()
    assert [r["facts"]["roles"] for r in world.audited() if r.get("resource") == made["id"]] == ["admin+clinician"]

def test_a_key_works_for_other_processes(world):
    "Another server that shares the folder has made it."
    from pftsleep.apps.accounts import KeyStore
    _, key = KeyStore(world.data / "keys.json").create("ward-7", ["auditor"], "from outside")
    assert world.client.get("/v1/me", headers={"Authorization": f"Bearer {key}"}).status_code == 200

def test_no_key_file_no_entry(tmp_path):
    "Damage lets in nobody, and it is our fault, not the caller's."
    w = World(tmp_path)
    head = w.head("admin")
    w.service.keys.path.write_text('{"format": "pftsleep-keys-1", "keys": 3}')
    reply = w.client.get("/v1/me", headers=head)
    assert reply.status_code >= 500 and str(tmp_path) not in reply.text and "keys.json" not in reply.text
    w.service.keys.path.unlink()
    assert w.client.get("/v1/me", headers=head).status_code == 401


# tenants

def told_apart(reply: httpx.Response) -> tuple: # a refusal without its request id
    return reply.status_code, reply.headers["content-type"], {k: v for k, v in reply.json().items() if k != "request_id"}

@pytest.mark.parametrize("method,path,more", [("GET", "/v1/nights/{}", {}), ("GET", "/v1/nights/{}/export?format=csv", {}), ("GET", "/v1/nights/{}/export?format=json", {}), ("GET", "/v1/jobs/{}", {}), ("GET", "/v1/jobs/{}/events", {}),
    ("DELETE", "/v1/jobs/{}", {}), ("POST", "/v1/nights/{}/corrections", dict(json=dict(epoch=0, stage="W"))), ("GET", "/v1/results/{}", {})])
def test_what_belongs_to_others_doesnt_exist(busy, method, path, more):
    before = busy.ask("GET", f"/v1/nights/{busy.done}").content
    for role in ("clinician", "admin+clinician+researcher+auditor"):
        theirs, nothing = (busy.ask(method, path.format(id), role, "ward-8", **more) for id in (busy.done, "0" * 32))
        assert theirs.status_code == 404 and told_apart(theirs) == told_apart(nothing)
    assert busy.ask("GET", f"/v1/nights/{busy.done}").content == before

def test_kept_answers_of_others(busy):
    place = kept(busy)
    assert busy.ask("GET", place).status_code == 200
    assert told_apart(busy.ask("GET", place, tenant="ward-8")) == told_apart(busy.ask("GET", "/v1/results/" + "0" * 32, tenant="ward-8"))

def test_lists_of_others(busy):
    "Jobs, keys and the log."
    mine = {j["id"] for j in busy.ask("GET", "/v1/jobs?limit=500").json()["jobs"]}
    own = busy.night(tenant="ward-9")["id"]
    assert busy.done in mine and own not in mine and {j["id"] for j in busy.ask("GET", "/v1/jobs", tenant="ward-9").json()["jobs"]} == {own}
    busy.ask("DELETE", f"/v1/jobs/{own}", tenant="ward-9")
    theirs = busy.ask("GET", "/v1/keys", "admin", "ward-9").json()["keys"]
    assert {k["tenant"] for k in theirs} == {"ward-9"}
    one = busy.service.keys.create("ward-7", ["auditor"], "kept")[0]
    assert busy.ask("DELETE", f"/v1/keys/{one}", "admin", "ward-9").status_code == 404
    assert {k["id"]: k["state"] for k in busy.service.keys.list()}[one] == "valid"
    made = busy.ask("POST", "/v1/keys", "admin", "ward-9", json=dict(name="n", roles=["auditor"])).json()["id"]
    assert {k["id"]: k["tenant"] for k in busy.service.keys.list()}[made] == "ward-9"
    assert busy.ask("POST", "/v1/keys", "admin", "ward-9", json=dict(name="n", roles=["auditor"], tenant="ward-7")).status_code == 422

def test_the_log_of_others(busy):
    busy.week("rhythm", tenant="ward-9")
    records = busy.ask("GET", "/v1/audit?limit=1000", "auditor", "ward-9").json()["records"]
    assert records and {r["tenant"] for r in records} == {"ward-9"}
    assert busy.ask("GET", "/v1/audit?since=0&limit=1&tenant=ward-7", "auditor", "ward-9").json()["records"][0]["tenant"] == "ward-9"

def test_cached_answers_of_others(busy):
    "The same bytes from two wards are two questions."
    body = week_body(77)
    replies = [busy.week("embed", body, tenant=t) for t in ("ward-7", "ward-8", "ward-7")]
    assert [r.headers["x-cache"] for r in replies] == ["miss", "miss", "hit"] and len({r.content for r in replies}) == 1

def test_idempotency_keys_of_others(busy):
    "The same key and file in two wards are two nights."
    head = {"Idempotency-Key": "one"}
    one, again, other = (busy.night(headers=head, tenant=t)["id"] for t in ("ward-7", "ward-7", "ward-8"))
    assert one == again != other
    for id, t in ((one, "ward-7"), (other, "ward-8")): assert busy.ask("DELETE", f"/v1/jobs/{id}", tenant=t).status_code == 200

def test_people_of_others(busy):
    "Two wards may call two people the same; what is deleted of one stays of the other."
    places = {t: busy.week("rhythm", week_body(5), tenant=t, keep=True, subject="P-5").headers["location"] for t in ("ward-7", "ward-8")}
    assert busy.ask("DELETE", "/v1/subjects/P-5", "admin", "ward-8").json() == {"deleted": 1}
    assert [busy.ask("GET", p, tenant=t).status_code for t, p in places.items()] == [200, 404]
    assert busy.week("rhythm", week_body(5), subject="P-5").headers["x-cache"] == "hit" and busy.week("rhythm", week_body(5), tenant="ward-8", subject="P-5").headers["x-cache"] == "miss"
    assert busy.service.subject_hash("ward-7", "P-5") != busy.service.subject_hash("ward-8", "P-5")

def test_a_record_of_another_tenant_cant_be_read_even_from_the_vault(busy):
    "The tenant is part of what is encrypted: a job that points to a record of others gets nothing out of it."
    mine, = [n for n in busy.service.vault.names("result-") if busy.done in n]
    job = busy.service.queue.record("week.rhythm", "ward-8", "key:x", None, {"result": mine})
    reply = busy.ask("GET", f"/v1/results/{job.id}", tenant="ward-8")
    assert reply.status_code >= 400 and "stages" not in reply.text


# tokens of the hospital's sign-in

ISSUER, AUDIENCE = "https://login.example", "pftsleep"
SIGNERS = {"rsa": ("RS256", rsa.generate_private_key(65537, 2048)), "ec": ("ES256", ec.generate_private_key(ec.SECP256R1())), "ed": ("EdDSA", ed25519.Ed25519PrivateKey.generate())}

def jwks(*names: str) -> bytes:
    algorithms = {"RS256": jwt.algorithms.RSAAlgorithm, "ES256": jwt.algorithms.ECAlgorithm, "EdDSA": jwt.algorithms.OKPAlgorithm}
    public = lambda name: json.loads(algorithms[SIGNERS[name][0]].to_jwk(SIGNERS[name][1].public_key())) | {"kid": name, "use": "sig"}
    return json.dumps({"keys": [public(n) for n in names]}).encode()

def signed_in(tmp_path, **settings) -> World:
    (tmp_path / "jwks.json").write_bytes(jwks("rsa", "ec", "ed"))
    return World(tmp_path, **dict(issuer=ISSUER, audience=AUDIENCE, jwks=str(tmp_path / "jwks.json")) | settings)

def token(w, signer: str = "ed", head=None, key=None, alg=None, **claims) -> str:
    now = time.time()
    told = dict(iss=ISSUER, aud=AUDIENCE, sub="alice", exp=now + 300, nbf=now - 5, roles=["clinician"], tenant="ward-7") | claims
    return jwt.encode({k: v for k, v in told.items() if v is not None}, key or SIGNERS[signer][1], alg or SIGNERS[signer][0], {k: v for k, v in ({"kid": signer} | (head or {})).items() if v is not None})

def test_signed_in_people(tmp_path):
    w = signed_in(tmp_path)
    as_ = lambda t: {"Authorization": f"Bearer {t}"}
    for signer in SIGNERS:
        told = w.client.get("/v1/me", headers=as_(token(w, signer, roles=["clinician", "some other role"]))).json()
        assert (told["id"], told["tenant"], told["roles"]) == ("user:alice", "ward-7", ["clinician"])
    night = w.client.post("/v1/nights", content=night_edf(), headers=as_(token(w)) | EDF).json()["id"]
    w.work()
    stages = w.client.get(f"/v1/nights/{night}", headers=as_(token(w))).json()["stages"]
    new = "N2" if stages[1] != "N2" else "N1"
    changed = w.client.post(f"/v1/nights/{night}/corrections", json=dict(epoch=1, stage=new), headers=as_(token(w))).json()
    assert changed["corrections"][0]["by"] == "user:alice" and w.ask("GET", f"/v1/nights/{night}", "researcher").json()["stages"][1] == new # by a key of the same ward
    assert w.client.get(f"/v1/nights/{night}", headers=as_(token(w, tenant="ward-8"))).status_code == 404
    assert w.client.get(f"/v1/nights/{night}", headers=as_(token(w, roles=["auditor"]))).status_code == 403
    assert {r["who"] for r in w.audited() if r["action"] == "nights.submit"} == {"user:alice"}

def test_forged_and_stale_tokens(tmp_path):
    w, now = signed_in(tmp_path), time.time()
    public = SIGNERS["rsa"][1].public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    forged = {name: token(w, **how) for name, how in dict(issuer=dict(iss="https://evil.example"), audience=dict(aud="other"), expired=dict(exp=now - 60), early=dict(nbf=now + 600), no_exp=dict(exp=None), no_sub=dict(sub=None),
        no_tenant=dict(tenant=None), odd_tenant=dict(tenant="../ward-7"), no_kid=dict(head={"kid": None}), other_kid=dict(head={"kid": "rsa"}), unknown_kid=dict(head={"kid": "x"}), other_key=dict(key=ed25519.Ed25519PrivateKey.generate()),
        crit=dict(head={"crit": ["x"], "x": 1})).items()}
    part = lambda d: jwt.utils.base64url_encode(json.dumps(d).encode()).decode()
    body = part(dict(iss=ISSUER, aud=AUDIENCE, sub="eve", exp=now + 300, nbf=now - 5, roles=["admin"], tenant="ward-7"))
    forged["none"] = f"{part({'alg': 'none', 'kid': 'ed'})}.{body}."
    import hmac as h
    signed = f"{part({'alg': 'HS256', 'kid': 'rsa'})}.{body}"
    forged["hs256 with the public key"] = f"{signed}.{jwt.utils.base64url_encode(h.new(public, signed.encode(), 'sha256').digest()).decode()}"
    good = token(w)
    forged["cut"], forged["other claims"] = good[:-3], ".".join([good.split(".")[0], body, good.split(".")[2]])
    for name, t in forged.items():
        reply = w.client.get("/v1/me", headers={"Authorization": f"Bearer {t}"})
        assert reply.status_code == 401 and t not in reply.text, name

class Provider(http.server.BaseHTTPRequestHandler):
    "An identity provider that answers when it is told to."
    def do_GET(self):
        self.server.asked.set()
        self.server.patient = self.server.go.wait(4)
        self.send_response(200); self.end_headers(); self.wfile.write(jwks("ed"))
    def log_message(self, *_): pass

def test_a_slow_provider_stops_nobody_else(tmp_path):
    "Whoever waits for the keys of the sign-in doesn't keep others waiting."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    server.asked, server.go, server.patient = threading.Event(), threading.Event(), None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    w = World(tmp_path, issuer=ISSUER, audience=AUDIENCE, jwks=f"http://127.0.0.1:{server.server_port}/keys")
    async def both():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(w.app), base_url="http://test") as c:
            slow = asyncio.create_task(c.get("/v1/me", headers={"Authorization": f"Bearer {token(w)}"}))
            while not server.asked.is_set(): await asyncio.sleep(.01)
            alive = await c.get("/livez")
            server.go.set()
            return alive.status_code, (await slow).status_code
    assert asyncio.run(both()) == (200, 200) and server.patient # the others were answered while it waited
    server.shutdown(); server.server_close()

def test_no_provider(tmp_path):
    w = signed_in(tmp_path, jwks=str(tmp_path / "missing.json"))
    reply = w.client.get("/v1/me", headers={"Authorization": f"Bearer {token(w)}"})
    assert (reply.status_code, reply.json()["code"]) == (503, "identity_unavailable") and reply.headers["retry-after"] and str(tmp_path) not in reply.text
    assert w.ask("GET", "/v1/me").status_code == 200 # keys don't need it


# limits

def test_rate_limit_of_each_key(tmp_path):
    w, now = World(tmp_path, per_minute=60, burst=3), [1000.]
    w.service.limiter.clock = lambda: now[0]
    replies = [w.ask("GET", "/v1/me") for _ in range(5)]
    assert [r.status_code for r in replies] == [200, 200, 200, 429, 429]
    assert replies[3].json()["code"] == "rate_limited" and int(replies[3].headers["retry-after"]) >= 1 and replies[3].headers["content-type"] == "application/problem+json"
    assert w.ask("GET", "/v1/me", "researcher").status_code == 200 and w.ask("GET", "/v1/me", tenant="ward-8").status_code == 200 # others aren't touched
    assert w.client.get("/livez").status_code == 200
    now[0] += int(replies[3].headers["retry-after"])
    assert w.ask("GET", "/v1/me").status_code == 200 and w.ask("GET", "/v1/me").status_code == 429
    now[0] += 3600
    assert [w.ask("GET", "/v1/keys").status_code for _ in range(4)] == [403, 403, 403, 429] # what isn't allowed counts, too
    assert [w.ask("POST", "/v1/weeks/rhythm", "auditor", headers=JSON, content=b"x").status_code for _ in range(4)] == [403, 403, 403, 429]
    assert "pftsleep_rate_limited_total" in w.service.telemetry.exposition().decode()

def test_a_429_comes_before_the_body_is_read(tmp_path):
    w = World(tmp_path, per_minute=1, burst=1)
    head = w.head("clinician")
    w.client.get("/v1/me", headers=head)
    read = []
    async def ask():
        async def receive(): read.append(1); return {"type": "http.request", "body": b"x" * 1000, "more_body": True}
        sent = []
        async def send(m): sent.append(m)
        await w.app({"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/v1/weeks/rhythm", "raw_path": b"/v1/weeks/rhythm", "query_string": b"", "root_path": "",
            "headers": [(b"authorization", head["Authorization"].encode()), (b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "server": ("test", 80)}, receive, send)
        return sent[0]["status"]
    assert asyncio.run(ask()) == 429 and not read


# a real server with a certificate

def certificate(folder: Path) -> tuple[Path, Path]:
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    made = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(x509.random_serial_number()).not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False).add_extension(x509.BasicConstraints(True, None), True))
    from cryptography.hazmat.primitives import hashes
    (folder / "cert.pem").write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return folder / "cert.pem", folder / "key.pem"

class Encrypted(Running):
    "A server that speaks TLS."
    def __init__(self, models, data, cert, key, *args):
        super().__init__(models, data, "--tls_cert", str(cert), "--tls_key", str(key), "--workers", "0", *args)
        self.trust = ssl.create_default_context(cafile=str(cert))
    def until_ready(self, path="/readyz"):
        end = time.monotonic() + self.wait
        while time.monotonic() < end:
            if found := re.search(r"^listening at (\S+)$", self.log(), re.M): self.url = found[1]
            if self.process.poll() is not None: raise RuntimeError(self.log()[-3000:])
            with suppress(httpx.HTTPError):
                if self.url and httpx.get(self.url + path, verify=self.trust, timeout=5).status_code == 200: return
            time.sleep(.1)
        raise RuntimeError(self.log()[-3000:])

def resident(pid: int) -> float: # MB
    return int(next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")).split()[1]) / 1024

def test_a_real_server_with_a_certificate(tmp_path):
    "https answers and http doesn't; and while it runs: headers and bodies of strangers have an end."
    cert, key = certificate(tmp_path)
    with Encrypted(registry_with(tmp_path, stager=False), tmp_path / "data", cert, key) as server:
        assert server.url.startswith("https") and httpx.get(server.url + "/livez", verify=server.trust).json()["alive"]
        with httpx.Client(base_url=server.url, verify=server.trust, headers={"Authorization": f"Bearer {server.first}"}, timeout=60) as c:
            assert c.get("/v1/me").json()["roles"] == ["admin", "clinician"] and c.post("/v1/weeks/embed", content=week_body(), headers=JSON).status_code == 200
        with pytest.raises(httpx.HTTPError): httpx.get(server.url.replace("https", "http") + "/livez", timeout=10)
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain:
            plain.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            try: said = plain.recv(1000)
            except OSError: said = b""
            assert b"200" not in said and b"alive" not in said
        with pytest.raises(httpx.HTTPError): httpx.get(server.url + "/livez", timeout=10) # by somebody who doesn't trust it
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw, old.wrap_socket(raw) as safe: assert safe.version() in ("TLSv1.2", "TLSv1.3")
        before = resident(server.pid)
        with suppress(httpx.WriteError): # it may hang up on 60 MB without a key
            assert httpx.post(server.url + "/v1/keys", verify=server.trust, timeout=60, content=b"[" * 60_000_000, headers=JSON).status_code == 401
        assert endless_header(server) in (400, 431, None)
        assert resident(server.pid) < before + 40
        assert httpx.get(server.url + "/livez", verify=server.trust).status_code == 200
        log = server.log()
    assert server.process.returncode in (0, -15) and server.first not in log.replace(f"  {server.first}\n", "") and "Traceback" not in log

def endless_header(server, megabytes: int = 20) -> int | None: # status; None = hung up
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw, server.trust.wrap_socket(raw, server_hostname="127.0.0.1") as c:
        c.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Long: ")
        try:
            for _ in range(megabytes * 10): c.sendall(b"a" * 100_000)
            c.sendall(b"\r\n\r\n")
            said = c.recv(100)
        except OSError: return None
        return int(said.split()[1]) if said else None
