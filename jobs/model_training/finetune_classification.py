"""Fine-tune the animal-activity model and judge it by folds: `python jobs/model_training/finetune_classification.py --config jobs/model_training/finetune_classification.yaml`."""
import sys

from jsonargparse import ArgumentParser

from pftsleep.apps.cli import help_texts, switches
from pftsleep.errors import PFTSleepError
from pftsleep.training.cross_validation import finetune_arrays as job


def main() -> int:
    parser = ArgumentParser(prog="finetune_classification.py", description=job.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with settings; --print_config writes one")
    parser.add_function_arguments(job)
    for action in parser._actions: action.help = help_texts(job).get(action.dest, action.help)
    values = parser.instantiate(parser.parse_args(switches(sys.argv[1:], job)))
    try: out = job(**{k: v for k, v in values.items() if k != "config"})
    except PFTSleepError as e: print(f"finetune_classification: {e}", file=sys.stderr); return 1
    except KeyboardInterrupt: print("finetune_classification: interrupted; the same command goes on from there", file=sys.stderr); return 130
    print((out / "table.csv").read_text(), out, sep="")
    return 0


if __name__ == "__main__": sys.exit(main())
