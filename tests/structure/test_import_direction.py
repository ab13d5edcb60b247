"""The rules of direction: who may import whom, what stays light, who asks the environment."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

from tests.structure.imports import Import, imports_of, modules, within
from tests.structure.tree import ROOT, at, fail_on, parse, python_files

# The order of the house, lowest first. A module imports from lines above its own, and from its own line.
# A line names a folder as a whole, or a file that lies beside the folders; inside a folder only cycles are refused.
LAYERS = [
    "rm_gallery.safe_text",
    "rm_gallery.errors",
    "rm_gallery.files",
    "rm_gallery.log",
    "rm_gallery.schema",
    "rm_gallery.sampling",
    "rm_gallery.progress_bar",
    "rm_gallery.html_page",
    "rm_gallery.html_chart",
    "rm_gallery.config",
    "rm_gallery.distributed",
    "rm_gallery.data.sources",
    "rm_gallery.data.formats",
    "rm_gallery.data.custom",
    "rm_gallery.data.benchmarks",
    "rm_gallery.data.tokenization",
    "rm_gallery.data.token_cache",
    "rm_gallery.data.batching",
    "rm_gallery.data.config",
    "rm_gallery.modeling",
    "rm_gallery.objectives",
    "rm_gallery.training",
    "rm_gallery.inspection",
    "rm_gallery.planning",
    "rm_gallery.scoring",
    "rm_gallery.integrations",
    "rm_gallery.core",
    "rm_gallery.evaluation",
    "rm_gallery.serving",
    "rm_gallery.api",
    "rm_gallery.push",
    "rm_gallery.folder_commands",
    "rm_gallery.cli",
    "rm_gallery.core.generator.export",  # `python -m`: an entry that calls the command line
]

# Where the names that `rm_gallery` exports lazily are defined.
PUBLIC = ("rm_gallery.api", "rm_gallery.errors", "rm_gallery.evaluation", "rm_gallery.scoring")

# These load neither torch nor transformers when they are imported (a file that needs them imports them in a function).
LIGHT = [
    "rm_gallery.safe_text",
    "rm_gallery.errors",
    "rm_gallery.files",
    "rm_gallery.log",
    "rm_gallery.schema",
    "rm_gallery.sampling",
    "rm_gallery.progress_bar",
    "rm_gallery.html_page",
    "rm_gallery.html_chart",
    "rm_gallery.config",
    "rm_gallery.data.sources",
    "rm_gallery.data.formats",
    "rm_gallery.data.custom",
    "rm_gallery.data.benchmarks",
    "rm_gallery.data.tokenization",
    "rm_gallery.data.token_cache",
    "rm_gallery.data.batching.plan",
    "rm_gallery.inspection",
    "rm_gallery.data.config",
    "rm_gallery.modeling.config",
    "rm_gallery.modeling.parallel.strategy",
    "rm_gallery.training.config",
    "rm_gallery.training.trackers",
    "rm_gallery.inspection",
    "rm_gallery.planning",
    "rm_gallery.api",
    "rm_gallery.cli",
    "rm_gallery.core",
    "rm_gallery.evaluation",
]
MAY_LOAD_TRANSFORMERS = ("rm_gallery.data.tokenization.tokenizer",)

MAY_IMPORT_HYDRA = ("rm_gallery.config",)
RANK_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"}
MAY_READ_RANK = {"rm_gallery.distributed.process_group": RANK_VARIABLES, "rm_gallery.log": {"RANK", "LOCAL_RANK"}}


def _line_of(module: str) -> int | None:
    """Position of the module's line in LAYERS, the most exact one; a folder of listed files comes after its files."""
    inside = [i for i, name in enumerate(LAYERS) if within(module, name)]
    if inside:
        return max(inside, key=lambda i: len(LAYERS[i]))
    return max((i for i, name in enumerate(LAYERS) if within(name, module)), default=None)


def _ours() -> dict[str, str]:
    """Dotted name -> file:line of the modules in rm_gallery, without rm_gallery/__init__.py."""
    return {name: at(path) for name, path in modules().items() if name.startswith("rm_gallery.")}


def test_every_file_has_its_place_in_the_order() -> None:
    problems = [
        f"{where} {name} is not in LAYERS ({at(Path(__file__).resolve())}): "
        "add it to the list at the place where it belongs"
        for name, where in _ours().items()
        if _line_of(name) is None
    ]
    fail_on(problems)


def test_a_file_imports_only_from_lower_layers() -> None:
    problems = []
    for found in imports_of("rm_gallery"):
        if not found.of("rm_gallery") or found.target == "rm_gallery":
            continue
        if found.source == "rm_gallery":
            if found.target not in PUBLIC:
                problems.append(f"{found.where} rm_gallery/__init__.py imports {found.target}: export it from {PUBLIC}")
            continue
        source, target = _line_of(found.source), _line_of(found.target)
        if source is not None and target is not None and target > source:
            problems.append(
                f"{found.where} {found.source} imports {found.target}, which stands above it: "
                "move what both need to a lower file, or hand it in as an argument"
            )
    fail_on(problems)


def test_no_file_imports_itself_through_others() -> None:
    edges: dict[str, list[Import]] = {}
    for found in imports_of("rm_gallery", "tutorials", "benchmarks"):
        if found.target in modules() and found.source != "rm_gallery":  # it imports nothing until a name is used
            edges.setdefault(found.source, []).append(found)
    cycle = _find_cycle(edges)
    steps = [f"{step.where} {step.source} imports {step.target}" for step in cycle]
    fail_on([*steps, "These imports close a circle: move what two of them need to a file below both"] if cycle else [])


def _find_cycle(edges: dict[str, list[Import]]) -> list[Import]:
    """The imports of one cycle, or an empty list."""
    done: set[str] = set()

    def visit(module: str, trail: list[Import]) -> list[Import]:
        for step in edges.get(module, []):
            if step.target in done:
                continue
            seen = [earlier.source for earlier in trail] + [module]
            if step.target in seen:
                return [*trail, step][seen.index(step.target) :]
            if cycle := visit(step.target, [*trail, step]):
                return cycle
        done.add(module)
        return []

    return next((cycle for module in list(edges) if (cycle := visit(module, []))), [])


def test_the_package_imports_neither_recipes_nor_tests() -> None:
    problems = [
        f"{found.where} imports {found.target}: the package stands below these; move the code into rm_gallery"
        for found in imports_of("rm_gallery")
        if found.of("tutorials", "tests", "benchmarks")
    ]
    fail_on(problems)


def test_hydra_stays_at_the_entry() -> None:
    problems = [
        f"{found.where} imports {found.target}: only {' and '.join(MAY_IMPORT_HYDRA)} do; take a dataclass"
        for found in imports_of("rm_gallery")
        if found.of("hydra", "omegaconf") and not any(within(found.source, entry) for entry in MAY_IMPORT_HYDRA)
    ]
    fail_on(problems)


def test_no_wildcard_imports() -> None:
    problems = [
        f"{found.where} imports * from {found.target}: write the names out"
        for found in imports_of("rm_gallery", "tutorials", "benchmarks", "tests")
        if found.wildcard
    ]
    fail_on(problems)


def test_every_python_folder_is_a_package() -> None:
    files = python_files("rm_gallery", "tutorials")
    folders = {folder for path in files for folder in path.parents if folder != ROOT and ROOT in folder.parents}
    problems = [
        f"{at(folder / '__init__.py')} is missing: add an empty one, or the folder is left out of the installed package"
        for folder in sorted(folders)
        if not (folder / "__init__.py").is_file()
    ]
    fail_on(problems)


def test_only_distributed_reads_the_rank_from_the_environment() -> None:
    problems = [
        f"{at(path, node.lineno)} names {node.value}: take rank and world size as integers (process_group reads them)"
        for name, path in modules().items()
        if within(name, "rm_gallery")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value in RANK_VARIABLES - _rank_variables_for(name)
    ]
    fail_on(problems)


def _rank_variables_for(module: str) -> set[str]:
    return {word for owner, words in MAY_READ_RANK.items() if within(module, owner) for word in words}


def test_data_is_told_its_rank() -> None:
    problems = [
        f"{found.where} imports {found.target}: files in data/ get rank and world size as two integers"
        for found in imports_of("rm_gallery")
        if within(found.source, "rm_gallery.data") and found.of("rm_gallery.distributed", "torch.distributed")
    ]
    fail_on(problems)


# Runs in a fresh interpreter: imports the modules one by one and prints the first that loaded something heavy,
# with the line of ours that asked for it.
_PROBE = """
import importlib, json, sys, traceback
root, cases = json.loads(sys.argv[1])
asked = {}
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers"):
            ours = [f for f in traceback.extract_stack() if f.filename.startswith(root)]
            if ours:
                asked[name] = ours[-1].filename[len(root) + 1:] + ":" + str(ours[-1].lineno)
        return None
sys.path.insert(0, root)
sys.meta_path.insert(0, Watch())
problems = []
for module, heavy in cases:
    importlib.import_module(module)
    loaded = [name for name in heavy if name in sys.modules]
    if loaded:
        problems.append([module, loaded[0], asked.get(loaded[0], module)])
        break
print(json.dumps(problems))
"""


def _light_cases() -> list[tuple[str, list[str]]]:
    """(module, what it must not load), those that may load transformers last."""
    names = [name for light in LIGHT for name in modules() if within(name, light)]
    names.sort(key=lambda name: any(within(name, owner) for owner in MAY_LOAD_TRANSFORMERS))
    tolerant = [any(within(name, owner) for owner in MAY_LOAD_TRANSFORMERS) for name in names]
    return [(name, ["torch"] if may else ["torch", "transformers"]) for name, may in zip(names, tolerant, strict=True)]


def test_reading_data_and_judging_load_no_torch() -> None:
    argument = json.dumps([str(ROOT), _light_cases()])
    ran = subprocess.run(
        [sys.executable, "-c", _PROBE, argument], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, f"\na light module cannot be imported:\n{ran.stderr}"
    problems = [
        f"{where} loads {heavy} when {module} is imported: import it inside the function that needs it"
        for module, heavy, where in json.loads(ran.stdout.splitlines()[-1])
    ]
    fail_on(problems)
