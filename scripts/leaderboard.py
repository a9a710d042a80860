"""Compare the models of finished runs: what `distill leaderboard` does, with its options.

python scripts/leaderboard.py RUN_OR_RESULTS... [--baseline NAME] [--out DIR] [--allow-mixed]
"""

import sys

from distill.cli import main as distill


def main() -> int:
    """Return 0, or 2 if the runs have no results or cannot be compared."""
    return distill(["leaderboard", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
