"""What every result file says of its making, and how it tells ratios."""

import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path


def provenance(seed: int, leave_out: Sequence[str] = ()) -> dict[str, object]:
    """Describe this run: the command as it was typed, the seed, and the computer.

    Args:
        seed: What decides all random numbers.
        leave_out: Words of the command that do not matter for what was measured.
    """
    words = [word for word in sys.argv if word not in leave_out]
    return {"command": shlex.join(["python", *words]), "seed": seed, "machine": machine()}


def machine() -> dict[str, object]:
    """Describe the computer, as far as a reader needs to compare times."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Median, least and most of the rounds."""
    figures = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return {of: round(ratio, 3) for of, ratio in figures.items()}
