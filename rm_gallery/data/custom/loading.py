"""Loading a custom class from `data.custom_cls.path` and `name`, with the modules in the folder of its file.

User code is code that is neither in the standard library, nor installed, nor in this package.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

import rm_gallery
from rm_gallery.data.formats import CustomClassConfig
from rm_gallery.errors import UserError, nearest, one_line
from rm_gallery.files import sha256

BASE_CLASS = "tutorials.cookbooks.training_reward_model.base.BaseTrainDataset"
_NEVER_FOUND = {"rm_gallery", "tutorials", "__main__"}


@dataclass(frozen=True)
class _Loaded:
    module: ModuleType
    sources: tuple[Path, ...]
    """The file itself and the user modules that it imports."""
    digest: str


_LOADED: dict[Path, _Loaded] = {}  # each version runs once per process, and all readers share the class


def check_custom_class(config: CustomClassConfig) -> None:
    """Raise UserError unless path and name are unset, or both are set and the file exists; does not run it."""
    if config.path is None and config.name is None:
        return
    if not config.path or not config.name:
        raise UserError("data.custom_cls needs both path (a Python file) and name (the class in it)")
    path = _path_of(config)
    if not path.is_file():
        what = "is a folder; name the Python file in it" if path.is_dir() else "no such file"
        raise UserError(f"data.custom_cls.path={config.path}: {what} (working directory {Path.cwd()})")


def load_custom_class(config: CustomClassConfig) -> type:
    """The class. Its file runs once per process, and again if it or a user module that it imports has changed.

    A relative path starts at the working directory. While the file runs, modules in its folder can be imported.
    Raises UserError for a file that does not exist or cannot be imported, and for a missing class or one without hooks.
    """
    module = _load(config).module
    found = getattr(module, config.name or "", None)
    if not isinstance(found, type):
        classes = [name for name, value in vars(module).items() if _is_class_of(value, module)]
        what = "no class of that name" if found is None else f"that is a {type(found).__name__}, not a class,"
        raise UserError(
            f"data.custom_cls.name={config.name}: {what} in {config.path} "
            f"(classes there: {', '.join(classes) or 'none'}).{nearest(config.name or '', classes)}"
        )
    if not any(callable(getattr(found, hook, None)) for hook in ("_build_messages", "build_group")):
        raise UserError(
            f"data.custom_cls.name={config.name}: the class has neither _build_messages nor build_group; "
            f"derive it from {BASE_CLASS}"
        )
    return found


def source_fingerprint(config: CustomClassConfig) -> str:
    """Hash of the name of the class, its file, and every user module that the file imports.

    Depends only on names and contents, not on the folder or on modules loaded before.
    """
    return hashlib.sha256(f"{config.name} {_load(config).digest}".encode()).hexdigest()


def _path_of(config: CustomClassConfig) -> Path:
    return Path(config.path or "").expanduser().absolute()


def _is_class_of(value: object, module: ModuleType) -> bool:
    return isinstance(value, type) and value.__module__ == module.__name__


def _load(config: CustomClassConfig) -> _Loaded:
    check_custom_class(config)
    path = _path_of(config)
    earlier = _LOADED.get(path)
    if earlier is not None and _is_unchanged(earlier):
        return earlier
    module = ModuleType(f"custom_cls_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{path.stem}")
    module.__file__, module.__package__ = str(path), ""
    sys.modules[module.__name__] = module  # where dataclasses and type hints look the module up
    with _local_modules(path):
        try:
            # Not by `import`, which would write byte code next to the file and trust its time stamp.
            exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), vars(module))
            sources = sources_of(path)
            loaded = _Loaded(module, sources, hash_files(sources))
        except (Exception, SystemExit) as error:  # SystemExit: a script without a main guard
            del sys.modules[module.__name__]
            raise UserError(
                f"data.custom_cls.path={config.path}: cannot be imported, {describe_error(error)}; fix it"
            ) from error
    _LOADED[path] = loaded
    return loaded


def _is_unchanged(loaded: _Loaded) -> bool:
    try:
        return hash_files(loaded.sources) == loaded.digest
    except OSError:
        return False


class _Finder(MetaPathFinder):
    """Finds modules and packages in one folder, except those that would hide the standard library or this package."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is not None or fullname in _NEVER_FOUND or fullname in sys.stdlib_module_names:
            return None
        spec = PathFinder.find_spec(fullname, [self.folder])
        # A folder without __init__.py must not hide an installed package: `datasets/` may contain data.
        return spec if spec is not None and spec.origin is not None else None


@contextmanager
def _local_modules(file: Path) -> Iterator[None]:
    """Inside, modules are imported from the folder of `file` first, even if one of that name is already loaded.

    Afterwards `sys.modules` has the earlier modules of these names again.
    """
    importlib.invalidate_caches()
    finder = _Finder(file.parent)
    provided = {top for top in {name.partition(".")[0] for name in list(sys.modules)} if finder.find_spec(top)}
    hidden = {
        name: module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in provided and is_user_code(getattr(module, "__file__", None))
    }
    for name in hidden:
        del sys.modules[name]
    is_on_path = finder.folder in sys.path
    sys.meta_path.insert(0, finder)
    if not is_on_path:
        sys.path.append(finder.folder)  # last: for folders without __init__.py
    try:
        yield
    finally:
        if not is_on_path:
            sys.path.remove(finder.folder)
        sys.meta_path.remove(finder)
        for name, module in hidden.items():
            if getattr(sys.modules.get(name), "__file__", None) != module.__file__:
                sys.modules[name] = module


_STDLIB = tuple(f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib"))
_PACKAGE = f"{Path(rm_gallery.__file__).parent}/"
_INSTALLED = {"site-packages", "dist-packages"}


def is_user_code(file: str | None) -> bool:
    """Whether a file, named as in modules and tracebacks, is user code."""
    if file is None or not file.endswith(".py") or file.startswith((*_STDLIB, _PACKAGE)):
        return False
    return _INSTALLED.isdisjoint(Path(file).parts)


def describe_error(error: BaseException) -> str:
    """`KeyError: 'query' (custom_bt_dataset.py:9)`: the error, and the last line of user code in its traceback."""
    what = f"{type(error).__name__}: {one_line(error)}" if str(error).strip() else type(error).__name__
    if isinstance(error, SyntaxError):
        what, place = f"{type(error).__name__}: {error.msg}", (error.filename, error.lineno)
        return f"{what} ({Path(place[0]).name}:{place[1]})" if place[0] else what
    frames = [each for each in traceback.extract_tb(error.__traceback__) if is_user_code(each.filename)]
    return f"{what} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else what


def sources_of(file: Path) -> tuple[Path, ...]:
    """The file and every loaded user module that it imports, directly or through others.

    Found by parsing import statements, so that modules loaded before do not change the result.
    """
    found = {file: ""}
    queue = [file]
    while queue:
        path = queue.pop()
        for name in _imports_in(path, found[path]):
            module = sys.modules.get(name)
            file_name = getattr(module, "__file__", None) or ""
            source = Path(file_name)
            if is_user_code(file_name) and source not in found and source.is_file():
                found[source] = getattr(module, "__package__", None) or ""
                queue.append(source)
    return tuple(found)


def _imports_in(path: Path, package: str) -> Iterator[str]:
    """Modules that the import statements of a file may load; `from a.b import c` loads a, a.b and possibly a.b.c."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, node.module] if node.module else above)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[:size]) for size in range(1, len(parts) + 1))


def hash_files(files: Iterable[Path]) -> str:
    """Hash of names and contents, independent of the folder; raises OSError for a missing file."""
    parts = sorted(f"{path.name} {sha256(path)}" for path in files)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
