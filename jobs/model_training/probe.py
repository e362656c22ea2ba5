"""Train a linear probe for sleep stages on a frozen encoder: `python jobs/model_training/probe.py --config jobs/model_training/probe.yaml`."""
import sys

from pftsleep.apps.cli import main

if __name__ == "__main__": sys.exit(main(["probe", *sys.argv[1:]]))
