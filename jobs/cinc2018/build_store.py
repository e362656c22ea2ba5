"""A store of the 2018 challenge of PhysioNet and Computing in Cardiology, for a model: `python jobs/cinc2018/build_store.py --config jobs/cinc2018/store.yaml`."""
import sys

from pftsleep.apps.cli import main

if __name__ == "__main__": sys.exit(main(["convert", *sys.argv[1:]]))
