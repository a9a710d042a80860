"""A random model and lm-eval tasks that take milliseconds and need no network."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "the cat sat on a warm mat and then it went to look for some fish in the river"


def sentence(first: int, length: int) -> str:
    """Words of TEXT, other ones for every `first`."""
    words = TEXT.split()
    return " ".join(words[(first * 5 + at * (first + 1)) % len(words)] for at in range(length))


QUESTIONS: list[dict[str, Any]] = [
    {
        "question": sentence(number, 6),
        "choices": [sentence(number + choice, 1 + choice) for choice in range(3)],
        "answer": number % 3,
    }
    for number in range(8)
]


def save_model(folder: Path, seed: int) -> None:
    """Save a two-layer Llama with a token for every byte."""
    alphabet = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def task_yaml(name: str, data: Path, **changes: Any) -> dict[str, Any]:
    """Define a multiple-choice task over a file of QUESTIONS, apart from `changes`."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
        **changes,
    }


def write_tasks(folder: Path) -> Path:
    """Write tasks that work, tasks that fail, a group and a tag, with their data; return `folder`.

    It is made if it is not there.
    """
    folder.mkdir(exist_ok=True)
    choice, text = folder / "choice.jsonl", folder / "text.jsonl"
    choice.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    few = folder / "few.jsonl"
    few.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS[:3]))
    documents = [{"text": sentence(number, 25)} for number in range(5)]
    text.write_text("".join(json.dumps(document) + "\n" for document in documents))
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_choice": None,
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "bits_per_byte")],
        "num_fewshot": 0,
    }
    generate = {
        "output_type": "generate_until",
        "doc_to_choice": None,
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["z"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    # As Winogrande: the choice stands in the context, and what follows it is scored.
    in_context = {
        "doc_to_text": "answer",
        "doc_to_choice": "{{[question ~ ' one', question ~ ' two', question ~ ' three']}}",
        "doc_to_target": "ends here",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    yamls = {
        "tiny_choice": task_yaml("tiny_choice", choice, tag="tiny_tag"),
        "tiny_rolling": task_yaml("tiny_rolling", text, **rolling),
        "tiny_other": task_yaml("tiny_other", choice, doc_to_text="{{question}}", tag="tiny_tag"),
        "tiny_few": task_yaml("tiny_few", few),
        "tiny_generate": task_yaml("tiny_generate", choice, **generate),
        "tiny_winograd": task_yaml("tiny_winograd", choice, **in_context),
        # 1 // 0 at the second document: fails while it is scored, not when it is opened
        "bad_document": task_yaml("bad_document", choice, doc_to_text="{{1 // (answer - 1)}}"),
        "no_data": task_yaml("no_data", folder / "absent.jsonl"),
        "bad_template": task_yaml("bad_template", choice, doc_to_text="{{question | absent}}"),
        "tiny_group": {
            "group": "tiny_group",
            "task": [
                {"task": "tiny_choice", "doc_to_text": "Q: {{question}}"},
                {"group": "inner", "task": ["tiny_other"], "description": "Choose.\n"},
            ],
        },
        "tiny_by_size": {
            "group": "tiny_by_size",
            "task": ["tiny_few", "tiny_other"],
            "aggregate_metric_list": [
                {"metric": metric, "aggregation": "mean", "weight_by_size": True}
                for metric in ("acc", "acc_norm")
            ],
        },
        "tiny_by_task": {
            "group": "tiny_by_task",
            "task": ["tiny_few", "tiny_other"],
            "aggregate_metric_list": {
                "metric": "acc_norm",
                "aggregation": "mean",
                "weight_by_size": False,
            },
        },
        "bad_group": {"group": "bad_group", "task": [{"description": "no name"}]},
        "empty_group": {"group": "empty_group", "task": []},
    }
    for name, definition in yamls.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition))
    return folder
