"""Which targets teach best, and for how many bytes: Sparse Logit Sampling at a small scale.

    python scripts/reproduce_sparse_kd.py [--workers N] [--arms ARM,...] [--report]
        [--out results/sparse_kd] [name=value ...]

The experiment of Anshumann et al. 2025, arXiv:2503.16870, on configs/sparse-kd.yaml: a Llama of
two layers, pre-trained on plain prose, goes on with each kind of targets for equally many tokens;
see scripts/sparse_kd/arms.py for the kinds and jobs.py for what is measured. Three stages:

1. the teacher reads its blocks once and leaves caches of every kind, drawn anew for every seed
   (`store.py`, `redraw.py`);
2. jobs of a few minutes: three students are pre-trained, every arm is trained from each of them,
   gradients are compared with the dense one, and a small corpus is repeated 1, 4 and 16 times;
3. the report: results/sparse_kd.json, its tables (.md), every single run (.csv), and plots.

With --arms, only the students of these arms are trained and reported. Killed at any moment, the
same command goes on with the next job; --report writes what is there. Needs `make demo-assets
prose`. The last line is one JSON object.
"""

import argparse
import json
from pathlib import Path

from distill.config import load
from scripts.sparse_kd.arms import ARMS
from scripts.sparse_kd.jobs import all_jobs, run_jobs
from scripts.sparse_kd.redraw import draw_again
from scripts.sparse_kd.report import report
from scripts.sparse_kd.store import Store, prepare
from scripts.sparse_kd.students import NUM_SEEDS

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Do what is not done, then report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2, help="jobs at a time")
    parser.add_argument("--report", action="store_true", help="only report what is done")
    parser.add_argument("--arms", type=arm_names, default=[], help="with commas; all by default")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "results" / "sparse_kd", help="no suffix"
    )
    parser.add_argument("overrides", nargs="*", metavar="name=value")
    options = parser.parse_args()
    config = load(ROOT / "configs" / "sparse-kd.yaml", options.overrides)
    stages = all_jobs(options.arms)
    if not options.report:
        prepare(config)
        store = Store(config)
        for seed in range(1, NUM_SEEDS):
            draw_again(store, seed)
        run_jobs(config, stages, options.workers)
    print(json.dumps(report(config, stages, options.out)))


def arm_names(text: str) -> list[str]:
    """Split at commas; refuse what is no arm."""
    names = text.split(",")
    if unknown := sorted({*names} - {*ARMS}):
        raise argparse.ArgumentTypeError(f"no such arm: {', '.join(unknown)}; {', '.join(ARMS)}")
    return names


if __name__ == "__main__":
    main()
