"""Who may do what: roles, keys, tokens, limits."""
import hmac
import http.server
import json
import subprocess
import sys
import threading
from base64 import urlsafe_b64encode
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

jwt = pytest.importorskip("jwt", reason="needs the extra 'serve'")
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from pftsleep.apps import accounts as module
from pftsleep.apps.accounts import ACTIONS, AccountRole, KeyStore, Principal, RateLimiter, Role, TokenVerifier, create_key, identify, keys, list_keys, require, revoke_key
from pftsleep.errors import ConfigError, PFTSleepError, RequestError, StoreError

ISSUER, AUDIENCE, NOW = "https://login.example.org", "pftsleep", datetime(2026, 5, 1, tzinfo=UTC)


def refused(call, code="unauthenticated", status=401) -> RequestError:
    with pytest.raises(RequestError) as e: call()
    assert (e.value.code, e.value.status) == (code, status)
    return e.value


# --- roles

MATRIX = { # action: admin, clinician, researcher, auditor; as agreed, written out so that no slip in the table goes unseen
    "nights.submit": "-xx-", "nights.read": "-xx-", "nights.correct": "-x--", "jobs.cancel": "xxx-", "weeks.embed": "-xx-", "weeks.explain": "-xx-", "weeks.rhythm": "-xx-", "weeks.predict": "-xx-",
    "results.read": "-xx-", "models.read": "xxxx", "models.refresh": "x---", "subjects.delete": "x---", "audit.read": "x--x", "keys.manage": "x---", "stats.read": "x--x", "metrics.read": "x--x"}

def test_the_matrix():
    assert set(ACTIONS) == set(MATRIX) and list(AccountRole) == ["admin", "clinician", "researcher", "auditor"] and Role is AccountRole
    for action, row in MATRIX.items():
        for role, mark in zip(AccountRole, row, strict=True):
            who = Principal("key:1", "t", frozenset({role}), "api_key")
            assert who.may(action) == (mark == "x"), f"{role} {action}"
            if mark == "x": require(who, action)
            else: refused(lambda who=who, action=action: require(who, action), "forbidden", 403)
        refused(lambda action=action: require(Principal("key:1", "t", frozenset(), "token"), action), "forbidden", 403)
        both = Principal("key:1", "t", frozenset({Role.auditor, Role.clinician}), "token")
        assert both.may(action) == ("x" in row[1] + row[3])

def test_an_unknown_action_is_a_mistake_not_a_permission():
    for who in (frozenset(AccountRole), frozenset[AccountRole]()):
        with pytest.raises(ConfigError): require(Principal("a", "t", who, "token"), "everything")


# --- keys

@pytest.fixture
def store(tmp_path) -> KeyStore: return KeyStore(tmp_path / "keys.json", now=lambda: NOW)

def test_a_key_comes_and_goes(store, tmp_path):
    key_id, key = store.create("ward-3", ["clinician", "auditor"], "script", 30)
    assert module._KEY.fullmatch(key)[1] == key_id and len(key) == 5 + 12 + 1 + 43
    assert store.authenticate(key) == Principal(f"key:{key_id}", "ward-3", frozenset({Role.clinician, Role.auditor}), "api_key")
    text = store.path.read_text()
    assert key not in text and key.split("_", 2)[2] not in text and store.path.stat().st_mode & 0o777 == 0o600
    assert "sha256" not in str(store.list()) and store.list()[0]["state"] == "valid"
    for days, ok in ((29.9, True), (30, False), (31, False)):
        other = KeyStore(store.path, now=lambda days=days: NOW + timedelta(days=days))
        if ok: other.authenticate(key)
        else: refused(lambda other=other: other.authenticate(key)); assert other.list()[0]["state"] == "expired"
    store.revoke(key_id); store.revoke(key_id)
    refused(lambda: store.authenticate(key))
    assert store.list()[0]["state"] == "revoked" and store.list("ward-4") == [] and len(store.list("ward-3")) == 1


def test_all_refusals_look_the_same(store):
    expired = store.create("t", ["admin"], "a", 1)[1]; revoked_id, revoked = store.create("t", ["admin"], "b"); _, good = store.create("t", ["admin"], "c")
    store.revoke(revoked_id)
    later = KeyStore(store.path, now=lambda: NOW + timedelta(days=2))
    wrong = [expired, revoked, good[:-1] + ("A" if good[-1] != "A" else "B"), good.replace(good[5:17], "0" * 12), good.upper(), good + "\n", good[:-1], "", "pfts_", "pfts__", "näh", "\ud800", "x" * 100_000, good.replace("pfts", "PFTS")]
    assert len({str(refused(lambda w=w: later.authenticate(w))) for w in wrong}) == 1
    later.authenticate(good)
    for i in range(18, 61): refused(lambda i=i: later.authenticate(good[:i] + ("A" if good[i] != "A" else "B") + good[i + 1:]))


def test_compared_in_constant_time_also_when_there_is_no_such_key(store, monkeypatch):
    _, key = store.create("t", ["admin"], "a")
    seen, compare = [], hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda a, b: (seen.append((len(a), len(b))), compare(a, b))[1])
    store.authenticate(key)
    for wrong in (key[:-1] + "~", "pfts_000000000000_" + "A" * 43, "nothing"): refused(lambda w=wrong: store.authenticate(w))
    assert seen == [(64, 64)] * 4


def test_keys_are_random(store):
    made = [store.create("t", ["admin"], "a") for _ in range(20)]
    assert len({i for i, _ in made}) == len({k for _, k in made}) == 20 == len({r["id"] for r in store.list()})


def test_tenants_revoke_their_own_only(store):
    key_id, key = store.create("a", ["admin"], "x")
    refused(lambda: store.revoke(key_id, "b"), "no_such_key", 404)
    refused(lambda: store.revoke("0" * 12), "no_such_key", 404)
    store.authenticate(key); store.revoke(key_id, "a"); refused(lambda: store.authenticate(key))


@pytest.mark.parametrize(("args", "code"), [(("", ["admin"], "x"), "bad_tenant"), (("a/b", ["admin"], "x"), "bad_tenant"), (("a" * 65, ["admin"], "x"), "bad_tenant"), (("a", [], "x"), "bad_role"), (("a", ["root"], "x"), "bad_role"),
    (("a", ["admin", "Admin"], "x"), "bad_role"), (("a", ["admin"], ""), "bad_name"), (("a", ["admin"], "x" * 81), "bad_name"), (("a", ["admin"], "a\nb"), "bad_name"), (("a", ["admin"], "x", 0), "bad_days"),
    (("a", ["admin"], "x", -1), "bad_days"), (("a", ["admin"], "x", float("nan")), "bad_days"), (("a", ["admin"], "x", 1e9), "bad_days")])
def test_bad_keys_are_not_made(store, args, code):
    refused(lambda: store.create(*args), code, 422)
    assert not store.path.exists()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602, 0o666])
def test_an_open_file_of_keys_is_refused(store, mode):
    store.create("t", ["admin"], "x"); store.path.chmod(mode)
    with pytest.raises(ConfigError, match="others may read"): KeyStore(store.path)


@given(st.one_of(st.binary(max_size=60), st.recursive(st.none() | st.text(max_size=5) | st.integers() | st.booleans(), lambda s: st.lists(s, max_size=2) | st.dictionaries(
    st.sampled_from(["format", "keys", "0" * 12, "tenant", "roles", "sha256", "name", "created"]), s, max_size=4), max_leaves=10).map(lambda x: json.dumps(x if not isinstance(x, dict) else {**x, "format": "pftsleep-keys-1"}).encode())))
def test_a_garbled_file_lets_in_nobody(data):
    try: found = module._parse_keys(data, Path("keys.json"))
    except PFTSleepError: return
    assert found == {} # only an empty one is no garbage

def test_a_file_damaged_under_a_running_server(store):
    _, key = store.create("t", ["admin"], "x")
    store.path.write_text(store.path.read_text()[:-20])
    for _ in range(2):
        with pytest.raises(ConfigError, match="no file of keys"): store.authenticate(key)
    store.path.unlink()
    refused(lambda: store.authenticate(key))
    with pytest.raises(ConfigError): KeyStore(store.path.parent / "no" / "keys.json").create("t", ["admin"], "x")


def test_other_processes_see_changes_and_lose_none(store):
    code = "import sys; from pftsleep.apps.accounts import KeyStore\ns = KeyStore(sys.argv[1])\nfor i in range(10): print(s.create('t', ['admin'], f'{sys.argv[2]} {i}')[1])"
    running = [subprocess.Popen([sys.executable, "-c", code, str(store.path), n], stdout=subprocess.PIPE, text=True) for n in "ab"]
    mine = [store.create("t", ["admin"], "c")[1] for _ in range(5)]
    made = mine + [k for p in running for k in p.communicate()[0].split()]
    assert len(made) == 25 and len(store.list()) == 25
    for k in made: store.authenticate(k)


def test_a_full_disk_keeps_the_old_keys(store, monkeypatch):
    _, key = store.create("t", ["admin"], "x")
    monkeypatch.setattr("pftsleep.apps.vault.os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StoreError, match="No space"): store.create("t", ["admin"], "y")
    monkeypatch.undo()
    assert len(store.list()) == 1 and store.authenticate(key)
    assert sorted(p.name for p in store.path.parent.iterdir()) == [".keys.json.lock", "keys.json"]


# --- tokens

RSA, SMALL, EC, ED, OTHER = rsa.generate_private_key(65537, 2048), rsa.generate_private_key(65537, 1024), ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate()

def jwk(private, kid, **more):
    kind = {rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm, ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm}
    algorithm = next((a for k, a in kind.items() if isinstance(private, k)), jwt.algorithms.OKPAlgorithm)
    return {**json.loads(algorithm.to_jwk(private.public_key())), "kid": kid, **more}

def claims(**changes):
    now = int(datetime.now(UTC).timestamp())
    plain = dict(iss=ISSUER, aud=AUDIENCE, sub="7", tenant="ward-3", roles=["researcher"], nbf=now - 1, iat=now - 1, exp=now + 600) | changes
    return {k: v for k, v in plain.items() if v is not None}

def signed(private=ED, algorithm="EdDSA", kid="ed", headers=None, **changes):
    return jwt.PyJWS().encode(json.dumps(claims(**changes)).encode(), private, algorithm, {"kid": kid, **(headers or {})} if kid else headers) # signs anything

@pytest.fixture
def jwks(tmp_path):
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [jwk(RSA, "rsa", use="sig", alg="RS256"), jwk(EC, "ec"), jwk(ED, "ed"), jwk(SMALL, "small"), jwk(OTHER, "for-encryption", use="enc"), {"kty": "oct", "kid": "oct", "k": "c2VjcmV0"}, {"kty": "RSA"}, 5]}))
    return path

@pytest.fixture
def verifier(jwks): return TokenVerifier(ISSUER, AUDIENCE, jwks)


@pytest.mark.parametrize(("private", "algorithm", "kid"), [(RSA, "RS256", "rsa"), (EC, "ES256", "ec"), (ED, "EdDSA", "ed")])
def test_good_tokens(verifier, private, algorithm, kid):
    assert verifier.authenticate(signed(private, algorithm, kid)) == Principal("user:7", "ward-3", frozenset({Role.researcher}), "token")
    assert verifier.authenticate(signed(private, algorithm, kid, aud=["others", AUDIENCE])).id == "user:7"
    for other in {"rsa", "ec", "ed"} - {kid}: refused(lambda other=other: verifier.authenticate(signed(private, algorithm, other)))
    token = signed(private, algorithm, kid)
    head, body, signature = token.split(".")
    refused(lambda: verifier.authenticate(f"{head}.{body}."))
    refused(lambda: verifier.authenticate(f"{head}.{b64(claims(roles=['admin']))}.{signature}"))
    for i in range(0, len(signature) - 4, 7): refused(lambda i=i: verifier.authenticate(f"{head}.{body}.{signature[:i]}{'A' if signature[i] != 'A' else 'B'}{signature[i + 1:]}"))


def b64(x) -> str: return urlsafe_b64encode(x if isinstance(x, bytes) else json.dumps(x).encode()).rstrip(b"=").decode()
def by_hand(head, key: bytes = b"", **changes) -> str:
    first = f"{b64(head)}.{b64(claims(**changes))}"
    return f"{first}.{b64(hmac.digest(key, first.encode(), 'sha256'))}" if key else f"{first}."

@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")
def test_algorithms_are_not_the_tokens_choice(verifier):
    pem = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    der = RSA.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    raw = ED.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    for none in ("none", "None", "NONE", "nOnE", ""): refused(lambda n=none: verifier.authenticate(by_hand({"alg": n, "kid": "rsa"})))
    for alg in ("HS256", "HS384", "HS512", "RS256", "EdDSA"):
        for key, kid in ((pem, "rsa"), (der, "rsa"), (pem.strip(), "rsa"), (raw, "ed"), (b"secret", "oct")): refused(lambda a=alg, k=key, i=kid: verifier.authenticate(by_hand({"alg": a, "kid": i}, k)))
    for alg in ("RS384", "RS512", "PS256"): refused(lambda a=alg: verifier.authenticate(signed(RSA, a, "rsa")))
    refused(lambda: verifier.authenticate(signed(SMALL, "RS256", "small"))) # 1024 bits
    refused(lambda: verifier.authenticate(signed(OTHER, "EdDSA", "for-encryption")))
    refused(lambda: verifier.authenticate(signed(OTHER, "EdDSA", "ed"))) # signed by somebody else
    refused(lambda: verifier.authenticate(signed(OTHER, "EdDSA", "ed", headers={"jwk": jwk(OTHER, "ed"), "jku": "https://evil.example/keys", "x5u": "https://evil.example"})))


@pytest.mark.parametrize("wrong", [dict(aud="others"), dict(aud=["others"]), dict(aud=[]), dict(aud=None), dict(aud=5), dict(iss="https://login.example.org/"), dict(iss=None), dict(iss="x"), dict(iss=[ISSUER]), dict(exp=None), dict(exp=1), dict(exp="soon"),
    dict(exp=True), dict(exp=[1]), dict(nbf=None), dict(nbf=2**40), dict(nbf="x"), dict(sub=None), dict(sub=""), dict(sub=5), dict(sub="a\nb"), dict(sub="x" * 300), dict(tenant=None), dict(tenant=""), dict(tenant="a b"), dict(tenant=["ward-3"]),
    dict(tenant="../x"), dict(iat=2**40)], ids=str)
def test_wrong_claims(verifier, wrong): refused(lambda: verifier.authenticate(signed(**wrong)))


def test_clocks_may_differ_a_little(verifier):
    now = int(datetime.now(UTC).timestamp())
    for good in (dict(exp=now - 10), dict(nbf=now + 10)): verifier.authenticate(signed(**good))
    for bad in (dict(exp=now - 60), dict(nbf=now + 90)): refused(lambda bad=bad: verifier.authenticate(signed(**bad)))


def test_missing_kid_and_odd_heads(verifier):
    for token in (signed(kid=None), signed(kid="unknown"), signed(headers={"crit": ["b64"], "b64": False}), signed(headers={"crit": []}), by_hand({"alg": "EdDSA", "kid": 5}), by_hand({"kid": "ed"}), by_hand([]), by_hand({"alg": ["EdDSA"], "kid": "ed"}),
        "", ".", "..", "a.b.c", "a.b.c.d.e", "é.é.é", "x" * 20_000, signed()[:-5], signed() + ".x", " ", "\ud800"): refused(lambda t=token: verifier.authenticate(t))


@given(st.text(max_size=80) | st.tuples(st.binary(max_size=30), st.binary(max_size=30), st.binary(max_size=30)).map(lambda p: ".".join(map(b64, p))))
def test_garbage_is_refused(text):
    verifier = TokenVerifier(ISSUER, AUDIENCE, "nowhere.json")
    verifier._keys.keys, verifier._keys.good, verifier._keys.tried = {"ed": ("EdDSA", ED.public_key())}, verifier._keys.clock(), verifier._keys.clock()
    refused(lambda: verifier.authenticate(text))


@pytest.mark.parametrize(("roles", "expected"), [(["admin", "canteen"], {"admin"}), ("clinician auditor", {"clinician", "auditor"}), ([], set()), (None, set()), ("canteen", set()), (["Admin"], set()), ({"admin": True}, set()), ([["admin"]], set()), (5, set())])
def test_roles_of_a_token(verifier, roles, expected):
    assert verifier.authenticate(signed(roles=roles)).roles == expected

def test_claims_by_path_and_without_nbf(jwks):
    v = TokenVerifier(ISSUER, AUDIENCE, jwks, role_claim="realm_access.roles", tenant_claim="https://x.org/tenant", required=["exp"])
    token = signed(nbf=None, tenant=None, realm_access={"roles": ["admin"]}, **{"https://x.org/tenant": "t"})
    assert v.authenticate(token) == Principal("user:7", "t", frozenset({Role.admin}), "token")
    for missing in ("exp", "sub", "iss", "aud"): refused(lambda m=missing: v.authenticate(signed(tenant=None, realm_access={"roles": []}, **{"https://x.org/tenant": "t", m: None})))
    for broken in ("x", None, {"roles": {"a": 1}}, []): assert v.authenticate(signed(nbf=None, realm_access=broken, **{"https://x.org/tenant": "t"})).roles == set()


# --- keys of the provider

@contextmanager
def served(replies):
    "A provider on this machine; `replies[0]` is (status, bytes) or (302, address)."
    asked = []
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path); status, body = replies[0]
            self.send_response(status)
            if status == 302: self.send_header("Location", body); body = b""
            self.end_headers(); self.wfile.write(body)
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": .01}, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}/keys", asked
    finally: server.shutdown(); server.server_close()

def keyset(*pairs): return json.dumps({"keys": [jwk(p, kid) for p, kid in pairs]}).encode()


def test_keys_roll_over():
    clock, replies = [0.0], [(200, keyset((ED, "ed")))]
    with served(replies) as (url, asked):
        v = TokenVerifier(ISSUER, AUDIENCE, url, clock=lambda: clock[0])
        for _ in range(5): v.authenticate(signed())
        assert len(asked) == 1
        replies[0] = (200, keyset((ED, "ed"), (OTHER, "new")))
        refused(lambda: v.authenticate(signed(OTHER, kid="new"))) # not again within 10 s
        clock[0] += 11
        v.authenticate(signed(OTHER, kid="new")); v.authenticate(signed())
        assert len(asked) == 2
        for i in range(50): refused(lambda i=i: v.authenticate(signed(kid=f"made-up-{i}")))
        assert len(asked) == 2 # nobody makes us ask all the time
        replies[0] = (200, keyset((OTHER, "new"))) # the old one is withdrawn
        clock[0] += 290; v.authenticate(signed())
        clock[0] += 11; refused(lambda: v.authenticate(signed())); v.authenticate(signed(OTHER, kid="new"))
        replies[0] = (200, keyset((ED, "new"))) # the same name for another key
        clock[0] += 301; refused(lambda: v.authenticate(signed(OTHER, kid="new"))); v.authenticate(signed(ED, kid="new"))


@pytest.mark.parametrize("reply", [(500, b""), (404, b""), (200, b"<html>"), (200, b"{}"), (200, b'{"keys": 5}'), (200, b" " * (2 << 20)), (200, json.dumps({"keys": [jwk(ED, "ed"), jwk(OTHER, "ed")]}).encode()), (302, "http://127.0.0.1:1/")], ids=lambda r: f"{r[0]} {r[1][:9]!r}")
def test_a_provider_that_fails(reply):
    clock, replies = [0.0], [reply]
    with served(replies) as (url, asked):
        v = TokenVerifier(ISSUER, AUDIENCE, url, clock=lambda: clock[0])
        assert refused(lambda: v.authenticate(signed()), "identity_unavailable", 503).retry_after == 10
        assert not v.status()["ok"]
        refused(lambda: v.authenticate(signed()), "identity_unavailable", 503)
        assert len(asked) == 1
        replies[0] = (200, keyset((ED, "ed"))); clock[0] += 11
        v.authenticate(signed()); assert v.status() == {"ok": True, "keys": 1, "problem": ""}
        replies[0] = reply
        clock[0] += 3000; v.authenticate(signed()) # for a while the old keys serve
        clock[0] += 901; refused(lambda: v.authenticate(signed()), "identity_unavailable", 503)


def test_a_redirect_is_not_followed():
    with served([(200, keyset((OTHER, "ed")))]) as (evil, asked), served([(302, evil)]) as (url, _):
        refused(lambda: TokenVerifier(ISSUER, AUDIENCE, url).authenticate(signed(OTHER)), "identity_unavailable", 503)
        assert asked == []


@pytest.mark.parametrize("url", ["http://login.example.org/keys", "ftp://127.0.0.1/keys", "file:///etc/keys.json", "http://127.0.0.1.example.org/keys", "http://localhost@example.org/", "gopher://x"])
def test_only_safe_addresses(url):
    with pytest.raises(ConfigError, match="https"): TokenVerifier(ISSUER, AUDIENCE, url)

def test_safe_addresses():
    for url in ("https://login.example.org/keys", "http://localhost:5/keys", "http://[::1]/keys", "keys.json", Path("keys.json")): TokenVerifier(ISSUER, AUDIENCE, url)
    for wrong in (("", AUDIENCE), (ISSUER, "")):
        with pytest.raises(ConfigError): TokenVerifier(*wrong, "keys.json")


def test_private_parts_in_a_file_of_keys_are_not_kept(tmp_path):
    (tmp_path / "k").write_text(json.dumps({"keys": [{**json.loads(jwt.algorithms.OKPAlgorithm.to_jwk(ED)), "kid": "ed"}]}))
    v = TokenVerifier(ISSUER, AUDIENCE, tmp_path / "k")
    v.authenticate(signed())
    assert isinstance(v._keys.keys["ed"][1], ed25519.Ed25519PublicKey)


def test_the_header(store, verifier):
    _, key = store.create("t", ["admin"], "x")
    assert identify(f"Bearer {key}", store, verifier).how == "api_key" and identify(f"BEARER  {signed()} ", store, verifier).how == "token"
    for header in (None, "", "Bearer", "Bearer ", key, f"Basic {key}", f"Bearer {key} x", f"Token {signed()}", "Bearer\t" + key, f"Bearer pfts_{signed()}"): refused(lambda h=header: identify(h, store, verifier))
    refused(lambda: identify(f"Bearer {signed()}", store, None)); refused(lambda: identify(f"Bearer {key}", None, verifier)); refused(lambda: identify(f"Bearer {key}"))


# --- limits

@given(st.integers(1, 600), st.integers(1, 20), st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 4)), max_size=60))
def test_the_limit_is_that_of_a_bucket(per_minute, burst, steps):
    "Against a bucket in exact fractions."
    clock, level, last = [0.0], Fraction(burst), 0
    limit, at = RateLimiter(per_minute, burst, clock=lambda: clock[0]), 0
    for wait, cost in steps:
        at += wait; clock[0] = at / 64 # exact in binary
        level = min(Fraction(burst), level + Fraction(at - last, 64) * per_minute / 60); last = at
        need = min(cost, burst)
        try: limit.check("a", cost); ok = True
        except RequestError as e:
            ok = False
            assert e.status == 429 and e.retry_after == pytest.approx(float((need - level) * 60 / per_minute), abs=1e-5)
        if abs(float(level - need)) > 1e-6: assert ok == (level >= need)
        if ok: level -= cost

def test_waiting_as_told_is_enough():
    clock = [0.0]; limit = RateLimiter(7, 3, clock=lambda: clock[0]); done = 0
    while clock[0] < 6000:
        try: limit.check("a"); done += 1
        except RequestError as e: clock[0] += e.retry_after
    assert 700 <= done <= 704

def test_memory_is_bounded_and_the_busy_are_not_forgotten():
    clock = [0.0]; limit = RateLimiter(60, 10, clock=lambda: clock[0], max_principals=100)
    for _ in range(10): limit.check("busy")
    for i in range(5000): limit.check(f"p{i}"); assert len(limit) <= 101
    refused(lambda: limit.check("busy"), "rate_limited", 429)
    clock[0] += 100
    for i in range(101): limit.check(f"q{i}")
    assert len(limit) <= 100 and "busy" not in limit._full_at

def test_threads_share_a_limit():
    limit, passed = RateLimiter(1, 50, clock=lambda: 0.0), []
    def ask(_):
        try: limit.check("a"); passed.append(1)
        except RequestError: pass
    with ThreadPoolExecutor(8) as pool: list(pool.map(ask, range(400)))
    assert len(passed) == 50

def test_senseless_limits():
    for args in ((0, 1), (-1, 1), (float("nan"), 1), (float("inf"), 1), (1, 0)):
        with pytest.raises(ConfigError): RateLimiter(*args)


# --- command line

def test_commands(tmp_path, capsys):
    path = str(tmp_path / "keys.json")
    assert keys("create", path, tenant="t", roles=["admin", "auditor"], name="first", days=5) == 0
    key = capsys.readouterr().out.strip()
    assert "user" not in key and KeyStore(path).authenticate(key).roles == {Role.admin, Role.auditor}
    assert create_key(path, "u", ["auditor"], "second") == 0
    other = capsys.readouterr().out.strip()
    assert keys("list", path) == 0 and (table := capsys.readouterr().out).count("valid") == 2 and "never" in table and key not in table and key[18:] not in table
    assert list_keys(path, "u") == 0 and "first" not in capsys.readouterr().out
    assert revoke_key(path, other) == 0 and keys("revoke", path, key=key.split("_")[1]) == 0
    assert list_keys(path) == 0 and capsys.readouterr().out.count(" revoked") >= 2
    assert revoke_key(path, "0" * 12) == 1 and "no such key" in capsys.readouterr().out
    for wrong in (lambda: keys("revoke", path), lambda: keys("create", path, tenant="t"), lambda: list_keys(tmp_path / "no"), lambda: revoke_key(tmp_path / "no", "x"), lambda: create_key(path, "t", ["root"], "x")):
        with pytest.raises(PFTSleepError): wrong()
