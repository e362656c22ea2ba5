"""Train the published head on a frozen encoder: `python jobs/model_training/train_classifier.py --config jobs/model_training/train_classifier.yaml`."""
import sys

from pftsleep.apps.cli import main

if __name__ == "__main__": sys.exit(main(["probe", *sys.argv[1:]]))
