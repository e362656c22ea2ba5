"""A week over HTTP: p95 at 1 and 20 clients, weeks a second at saturation, and the share of the time that isn't the model's. Clients and server share the machine's cores.

    python benchmarks/serve.py --seconds 10 --modes explain embed

prints one JSON line per server and mode. The server is `pftsleep serve` with an untrained PAT-S, with keys, audit log, limits and metrics, as it is run. Every request carries another week, so the cache doesn't
help; requests are made beforehand, and clients (one process, plain sockets) only patch one number in. `naive` is a FastAPI route that hands JSON to the same encoder, one forward per request, measured in the
same run, in turns; `forward` is the encoder alone, in batches of 8 on all cores: the most that any server could do. The target is 32 weeks a second, eight times the 240 a minute that the original claims, and the aim is 80.
"""
import argparse
import asyncio
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from serving import Running, free_port, registry_with, week_body

CLAIM = 240 / 60 # weeks a second, of the original's documentation
NAIVE = """
import sys, torch, uvicorn
from fastapi import FastAPI
from pftsleep.apps.registry import Registry
torch.set_num_threads(int(sys.argv[3]))
registry = Registry(sys.argv[1]); registry.refresh()
model, scaler, app = registry.get("pat").model, registry.get("pat").scaler, FastAPI()
@app.get("/readyz")
def ready(): return {}
@app.post("/v1/weeks/{mode}")
def week(mode: str, body: dict):
    x = (torch.tensor(body["values"], dtype=torch.float32) - float(scaler.mean[0])) / float(scaler.sd[0])
    with torch.inference_mode():
        tokens, attention = model(x[None], return_attention=True) if mode == "explain" else (model(x[None]), None)
    out = {"embedding": tokens.mean(1)[0].tolist()}
    if attention is not None: out["profile"] = attention[-1].mean((1, 2))[0].tolist()
    return out
uvicorn.run(app, port=int(sys.argv[2]), log_level="warning", access_log=False)
"""

def bodies(n: int = 64) -> list[tuple[bytes, bytes]]:
    "What comes before and after the first value, which makes each request another."
    out = []
    for body in (week_body(i) for i in range(n)):
        a = body.index(b"[") + 1
        out.append((body[:a], body[body.index(b",", a):]))
    return out


async def client(port: int, path: str, key: str, weeks: list, counter, end: float, times: list, failures: list) -> None:
    "Asks, waits, asks again; over one connection."
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < end:
        i = next(counter)
        before, after = weeks[i % len(weeks)]
        body = before + f"{i % 1_000_000 / 10:.1f}".encode() + after
        began = time.perf_counter()
        writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
        (times if head[9:12] == b"200" else failures).append(time.perf_counter() - began)
    writer.close()


async def ask(port: int, path: str, key: str, n: int, seconds: float, first: int) -> dict:
    "So many clients for so long."
    weeks, counter, times, failures = bodies(), itertools.count(first), [], []
    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client(port, path, key, weeks, counter, began + seconds, times, failures) for _ in range(n)))
    took = time.perf_counter() - began
    ms = np.array(times or [np.nan]) * 1e3
    return dict(clients=n, weeks_per_second=round(len(times) / took, 1), p50_ms=round(float(np.percentile(ms, 50)), 1), p95_ms=round(float(np.percentile(ms, 95)), 1), failures=len(failures), client_cpu_ms_per_week=round(1e3 * (time.process_time() - cpu) / max(1, len(times)), 2))


def asked(port: int, path: str, key: str, n: int, seconds: float, first: int) -> dict:
    "The same, from a process of its own."
    said = subprocess.run([sys.executable, __file__, "--client", json.dumps([port, path, key, n, seconds, first])], stdout=subprocess.PIPE, check=True)
    return json.loads(said.stdout)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


PHASES = {"one": 1, "twenty": 20, "saturated": 48}


def measured(port: int, pid: int, mode: str, key: str, n: int, seconds: float, first: int) -> dict:
    "One server, one mode, so many clients."
    cpu, told = cpu_seconds(pid), asked(port, f"/v1/weeks/{mode}", key, n, seconds, first)
    return told | dict(server_cpu_ms_per_week=round(1e3 * (cpu_seconds(pid) - cpu) / max(1., told["weeks_per_second"] * seconds), 1))


def in_turns(servers: dict[str, tuple[int, int]], mode: str, key: str, seconds: float, rounds: int) -> dict[str, dict]: # server -> phase -> figures
    "The faster of some rounds of each phase; the servers take turns, so that a busy machine is busy for both."
    out: dict[str, dict] = {name: {} for name in servers}
    for port, _ in servers.values(): asked(port, f"/v1/weeks/{mode}", key, 4, 2., 900_000)
    for i, ((phase, n), _) in enumerate(itertools.product(PHASES.items(), range(rounds))):
        for name, (port, pid) in servers.items():
            told = measured(port, pid, mode, key, n, seconds, 20_000 * (i + 1))
            if told["weeks_per_second"] >= out[name].get(phase, told)["weeks_per_second"]: out[name][phase] = told
    return out


def forward(models: Path, threads: int) -> dict:
    "The encoder alone."
    code = f"""
import sys, time, torch
from pftsleep.apps.registry import Registry
torch.set_num_threads({threads})
r = Registry(sys.argv[1]); r.refresh(); m = r.get("pat").model
x, n = torch.randn(8, 1, 10_080), 0
with torch.inference_mode():
    m.pool(m.encode(x)); t, c = time.perf_counter(), time.process_time()
    while time.perf_counter() < t + 4: m.pool(m.encode(x)); n += 8
print(n / (time.perf_counter() - t), 1e3 * (time.process_time() - c) / n)
"""
    rate, cpu = map(float, subprocess.run([sys.executable, "-c", code, str(models)], stdout=subprocess.PIPE, check=True).stdout.split())
    return dict(server="forward", threads=threads, weeks_per_second=round(rate, 1), cpu_ms_per_week=round(cpu, 1))


def main(modes: list[str], seconds: float, rounds: int, extra: list[str]) -> None:
    cores, say = os.cpu_count() or 1, lambda **told: print(json.dumps(about | told), flush=True)
    about = dict(machine=platform.machine(), cores=cores, torch=torch.__version__, load=round(os.getloadavg()[0], 1))
    with tempfile.TemporaryDirectory() as d:
        models = registry_with(Path(d), stager=False)
        alone, most = (forward(models, n) for n in (1, cores))
        for told in (alone, most): say(**told)
        port = free_port()
        with subprocess.Popen([sys.executable, "-c", NAIVE, str(models), str(port), str(cores)]) as naive, ended(naive), Running(models, Path(d) / "data", "--workers", "0", "--per_minute", "1000000", *extra) as ours:
            wait_for(port)
            for mode in modes:
                found = in_turns({"naive": (port, naive.pid), "pftsleep": (ours.port, ours.pid)}, mode, ours.key("researcher"), seconds, rounds)
                say(server="naive", mode=mode, **found["naive"])
                best = found["pftsleep"]["saturated"]
                say(server="pftsleep", mode=mode, **found["pftsleep"], times_the_claim=round(best["weeks_per_second"] / CLAIM, 1), times_naive=round(best["weeks_per_second"] / found["naive"]["saturated"]["weeks_per_second"], 2),
                    cpu_outside_the_forward=round(1 - alone["cpu_ms_per_week"] / best["server_cpu_ms_per_week"], 2), batches={k: v for k, v in ours.client("auditor").get("/v1/stats").json()["batches"].items() if k in ("lanes", "sizes")})


@contextmanager
def ended(process: subprocess.Popen):
    try: yield
    finally: process.terminate()


def wait_for(port: int, seconds: float = 60.) -> None:
    import socket
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try: socket.create_connection(("127.0.0.1", port), 1).close(); return
        except OSError: time.sleep(.2)
    raise RuntimeError("the naive server doesn't start")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--modes", nargs="+", default=["explain", "embed"])
    parser.add_argument("--client", help=argparse.SUPPRESS)
    args, extra = parser.parse_known_args()
    if args.client: print(json.dumps(asyncio.run(ask(*json.loads(args.client)))))
    else: main(args.modes, args.seconds, args.rounds, extra)
