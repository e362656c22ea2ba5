"""A store of MrOS, both visits, for a model: `python jobs/mros/build_store.py --config jobs/mros/store.yaml`."""
import sys

from pftsleep.apps.cli import main

if __name__ == "__main__": sys.exit(main(["convert", *sys.argv[1:]]))
