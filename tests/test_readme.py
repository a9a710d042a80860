"""Numbers in the README are those of the committed results."""

import json
import math
from pathlib import Path

import pytest

from scripts import bench_students, results_page
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


@pytest.mark.parametrize("page", results_page.PAGES, ids=lambda page: page.name)
def test_measured_tables_are_those_of_the_result_files(page: Path) -> None:
    text = page.read_text()
    assert "<!-- measured: " in text
    assert results_page.with_tables(text) == text


def test_a_mark_without_a_table_is_refused() -> None:
    with pytest.raises(KeyError, match="nonsense"):
        results_page.with_tables("<!-- measured: nonsense -->\n<!-- end of nonsense -->")


def test_an_edited_table_is_made_anew() -> None:
    mark = "<!-- measured: layouts -->\n{}<!-- end of layouts -->"
    edited = results_page.with_tables(mark.format("| ours | 1 byte a row |\n"))
    assert edited == mark.format(results_page.layouts())


def test_every_result_has_its_command_seed_and_machine() -> None:
    for file in (ROOT / "results").glob("*.json"):
        result = json.loads(file.read_text())
        assert {"cpu", "cores", "python"} <= result["machine"].keys(), file
        assert isinstance(result["seed"], int), file
        _, script, *_ = result["command"].split()
        assert (ROOT / script).is_file(), file


def test_committed_reproduction_supports_what_the_page_says() -> None:
    result = json.loads((ROOT / "results" / "sparse_kd.json").read_text())
    arms, seeds = result["arms"], 3
    assert all(found["ce_nats"]["n"] >= seeds - 1 for found in arms.values())
    ce = {name: found["ce_nats"]["mean"] for name, found in arms.items()}
    ece = {name: found["ece"]["mean"] for name, found in arms.items()}
    for k in (5, 12):
        assert ce[f"top_k_{k}_none"] > ce["ce"]
        assert ece[f"top_k_{k}_none"] > 3 * ece["ce"]
    for k in (5, 12, 50):
        assert ce[f"top_k_{k}_label"] < ce[f"top_k_{k}_bucket"] < ce[f"top_k_{k}_none"]
        assert ece[f"top_k_{k}_bucket"] < ece[f"top_k_{k}_label"] < ece[f"top_k_{k}_none"]
        if k < 50:
            assert ce[f"top_k_{k}_none"] > ce[f"top_k_{'12' if k == 5 else '50'}_none"]
    assert abs(ce["sampled_5"] - ce["top_k_50_bucket"]) < 0.01
    for kind in ("sampled", "threshold"):
        drawn = [ce[f"{kind}_{number}"] for number in (5, 12, 25)]
        assert drawn == sorted(drawn, reverse=True)
        assert drawn[-1] > ce["dense"] + 0.01
    assert max(ce, key=ce.__getitem__) == "top_k_12_uniform"
    assert ce["threshold_5"] > ce["sampled_5"] + 0.005
    assert abs(ce["threshold_12"] - ce["sampled_12"]) < 0.006
    assert result["pretrained"]["ce_nats"]["mean"] < ce["ce_tenth_rate"] < ce["ce"]
    assert arms["ce_tenth_rate"]["share_of_gap"]["mean"] > 0.5


def test_committed_gradients_support_what_the_page_says() -> None:
    gradients = json.loads((ROOT / "results" / "sparse_kd.json").read_text())["gradients"]

    def angle(arm: str, blocks: int) -> float:
        return float(gradients[arm][str(blocks)]["angle_degrees"]["mean"])

    for number in (5, 12, 25):
        for blocks in (1, 8, 32):
            assert angle(f"threshold_{number}", blocks) < angle(f"sampled_{number}", blocks)
        for kind in ("threshold", "sampled"):
            assert angle(f"{kind}_{number}", 32) < 0.75 * angle(f"{kind}_{number}", 1)
    for k in (12, 50):
        assert angle(f"top_k_{k}_bucket", 32) > angle(f"top_k_{k}_bucket", 1)
