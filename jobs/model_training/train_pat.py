"""Pretrain PAT on NHANES: `python jobs/model_training/train_pat.py --config jobs/model_training/train_pat.yaml`."""
import sys

from pftsleep.apps.cli import make_parser
from pftsleep.apps.finetuning import train_pat
from pftsleep.errors import PFTSleepError


def main() -> int:
    (parser := make_parser("train_pat", train_pat)).prog = "train_pat.py"
    values = parser.instantiate(parser.parse_args(sys.argv[1:]))
    try: return train_pat(**{k: v for k, v in values.items() if k != "config"})
    except PFTSleepError as e: print(f"train_pat: {e}", file=sys.stderr); return 1
    except KeyboardInterrupt: print("train_pat: interrupted; the same command goes on from there", file=sys.stderr); return 130


if __name__ == "__main__": sys.exit(main())
