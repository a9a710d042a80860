"""Text and chats into token ids with a loss mask. Shape suffix: T tokens."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distill.config import SourceConfig
from distill.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize_documents(
    wanted: list[tuple[str, SourceConfig, Any]], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Yield ids [T], end of text included, and loss mask [T] of each (split, source, item)."""
    texts = [item for _, source, item in wanted if source.format == "text"]
    encoded = iter(tokenizer(texts, verbose=False)["input_ids"] if texts else [])
    end = end_id(tokenizer)
    for _, source, item in wanted:
        if source.format == "text":
            ids = np.array([*next(encoded), end], dtype=np.int32)
            yield ids, np.ones(len(ids), dtype=np.bool_)
        else:
            yield tokenize_chat(item, tokenizer)


def tokenize_chat(
    messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Apply the tokenizer's chat template; only what the assistant says counts.

    Uses the template's `{% generation %}` spans where it has them; otherwise each assistant turn is
    what its addition appends to the prompt before it.

    Raises:
        ConfigError: there is no template, or it rewrites earlier turns so that no span can be told.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise ConfigError("data.sources: format is chat, but the tokenizer has no chat template.")
    if "{% generation" in template or "{%- generation" in template:
        made = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        return np.array(made["input_ids"], np.int32), np.array(made["assistant_masks"], np.bool_)
    full: list[int] = tokenizer.apply_chat_template(messages, return_dict=False)
    mask = np.zeros(len(full), dtype=np.bool_)
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(
            messages[:place], add_generation_prompt=True, return_dict=False
        )
        after = tokenizer.apply_chat_template(messages[: place + 1], return_dict=False)
        if after[: len(before)] != before or full[: len(after)] != after:
            raise ConfigError(
                "data.sources: the chat template rewrites earlier turns, so the assistant's tokens "
                "cannot be told apart.\n  Give a template with {% generation %} spans."
            )
        mask[len(before) : len(after)] = True
    return np.array(full, np.int32), mask


def end_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the id of the end-of-text token.

    Raises:
        ConfigError: the tokenizer has none.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigError("the tokenizer has no end-of-text token, which separates documents.")
    return int(end)
