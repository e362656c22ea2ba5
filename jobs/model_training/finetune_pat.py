"""Fine-tune PAT for the tasks of the paper: `python jobs/model_training/finetune_pat.py --config jobs/model_training/finetune_pat.yaml`."""
import sys

from pftsleep.apps.cli import make_parser
from pftsleep.apps.finetuning import finetune_pat
from pftsleep.errors import PFTSleepError


def main() -> int:
    (parser := make_parser("finetune_pat", finetune_pat)).prog = "finetune_pat.py"
    values = parser.instantiate(parser.parse_args(sys.argv[1:]))
    try: return finetune_pat(**{k: v for k, v in values.items() if k != "config"})
    except PFTSleepError as e: print(f"finetune_pat: {e}", file=sys.stderr); return 1
    except KeyboardInterrupt: print("finetune_pat: interrupted; the same command goes on from there", file=sys.stderr); return 130


if __name__ == "__main__": sys.exit(main())
