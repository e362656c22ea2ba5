"""A store of SHHS 1 and 2, for a model: `python jobs/shhs/build_store.py --config jobs/shhs/store.yaml`."""
import sys

from pftsleep.apps.cli import main

if __name__ == "__main__": sys.exit(main(["convert", *sys.argv[1:]]))
