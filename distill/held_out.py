"""What the evaluations during a training decide: which weights are best, and when to stop."""

import math
from typing import Any

from distill.config import TrainConfig


class HeldOutRecord:
    """The lowest KL so far and when it was; part of every checkpoint."""

    def __init__(self, settings: TrainConfig) -> None:
        self._keeps_best, self._patience = settings.keep_best, settings.early_stop_evals
        self._best_kl, self._best_step, self._evals_since = math.inf, 0, 0

    def add(self, step: int, kl_nats: float) -> None:
        """Note the KL after `step` steps."""
        if kl_nats < self._best_kl:
            self._best_kl, self._best_step, self._evals_since = kl_nats, step, 0
        else:
            self._evals_since += 1

    @property
    def should_stop(self) -> bool:
        """Whether `train.early_stop_evals` evaluations in a row were no better."""
        return self._patience is not None and self._evals_since >= self._patience

    @property
    def step_to_keep(self) -> int | None:
        """The step whose checkpoint must stay: the best one, with `train.keep_best`."""
        return self._best_step or None if self._keeps_best else None

    def state_dict(self) -> dict[str, Any]:
        """For Accelerate's checkpoints."""
        return {"kl": self._best_kl, "step": self._best_step, "since": self._evals_since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._best_kl, self._best_step = state["kl"], state["step"]
        self._evals_since = state["since"]
