"""Stages, sleep statistics and event indices of MrOS, both visits, as tables: `python jobs/mros/build_hypnograms.py --config jobs/mros/hypnograms.yaml`."""
import sys

from pftsleep.apps.cli import main

if __name__ == "__main__": sys.exit(main(["hypnograms", *sys.argv[1:]]))
