"""The files in deploy/, without an engine: what they say must fit the program, and what they promise must be in them."""
import configparser
import fnmatch
import os
import re
import shlex
import shutil
import stat
import subprocess
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
from pftsleep.apps import vault
from pftsleep.apps.cli import command, make_parser, switches
from pftsleep.apps.service import admin, health, nights, weeks
from pftsleep.apps.serving import check_address

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
KUBERNETES = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "pftsleep.yaml").read_text()))
NGINX = (DEPLOY / "nginx.conf").read_text()
ROUTES = {r.path for router in (weeks, nights, admin, health) for r in router.routes}


def of_kind(kind): return next(d for d in KUBERNETES if d["kind"] == kind)


DEPLOYMENT = of_kind("Deployment")
POD = DEPLOYMENT["spec"]["template"]["spec"]
CONTAINER, = POD["containers"]


def instructions():
    "Of the Dockerfile, as (word, rest) pairs."
    text = re.sub(r"\\\n\s*", " ", "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#")))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def listed(word): return [yaml.safe_load(rest) for w, rest in instructions() if w == word]


def parsed(arguments):
    "As `pftsleep serve` reads its arguments; a wrong one raises."
    serve = command("serve")
    return make_parser("serve", serve).parse_args(switches(arguments, serve, by_name=True) if arguments else [])


def served_by_docker(): return parsed(listed("CMD")[-1])


def served_by_compose():
    script = COMPOSE["services"]["service"]["entrypoint"][2].replace("$$", "$")
    words = shlex.split(script.split("exec ", 1)[1])
    assert words[:2] == ["pftsleep", "serve"]
    return parsed(words[2:])


def served_by_kubernetes():
    assert "command" not in CONTAINER # the image's own
    return parsed([a.replace("$(POD)", "pftsleep-5d4f9c7b8-x2x9z") for a in CONTAINER["args"]])


# --- what is started

@pytest.mark.parametrize("how", [served_by_docker, served_by_compose, served_by_kubernetes])
def test_the_program_takes_these_arguments(how):
    given = how()
    assert given.models == "/models" and given.data == "/data" and given.port == 8000 and given.behind_proxy
    check_address(given.host, given.tls_cert, given.tls_key, given.behind_proxy)


def test_the_entry_point_is_the_command():
    assert listed("ENTRYPOINT") == [["pftsleep", "serve"]]
    scripts = configparser.ConfigParser()
    scripts.read(ROOT / "settings.ini")
    assert "pftsleep=pftsleep.apps.cli:main" in scripts["DEFAULT"]["console_scripts"]


def test_a_wrong_flag_would_be_noticed():
    with pytest.raises(SystemExit): parsed(["--models", "/models", "--hosts", "0.0.0.0"])


# --- the image

def test_what_is_copied_is_there_and_may_be_sent():
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    sources = [s for w, rest in instructions() if w == "COPY" and "--from" not in rest for s in rest.split()[:-1]]
    assert sources and {s.removeprefix("./") for s in sources} == let_in
    for s in sources: assert (ROOT / s).exists(), s
    assert not {"tests", "nbs", "jobs", "deploy", ".git", ".venv"} & let_in


def test_setup_finds_what_it_reads():
    "setup.py is run in the image, with what was copied and nothing else."
    text = (ROOT / "setup.py").read_text()
    read = set(re.findall(r"""(?:open|Path|read)\(['"]([\w./-]+)['"]""", text))
    copied = {s.removeprefix("./") for w, rest in instructions() if w == "COPY" and "--from" not in rest for s in rest.split()[:-1]}
    assert read and read <= copied
    assert "recursive-include pftsleep/apps/web *" in (ROOT / "MANIFEST.in").read_text()


def test_extras_and_versions_exist():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    run = " ".join(rest for w, rest in instructions() if w == "RUN")
    for extra in re.search(r"\.\[([\w,]+)\]", run)[1].split(","): assert f"{extra}_requirements" in settings["DEFAULT"]
    python = tuple(map(int, re.search(r"python:(\d+)\.(\d+)", DOCKERFILE).groups()))
    assert python >= tuple(map(int, settings["DEFAULT"]["min_python"].split(".")))
    assert "-c constraints.txt" in run and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in (ROOT / "constraints.txt").read_text().split("\n") if line and not line.startswith("#"))


def test_the_image_runs_without_root_and_can_be_stopped():
    last = max(i for i, (w, _) in enumerate(instructions()) if w == "FROM")
    after = instructions()[last:]
    assert [rest for w, rest in after if w == "USER"] == ["10001:10001"] and ("STOPSIGNAL", "SIGTERM") in after
    order = [w for w, _ in after]
    assert order.index("USER") > max(i for i, w in enumerate(order) if w in ("RUN", "COPY"))
    assert "install -d -o pftsleep -g pftsleep -m 0700 /data" in DOCKERFILE
    probe = next(rest for w, rest in after if w == "HEALTHCHECK")
    assert urlsplit(re.search(r"http://[\w.:/]+", probe)[0]).path in ROUTES and ("EXPOSE", "8000") in after


def test_no_tag_that_moves_under_ones_feet():
    images = [rest.split()[0] for w, rest in instructions() if w == "FROM"] + [s["image"] for s in COMPOSE["services"].values() if "build" not in s] + [CONTAINER["image"]]
    assert all(re.search(r":[\d.]+[\w.-]*$", i) for i in images), images


# --- compose

def test_compose_has_its_secrets_in_files_and_no_default():
    declared = set(COMPOSE["secrets"])
    assert all(set(s) == {"file"} for s in COMPOSE["secrets"].values())
    for name, service in COMPOSE["services"].items(): assert set(service.get("secrets", [])) <= declared, name
    assert declared == {s for service in COMPOSE["services"].values() for s in service.get("secrets", [])}
    used = set(re.findall(r"/run/secrets/(\w+)", (DEPLOY / "compose.yaml").read_text() + NGINX))
    assert used == declared


def test_compose_starts_everything_locked_and_limited():
    for name, service in COMPOSE["services"].items():
        limits = service["deploy"]["resources"]["limits"]
        assert limits["cpus"] and limits["memory"], name
        assert "no-new-privileges:true" in service["security_opt"] and not service.get("privileged")
        if name == "database": continue # its image starts as root to own its folder
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["user"].split(":")[0] != "0" and service["tmpfs"]
    assert [n for n, s in COMPOSE["services"].items() if "ports" in s] == ["proxy"]
    assert COMPOSE["networks"]["inside"]["internal"] and COMPOSE["services"]["database"]["networks"] == COMPOSE["services"]["service"]["networks"] == ["inside"]
    assert "./models:/models:ro" in COMPOSE["services"]["service"]["volumes"]
    assert {v.split(":")[0] for s in COMPOSE["services"].values() for v in s.get("volumes", []) if not v.startswith("./")} == set(COMPOSE["volumes"])


def test_compose_probes_ask_what_exists():
    probe = COMPOSE["services"]["service"]["healthcheck"]["test"]
    assert urlsplit(re.search(r"http://[\w.:/]+", probe[-1])[0]).path in ROUTES
    assert (COMPOSE["services"]["service"]["build"]["context"], COMPOSE["services"]["service"]["build"]["dockerfile"]) == ("..", "deploy/Dockerfile")


def test_the_password_is_nobodys_argument():
    "The script of the container, run with a stand-in for the program: it must hand the secret over by the environment."
    shell, flag, script = COMPOSE["services"]["service"]["entrypoint"]
    script = script.replace("$$", "$").replace("/run/secrets/database", "$SECRET").replace("exec pftsleep", "exec env printf '%s\\n' \"$PGPASSWORD\"")
    secret = "p'a s\"s$w;ord"
    import tempfile
    with tempfile.NamedTemporaryFile("w") as f:
        f.write(secret); f.flush()
        done = subprocess.run([shell, flag, script], env={**os.environ, "SECRET": f.name}, capture_output=True, text=True, check=True)
    password, *arguments = done.stdout.splitlines()
    assert password == secret and not any(secret in a for a in arguments) and "postgresql://pftsleep@database/pftsleep" in arguments


# --- nginx

def blocks(text):
    "Nested directives: [(words, inner or None)]."
    tokens, out, stack = re.findall(r'"[^"]*"|[{};]|[^\s{};]+', re.sub(r"#.*", "", text)), [], []
    words, here = [], out
    for t in tokens:
        if t == ";": here.append((words, None)); words = []
        elif t == "{": inner = []; here.append((words, inner)); stack.append(here); here, words = inner, []
        elif t == "}": assert not words, f"no ; after {words}"; here = stack.pop()
        else: words.append(t)
    assert not stack and not words, "an open block"
    return out


def directives(text):
    found = {}
    def walk(tree):
        for words, inner in tree:
            found.setdefault(words[0], []).append(words[1:])
            if inner is not None: walk(inner)
    walk(blocks(text))
    return found


def test_nginx_ends_tls_and_lets_uploads_and_events_through():
    d = directives(NGINX)
    assert d["ssl_protocols"] == [["TLSv1.2", "TLSv1.3"]] and all("ssl" in x for x in d["listen"])
    assert d["proxy_request_buffering"] == [["off"]] and d["proxy_buffering"] == [["off"]]
    host, port = d["proxy_pass"][0][0].removeprefix("http://").split(":")
    assert host in COMPOSE["services"] and int(port) == served_by_compose().port
    limit = re.fullmatch(r"(\d+)g", d["client_max_body_size"][0][0])
    assert int(limit[1]) == served_by_compose().max_upload_gb
    listening = d["listen"][0][0]
    assert COMPOSE["services"]["proxy"]["ports"][0].split(":")[1] == listening and int(listening) > 1024 # without root
    assert all(p[0].startswith("/tmp/") for name, ps in d.items() if name.endswith("temp_path") or name == "pid" for p in ps)
    assert ["=", "/metrics"] in d["location"] and d["add_header"][0][0] == "Strict-Transport-Security"
    assert "access_log" in d and d["access_log"] == [["off"]] # addresses hold people's keys


# --- Kubernetes

def test_every_kubernetes_object_is_named_and_lives_in_one_place():
    assert len({(d["kind"], d["metadata"]["name"]) for d in KUBERNETES}) == len(KUBERNETES)
    for d in KUBERNETES:
        assert d["apiVersion"] and d["kind"]
        if d["kind"] != "Namespace": assert d["metadata"]["namespace"] == of_kind("Namespace")["metadata"]["name"]


def test_kubernetes_names_fit_each_other():
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    for selector in (DEPLOYMENT["spec"]["selector"]["matchLabels"], of_kind("Service")["spec"]["selector"], of_kind("PodDisruptionBudget")["spec"]["selector"]["matchLabels"], of_kind("NetworkPolicy")["spec"]["podSelector"]["matchLabels"]):
        assert selector.items() <= labels.items()
    ports = {p["name"]: p["containerPort"] for p in CONTAINER["ports"]}
    assert ports == {"http": served_by_kubernetes().port} and of_kind("Service")["spec"]["ports"][0]["targetPort"] in ports
    assert of_kind("NetworkPolicy")["spec"]["ingress"][0]["ports"] == [{"port": ports["http"]}]
    backend = of_kind("Ingress")["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert backend["name"] == of_kind("Service")["metadata"]["name"]
    volumes = {v["name"]: v for v in POD["volumes"]}
    assert {m["name"] for m in CONTAINER["volumeMounts"]} == set(volumes)
    claims = {d["metadata"]["name"] for d in KUBERNETES if d["kind"] == "PersistentVolumeClaim"}
    assert {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v} == claims
    target = of_kind("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", DEPLOYMENT["metadata"]["name"]) and POD["serviceAccountName"] == of_kind("ServiceAccount")["metadata"]["name"]


def test_kubernetes_probes_limits_and_rights():
    for name, path in (("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
        probe = CONTAINER[name]["httpGet"]
        assert probe["path"] == path and path in ROUTES and probe["port"] == "http"
    assert set(CONTAINER["resources"]["limits"]) == {"cpu", "memory"} == set(CONTAINER["resources"]["requests"])
    c, p = CONTAINER["securityContext"], POD["securityContext"]
    assert c == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert p["runAsNonRoot"] and p["runAsUser"] == 10001 == p["fsGroup"] and p["seccompProfile"]["type"] == "RuntimeDefault" and not POD["automountServiceAccountToken"]
    assert of_kind("Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    mounts = {m["mountPath"]: m for m in CONTAINER["volumeMounts"]}
    assert mounts["/models"]["readOnly"] and mounts["/keys"]["readOnly"] and not mounts["/data"].get("readOnly") and "/tmp" in mounts
    assert POD["terminationGracePeriodSeconds"] > 30 # what the service gives to requests that are under way
    assert DEPLOYMENT["spec"]["replicas"] >= 2 and of_kind("PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]


def test_kubernetes_files_lie_where_they_are_looked_for():
    given, mounted = served_by_kubernetes(), {m["mountPath"] for m in CONTAINER["volumeMounts"]}
    for path in (given.keyring, given.signed_by, given.models, given.data, *parse_qs(urlsplit(given.queue).query)["sslrootcert"]): assert any(path == m or path.startswith(m + "/") for m in mounted), path
    assert parse_qs(urlsplit(given.queue).query)["sslmode"] == ["verify-full"] and re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", given.instance)
    told = {k.strip() for k in re.search(r"pftsleep-keys \(([^)]*)\)", (DEPLOY / "kubernetes" / "pftsleep.yaml").read_text())[1].split(",")}
    assert {Path(p).name for p in (given.keyring, given.signed_by, *parse_qs(urlsplit(given.queue).query)["sslrootcert"])} == told


def test_the_mounted_keyring_is_accepted(tmp_path, monkeypatch):
    "A secret with `defaultMode` 0400 belongs to root; `fsGroup` gives its group the right to read. The service runs as 10001."
    keys = next(v["secret"] for v in POD["volumes"] if v["name"] == "keys")
    mode = keys["defaultMode"] | 0o440
    assert mode == 0o440
    path = tmp_path / "keyring.json"
    vault.Keyring.create(path)
    real = os.fstat
    def mounted(fd, mode=mode, owner=0):
        about = list(real(fd))
        about[stat.ST_MODE], about[stat.ST_UID], about[stat.ST_GID] = stat.S_IFREG | mode, owner, 10001
        return os.stat_result(about)
    monkeypatch.setattr(vault.os, "geteuid", lambda: POD["securityContext"]["runAsUser"])
    monkeypatch.setattr(vault.os, "fstat", mounted)
    assert vault.read_private(path) == path.read_bytes()
    for wrong in (dict(mode=0o444), dict(mode=0o460), dict(owner=10002), dict(mode=0o440, owner=10001)):
        monkeypatch.setattr(vault.os, "fstat", lambda fd, wrong=wrong: mounted(fd, **wrong))
        with pytest.raises(vault.ConfigError): vault.read_private(path)


# --- all of it

def test_no_secret_is_written_down():
    for path in (p for p in [*DEPLOY.rglob("*"), ROOT / ".dockerignore"] if p.is_file()):
        text = path.read_text()
        assert not re.search(r"pfts_[0-9a-f]{12}|BEGIN [A-Z ]*PRIVATE KEY|://\w+:[^@$\s{\"]+@|(?i:password|secret|token)\s*[:=]\s*[\"']?[A-Za-z0-9+/]{8,}[\"']?\s*$", text, re.M), path.name
    for service in COMPOSE["services"].values():
        for name, value in (service.get("environment") or {}).items(): assert not re.search("PASSWORD|SECRET|TOKEN|KEY", name) or (name.endswith("_FILE") and value.startswith("/run/secrets/"))
    for e in CONTAINER["env"]: assert "value" not in e
    assert not any(d["kind"] == "Secret" for d in KUBERNETES)


@pytest.mark.parametrize("path", [p for p in DEPLOY.rglob("*.yaml")], ids=lambda p: p.name)
def test_no_key_is_given_twice(path):
    "YAML takes the last one, in silence."
    class Strict(yaml.SafeLoader): pass
    def mapping(loader, node):
        keys = [loader.construct_object(k) for k, _ in node.value]
        assert len(keys) == len(set(map(str, keys))), (path.name, node.start_mark.line + 1, keys)
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)
    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    assert list(yaml.load_all(path.read_text(), Strict))


def test_the_build_context_is_small():
    "What .dockerignore lets in, as Docker counts it."
    out = [line for line in (ROOT / ".dockerignore").read_text().split("\n") if line and line[0] not in "!#"]
    let_in = [ROOT / line[1:] for line in (ROOT / ".dockerignore").read_text().split("\n") if line.startswith("!")]
    files = [f for p in let_in for f in ([p] if p.is_file() else p.rglob("*")) if f.is_file() and not any(fnmatch.fnmatch(part, o.removeprefix("**/")) for o in out if o != "*" for part in f.parts)]
    assert sum(f.stat().st_size for f in files) < 20e6 and not [f for f in files if f.suffix in (".edf", ".pem", ".safetensors", ".key")]


@pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx here")
def test_nginx_itself_agrees(tmp_path):
    text = NGINX.replace("/run/secrets/certificate", str(tmp_path / "c.pem")).replace("/run/secrets/key", str(tmp_path / "k.pem")).replace("http://service:8000", "http://127.0.0.1:8000")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=localhost", "-keyout", tmp_path / "k.pem", "-out", tmp_path / "c.pem"], check=True, capture_output=True)
    (tmp_path / "nginx.conf").write_text(text)
    done = subprocess.run(["nginx", "-t", "-c", tmp_path / "nginx.conf"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
