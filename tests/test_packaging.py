"""What is built, what is in it, how it starts, and what it says when a part is missing."""
import configparser
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pftsleep"
TORCH_IN_DATA = {"datasets", "samplers"} # what torch's loaders are made of; everything else that reads files does without
LIGHT = sorted(f"pftsleep.data.{p.stem}" for p in (PACKAGE / "data").glob("*.py") if p.stem[0] != "_" and p.stem not in TORCH_IN_DATA)
ALSO = ["pftsleep", "pftsleep.errors", "pftsleep.files", "pftsleep.apps.cli", "pftsleep.apps.files", "pftsleep.apps.stores", "pftsleep.evaluation.metrics", "pftsleep.evaluation.plots", "pftsleep.evaluation.report",
    "pftsleep.evaluation.rhythm", "pftsleep.evaluation.sleep_stats"]


def python(code: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- starting

def test_what_needs_no_torch_does_not_load_it():
    code = "import sys, importlib\nfor m in sys.argv[1:]:\n    importlib.import_module(m)\n    bad = [x for x in ('torch', 'lightning', 'tensorboard') if x in sys.modules]\n    assert not bad, (m, bad)"
    python(code, *ALSO, *LIGHT)


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["inspect", "--help"]], ids=" ".join)
def test_asking_what_it_is_loads_no_torch(arguments):
    code = "import sys, runpy\nfrom pftsleep.apps.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit as e: assert not e.code\nassert 'torch' not in sys.modules"
    assert "pftsleep" in python(code, *arguments)


# --- missing extras

BLOCK = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def __init__(self, names): self.names = names
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in self.names: raise ModuleNotFoundError(f"No module named '{name}'", name=name)
sys.meta_path.insert(0, Missing(set(sys.argv[1].split(','))))
from pathlib import Path
from pftsleep.errors import ConfigError
def told(f):
    try: f()
    except ConfigError as e: print(e)
"""
LACKING = { # packages that aren't there: what is tried, and the extras that the messages must name, in this order
    "wfdb,rdata,distributed,sksurv": ("""
from pftsleep.data import convert, wfdb_dreem
from pftsleep.data.actigraphy import read_nhanes_r
from pftsleep.evaluation import survival
Path('x.rda').write_bytes(b'RDX3')
told(lambda: wfdb_dreem._package(Path('x.hea')))
told(lambda: read_nhanes_r('x.rda'))
told(lambda: convert.dask_workers('tcp://127.0.0.1:1').__enter__())
told(lambda: survival._sksurv('metrics'))""", ["psg", "wear", "scale", "survival"]),
    "huggingface_hub,onnx,onnxscript,onnxruntime,pywt,lightning": ("""
from pftsleep.models.hub import download_published, from_hub
from pftsleep.models.export import OnnxModel, export_onnx
from pftsleep.models.baselines import wavelet_features
from pftsleep.apps.cli import command
told(lambda: download_published('a.ckpt'))
told(lambda: from_hub('a/b'))
told(lambda: OnnxModel('x.onnx'))
told(lambda: export_onnx(None, 'x.onnx'))
told(lambda: wavelet_features([[0.] * 32]))
told(lambda: command('probe'))""", ["hub", "hub", "export", "export", "wear", "train"])}


@pytest.mark.parametrize("missing", LACKING)
def test_a_missing_extra_says_what_to_install(missing, tmp_path):
    code, extras = LACKING[missing]
    done = subprocess.run([sys.executable, "-c", BLOCK + code, missing], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(extras), done.stdout
    for line, extra in zip(lines, extras, strict=True): assert f"pip install 'pftsleep[{extra}]'" in line and f"{extra}_requirements" in _settings()


def test_every_extra_that_a_message_names_is_there():
    named = {e.split("]")[0] for p in PACKAGE.rglob("*.py") for e in p.read_text().split("pftsleep[")[1:]}
    assert named <= {k.removesuffix("_requirements") for k in _settings() if k.endswith("_requirements")} | {"{extra}"}, named


def _settings() -> configparser.SectionProxy:
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf8")
    return config["DEFAULT"]


# --- what is built

@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    "A source distribution, and the wheel that is built from it, not from the tree."
    pytest.importorskip("build", reason="the package `build` is not installed")
    pytest.importorskip("setuptools", reason="without isolation setuptools has to be there")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"): shutil.copy(ROOT / name, tree)
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("pftsleep", "tests", "jobs"): shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    (tree / "tests" / "patients.csv").write_text("name\n"); (tree / "pftsleep" / "scratch.edf").write_bytes(b"0")
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), "."], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def test_the_wheel_holds_the_package_and_its_pages(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        about = next(wheel.read(n).decode() for n in names if n.endswith("METADATA"))
        starts = next(wheel.read(n).decode() for n in names if n.endswith("entry_points.txt"))
    here = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*") if p.is_file() and (p.suffix == ".py" or p.name == "py.typed" or "web" in p.parts) and "__pycache__" not in p.parts and p.name[0] != "."}
    assert here <= names, sorted(here - names)[:10]
    assert {n.split("/")[0] for n in names} == {"pftsleep", next(n for n in names if "dist-info" in n).split("/")[0]}
    assert "pftsleep/py.typed" in names and not [n for n in names if n.endswith((".edf", ".ipynb", ".csv"))]
    assert "pftsleep = pftsleep.apps.cli:main" in starts and "Requires-Python: >=3.11" in about
    for extra in ("train", "serve", "export", "hub"): assert f"Provides-Extra: {extra}\n" in about
    assert not [line for line in about.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line and any(w in line for w in ("nbdev", "pytest", "lightning", "fastapi"))]


def test_the_source_distribution_builds_and_leaks_nothing(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as source: names = [n.partition("/")[2] for n in source.getnames()]
    assert {"settings.ini", "setup.py", "pyproject.toml", "LICENSE", "README.md", "pftsleep/py.typed"} <= set(names)
    assert not [n for n in names if n.startswith(("tests", "nbs", "jobs", "docs", "tools", "benchmarks", ".")) or n.endswith((".edf", ".csv", ".pyc"))]


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment(built, tmp_path):
    "Without the developers' tools, away from the source. Needs a package index; torch comes as constraints.txt says."
    venv.create(tmp_path / "venv", with_pip=True)
    run = lambda *a, **k: subprocess.run([str(tmp_path / "venv/bin/python"), *a], capture_output=True, text=True, cwd=tmp_path, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **k)
    done = run("-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt"), str(next(built.glob("*.whl"))))
    if done.returncode and any(w in done.stderr for w in ("ConnectionError", "No matching distribution", "Temporary failure", "Network is unreachable")): pytest.skip(f"no package index: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr[-2000:]
    have = {p["name"].lower() for p in json.loads(run("-m", "pip", "list", "--format", "json", "--disable-pip-version-check").stdout)}
    assert not have & {"nbdev", "pytest", "lightning", "fastapi", "onnx", "huggingface-hub"}
    code = "import pftsleep, pathlib, torch\nfrom pftsleep.models.transformer import *\nprint(PatchTransformer(PatchConfig.tiny()).eval().encode(torch.zeros(1, 1, 3000)).values.shape, 'site-packages' in pftsleep.__file__)"
    assert run("-c", code).stdout.strip() == "torch.Size([1, 1, 5, 64]) True"
    command = tmp_path / "venv/bin/pftsleep"
    assert subprocess.run([command, "--version"], capture_output=True, text=True, cwd=tmp_path, check=True).stdout.startswith("pftsleep ")
    missing = subprocess.run([command, "demo"], capture_output=True, text=True, cwd=tmp_path)
    assert missing.returncode == 1 and "pip install 'pftsleep[train]'" in missing.stderr
