"""What the service says about itself: the table, the metrics, the alerts and the dashboard are one thing, and logs keep secrets."""
import io
import json
import logging
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pftsleep.apps.telemetry import (
    ALERTS,
    LOGGED,
    METRICS,
    PANELS,
    JsonLines,
    LatencyWindow,
    Telemetry,
    alert_rules,
    dashboard,
    log_as_json,
    metrics_in,
    metrics_table,
    monitoring_files,
    request_id_now,
    without_secrets,
    write_monitoring,
)
from pftsleep.errors import RequestError

DEPLOY = Path(__file__).parents[1] / "deploy"


def samples(t: Telemetry) -> dict[str, float]:
    "Lines of the exposition by name and labels."
    return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in t.exposition().decode().splitlines() if line and line[0] != "#")}

def everything(t: Telemetry) -> Telemetry:
    "One of all that can happen."
    t.entered(); t.request("/v1/weeks/embed", "POST", 200, .02, "a", "key1", entered=True)
    for code in ("negative", "unauthenticated", "forbidden", "rate_limited", "busy"): t.refused(code)
    t.unexpected(ValueError("x"), "b")
    for kind in ("load", "load_failed", "checksum_failed", "fallback", "swap", "removed"): t.on_model(kind, dict(name="m", version="1", model_hash="f"))
    t.model_call(4, .03); t.predicted("m", "embed"); t.uploaded(10); t.job_ended("done", 12.); t.audited(3, .002); t.audited(1, .002, ok=False); t.deleted(2, "retention")
    t.queue(dict(queued=1)); t.models([dict(name="m", version="1", model_hash="f", state="ready")]); t.caches(dict(hits=1, misses=2, evicted=0, items=2), dict(queue=5)); t.count("pftsleep_worker_restarts_total")
    return t


# --- metrics

def test_the_table_is_what_is_registered():
    t = Telemetry()
    kinds = {"counter": "_total", "gauge": "", "histogram": ""}
    found = {f.name + kinds[f.type]: f for f in t.collectors.collect()}
    assert set(found) == set(METRICS)
    for name, m in METRICS.items():
        assert (found[name].type, found[name].documentation) == (m.kind, m.help) and tuple(t[name]._labelnames) == m.labels
        assert name.startswith("pftsleep_") and (m.kind != "histogram" or (m.buckets and list(m.buckets) == sorted(m.buckets)))
    assert [r[0] for r in metrics_table()] == list(METRICS)

def test_all_that_happens_is_counted():
    s = samples(everything(Telemetry()))
    assert not [n for n in METRICS if not any(k.startswith(n) for k in s)]
    expected = {"pftsleep_requests_in_flight": 0, 'pftsleep_errors_total{code="internal"}': 1, "pftsleep_auth_failures_total": 1, "pftsleep_forbidden_total": 1, "pftsleep_rate_limited_total": 1, "pftsleep_shed_total": 1,
        'pftsleep_model_loads_total{outcome="failed"}': 1, "pftsleep_checksum_failures_total": 1, "pftsleep_fallbacks_total": 1, "pftsleep_swaps_total": 1, "pftsleep_batch_size_sum": 4, "pftsleep_audit_records_total": 3,
        "pftsleep_audit_failures_total": 1, "pftsleep_cache_misses_total": 2, "pftsleep_batch_waiting": 5, 'pftsleep_queue_jobs{state="queued"}': 1, 'pftsleep_request_seconds_count{method="POST",route="/v1/weeks/embed",status="200"}': 1}
    assert {k: s[k] for k in expected} == expected

def test_names_that_are_not_in_the_table():
    t = Telemetry()
    with pytest.raises(KeyError): t.count("pftsleep_patients_total")
    with pytest.raises(ValueError): t.count("pftsleep_errors_total", nope="x")

def test_two_services_count_apart():
    a, b = everything(Telemetry()), Telemetry()
    assert samples(a)["pftsleep_swaps_total"] == 1 and samples(b)["pftsleep_swaps_total"] == 0

@given(st.lists(st.integers(0, 1000), min_size=1, max_size=10))
@settings(max_examples=20)
def test_counts_of_others_only_go_up(totals):
    t, before, expected = Telemetry(), 0, 0
    for n in totals:
        t.caches(dict(hits=n))
        expected, before = expected + (n - before if n >= before else n), n
        assert samples(t)["pftsleep_cache_hits_total"] == expected

def test_labels_can_hold_anything_and_methods_are_few():
    t = Telemetry()
    t.refused('bad"\n{evil="1"} 5\n# HELP')
    t.request("/x", "BREW" * 100, 418, .1)
    t.models([dict(name='a"\n', version=None, model_hash="f", state="ready")])
    s = samples(t)
    assert 'pftsleep_request_seconds_count{method="other",route="/x",status="418"}' in s
    assert len([k for k in s if k.startswith("pftsleep_errors_total{")]) == 1

def test_models_that_are_gone_are_gone():
    t = Telemetry()
    for version in "123": t.models([dict(name="m", version=version, model_hash="f", state="ready")])
    assert [k for k in samples(t) if k.startswith("pftsleep_model_info{")] == ['pftsleep_model_info{model_hash="f",name="m",state="ready",version="3"}']


# --- percentiles

@given(st.lists(st.floats(0, 100), min_size=1, max_size=80), st.integers(1, 40))
@settings(max_examples=40)
def test_percentiles_are_numpys(times, size):
    w = LatencyWindow(size)
    for i, t in enumerate(times): w.add("r", t, i % 3 == 0)
    kept, found = np.array(times[-size:]), w.stats()["r"]
    np.testing.assert_array_equal(w.last("r"), kept)
    np.testing.assert_allclose([found[k] for k in ("p50_ms", "p95_ms", "p99_ms", "mean_ms", "max_ms")], [*(1000 * np.percentile(kept, [50, 95, 99])), 1000 * kept.mean(), 1000 * kept.max()], atol=1e-3)
    assert (found["total"], found["errors"], found["window"]) == (len(times), (len(times) + 2) // 3, len(kept)) and found["error_rate"] == found["errors"] / found["total"]

def test_slow_routes_and_too_many_of_them():
    w = LatencyWindow(size=100, max_routes=3)
    for i in range(500): w.add(f"r{i % 5}", 2. if i % 5 == 1 else .01)
    assert set(w.stats()) == {"r0", "r1", "r2", "other"} and w.stats()["other"]["total"] == 200
    assert w.slow(1.) == ["r1"] and w.slow(1., 101) == [] and LatencyWindow().stats() == {} and len(LatencyWindow().last("x")) == 0

def test_many_threads():
    w = LatencyWindow()
    work = [threading.Thread(target=lambda i=i: [w.add(f"r{k % 40}", .01) or w.stats() if k % 50 == 0 else w.add(f"r{k % 40}", .01) for k in range(400)]) for i in range(4)]
    for t in work: t.start()
    for t in work: t.join()
    assert sum(r["total"] for r in w.stats().values()) == 1600

def test_stats_are_plain():
    t = everything(Telemetry())
    assert json.loads(json.dumps(t.stats())) == t.stats() and t.stats()["routes"]["POST /v1/weeks/embed"]["total"] == 1


# --- logs

@pytest.fixture
def logged():
    out, logger = io.StringIO(), logging.getLogger("pftsleep.service")
    handler, level, up = logging.StreamHandler(out), logger.level, logger.propagate
    handler.setFormatter(JsonLines())
    logger.addHandler(handler); logger.setLevel("INFO"); logger.propagate = False
    yield lambda: [json.loads(line) for line in out.getvalue().splitlines()], out
    logger.removeHandler(handler); logger.setLevel(level); logger.propagate = up

def test_a_request_is_one_line(logged):
    lines, _ = logged
    Telemetry().request("/v1/jobs/{id}", "GET", 404, .0123456789, "rid-1", "key7", "no_such_job")
    line, = lines()
    assert {k: line[k] for k in ("route", "method", "status", "seconds", "principal", "code", "request_id", "level", "event")} == dict(route="/v1/jobs/{id}", method="GET", status=404, seconds=.012346, principal="key7", code="no_such_job",
        request_id="rid-1", level="INFO", event="request")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])

@pytest.mark.parametrize("text", ["GET /v1/weeks?subject=Canary&x=1", "Authorization: Bearer Canary", "key pfts_1_Canary", "token=Canary", "password: Canary", "eyJhbGciOi.Canary.sig", "postgresql://user:Canary@host/db", "api_key=Canary", "Basic Canary", "https://x/y?Canary"])
def test_no_secret_is_logged(text, logged):
    lines, out = logged
    logging.getLogger("pftsleep.service").warning("something about %s", text, extra=dict(route=text, values=["Canary"], subject="Canary", body="Canary"))
    assert "Canary" not in out.getvalue() and len(lines()) == 1 and "Canary" not in without_secrets(text)

def test_an_exception_keeps_its_place_and_not_its_text(logged):
    lines, out = logged
    try:
        try: float("Canary value")
        except ValueError as e: raise RequestError("Canary problem", "x") from e
    except RequestError as e: Telemetry().unexpected(e, "rid")
    line, = lines()
    assert "Canary" not in out.getvalue() and line["exception"] == "RequestError" and line["at"][-1].startswith("test_telemetry.py:") and line["request_id"] == "rid"

@given(st.text(max_size=300), st.dictionaries(st.sampled_from(LOGGED), st.one_of(st.text(max_size=50), st.integers(), st.floats(), st.lists(st.integers(), max_size=3))))
@settings(max_examples=60)
def test_any_event_is_one_line_of_json(text, extra):
    record = logging.LogRecord("pftsleep", logging.INFO, "f.py", 1, "%s", (text,), None)
    record.__dict__.update(extra)
    line = JsonLines().format(record)
    assert "\n" not in line and "\r" not in line and line.isascii() and isinstance(json.loads(line, parse_constant=lambda c: pytest.fail(c)), dict)

def test_a_long_event_is_cut(): assert len(without_secrets("x" * 10**6)) <= 2000

def test_requests_have_their_own_id(logged):
    lines, _ = logged
    def one(name):
        request_id_now.set(name)
        logging.getLogger("pftsleep.service").info("event")
    threads = [threading.Thread(target=one, args=(f"id{i}",)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert {line["request_id"] for line in lines()} == {f"id{i}" for i in range(4)} and request_id_now.get() == "-"

def test_everything_is_logged_as_json():
    root, ours = logging.getLogger(), logging.getLogger("pftsleep")
    before, level = (root.handlers[:], root.level), ours.level
    try:
        log_as_json("INFO", out := io.StringIO())
        logging.getLogger("somebody.else").warning("two\nlines")
        logging.getLogger("somebody.else").info("not this")
        logging.getLogger("pftsleep.x").info("ours")
        assert [json.loads(line)["event"] for line in out.getvalue().splitlines()] == ["two\nlines", "ours"]
    finally: root.handlers[:], root.level = before; ours.setLevel(level)


# --- alerts and dashboard

def test_the_files_in_deploy_are_those_of_the_table(tmp_path):
    "After a change: python -c \"from pftsleep.apps.telemetry import write_monitoring; write_monitoring('deploy')\""
    for name, data in monitoring_files().items(): assert (DEPLOY / name).read_bytes() == data, f"deploy/{name} is old"
    assert [p.read_bytes() for p in write_monitoring(tmp_path / "new")] == list(monitoring_files().values())

def expressions() -> dict[str, str]:
    "As they stand in the files."
    rules = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    return {r["alert"]: r["expr"] for g in rules["groups"] for r in g["rules"]} | {f"{p['title']} {t['refId']}": t["expr"] for p in panels for t in p["targets"]}

def labels_in(expr: str) -> set[tuple[str, str]]: # metric, label
    named = {(m, label) for m, inside in re.findall(r"\b(pftsleep_\w+)\{([^}]*)\}", expr) for label in re.findall(r"(\w+)\s*(?:=~|!=|=)", inside)}
    return {(metrics_in(m).pop(), label) for m, label in named}

def test_rules_and_panels_refer_to_what_exists():
    found = expressions()
    assert len(found) >= len(ALERTS) + len(PANELS) and set(ALERTS) <= set(found)
    for name, expr in found.items():
        assert metrics_in(expr) <= set(METRICS) and (metrics_in(expr) or "up{" in expr), name
        assert all(label in METRICS[metric].labels for metric, label in labels_in(expr)), name
        assert all(expr.count(a) == expr.count(b) for a, b in ("()", "[]", "{}")), name
        by = {w.strip() for group in re.findall(r"\bby \(([^)]*)\)", expr) for w in group.split(",")} - {"le"}
        assert all(any(w in METRICS[m].labels for m in metrics_in(expr)) for w in by), name
        for m in re.findall(r"\bpftsleep_\w+", expr): # a histogram is asked for by its parts, the others by their name; counters in a rate
            kind = METRICS[metrics_in(m).pop()].kind
            assert (m in METRICS) == (kind != "histogram") and (kind != "counter" or re.search(rf"(rate|increase)\({m}", expr)), name

def test_metrics_that_do_not_exist_are_noticed():
    assert not metrics_in("rate(pftsleep_health_score[5m])") <= set(METRICS)
    assert metrics_in("pftsleep_request_seconds_bucket + pftsleep_audit_records_total") == {"pftsleep_request_seconds", "pftsleep_audit_records_total"}

def test_alerts_say_what_to_do():
    rules = alert_rules()["groups"][0]["rules"]
    assert all(r["annotations"]["summary"] and r["annotations"]["todo"] and r["labels"]["severity"] in ("page", "ticket", "info") and re.fullmatch(r"\d+[mh]", r["for"]) for r in rules)
    assert {"pftsleep_checksum_failures_total", "pftsleep_fallbacks_total", "pftsleep_model_loads_total", "pftsleep_audit_failures_total"} <= {m for a in ALERTS.values() for m in metrics_in(a.expr)}

def test_the_dashboard_fits_on_a_screen():
    d = dashboard()
    places = [(p["gridPos"]["x"], p["gridPos"]["y"], p["gridPos"]["w"], p["gridPos"]["h"]) for p in d["panels"]]
    cells = [(x + i, y + j) for x, y, w, h in places for i in range(w) for j in range(h)]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24 and len({p["id"] for p in d["panels"]}) == len(PANELS)
    assert all(t["datasource"]["uid"] == "${source}" for p in d["panels"] for t in p["targets"]) and d["templating"]["list"][0]["name"] == "source"
