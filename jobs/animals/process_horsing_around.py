"""Horsing Around (horses and ponies, neck) as files of bouts: `python jobs/animals/process_horsing_around.py --config jobs/animals/process_horsing_around.yaml`."""
import sys

from pftsleep.apps.cli import make_parser
from pftsleep.data.animal_studies import convert_study
from pftsleep.errors import PFTSleepError


def process_horsing_around(
    source: str, # folder of the data set as it was published
    folder: str, # for the files of bouts
    unit: str | None = None, # of the accelerometers: g, m/s2 or mg; none = measured by gravity
    columns: dict[str, list[str]] | None = None, # where a file's names differ: {acc: [x, y, z], label: [what]}
) -> None:
    "Convert horsing_around."
    print(convert_study("horsing_around", source, folder, unit, columns).to_string(index=False))


if __name__ == "__main__":
    (parser := make_parser("process_horsing_around", process_horsing_around)).prog = "process_horsing_around.py"
    values = parser.instantiate(parser.parse_args(sys.argv[1:]))
    try: process_horsing_around(**{k: v for k, v in values.items() if k != "config"})
    except PFTSleepError as e: sys.exit(f"process_horsing_around: {e}")
