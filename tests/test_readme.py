"""Numbers in the README are those of the committed results."""

import json
import math

from scripts import bench_students
from scripts.keep_demo_results import KEPT, ROOT, with_results


def test_readme_shows_the_committed_results() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme == with_results(readme)


def test_committed_demo_repaired_half_of_the_damage() -> None:
    models = json.loads((KEPT / "results.json").read_text())["models"]
    ce = {model["name"]: model["fidelity"]["ce_nats"]["value"] for model in models}
    damage = ce["initial"] - ce["teacher"]
    assert damage > 0.5
    assert (ce["initial"] - ce["student"]) / damage > 0.4


def test_results_name_command_machine_and_versions() -> None:
    machine = json.loads((KEPT / "machine.json").read_text())
    assert machine["command"] == "make demo"
    assert {"cpu", "cores", "python"} <= machine.keys()
    assert "torch" in json.loads((KEPT / "results.json").read_text())["versions"]


def test_students_document_shows_the_committed_cuts() -> None:
    result = json.loads((ROOT / "results" / "students.json").read_text())
    document = (ROOT / "docs" / "students.md").read_text()
    assert f"a test compares them -->\n{bench_students.table(result)}<!-- end" in document
    assert result["cuts"].keys() == bench_students.CUTS.keys()
    for title, cut in bench_students.CUTS.items():
        assert result["cuts"][title]["settings"] == list(cut)
    assert {"command", "seed", "machine"} <= result.keys()


def test_committed_cuts_support_what_the_document_advises() -> None:
    cuts = json.loads((ROOT / "results" / "students.json").read_text())["cuts"]
    ce = {title: found["ce_nats"]["value"] for title, found in cuts.items()}
    for share in ("24 of 30", "18 of 30"):
        assert ce[f"{share} layers, influence"] < ce[f"{share} layers, spaced"]
    assert ce["24 of 30 layers, influence"] < ce["24 of 30 layers, loss"]
    for title in ce:
        if title.endswith("activation"):
            assert ce[title] < ce[title.replace("activation", "weight")]
    assert ce["1,024 of 1,536 MLP channels, weight"] > math.log(49_152)


def test_teachers_document_shows_the_committed_measurements() -> None:
    document = (ROOT / "docs" / "teachers.md").read_text()
    teacher = json.loads((ROOT / "results" / "bench_teacher.json").read_text())
    for found in teacher["capture_over_forward"].values():
        assert f"| {found['threshold']:.3f} / {found['top_k_64']:.3f} |" in document
    streamed = json.loads((ROOT / "results" / "bench_streamed.json").read_text())
    large = streamed["llama_8b_shape"]
    assert streamed["targets_are_equal"]
    for figure in (
        f"{streamed['streamed_over_resident']:.3f}",
        f"{large['distill']['peak_bytes'] / 1e9:.2f} GB",
        f"{100 * large['distill']['share_waiting']:.1f} %",
        f"{large['speed_over_accelerate']:.3f}",
        f"{large['speed_over_airllm']:.3f}",
        f"{large['predicted_over_measured']:.3f}",
    ):
        assert f"| {figure} |" in document


def test_training_document_shows_the_committed_measurements() -> None:
    document = (ROOT / "docs" / "training.md").read_text()
    long = json.loads((ROOT / "results" / "bench_long_block.json").read_text())
    peaks = {name: f"{size / 1e9:.1f} GB" for name, size in long["peak_bytes"].items()}
    assert f"peaks at {peaks['recomputed']}\nwith recomputation and at {peaks['kept']}" in document
    assert f"{long['logits_bytes'] / 1e9:.1f} GB" in document


def test_training_document_shows_how_the_head_compares() -> None:
    document = (ROOT / "docs" / "training.md").read_text().replace("\n", " ")
    small, large = json.loads((ROOT / "results" / "bench_head.json").read_text())["cases"]
    for key, words in (
        ("time_over_best_ce", "of the time"),
        ("memory_over_dense_ce", "of its memory"),
    ):
        assert f"{small[key]:.2f} and {large[key]:.2f} {words}" in document
