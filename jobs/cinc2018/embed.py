"""SleepFM's step 3: a vector for each half minute and modality, by trained encoders and by the same with random weights: `python jobs/cinc2018/embed.py --config jobs/cinc2018/embed.yaml`."""
import sys
from pathlib import Path

from pftsleep.apps.cli import make_parser
from pftsleep.training.embedding_probe import embed_cinc


def embed(
    store: str, # of extract.py, for the published encoders; of prepare.py, for those that were trained on it
    encoders: str, # folder of a contrastive run, or the published best.pt
    split: str, # split.json of prepare.py
    out: str, # folder for one parquet file each night, in `trained` and `random`
    parts: list[str], # parts of the split
    batch: int = 64, # half minutes at once
    device: str = "cpu", # where encoders run
    seed: int = 0, # of the random encoders
) -> None:
    "Nights whose file is there, made in the same way, are skipped."
    print(embed_cinc(store, encoders, split, Path(out), parts, batch, device, seed))


if __name__ == "__main__":
    parser = make_parser("embed", embed)
    parser.prog = Path(__file__).name
    values = parser.instantiate(parser.parse_args(sys.argv[1:]))
    embed(**{k: v for k, v in values.items() if k != "config"})
