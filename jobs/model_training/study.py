"""Search for good settings: `python jobs/model_training/study.py --config jobs/model_training/study.yaml`."""
import sys

from pftsleep.apps.cli import make_parser
from pftsleep.apps.training import study
from pftsleep.errors import PFTSleepError


def main() -> int:
    values = (parser := make_parser("study", study)).instantiate(parser.parse_args(sys.argv[1:]))
    try: return study(**{k: v for k, v in values.items() if k != "config"})
    except PFTSleepError as e:
        print(f"study: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__": sys.exit(main())
