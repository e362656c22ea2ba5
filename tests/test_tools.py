"""The scripts around the package: what they convert, count and compare."""
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
for folder in ("tools", "docs"): sys.path.insert(0, str(ROOT / folder))

import build
import check
import processed
import sync


# --- docs/build.py

@pytest.mark.parametrize("quarto, myst", [
    ("::: {.callout-note}\nMind the gap.\n:::", ":::{note}\nMind the gap.\n:::"),
    ('::: {.callout-warning title="Units"}\nx\n:::', ":::{admonition} Units\n:class: warning\nx\n:::"),
    ("::: {.column-page .wide}\nx\n:::", ":::{div} column-page wide\nx\n:::"),
    ("::::{grid} 2\n::::", "::::{grid} 2\n::::"),
])
def test_callouts(quarto, myst): assert build.callouts(quarto).replace("::: {", ":::{") == myst


def test_heading_ids():
    assert build.heading_ids("## The clock {#sec-clock .unnumbered}\ntext") == "(sec-clock)=\n## The clock\ntext"
    assert build.heading_ids("## The set {a, b}") == "## The set {a, b}"


def test_links_between_notebooks_become_links_between_pages():
    chapter = processed.Chapter(Path("data/02_edf.ipynb"), "EDF", "", {})
    pages = {"data/01_recording.ipynb": "data/recording", "apps/00_staging.ipynb": "apps/staging"}
    assert build.relative_links("[a](01_recording.ipynb#stages)", chapter, pages) == "[a](recording.ipynb#stages)"
    assert build.relative_links("[a](../apps/00_staging.ipynb)", chapter, pages) == "[a](../apps/staging.ipynb)"
    assert build.relative_links("[a](https://x.org/y.ipynb)", chapter, pages) == "[a](https://x.org/y.ipynb)"
    with pytest.raises(SystemExit, match=r"links to 09_gone\.ipynb"): build.relative_links("[a](09_gone.ipynb)", chapter, pages)


def test_code_blocks_are_left_alone():
    text = "`x`\n```python\n`x`\n```\n`x`\n"
    assert build.outside_code(text, lambda t: t.replace("x", "y")) == "`y`\n```python\n`x`\n```\n`y`\n"


def test_directives():
    assert processed.split_directives("#| echo: false\n#|code-fold: true\n\nx = 1 #| not one\n") == ({"echo": "false", "code-fold": "true"}, "x = 1 #| not one")
    assert processed.split_directives("x = 1") == ({}, "x = 1")


def test_private_helpers_are_shown_folded(tmp_path):
    cells = ["#| exporti\ndef _helper(): pass", "#| export\ndef public(): pass", "#| export\nimport os", "#| export\nLIMIT = 3", "x = 1"]
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps(dict(cells=[dict(cell_type="code", source=c) for c in cells])))
    processed.show_helpers(path)
    after = [c["source"] for c in json.loads(path.read_text())["cells"]]
    assert after == ["#| code-fold: true\ndef _helper(): pass", cells[1], cells[2], "#| code-fold: true\nLIMIT = 3", cells[4]]


# --- tools/sync.py

def test_compare_names_what_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(sync, "ROOT", tmp_path)
    (tmp_path / "same").write_text("a")
    (tmp_path / "changed").write_text("old\n")
    (tmp_path / "stale").write_text("x")
    wanted = {Path("same"): b"a", Path("changed"): b"new\n", Path("missing"): b"m", Path("stale"): None}
    problems = "\n".join(sync.compare(wanted))
    assert "same" not in problems and "-old" in problems and "+new" in problems
    assert "missing is missing" in problems and "stale is made by no notebook" in problems
    sync.write(wanted)
    assert sync.compare(wanted) == [] and not (tmp_path / "stale").exists()


def test_a_changed_module_is_noticed(monkeypatch):
    "Not only by comparing files with themselves."
    wanted = sync.export()
    assert len(wanted) > 5 and Path("pftsleep/_modidx.py") in wanted
    changed = {path: content + b"# edited by hand\n" for path, content in wanted.items() if content is not None}
    assert len(sync.compare(changed)) == len(changed)


# --- tools/check.py

def judged(code: int, junit: Path | None = None) -> check.Job:
    job = check.Job("a job", [], junit=junit)
    check.judge(job, code)
    return job


def test_a_check_passes_or_fails():
    assert (judged(0).passed, judged(0).failed) == (1, 0)
    assert (judged(1).passed, judged(1).failed) == (0, 1)


def test_pytest_is_counted(tmp_path):
    junit = tmp_path / "junit.xml"
    junit.write_text('<testsuites><testsuite><testcase name="a"/><testcase name="b" classname="t"><failure>line 1&#10;E  wrong</failure></testcase><testcase name="c"><error/></testcase>'
        '<testcase name="d"><skipped message="no data"/></testcase></testsuite></testsuites>')
    job = judged(1, junit)
    assert (job.passed, job.failed, job.skipped, job.note) == (1, 2, 1, "1 skipped")
    assert check.skipped_tests([job]) == ["   1 skipped: no data"]
    assert check.failures(job) == ["FAILED t::b", "line 1", "E  wrong", "FAILED None::c"]


def test_every_file_of_tests_is_in_one_half_and_the_site_s_in_the_second():
    first, second = check.halves()
    assert sorted([*first, *second]) == sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").glob("test_*.py")) and "tests/test_docs_site.py" in second


def test_ending_badly_is_a_failure_even_without_a_failed_test(tmp_path):
    junit = tmp_path / "junit.xml"
    junit.write_text('<testsuites><testsuite><testcase name="a"/></testsuite></testsuites>')
    assert judged(3, junit).failed == 1
    assert judged(-11, tmp_path / "never written").failed == 1
    assert judged(5, tmp_path / "nothing selected").failed == 0


def test_a_job_that_hangs_is_stopped_with_its_children(tmp_path):
    job = check.Job("hang", [sys.executable, "-c", "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"], timeout=1)
    check.run(job, {}, tmp_path)
    assert job.failed == 1 and "stopped after 1 s" in job.note and job.seconds < 20


def test_a_failing_notebook_fails(tmp_path):
    path = tmp_path / "x.ipynb"
    cell = lambda source: dict(cell_type="code", source=source, metadata={}, outputs=[], execution_count=None, id="a")
    def status(*sources, skip="", force="") -> int:
        path.write_text(json.dumps(dict(cells=[cell(s) for s in sources], metadata={"kernelspec": {"name": "python3", "language": "python"}}, nbformat=4, nbformat_minor=5)))
        job = check.Job("a notebook", [], dict(path=str(path), skip=skip, force=force))
        return check.run_notebook(job, tmp_path / "log")
    assert status("assert 1 == 1") == 0
    assert status("x = 1", "assert x == 2") == 1
    assert status("#| slow\nassert False", skip="gpu slow") == 0
    assert status("#| slow\nassert False", skip="gpu slow", force="slow") == 1
    assert status("#| gpu\nassert False", skip="gpu slow", force="slow") == 0
    assert status("import os; os._exit(7)") == 7 and status("kept = 1") == 0 and status("kept") == 1, "each in a process of its own"
    path.write_text(path.read_text().replace('"kept"', '"import time; time.sleep(60)"'))
    job = check.Job("hang", [], dict(path=str(path), skip="", force=""), timeout=1)
    assert check.run_notebook(job, tmp_path / "log") == -1 and "stopped after 1 s" in job.note and status("x = 1") == 0
