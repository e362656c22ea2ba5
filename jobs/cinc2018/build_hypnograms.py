"""Stages, sleep statistics and event indices of the 2018 challenge of PhysioNet and Computing in Cardiology, as tables: `python jobs/cinc2018/build_hypnograms.py --config jobs/cinc2018/hypnograms.yaml`."""
import sys

from pftsleep.apps.cli import main

if __name__ == "__main__": sys.exit(main(["hypnograms", *sys.argv[1:]]))
