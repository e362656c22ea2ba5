"""What matters in pretraining: `python jobs/model_training/ablation.py --config jobs/model_training/ablation.yaml`."""
import sys
from dataclasses import replace

from pftsleep.apps.cli import make_parser
from pftsleep.data.splits import make_split
from pftsleep.data.store import open_store
from pftsleep.training.pretrain import PretrainConfig
from pftsleep.training.probe import StagingConfig, compare_pretraining


def ablation(
    store: str, # folder of a store with stages
    out: str, # folder for all runs and for ablation.csv; what is finished is not run again
    regions: tuple[str, ...] = ("masked", "all", "0.1"), # what the loss counts; a number is the weight of a visible patch
    mask_ratios: tuple[float, ...] = (.3, .5, .7), # share of the patches that is hidden
    patch_seconds: tuple[float, ...] = (3., 6., 15.), # s
    train: PretrainConfig = PretrainConfig(), # of each pretraining
    probe: StagingConfig = StagingConfig(), # of each probe
) -> None:
    "Pretrain and probe with every combination, and compare the probes on the validation part."
    grid = {f"{r}-{m:g}-{s:g}s": dict(region=r if r.isalpha() else float(r), mask_ratio=m, patch_seconds=s) for r in regions for m in mask_ratios for s in patch_seconds}
    table = compare_pretraining(data := open_store(store), make_split(data.manifest, seed=train.seed), out, {name: replace(train, **what) for name, what in grid.items()}, probe)
    table.to_csv(f"{out}/ablation.csv", index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    values = (parser := make_parser("ablation", ablation)).instantiate(parser.parse_args(sys.argv[1:]))
    ablation(**{k: v for k, v in values.items() if k != "config"})
