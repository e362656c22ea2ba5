"""Any table of one individual as files of bouts: `python jobs/animals/process_csv.py --config jobs/animals/process_csv.yaml`."""
import sys

from pftsleep.apps.cli import make_parser
from pftsleep.data.animal_studies import convert_csv
from pftsleep.errors import PFTSleepError

if __name__ == "__main__":
    (parser := make_parser("process_csv", convert_csv)).prog = "process_csv.py"
    values = parser.instantiate(parser.parse_args(sys.argv[1:]))
    try: print(convert_csv(**{k: v for k, v in values.items() if k != "config"}).to_string(index=False))
    except PFTSleepError as e: sys.exit(f"process_csv: {e}")
