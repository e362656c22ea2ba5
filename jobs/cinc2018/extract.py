"""SleepFM's step 0: the challenge's nights into a store of their own samples, and a table of their half minutes: `python jobs/cinc2018/extract.py --config jobs/cinc2018/extract.yaml`."""
import sys
from pathlib import Path

from pftsleep.apps.cli import make_parser
from pftsleep.apps.stores import executor_of
from pftsleep.training.embedding_probe import extract_cinc


def extract(
    source: str, # folder with the records
    store: str, # store of native samples; made when absent, continued when it is there
    out: str, # folder for epochs.csv and, with `upstream`, skipped.csv
    upstream: bool = False, # the original's epochs, with its off-by-one and the records that it left out; nothing is written to the store
    workers: int | None = None, # worker processes; one per core if not given
) -> None:
    "No epoch is written: they are resampled when a batch wants them."
    with executor_of(workers, None) as executor: print(extract_cinc(source, store, Path(out), upstream, executor).to_string())


if __name__ == "__main__":
    parser = make_parser("extract", extract)
    parser.prog = Path(__file__).name
    values = parser.instantiate(parser.parse_args(sys.argv[1:]))
    extract(**{k: v for k, v in values.items() if k != "config"})
