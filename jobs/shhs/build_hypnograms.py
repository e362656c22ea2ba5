"""Stages, sleep statistics and event indices of SHHS 1 and 2, as tables: `python jobs/shhs/build_hypnograms.py --config jobs/shhs/hypnograms.yaml`."""
import sys

from pftsleep.apps.cli import main

if __name__ == "__main__": sys.exit(main(["hypnograms", *sys.argv[1:]]))
