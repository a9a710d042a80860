"""A teacher in vLLM's engine: over one or many GPUs, or the nodes of a Ray cluster.

Every segment of a block is a request of its own, so that attention never crosses documents; what
follows its last row that counts is not sent. Targets are drawn inside the engine, see tap.py.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distill.config import TargetsConfig, TopKConfig, VllmTeacherConfig, to_tree
from distill.data import Block
from distill.errors import TeacherError
from distill.targets import SparseTargets, concatenate
from distill.teacher.selection import OnTokens, non_finite, tell_nobody
from distill.teacher.tap import BadRowError, make_order, unpack
from distill.teacher.vllm_engine import SHUTDOWN_SECONDS, TESTED_VERSIONS

_PROBE_TOKENS = 32
_PROBE_TOLERANCE_NATS = 0.5
"""Far more than two matrix products differ in bfloat16; rows of other tokens differ by more."""


@dataclass(slots=True)
class _Request:
    """A segment up to its last row that counts."""

    block_id: int
    first: int
    input_ids: list[int]
    counts: NDArray[np.bool_]
    targets: SparseTargets | None = None


@dataclass(slots=True)
class _Pending:
    """A block whose requests are with the engine."""

    block: Block
    requests: list[_Request] = field(default_factory=list)

    def is_done(self) -> bool:
        return all(request.targets is not None for request in self.requests)


class VllmTeacher:
    """Keeps the engine supplied with requests of the blocks ahead, and yields block after block.

    vLLM batches whatever waits, across blocks and shards: the floats of a row depend on its
    neighbours to rounding (its draws do not), so two captures agree to rounding only.
    """

    def __init__(
        self,
        engine: Any,
        config: VllmTeacherConfig,
        targets: TargetsConfig,
        seed: int,
        vocab_size: int,
    ) -> None:
        self._engine, self._config, self._targets = engine, config, targets
        self._keys = count()
        self._waiting: dict[int, _Request] = {}
        self._probe()
        self._install(targets, seed, vocab_size)

    def _install(self, targets: TargetsConfig, seed: int, vocab_size: int) -> None:
        arguments = (to_tree(targets), seed, vocab_size, self._config.head_chunk_tokens)
        reasons = self._engine.collective_rpc("distill_install", args=arguments)
        if any(reasons):
            raise _unknown_version(next(filter(None, reasons)))

    def _probe(self) -> None:
        """Compare the tap's rows of one short request with what vLLM itself says of it."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input

        every_column = self._engine.model_config.get_vocab_size()
        self._install(TopKConfig(kind="top_k", k=1), 0, every_column)
        num_tokens = min(_PROBE_TOKENS, self._engine.model_config.max_model_len - 1)
        order = make_order(next(self._keys), 0, 0, np.ones(num_tokens, dtype=bool))
        params = SamplingParams(
            temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False, extra_args=order
        )
        self._engine.add_request("0", tokens_input(list(range(num_tokens))), params)
        outputs: list[Any] = []
        while not outputs:
            outputs = [output for output in self._engine.step() if output.finished]
        data = next(filter(None, self._engine.collective_rpc("distill_take", args=([0],))))
        try:
            ours = unpack(data, 1.0, has_bucket=True).weights_N.log()[:-1]
        except BadRowError:
            return  # the real rows will say it, with their block
        theirs = [
            max(entry.logprob for entry in row.values()) for row in outputs[0].prompt_logprobs[1:]
        ]
        difference = float((ours - torch.tensor(theirs)).abs().max())
        if len(ours) != len(theirs) or not difference <= _PROBE_TOLERANCE_NATS:
            raise _unknown_version(
                f"its own log-probabilities and those of the tap differ by {difference:.3g} nats"
            )

    def score(
        self, groups: Iterable[Sequence[Block]], on_tokens: OnTokens = tell_nobody
    ) -> Iterator[SparseTargets]:
        """Yield the targets of each block in order; see `Teacher`.

        Raises:
            TeacherError: the engine died, or logits are not finite.
        """
        blocks = chain.from_iterable(groups)
        ahead: deque[_Pending] = deque()
        num_tokens, is_last = 0, False
        try:
            while True:
                while not is_last and num_tokens < self._config.tokens_in_flight:
                    block = next(blocks, None)
                    is_last = block is None
                    if block is not None:
                        ahead.append(self._send(block))
                        num_tokens += len(block.input_ids_T)
                if not ahead:
                    return
                while not ahead[0].is_done():
                    self._step()
                pending = ahead.popleft()
                num_tokens -= len(pending.block.input_ids_T)
                on_tokens(len(pending.block.input_ids_T))
                yield self._targets_of(pending)
        finally:
            self._forget_waiting()

    def close(self) -> None:
        """End the engine's processes, and what watches over them."""
        self._engine.engine_core.shutdown(SHUTDOWN_SECONDS)
        self._engine = None

    def _send(self, block: Block) -> _Pending:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input

        pending = _Pending(block)
        for request in _requests(block):
            key = next(self._keys)
            order = make_order(key, request.block_id, request.first, request.counts)
            # A token is sampled because vLLM gives none to requests for less.
            params = SamplingParams(temperature=0, max_tokens=1, detokenize=False, extra_args=order)
            self._engine.add_request(str(key), tokens_input(request.input_ids), params)
            self._waiting[key] = request
            pending.requests.append(request)
        return pending

    def _step(self) -> None:
        """Wait for the next step of the engine, and take the rows of what it finished."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            outputs = self._engine.step()
            keys = [int(output.request_id) for output in outputs if output.finished]
            if not keys:
                return
            taken = self._engine.collective_rpc("distill_take", args=(keys,))
        except EngineDeadError as error:
            raise TeacherError(
                f"vLLM's engine died while it ran {self._config.model}; its own message is above.\n"
                "  Finished shards are safe. Out of memory: lower teacher.gpu_memory_utilization, "
                "teacher.head_chunk_tokens or teacher.max_num_batched_tokens."
            ) from error
        (data,) = (part for part in taken if part is not None)
        try:
            joined = unpack(
                data, self._targets.temperature, has_bucket=self._targets.kind == "top_k"
            )
        except BadRowError as error:
            raise non_finite(self._config.model, error.block_id, error.row) from None
        starts_R = torch.cat([torch.zeros(1, dtype=torch.int64), joined.counts_R.cumsum(0)])
        first = 0
        for key in keys:
            request = self._waiting.pop(key)
            last = first + int(request.counts.sum())
            request.targets = joined.slice_rows(first, last, starts_R)
            first = last
        assert first == joined.num_rows, "the tap gave other rows than were asked for"

    def _targets_of(self, pending: _Pending) -> SparseTargets:
        parts = [request.targets for request in pending.requests if request.targets is not None]
        if not parts:
            is_top_k = self._targets.kind == "top_k"
            parts = [SparseTargets.empty(self._targets.temperature, has_bucket=is_top_k)]
        return concatenate(parts).scatter_rows(torch.from_numpy(pending.block.row_mask()))

    def _forget_waiting(self) -> None:
        """Withdraw what the engine has not finished: the reader stopped early."""
        from vllm.v1.engine.exceptions import EngineDeadError

        keys = list(self._waiting)
        self._waiting.clear()
        if keys:
            try:
                self._engine.abort_request([str(key) for key in keys])
                self._engine.collective_rpc("distill_drop", args=(keys,))
            except EngineDeadError:
                return  # and so did everything that it held


def _requests(block: Block) -> Iterator[_Request]:
    """Cut a block into segments, each up to its last row that counts; leave out those without."""
    mask = np.append(block.row_mask(), np.False_)
    ends = np.cumsum(block.segment_lengths)
    for first, end in zip(ends - block.segment_lengths, ends, strict=True):
        rows = np.flatnonzero(mask[first:end])
        if len(rows):
            last = first + rows[-1] + 1
            ids = block.input_ids_T[first:last].tolist()
            yield _Request(block.block_id, int(first), ids, mask[first:last])


def _unknown_version(reason: str) -> TeacherError:
    import vllm

    return TeacherError(
        f"teacher.kind=vllm does not fit the installed vLLM {vllm.__version__}: {reason}.\n"
        f"  It was tested with vLLM {', '.join(TESTED_VERSIONS)}: install that one (docs/vllm.md), "
        "or choose teacher.kind=resident or streamed."
    )
