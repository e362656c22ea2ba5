"""Pretrain an encoder on a store, without labels: `python jobs/model_training/pretrain_nights.py --config jobs/model_training/pretrain_nights.yaml`."""
import sys

from pftsleep.apps.cli import main

if __name__ == "__main__": sys.exit(main(["pretrain", *sys.argv[1:]]))
