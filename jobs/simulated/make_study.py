"""Write a study of simulated people in the layout of a real one: `python jobs/simulated/make_study.py --config jobs/simulated/study.yaml`."""
import sys
from pathlib import Path

from pftsleep.apps.cli import make_parser
from pftsleep.data.studies import simulate_files


def make_study(
    folder: str, # where the files go
    study: str = "shhs", # whose layout; see `pftsleep cohorts`
    subjects: int = 2, # simulated people, with all the nights that the study had of each
    hours: float = 1., # of each night
    seed: int = 0, # of everything
) -> None:
    "Simulate a study: its folders, labels, rates, units, annotations and traps, to try things before you have access to the real one."
    print(f"{simulate_files(study, folder, subjects, hours, seed)} recordings in the layout of {study} in {folder}")


if __name__ == "__main__":
    parser = make_parser("make_study", make_study)
    parser.prog = Path(__file__).name
    values = parser.instantiate(parser.parse_args(sys.argv[1:]))
    make_study(**{k: v for k, v in values.items() if k != "config"})
