"""Foaling mares of IDLab (head) as files of bouts: `python jobs/animals/process_idlab_foaling.py --config jobs/animals/process_idlab_foaling.yaml`."""
import sys

from pftsleep.apps.cli import make_parser
from pftsleep.data.animal_studies import convert_study
from pftsleep.errors import PFTSleepError


def process_idlab_foaling(
    source: str, # folder of the data set as it was published
    folder: str, # for the files of bouts
    unit: str | None = None, # of the accelerometers: g, m/s2 or mg; none = measured by gravity
    columns: dict[str, list[str]] | None = None, # where a file's names differ: {acc: [x, y, z], label: [what]}
) -> None:
    "Convert idlab_foaling."
    print(convert_study("idlab_foaling", source, folder, unit, columns).to_string(index=False))


if __name__ == "__main__":
    (parser := make_parser("process_idlab_foaling", process_idlab_foaling)).prog = "process_idlab_foaling.py"
    values = parser.instantiate(parser.parse_args(sys.argv[1:]))
    try: process_idlab_foaling(**{k: v for k, v in values.items() if k != "config"})
    except PFTSleepError as e: sys.exit(f"process_idlab_foaling: {e}")
