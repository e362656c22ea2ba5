"""Stages, sleep statistics and event indices of APPLES, as tables: `python jobs/apples/build_hypnograms.py --config jobs/apples/hypnograms.yaml`."""
import sys

from pftsleep.apps.cli import main

if __name__ == "__main__": sys.exit(main(["hypnograms", *sys.argv[1:]]))
