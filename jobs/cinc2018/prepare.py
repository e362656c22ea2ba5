"""SleepFM's step 1: who is learned from and who is judged, and a store at 256 Hz for pretraining: `python jobs/cinc2018/prepare.py --config jobs/cinc2018/prepare.yaml`."""
import sys
from pathlib import Path
from typing import Literal

from pftsleep.apps.cli import make_parser
from pftsleep.apps.stores import executor_of
from pftsleep.training.embedding_probe import prepare_cinc


def prepare(
    store: str, # of extract.py
    target: str, # store at 256 Hz for pretraining
    out: str, # folder for split.json
    split: Literal["quoted", "drawn"] = "quoted", # 'quoted': the records that the authors are quoted with; 'drawn': by their rule, from sorted ids
    test: int = 100, # people in the test part, where the split is drawn
    recipe: Literal["sleepfm_2024", "sleepfm_2024_corrected"] = "sleepfm_2024_corrected", # the first is what the published weights read; ours are better trained on the second
    need_all: bool = True, # false: quoted records that the store lacks are left out, for a part of the challenge
    workers: int | None = None, # worker processes; one per core if not given
) -> None:
    "A split as a file, and prepared signals."
    with executor_of(workers, None) as executor: print(prepare_cinc(store, target, Path(out), split, test, recipe, executor, need_all))


if __name__ == "__main__":
    parser = make_parser("prepare", prepare)
    parser.prog = Path(__file__).name
    values = parser.instantiate(parser.parse_args(sys.argv[1:]))
    prepare(**{k: v for k, v in values.items() if k != "config"})
