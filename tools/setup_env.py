"""Makes the virtual environment that every other command runs in, or leaves it alone when it is up to date.

Runs before anything is installed, so it uses the standard library only. `make demo` and `make test` may both be started on a
fresh machine at once: one of them installs, the other waits for the lock.
"""
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = Path(os.environ.get("VENV", ROOT / ".venv")).resolve()
BIN = VENV / "bin"
REQUIREMENTS = ["settings.ini", "constraints.txt", "setup.py", "pyproject.toml"] # what decides which packages there are
EXTRAS = "train,psg,wear,survival,scale,track,serve,export,yasa,hub,docs,dev"


def fingerprint() -> str:
    "Changes when something else would be installed, or somewhere else."
    digest = hashlib.sha256(f"{sys.version_info[:2]} {VENV} {EXTRAS}".encode())
    for name in REQUIREMENTS: digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def create() -> None:
    "An environment with pip in it, also where the system's Python comes without `ensurepip` (Debian's does)."
    if subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True).returncode == 0: return
    shutil.rmtree(VENV, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(VENV)], check=True)
    subprocess.run([sys.executable, "-m", "pip", "--python", str(BIN / "python"), "install", "-qq", "pip"], check=True)


def install() -> None:
    "The project in editable form with everything that tests and documentation need."
    command = [str(BIN / "python"), "-m", "pip", "install", "--disable-pip-version-check", "-c", "constraints.txt", "-e", f".[{EXTRAS}]"]
    quiet = subprocess.run([*command, "-qq"], cwd=ROOT) # twice quiet: warnings about local package folders are noise
    if quiet.returncode: sys.exit(f"the installation failed (see above); try it by hand: {' '.join(command)}")


def main() -> None:
    if sys.version_info < (3, 11): sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: call make with PYTHON=/path/to/python3.11") # noqa: UP036 (this is what says so)
    VENV.parent.mkdir(parents=True, exist_ok=True)
    stamp, wanted = VENV / ".stamp", fingerprint()
    current = lambda: (BIN / "python").exists() and stamp.exists() and stamp.read_text() == wanted
    if current(): return
    with VENV.with_name(VENV.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if current(): return # somebody else made it while we waited
        print(f"installing into {VENV} (minutes, the first time) ...", flush=True)
        if not (BIN / "python").exists(): create()
        stamp.unlink(missing_ok=True)
        install()
        stamp.write_text(wanted)


if __name__ == "__main__": main()
