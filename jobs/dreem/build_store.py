"""A store of the Dreem Open Datasets, for a model: `python jobs/dreem/build_store.py --config jobs/dreem/store.yaml`."""
import sys

from pftsleep.apps.cli import main

if __name__ == "__main__": sys.exit(main(["convert", *sys.argv[1:]]))
