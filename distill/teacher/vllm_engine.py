"""Start vLLM's engine, with the tap on its workers.

vLLM is imported here and nowhere at the top of a module: distill runs without it.
"""

import os
import subprocess
import sys
import weakref
from importlib.util import find_spec
from multiprocessing import active_children
from typing import Any

from distill.config import VllmTeacherConfig
from distill.errors import ConfigError, TeacherError
from distill.models import load_config, refuse_logit_transforms
from distill.teacher.tap import EXTENSION

TESTED_VERSIONS = ("0.32.0",)
"""Releases of vLLM that `make test-vllm` ran with."""

ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the tap knows the first model runner
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # we have threads, which a fork would cut off
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""vLLM reads these from nowhere else. A variable that is set already stays, but for the first."""

SHUTDOWN_SECONDS = 60.0
"""That the engine is given to end its processes by itself."""

_WATCH = """
import os, signal, sys, time
sys.stdin.read()
for number in (signal.SIGTERM, signal.SIGKILL):
    for pid in sys.argv[1:]:
        try:
            os.kill(int(pid), number)
        except ProcessLookupError:
            pass
    time.sleep(10)
"""
"""Waits for the end of our process, which closes the pipe, and ends the processes that are left."""


def start_engine(config: VllmTeacherConfig, block_length: int, **options: Any) -> Any:
    """Start vLLM's engine with the tap's extension on its workers.

    Args:
        config: The teacher.
        block_length: Longest request with the token that follows it, in tokens.
        options: Further arguments of vLLM's `EngineArgs`.

    Raises:
        ConfigError: vLLM is not installed, or refuses a setting.
        MismatchError: the model changes its logits after the head.
        TeacherError: the engine does not start.
    """
    if find_spec("vllm") is None:
        raise ConfigError(
            "teacher.kind: vllm is not installed here. It pins its own versions of torch and "
            "transformers, so give it an environment of its own:\n"
            "  python3.11 -m venv .venv-vllm && .venv-vllm/bin/pip install distill-llm vllm\n"
            "  and run .venv-vllm/bin/distill. docs/vllm.md has more, also for CPUs."
        )
    model = load_config(config.model, "teacher.model", config.revision)
    refuse_logit_transforms(model, f"teacher.model ({config.model})")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = ENVIRONMENT["VLLM_USE_V2_MODEL_RUNNER"]
    from vllm import EngineArgs, LLMEngine
    from vllm.usage.usage_lib import UsageContext

    gib = config.kv_cache_gib
    arguments: dict[str, Any] = {
        "model": config.model,
        "revision": config.revision,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "distributed_executor_backend": config.executor,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "kv_cache_memory_bytes": None if gib is None else int(gib * 2**30),
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "enforce_eager": config.enforce_eager,
        "max_model_len": block_length,
        # A cached prefix has no hidden states, and rows of it would be missing.
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "disable_log_stats": True,
        "worker_extension_cls": EXTENSION,
    }
    try:
        engine_config = EngineArgs(**arguments | options).create_engine_config(
            UsageContext.LLM_CLASS
        )
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        raise _refusal(config, block_length, error) from error
    before = set(active_children())
    try:
        engine = LLMEngine.from_vllm_config(engine_config, UsageContext.LLM_CLASS)
    except (RuntimeError, ValueError, OSError, NotImplementedError) as error:
        raise TeacherError(
            f"teacher.model: vLLM does not start with {config.model}: {_summary(error)}\n"
            "  Its own messages above name the cause. Too little memory: see docs/vllm.md."
        ) from error
    # Before the engine's own last resort, which kills its processes after five seconds.
    weakref.finalize(engine, engine.engine_core.shutdown, SHUTDOWN_SECONDS)
    pids = [str(child.pid) for child in set(active_children()) - before]
    # An engine whose owner was killed keeps its GPUs for ever, and the next start finds no memory.
    # A session of its own: what is sent to our process group must not reach the watcher.
    watcher = subprocess.Popen(
        [sys.executable, "-c", _WATCH, *pids], stdin=subprocess.PIPE, start_new_session=True
    )
    weakref.finalize(engine, _end, watcher)
    return engine


def _end(watcher: "subprocess.Popen[bytes]") -> None:
    watcher.kill()
    watcher.communicate()


def _refusal(config: VllmTeacherConfig, block_length: int, error: Exception) -> ConfigError:
    if "max_model_len" in str(error):
        return ConfigError(
            f"data.block_length: blocks of {block_length} tokens are longer than the teacher "
            f"{config.model} takes.\n  vLLM says: {_summary(error)}\n  Give shorter blocks."
        )
    return ConfigError(f"teacher: vLLM refuses these settings.\n  It says: {_summary(error)}")


def _summary(error: Exception) -> str:
    """The line that says why: pydantic, which checks vLLM's settings, puts a headline before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    reasons = [line for line in lines if line.startswith("Value error, ")] or lines
    return reasons[0].removeprefix("Value error, ").partition(" [type=")[0]
