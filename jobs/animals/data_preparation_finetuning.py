"""Labelled arrays in folds from files of bouts: `python jobs/animals/data_preparation_finetuning.py --config jobs/animals/data_preparation_finetuning.yaml`."""
import sys

from jsonargparse import ArgumentParser

from pftsleep.apps.cli import help_texts
from pftsleep.data.segments import prepare_finetuning
from pftsleep.errors import PFTSleepError

if __name__ == "__main__":
    parser = ArgumentParser(prog="data_preparation_finetuning.py", description=prepare_finetuning.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with settings; --print_config writes one")
    parser.add_function_arguments(prepare_finetuning)
    for action in parser._actions: action.help = help_texts(prepare_finetuning).get(action.dest, action.help)
    values = parser.instantiate(parser.parse_args(sys.argv[1:]))
    try: segments, folds, why = prepare_finetuning(**{k: v for k, v in values.items() if k != "config"})
    except PFTSleepError as e: sys.exit(f"data_preparation_finetuning: {e}")
    print(segments, segments.counts(), why.to_string(index=False), *(f"fold {f.number}: {len(f.train)} to learn, {len(f.val)} to judge" for f in folds), *segments.notes, sep="\n")
