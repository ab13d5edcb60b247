"""The shape of the code in figures: files, lines, folders, imports, and the files that one row passes.

    python -m benchmarks.structure [--package PATH] [--json FILE]

Lines of code are lines that hold a token other than a comment or a docstring. A module with one importer is one that a
single other module of the package imports. The path of a row is traced: a float32 run of two steps over 24 rows of a
parquet file, in this process, and every file of the package in which a function was called, up to the first batch and
in all. `--package` measures another checkout of the package with the same script.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def code_lines(path: Path) -> int:
    """Lines with code: no blank line, comment or docstring."""
    source = path.read_text(encoding="utf-8")
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                docstrings |= set(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def import_graph(package: Path) -> dict[str, set[str]]:
    """module -> modules of the package that it imports, lazy and typing-only imports included."""
    modules = {_name(path, package): path for path in package.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {each if each in modules else node.module for each in inner}
        graph[name] = (found & set(modules)) - {name}
    return graph


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def cycles(graph: dict[str, set[str]]) -> int:
    """Strongly connected components of more than one module."""
    reachable: dict[str, set[str]] = {}
    for start in graph:
        seen, stack = set(), [start]
        while stack:
            for target in graph[stack.pop()]:
                if target not in seen:
                    seen.add(target)
                    stack.append(target)
        reachable[start] = seen
    groups = {
        frozenset(other for other in reachable[name] if name in reachable[other])
        for name in graph
        if name in reachable[name]
    }
    return len(groups)


def upward_imports(package: Path, graph: dict[str, set[str]]) -> int:
    """Imports of a higher layer, by the list LAYERS in the structure test of the measured checkout."""
    test = package.parent / "tests" / "structure" / "test_import_direction.py"
    layers: list[str] = next(
        ast.literal_eval(node.value)
        for node in ast.parse(test.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "LAYERS"
    )

    def layer(module: str) -> int:
        inside = [name for name in layers if module == name or module.startswith(f"{name}.")]
        below = [index for index, name in enumerate(layers) if name.startswith(f"{module}.")]
        return layers.index(max(inside, key=len)) if inside else max(below, default=-1)

    return sum(
        layer(target) > layer(source)
        for source, targets in graph.items()
        for target in targets
        if package.name not in (source, target)  # the package itself, which holds the version
    )


def measure(package: Path) -> dict[str, Any]:
    """All figures that need no run."""
    files = [path for path in sorted(package.rglob("*.py")) if path.stat().st_size]  # without empty __init__.py
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    folders: Counter[str] = Counter(str(path.parent.relative_to(package.parent)) for path in files)
    graph = import_graph(package)
    importers: dict[str, set[str]] = defaultdict(set)
    for source, targets in graph.items():
        for target in targets:
            importers[target].add(source)
    classes: dict[str, list[str]] = defaultdict(list)
    for path in files:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                classes[node.name].append(_name(path, package))
    ordered = sorted(lengths.values())
    return {
        "files": len(files),
        "lines": sum(ordered),
        "code lines": sum(map(code_lines, files)),
        "median file": statistics.median(ordered),
        "p90 file": ordered[int(0.9 * (len(ordered) - 1))],
        "longest file": ordered[-1],
        "most files in a folder": "{1} {0}".format(*folders.most_common(1)[0]),
        "import cycles": cycles(graph),
        "upward imports": upward_imports(package, graph),
        "modules with one importer": sum(
            len(found) == 1
            for name, found in importers.items()
            if package.parent.joinpath(*name.split(".")).is_dir() is False
        ),
        "class names used twice": sum(len(places) > 1 for places in classes.values()),
        "files per folder": dict(sorted(folders.items())),
    }


def trace(folder: Path) -> dict[str, int]:
    """Files of the package in which a function is called while one row becomes a step; run in a process of its own."""
    import torch

    from rm_gallery.cli import main
    from tests.small import make_model, text_pairs, write_pairs

    torch.set_num_threads(1)
    os.environ["RM_GALLERY_CACHE"] = str(folder / "cache")
    model = make_model("qwen2", folder / "model")
    write_pairs(folder / "train.parquet", text_pairs(24))
    package = str(Path(sys.modules["rm_gallery"].__file__ or "").parent)
    visited: set[str] = set()
    before_batch: set[str] | None = None

    def visit(frame: Any, event: str, _argument: Any) -> None:
        nonlocal before_batch
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(package) or not code.co_flags & inspect.CO_OPTIMIZED:
            return  # the body of a module or a class runs at import, whoever passes
        if code.co_name == "collate" and before_batch is None:
            before_batch = {*visited, code.co_filename}
        visited.add(code.co_filename)

    sys.setprofile(visit)
    try:
        main([
            "train", f"model.partial_pretrain={model}", "model.fsdp_config.model_dtype=fp32", "data.max_length=128",
            f"data.train_files={folder / 'train.parquet'}", "data.train_batch_size=12", "data.num_workers=1",
            f"trainer.default_local_dir={folder}", "trainer.experiment_name=run", "trainer.total_training_steps=2",
            "trainer.logger=[]", "trainer.device=cpu",
        ])  # fmt: skip
    finally:
        sys.setprofile(None)
    in_data = {name for name in before_batch or () if os.sep + "data" + os.sep in name[len(package) :]}
    return {
        "files that a row passes until it is a batch": len(in_data),
        "files that a row passes in all": len(visited),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=ROOT / "rm_gallery", help="folder of the package")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trace:
        print(json.dumps(trace(options.trace)))
        return
    package = options.package.resolve()
    found = measure(package)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--trace", folder]
        environment = {**os.environ, "PYTHONPATH": str(package.parent), "HF_HUB_OFFLINE": "1"}
        ran = subprocess.run(command, cwd=package.parent, env=environment, capture_output=True, text=True, check=False)
        lines = ran.stdout.splitlines()
        found |= json.loads(lines[-1]) if ran.returncode == 0 and lines else {"trace failed": ran.stderr[-2000:]}
    for name, value in found.items():
        if isinstance(value, dict):
            print(f"{name}: " + ", ".join(f"{each} {count}" for each, count in value.items()))
        else:
            print(f"{name:45} {value}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
