"""Pretrain the animal-activity model on prepared windows, or on segments drawn from HDF5 bouts (--datasets): `python jobs/model_training/pretrain.py --config jobs/model_training/pretrain.yaml`."""
import sys

from jsonargparse import ArgumentParser

from pftsleep.apps.cli import help_texts, switches
from pftsleep.errors import PFTSleepError
from pftsleep.training.cross_validation import pretrain_arrays as job


def main() -> int:
    parser = ArgumentParser(prog="pretrain.py", description=job.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with settings; --print_config writes one")
    parser.add_function_arguments(job)
    for action in parser._actions: action.help = help_texts(job).get(action.dest, action.help)
    values = parser.instantiate(parser.parse_args(switches(sys.argv[1:], job)))
    try: print(job(**{k: v for k, v in values.items() if k != "config"}))
    except PFTSleepError as e: print(f"pretrain: {e}", file=sys.stderr); return 1
    except KeyboardInterrupt: print("pretrain: interrupted; the same command goes on from there", file=sys.stderr); return 130
    return 0


if __name__ == "__main__": sys.exit(main())
