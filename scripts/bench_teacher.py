"""What capturing costs over the bare forward pass of the same teacher.

    python scripts/bench_teacher.py [--quick] [--out results/bench_teacher.json]

Needs the demo's assets (`make demo-assets`). Two teachers in bfloat16: SmolLM2-135M on its demo
text, and a random Llama of half a billion parameters with Llama 3's 128,256 tokens, whose tied
embedding is scaled so that its distributions are as sure as those of a trained model.

`capture_over_forward` is the time to score blocks and to publish a shard of them, over that of
`model(...).logits` on the same blocks; the two alternate, and the median of the ratios counts.
Memory is the peak of the process above the loaded model. The last line is one JSON object.
"""

import argparse
import ctypes
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from distill.cache.storage import Folder
from distill.cache.writer import ShardWriter
from distill.config import ResidentTeacherConfig, TargetsConfig, ThresholdConfig, TopKConfig, load
from distill.data import Block, make_blocks
from distill.evaluate.cost import peak_resident_bytes
from distill.files import write_json_atomically
from distill.models import load_tokenizer
from distill.targets import concatenate
from distill.teacher.resident import ResidentTeacher
from distill.teacher.selection import Selection, stack_inputs
from scripts.bench_cache import new_manifest
from scripts.provenance import provenance

ROOT = Path(__file__).parent.parent
KINDS: dict[str, TargetsConfig] = {
    "threshold": ThresholdConfig(),
    "top_k_64": TopKConfig(kind="top_k", k=64),
}
SEED = 0


def main() -> None:
    """Measure both teachers, print, and write the result where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one block and fewer rounds")
    parser.add_argument("--out", type=Path, help="also write the result there")
    options = parser.parse_args()
    blocks = demo_blocks(1 if options.quick else 4)
    rounds = {"smollm2_135m": 5 if options.quick else 9, "random_0.5b": 2 if options.quick else 5}
    result: dict[str, Any] = {
        "capture_over_forward": {},
        "peak_bytes_above_model": {},
        "blocks": len(blocks),
        "block_length": len(blocks[0].input_ids_T),
        "rounds": rounds,
    }
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(Path(folder))
        for name, model, vocab_size in (
            ("smollm2_135m", ROOT / "assets" / "teacher", 49_152),
            ("random_0.5b", Path(folder), 128_256),
        ):
            ratios, peaks = compare(model, vocab_size, blocks, rounds[name])
            result["capture_over_forward"][name] = ratios
            result["peak_bytes_above_model"][name] = peaks
    result |= provenance(SEED)
    if options.out:
        write_json_atomically(options.out, result)
    print(json.dumps(result))


def demo_blocks(count: int) -> list[Block]:
    """The first training blocks of the demo."""
    config = load(ROOT / "configs" / "smollm2-demo.yaml", [f"data.train_blocks={count}"])
    tokenizer = load_tokenizer(config.teacher.model, "teacher.model")
    found = []
    for split, block in make_blocks(config.data, tokenizer, SEED):
        found += [block] if split == "train" else []
        if len(found) == count:
            break
    return found


def save_random_llama(folder: Path) -> None:
    """Save a random Llama of 0.54 billion parameters with an entropy of a few nats."""
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128_256,
            hidden_size=1280,
            intermediate_size=3456,
            num_hidden_layers=22,
            num_attention_heads=20,
            num_key_value_heads=4,
            head_dim=64,
            tie_word_embeddings=True,
        )
    )
    torch.set_default_dtype(torch.float32)
    model.lm_head.weight.data.mul_(6)
    model.save_pretrained(folder)


def compare(
    folder: Path, vocab_size: int, blocks: Sequence[Block], rounds: int
) -> tuple[dict[str, float], dict[str, int]]:
    """Median ratio of times, and peak of memory above the model, of each kind of targets."""
    config = ResidentTeacherConfig(model=str(folder), device="cpu", micro_batch_tokens=2048)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    input_ids_BT, position_ids_BT = stack_inputs(blocks, torch.device("cpu"))

    @torch.inference_mode()
    def forward() -> None:
        model(input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=False)

    ratios, peaks = {}, {"forward": peak_bytes(forward)}
    for name, kind in KINDS.items():
        selection = Selection(name, kind, SEED, vocab_size, config.head_chunk_tokens)
        teacher = ResidentTeacher(config, selection)

        def capture(teacher: ResidentTeacher = teacher, kind: TargetsConfig = kind) -> None:
            targets = concatenate(list(teacher.score([blocks])))
            with tempfile.TemporaryDirectory() as cache:
                manifest = new_manifest(cache, kind, list(blocks), vocab_size)
                ShardWriter(Folder(cache), manifest).write(0, list(blocks), targets)

        peaks[name] = peak_bytes(capture)
        pairs = [(seconds(capture), seconds(forward)) for _ in range(rounds)]
        ratios[name] = round(statistics.median(ours / bare for ours, bare in pairs), 3)
        del teacher
    return ratios, peaks


def seconds(work: Callable[[], None]) -> float:
    """Wall time of `work`."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peak_bytes(work: Callable[[], None]) -> int:
    """Peak resident memory of `work` above what the process holds before it."""
    work()  # once before: libraries and thread pools keep what they first take
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, so that taking it again shows
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = psutil.Process().memory_info().rss
    work()
    return peak_resident_bytes() - before


if __name__ == "__main__":
    main()
