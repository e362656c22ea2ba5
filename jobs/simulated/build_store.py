"""Convert the simulated files to a store: `python jobs/simulated/build_store.py --config jobs/simulated/store.yaml`."""
import sys

from pftsleep.apps.cli import main

if __name__ == "__main__": sys.exit(main(["convert", *sys.argv[1:]]))
