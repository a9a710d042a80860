"""Measure cuts of SmolLM2 before any training: by which rule is the damage smallest?

    python scripts/bench_students.py [--quick] [--out results/students.json]

Needs the demo's assets (`make demo-assets`). The teacher is captured on the demo's held-out blocks
and on a few train blocks to calibrate on; then each cut is made as its settings say, and compared
with the teacher on the held-out blocks. The last line is one JSON object.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from distill.cache.reader import Cache, open_cache
from distill.capture import capture
from distill.config import load
from distill.distillation_model import DistillationModel
from distill.evaluate.fidelity import measure
from distill.files import write_json_atomically
from scripts.provenance import provenance
from students import build_student

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "smollm2-demo.yaml"
CALIBRATION_BLOCKS = 8
ALL = "student.num_layers=null"
CUTS: dict[str, tuple[str, ...]] = {
    "the whole model": (ALL,),
    "24 of 30 layers, spaced": ("student.num_layers=24",),
    "24 of 30 layers, influence": ("student.num_layers=24", "student.layers=influence"),
    "24 of 30 layers, loss": ("student.num_layers=24", "student.layers=loss"),
    "18 of 30 layers, spaced": ("student.num_layers=18",),
    "18 of 30 layers, influence": ("student.num_layers=18", "student.layers=influence"),
    **{
        f"{title}, {importance}": (ALL, *cut, f"student.importance={importance}")
        for title, cut in {
            "1,024 of 1,536 MLP channels": ("student.intermediate_size=1024",),
            "6 of 9 heads": ("student.num_heads=6",),
            "432 of 576 hidden channels": ("student.hidden_size=432",),
            "MLP 1,024 and 6 heads": ("student.intermediate_size=1024", "student.num_heads=6"),
        }.items()
        for importance in ("activation", "weight")
    },
}
"""Title -> settings over those of the demo."""


def main() -> None:
    """Measure, print, and write the result where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4 held-out blocks instead of 24")
    parser.add_argument("--out", type=Path, help="also write the result there")
    options = parser.parse_args()
    num_blocks = 4 if options.quick else 24
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"run_folder={folder}",
            f"data.train_blocks={CALIBRATION_BLOCKS}",
            f"data.held_out_blocks={num_blocks}",
            f"student.calibration_blocks={CALIBRATION_BLOCKS}",
        ]
        config = load(CONFIG, settings)
        capture(config)
        held_out = open_cache(config.cache_folder("held_out"))
        cuts = {}
        for title, cut in CUTS.items():
            cuts[title] = {"settings": cut, **measure_cut([*settings, *cut], held_out)}
            print(f"{title}: {cuts[title]}", file=sys.stderr, flush=True)
    result = {
        "config": str(CONFIG.relative_to(ROOT)),
        "held_out_blocks": num_blocks,
        "calibration_blocks": CALIBRATION_BLOCKS,
        "block_length": config.data.block_length,
        "cuts": cuts,
        **provenance(config.seed),
    }
    if options.out:
        write_json_atomically(options.out, result)
    print(json.dumps(result))


def measure_cut(settings: list[str], held_out: Cache) -> dict[str, Any]:
    """Make one student and compare it with the teacher."""
    started = time.perf_counter()
    student, _ = build_student(load(CONFIG, settings))
    build_seconds = time.perf_counter() - started
    num_parameters = student.num_parameters()
    fidelity = measure(DistillationModel(student), held_out, device=torch.device("cpu"))
    return {
        "num_parameters": num_parameters,
        "build_seconds": round(build_seconds, 1),
        **fidelity.as_dict(),
    }


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table of docs/students.md."""
    lines = [
        "| cut | parameters | held-out CE (nats) | KL to teacher (nats) | top-1 agreement (%) |",
        "| :-- | --: | --: | --: | --: |",
    ]
    for title in CUTS:
        found = result["cuts"][title]
        ce, kl, agreement = (found[key] for key in ("ce_nats", "kl_nats", "agreement"))
        lines.append(
            f"| {title} | {found['num_parameters'] / 1e6:.1f} M "
            f"| {ce['value']:.3f} ± {ce['stderr']:.3f} | {kl['value']:.3f} ± {kl['stderr']:.3f} "
            f"| {100 * agreement['value']:.1f} ± {100 * agreement['stderr']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
