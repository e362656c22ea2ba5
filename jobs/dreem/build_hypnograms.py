"""Stages, sleep statistics and event indices of the Dreem Open Datasets, as tables: `python jobs/dreem/build_hypnograms.py --config jobs/dreem/hypnograms.yaml`."""
import sys

from pftsleep.apps.cli import main

if __name__ == "__main__": sys.exit(main(["hypnograms", *sys.argv[1:]]))
