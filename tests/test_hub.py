"""To the Hub and back with the real client, against a small server that speaks what the client asks for; files go in the commit itself (the server asks for no LFS)."""
import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from pftsleep.data.signals import Recipe
from pftsleep.data.splits import Split
from pftsleep.errors import ConfigError, DownloadError, ModelError
from pftsleep.models.heads import LinearProbe
from pftsleep.models.hub import from_hub, load_model, publishable, push_to_hub
from pftsleep.models.model_card import model_card, result_rows, without_places
from pftsleep.models.stager import Stager, save_stager
from pftsleep.models.transformer import PatchConfig, PatchTransformer

TOKEN = "hf_" + "x" * 12


class Hub(BaseHTTPRequestHandler):
    "One repository, its last commit; every request and its body are kept."
    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[tuple[str, str, str | None]]] = []
    bodies: ClassVar[list[bytes]] = []
    private: bool | None = None
    refuse = False

    def log_message(self, *a) -> None: pass
    @property
    def commit(self) -> str: return hashlib.sha1(json.dumps({k: v.hex() for k, v in sorted(self.files.items())}).encode()).hexdigest()

    def answer(self, code: int, body: bytes = b"", kind: str = "application/json", **headers: str) -> None:
        self.send_response(code)
        for k, v in {"Content-Type": kind, "Content-Length": str(len(body)), **{k.replace("_", "-"): v for k, v in headers.items()}}.items(): self.send_header(k, v)
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)

    def told(self) -> bytes:
        n = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            out = b""
            while size := int(self.rfile.readline(), 16): out += self.rfile.read(size); self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(n)

    def do_POST(self) -> None:
        body, path = self.told(), self.path.partition("?")[0]
        type(self).asked.append(("POST", path, self.headers.get("Authorization"))); type(self).bodies.append(body)
        if self.refuse: return self.answer(403, b'{"error": "no"}', X_Error_Code="GatedRepo", X_Error_Message="not yours")
        say = lambda **v: self.answer(200, json.dumps(v).encode())
        if path == "/api/repos/create":
            type(self).private = json.loads(body).get("private", json.loads(body).get("visibility") == "private")
            return say(url=f"http://{self.headers['Host']}/ann/sleep", id="ann/sleep")
        if path == "/api/validate-yaml": return say(errors=[], warnings=[])
        if "/preupload/" in path: return say(files=[dict(path=f["path"], uploadMode="regular", shouldIgnore=False) for f in json.loads(body)["files"]])
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file": type(self).files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return say(commitUrl=f"http://{self.headers['Host']}/ann/sleep/commit/{self.commit}", commitOid=self.commit, success=True)
        self.answer(404, b"{}")

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        type(self).asked.append((self.command, path, self.headers.get("Authorization")))
        if self.refuse or not path.startswith(("/api/models/ann/sleep", "/ann/sleep/")): return self.answer(401, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if "/resolve/" in path:
            data = self.files.get(path.split("/resolve/")[1].partition("/")[2])
            if data is None: return self.answer(404, b"", X_Error_Code="EntryNotFound")
            return self.answer(200, data, "application/octet-stream", ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=self.commit, Accept_Ranges="bytes")
        if "/tree/" in path: return self.answer(200, json.dumps([dict(type="file", path=k, size=len(v), oid=hashlib.sha1(v).hexdigest()) for k, v in self.files.items()]).encode())
        self.answer(200, json.dumps(dict(id="ann/sleep", modelId="ann/sleep", sha=self.commit, private=bool(self.private), siblings=[dict(rfilename=k) for k in self.files], tags=[], downloads=0, likes=0)).encode())
    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    client = pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")
    Hub.files, Hub.asked, Hub.bodies, Hub.private, Hub.refuse = {}, [], [], None, False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    from huggingface_hub import constants, hf_api
    for name, value in {"ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": str(tmp_path / "none"), "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}"}.items(): monkeypatch.setattr(constants, name, value, raising=False)
    monkeypatch.setattr(hf_api.HfApi.__init__, "__defaults__", hf_api.HfApi.__init__.__defaults__)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    client.utils.disable_progress_bars()
    yield Hub
    server.shutdown(); server.server_close()


def a_run(folder: Path) -> Stager:
    torch.manual_seed(0)
    recipe = Recipe(name="r", channels=("EEG",), rate=10.)
    encoder = PatchTransformer(PatchConfig.tiny(rate=10., d_model=8, d_ff=16, n_layers=1), recipe.to_dict())
    encoder.source = dict(file="/srv/ann/secret place/x.ckpt", format="PFTSleep encoder")
    split = Split(dict(train=("night-a1", "night-a2"), test=("night-b1",)), {"night-a1": "ann", "night-a2": "ann", "night-b1": "bob"})
    stager = Stager(encoder.eval(), LinearProbe.of(encoder).eval(), recipe, dict(task="probe", store="/mnt/hospital/store", split=split.hash)).eval()
    split.save(save_stager(stager, folder / "stager") / "split.json")
    (folder / "run.json").write_text(json.dumps(dict(facts=dict(task="probe"), results=dict(loss=.5))))
    (folder / "metrics.csv").write_text("result,metric,pooled,night_median,ci_low,ci_high\nmodel,kappa,0.71,0.72,0.65,0.76\nmodel,f1_N1,,,,\n")
    (folder / "predictions.csv").write_text("id,epoch\nnight-a1,0\n")
    return stager


def test_a_stager_goes_up_and_comes_back(hub, tmp_path):
    stager = a_run(tmp_path / "run")
    address = push_to_hub(tmp_path / "run", "ann/sleep", data="Made up.", licence="apache-2.0")
    assert address.startswith("http://127.0.0.1") and hub.private is True
    assert set(hub.files) == {"README.md", "stager.json", "encoder/config.json", "encoder/model.safetensors", "head/config.json", "head/model.safetensors"}
    x = torch.randn(2, 1, 900)
    with torch.inference_mode(): assert torch.equal(from_hub("ann/sleep")(x), stager(x))
    assert {a for _, path, a in hub.asked if "/commit/" in path or "/resolve/" in path} == {f"Bearer {TOKEN}"} # the client has sent it as a header ...


def test_nothing_of_the_machine_or_the_people_is_sent(hub, tmp_path):
    a_run(tmp_path / "run")
    push_to_hub(str(tmp_path / "run"), "ann/sleep")
    sent = b"\n".join([*hub.bodies, *hub.files.values()])
    for word in (TOKEN, "night-a1", "bob", "/srv/ann", "secret place", "/mnt/hospital", str(tmp_path)): assert word.encode() not in sent, word # ... and nowhere else
    assert b'"file": "x.ckpt"' in hub.files["encoder/config.json"]


def test_a_model_in_memory_and_a_second_version(hub):
    first, second = (PatchTransformer(PatchConfig.tiny(d_model=8, d_ff=16, n_layers=n)).eval() for n in (1, 2))
    push_to_hub(first, "ann/sleep", private=False)
    before = from_hub("ann/sleep").config
    push_to_hub(second, "ann/sleep")
    assert (before.n_layers, from_hub("ann/sleep").config.n_layers, hub.private) == (1, 2, True)


def test_what_the_hub_refuses_is_explained(hub, tmp_path):
    hub.refuse = True
    tiny = PatchTransformer(PatchConfig.tiny(d_model=8, d_ff=16, n_layers=1))
    with pytest.raises(DownloadError, match="token|access"): push_to_hub(tiny, "ann/sleep")
    with pytest.raises(DownloadError): from_hub("ann/sleep", cache=tmp_path / "other")
    hub.refuse = False
    with pytest.raises(DownloadError, match="no ann/nothing|not for this token"): from_hub("ann/nothing", cache=tmp_path / "other")


def test_a_damaged_upload_is_not_loaded(hub, tmp_path):
    push_to_hub(PatchTransformer(PatchConfig.tiny(d_model=8, d_ff=16, n_layers=1)), "ann/sleep")
    hub.files["model.safetensors"] = hub.files["model.safetensors"][:-1] + b"\x01"
    with pytest.raises(ModelError, match="not those that were saved"): from_hub("ann/sleep", cache=tmp_path / "c")
    hub.files = {"README.md": b"nothing"}
    with pytest.raises(ModelError, match="no model here"): from_hub("ann/sleep", cache=tmp_path / "d")


def test_a_fine_tuned_model_keeps_its_hash(hub, tmp_path):
    pytest.importorskip("lightning", reason="the extra `train` is not installed")
    from pftsleep.training.finetune import TaskHead, TaskHeadConfig, TaskModel, load_task, save_task
    week = PatchTransformer(PatchConfig(("Activity",), 1 / 60, 60, d_model=8, d_ff=16, n_layers=1, n_heads=2, embedding="shared", instance_norm=False))
    save_task(TaskModel(week, TaskHead(TaskHeadConfig(8)), ("no", "yes"), dict(kind="standardiser", mean="/a/b/c/d=="), dict(cohort="NHANES", split="abc")), tmp_path / "model")
    push_to_hub(tmp_path, "ann/sleep")
    with pytest.raises(ConfigError, match="load_task"): from_hub("ann/sleep")
    assert from_hub("ann/sleep", load_task).classes == ("no", "yes")
    assert "NHANES" in hub.files["README.md"].decode()


def test_a_card_tells_numbers_and_no_names(tmp_path):
    a_run(tmp_path / "run")
    card = model_card(tmp_path / "run", licence="apache-2.0", repo="ann/sleep")
    assert card.startswith("---\nlicense: apache-2.0\n") and "| train | 2 | 1 |" in card and "| model | kappa | 0.710 | 0.650 | 0.760 |" in card
    for title in ("Data", "Input", "Training", "Results", "Limits", "Intended use", "Licence", "Identity", "How to load it"): assert f"\n## {title}\n" in card
    assert "no medical device" in card and "from_hub(\"ann/sleep\")" in card and "Apache 2.0; the authors" in card
    assert "bob" not in card and "/mnt" not in card and "/srv" not in card
    bare = model_card(PatchTransformer(PatchConfig.tiny(d_model=8, d_ff=16)).save_pretrained(tmp_path / "bare"))
    assert "nothing is known of how good it is" in bare and "nobody has said" in bare and "No recipe" in bare


def test_cards_of_the_other_tables(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(dict(task="depression", test=dict(n=90, auc=.6, low=.5, high=.7))))
    assert result_rows(tmp_path / "a.json") == [("depression, 90 examples", "auc", .6, .5, .7)]
    (tmp_path / "b.json").write_text(json.dumps(dict(results={"probe": {"kappa": dict(pooled=.5, night_median=.5, ci_low=.4, ci_high=None)}})))
    assert result_rows(tmp_path / "b.json")[0][:4] == ("probe", "kappa", .5, .4)
    for bad in ("", "[]", "{}", '{"results": 3}'):
        (tmp_path / "c.json").write_text(bad)
        with pytest.raises(ModelError): result_rows(tmp_path / "c.json")


def test_places_and_secrets():
    assert without_places("see /srv/ann/a b/c.txt") != "see /srv/ann/a b/c.txt" and "/srv" not in str(without_places("see /srv/ann/a b/c.txt"))
    for kept in ("and/or", "counts/min", "1/60", "SHHS/MESA", "gru"): assert without_places(kept) == kept
    assert "hunter2" not in without_places("postgresql://ann:hunter2@db/x") and TOKEN not in without_places(f"x {TOKEN}")


def test_a_secret_stops_the_upload(tmp_path):
    tiny = PatchTransformer(PatchConfig.tiny(d_model=8, d_ff=16))
    tiny.source = dict(note=TOKEN)
    with pytest.raises(ConfigError, match="secret"): publishable(tiny.save_pretrained(tmp_path / "a"), tmp_path / "b")


def test_loading_by_class_name_knows_only_ours(tmp_path):
    tiny = PatchTransformer(PatchConfig.tiny(d_model=8, d_ff=16))
    assert load_model(tiny.save_pretrained(tmp_path)).config == tiny.config
    for bad in ('{"class": "os.system"}', "[]", "", '{"class": 3}'):
        (tmp_path / "config.json").write_text(bad)
        with pytest.raises(ModelError): load_model(tmp_path)
