"""Real text in blocks with many segments, for the demo's teacher (`make demo-assets`)."""

from pathlib import Path

import numpy as np
import pytest

from distill.config import load
from distill.data import Block, make_blocks
from distill.models import load_tokenizer

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "configs" / "smollm2-demo.yaml"
BLOCK_LENGTH = 192

SEGMENTS = ([192], [1, 2, 3, 1, 70, 115], [64, 64, 64], [96, 1, 95], [150, 42])
"""Of the blocks in turn; some are too short to have a row."""


@pytest.fixture(scope="session", autouse=True)
def _demo_assets_are_there() -> None:
    assert (ROOT / "assets" / "teacher").is_dir(), "run `make demo-assets` first"


@pytest.fixture(scope="session")
def blocks() -> list[Block]:
    """Five blocks of the demo's corpus: whole, cut up, with prompts masked, ending in padding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        config = load(DEMO, ["data.train_blocks=5", f"data.block_length={BLOCK_LENGTH}"])
        tokenizer = load_tokenizer(config.teacher.model, "teacher.model")
        made = [
            block for split, block in make_blocks(config.data, tokenizer, 0) if split == "train"
        ]
    masks = np.ones((len(made), BLOCK_LENGTH), dtype=bool)
    masks[2, 20:40] = masks[2, 100:] = False  # one prompt in the middle; the last segment whole
    masks[4, 150:] = False  # padding at the end of the data
    return [
        Block(block.block_id, block.input_ids_T, np.array(lengths, dtype=np.int32), mask)
        for block, lengths, mask in zip(made, SEGMENTS, masks, strict=True)
    ]
