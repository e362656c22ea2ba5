"""A store of APPLES, for a model: `python jobs/apples/build_store.py --config jobs/apples/store.yaml`."""
import sys

from pftsleep.apps.cli import main

if __name__ == "__main__": sys.exit(main(["convert", *sys.argv[1:]]))
