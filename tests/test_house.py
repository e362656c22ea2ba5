"""The rules of the house (CONTRIBUTING.md), read off the notebooks and the package."""
import ast
import configparser
import dataclasses
import enum
import hashlib
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import get_args

import pytest
from fastcore.docments import docments

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
WINGS = ["data", "models", "evaluation", "training", "apps"] # each may use itself and what stands before it
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(ROOT).parts))
MODULES = sorted(p for p in (ROOT / "pftsleep").rglob("*.py") if p.name[0] != "_")
NBDEV = {"default_exp", "export", "exporti", "exports", "hide", "hide_line", "hide_input", "exec_doc", "filter_stream", "echo", "output", "include", "label", "code-fold",
    "code-summary", "fig-cap", "fig-alt", "warning"} # directives that decide about export and display, not about execution
EXPORTS = {"export", "exporti", "exports"}


@dataclasses.dataclass
class Cell:
    kind: str
    directives: dict[str, str]
    source: str # without directives
    outputs: list

    @property
    def exported(self) -> bool: return bool(EXPORTS & set(self.directives))
    @property
    def lines(self) -> int: return sum(bool(line.strip()) for line in self.source.splitlines())
    @property
    def tree(self) -> ast.Module: return ast.parse(re.sub(r"^\s*[%!].*$", "pass", self.source, flags=re.M))
    @property
    def only_imports(self) -> bool:
        try: return all(isinstance(node, ast.Import | ast.ImportFrom) for node in self.tree.body)
        except SyntaxError: return False # executing it will say so


def cells(path: Path) -> list[Cell]:
    out = []
    for c in json.loads(path.read_text())["cells"]:
        lines = "".join(c["source"]).splitlines()
        marks = [re.sub(r"^#\s*\|\s*", "", line).strip() for line in lines if re.match(r"#\s*\|", line)] if c["cell_type"] == "code" else []
        directives = {re.split(r"[\s:]", mark, maxsplit=1)[0]: re.sub(r"^[\w-]+[\s:]*", "", mark) for mark in marks}
        code = "\n".join(line for line in lines if not (marks and re.match(r"#\s*\|", line)))
        out.append(Cell(c["cell_type"], directives, code, c.get("outputs", [])))
    return out


def name(path: Path) -> str: return path.relative_to(ROOT).as_posix()
def wing(path: Path) -> str: return path.relative_to(ROOT).parts[1] if len(path.relative_to(ROOT).parts) > 2 else ""
def code(path: Path) -> list[Cell]: return [c for c in cells(path) if c.kind == "code" and c.source.strip()]
def exported(path: Path) -> list[Cell]: return [c for c in code(path) if c.exported and not c.only_imports]
EXPORTING = [nb for nb in NOTEBOOKS if exported(nb)]


def asserts(path: Path) -> int:
    "Executed checks: assert statements and calls of test_* or assert_*."
    def checks(node) -> bool:
        called = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
        return isinstance(node, ast.Assert) or called.startswith(("test_", "assert_"))
    return sum(checks(node) for c in code(path) if not c.exported for node in ast.walk(c.tree))


def test_the_checker_reads_notebooks():
    "So that no rule below passes because nothing was read."
    assert len(NOTEBOOKS) >= 5 and len(EXPORTING) >= 4
    assert sum(len(exported(nb)) for nb in EXPORTING) >= 30
    assert sum(asserts(nb) for nb in EXPORTING) >= 30


# --- how a notebook is written

def test_exported_cells_are_small():
    sizes = defaultdict(list)
    for nb in EXPORTING: sizes[wing(nb)] += [c.lines for c in exported(nb)]
    long = [f"{name(nb)}: {c.lines} lines from: {c.source.splitlines()[0]}" for nb in EXPORTING for c in exported(nb) if c.lines > 60]
    assert not long, "\n".join(long)
    assert (m := median(n for s in sizes.values() for n in s)) <= 15, f"exported cells have a median of {m} lines"
    assert not (big := {w: median(s) for w, s in sizes.items() if median(s) > 20}), f"median lines of exported cells: {big}"


def test_about_one_assert_for_each_exported_cell():
    have, want = defaultdict(int), defaultdict(int)
    for nb in EXPORTING:
        have[wing(nb)] += asserts(nb)
        want[wing(nb)] += len(exported(nb))
    assert sum(have.values()) >= sum(want.values()), f"{sum(have.values())} asserts for {sum(want.values())} exported cells"
    low = {w: f"{have[w]} asserts for {want[w]} exported cells" for w in want if have[w] < .7 * want[w]}
    assert not low, low


@pytest.mark.parametrize("nb", EXPORTING, ids=name)
def test_an_exporting_notebook_tells_something(nb):
    prose = " ".join(c.source for c in cells(nb) if c.kind == "markdown")
    words = re.findall(r"[A-Za-z][\w'-]*", re.sub(r"```.*?```", " ", prose, flags=re.S))
    assert len(words) >= 150, f"{len(words)} words of prose"


@pytest.mark.parametrize("nb", NOTEBOOKS, ids=name)
def test_the_cell_of_the_title_holds_nothing_else(nb):
    "nbdev makes the head of the page from it and drops the rest."
    first = cells(nb)[0]
    assert first.kind == "markdown" and first.source.startswith("# "), "the first cell is not the title"
    lines = [line for line in first.source.splitlines() if line.strip()]
    assert [line[:2] for line in lines] == ["# ", "> "], f"the first cell should be '# Title' and one line '> description', it is {lines}"


@pytest.mark.parametrize("nb", NOTEBOOKS, ids=name)
def test_a_notebook_says_its_language(nb):
    "Or else the site shows its code without colours, and warns."
    assert json.loads(nb.read_text())["metadata"] == {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}


@pytest.mark.parametrize("nb", NOTEBOOKS, ids=name)
def test_module_and_notebook_have_the_same_name(nb):
    module = next((c.directives["default_exp"] for c in cells(nb) if "default_exp" in c.directives), None)
    if module: assert module.replace(".", "/") == nb.relative_to(ROOT / "nbs").with_name(re.sub(r"^\d+_", "", nb.stem)).as_posix()


@pytest.mark.parametrize("nb", NOTEBOOKS, ids=name)
def test_imports_stand_in_cells_of_their_own(nb):
    mixed = [c.source.splitlines()[0] for c in code(nb) if not c.only_imports and "hide" not in c.directives
        and any(isinstance(node, ast.Import | ast.ImportFrom) for node in c.tree.body)]
    assert not mixed, f"cells that mix imports and code: {mixed}"


@pytest.mark.parametrize("nb", NOTEBOOKS, ids=name)
def test_no_cell_is_switched_off_and_every_flag_is_run_somewhere(nb):
    flags = _settings()["tst_flags"].split()
    workflows = "\n".join(p.read_text() for p in [*(ROOT / ".github/workflows").glob("*.yml"), ROOT / ".ci/run", ROOT / "Makefile"])
    for cell in code(nb):
        assert "notest" not in cell.directives and not cell.directives.get("eval", "").startswith("false"), f"switched off: {cell.source[:80]}"
        for flag in set(cell.directives) - NBDEV - {"eval"}:
            assert flag in flags, f"'#| {flag}' is neither a directive of nbdev nor one of the flags {flags}"
            assert f"make test-{flag}" in workflows, f"no workflow runs cells with the flag {flag}"


@pytest.mark.parametrize("nb", NOTEBOOKS, ids=name)
def test_outputs_are_stored_small_and_without_errors(nb):
    assert nb.stat().st_size < 200_000, f"{nb.stat().st_size / 1000:.0f} kB"
    outputs = [(c, o) for c in code(nb) for o in c.outputs]
    failed = [c.source[:80] for c, o in outputs if o["output_type"] == "error"]
    noisy = [f"{c.source[:60]} ... {''.join(o['text'])[:200]}" for c, o in outputs if o.get("name") == "stderr"]
    assert not failed, f"an error is stored: {failed}"
    assert not noisy, f"warnings or progress bars are stored: {noisy}"
    printing = [c for c in code(nb) if re.match(r"print\(", c.source)]
    assert outputs or not printing, "executed without its outputs being stored"


# --- public names

def _public() -> list[tuple[str, str, object]]: # module, name, object
    out = []
    for path in MODULES:
        module = name(path).removesuffix(".py").replace("/", ".")
        loaded = importlib.import_module(module)
        out += [(module, n, getattr(loaded, n)) for n in getattr(loaded, "__all__", []) if n[0] != "_"]
    return [o for o in out if inspect.isclass(o[2]) or inspect.isfunction(inspect.unwrap(o[2]) if callable(o[2]) else o[2])]


def _undocumented(obj) -> list[str]:
    """Parameters without a comment. A parameter whose type is a class of ours needs none, since the site then shows what that class is;
    `*args` and `**kwargs` are left out because docments takes their comments for others'."""
    bases = [base for base in reversed(getattr(obj, "__mro__", [])) if dataclasses.is_dataclass(base)] # each has the comments on its own fields
    comments = {name: text for base in (bases or [obj]) for name, text in docments(base).items() if text}
    parameters = inspect.signature(obj).parameters.values()
    ours = lambda p: any(inspect.isclass(t) and t.__module__.startswith("pftsleep.") for t in (p.annotation, *get_args(p.annotation)))
    return [p.name for p in parameters if p.name not in ("self", "cls") and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and not comments.get(p.name) and not ours(p)]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_every_public_name_is_documented(path):
    module = name(path).removesuffix(".py").replace("/", ".")
    problems = []
    for _, n, obj in (o for o in _public() if o[0] == module):
        if not (obj.__dict__.get("__doc__") if inspect.isclass(obj) else inspect.getdoc(obj)): problems.append(f"{n} has no docstring")
        describable = not inspect.isclass(obj) or (("__init__" in vars(obj)) and not issubclass(obj, enum.Enum))
        if describable and (bare := _undocumented(obj)): problems.append(f"{n}: no comment on {', '.join(bare)}")
    assert not problems, "\n".join(problems)


# --- what depends on what

def _imports(path: Path) -> set[str]:
    "Full names; nbdev writes imports from our own package as relative ones."
    found, package = set(), path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*(package[:-node.level] if node.level else ()), *filter(None, [node.module])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_wings_depend_to_the_left(path):
    imports, own = _imports(path), wing(path)
    allowed = WINGS[:WINGS.index(own) + 1] if own in WINGS else []
    wrong = sorted(i for i in imports if i.startswith("pftsleep.") and i.split(".")[1] in WINGS and i.split(".")[1] not in allowed)
    assert not wrong, f"{own or 'the root'} may import {allowed}, not {wrong}"
    roots = {i.split(".")[0] for i in imports}
    if own == "data" and path.name not in ("datasets.py", "samplers.py"): assert not roots & {"torch", "lightning"}, "data does without torch"
    if own in ("", "data", "models", "evaluation"): assert not roots & {"lightning", "pytorch_lightning"}, f"{own} does without a training framework"


def test_reading_a_file_does_not_load_torch():
    if not (ROOT / "pftsleep/data/edf.py").exists(): pytest.skip("pftsleep/data/edf.py isn't written yet")
    code = "import sys, pftsleep.data.edf; print([m for m in ('torch', 'lightning', 'matplotlib.pyplot') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- what must not be in the repository

def _files() -> list[Path]:
    "What git has or would take; everything but the obvious where there is no git."
    done = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0 and done.stdout: return [p for n in done.stdout.split("\0") if n and (p := ROOT / n).is_file()]
    skip = {".git", ".venv", "_docs", "build", "demo", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "pftsleep.egg-info"}
    return [p for p in ROOT.rglob("*") if p.is_file() and not skip & set(p.relative_to(ROOT).parts)]


def _settings():
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf8")
    return config["DEFAULT"]


def test_no_path_of_somebodys_machine():
    folders = re.compile(r"(?<![\w./-])/(?:" + "|".join(["root", "work", r"home/\w+", r"Users/\w+", r"tmp/(?:tmp|pytest)\w+"]) + r")(?=/)")
    found = []
    for path in _files():
        try: text = path.read_text(encoding="utf8")
        except UnicodeDecodeError: continue
        found += [f"{name(path)}: {m[0]}{text[m.end():m.end() + 30].splitlines()[0]}" for m in folders.finditer(text)]
    assert not found, "\n".join(found)


def test_no_secret():
    marks = [r"AKIA[0-9A-Z]{16}", r"gh[pousr]_[A-Za-z0-9]{36}", r"github_pat_\w{40,}", r"hf_[A-Za-z0-9]{30,}", r"sk-[A-Za-z0-9_-]{32,}", r"xox[baprs]-[\w-]{10,}",
        "-----BEGIN [A-Z ]*PRIVATE " + "KEY-----", r"\b(?i:password|passwd|secret|api_?key|token)\s*[=:]\s*['\"][^'\"\s]{12,}['\"]"]
    found = [f"{name(p)}: {m[0][:20]}..." for p in _files() if p.suffix not in {".png", ".svg"} for m in re.finditer("|".join(marks), p.read_text(errors="ignore"))]
    assert not found, "\n".join(found)


def test_no_big_file():
    big = [f"{name(p)}: {p.stat().st_size / 1e6:.1f} MB" for p in _files() if p.stat().st_size > 2_000_000]
    assert not big, big


@pytest.mark.skipif(not SHARED.exists(), reason="../shared isn't here")
def test_nothing_is_copied_from_shared():
    digest = lambda p: hashlib.sha256(p.read_bytes()).hexdigest()
    theirs = {digest(p): p for folder, _, names in os.walk(SHARED) for n in names if (p := Path(folder) / n).stat().st_size > 0}
    copies = [f"{name(p)} is {theirs[d].relative_to(SHARED)}" for p in _files() if p.stat().st_size and (d := digest(p)) in theirs]
    assert not copies, copies
