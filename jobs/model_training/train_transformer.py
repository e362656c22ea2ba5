"""Pretrain the published encoder: `python jobs/model_training/train_transformer.py --config jobs/model_training/train_transformer.yaml`."""
import sys

from pftsleep.apps.cli import main

if __name__ == "__main__": sys.exit(main(["pretrain", *sys.argv[1:]]))
