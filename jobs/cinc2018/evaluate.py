"""SleepFM's step 4: what can be read off the embeddings, with intervals over people and baselines: `python jobs/cinc2018/evaluate.py --config jobs/cinc2018/evaluate.yaml`."""
import sys
from pathlib import Path

from pftsleep.apps.cli import make_parser
from pftsleep.training.embedding_probe import evaluate_cinc


def evaluate(
    embeddings: str, # folder of embed.py
    split: str, # split.json of prepare.py
    store: str, # of extract.py or prepare.py: whose events say who has apnea
    out: str, # folder for the tables
    people: str | None = None, # table with columns subject, and age and sex (0 or 1) where they are known
    upstream: bool = False, # also the stages as the original fits and reports them
    resamples: int = 1000, # draws of people
    seed: int = 0, # of all draws
) -> None:
    "Stages, disturbed breathing, few people, age, sex and apnea, as far as there are labels."
    print(evaluate_cinc(embeddings, split, store, Path(out), people, upstream, resamples, seed))


if __name__ == "__main__":
    parser = make_parser("evaluate", evaluate)
    parser.prog = Path(__file__).name
    values = parser.instantiate(parser.parse_args(sys.argv[1:]))
    evaluate(**{k: v for k, v in values.items() if k != "config"})
