"""How models and tasks of other people fail, as far as a run can go on without them."""

from aiohttp import ClientError
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from safetensors import SafetensorError

TASK_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError, ClientError, DatasetsError, TemplateError),
)
"""How a task fails, as tasks are other people's YAML, templates and functions: a name that is not
there, data that cannot be had, a package that is not installed, a perplexity beyond float64, a
device out of memory (RuntimeError), a server that answers no more, and what lm-eval asserts of its
users."""

MODEL_ERRORS = (*TASK_ERRORS, MemoryError, SafetensorError)
"""How a model fails to open; a weight file of nonsense asks for more memory than there is."""


def first_line(error: Exception) -> str:
    """Name the kind of an error and the first line of what it says, cut to 300 characters."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:300]}"
