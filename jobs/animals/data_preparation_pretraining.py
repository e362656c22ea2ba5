"""Arrays for pretraining from files of bouts: `python jobs/animals/data_preparation_pretraining.py --config jobs/animals/data_preparation_pretraining.yaml`."""
import sys

from jsonargparse import ArgumentParser

from pftsleep.apps.cli import help_texts
from pftsleep.data.segments import prepare_pretraining
from pftsleep.errors import PFTSleepError

if __name__ == "__main__":
    parser = ArgumentParser(prog="data_preparation_pretraining.py", description=prepare_pretraining.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with settings; --print_config writes one")
    parser.add_function_arguments(prepare_pretraining, skip={"datasets"})
    parser.add_argument("--datasets", nargs="+", type=str, required=True)
    for action in parser._actions: action.help = help_texts(prepare_pretraining).get(action.dest, action.help)
    values = parser.instantiate(parser.parse_args(sys.argv[1:]))
    try: done = prepare_pretraining(**{k: v for k, v in values.items() if k != "config"})
    except PFTSleepError as e: sys.exit(f"data_preparation_pretraining: {e}")
    print(done.report.to_string(index=False), *done.notes, sep="\n")
