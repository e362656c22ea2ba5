"""Minutes of NHANES into a store, and their weeks into one file per cycle: `python jobs/nhanes/build_store.py --config jobs/nhanes/store.yaml`."""
import sys
from pathlib import Path

from pftsleep.apps.cli import make_parser
from pftsleep.data.nhanes import convert_nhanes, nhanes_file, nhanes_weeks, read_nhanes_header, write_weeks


def build_store(
    source: str, # folder with the survey's files PAXRAW_C, PAXRAW_D, PAXMIN_G, PAXMIN_H, PAXHD_G, PAXHD_H; .xpt or .zip
    store: str, # the store's folder; the weeks become weeks_C.h5, ... in it
    cycles: str = "CDGH", # letters of the cycles; those without a file are left out
    rule: str = "midnight", # which week of a person: midnight, latest, all or start
) -> None:
    "Everybody's minutes, as they are in the files, and the weeks that PAT takes."
    for cycle in cycles:
        if not (path := nhanes_file(source, "PAXRAW" if cycle in "CD" else "PAXMIN", cycle)): print(f"{cycle}: no file of minutes in {source}"); continue
        header = nhanes_file(source, "PAXHD", cycle)
        print(f"{cycle}: {convert_nhanes(path, store, header)}")
        print(f"{cycle}: {write_weeks(nhanes_weeks(path, rule, read_nhanes_header(header) if header else None), Path(store) / f'weeks_{cycle}.h5')} weeks")


if __name__ == "__main__":
    parser = make_parser("build_store", build_store)
    parser.prog = Path(__file__).name
    values = parser.instantiate(parser.parse_args(sys.argv[1:]))
    build_store(**{k: v for k, v in values.items() if k != "config"})
