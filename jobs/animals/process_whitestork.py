"""White storks of rabc as files of bouts: `python jobs/animals/process_whitestork.py --config jobs/animals/process_whitestork.yaml`."""
import sys

from pftsleep.apps.cli import make_parser
from pftsleep.data.animal_studies import convert_rabc
from pftsleep.errors import PFTSleepError


def process_whitestork(
    source: str, # whitestork_acc.rda, or a table of the same kind
    folder: str, # for the files of bouts
    fs: float = 10.54, # Hz
    unit: str | None = None, # g, m/s2 or mg; none = measured by gravity
) -> None:
    "Convert bouts of storks. The source has no animal id, so nothing can be split by animal."
    table = convert_rabc(source, folder, fs, unit=unit)
    print(f"{len(table)} bouts, {table['seconds'].sum():.0f} s, in {table['unit'][0]}; which bird is which, the source doesn't tell")


if __name__ == "__main__":
    (parser := make_parser("process_whitestork", process_whitestork)).prog = "process_whitestork.py"
    values = parser.instantiate(parser.parse_args(sys.argv[1:]))
    try: process_whitestork(**{k: v for k, v in values.items() if k != "config"})
    except PFTSleepError as e: sys.exit(f"process_whitestork: {e}")
