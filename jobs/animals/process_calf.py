"""AcTBeCalf (calves, neck) as files of bouts: `python jobs/animals/process_calf.py --config jobs/animals/process_calf.yaml`."""
import sys

from pftsleep.apps.cli import make_parser
from pftsleep.data.animal_studies import convert_study
from pftsleep.errors import PFTSleepError


def process_calf(
    source: str, # folder of the data set as it was published
    folder: str, # for the files of bouts
    unit: str | None = None, # of the accelerometers: g, m/s2 or mg; none = measured by gravity
    columns: dict[str, list[str]] | None = None, # where a file's names differ: {acc: [x, y, z], label: [what]}
) -> None:
    "Convert calf."
    print(convert_study("calf", source, folder, unit, columns).to_string(index=False))


if __name__ == "__main__":
    (parser := make_parser("process_calf", process_calf)).prog = "process_calf.py"
    values = parser.instantiate(parser.parse_args(sys.argv[1:]))
    try: process_calf(**{k: v for k, v in values.items() if k != "config"})
    except PFTSleepError as e: sys.exit(f"process_calf: {e}")
