import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distill.cache.reader import open_cache
from distill.config import ExperimentConfig, load
from distill.errors import ConfigError
from distill.estimate import Estimate, EstimateOptions, as_dict, describe, run
from distill.estimate.costs import DeviceCost
from distill.estimate.models import PUBLISHED, shape_of, weights_of
from distill.estimate.sizes import CacheSize, RowCount, cache_size
from distill.hardware import break_even_tokens, devices_needed, streamed_seconds
from tests.conftest import ConfigMaker

ROOT = Path(__file__).parent.parent
STREAM: dict[str, Any] = {
    "window_tokens": 1000,
    "flops_per_token": 2e9,
    "flop_rate": 1e12,
    "weight_bytes": 2e9,
    "first_layer_bytes": 1e8,
    "bytes_per_second": 1e9,
}
"""A window computes for 2 s, its weights take 2 s, and the first layer is waited for 0.1 s."""


def shipped(name: str, tmp_path: Path, *overrides: str) -> ExperimentConfig:
    """A shipped config whose run folder is empty."""
    return load(ROOT / "configs" / name, [f"run_folder={tmp_path}", *overrides])


def on(estimate: Estimate, device: str) -> DeviceCost:
    return next(found for found in estimate.devices if found.device == device)


def test_published_shapes_have_the_published_numbers_of_parameters() -> None:
    found = {size: shape.num_parameters for size, shape in PUBLISHED.items()}
    assert found == {"8b": 8_030_261_248, "70b": 70_553_706_496, "405b": 405_853_388_800}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"head_dim": 24}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 24, "attention_bias": True}),
    ],
)
def test_formula_counts_the_parameters_of_real_models(kind: str, more: dict[str, Any]) -> None:
    sizes = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, **sizes, **heads, **more)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(config, "here")
    embedding = 0 if config.tie_word_embeddings else 101 * 64
    assert shape.num_parameters == model.num_parameters()
    assert shape.multiplied_parameters == model.num_parameters() - embedding


def test_70b_config_costs_what_is_computed_by_hand(tmp_path: Path) -> None:
    found = run(shipped("llama31-70b-to-8b.yaml", tmp_path), EstimateOptions(pack_blocks=0))
    # (122,070 + 128) blocks of 4,096 tokens; a block of L tokens has L - 1 rows.
    assert found.rows.num_tokens == 500_523_008
    assert found.rows.num_rows == 122_198 * 4_095 == 500_400_810
    assert found.cache.num_shards == 1_908 + 2  # of 64 blocks
    # 70,553,706,496 parameters less the input embedding of 128,256 x 8,192 = 69,503,033,344.
    # Attention: 4 x 80 layers x 64 heads x 128 x 2,048 = 5,368,709,120.
    # 2 x 69,503,033,344 + 5,368,709,120 = 144,374,775,808 a token, x 500,523,008 = 7.22629e19.
    assert found.teacher.multiplied_parameters == 69_503_033_344
    assert found.teacher.forward_flops_per_token == 144_374_775_808
    assert found.teacher.flops == pytest.approx(7.22629e19, rel=1e-5)
    # 141.1 GB x 1.1 = 155.2 GB: two of 80 GB, two of 141 GB, one of 180 GB.
    assert [d.resident.devices for d in found.devices] == [2, 2, 2, 1]
    # H100: 7.22629e19 / (0.4 x 989e12) = 182,667 s = 50.74 h; device_map: one works at a time, so
    # 101.48 device-hours at $3. A100: 312 in place of 989: 160.84 h. B200: 2,250: 22.30 h.
    h100 = on(found, "H100")
    assert h100.resident.at_work == 1
    assert h100.resident.wall_hours == pytest.approx(50.74, abs=0.01)
    assert h100.resident.device_hours == pytest.approx(101.48, abs=0.01)
    assert h100.resident.dollars == pytest.approx(304.44, abs=0.01)
    assert on(found, "A100").resident.wall_hours == pytest.approx(160.84, abs=0.01)
    assert on(found, "B200").resident.wall_hours == pytest.approx(22.30, abs=0.01)
    # Streamed: a window of 262,144 tokens computes 95.7 s, its 139.0 GB take 23.2 s. So 182,667 s
    # and, for 1,910 windows, the first layer's 1.7113 GB / 6 GB/s = 0.285 s: 183,211 s, $3 an hour.
    assert h100.streamed.wall_hours == pytest.approx(183_211 / 3600, rel=1e-5)
    assert h100.streamed.dollars == pytest.approx(152.68, abs=0.01)
    assert h100.break_even_tokens == pytest.approx(63_482, abs=1)
    assert found.parked_bytes == 262_144 * 8_192 * 2
    # Student: 4 x (2 x 7,504,924,672 + 1,073,741,824) x 499,998,720 tokens = 3.21671e19. AdamW in
    # float32 takes 16 x 8.03e9 x 1.1 = 141.3 GB: two H100, 40,656 s, 22.59 device-hours.
    assert found.student.flops == pytest.approx(3.21671e19, rel=1e-5)
    assert (h100.student.devices, h100.student.at_work) == (2, 2)
    assert h100.student.device_hours == pytest.approx(22.59, abs=0.01)


def test_405b_config_costs_what_is_computed_by_hand(tmp_path: Path) -> None:
    found = run(shipped("llama31-405b-to-8b.yaml", tmp_path), EstimateOptions(pack_blocks=0))
    # FP8: the MLP (3 x 16,384 x 53,248) of all layers but the first and the last, 124 of 126.
    assert found.teacher.fp8_parameters == 124 * 2_617_245_696 == 324_538_466_304
    # One byte each, two for the other 81,314,922,496: 487.17 GB, x 1.1 = 535.9 GB.
    assert found.teacher.weight_bytes == 487_168_311_296
    assert [d.resident.devices for d in found.devices] == [8, 8, 4, 4]
    # 2 x 403,752,042,496 + 4 x 126 x 128 x 128 x 2,048 = 824,415,518,720 FLOPs a token.
    assert found.teacher.forward_flops_per_token == 824_415_518_720
    assert found.teacher.flops == pytest.approx(4.12639e20, rel=1e-5)
    # H100: 649.08e9 in FP8 / 791.6e12 + 175.34e9 / 395.6e12 = 1.26318 ms a token: 632,249 s.
    h100 = on(found, "H100")
    assert h100.resident.wall_hours == pytest.approx(175.62, abs=0.01)
    assert h100.resident.device_hours == pytest.approx(8 * 175.62, abs=0.1)
    assert h100.resident.dollars == pytest.approx(4_215, abs=1)
    # An A100 multiplies all of it in bfloat16: 824.4e9 / 124.8e12 = 6.606 ms a token.
    assert on(found, "A100").resident.wall_hours == pytest.approx(918.44, abs=0.01)
    # Streamed: 331 s a window against 80 s for 482.97 GB; the first layer is bfloat16, 6.3754 GB.
    seconds = 632_249.5 + 1_910 * 6.375408e9 / 6e9
    assert h100.streamed.wall_hours == pytest.approx(seconds / 3600, rel=1e-6)


def test_tensor_parallel_devices_share_the_time_and_cost_no_more(tmp_path: Path) -> None:
    options = EstimateOptions(pack_blocks=0, price=2.0)
    config = shipped("llama31-70b-to-8b.yaml", tmp_path, "teacher.device_map=null")
    job = on(run(config, options), "H100").resident
    assert (job.devices, job.at_work) == (2, 2)
    assert job.wall_hours == pytest.approx(50.74 / 2, abs=0.01)
    assert job.dollars == pytest.approx(50.74 * 2.0, abs=0.01)


@pytest.mark.parametrize("targets", ["{kind: top_k}", "{kind: threshold}", "{kind: sampled}"])
def test_everything_grows_linearly_with_the_blocks(tmp_path: Path, targets: str) -> None:
    def estimate(factor: int) -> Estimate:
        blocks = f"data.train_blocks={64_000 * factor}", f"data.held_out_blocks={640 * factor}"
        config = shipped("llama31-70b-to-8b.yaml", tmp_path, f"targets={targets}", *blocks)
        return run(config, EstimateOptions(pack_blocks=0))

    one, three = estimate(1), estimate(3)
    assert three.rows.num_rows == 3 * one.rows.num_rows
    assert three.cache.num_bytes == pytest.approx(3 * one.cache.num_bytes, abs=2)
    assert three.teacher.flops == pytest.approx(3 * one.teacher.flops)
    assert three.student.flops == pytest.approx(3 * one.student.flops)


def test_a_billion_rows_of_the_demo_extrapolate_its_cache_within_a_tenth(tmp_path: Path) -> None:
    demo = json.loads((ROOT / "results" / "smollm2-demo" / "inspect.json").read_text())
    found = size_of(shipped("smollm2-demo.yaml", tmp_path), demo["padded_vocab_size"], demo)
    assert found.num_bytes == pytest.approx(1e9 * demo["bytes_per_row"], rel=0.1)
    assert found.ids_per_row == pytest.approx(demo["ids_per_row"], rel=0.1)


@pytest.mark.parametrize("kind", ["threshold", "top_k_64", "sampled_50"])
def test_constants_agree_with_the_benchmark_within_a_tenth(kind: str, tmp_path: Path) -> None:
    bench = json.loads((ROOT / "results" / "bench_cache.json").read_text())
    name = kind.rstrip("_0123456789")  # the defaults are the benchmark's: tau 1/40, 64, 50 draws
    config = shipped("smollm2-demo.yaml", tmp_path, f"targets={{kind: {name}}}")
    found = size_of(config, bench["vocab_size"], {"num_tokens": 512, "num_rows": 511})
    assert found.ids_per_row == pytest.approx(bench["mean_ids"][kind], rel=0.1)
    assert found.bytes_per_row == pytest.approx(bench["bytes_per_row"][kind], rel=0.1)


def size_of(config: ExperimentConfig, vocab_size: int, like: dict[str, Any]) -> CacheSize:
    """Size of a cache of 1e9 rows of blocks like those of another cache."""
    share = like["num_rows"] / like["num_tokens"]
    blocks = round(1e9 / share / config.data.block_length)
    rows = RowCount(
        train_blocks=blocks,
        held_out_blocks=0,
        block_length=config.data.block_length,
        num_tokens=blocks * config.data.block_length,
        rows_per_token=share,
        num_rows=10**9,
        source="given",
    )
    return cache_size(config, rows, vocab_size, None)


def test_finished_shards_of_the_run_are_what_is_reported(
    tiny_config: ConfigMaker, cache_copy: Path
) -> None:
    found = run(tiny_config(), EstimateOptions())
    caches = [open_cache(str(cache_copy / split)) for split in ("train", "held_out")]
    assert found.rows.num_rows == sum(cache.manifest.num_rows for cache in caches)
    records = [record for cache in caches for record in cache.records]
    assert found.cache.num_bytes == pytest.approx(sum(r.num_bytes for r in records), abs=2)
    assert f"measured on {len(records)} finished shards" in found.cache.source
    other = run(tiny_config("targets.tau=0.2"), EstimateOptions())  # not what the cache is of
    assert other.cache.source.startswith("not measured")


def test_a_sample_scored_now_predicts_the_real_cache_within_a_tenth(
    tiny_config: ConfigMaker, written_cache: Path, tmp_path: Path
) -> None:
    found = run(tiny_config(), EstimateOptions(sample_blocks=8))
    caches = [open_cache(str(written_cache / split)) for split in ("train", "held_out")]
    records = [record for cache in caches for record in cache.records]
    assert found.cache.num_bytes == pytest.approx(sum(r.num_bytes for r in records), rel=0.1)
    num_rows = sum(cache.manifest.num_rows for cache in caches)
    assert found.rows.num_rows == pytest.approx(num_rows, rel=0.1)
    ids_per_row = sum(record.num_ids for record in records) / num_rows
    assert found.cache.ids_per_row == pytest.approx(ids_per_row, rel=0.1)
    assert not (tmp_path / "run").exists()  # nothing is left in the run folder


def test_rows_that_count_are_measured_on_a_few_packed_blocks(tiny_config: ConfigMaker) -> None:
    found = run(tiny_config(), EstimateOptions(pack_blocks=5))
    assert found.rows.source == "measured on 5 blocks of the data"
    assert found.rows.rows_per_token < 31 / 32  # documents of a sentence: many rows cross a border


def test_blocks_of_small_local_files_are_counted(
    tiny_config: ConfigMaker, written_cache: Path
) -> None:
    nulls = "data.train_blocks=null", "data.held_out_blocks=null"
    found = run(tiny_config(*nulls), EstimateOptions())
    train = open_cache(str(written_cache / "train")).manifest
    assert found.rows.source == "all of the data was packed"
    assert found.rows.train_blocks > train.num_blocks  # which was cut at 24


def test_blocks_that_cannot_be_counted_have_to_be_given(tmp_path: Path) -> None:
    config = shipped("llama31-70b-to-8b.yaml", tmp_path, "data.train_blocks=null")
    with pytest.raises(ConfigError, match=r"data\.train_blocks.*cannot be counted(?s:.*)Give both"):
        run(config, EstimateOptions())


def test_unknown_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    config = shipped("llama31-70b-to-8b.yaml", tmp_path, "teacher.model=nobody/knows-this")
    with pytest.raises(ConfigError, match=r"nobody/knows-this(?s:.*)not in the table(?s:.*)FOLDER"):
        run(config, EstimateOptions())
    with pytest.raises(ConfigError, match="model type 'gpt2'"):
        shape_of(AutoConfig.for_model("gpt2"), "teacher.model")


def test_modules_that_a_checkpoint_keeps_are_not_counted_as_quantised() -> None:
    shape = PUBLISHED["8b"]
    kept = ["q_proj", "model.layers.3"]
    settings = {"quant_method": "fp8", "modules_to_not_convert": kept}
    found = weights_of(settings, "bfloat16", "here")
    whole = sum(shape.linear_parameters.values())
    query = shape.linear_parameters["self_attn.q_proj"]
    assert found.quantised_parameters(shape) == 31 * (whole - query)
    with pytest.raises(ConfigError, match="does not tell the bits"):
        weights_of({"quant_method": "strange"}, "bfloat16", "here")


def test_streamed_time_is_linear_in_full_windows_and_loads_a_partial_one_whole() -> None:
    assert streamed_seconds(1_000, **STREAM) == pytest.approx(2.1)
    assert streamed_seconds(5_000, **STREAM) == pytest.approx(5 * 2.1)
    assert streamed_seconds(5_001, **STREAM) == pytest.approx(6 * 2.1)


def test_window_that_breaks_even_is_the_closed_form() -> None:
    flop_rate, link, parameter_bytes, parameters = 395.6e12, 6e9, 2, 70e9
    window = break_even_tokens(2 * parameters, flop_rate, parameter_bytes * parameters, link)
    assert window == pytest.approx(parameter_bytes * flop_rate / (2 * link))  # 65,933 tokens
    assert window * 2 * parameters / flop_rate == pytest.approx(parameter_bytes * parameters / link)
    # Below it a window takes the time of its weights, above it that of its computation.
    shorter, longer = STREAM | {"window_tokens": 500}, STREAM | {"window_tokens": 2_000}
    assert streamed_seconds(500, **shorter) == pytest.approx(2 + 0.1)
    assert streamed_seconds(2_000, **longer) == pytest.approx(4 + 0.1)


def test_devices_come_in_powers_of_two() -> None:
    # 80 GB / 1.1 = 72.7 GB of weights fit into one device of 80 GB, 363.6 GB not into four.
    assert [devices_needed(gb * 1e9, 80e9) for gb in (72, 73, 291, 363)] == [1, 2, 8, 8]


def test_options_out_of_range_are_reported_together() -> None:
    with pytest.raises(ConfigError, match=r"mfu: expected above 0(?s:.*)price: expected 0 or more"):
        EstimateOptions(mfu=0, price=-1)


def test_estimate_is_json_and_its_text_shows_the_arithmetic(tmp_path: Path) -> None:
    found = run(shipped("llama31-70b-to-8b.yaml", tmp_path), EstimateOptions(pack_blocks=0))
    tree = json.loads(json.dumps(as_dict(found)))
    assert tree["devices"][1]["resident"]["dollars"] == on(found, "H100").resident.dollars
    text = describe(found)
    assert "(122,070 + 128) x 4,096 = 500,523,008 tokens" in text
    assert "(2 x 69,503,033,344 + 5.369e+09 attention) x 500,523,008 tokens" in text
    assert "table of published" in text
    assert not list(tmp_path.iterdir())


def test_importing_the_estimate_loads_no_torch() -> None:
    code = "import sys, distill.estimate; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
