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
    arms, gap = result["arms"], result["gap"]
    assert all(found["ce_nats"]["n"] == 3 for found in arms.values())
    ce = {name: found["ce_nats"]["mean"] for name, found in arms.items()}
    ece = {name: found["ece"]["mean"] for name, found in arms.items()}
    share = {
        n: found["share_of_gap"]["mean"] for n, found in arms.items() if "share_of_gap" in found
    }
    assert gap == {"ce": "ce_tenth_rate", "dense": "dense"}
    cut = {k: arms[f"top_k_{k}_none"] for k in (5, 12, 50)}
    assert [f"{100 * found['ece']['mean']:.1f}" for found in cut.values()] == ["8.9", "5.6", "2.9"]
    for found in cut.values():
        assert found["share_of_gap"]["mean"] < -10 * found["share_of_gap"]["stderr"]
    for k in (5, 12, 50):
        assert ce[f"top_k_{k}_label"] < ce[f"top_k_{k}_bucket"] < ce[f"top_k_{k}_none"]
        assert ece[f"top_k_{k}_bucket"] < ece[f"top_k_{k}_label"] < ece[f"top_k_{k}_none"]
    for k in (5, 12, 50):
        assert ce[f"top_k_{k}_uniform"] > ce[f"top_k_{k}_none"] + 0.05
        assert abs(ce[f"top_k_{k}_renormalised"] - ce[f"top_k_{k}_none"]) < 0.012
    assert ce["dense_third_rate"] > ce["dense"] + 0.02
    drawn = [f"{kind}_{number}" for kind in ("sampled", "threshold") for number in (5, 12, 25)]
    for number in (12, 25):
        best = min(value for name, value in ce.items() if name.startswith("top_k"))
        assert max(ce[f"sampled_{number}"], ce[f"threshold_{number}"]) < best
    for name in drawn:
        assert abs(ece[name] - ece["dense"]) < 0.002
        acceptance = arms[name]["acceptance"]["mean"]
        assert arms[gap["ce"]]["acceptance"]["mean"] < acceptance
        assert acceptance < arms["dense"]["acceptance"]["mean"]
    assert f"{100 * arms[gap['ce']]['ece']['mean']:.1f}" == "1.0"
    assert max(value for name, value in share.items() if name.startswith("top_k")) < -0.2
    assert max(share["sampled_5"], share["threshold_5"]) < -0.4
    for kind in ("sampled", "threshold"):
        assert abs(share[f"{kind}_12"]) < arms[f"{kind}_12"]["share_of_gap"]["stderr"]
        assert f"{100 * share[f'{kind}_25']:.0f}" == "40"
    before = result["pretrained"]["ce_nats"]["mean"]
    assert 0.05 < before - ce["dense"] < 0.06
    assert ce["threshold_5"] > ce["sampled_5"] + 0.005
    assert all(abs(ce[f"threshold_{n}"] - ce[f"sampled_{n}"]) < 0.006 for n in (12, 25))
    assert abs(ce["ce_tenth_rate"] - before) < 0.005
    assert before + 0.005 < ce["ce_third_rate"] < ce["ce"]
    agreement = [found["agreement"]["mean"] for found in arms.values()]
    assert max(agreement) - min(agreement) < 0.02


def test_committed_gradients_support_what_the_page_says() -> None:
    gradients = json.loads((ROOT / "results" / "sparse_kd.json").read_text())["gradients"]

    def angle(arm: str, blocks: int) -> float:
        return float(gradients[arm][str(blocks)]["angle_degrees"]["mean"])

    for number in (5, 12, 25):
        for blocks in (1, 8, 32):
            assert angle(f"threshold_{number}", blocks) < angle(f"sampled_{number}", blocks)
        for kind in ("threshold", "sampled"):
            assert angle(f"{kind}_{number}", 8) < 0.75 * angle(f"{kind}_{number}", 1)
            assert angle(f"{kind}_{number}", 32) < 0.8 * angle(f"{kind}_{number}", 1)
    for k in (5, 12, 50):
        for tail in ("none", "bucket", "label"):
            angles = [angle(f"top_k_{k}_{tail}", blocks) for blocks in (1, 8, 32)]
            assert angles[2] > 1.5 * max(angles[:2])
    for number in (5, 12, 25):
        by_id = [
            gradients[f"{kind}_{number}"]["32"]["id_angle_degrees"]
            for kind in ("threshold", "sampled")
        ]
        assert abs(by_id[0]["mean"] - by_id[1]["mean"]) < by_id[0]["stderr"]


def test_committed_repeats_support_what_the_page_says() -> None:
    repeated = json.loads((ROOT / "results" / "sparse_kd.json").read_text())["repeated"]

    def kl(arm: str, epochs: int) -> float:
        return float(repeated[arm][str(epochs)]["held_out"]["kl_nats"]["mean"])

    assert all(
        run["held_out"]["kl_nats"]["n"] == 3 for by in repeated.values() for run in by.values()
    )
    for kind in ("sampled_12", "threshold_12"):
        losses = [kl(kind, epochs) - kl("dense", epochs) for epochs in (1, 4, 16)]
        assert losses[0] == pytest.approx(0.015, abs=0.002)
        assert losses[1] == pytest.approx(0.05, abs=0.005)
        assert losses[2] == pytest.approx(0.17, abs=0.01)
        assert kl(kind, 1) < kl(kind, 4) < kl(kind, 16)
    assert kl("dense", 4) < kl("dense", 1) < kl("dense", 16)
    for epochs in (1, 4, 16):
        pair = [
            repeated[kind][str(epochs)]["held_out"]["kl_nats"]
            for kind in ("sampled_12", "threshold_12")
        ]
        assert abs(pair[0]["mean"] - pair[1]["mean"]) < max(found["stderr"] for found in pair)


def test_committed_losses_support_what_the_page_says() -> None:
    cases = json.loads((ROOT / "results" / "bench_losses.json").read_text())["cases"]
    assert len(cases) == 3
    for case in cases:
        ways = case["ways"]
        assert not [name for name, way in ways.items() if "error" in way]
        times = {name: way["cpu_over_ours"]["median"] for name, way in ways.items()}
        assert all(time > 1.05 for name, time in times.items() if not name.startswith("distill"))
        assert 1.04 < times["distill_small_chunks"] < 1.15
        peak = {name: way["peak_bytes_per_logit"] for name, way in ways.items()}
        is_low = case["dtype"] == "bfloat16"
        assert (peak["liger_small_chunks"] < peak["distill_small_chunks"]) == is_low
        if is_low:
            errors = {name: way["gradient_error"] for name, way in ways.items()}
            assert min(errors, key=errors.__getitem__) == "trl_top_64"
            assert 3 < times["trl_top_64"] < 4
            assert errors["liger_small_chunks"] > errors["distill_small_chunks"]
    ratio = case["hidden_size"] * 4 / case["rows"]
    assert ratio == 2.25  # of a float32 gradient of the weight, bytes a logit


def test_committed_scaling_supports_what_the_page_says() -> None:
    verbs = json.loads((ROOT / "results" / "bench_scaling.json").read_text())["verbs"]
    for found in verbs.values():
        rows = [size["rows"] for size in found["sizes"]]
        assert rows == [rows[0], 10 * rows[0], 100 * rows[0]]
        assert found["peak_ratio"] < 1.1
        assert abs(found["marginal_time_ratio"] - 1) < found["noise"] < 0.34
