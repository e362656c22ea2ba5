"""Edit notebooks as plain Python files (jupytext's percent format).

    python tools/nb.py edit nbs/data/02_edf.ipynb     # writes nbs/data/02_edf.py, a working copy that git ignores
    python tools/nb.py run  nbs/data/02_edf.py        # updates the notebook: executes it, stores the outputs, cleans it, exports its module
    python tools/nb.py done nbs/data/02_edf.py        # the same, then deletes the working copy

A new notebook is a new .py file. Any number of files may be given; the first that fails stops the rest, and its notebook is left as it was.
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}


def edit(notebook: Path) -> None:
    target = notebook.with_suffix(".py")
    if target.exists(): sys.exit(f"{target} is there already -> delete it, or go on with it")
    jupytext.write(jupytext.read(notebook), target, fmt="py:percent")
    print(f"now edit {target}")


def execute(nb, folder: Path) -> None:
    "Runs all cells but the one that exports every notebook."
    sources = [cell.source for cell in nb.cells]
    for cell in nb.cells:
        if "nbdev_export(" in cell.source: cell.source = "pass"
    client = NotebookClient(nb, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(folder)}}, extra_arguments=["--log-level=ERROR"])
    try: client.execute()
    except CellExecutionError as e: sys.exit(str(e)[-4000:])
    for cell, source in zip(nb.cells, sources, strict=True): cell.source = source


def export(notebook: Path) -> None:
    path = notebook.resolve().relative_to(ROOT).as_posix()
    subprocess.run([sys.executable, "-c", "import sys; from nbdev.export import nb_export; nb_export(sys.argv[1], 'pftsleep')", path], cwd=ROOT, check=True)


def run(working_copy: Path) -> None:
    notebook = working_copy.with_suffix(".ipynb")
    before = notebook.read_bytes() if notebook.exists() else None
    nb = jupytext.read(working_copy, fmt="py:percent")
    if before is not None: nb = combine_inputs_with_outputs(nb, jupytext.read(notebook), fmt="py:percent") # cells keep their ids, differences stay small
    nb.metadata = nbformat.from_dict({"kernelspec": KERNEL}) # without it the site doesn't know the language
    try:
        nbformat.write(nb, notebook)
        export(notebook) # before executing, since worker processes import the module
        execute(nb, working_copy.parent)
    except BaseException:
        if before is None: notebook.unlink()
        else:
            notebook.write_bytes(before)
            export(notebook)
        raise
    nbformat.write(nb, notebook)
    code = "import sys; from nbdev.clean import nbdev_clean; nbdev_clean.__wrapped__(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(notebook.resolve())], cwd=ROOT, check=True)
    print(f"{notebook} is executed, clean and exported")


def done(working_copy: Path) -> None:
    run(working_copy)
    working_copy.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["edit", "run", "done"])
    parser.add_argument("files", nargs="+", type=Path)
    args = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found" # of kernels: tqdm misses a package for buttons, which the site can't show anyway
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    suffix = ".ipynb" if args.what == "edit" else ".py"
    for file in args.files:
        if file.suffix != suffix or not file.exists(): sys.exit(f"{file}: `{args.what}` takes an existing {suffix} file")
        {"edit": edit, "run": run, "done": done}[args.what](file)


if __name__ == "__main__": main()
