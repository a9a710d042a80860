"""The command line: `distill VERB CONFIG [section.field=value ...]`.

The config says what to run; flags say only how to run it. This is the only module that knows
students/.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distill.cache_verbs import inspect_caches, is_config, verify_caches
from distill.config import load, to_tree
from distill.errors import ConfigError, DistillError
from distill.files import write_json_atomically

if TYPE_CHECKING:
    from distill.config import ExperimentConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return 0 (done), 1 (verify found faults) or 2 (an error of the user's)."""
    options = parse(arguments)
    try:
        result: int = options.run(options)
    except DistillError as error:
        if options.debug:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue.", file=sys.stderr)
        return 130
    return result


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command; overrides may stand before, between and after flags."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    strangers = [text for text in rest if text.startswith("-") or not hasattr(options, "overrides")]
    if strangers:
        parser.error(f"{options.verb} does not know {' '.join(strangers)}")
    if rest:
        options.overrides += rest
    return options


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    parser = argparse.ArgumentParser(prog="distill", description="Knowledge distillation for LLMs.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(
        name: str, run: Callable[[argparse.Namespace], int], text: str, target: str = "CONFIG"
    ) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=text, description=text)
        verb.set_defaults(run=run)
        verb.add_argument("target", metavar=target, nargs="+" if target.endswith("...") else None)
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if target == "CONFIG":
            verb.add_argument("overrides", nargs="*", metavar="section.field=value")
            verb.add_argument(
                "--print-config", action="store_true", help="show the settings and stop"
            )
        return verb

    run = add("run", _with_config(_run), "the whole pipeline; stages that are complete are skipped")
    cache = add("cache", _with_config(_cache), "the teacher's targets onto disk; resumable")
    cache.add_argument(
        "--worker", default="0/1", metavar="I/N", help="this worker's share of the shards"
    )
    train = add("train", _with_config(_train), "a student from the cache")
    for verb in (run, train):
        verb.add_argument("--resume", action="store_true", help="continue an interrupted training")
    add("eval", _with_config(_eval), "benchmarks and fidelity of teacher and students")
    cost = add(
        "estimate",
        _with_config(_estimate, keep=False),
        "what it will cost, before anything is spent",
    )
    cost.add_argument("--json", action="store_true", help="for machines")
    cost.add_argument(
        "--sample", type=int, default=0, metavar="N", help="score N blocks to measure"
    )
    cost.add_argument("--mfu", type=float, default=0.4, help="share of a device's peak (0.4)")
    cost.add_argument("--flops", type=float, metavar="RATE", help="FLOP/s that your device reaches")
    cost.add_argument("--memory", type=float, default=80e9, metavar="BYTES", help="of your device")
    cost.add_argument(
        "--link", type=float, default=6e9, metavar="RATE", help="bytes/s of streamed weights (6e9)"
    )
    cost.add_argument("--price", type=float, metavar="DOLLARS", help="an hour of a device")
    board = add("leaderboard", _leaderboard, "results of runs as a table", "RUN_OR_RESULTS...")
    board.add_argument(
        "--out", type=Path, metavar="DIR", help="also write leaderboard.md, .csv and results.json"
    )
    board.add_argument(
        "--baseline", metavar="NAME", help="model to test against (the only untrained student)"
    )
    board.add_argument(
        "--allow-mixed", action="store_true", help="show scores of different settings, marked"
    )
    inspect = add("inspect", inspect_caches, "what a cache holds", "CONFIG_OR_CACHE")
    inspect.add_argument("--json", action="store_true", help="for machines")
    add("verify", verify_caches, "whether every byte of a cache is right", "CONFIG_OR_CACHE")
    return parser


def _run(config: "ExperimentConfig", options: argparse.Namespace) -> None:
    from distill.licences import require_licence

    if config.evaluation.requested:
        from distill.evaluate.tasks import check_tasks

        check_tasks(config.evaluation)  # a misspelt task must not cost a training first
    require_licence(config)
    _capture(config, 0, 1)
    _train_student(config, resume=options.resume)
    _evaluate(config)


def _cache(config: "ExperimentConfig", options: argparse.Namespace) -> None:
    worker, num_workers = _parse_worker(options.worker)
    _capture(config, worker, num_workers)


def _train(config: "ExperimentConfig", options: argparse.Namespace) -> None:
    _train_student(config, resume=options.resume)


def _eval(config: "ExperimentConfig", options: argparse.Namespace) -> None:
    del options  # the config says it all
    _evaluate(config)


def _estimate(config: "ExperimentConfig", options: argparse.Namespace) -> None:
    from distill.estimate import EstimateOptions, as_dict, describe, run

    assumed = EstimateOptions(
        sample_blocks=options.sample,
        mfu=options.mfu,
        flop_rate=options.flops,
        memory_bytes=options.memory,
        link_bytes_per_second=options.link,
        price=options.price,
    )
    estimate = run(config, assumed)
    print(json.dumps(as_dict(estimate), indent=1) if options.json else describe(estimate))


def _leaderboard(options: argparse.Namespace) -> int:
    from distill.evaluate.leaderboard import compare, print_table, write

    folders = [_run_folder(target) for target in options.target]
    results = compare(folders, options.baseline, options.allow_mixed)
    print_table(results)
    if options.out:
        write(results, options.out)
    return 0


def _capture(config: "ExperimentConfig", worker: int, num_workers: int) -> None:
    from distill.capture import capture, incomplete_splits

    if not incomplete_splits(config):
        capture(config)  # compares the manifests with the config; scores nothing
        print(f"cache: complete in {_cache_root(config)}, skipped")
    elif capture(config, worker=worker, num_workers=num_workers):
        print(f"cache: complete in {_cache_root(config)}")
    else:
        print(f"cache: this worker's shards are done; others are missing in {_cache_root(config)}")


def _train_student(config: "ExperimentConfig", *, resume: bool) -> None:
    from distill.fit import is_finished
    from distill.train import train
    from students import build_student, save_initial

    if is_finished(config):
        print(f"train: finished in {config.run_folder / 'student' / 'final'}, skipped")
        return
    student, tokenizer = build_student(config)
    if int(os.environ.get("RANK", "0")) == 0:
        save_initial(config, student, tokenizer)
    print(f"train: finished in {train(config, student, tokenizer, resume=resume)}")


def _evaluate(config: "ExperimentConfig") -> None:
    from distill.evaluate.cards import update_cards
    from distill.evaluate.compare import evaluate
    from distill.evaluate.leaderboard import compare, print_table, write

    evaluate(config)
    results = compare([config.run_folder])
    print_table(results)
    write(results, config.run_folder)
    update_cards(config.run_folder, results)


def _with_config(
    run: Callable[["ExperimentConfig", argparse.Namespace], None], *, keep: bool = True
) -> Callable[[argparse.Namespace], int]:
    """Make a verb of what works on a config, which is read first and kept in the run folder."""

    def verb(options: argparse.Namespace) -> int:
        config = load(Path(options.target), options.overrides)
        if options.print_config:
            print(json.dumps(to_tree(config), indent=2))
            return 0
        _quiet_libraries()
        if keep:
            write_json_atomically(config.run_folder / "config.json", to_tree(config))
        run(config, options)
        return 0

    return verb


def _quiet_libraries() -> None:
    """Their bars and advice would drown ours; warnings and errors still show."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def _parse_worker(text: str) -> tuple[int, int]:
    worker, slash, total = text.partition("/")
    if not (slash and worker.isdigit() and total.isdigit() and int(worker) < int(total)):
        raise ConfigError(f"--worker {text}: expected I/N with 0 <= I < N, for example 0/4.")
    return int(worker), int(total)


def _cache_root(config: "ExperimentConfig") -> str:
    return config.cache_folder("train").rsplit("/", 1)[0]


def _run_folder(target: str) -> Path:
    return load(Path(target)).run_folder if is_config(target) else Path(target)


if __name__ == "__main__":
    sys.exit(main())
