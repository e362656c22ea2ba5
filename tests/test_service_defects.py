"The fourteen defects of the service that was there before (../shared/reference/pat.md 7.8), and what ours promises in their place (7.9)."
import asyncio
import csv
import io
import json
import logging
import os
import re
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

pytest.importorskip("fastapi")
from serving import add_encoder, encoder_folder, night_edf, registry_with, week_body, week_values
from test_pat import FIXTURES, needs_fixtures, shaken
from test_service_access import JSON, World

from pftsleep.apps.registry import publish_model
from pftsleep.data.standardise import Standardiser, save_standardiser
from pftsleep.models.pat import PAT
from pftsleep.models.transformer import PatchTransformer
from pftsleep.models.weights import load_published


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    w = World(tmp_path_factory.mktemp("world"), task=True)
    w.done = w.staged(subject="P-17", headers={"Idempotency-Key": "P-17-first"})
    return w

def standardiser(folder: Path, mean: float = 250., sd: float = 400.) -> Path:
    save_standardiser(Standardiser("global", np.array([mean]), np.array([sd]), "counts", "example", 9, "", "", True, frozenset()), folder / "scale.npz")
    return folder / "scale.npz"

def only_models(tmp_path: Path, *sources: tuple[str, Path, Path | None]) -> World: # name, source, scaler
    for name, source, scaler in sources: publish_model(source, tmp_path / "models", name, "1.0", scaler=scaler)
    return World(tmp_path, models=tmp_path / "models")

def embedding(reply) -> np.ndarray:
    assert reply.status_code == 200, reply.text
    return np.array(reply.json()["result"]["weeks"][0]["embedding"])

def direct(model, values, mean=250., sd=400.) -> np.ndarray:
    "The pooled vector, computed here."
    x = torch.from_numpy(((np.asarray(values, "float64") - mean) / sd).astype("float32"))[None]
    with torch.inference_mode(): return model.pool(model.encode(x[:, None]))[0].numpy()

def texts(value) -> str: return json.dumps(value).lower()


@needs_fixtures
@pytest.mark.parametrize("i", range(4))
def test_1_and_14_answers_are_those_of_keras(tmp_path_factory, i):
    "1: interleaved positions and an epsilon of 1e-5 put the answers 0.5 off. 14: nothing was ever compared with Keras. Here each number of an answer is, and so is each of the attention profile."
    z, w = np.load(FIXTURES / "ref_S.npz"), of_keras(tmp_path_factory)
    body = week_body(values=(z["input"][i].astype("float64") * 100 + 1000).tolist())
    told = w.week("explain", body, model="pat-s").json()["result"]["weeks"][0]
    assert np.abs(np.array(told["embedding"]) - z["pooled"][i]).max() < 5e-6 * max(1, np.abs(z["pooled"][i]).max())
    assert np.abs(np.array(told["profile"]) - z["explain_profile_patch"][i]).max() < 2e-7
    assert np.abs(embedding(w.week("embed", body, model="pat-s")) - z["pooled"][i]).max() < 5e-6 * max(1, np.abs(z["pooled"][i]).max())
    tokens = w.week("embed", body, model="pat-s", tokens=True).json()["result"]["weeks"][0]["tokens"]
    assert np.abs(np.array(tokens) - z["encoder_output"][i]).max() < 2e-5

_KERAS: list[World] = []
def of_keras(tmp_path_factory) -> World:
    "A service whose weights Keras has written."
    if not _KERAS:
        folder = tmp_path_factory.mktemp("keras")
        _KERAS.append(only_models(folder, ("pat-s", FIXTURES / "PAT-S_random_weights.h5", standardiser(folder, 1000., 100.))))
    return _KERAS[0]

def test_1_answers_are_those_of_the_model(world):
    "1, without the files of Keras: the service computes what the published model does, whose own tests compare it with Keras (tests/test_pat.py)."
    model = world.service.registry.get("pat").model
    assert np.abs(embedding(world.week(body=week_body(8))) - direct(model, week_values(8))).max() < 2e-5
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} <= {1e-6}

def test_2_nothing_comes_from_a_head_that_nobody_trained(world, tmp_path):
    "2: eighteen scores were random projections, other ones at every restart."
    reply = world.week("predict/pat")
    assert (reply.status_code, reply.json()["code"]) == (409, "no_trained_head")
    for mode in ("embed", "explain", "rhythm"):
        told = world.week(mode).json()
        assert not re.search("depress|mania|risk|insight|confidence|mood|alert|diagnos", texts(told["result"])), mode
    assert set(world.week("embed").json()["result"]["weeks"][0]) == {"start", "embedding"}
    answers = []
    for start in range(2): # a service of its own each time, as after a restart
        again = World(tmp_path / str(start), models=world.models)
        answers.append([again.week(mode, tenant="t").content for mode in ("embed", "explain", "rhythm", "predict/tired")])
    assert answers[0] == answers[1] == [world.week(mode).content for mode in ("embed", "explain", "rhythm", "predict/tired")]

def test_2_a_trained_head_says_how_good_it_is(world):
    "2: and where there is a head, its answer comes from it, with its own figures, its classes, and the hash of encoder, head and scaler together."
    told, task = world.week("predict/tired", week_body(4)).json(), world.service.registry.get("tired")
    x = torch.from_numpy(((np.array(week_values(4)) - 250) / 400).astype("float32"))[None]
    with torch.inference_mode(): p = float(task.model(x[:, None]).sigmoid())
    week, = told["result"]["weeks"]
    assert abs(week["probabilities"]["tired"] - p) < 1e-5 and abs(sum(week["probabilities"].values()) - 1) < 1e-6 and told["result"]["classes"] == ["no", "tired"]
    assert told["result"]["evaluation"]["figures"]["val_auc"] == .61 and told["about"]["model"]["model_hash"] == task.model_hash and told["about"]["model"]["scaler_hash"]

def test_3_the_large_model_answers(tmp_path):
    "3: every request to PAT-L failed."
    torch.manual_seed(0)
    large = PatchTransformer(PAT.L).eval()
    large.save_pretrained(tmp_path / "large")
    w = only_models(tmp_path, ("pat-l", tmp_path / "large", standardiser(tmp_path)))
    assert np.abs(embedding(w.week(model="pat-l")) - direct(large, week_values())).max() < 2e-5
    assert len(w.week("explain", model="pat-l").json()["result"]["weeks"][0]["profile"]) == 1120

def test_4_stages_come_from_the_data(world):
    "4: sleep stages were 1440 times 'wake', and a fallback returned a fixed night of 420 min."
    a, b = (world.week("rhythm", week_body(s)).json()["result"]["weeks"][0]["sleep_wake"] for s in (1, 2))
    assert a["minutes"] != b["minutes"] and a["minutes"]["sleep"] > 0 and a["minutes"]["wake"] > 0 and a["scorer"]["name"] == "Cole-Kripke"
    nights = [world.ask("GET", f"/v1/nights/{world.staged(edf=night_edf(600., seed))}").json() for seed in (1, 2)]
    assert nights[0]["probabilities"] != nights[1]["probabilities"]
    for n in nights:
        best = [("W", "N1", "N2", "N3", "REM")[int(np.argmax(p))] for p in n["probabilities"]]
        assert n["stages"] == best and len(n["stages"]) == 20
        assert n["statistics"]["tst_min"]["value"] == sum(s != "W" for s in n["stages"]) / 2

@pytest.mark.parametrize("what", ["weights", "manifest", "golden", "gone"])
def test_5_other_weights_are_not_served(tmp_path, what):
    "5: the check of the weights passed for random ones."
    models = registry_with(tmp_path, stager=False)
    version = models / "pat" / "1.0"
    if what == "weights": shutil.copy(encoder_folder(tmp_path / "random", 99) / "model.safetensors", next((version / "model").glob("*.safetensors")))
    if what == "manifest": (version / "manifest.json").unlink()
    if what == "golden": (version / "golden.safetensors").write_bytes(b"x" * (version / "golden.safetensors").stat().st_size)
    if what == "gone": next((version / "model").glob("*.safetensors")).unlink()
    w = World(tmp_path, models=models)
    reply = w.week()
    assert reply.status_code in (409, 503) and "embedding" not in reply.text and str(tmp_path) not in reply.text
    ready = w.client.get("/readyz")
    assert ready.status_code == 503 and ready.json()["reasons"] and str(tmp_path) not in ready.text and w.client.get("/livez").status_code == 200
    assert [m["state"] for m in w.ask("GET", "/v1/models").json()["models"]] == ["failed"]
    assert any(r["action"] == "model.load_failed" and r["outcome"] == "failed" for r in w.audited())

def test_5_weights_that_are_exchanged_while_it_runs(tmp_path):
    "5: what answers stays the verified model; the change is refused, told and written down."
    w = World(tmp_path, models=registry_with(tmp_path, stager=False))
    good = w.week().json()
    shutil.copy(encoder_folder(tmp_path / "random", 99) / "model.safetensors", next((w.models / "pat" / "1.0" / "model").glob("*.safetensors")))
    changes = w.ask("POST", "/v1/models/refresh", "admin").json()["changes"]
    assert {c["change"] for c in changes} >= {"checksum_failed", "load_failed"}
    reply = w.week(body=week_body(1))
    assert reply.status_code == 503 and w.client.get("/readyz").status_code == 503
    add_encoder(w.models, "1.1", 7)
    w.ask("POST", "/v1/models/refresh", "admin")
    told = w.week(body=week_body()).json()
    assert told["about"]["model"]["version"] == "1.1" and told["about"]["model"]["model_hash"] != good["about"]["model"]["model_hash"] and told["result"] != good["result"]
    assert "pftsleep_checksum_failures_total 1.0" in w.ask("GET", "/metrics", "auditor").text

def test_6_nothing_claims_an_optimisation_that_isnt_there(world):
    "6: tracing always failed, and 'optimised' was reported. Ours runs the module itself, whose output the golden vector fixes, and reports how far it is from that."
    rows = world.ask("GET", "/v1/models").json()["models"]
    assert rows and not re.search("optimi|traced|script|quanti|compiled|prun", texts(rows))
    assert all(r["golden_error"] <= 1e-4 for r in rows)
    assert type(world.service.registry.get("pat").model) is PatchTransformer

def test_7_requests_share_a_forward(tmp_path):
    "7: a batch was a loop over single requests."
    w = World(tmp_path, models=registry_with(tmp_path, stager=False), wait=.25)
    alone = [embedding(w.week(body=week_body(s), tenant="alone")) for s in range(8)]
    calls, encoder = [], w.service.registry.get("pat").model
    embed, before = encoder.embed, w.service.batcher.stats()["batches"]
    encoder.embed = lambda p: calls.append(len(p)) or embed(p)
    async def together():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(w.app), base_url="http://test", headers=w.head("clinician") | JSON) as c:
            return await asyncio.gather(*[c.post("/v1/weeks/embed?model=pat", content=week_body(s)) for s in range(8)])
    replies = asyncio.run(together())
    del encoder.embed
    assert max(calls) > 1 and sum(calls) == 8 and len(calls) <= 4 # weeks in a tensor
    assert w.service.batcher.stats()["batches"] - before == len(calls)
    for reply, one in zip(replies, alone, strict=True): assert np.abs(embedding(reply) - one).max() < 2e-5

def test_8_every_byte_and_every_option_counts(world):
    "8: cache keys used the first and last values, so an edited middle of the week got the old answer; another cache ignored what was asked for."
    body = json.loads(week_body(31))
    first = world.week(body=json.dumps(body).encode())
    again = world.week(body=json.dumps(body).encode())
    body["values"][5040] += 900.
    edited = world.week(body=json.dumps(body).encode())
    assert [r.headers["x-cache"] for r in (first, again, edited)] == ["miss", "hit", "miss"] and first.content == again.content and not np.array_equal(embedding(first), embedding(edited))
    asked = [dict(tokens=True), dict(window="all"), dict(impute=True), dict(min_coverage=.9)]
    assert [world.week(body=week_body(31), **a).headers["x-cache"] for a in asked] == ["miss"] * 4
    assert "tokens" in world.week(body=week_body(31), tokens=True).json()["result"]["weeks"][0]
    assert world.week("explain", week_body(31)).headers["x-cache"] == "miss" and world.week(body=week_body(31), tenant="ward-8").headers["x-cache"] == "miss"

def test_8_nothing_is_kept_twice_and_a_new_model_is_another_question(tmp_path):
    "8: the bookkeeping duplicated keys; and a new version of a model answers anew."
    w = World(tmp_path, models=registry_with(tmp_path, stager=False))
    for _ in range(3): w.week()
    assert w.service.cache.stats()["items"] == 1 and w.service.cache.stats()["hits"] == 2
    add_encoder(w.models, "1.1", 7)
    w.ask("POST", "/v1/models/refresh", "admin")
    assert w.week().headers["x-cache"] == "miss" and w.week(version="1.0").json()["about"]["model"]["version"] == "1.0"

def test_9_short_long_and_twice_scaled(world):
    "9: a short input was an index error; a long one paired the newest values with the oldest times; the signal was scaled twice; padding was noise."
    short = world.week(body=week_body(values=week_values()[:5000]))
    assert (short.status_code, short.json()["code"]) == (422, "wrong_length")
    values = week_values(1) + week_values(2) # two weeks: the last one is asked for, and says when it began
    told = world.week(body=week_body(values=values)).json()["result"]["weeks"]
    assert [t["start"] for t in told] == ["2026-03-09T00:00:00"]
    model = world.service.registry.get("pat").model
    assert np.abs(np.array(told[0]["embedding"]) - direct(model, week_values(2))).max() < 2e-5 # scaled once
    both = world.week(body=week_body(values=values), window="all").json()["result"]["weeks"]
    assert [t["start"] for t in both] == ["2026-03-02T00:00:00", "2026-03-09T00:00:00"] and np.abs(np.array(both[0]["embedding"]) - direct(model, week_values(1))).max() < 2e-5
    one_less = week_body(values=values[1:])
    assert world.week(body=one_less).json()["about"]["quality"]["unused_minutes"] == 10_079
    world.service.cache.clear()
    first = world.week(body=one_less).content
    world.service.cache.clear()
    assert world.week(body=one_less).content == first # the same bytes in, the same bytes out

def test_9_what_is_missing_is_told_not_made_up(world):
    "9: and short records were filled with random noise. Ours fills only when asked, by other days, and says how much."
    values = [None if 3000 <= i < 3300 else v for i, v in enumerate(week_values(3))]
    told = world.week(body=week_body(values=values), impute=True).json()["about"]["quality"]
    assert told["imputed_fraction"] == pytest.approx(300 / 10_080) and told["coverage"] == pytest.approx(1 - 300 / 10_080) and told["imputation"]
    plain = world.week("rhythm", week_body(values=values)).json()["about"]["quality"]
    assert plain["missing_minutes"] == 300 and plain["imputed_fraction"] == 0

def test_10_errors_say_whose_they_are(world, monkeypatch, caplog):
    "10: every error, the caller's too, was 500 with the text of the exception; a GET was 200 for what isn't there."
    for status, reply in ((404, world.ask("GET", "/v1/nights/" + "0" * 32)), (404, world.ask("GET", "/v1/results/" + "0" * 32)), (404, world.ask("GET", "/v1/nowhere")), (405, world.ask("PUT", "/v1/me")), (422, world.week(body=b"{")), (404, world.week(model="other"))):
        assert reply.status_code == status and reply.json()["code"], reply.text
    waiting = world.night()["id"]
    reply = world.ask("GET", f"/v1/nights/{waiting}")
    assert (reply.status_code, reply.json()["code"]) == (409, "job_queued")
    world.ask("DELETE", f"/v1/jobs/{waiting}")
    assert world.ask("GET", f"/v1/nights/{waiting}").json()["code"] == "job_cancelled"
    failed = world.night(channels="C4-M1=nothing like it")["id"]
    job = world.service.queue.claim("w")
    world.service.queue.fail(job.id, "w", dict(code="channel_error", problem="no such channel", remedy=None))
    assert (world.ask("GET", f"/v1/nights/{failed}").status_code, world.ask("GET", f"/v1/jobs/{failed}").json()["error"]["code"]) == (409, "channel_error")
    def broken(*_): raise ValueError("Elfriede Musterfrau 17.3 /srv/secret")
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr("pftsleep.apps.service.run_weeks", broken)
    reply = world.week(body=week_body(99))
    assert (reply.status_code, reply.json()["code"]) == (500, "internal") and "Musterfrau" not in reply.text and "ValueError" not in reply.text and reply.headers["content-type"] == "application/problem+json"
    from pftsleep.apps.telemetry import JsonLines
    lines = [JsonLines().format(r) for r in caplog.records]
    assert "Musterfrau" not in "".join(lines) and any(json.loads(line).get("exception") == "ValueError" and json.loads(line)["request_id"] == reply.json()["request_id"] for line in lines) # the place is, the text isn't

def test_10_what_was_answered_can_be_found_again(world):
    "10: synchronous results were never stored, so that GET couldn't find them. Ours are when asked, byte for byte."
    reply = world.week("embed", keep=True)
    assert world.ask("GET", reply.headers["location"]).content == reply.content
    assert "location" not in world.week("embed").headers

def test_11_health_is_measured(tmp_path):
    "11: health was 'healthy' whenever nothing was raised, the score was 100, and the metrics were literals."
    (tmp_path / "models").mkdir()
    w = World(tmp_path, models=tmp_path / "models")
    assert w.client.get("/readyz").status_code == 503 and w.client.get("/livez").json()["alive"] and w.week().status_code in (404, 409)
    (tmp_path / "two").mkdir()
    w2 = World(tmp_path / "two", models=registry_with(tmp_path / "two", stager=False))
    assert w2.client.get("/readyz").json() == dict(ready=True, reasons=[], version=w2.client.get("/livez").json()["version"])
    number = lambda name: float(re.search(rf"^{re.escape(name)} (\S+)$", w2.ask("GET", "/metrics", "auditor").text, re.M)[1])
    assert number("pftsleep_cache_hits_total") == 0
    for s in (1, 1, 2): w2.week(body=week_body(s))
    assert number("pftsleep_cache_hits_total") == 1 and number("pftsleep_cache_misses_total") == 2 and number("pftsleep_cache_items") == 2
    assert number('pftsleep_predictions_total{model="pat",outcome="embed"}') == 3 and number("pftsleep_batch_size_count") == 2 and number("pftsleep_model_seconds_sum") > 0
    served = w2.service.registry.get("pat")
    assert number(f'pftsleep_model_info{{model_hash="{served.model_hash}",name="pat",state="ready",version="1.0"}}') == 1
    stats = w2.ask("GET", "/v1/stats", "auditor").json()["routes"]["POST /v1/weeks/embed"]
    assert stats["total"] == 3 and 0 < stats["p50_ms"] <= stats["p95_ms"] <= stats["p99_ms"] <= stats["max_ms"]
    w2.service.queue._db.path.unlink() # the queue is gone: nothing is ready any more
    ready = w2.client.get("/readyz")
    assert ready.status_code == 503 and ready.json()["reasons"] == ["the queue can't be reached"] and w2.client.get("/livez").status_code == 200

@pytest.mark.parametrize("size,parameters", [("S", 274_720), ("M", 993_440)])
def test_12_the_architecture_is_that_of_the_weights(tmp_path, size, parameters):
    "12: heads of 8 or 16, a final norm and dropout inside: PAT's weights couldn't be loaded."
    model = shaken(PatchTransformer(getattr(PAT, size)), 1)
    model.save_pretrained(tmp_path / "m")
    w = only_models(tmp_path, ("m", tmp_path / "m", standardiser(tmp_path)))
    row, = w.ask("GET", "/v1/models").json()["models"]
    assert row["parameters"] == parameters and row["state"] == "ready"
    served = w.service.registry.get("m").model
    assert served.norm is None and all(b.attention.qkv.weight.shape == (3 * 96 * (6 if size == "S" else 12), 96) for b in served.blocks) and not served.training
    assert np.abs(embedding(w.week(model="m")) - direct(model, week_values())).max() < 2e-5

@needs_fixtures
def test_13_the_published_layout_is_served(tmp_path_factory):
    "13: the sample loader had positions as an embedding to be trained, heads of 96/H and an epsilon of 1e-3; it would have failed, or mixed up weights. Scaling by a person was called scaling by a year."
    w = of_keras(tmp_path_factory)
    served = w.service.registry.get("pat-s")
    assert not [n for n, p in served.model.named_parameters() if "position" in n] and sum(p.numel() for p in served.model.parameters()) == 274_720
    assert {m.eps for m in served.model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    file = load_published(FIXTURES / "PAT-S_random_weights.h5")
    for (name, a), (_, b) in zip(served.model.state_dict().items(), file.state_dict().items(), strict=True): assert torch.equal(a, b), name
    assert "sha256" in texts(served.manifest["source"])

def test_13_how_a_week_was_scaled_is_told(world, tmp_path):
    "13: scaling by the person is called so, and another unit than the model's is refused."
    told = world.week().json()["about"]["quality"]
    assert told["standardised"] == dict(strategy="global", cohort="example") and told["unit"] == "counts"
    refused = world.week(body=week_body(unit="MIMS"))
    assert (refused.status_code, refused.json()["code"]) == (422, "bad_unit")
    encoder_folder(tmp_path / "bare")
    w = only_models(tmp_path, ("bare", tmp_path / "bare", None))
    quality = w.week(model="bare").json()["about"]["quality"]
    assert "subject" in quality["standardised"]["strategy"] and quality["warnings"]


# 7.9: for everything that is answered

def described(about: dict, model: bool) -> None:
    assert "research" in about["statement"].lower() and "not" in about["statement"].lower() and about["software"]["name"] == "pftsleep" and about["software"]["version"] and isinstance(about["quality"], dict) and about["quality"]
    if model: assert re.fullmatch("[0-9a-f]{64}", about["model"]["model_hash"]) and about["model"]["recipe_hash"] and about["model"]["version"] and about["model"]["name"] and "scaler_hash" in about["model"] and "fallback_from" in about["model"]

@pytest.mark.parametrize("mode", ["embed", "explain", "rhythm", "predict/tired"])
def test_every_answer_about_a_week_says_what_it_is(world, mode):
    for reply in (world.week(mode, keep=True), world.week(mode)): # computed, and from the cache
        described(reply.json()["about"], mode != "rhythm")
        assert reply.headers["x-research-use"]
        assert {"coverage", "missing_minutes", "imputed_fraction", "unit", "warnings", "start"} <= reply.json()["about"]["quality"].keys()
    place = world.week(mode, keep=True).headers["location"]
    described(world.ask("GET", place).json()["about"], mode != "rhythm")

def test_every_answer_about_a_night_says_what_it_is(world):
    path = f"/v1/nights/{world.done}"
    described(world.ask("GET", path).json()["about"], True)
    described(world.ask("GET", f"{path}/export?format=json").json()["about"], True)
    described(world.ask("POST", f"{path}/corrections", json=dict(epoch=2, stage="REM")).json()["about"], True)
    described(world.ask("GET", f"/v1/results/{world.done}").json()["about"], True)
    pdf = world.ask("GET", f"{path}/export?format=pdf")
    assert pdf.content.startswith(b"%PDF") and pdf.headers["content-type"] == "application/pdf" and pdf.headers["x-research-use"]

@pytest.mark.parametrize("format", ["csv", "edf", "pdf", "json"])
def test_every_file_of_a_night_says_what_it_is(world, format):
    "What a table has no room for comes beside it."
    reply = world.ask("GET", f"/v1/nights/{world.done}/export?format={format}")
    assert reply.status_code == 200 and f'night-{world.done}.{format}"' in reply.headers["content-disposition"] and reply.headers["x-research-use"]
    described(json.loads(reply.headers["x-about"]), True)
    if format == "csv": assert len(list(csv.DictReader(io.StringIO(reply.text)))) == 10

def test_everything_else_carries_the_statement(world):
    for path, role in (("/", None), ("/livez", None), ("/readyz", None), ("/v1/me", "auditor"), ("/v1/models", "auditor"), ("/v1/jobs", "clinician"), (f"/v1/jobs/{world.done}/events", "clinician"), ("/metrics", "auditor"), ("/nowhere", None), ("/v1/stats", "auditor"), ("/v1/audit", "auditor")):
        assert "research" in world.ask("GET", path, role).headers["x-research-use"], path
    for path in ("/v1/me", "/v1/models"): assert "research" in world.ask("GET", path).json()["statement"].lower()
    assert "research" in world.client.get("/openapi.json").json()["info"]["description"].lower()

def test_a_record_of_each_load_and_each_prediction(tmp_path):
    "Who, what, when, which model, which input; never a value, a name, or what the person is called."
    w = World(tmp_path, task=True)
    loads = [r for r in w.audited() if r["action"] == "model.load"]
    assert {(r["facts"]["model"], r["facts"]["version"]) for r in loads} == {("pat", "1.0"), ("stages", "1.0"), ("tired", "1.0")} and all(re.fullmatch("[0-9a-f]{64}", r["model_hash"]) for r in loads)
    import hashlib
    body, expected = week_body(values=[918273.25, *week_values()[1:]]), []
    for mode in ("embed", "explain", "rhythm", "predict/tired", "embed"): # the last one from the cache
        reply = w.week(mode, body, subject="P-4711", keep=True, headers={"X-Request-ID": f"r-{len(expected)}"})
        expected.append((f"weeks.{mode.split('/')[0]}", f"r-{len(expected)}", hashlib.sha256(body).hexdigest(), (reply.json()["about"]["model"] or {}).get("model_hash")))
    night = w.staged(subject="P-4711")
    w.ask("GET", f"/v1/nights/{night}")
    w.ask("GET", f"/v1/nights/{night}/export?format=csv")
    w.ask("POST", f"/v1/nights/{night}/corrections", json=dict(epoch=0, stage="N3"))
    w.ask("DELETE", "/v1/subjects/P-4711", "admin")
    records = w.audited()
    mine = [r for r in records if r["action"].startswith("weeks.")]
    assert [(r["action"], r["request_id"], r["input_hash"], r.get("model_hash")) for r in mine] == expected
    assert {r["who"] for r in mine} == {"key:" + w.key("clinician").split("_")[1]} and {(r["tenant"], r["role"], r["outcome"]) for r in mine} == {("ward-7", "clinician", "ok")}
    actions = [r["action"] for r in records]
    assert {"nights.submit", "nights.read", "nights.correct", "subjects.delete"} <= set(actions) and actions.count("nights.read") == 2
    raw = b"".join(p.read_bytes() for p in (w.data / "audit").rglob("*") if p.is_file())
    for secret in (b"P-4711", b"918273", w.key("clinician").encode(), b"embedding"): assert secret not in raw
    assert w.service.audit.verify().ok

def test_without_a_record_no_answer(tmp_path, monkeypatch):
    "A full disk: nothing is answered that isn't written down, from the cache neither, and the service says so."
    w = World(tmp_path)
    w.done = w.staged()
    assert w.week().status_code == 200
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(w.service.audit._chain, "append", full)
    for reply in (w.week(), w.week(body=week_body(2)), w.ask("GET", f"/v1/nights/{w.done}"), w.ask("GET", f"/v1/nights/{w.done}/export?format=csv")):
        assert (reply.status_code, reply.json()["code"]) == (503, "audit_unavailable") and reply.headers["retry-after"] and "embedding" not in reply.text and "stages" not in reply.text
    assert w.client.get("/readyz").status_code == 503
    monkeypatch.undo()
    assert w.week().status_code == 200 and w.client.get("/readyz").status_code == 200

PERSON = "Jane Doe/19-K"

def on_disk(w) -> bytes: return b"\0".join(p.name.encode() + p.read_bytes() for p in w.data.rglob("*") if p.is_file())

def test_nothing_on_the_disk_can_be_read(tmp_path):
    "Inputs and results are encrypted, and a person stands nowhere: not in the queue, not in the log, not among the names of files."
    w = World(tmp_path)
    values = [123456.75 if i % 3 else 23456.25 for i in range(10_080)]
    reply = w.week("rhythm", week_body(values=values), keep=True, subject=PERSON)
    edf = night_edf(300., 5)
    night = w.night(edf=edf, subject=PERSON, headers={"Idempotency-Key": "JaneDoe-1"})["id"]
    waiting = on_disk(w)
    w.work()
    w.ask("POST", f"/v1/nights/{night}/corrections", json=dict(epoch=0, stage="N3"))
    raw = on_disk(w) + waiting
    part = edf[1024:][4000:4060] # of the samples
    for secret in (b"123456.75", b"23456.25", PERSON.encode(), b"Jane", b"JaneDoe", b"19-K", np.float64(123456.75).tobytes(), np.float32(123456.75).tobytes(), part, b"probabilities", b"statistics", b"rest_activity", reply.content[200:260], w.key("clinician").encode()):
        assert secret not in raw, secret
    for name in (".", "keys.json", "keyring.json", "jobs.sqlite"): assert not (w.data / name).stat().st_mode & 0o077, name # their owner's alone
    assert not any((w.data / "scratch").iterdir())

def test_who_is_deleted_is_gone(tmp_path):
    "Vault, queue, cache and everything on the disk; of nobody else, and the log says that it was done."
    w = World(tmp_path)
    body, other = week_body(1), week_body(2)
    w.week(body=other) # asked about nobody first, then about the person: an answer of theirs all the same
    places = [w.week(m, b, keep=True, subject=PERSON).headers["location"] for m in ("embed", "rhythm") for b in (body, other)]
    staged, waiting = w.staged(subject=PERSON), w.night(subject=PERSON, edf=night_edf(120.))["id"]
    w.ask("POST", f"/v1/nights/{staged}/corrections", json=dict(epoch=0, stage="N3"))
    neighbour = w.week("rhythm", body, keep=True, subject="somebody else").headers["location"]
    hashed = w.service.subject_hash("ward-7", PERSON)
    before = set(w.service.vault.names())
    gone = w.ask("DELETE", "/v1/subjects/Jane%20Doe%2F19-K", "admin")
    assert gone.json() == dict(deleted=6)
    for url in (*places, f"/v1/nights/{staged}", f"/v1/nights/{staged}/export?format=csv", f"/v1/jobs/{staged}", f"/v1/jobs/{waiting}"): assert w.ask("GET", url).status_code == 404, url
    assert w.ask("GET", neighbour).status_code == 200
    assert {n for n in w.service.vault.names() if n.startswith(("input-", "result-"))} == {f"result-{neighbour.split('/')[-1]}"} and before > set(w.service.vault.names())
    assert w.service.queue.by_subject("ward-7", hashed) == [] and w.work() == 0
    assert [w.week(m, b, subject=PERSON).headers["x-cache"] for m in ("embed", "rhythm") for b in (body, other)] == ["miss"] * 4
    told = [r for r in w.audited() if r["action"] == "subjects.delete"]
    assert [(r["resource"], r["facts"]["deleted"]) for r in told] == [(hashed, 6)]
    files = b"".join(p.read_bytes() for p in w.data.rglob("*") if p.is_file() and "audit" not in p.parts)
    assert hashed.encode() not in files and staged.encode() not in files # not even in free pages of the database
    assert w.ask("DELETE", "/v1/subjects/nobody", "admin").json() == dict(deleted=0)

def test_what_is_old_is_gone(tmp_path):
    "The retention period: results, inputs, rows; and orphans of a server that was killed."
    from pftsleep.apps.service import tidy
    w = World(tmp_path, retention_days=2.)
    night, place = w.staged(), w.week("rhythm", keep=True).headers["location"]
    later = lambda days: datetime.now(UTC) + timedelta(days=days)
    from pftsleep.apps.service import retire
    assert retire(w.service, later(1.9)) == 0 and w.ask("GET", place).status_code == 200
    assert retire(w.service, later(2.1)) == 2 and w.ask("GET", place).status_code == 404 and w.ask("GET", f"/v1/nights/{night}").status_code == 404
    assert not [n for n in w.service.vault.names() if n.startswith(("input-", "result-"))]
    assert [r["facts"]["deleted"] for r in w.audited() if r["action"] == "retention.delete"] == [2]
    w.service.vault.put("input-" + "a" * 32, b"x", "t/a") # of nobody
    old = next(p for p in w.service.vault.folder.rglob("*") if p.is_file() and "a" * 32 in p.name)
    assert tidy(w.service) == 0
    os.utime(old, (time.time() - 9000,) * 2)
    assert tidy(w.service) == 1 and ("input-" + "a" * 32) not in w.service.vault

def test_one_key_one_request(world):
    "The same Idempotency-Key with another question isn't answered with the first one's job."
    head = {"Idempotency-Key": "once"}
    one, again = (world.night(headers=head)["id"] for _ in range(2))
    assert one == again
    for more in (dict(allow_missing=True), dict(channels="C4-M1=E1-M2"), dict(version="1.0")):
        reply = world.ask("POST", "/v1/nights", headers=head | {"Content-Type": "application/octet-stream"}, content=night_edf(), params=more)
        assert (reply.status_code, reply.json()["code"]) == (409, "key_reused"), more
    assert len([n for n in world.service.vault.names("input-") if one in n]) == 1
    world.ask("DELETE", f"/v1/jobs/{one}")

def test_a_damaged_result_is_our_fault(tmp_path):
    w = World(tmp_path)
    place = w.week("rhythm", keep=True).headers["location"]
    record = next(p for p in w.service.vault.folder.rglob("*") if place.split("/")[-1] in p.name)
    record.write_bytes(record.read_bytes()[:-3] + b"xyz")
    reply = w.ask("GET", place)
    assert reply.status_code == 500 and str(tmp_path) not in reply.text and "result-" not in reply.text
