"""Stages, sleep statistics and event indices of the Wisconsin Sleep Cohort, as tables: `python jobs/wsc/build_hypnograms.py --config jobs/wsc/hypnograms.yaml`."""
import sys

from pftsleep.apps.cli import main

if __name__ == "__main__": sys.exit(main(["hypnograms", *sys.argv[1:]]))
