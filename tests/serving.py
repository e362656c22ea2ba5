"A registry with small models, questions to ask, and a real `pftsleep serve` in a process of its own; used by the tests of the service."
import atexit
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import datetime
from functools import cache
from pathlib import Path

import httpx
import numpy as np
import torch

from pftsleep.apps.accounts import KeyStore
from pftsleep.apps.registry import publish_model
from pftsleep.data.edf import write_edf
from pftsleep.data.recording import Recording, array_channel, named_channels
from pftsleep.data.signals import Recipe
from pftsleep.data.standardise import Standardiser, save_standardiser
from pftsleep.models.heads import LinearProbe
from pftsleep.models.pat import PAT
from pftsleep.models.stager import Stager, save_stager, weights_hash
from pftsleep.models.transformer import PatchConfig, PatchTransformer

START = "import sys; from pftsleep.apps.cli import main; sys.exit(main())"
CHANNELS = ("C4-M1", "E1-M2")


def encoder_folder(folder: Path, seed: int = 0) -> Path:
    "An untrained PAT-S; another seed is another model."
    torch.manual_seed(seed)
    PatchTransformer(PAT.S).eval().save_pretrained(folder)
    return folder


def stager_folder(folder: Path, seed: int = 0) -> Path:
    "A stager that is small, quick and wrong."
    torch.manual_seed(seed)
    encoder = PatchTransformer(PatchConfig.tiny(CHANNELS, 100., d_model=32, n_layers=1))
    stager = Stager(encoder, LinearProbe.of(encoder), Recipe.default(CHANNELS), dict(task="test")).eval()
    stager.provenance["weights"] = weights_hash(stager) # what `pftsleep probe` writes
    save_stager(stager, folder)
    return folder


def add_encoder(models: Path, version: str, seed: int = 0, name: str = "pat") -> Path:
    "Publish one more version of the encoder of weeks."
    with tempfile.TemporaryDirectory() as private:
        save_standardiser(Standardiser("global", np.array([250.]), np.array([400.]), "counts", "example", 9, "", "", True, frozenset()), Path(private) / "scale.npz")
        return publish_model(encoder_folder(Path(private) / "encoder", seed), models, name, version, scaler=Path(private) / "scale.npz")


@cache
def _published(stager: bool) -> Path:
    folder = tempfile.mkdtemp(prefix="pftsleep-models-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    models = Path(folder) / "models"
    add_encoder(models, "1.0")
    with tempfile.TemporaryDirectory() as private:
        if stager: publish_model(stager_folder(Path(private) / "stager"), models, "stages", "1.0")
    return models


def registry_with(tmp: Path, stager: bool = True) -> Path:
    "A registry of the test's own, with 'pat' 1.0 (PAT-S, counts) and 'stages' 1.0 (C4-M1 and E1-M2 at 100 Hz). They are made once per session."
    return Path(shutil.copytree(_published(stager), Path(tmp) / "models"))


def week_values(seed: int = 0) -> list[float]:
    "Seven days of counts, each seed another person."
    rng = np.random.default_rng(seed)
    return np.where(np.arange(10_080) % 1440 < 420, 3., rng.gamma(2, 150, 10_080)).round(1).tolist()


def week_body(seed: int = 0, **changes) -> bytes:
    "The body of a request about a week."
    return json.dumps(dict(start="2026-03-02T00:00:00", epoch_seconds=60, unit="counts", values=week_values(seed)) | changes, separators=(",", ":")).encode()


@cache
def night_edf(seconds: float = 300., seed: int = 0) -> bytes:
    "An EDF file of noise in both channels of 'stages'."
    rng = np.random.default_rng(seed)
    channels = named_channels([array_channel(c, 20 * rng.standard_normal(round(seconds * 100)), 100., "uV") for c in CHANNELS])
    with tempfile.TemporaryDirectory() as private:
        write_edf(Recording("night", channels, start=datetime(2024, 3, 1, 22, 30, 5)), Path(private) / "night.edf")
        return (Path(private) / "night.edf").read_bytes()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Running:
    """`pftsleep serve` as a context manager. `with Running(models, data, "--workers", "0") as server: server.client("clinician").get("/v1/me")`.

    `data` may have been used by an earlier one. `server.first` is the key that was printed, None where there were keys already. `wait` is s until it must be ready."""
    def __init__(self, models: Path, data: Path, *args: str, wait: float = 120., before=None, env=None):
        self.models, self.data, self.args, self.wait, self.before, self.env = Path(models), Path(data), args, wait, before, {**os.environ, **(env or {})}
        self.url, self.first, self.process, self._keys = "", None, None, {}
        self._log = self.data.parent / f"{self.data.name}-{time.time_ns()}.log"

    def __enter__(self) -> "Running":
        with self._log.open("wb") as log:
            self.process = subprocess.Popen([sys.executable, "-c", START, "serve", str(self.models), "--data", str(self.data), "--port", "0", *self.args], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, env=self.env, preexec_fn=self.before)
        try: self.until_ready()
        except BaseException: self.kill(); raise
        if found := re.search(r"^\s+(pfts_\S+)$", self.log(), re.M): self.first = found[1]
        return self

    @property
    def port(self) -> int: return int(self.url.rsplit(":", 1)[1])

    def until_ready(self, path: str = "/readyz") -> None:
        end = time.monotonic() + self.wait
        while time.monotonic() < end:
            if not self.url and (found := re.search(r"^listening at (\S+)$", self.log(), re.M)): self.url = found[1]
            if self.process.poll() is not None: raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log()[-3000:]}")
            with suppress(httpx.HTTPError):
                if self.url and httpx.get(self.url + path, timeout=5).status_code == 200: return
            time.sleep(.1)
        raise RuntimeError(f"the server isn't ready after {self.wait} s:\n{self.log()[-3000:]}")

    def __exit__(self, *_) -> None: self.stop()

    @property
    def pid(self) -> int: return self.process.pid

    def key(self, role: str, tenant: str = "main") -> str:
        "An API key; the same one each time. Several roles with '+' between."
        if (role, tenant) not in self._keys: self._keys[role, tenant] = KeyStore(self.data / "keys.json").create(tenant, role.split("+"), f"{role} of {tenant}"[:80])[1]
        return self._keys[role, tenant]

    def client(self, role: str | None = None, tenant: str = "main", **more) -> httpx.Client:
        "Somebody who asks; nobody in particular without a role."
        headers = {"Authorization": f"Bearer {self.key(role, tenant)}"} if role else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=more.pop("timeout", 60.), **more)

    def log(self) -> str: return self._log.read_text(errors="replace") if self._log.exists() else ""

    def stop(self, how: int = signal.SIGTERM, seconds: float = 60.) -> int | None:
        "Ask it to end; its exit status. One that doesn't is killed, which fails the test."
        if self.process is None: return None
        if self.process.poll() is None:
            self.process.send_signal(how)
            try: self.process.wait(seconds)
            except subprocess.TimeoutExpired: self.kill(); raise RuntimeError(f"the server didn't stop in {seconds} s:\n{self.log()[-3000:]}") from None
        return self.process.returncode

    def kill(self) -> None:
        "As a machine does that loses its power."
        if self.process is not None and self.process.poll() is None: self.process.kill()
        if self.process is not None: self.process.wait()


def finished(client: httpx.Client, job: str, seconds: float = 120.) -> dict:
    "A job once it has ended."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        reply = client.get(f"/v1/jobs/{job}")
        if reply.status_code == 200 and reply.json()["state"] in ("done", "failed", "cancelled"): return reply.json()
        time.sleep(.1)
    raise AssertionError(f"job {job} hasn't ended after {seconds} s: {reply.text}")
