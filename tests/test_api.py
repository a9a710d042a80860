"""Public names: documented, and known to type checkers."""

import ast
import re
from pathlib import Path

import distill

ROOT = Path(__file__).parent.parent


def test_api_document_lists_every_public_name_once_and_no_other() -> None:
    listed = re.findall(r"^\| `(\w+)` \| \S", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == distill.__all__


def test_every_public_name_has_a_docstring() -> None:
    assert not [name for name in distill.__all__ if not getattr(distill, name).__doc__]


def test_type_checkers_see_every_public_name_where_it_is_loaded_from() -> None:
    tree = ast.parse((ROOT / "distill" / "__init__.py").read_text())
    (block,) = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    seen = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == distill._HOMES
