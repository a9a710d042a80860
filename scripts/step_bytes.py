"""Bytes of a training step: its peak, and what its graph keeps for the backward pass."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.profiler import ProfilerActivity, profile


def peak_bytes(compute: Callable[[], object]) -> int:
    """Most bytes of tensors made by `compute` that exist at a time, as torch's allocator counts.

    Unlike resident memory it is the same at every run: no pages that come late or are taken away.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compute()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    totals = [e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]"]
    return max(totals, default=0)


class Saved:
    """A tensor that a graph keeps; it lives as long as the graph needs it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(compute: Callable[[], Tensor], given: Sequence[Tensor]) -> dict[str, int]:
    """Bytes that wait for the backward pass: of all (""), and of those shaped like a leaf.

    Functions written in Python tell themselves what they hold, in or beside their saved tensors; of
    graphs without one, hooks see what is saved, and checkpoints hide what they drop. (Inside
    torch.func hooks are forbidden, so a fused function cannot be asked by hooks.)
    """
    loss = compute()
    written = [node for node in nodes(loss) if isinstance(node, BackwardCFunction)]
    held = [tensor for node in written for tensor in held_by(node)]
    if not written:
        saved: WeakSet[Saved] = WeakSet()

        def pack(tensor: Tensor) -> Saved:
            kept = Saved(tensor)
            saved.add(kept)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            loss = compute()
        held = [kept.tensor for kept in saved]
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in held}
    new = [tensor for pointer, tensor in storages.items() if pointer not in known]
    shapes = {tensor.shape for tensor in given if tensor.requires_grad}
    return {
        "": sum(tensor.untyped_storage().nbytes() for tensor in new),
        "_gradient": sum(t.untyped_storage().nbytes() for t in new if t.shape in shapes),
    }


def nodes(loss: Tensor) -> Iterator[Any]:
    """All steps of the backward pass."""
    waiting: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
            yield node


def held_by(node: Any) -> Iterator[Tensor]:
    """Tensors that a function written in Python keeps."""
    for value in (node.saved_tensors, *vars(node).values()):
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, Tensor):
                yield part
