"""Executes notebooks, each in a process of its own that is forked from one in which everything is imported already.

Imports are most of a notebook's time. A line of JSON on standard input, `{"path", "skip", "force", "log"}`, starts one; the answers are two lines: its
process number, and then its exit status. `tools/check.py` talks to it; by hand:

    python tools/notebooks.py nbs/data/02_edf.ipynb ...
"""
import importlib
import json
import os
import pkgutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from processed import ROOT

SETS_UP = ("torch", "pandas", "sklearn.linear_model", "matplotlib.pyplot", "nbdev.test", "nbdev.showdoc", "fastcore.test", "IPython.display", "lightning") # imported in most notebooks


def prepare() -> None:
    "Import what notebooks import. What can't be imported is left for the notebook to complain about."
    import pftsleep
    for name in (*SETS_UP, *(m.name for m in pkgutil.walk_packages(pftsleep.__path__, "pftsleep."))):
        try: importlib.import_module(name)
        except Exception as e: print(f"{name} can't be imported: {e}", file=sys.stderr)


def status(path: str, skip: str, force: str) -> int:
    "0 when every cell ran."
    from nbdev.test import test_nb
    return int(not test_nb(Path(path).resolve(), skip_flags=skip.split(), force_flags=force.split(), basepath=".")[0])


def run(path: str, skip: str, force: str, log: str) -> None:
    "In the child: its own session, so that it can be stopped with all that it has started."
    os.setsid()
    os.chdir(ROOT)
    out, nothing = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), os.open(os.devnull, os.O_RDONLY)
    for fd, to in ((nothing, 0), (out, 1), (out, 2)): os.dup2(fd, to)
    code = 1
    try: code = status(path, skip, force)
    except BaseException as e: print(f"{type(e).__name__}: {e}", file=sys.stderr)
    finally:
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    "One notebook after the other, until standard input ends."
    prepare()
    for line in sys.stdin:
        if not (pid := os.fork()): run(**json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    if sys.argv[1:]: sys.exit(max(status(path, "gpu slow", "") for path in sys.argv[1:]))
    serve()
