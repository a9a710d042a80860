"""What many tests share: a tiny teacher with its tokenizer, a corpus, an experiment, a cache."""

import atexit
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Before anything of Hugging Face is imported, which reads them once. The cache of datasets is keyed
# by path and time of a file, so tests keep theirs to themselves.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="distill-tests-")

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from distill.cache import format as fmt
from distill.cache.manifest import Manifest
from distill.cache.storage import Folder, write_manifest
from distill.cache.writer import BlockSpool, ShardWriter
from distill.capture import capture
from distill.config import ExperimentConfig, load
from distill.data import Block
from distill.targets import SparseTargets, concatenate
from tests.tiny_tasks import write_tasks

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

collect_ignore = [] if find_spec("vllm") else ["vllm"]
"""tests/vllm needs the environment that `make test-vllm` makes."""

EOS, PAD = "<|eos|>", "<|pad|>"
PADDED_COLUMNS = 7
"""Columns of the tiny teacher's head beyond its tokens, as real checkpoints have them."""

_TURN = "<{{ message['role'] }}>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    + _TURN
    + "{{ message['content'] + eos_token }}"
    + "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Has no generation spans: the assistant's tokens are found by comparing prefixes."""

SPAN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    + _TURN
    + "{% if message['role'] == 'assistant' %}"
    + "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    + "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    + "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Gives the same text as `CHAT_TEMPLATE` and marks what the assistant says."""

_WORDS = (
    "the a cat dog river house old green small sings runs sees finds under over near and but "
    "quickly never again water light morning stone bread garden letter winter road bird"
)

ConfigMaker = Callable[..., ExperimentConfig]
"""tiny_config("seed=1", ...): the tiny experiment with overrides."""


def pytest_configure() -> None:
    """Silence what would drown the report of a failure."""
    datasets.disable_progress_bars()
    disable_progress_bar()


def make_tokenizer(chat_template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: one token a byte, then end of text and padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=PAD)
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """258 tokens, with a chat template that has no generation spans."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def span_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokens, with a chat template that marks generation spans."""
    return make_tokenizer(SPAN_CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def tiny_teacher(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """Folder of a seeded Llama of two layers with its tokenizer; shared, so do not change it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-teacher"
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer) + PADDED_COLUMNS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        # Fresh weights of this size give flat distributions; these have heads and tails.
        model.lm_head.weight.data.mul_(20)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def own_teacher(tiny_teacher: Path, tmp_path: Path) -> Path:
    """A copy of the tiny teacher that may be changed."""
    return Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))


def poison(teacher: Path, row: int = 132, tensor: str = "lm_head") -> None:
    """Make a row of weights NaN; inner rows are too far inside for the teacher's fingerprint."""
    path = teacher / "model.safetensors"
    weights = load_file(path)
    weights[f"{tensor}.weight"][row] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})


def make_documents(count: int, seed: int) -> list[str]:
    """Seeded sentences of 2 to 12 words, all different."""
    words = _WORDS.split()
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        sentence = " ".join(rng.choice(words) for _ in range(rng.randint(2, 12)))
        found[sentence.capitalize() + "."] = None
    return list(found)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON Lines file of 200 small documents; shared, so do not change it."""
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    datasets.Dataset.from_dict({"text": make_documents(200, seed=0)}).to_json(path)
    return path


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of small lm-eval tasks; shared, so do not change it."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def tiny_tree(run_folder: Path, teacher: Path, corpus: Path) -> dict[str, Any]:
    """Settings of a whole experiment that takes seconds, as in its YAML."""
    return {
        "run_folder": str(run_folder),
        "device": "cpu",
        "data": {
            "sources": [{"path": "json", "data_files": [str(corpus)]}],
            "block_length": 32,
            "train_blocks": 24,
            "held_out_blocks": 6,
            "held_out_fraction": 0.1,
        },
        "teacher": {"kind": "resident", "model": str(teacher), "dtype": "float32", "device": "cpu"},
        "targets": {"kind": "threshold", "tau": 0.1},
        "cache": {"blocks_per_shard": 4},
        "student": {"kind": "pruned", "model": str(teacher), "num_layers": 1},
        "train": {"blocks_per_step": 6, "micro_batch_blocks": 1, "precision": "float32"},
        "evaluation": {"dtype": "float32", "batch_size": 2, "max_length": 64},
    }


def write_tiny_yaml(folder: Path, teacher: Path, corpus: Path) -> Path:
    """Write the tiny experiment (4 training steps), which runs in folder / "run", as YAML."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(folder / "run", teacher, corpus)))
    return path


@pytest.fixture
def tiny_yaml(tmp_path: Path, tiny_teacher: Path, corpus: Path) -> Path:
    """YAML file of the tiny experiment, whose run folder is tmp_path / "run"."""
    return write_tiny_yaml(tmp_path, tiny_teacher, corpus)


@pytest.fixture
def tiny_config(tiny_yaml: Path) -> ConfigMaker:
    """Call it with dotted overrides to get the tiny experiment."""
    return lambda *overrides: load(tiny_yaml, overrides)


@pytest.fixture(scope="session")
def written_cache(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, corpus: Path
) -> Path:
    """Folder with the complete caches `train` and `held_out` of the tiny experiment: copy it."""
    folder = tmp_path_factory.mktemp("written")
    assert capture(load(write_tiny_yaml(folder, tiny_teacher, corpus)))
    return folder / "run" / "cache"


@pytest.fixture
def cache_copy(written_cache: Path, tmp_path: Path) -> Path:
    """A copy of `written_cache` for the experiment of `tiny_config`, which may be damaged."""
    return Path(shutil.copytree(written_cache, tmp_path / "run" / "cache"))


def make_manifest(targets: dict[str, Any], vocab_size: int, blocks_per_shard: int) -> Manifest:
    """Manifest of a made-up cache; `write_cache` fills in what its blocks say."""
    return Manifest(
        split="train",
        teacher={"model": "made-up", "revision": None, "weights": None, "dtype": "float32"},
        tokenizer={"fingerprint": "0" * 64, "vocab_size": vocab_size},
        padded_vocab_size=vocab_size,
        data={"settings": {}, "files": {}, "blocks": ""},
        targets=targets,
        seed=0,
        head_step_nats=fmt.head_step_nats(targets),
        block_length=2,
        num_blocks=1,
        blocks_per_shard=blocks_per_shard,
        num_rows=0,
        versions={},
    )


def write_cache(
    url: str, manifest: Manifest, blocks: list[Block], targets: list[SparseTargets]
) -> Manifest:
    """Write a complete cache of given blocks and of their targets (all rows, masked ones empty)."""
    folder = Folder(url)
    spool = BlockSpool(folder, manifest.blocks_per_shard)
    for block in blocks:
        spool.add(block)
    known = manifest.as_dict() | {
        "data": manifest.data | {"blocks": spool.finish()},
        "block_length": len(blocks[0].input_ids_T),
        "num_blocks": spool.num_blocks,
        "num_rows": spool.num_rows,
    }
    manifest = Manifest(**known)
    write_manifest(folder, manifest)
    writer = ShardWriter(folder, manifest)
    for shard in writer.pending():
        places = manifest.shard_blocks(shard)
        own = [targets[place] for place in places]
        writer.write(shard, writer.read_blocks(shard), concatenate(own))
    assert writer.seal()
    return manifest


def folder_bytes(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Relative name and bytes of every file below a folder, in order of names."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder)), path.read_bytes()
