"""Stages, sleep statistics and event indices of Sleep-EDF, the cassette study, as tables: `python jobs/sleep_edf/build_hypnograms.py --config jobs/sleep_edf/hypnograms.yaml`."""
import sys

from pftsleep.apps.cli import main

if __name__ == "__main__": sys.exit(main(["hypnograms", *sys.argv[1:]]))
