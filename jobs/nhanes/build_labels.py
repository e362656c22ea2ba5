"""Labels of NHANES, and how many there are of each: `python jobs/nhanes/build_labels.py --config jobs/nhanes/labels.yaml`."""
import sys
from pathlib import Path

import pandas as pd
from pftsleep.apps.cli import make_parser
from pftsleep.data.nhanes import label_counts, nhanes_labels


def build_labels(
    source: str, # folder with the survey's files DEMO, DPQ, SLQ, RXQ_RX
    out: str, # folder for labels_H.csv and counts_H.csv
    store: str, # of build_store.py; only people in it are counted, or everybody where there is none
    cycles: str = "H", # letters of the cycles; the article's tasks are those of 2013-14
) -> None:
    "One row for each person with five labels, and one for each label with its counts."
    Path(out).mkdir(parents=True, exist_ok=True)
    known = pd.read_parquet(people) if (people := Path(store) / "participants.parquet").exists() else None
    for cycle in cycles:
        labels = nhanes_labels(source, cycle)
        labels.to_csv(Path(out) / f"labels_{cycle}.csv")
        (counts := label_counts(labels, None if known is None else known.loc[known["cycle"] == cycle, "SEQN"])).to_csv(Path(out) / f"counts_{cycle}.csv")
        print(f"{cycle}, among {'everybody' if known is None else 'those with minutes in the store'}:\n{counts}")


if __name__ == "__main__":
    parser = make_parser("build_labels", build_labels)
    parser.prog = Path(__file__).name
    values = parser.instantiate(parser.parse_args(sys.argv[1:]))
    build_labels(**{k: v for k, v in values.items() if k != "config"})
