"""What the HTML page shows, in plain values. No torch here.

`distill.evaluate.page_source.page_of` makes it from a leaderboard, and
`distill.evaluate.page.render_page` draws it, so that either can be tested without the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from distill.evaluate.measured import Estimate
from distill.evaluate.paired import Comparison
from distill.evaluate.results import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class PageMetric:
    """One number that a task gives every model."""

    name: str
    higher_is_better: bool | None
    is_share: bool
    """Shown in percent; differences in percentage points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTask:
    """One benchmark, the same for all models."""

    name: str
    metrics: tuple[PageMetric, ...]
    """The main one first; comparisons and items are of it."""
    num_documents: int
    settings: tuple[tuple[str, str], ...] = ()
    """Names and values of all that decides a score."""

    @property
    def main(self) -> PageMetric:
        """What stands for the task in charts."""
        return self.metrics[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageReliability:
    """How often tokens are right that a model predicts with a given confidence."""

    edges: tuple[float, ...]
    """Of the bins of confidence, from 0 to 1: one more than there are bins."""
    confidence: tuple[float | None, ...]
    """Mean of each bin; what an empty bin holds is not read."""
    accuracy: tuple[float | None, ...]
    """Share of right tokens of each bin; what an empty bin holds is not read."""
    count: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCost:
    """What it takes to run a model; None where it was not measured."""

    weight_bytes: float | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    peak_bytes: float | None = None
    over_teacher: Mapping[str, float]
    """Name of a field above -> its ratio to the teacher's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageRow:
    """One model."""

    name: str
    role: Role
    run: str
    num_parameters: int | None = None
    scores: Mapping[str, Mapping[str, Estimate]]
    """Task -> metric -> score; a model may lack tasks."""
    ce_nats: Estimate | None = None
    kl_nats: Estimate | None = None
    agreement: Estimate | None = None
    gap_recovered: float | None = None
    ece: Estimate | None = None
    """Expected calibration error, a share."""
    acceptance: Estimate | None = None
    """Expected share of tokens that speculative decoding accepts of this model."""
    reliability: PageReliability | None = None
    cost: PageCost | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PageAnswer:
    """What one model made of one item."""

    is_right: bool
    response: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PageItem:
    """One document of a task, with the answers of all models that saw it."""

    task: str
    doc_id: int
    prompt: str
    choices: tuple[str, ...] | None
    """None where the answer is free text."""
    target: str
    answers: Mapping[str, PageAnswer]
    """By name of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageModel:
    """Everything on the page; names of models and of tasks are unique."""

    runs: tuple[str, ...]
    rows: tuple[PageRow, ...]
    tasks: tuple[PageTask, ...]
    held_out_is_comparable: bool = True
    baseline: str | None = None
    comparisons: tuple[Comparison, ...] = ()
    items: tuple[PageItem, ...] = ()
    notes: tuple[str, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()

    def task(self, name: str) -> PageTask:
        """Find a task."""
        return next(task for task in self.tasks if task.name == name)
