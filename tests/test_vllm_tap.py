"""What of the vLLM teacher needs no vLLM; tests/vllm holds the rest."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.capture import prepare
from distill.config import TopKConfig
from distill.draw import draw
from distill.errors import ConfigError, TeacherError
from distill.teacher import open_teacher
from distill.teacher.tap import make_order, pack, unknown_runner, unpack
from tests.conftest import ConfigMaker

ROOT = Path(__file__).parent.parent


def test_without_vllm_the_way_to_install_it_is_named(
    tiny_config: ConfigMaker, tiny_teacher: Path
) -> None:
    config = tiny_config("teacher.kind=vllm", f"teacher.model={tiny_teacher}")
    with pytest.raises(ConfigError, match=r"vllm is not installed(.|\n)*pip install") as error:
        open_teacher(config, vocab_size=258)
    assert "docs/vllm.md" in str(error.value)


def test_k_of_the_whole_vocabulary_is_refused_before_anything_is_loaded(
    tiny_config: ConfigMaker, tiny_teacher: Path
) -> None:
    overrides = ["teacher.kind=vllm", f"teacher.model={tiny_teacher}", "targets.kind=top_k"]
    with pytest.raises(TeacherError, match="258 tokens: k must be smaller"):
        open_teacher(tiny_config(*overrides, "targets.k=258"), vocab_size=258)


def test_quantisation_on_load_is_part_of_the_identity(
    tiny_config: ConfigMaker, tiny_teacher: Path
) -> None:
    overrides = ["teacher.kind=vllm", f"teacher.model={tiny_teacher}", "teacher.quantization=fp8"]
    manifests = prepare(tiny_config(*overrides))
    assert manifests["train"].teacher["quantisation"] == "fp8"


@pytest.mark.parametrize("also", [(), (0.5, 2.0)])
def test_targets_survive_the_transport(also: tuple[float, ...]) -> None:
    config = TopKConfig(kind="top_k", k=5, also_temperatures=also)
    drawn = draw(torch.randn(7, 100), torch.rand(7, dtype=torch.float64), config)
    back = unpack(pack(drawn), 1.0, has_bucket=True)
    for name in ("ids_N", "weights_N", "counts_R", "num_head_R", "tail_mass_R", "entropy_R"):
        sent, received = getattr(drawn, name), getattr(back, name)
        assert received.dtype == sent.dtype
        assert torch.equal(received, sent)
    assert (back.log_normalisers_RJ is not None) == bool(also)


def test_an_order_is_made_of_what_messages_carry() -> None:
    (order,) = make_order(7, 3, 20, np.array([True, False, True])).values()
    assert order == {"key": 7, "block": 3, "first": 20, "length": 3, "rows": b"\xa0"}


def test_a_model_runner_of_other_making_is_told_from_ours() -> None:
    class Renamed:
        def _get_prompt_logprobs_dict(self, hidden: object) -> None: ...

    class Bare:
        def _get_prompt_logprobs_dict(
            self, hidden_states: object, num_scheduled_tokens: object
        ) -> None: ...

    assert "has no _get_prompt_logprobs_dict" in str(unknown_runner(object()))
    assert "takes ['hidden']" in str(unknown_runner(Renamed()))
    assert "Bare has no requests, input_batch" in str(unknown_runner(Bare()))


def test_teachers_and_tap_import_no_vllm() -> None:
    code = (
        "import sys, distill.teacher.engine, distill.teacher.tap, distill.teacher.vllm_engine; "
        "print('vllm' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "False"
