"""A file of an Axivity, GENEActiv or ActiGraph as a file of bouts: `python jobs/animals/process_device.py --config jobs/animals/process_device.yaml`."""
import sys

from pftsleep.apps.cli import make_parser
from pftsleep.data.animal_studies import convert_device
from pftsleep.errors import PFTSleepError

if __name__ == "__main__":
    (parser := make_parser("process_device", convert_device)).prog = "process_device.py"
    values = parser.instantiate(parser.parse_args(sys.argv[1:]))
    try: print(convert_device(**{k: v for k, v in values.items() if k != "config"}))
    except PFTSleepError as e: sys.exit(f"process_device: {e}")
