"""Put the scores of a run into the cards of its students. No torch here."""

from pathlib import Path

from distill.evaluate import render
from distill.evaluate.columns import columns, notes
from distill.evaluate.leaderboard import Leaderboard
from distill.model_card import put_results

FOLDERS = {"initial": "initial", "student": "final"}
"""Role in the table -> folder below RUN_FOLDER/student."""


def update_cards(run_folder: Path, board: Leaderboard) -> None:
    """Write each student's scores, beside the teacher's, into its README.md.

    Raises:
        StorageError: the disk is full or read-only.
    """
    teachers = [model for model in board.models if model.role == "teacher"]
    for model in board.models:
        if model.role in FOLDERS:
            shown = (*teachers, model)
            table = render.markdown(columns(shown, held_out_is_comparable=False))
            lines = [line for line in notes(shown) if not line.startswith("Bold")]
            below = "".join(f"- {line}\n" for line in lines)
            put_results(run_folder / "student" / FOLDERS[model.role], f"{table}\n{below}")
