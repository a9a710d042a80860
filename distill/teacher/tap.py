"""Inside vLLM's workers: logits become sparse targets where they are made.

vLLM gives out log-probabilities of the likeliest tokens only. The kinds of `targets` need the whole
distribution, at least for its entropy, and to send that to the host costs a megabyte a row. So the
engine is started with `TapExtension` on every worker, which draws on the device and keeps the few
ids of a row until the teacher takes them. This file is all that depends on vLLM's inner parts;
`unknown_runner` says whether they are as it expects.

Shape suffixes: R rows that count, N entries of all rows in turn, T positions, D hidden size.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors.torch import load, save
from torch import Tensor

from distill.config import TargetsConfig
from distill.draw import NonFiniteRowError, draw
from distill.targets import SparseTargets, concatenate
from distill.uniforms import row_uniforms

EXTENSION = "distill.teacher.tap.TapExtension"
"""Name under which vLLM's workers import the extension."""

_ORDER = "distill"
"""Key of our order in a request's `extra_args`, which vLLM carries and never reads."""

_TENSORS = (
    *("ids_N", "weights_N", "counts_R", "num_head_R"),
    *("tail_mass_R", "entropy_R", "log_normalisers_RJ"),
)
_FAILURE = "block and row"

_HOOK = "_get_prompt_logprobs_dict"
_HOOK_PARAMETERS = ["hidden_states", "num_scheduled_tokens"]
_RUNNER_PARTS = ("requests", "input_batch", "query_start_loc", "model")


def make_order(key: int, block_id: int, first: int, counts_T: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the `extra_args` of a request: which rows of its prompt to draw.

    Args:
        key: Under which its rows are taken.
        block_id: Block that the prompt is a part of.
        first: Position of the prompt's first token in the block.
        counts_T: True for each position of the prompt whose row counts.
    """
    order = {"key": key, "block": block_id, "first": first, "length": len(counts_T)}
    return {_ORDER: order | {"rows": np.packbits(counts_T).tobytes()}}


class BadRowError(Exception):
    """Logits of a row are NaN or infinite."""

    def __init__(self, block_id: int, row: int) -> None:
        super().__init__(block_id, row)
        self.block_id, self.row = block_id, row


def pack(targets: SparseTargets) -> bytes:
    """Turn targets into bytes, which every transport of vLLM carries."""
    tensors = {name: getattr(targets, name) for name in _TENSORS}
    tensors = {name: values for name, values in tensors.items() if values is not None}
    return save({name: _narrow(values).contiguous() for name, values in tensors.items()})


def unpack(data: bytes, temperature: float, *, has_bucket: bool) -> SparseTargets:
    """Inverse of `pack`.

    Raises:
        BadRowError: a row was not finite.
    """
    tensors = load(data)
    if _FAILURE in tensors:
        raise BadRowError(*tensors[_FAILURE].tolist())
    wide = {name: v.long() if v.dtype == torch.int32 else v for name, v in tensors.items()}
    return SparseTargets(**wide, temperature=temperature, has_bucket=has_bucket)


def _narrow(values: Tensor) -> Tensor:
    return values.int() if values.dtype == torch.int64 else values


def unknown_runner(runner: Any) -> str | None:
    """Say what differs from the model runner that the tap was written for; None if nothing does."""
    hook = getattr(runner, _HOOK, None)
    if hook is None:
        return f"{type(runner).__module__} has no {_HOOK}"
    parameters = list(inspect.signature(hook).parameters)
    if parameters != _HOOK_PARAMETERS:
        return f"{_HOOK} takes {parameters}, not {_HOOK_PARAMETERS}"
    missing = [name for name in _RUNNER_PARTS if not hasattr(runner, name)]
    if missing:
        return f"{type(runner).__name__} has no {', '.join(missing)}"
    if not hasattr(runner.model, "compute_logits"):
        return f"{type(runner.model).__name__} has no compute_logits"
    return None


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of one request in one step of the engine."""

    key: int
    block_id: int
    rows_R: NDArray[np.int64]
    """Rows of the block."""
    places_R: NDArray[np.int64]
    """Where their hidden states are in the step."""
    is_first: bool
    """The prompt begins here: what an interrupted pass left is void."""


@dataclass(slots=True)
class Tap:
    """Draws the ordered rows of every step, and keeps them until they are taken."""

    runner: Any
    targets: TargetsConfig
    seed: int
    vocab_size: int
    """True number of tokens; logits beyond it are left out of the softmax."""
    chunk_rows: int
    keeps: bool
    """Tensor-parallel workers all compute logits; one has them whole, and keeps the results."""
    _done: dict[int, list[SparseTargets]] = field(default_factory=dict)
    _failure: tuple[int, int] | None = None

    @torch.inference_mode()
    def collect(self, hidden_states_TD: Tensor, num_scheduled_tokens: Mapping[str, int]) -> None:
        """Draw the ordered rows among the tokens of this step.

        Args:
            hidden_states_TD: After the last norm, request after request.
            num_scheduled_tokens: Of each request in the step.
        """
        pieces = [
            piece
            for request, number in num_scheduled_tokens.items()
            if (piece := self._piece(request, number)) is not None
        ]
        self._done |= {piece.key: [] for piece in pieces if piece.is_first and self.keeps}
        pieces = [piece for piece in pieces if len(piece.rows_R)]
        if not pieces:
            return
        places_R = torch.from_numpy(np.concatenate([piece.places_R for piece in pieces]))
        hidden_RD = hidden_states_TD[places_R.to(hidden_states_TD.device)]
        uniforms_R = torch.cat(
            [row_uniforms(self.seed, p.block_id, int(p.rows_R[-1]) + 1)[p.rows_R] for p in pieces]
        )
        parts = []
        for first in range(0, len(hidden_RD), self.chunk_rows):
            rows = slice(first, first + self.chunk_rows)
            logits_RV = self.runner.model.compute_logits(hidden_RD[rows])
            if not self.keeps:
                continue
            logits_RV = logits_RV[:, : self.vocab_size]
            try:
                parts.append(draw(logits_RV, uniforms_R[rows], self.targets).to("cpu"))
            except NonFiniteRowError as error:
                self._fail(pieces, first + error.row)
        if hidden_RD.device.type != "cpu":
            torch.accelerator.synchronize(hidden_RD.device)  # the copies above do not wait
        if parts and self._failure is None:
            self._keep(pieces, concatenate(parts))

    def take(self, keys: Sequence[int]) -> bytes | None:
        """Return the rows of finished requests, and forget them; None if this worker has none."""
        if not self.keeps:
            return None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            return save({_FAILURE: torch.tensor(failure)})
        return pack(concatenate([part for key in keys for part in self._done.pop(key)]))

    def drop(self, keys: Sequence[int]) -> None:
        """Forget the rows of requests that nobody waits for any more."""
        for key in keys:
            self._done.pop(key, None)

    def _piece(self, request: str, number: int) -> _Piece | None:
        state = self.runner.requests[request]
        order = ((state.sampling_params and state.sampling_params.extra_args) or {}).get(_ORDER)
        if order is None:
            return None
        start = state.num_computed_tokens
        packed = np.frombuffer(order["rows"], dtype=np.uint8)
        counts = np.unpackbits(packed, count=order["length"]).astype(bool)
        positions = start + np.flatnonzero(counts[start : start + number])
        index = self.runner.input_batch.req_id_to_index[request]
        offset = int(self.runner.query_start_loc.np[index]) - start
        return _Piece(
            key=order["key"],
            block_id=order["block"],
            rows_R=order["first"] + positions,
            places_R=offset + positions,
            is_first=start == 0,
        )

    def _keep(self, pieces: Sequence[_Piece], drawn: SparseTargets) -> None:
        starts_R = torch.cat([torch.zeros(1, dtype=torch.int64), drawn.counts_R.cumsum(0)])
        first = 0
        for piece in pieces:
            last = first + len(piece.rows_R)
            if piece.key in self._done:  # else it was dropped meanwhile
                self._done[piece.key].append(drawn.slice_rows(first, last, starts_R))
            first = last

    def _fail(self, pieces: Sequence[_Piece], row: int) -> None:
        places = [(piece.block_id, int(r)) for piece in pieces for r in piece.rows_R]
        self._failure = self._failure or places[row]


class TapExtension:
    """What vLLM adds to each worker; called by name through `collective_rpc`."""

    model_runner: Any
    _distill_tap: Tap | None = None

    def distill_install(
        self, targets: dict[str, Any], seed: int, vocab_size: int, chunk_rows: int
    ) -> str | None:
        """Start to draw, or say why it cannot be done here."""
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        reason = unknown_runner(self.model_runner)
        if reason is not None:
            return reason
        tap = Tap(
            runner=self.model_runner,
            targets=TypeAdapter[TargetsConfig](TargetsConfig).validate_python(targets),
            seed=seed,
            vocab_size=vocab_size,
            chunk_rows=chunk_rows,
            keeps=get_pp_group().is_last_rank and get_tp_group().rank_in_group == 0,
        )
        own = getattr(type(self.model_runner), _HOOK).__get__(self.model_runner)

        def collect_and_go_on(hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
            tap.collect(hidden_states, num_scheduled_tokens)
            return own(hidden_states, num_scheduled_tokens)

        setattr(self.model_runner, _HOOK, collect_and_go_on)
        self._distill_tap = tap
        return None

    def distill_take(self, keys: list[int]) -> bytes | None:
        """See `Tap.take`."""
        assert self._distill_tap is not None
        return self._distill_tap.take(keys)

    def distill_drop(self, keys: list[int]) -> None:
        """See `Tap.drop`."""
        assert self._distill_tap is not None
        self._distill_tap.drop(keys)
