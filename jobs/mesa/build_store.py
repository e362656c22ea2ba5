"""A store of MESA, for a model: `python jobs/mesa/build_store.py --config jobs/mesa/store.yaml`."""
import sys

from pftsleep.apps.cli import main

if __name__ == "__main__": sys.exit(main(["convert", *sys.argv[1:]]))
