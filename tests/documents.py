"""Code of a document: the fenced block that follows a comment with its name."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def code_block(document: str, name: str) -> str:
    """Return the only Python block of docs/DOCUMENT below `<!-- name -->`."""
    text = (ROOT / "docs" / document).read_text()
    (found,) = re.findall(rf"<!-- {name} -->\n```python\n(.*?)```", text, re.DOTALL)
    return str(found)


def run_blocks(document: str, *names: str) -> dict[str, Any]:
    """Run blocks one after the other in a namespace of their own, and return it."""
    namespace: dict[str, Any] = {"__name__": "documents"}
    for name in names:
        exec(compile(code_block(document, name), f"{document}, {name}", "exec"), namespace)
    return namespace
