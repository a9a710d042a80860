"""Rules of the house that a machine can keep."""

import ast
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import distill
from distill.cache import format as cache_format
from distill.cli import build_parser

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    [*ROOT.glob("distill/**/*.py"), *ROOT.glob("students/*.py"), *ROOT.glob("scripts/*.py")]
)

LAYERS = [
    {"errors"},
    {"files", "fingerprint", "hardware", "progress"},
    {"config.*", "config", "cache.format", "cache.manifest"},
    {
        "targets",
        "models",
        "draw",
        "metrics",
        "tokens",
        "uniforms",
        "licences",
        "masses",
        "schedules",
    },
    {
        "losses",
        "distillation_model",
        "head",
        "data",
        "checkpoint",
        "export",
        "model_card",
        "adapters",
        "held_out",
        "launch",
        "cache.storage",
        "cache.coding",
    },
    {
        "cache",
        "cache.joined",
        "cache.validate",
        "cache.writer",
        "cache.reader",
        "cache.dataset",
        "cache.inspect",
        "cache.rows",
        "identity",
    },
    {"teacher", "teacher.*", "workers", "workers.*"},
    {"capture", "evaluate", "evaluate.*"},
    {"fit", "steps", "train", "estimate", "estimate.*"},
    {"cli", "cache_verbs"},
]
"""From the bottom: a module imports from its own layer or from below."""


def _layer(module: str) -> int:
    package = module.partition(".")[0] + ".*"
    found = [number for number, layer in enumerate(LAYERS) if module in layer or package in layer]
    exact = [number for number in found if module in LAYERS[number]]
    assert found, f"distill.{module} has no layer: add it to LAYERS"
    return (exact or found)[0]


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT / "distill").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _imports(path: Path) -> set[str]:
    """Modules that `path` imports anywhere, those for type checkers aside."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = (ROOT / Path(*whole.split("."))).with_suffix(".py").exists()
                found.add(whole if is_module else str(node.module))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def test_imports_never_point_up() -> None:
    for path in ROOT.glob("distill/**/*.py"):
        importer = _module(path)
        if not importer:
            continue
        for name in _imports(path):
            if name.startswith("distill."):
                imported = name.removeprefix("distill.")
                assert _layer(imported) <= _layer(importer), f"{importer} imports {imported}"


def test_imports_form_no_cycle() -> None:
    graph = {
        _module(path): {
            n.removeprefix("distill.") for n in _imports(path) if n.startswith("distill.")
        }
        for path in ROOT.glob("distill/**/*.py")
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"cycle: {' -> '.join([*way, module])}"
        if module not in done:
            for other in graph.get(module, set()):
                visit(other, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_only_the_command_line_knows_students() -> None:
    for path in ROOT.glob("distill/**/*.py"):
        if path.name != "cli.py":
            assert not any(name.split(".")[0] == "students" for name in _imports(path)), path


def test_nothing_imports_scripts_or_tests() -> None:
    for path in [*ROOT.glob("distill/**/*.py"), *ROOT.glob("students/*.py")]:
        assert not {name.split(".")[0] for name in _imports(path)} & {"scripts", "tests"}, path


@pytest.mark.parametrize("path", [*SOURCES, *sorted(ROOT.glob("tests/**/*.py"))], ids=str)
def test_files_have_at_most_300_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_functions_have_at_most_8_arguments(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            own = [argument for argument in arguments if argument.arg not in ("self", "cls")]
            assert len(own) <= 8, f"{path}: {node.name}"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_error_is_swallowed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            ends = {type(end) for end in ast.walk(node)}
            if caught in ("everything", "Exception", "BaseException"):
                assert ast.Raise in ends, f"{path}:{node.lineno} catches {caught} and goes on"


def test_importing_the_package_loads_no_torch_and_is_fast() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import distill; "
        "print(time.perf_counter() - start, 'torch' in sys.modules)"
    )
    runs = [_run(code).split() for _ in range(3)]
    assert {loaded for _, loaded in runs} == {"False"}
    assert min(float(seconds) for seconds, _ in runs) < 0.2


@pytest.mark.parametrize("module", ["distill.cache.format", "distill.config", "distill.errors"])
def test_format_and_config_import_without_torch(module: str) -> None:
    assert _run(f"import sys, {module}; print('torch' in sys.modules)") == "False"


def test_public_names_are_sorted_and_all_resolve() -> None:
    assert all(first < second for first, second in pairwise(distill.__all__))
    for name in distill.__all__:
        assert callable(getattr(distill, name)), name


def test_functions_of_the_package_win_over_modules_of_their_name() -> None:
    code = (
        "import distill.train, distill.capture, distill.evaluate, distill; "
        "print(*(type(getattr(distill, n)).__name__ for n in ('train', 'capture', 'evaluate')))"
    )
    assert _run(code) == "function function function"


def test_flags_of_the_command_line_are_frozen() -> None:
    verbs = next(a for a in build_parser()._actions if a.dest == "verb").choices
    assert verbs is not None
    flags = {
        verb: sorted(
            o for action in parser._actions for o in action.option_strings if o.startswith("--")
        )
        for verb, parser in dict(verbs).items()
    }
    everywhere = ["--debug", "--help"]
    assert flags == {
        "run": sorted([*everywhere, "--print-config", "--resume"]),
        "cache": sorted([*everywhere, "--print-config", "--worker"]),
        "train": sorted([*everywhere, "--print-config", "--resume"]),
        "eval": sorted([*everywhere, "--print-config"]),
        "estimate": sorted(
            [
                *everywhere,
                *("--flops", "--json", "--link", "--memory", "--mfu", "--price"),
                *("--print-config", "--sample"),
            ]
        ),
        "leaderboard": sorted([*everywhere, "--allow-mixed", "--baseline", "--out"]),
        "inspect": sorted([*everywhere, "--json"]),
        "verify": everywhere,
    }


def test_format_document_is_the_docstring() -> None:
    assert (ROOT / "docs" / "format.md").read_text() == cache_format.__doc__


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout.strip()
