"""Which pretext teaches most, masked, contrastive or both: `python jobs/model_training/contrastive_ablation.py --config jobs/model_training/contrastive_ablation.yaml`."""
import sys
from typing import Literal

from pftsleep.apps.cli import make_parser
from pftsleep.data.splits import Split, make_split
from pftsleep.data.store import open_store
from pftsleep.training.contrastive_ablation import PRETEXTS, ContrastiveConfig, compare_pretexts
from pftsleep.training.probe import StagingConfig

CLIPS = ContrastiveConfig(modalities=dict(brain=("EEG",), eye=("E1",), muscle=("EMG",)))

def contrastive_ablation(
    store: str, # folder of a store with stages
    out: str, # folder for all runs, contrastive_ablation.csv and runs.csv; what is finished is not run again
    split: str | None = None, # a split as a file; drawn with train.seed if not given
    pretexts: tuple[str, ...] = PRETEXTS, # which to compare
    seeds: tuple[int, ...] = (0, 1, 2), # a run of each pretext for each
    part: Literal["val", "test"] = "val", # who is judged; 'test' is for the last time
    train: ContrastiveConfig = CLIPS, # of each pretraining; its modalities and its window count for all
    probe: StagingConfig = StagingConfig(), # of each probe
) -> None:
    "Pretrain one encoder with each pretext, probe it in the same way, and compare, with intervals over people."
    data = open_store(store)
    table, runs = compare_pretexts(data, Split.load(split) if split else make_split(data.manifest, seed=train.seed), out, train, probe, pretexts, seeds, part)
    for name, t in (("contrastive_ablation", table.reset_index()), ("runs", runs)): t.to_csv(f"{out}/{name}.csv", index=False); print(t.round(3).to_string(index=False))

if __name__ == "__main__":
    values = (parser := make_parser("contrastive_ablation", contrastive_ablation)).instantiate(parser.parse_args(sys.argv[1:]))
    contrastive_ablation(**{k: v for k, v in values.items() if k != "config"})
