"""Equine activities of WAVES (legs) as files of bouts: `python jobs/animals/process_waves_equine_activities.py --config jobs/animals/process_waves_equine_activities.yaml`."""
import sys

from pftsleep.apps.cli import make_parser
from pftsleep.data.animal_studies import convert_study
from pftsleep.errors import PFTSleepError


def process_waves_equine_activities(
    source: str, # folder of the data set as it was published
    folder: str, # for the files of bouts
    unit: str | None = None, # of the accelerometers: g, m/s2 or mg; none = measured by gravity
    columns: dict[str, list[str]] | None = None, # where a file's names differ: {acc: [x, y, z], label: [what]}
) -> None:
    "Convert waves_equine_activities."
    print(convert_study("waves_equine_activities", source, folder, unit, columns).to_string(index=False))


if __name__ == "__main__":
    (parser := make_parser("process_waves_equine_activities", process_waves_equine_activities)).prog = "process_waves_equine_activities.py"
    values = parser.instantiate(parser.parse_args(sys.argv[1:]))
    try: process_waves_equine_activities(**{k: v for k, v in values.items() if k != "config"})
    except PFTSleepError as e: sys.exit(f"process_waves_equine_activities: {e}")
