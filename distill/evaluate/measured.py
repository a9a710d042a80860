"""What was measured of one model, as its files hold it. No torch here."""

import math
from collections.abc import Collection
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from distill.evaluate.cost import Cost

Finite = Annotated[
    float | None,
    BeforeValidator(lambda x: None if isinstance(x, float) and not math.isfinite(x) else x),
]
"""A number, or None in place of NaN and infinity, which JSON does not have."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A measured number; None where it is not finite, or where its error is not known."""

    value: Finite
    stderr: Finite = None
    higher_is_better: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Rows in ten equally wide bins of confidence; see `distill.evaluate.calibration`."""

    count: tuple[int, ...]
    confidence: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]
    ece: float


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Measured over whole distributions; see `distill.evaluate.dense`."""

    kl_nats: Estimate
    agreement: Estimate
    acceptance: Estimate


@dataclass(frozen=True, kw_only=True)
class Closeness:
    """To the teacher, on the blocks of one held-out cache; means over rows."""

    num_rows: int
    ce_nats: Estimate
    kl_nats: Estimate
    agreement: Estimate
    num_documents: int | None = None
    bits_per_byte: Estimate | None = None
    acceptance: tuple[Estimate, Estimate] | None = None
    """Between the two, as far as a cache tells; see `exact`."""
    reliability: Reliability | None = None
    teacher_reliability: Reliability | None = None
    exact: Exact | None = None


@dataclass(frozen=True, kw_only=True)
class Fidelity(Closeness):
    """Closeness of one model to the teacher on the run's held-out cache, and on others."""

    identity: dict[str, Any]
    groups: dict[str, Closeness] = Field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """What must be equal for two models to be compared."""
        own = without(self.identity, ("model", "weights", "model_settings", "versions"))
        return {"num_rows": self.num_rows, **own}


@dataclass(frozen=True, kw_only=True)
class MeasuredCost(Cost):
    """Speed and memory of one model, and what they were measured with."""

    identity: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """What must be equal for two models to be compared: the machine above all."""
        return without(self.identity, ("weights", "model_settings"))


def without(identity: dict[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Return an identity without some of its parts."""
    return {key: value for key, value in identity.items() if key not in keys}
