"""Stages, sleep statistics and event indices of MESA, as tables: `python jobs/mesa/build_hypnograms.py --config jobs/mesa/hypnograms.yaml`."""
import sys

from pftsleep.apps.cli import main

if __name__ == "__main__": sys.exit(main(["hypnograms", *sys.argv[1:]]))
