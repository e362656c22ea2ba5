"""A store of the Wisconsin Sleep Cohort, for a model: `python jobs/wsc/build_store.py --config jobs/wsc/store.yaml`."""
import sys

from pftsleep.apps.cli import main

if __name__ == "__main__": sys.exit(main(["convert", *sys.argv[1:]]))
