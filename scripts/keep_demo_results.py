"""Copy the demo's results into results/ and into the README, with the machine that made them.

    python scripts/keep_demo_results.py

Run it after `make demo`; a test compares README and results.
"""

import argparse
import re
from pathlib import Path

from distill.cache.inspect import describe, summarise
from distill.cache.reader import open_cache
from distill.config import load
from distill.files import write_json_atomically, write_text_atomically
from scripts.provenance import machine

ROOT = Path(__file__).parent.parent
CONFIG = "configs/smollm2-demo.yaml"
KEPT = ROOT / "results" / "smollm2-demo"


def main() -> None:
    """Copy leaderboard, results, metrics and the summary of the cache."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    config = load(ROOT / CONFIG)
    for name in ("leaderboard.md", "leaderboard.csv", "results.json", "metrics.jsonl"):
        write_text_atomically(KEPT / name, (ROOT / config.run_folder / name).read_text())
    (KEPT / "loss.png").write_bytes((ROOT / config.run_folder / "loss.png").read_bytes())
    summary = summarise(open_cache(config.cache_folder("train")))
    write_text_atomically(KEPT / "inspect.txt", describe(summary) + "\n")
    write_json_atomically(KEPT / "inspect.json", summary)
    write_json_atomically(KEPT / "machine.json", {"command": "make demo", **machine()})
    readme = (ROOT / "README.md").read_text()
    write_text_atomically(ROOT / "README.md", with_results(readme))


def with_results(readme: str) -> str:
    """Return the README with the kept results between its markers."""
    board = (KEPT / "leaderboard.md").read_text()
    table = "\n".join(line for line in board.splitlines() if line.startswith("|"))
    readme = _between(readme, "table", f"\n{table}\n")
    return _between(readme, "text", f"\n```text\n{(KEPT / 'inspect.txt').read_text()}```\n")


def _between(text: str, what: str, content: str) -> str:
    pattern = rf"(<!-- {what} from .*? -->\n).*?(<!-- end of {what} -->)"
    found = re.search(pattern, text, flags=re.DOTALL)
    if found is None:
        raise SystemExit(f"README.md has no markers for the {what}")
    return text[: found.end(1)] + content.lstrip("\n") + text[found.start(2) :]


if __name__ == "__main__":
    main()
