import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from distill.config import ComparedModelConfig, CostConfig
from distill.errors import EvalError
from distill.evaluate.columns import columns, notes
from distill.evaluate.cost import Cost, describe_machine, keep_cost, measure_cost
from distill.evaluate.leaderboard import compare
from tests.run_folders import make_run

SETTINGS = CostConfig(prompt_tokens=48, new_tokens=8, batch_size=2, rounds=2)


@pytest.fixture(scope="module")
def cost(tiny_teacher: Path) -> Cost:
    return measure_cost(str(tiny_teacher), "float32", "cpu", SETTINGS)


@pytest.mark.slow
def test_size_is_that_of_the_weights(cost: Cost, tiny_teacher: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    assert cost.num_parameters == model.num_parameters()
    assert cost.weight_bytes == 4 * cost.num_parameters


@pytest.mark.slow
def test_speed_and_memory_are_of_their_order(cost: Cost) -> None:
    # Two layers of width 64 give thousands of tokens a second anywhere; a prompt goes in at once.
    assert 10 < cost.decode_tokens_per_second < cost.prefill_tokens_per_second < 1e8
    # The process has libraries of hundreds of megabytes, which do not count.
    assert cost.weight_bytes < cost.peak_bytes < 300e6


@pytest.mark.slow
def test_costs_are_kept_while_they_hold(tiny_teacher: Path, tmp_path: Path) -> None:
    target, lines = tmp_path / "cost.json", list[str]()

    def keep(**changes: Any) -> dict[str, Any]:
        known = {"dtype": "bfloat16", "device": "cpu", "settings": SETTINGS}
        weights = {"weights": changes.pop("weights", "W")}
        keep_cost(
            "tiny",
            ComparedModelConfig(path=str(tiny_teacher)),
            target,
            weights=weights,
            on_progress=lines.append,
            **{**known, **changes},
        )
        record: dict[str, Any] = json.loads(target.read_text())
        return record

    first = keep()
    assert first["weight_bytes"] == 2 * first["num_parameters"]
    assert first["rounds"] == SETTINGS.rounds
    assert first["identity"] == {
        "weights": "W",
        "dtype": "bfloat16",
        "device": "cpu",
        "settings": asdict(SETTINGS),
        "machine": describe_machine("cpu"),
    }
    assert keep() == first
    assert lines[-1] == "tiny: costs are there, skipped"
    assert keep(weights="other")["identity"] != first["identity"]


@pytest.mark.slow
def test_a_model_that_is_too_short_is_refused(tiny_teacher: Path) -> None:
    long = CostConfig(prompt_tokens=255, new_tokens=2)
    with pytest.raises(EvalError, match=r"asks for 257 tokens, but .* was made for 256"):
        measure_cost(str(tiny_teacher), "float32", "cpu", long)


def test_costs_are_described_without_torch() -> None:
    code = (
        "import sys; from distill.evaluate.cost import describe_machine; "
        "describe_machine('cpu'); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def put_cost(run: Path, model: str, weights: str, scale: int, **changes: Any) -> None:
    cost = Cost(
        num_parameters=1000,
        weight_bytes=3_420_000_000 // scale,
        prefill_tokens_per_second=1000.0 * scale,
        decode_tokens_per_second=10.0 * scale,
        peak_bytes=4_000_000_000 // scale,
    )
    identity = {
        "weights": weights,
        "dtype": "bfloat16",
        "device": "cpu",
        "settings": asdict(CostConfig()),
        "machine": {"processor": "P", "cores": 2},
    }
    record = {"identity": identity | changes, "rounds": 3, **asdict(cost)}
    (run / "eval" / model / "cost.json").write_text(json.dumps(record))


def cells(run: Path) -> dict[str, tuple[str, ...]]:
    models = compare([run]).models
    made = columns(models, held_out_is_comparable=True)
    return {column.title.replace("\n", " "): column.cells for column in made}


def test_the_table_shows_costs_against_the_teacher(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    put_cost(run, "teacher", "T", scale=1)
    put_cost(run, "student", "student of a", scale=2)
    shown = cells(run)
    assert shown["weights (GB)"] == ("3.42", "-", "1.71", "-")
    assert shown["prefill speed"] == ("1.00x", "-", "2.00x", "-")
    assert shown["decode speed"] == ("1.00x", "-", "2.00x", "-")
    assert shown["peak memory"] == ("1.00x", "-", "0.50x", "-")
    (note,) = [line for line in notes(compare([run]).models) if line.startswith("Speed")]
    assert "512 prompt tokens, 64 new ones" in note


def test_speeds_of_different_machines_are_not_compared(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    put_cost(run, "teacher", "T", scale=1)
    put_cost(run, "student", "student of a", scale=2, machine={"processor": "Q", "cores": 2})
    shown = cells(run)
    assert shown["weights (GB)"] == ("3.42", "-", "1.71", "-")
    assert shown["prefill speed"] == ("1.00x", "-", "-", "-")


def test_a_table_without_costs_has_no_columns_for_them(tmp_path: Path) -> None:
    assert not any("speed" in title for title in cells(make_run(tmp_path / "a")))


def test_costs_of_other_weights_than_the_scores_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    put_cost(run, "student", "older student", scale=2)
    with pytest.raises(EvalError, match=r"different weights"):
        compare([run])
