import itertools
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.config import DataConfig, parse
from distill.data import SPLITS, Block, make_blocks
from distill.errors import ConfigError
from distill.tokens import tokenize_chat
from tests.conftest import CHAT_TEMPLATE, EOS, make_documents, make_tokenizer

_FILES = itertools.count()
CONVERSATION = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ciao"},
]


def source(folder: Path, items: list[Any], **settings: Any) -> dict[str, Any]:
    """A source of documents in a new file; `datasets` caches by name, so no name comes twice."""
    path = folder / f"{next(_FILES)}.parquet"
    pq.write_table(pa.table({settings.get("column", "text"): items}), path)
    return {"path": "parquet", "data_files": [str(path)]} | settings


def config(*sources: dict[str, Any], **settings: Any) -> DataConfig:
    defaults = {"block_length": 10, "held_out_fraction": 0.2, "held_out_blocks": None}
    return parse(DataConfig, defaults | settings | {"sources": sources}, "test")


def pack(data: DataConfig, tokenizer: Any, seed: int = 0) -> dict[str, list[Block]]:
    blocks: dict[str, list[Block]] = {split: [] for split in SPLITS}
    for split, block in make_blocks(data, tokenizer, seed):
        assert block.block_id == len(blocks[split])
        blocks[split].append(block)
    return blocks


def is_held_out(text: str, seed: int, fraction: float = 0.2) -> bool:
    return int(sha256(f"{seed}\n{text}".encode()).hexdigest()[:16], 16) < fraction * 2**64


def seed_that_holds_out(chosen: str, documents: list[str]) -> int:
    wanted = [text == chosen for text in documents]
    return next(s for s in range(10_000) if [is_held_out(t, s) for t in documents] == wanted)


def documents_of(blocks: list[Block], tokenizer: Any) -> list[str]:
    tokens = [i for block in blocks for i in block.input_ids_T[block.loss_mask_T].tolist()]
    return [text for text in tokenizer.decode(tokens).split(EOS) if text]


def test_rows_line_up_with_the_tokens_they_predict(tmp_path: Path, tiny_tokenizer: Any) -> None:
    documents = ["abcdefghijkl", "xy", "pqrstuvw", "held out"]
    seed = seed_that_holds_out("held out", documents)
    block = pack(config(source(tmp_path, documents)), tiny_tokenizer, seed)["train"][1]
    tokens = tiny_tokenizer.convert_ids_to_tokens(block.input_ids_T.tolist())
    counts = block.row_mask()
    segments = np.repeat(range(len(block.segment_lengths)), block.segment_lengths)
    labels = [t if c else "-" for t, c in zip(tokens[1:], counts, strict=True)]
    # The end of one document, a whole one, the start of a third.
    assert tokens == ["k", "l", EOS, "x", "y", EOS, "p", "q", "r", "s"]
    assert segments.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert block.position_ids().tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3]
    assert labels == ["l", EOS, "-", "y", EOS, "-", "q", "r", "s"]
    assert counts.tolist() == [1, 1, 0, 1, 1, 0, 1, 1, 1]
    assert block.loss_mask_T.tolist() == [1] * 10


def test_long_document_goes_on_in_the_next_block_as_a_segment_of_its_own(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    documents = ["abcdefghijklmnopqrstuvwx", "held out"]
    seed = seed_that_holds_out("held out", documents)
    blocks = pack(config(source(tmp_path, documents)), tiny_tokenizer, seed)["train"]
    assert [block.segment_lengths.tolist() for block in blocks] == [[10], [10], [5, 5]]
    assert [block.position_ids()[0] for block in blocks] == [0, 0, 0]
    assert documents_of(blocks, tiny_tokenizer) == documents[:1]


def test_last_block_is_filled_with_end_tokens_that_never_count(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    documents = ["abc", "held out"]
    seed = seed_that_holds_out("held out", documents)
    (block,) = pack(config(source(tmp_path, documents)), tiny_tokenizer, seed)["train"]
    assert tiny_tokenizer.decode(block.input_ids_T) == "abc" + EOS * 7
    assert block.segment_lengths.tolist() == [4, 6]
    assert block.loss_mask_T.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert block.row_mask().tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]


def test_held_out_choice_depends_on_text_and_seed_alone(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    documents = make_documents(500, seed=1)

    def split(order: list[str], seed: int) -> dict[str, list[str]]:
        blocks = pack(config(source(tmp_path, order), block_length=64), tiny_tokenizer, seed)
        return {name: documents_of(found, tiny_tokenizer) for name, found in blocks.items()}

    first, reordered, other = split(documents, 0), split(documents[::-1], 0), split(documents, 1)
    assert {k: sorted(v) for k, v in first.items()} == {k: sorted(v) for k, v in reordered.items()}
    assert not set(first["train"]) & set(first["held_out"])
    assert set(first["train"]) | set(first["held_out"]) == set(documents)
    assert 70 < len(first["held_out"]) < 130  # of 500 at 0.2: 100, standard deviation 9
    assert set(first["held_out"]) != set(other["held_out"])


def test_reading_stops_where_both_splits_are_full(tmp_path: Path, tiny_tokenizer: Any) -> None:
    # Nobody can tokenize what follows; nobody tries.
    documents = [*make_documents(600, seed=2), *[None] * 600]
    data = config(source(tmp_path, documents), train_blocks=5, held_out_blocks=3)
    blocks = pack(data, tiny_tokenizer)
    assert {split: len(found) for split, found in blocks.items()} == {"train": 5, "held_out": 3}


def test_mix_respects_weights_and_uses_every_source(tmp_path: Path, tiny_tokenizer: Any) -> None:
    letters = {"a": 1.0, "b": 3.0, "c": 4.0}
    sources = [
        source(tmp_path, [f"{letter}{n}" for n in range(2000)], weight=weight)
        for letter, weight in letters.items()
    ]
    data = config(*sources, train_blocks=300, held_out_blocks=10)
    found = documents_of(pack(data, tiny_tokenizer)["train"], tiny_tokenizer)
    assert len(found) > 500
    for letter, weight in letters.items():
        share = sum(text.startswith(letter) for text in found) / len(found)
        assert share == pytest.approx(weight / 8, abs=0.06)


def test_chats_and_texts_can_be_mixed(tmp_path: Path, tiny_tokenizer: Any) -> None:
    chats = [[*CONVERSATION[:2], {"role": "assistant", "content": f"ok{n}"}] for n in range(50)]
    talk = source(tmp_path, chats, format="chat", column="messages")
    texts = source(tmp_path, [f"text{n}" for n in range(50)])
    blocks = pack(config(talk, texts), tiny_tokenizer)
    found = {text for split in SPLITS for text in documents_of(blocks[split], tiny_tokenizer)}
    assert found == {f"{kind}{n}" for kind in ("ok", "text") for n in range(50)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"column": "body"}, r"data\.sources\.1\.column: .* has no column 'body', only text"),
        ({"data_files": ["absent.parquet"]}, r"data\.sources\.1: cannot open 'parquet': .*absent"),
        ({"split": "dev"}, r"data\.sources\.1: cannot open 'parquet': .*dev"),
        ({"path": "no/such-data"}, r"data\.sources\.1: cannot open 'no/such-data'"),
    ],
)
def test_source_that_cannot_be_opened_is_named_with_its_setting(
    tmp_path: Path,
    tiny_tokenizer: Any,
    change: dict[str, Any],
    message: str,
) -> None:
    good, other = source(tmp_path, ["a"]), source(tmp_path, ["b"])
    with pytest.raises(ConfigError, match=message):
        pack(config(good, other | change), tiny_tokenizer)


@pytest.mark.parametrize("split", SPLITS)
def test_split_without_documents_is_refused(
    tmp_path: Path, tiny_tokenizer: Any, split: str
) -> None:
    seed = next(s for s in range(100) if is_held_out("a text", s) == (split == "train"))
    with pytest.raises(ConfigError, match=rf"no {split} block of 10 tokens.*\n.*fraction.*0\.2"):
        pack(config(source(tmp_path, ["a text"])), tiny_tokenizer, seed)


@pytest.mark.parametrize(
    ("items", "settings"),
    [
        (["good", None], {}),
        ([1, 2], {}),
        ([CONVERSATION], {}),
        (["a text"], {"format": "chat"}),
        ([[{"from": "user", "value": "hi"}]], {"format": "chat"}),
    ],
    ids=["null", "numbers", "chat as text", "text as chat", "other keys"],
)
def test_column_of_something_else_is_refused_by_its_setting(
    tmp_path: Path,
    tiny_tokenizer: Any,
    items: list[Any],
    settings: dict[str, Any],
) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.0"):
        pack(config(source(tmp_path, items, **settings)), tiny_tokenizer)


def test_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-text token"):
        pack(config(source(tmp_path, ["a"])), tokenizer)


def test_only_what_the_assistant_says_counts(tiny_tokenizer: Any) -> None:
    ids, mask = tokenize_chat(CONVERSATION, tiny_tokenizer)
    assert tiny_tokenizer.decode(ids) == (
        f"<system>be brief{EOS}<user>hi{EOS}<assistant>hello{EOS}<user>bye{EOS}<assistant>ciao{EOS}"
    )
    assert tiny_tokenizer.decode(ids[mask]) == f"hello{EOS}ciao{EOS}"


@given(
    turns=st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text("ab é", max_size=4)))
)
@settings(max_examples=50, deadline=None)
def test_generation_spans_and_prefixes_agree_token_for_token(
    tiny_tokenizer: Any,
    span_tokenizer: Any,
    turns: list[tuple[str, str]],
) -> None:
    messages = [{"role": role, "content": text} for role, text in [("user", "start"), *turns]]
    by_prefix = tokenize_chat(messages, tiny_tokenizer)
    by_span = tokenize_chat(messages, span_tokenizer)
    assert by_prefix[0].tolist() == by_span[0].tolist()
    assert by_prefix[1].tolist() == by_span[1].tolist()


def test_chat_rows_count_where_the_label_is_the_assistants(
    tmp_path: Path, span_tokenizer: Any
) -> None:
    chats = source(tmp_path, [CONVERSATION] * 2, format="chat")
    length = 2 * len(tokenize_chat(CONVERSATION, span_tokenizer)[0])
    _, block = next(make_blocks(config(chats, block_length=length), span_tokenizer, 0))
    labels = block.input_ids_T[1:][block.row_mask()]
    assert span_tokenizer.decode(labels) == f"hello{EOS}ciao{EOS}" * 2


def test_template_that_rewrites_earlier_turns_is_refused() -> None:
    shortened = CHAT_TEMPLATE.replace(
        "message['content']", "(message['content'] if loop.last else '...')"
    )
    with pytest.raises(ConfigError, match=r"rewrites earlier turns.*\n.*generation"):
        tokenize_chat(CONVERSATION, make_tokenizer(shortened))


def test_missing_chat_template_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"data\.sources: format is chat, .* no chat template"):
        tokenize_chat(CONVERSATION, tokenizer)


@given(
    documents=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=20),
    block_length=st.integers(2, 40),
    seed=st.integers(0, 2**32),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_segments_of_a_split_are_its_documents_in_order(
    tmp_path: Path,
    tiny_tokenizer: Any,
    documents: list[str],
    block_length: int,
    seed: int,
) -> None:
    data = config(source(tmp_path, documents), block_length=block_length)
    blocks: dict[str, list[Block]] = {split: [] for split in SPLITS}
    empty = None
    try:
        for split, block in make_blocks(data, tiny_tokenizer, seed):
            blocks[split].append(block)
    except ConfigError as error:
        empty = next(split for split in SPLITS if f"no {split} block" in str(error))
    for split in SPLITS:
        own = [text for text in documents if is_held_out(text, seed) == (split == "held_out")]
        end = [tiny_tokenizer.eos_token_id]
        tokens = [i for text in own for i in tiny_tokenizer(text)["input_ids"] + end]
        if len(tokens) % block_length == 1:
            tokens.pop()  # a lone last token would have no row
        found = [i for block in blocks[split] for i in block.input_ids_T[block.loss_mask_T]]
        if empty == "train" and split == "held_out":  # refused before its last block was filled up
            del tokens[len(tokens) // block_length * block_length :]
        assert found == tokens
        assert all(block.segment_lengths.sum() == block_length for block in blocks[split])
