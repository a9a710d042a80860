"""Settings of the students' model cards. No torch here."""

from pydantic.dataclasses import dataclass

from distill.config.base import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CardConfig:
    """What README.md, NOTICE and LICENSE of a student cannot know from the other sections."""

    name: str | None = None
    """Name to publish the student under; by default the run folder's, with a prefix where the
    teacher's licence wants one."""
    base_licence: str | None = None
    """Licence of `student.model`, where that is not the teacher."""
    licence_file: str | None = None
    """Copy of the licence that goes along with the student, where there is none beside the
    teacher's weights."""
