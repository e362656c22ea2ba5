"""Write EDF files and NSRR XML of simulated people: `python jobs/simulated/make_cohort.py --config jobs/simulated/cohort.yaml`."""
import sys
from pathlib import Path

from pftsleep.apps.cli import make_parser
from pftsleep.data.simulate import simulate_cohort


def make_cohort(
    folder: str, # where the files go; what is there already is kept
    subjects: int = 40, # simulated people
    nights: int = 1, # of each
    hours: float = 8., # of each night
    montage: str = "shhs", # channels and rates: shhs, mesa, sleep_edf or pftsleep
    seed: int = 0, # of everything
) -> None:
    "Simulate a cohort of EDF files with their stages and events."
    rows = simulate_cohort(folder, subjects, nights, hours, seed, montage)
    print(f"{len(rows)} nights of {rows['subject'].nunique()} people in {folder}")


if __name__ == "__main__":
    parser = make_parser("make_cohort", make_cohort)
    parser.prog = Path(__file__).name
    values = parser.instantiate(parser.parse_args(sys.argv[1:]))
    make_cohort(**{k: v for k, v in values.items() if k != "config"})
