"""Fidelity files: exact measures, groups of held-out text, bits per byte; what is made anew."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from distill.cache.reader import open_cache
from distill.evaluate.compare import evaluate
from distill.evaluate.grouped import averaged_groups, group_columns
from distill.evaluate.kept_fidelity import text_bytes
from distill.evaluate.leaderboard import compare, write
from distill.evaluate.results import collect
from students import build_student, save_initial
from tests.conftest import ConfigMaker
from tests.run_folders import make_run

pytestmark = pytest.mark.usefixtures("cache_copy")


def evaluated(config: Any) -> dict[str, dict[str, Any]]:
    """The fidelity file of each model."""
    folder = evaluate(config, on_progress=lambda _: None)
    files = folder.glob("*/fidelity.json")
    return {path.parent.name: json.loads(path.read_text()) for path in files}


def test_whole_distributions_and_groups_are_measured_where_asked(
    tiny_config: ConfigMaker, tmp_path: Path
) -> None:
    plain = tiny_config()
    save_initial(plain, *build_student(plain))
    first = evaluated(plain)["initial"]
    assert first["exact"] is None
    assert first["groups"] == {}

    german = shutil.copytree(tmp_path / "run" / "cache" / "held_out", tmp_path / "german")
    config = tiny_config("evaluation.exact=true", f"evaluation.held_out.german={german}")
    found = evaluated(config)
    assert found["initial"]["exact"]["kl_nats"]["value"] > 0.1
    assert found["teacher"]["exact"]["kl_nats"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["teacher"]["exact"]["acceptance"]["value"] == pytest.approx(1)
    least, most = (bound["value"] for bound in found["initial"]["acceptance"])
    assert least <= found["initial"]["exact"]["acceptance"]["value"] <= most + 1e-3
    same = found["initial"]["groups"]["german"]
    assert same["kl_nats"] == found["initial"]["kl_nats"] == first["kl_nats"]

    board = compare([config.run_folder])
    write(board, tmp_path / "out")
    table = (tmp_path / "out" / "leaderboard.md").read_text()
    assert "german KL (nats)" in table
    page = (tmp_path / "out" / "leaderboard.html").read_text()
    assert "calibration error" in page


def test_bits_per_byte_are_the_cross_entropy_of_the_text(
    tiny_config: ConfigMaker, tiny_tokenizer: Any
) -> None:
    config = tiny_config()
    found = evaluated(config)["teacher"]
    cache = open_cache(config.cache_folder("held_out"))
    # A byte a token; only the end of a document has none.
    ends = sum(
        int((cache.block(n)[0].input_ids_T[1:][cache.block(n)[0].row_mask()] == 256).sum())
        for n in range(len(cache))
    )
    assert tiny_tokenizer.eos_token_id == 256
    assert text_bytes(cache, tiny_tokenizer) == cache.num_rows - ends
    nats = found["ce_nats"]["value"] * cache.num_rows
    wanted = nats / math.log(2) / (cache.num_rows - ends)
    assert found["bits_per_byte"]["value"] == pytest.approx(wanted)


def test_file_of_other_settings_is_made_anew_and_of_the_same_is_kept(
    tiny_config: ConfigMaker,
) -> None:
    lines: list[str] = []
    evaluate(tiny_config(), on_progress=lines.append)
    evaluate(tiny_config(), on_progress=lines.append)
    assert lines == ["teacher: fidelity is there, skipped"]
    evaluate(tiny_config("evaluation.exact=true"), on_progress=lines.append)
    assert len(lines) == 1


def test_group_that_is_averaged_stands_for_its_tasks(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    for model in ("teacher", "initial"):
        path = run / "eval" / model / "hellaswag.json"
        record = json.loads(path.read_text()) | {"group": "both", "weight_by_size": False}
        path.write_text(json.dumps(record))
        other = record | {"main_metric": "acc"}
        (run / "eval" / model / "hellaswag_2.json").write_text(json.dumps(other))
    models = collect(run)
    assert averaged_groups(models) == {"both": ["hellaswag", "hellaswag_2"]}
    column = group_columns(models, rivals=[1])[0]
    assert column.title == "both\nmean of 2\n(%)"
    assert column.cells[:2] == ("54.5 ± 1.5", "24.5 ± 1.5")
    assert column.cells[2] == "-"
    assert column.best == {1}
