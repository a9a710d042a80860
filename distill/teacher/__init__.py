"""Teachers: blocks in, sparse targets out. They know nothing about disk formats."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from distill.config import ExperimentConfig, StreamedTeacherConfig, VllmTeacherConfig
from distill.data import Block
from distill.draw import require_k_below
from distill.targets import SparseTargets
from distill.teacher.selection import OnTokens, Selection, tell_nobody


class Teacher(Protocol):
    """What capture needs of a teacher."""

    def score(
        self, groups: Iterable[Sequence[Block]], on_tokens: OnTokens = tell_nobody
    ) -> Iterator[SparseTargets]:
        """Yield the targets of each block in order, on the CPU.

        A block of L tokens gives L - 1 rows; those that do not count are empty. Draws depend on
        (seed, block id, row) alone.

        Args:
            groups: Blocks that belong together (those of a shard), read as they are needed; blocks
                of two groups never share a forward pass, so that a result does not depend on what
                else is asked for.
            on_tokens: Told how many tokens the work since the last call is worth; in the end, of
                all tokens of all groups.

        Raises:
            TeacherError: logits are NaN or infinite; teacher, block and row are named.
        """
        ...

    def close(self) -> None:
        """Release processes and engines; memory goes with the object."""
        ...


def open_teacher(config: ExperimentConfig, vocab_size: int) -> Teacher:
    """Load the configured teacher.

    Args:
        config: The experiment.
        vocab_size: True number of tokens; logits beyond it are left out of the softmax.

    Raises:
        ConfigError: a setting is wrong, or the teacher's engine is not installed.
        TeacherError: the teacher cannot be loaded, or targets.k is not below `vocab_size`.
    """
    teacher = config.teacher
    require_k_below(config.targets, vocab_size)
    if isinstance(teacher, VllmTeacherConfig):
        from distill.teacher.engine import VllmTeacher
        from distill.teacher.vllm_engine import start_engine

        engine = start_engine(teacher, config.data.block_length)
        return VllmTeacher(engine, teacher, config.targets, config.seed, vocab_size)
    chunk_rows = teacher.head_chunk_tokens
    selection = Selection(teacher.model, config.targets, config.seed, vocab_size, chunk_rows)
    if isinstance(teacher, StreamedTeacherConfig):
        from distill.teacher.streamed import StreamedTeacher

        return StreamedTeacher(teacher, selection)
    from distill.teacher.resident import ResidentTeacher

    return ResidentTeacher(teacher, selection)
