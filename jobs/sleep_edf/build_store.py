"""A store of Sleep-EDF, the cassette study, for a model: `python jobs/sleep_edf/build_store.py --config jobs/sleep_edf/store.yaml`."""
import sys

from pftsleep.apps.cli import main

if __name__ == "__main__": sys.exit(main(["convert", *sys.argv[1:]]))
