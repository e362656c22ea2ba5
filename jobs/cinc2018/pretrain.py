"""SleepFM's step 2: an encoder for each modality, by contrast: `python jobs/cinc2018/pretrain.py --config jobs/cinc2018/pretrain.yaml`."""
import sys
from pathlib import Path

from pftsleep.apps.cli import make_parser
from pftsleep.data.splits import Split
from pftsleep.data.store import open_store
from pftsleep.training.contrastive_pretraining import ContrastiveConfig, pretrain_contrastive
from pftsleep.training.runs import history

PUBLISHED = ContrastiveConfig.sleepfm()


def pretrain(
    store: str, # of prepare.py, at 256 Hz; clips are read from it as they are wanted
    split: str, # pretraining_split.json of prepare.py: its parts 'train' and 'val' are used
    out: str, # folder of the run: encoders/MODALITY, best.safetensors, the curve, run.json; the same command goes on with a run that was interrupted
    train: ContrastiveConfig = PUBLISHED, # settings
) -> None:
    "Contrastive pretraining with the published hyper-parameters; stages are not looked at."
    pretrain_contrastive(open_store(store), Split.load(split), out, train)
    print(history(out).to_string(index=False))


if __name__ == "__main__":
    parser = make_parser("pretrain", pretrain)
    parser.prog = Path(__file__).name
    values = parser.instantiate(parser.parse_args(sys.argv[1:]))
    pretrain(**{k: v for k, v in values.items() if k != "config"})
