"""What `rm-gallery score` has to do: options, and for each input its output, parts and fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_gallery.errors import UserError
from rm_gallery.scoring.rows import JSON_LINES, PARQUET, Table


@dataclass(frozen=True)
class ScoreOptions:
    """What `rm-gallery score` was asked for."""

    models: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    """A folder; or a file, for one input."""
    device: str = "auto"
    dtype: str = "auto"
    token_budget: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Job:
    """One input with its output."""

    table: Table
    output: Path
    parts: list[Path]
    """One folder per model."""
    fingerprint: str

    @property
    def marker(self) -> Path:
        """Says of which inputs and models the output was made."""
        return self.output.with_name(f".{self.output.name}.score.json")

    def is_done(self) -> bool:
        """Whether the output is there; raises UserError when it is somebody else's."""
        if not self.output.exists():
            return False
        try:
            made_of = json.loads(self.marker.read_text(encoding="utf-8"))["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            made_of = None
        if made_of != self.fingerprint:
            raise UserError(
                f"{self.output}: exists, and was not made of this input and these models; "
                "move it away or name another --output"
            )
        return True


def name_models(models: Sequence[str]) -> list[str]:
    """Short names of model folders: the folder's own, with those above it as far as needed to tell them apart.

    Raises UserError for a model that is named twice.
    """
    paths = [Path(os.path.abspath(os.path.expanduser(model))) for model in models]
    if len(set(paths)) < len(paths):
        raise UserError("--model names the same folder twice; name it once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def plan_jobs(options: ScoreOptions, tables: Sequence[Table], names: Sequence[str]) -> list[Job]:
    """Where each input's rewards and output go.

    Raises UserError for an output that does not suit the inputs, and for columns that are there already.
    """
    output = Path(options.output).expanduser()
    is_file = output.suffix in PARQUET + JSON_LINES and not output.is_dir()
    if is_file and len(tables) > 1:
        raise UserError(f"--output {output}: one file for {len(tables)} inputs; name a folder")
    if is_file and (output.suffix in PARQUET) != tables[0].is_parquet:
        raise UserError(f"--output {output}: the output is written like the input ({tables[0].file.name}); rename it")
    outputs = [output if is_file else output / table.file.name for table in tables]
    same = next((path for path in outputs if outputs.count(path) > 1), None)
    if same is not None:
        raise UserError(f"{same}: two inputs have this name; score them into folders of their own")
    models = [_model_facts(model) for model in options.models]
    jobs = []
    for table, path in zip(tables, outputs, strict=True):
        if path.resolve() == table.file.resolve():
            raise UserError(f"{path}: is the input itself; name another --output")
        columns = [column for name in names for column in reward_columns(table, name, len(names))]
        taken = [column for column in columns if column in table.columns]
        if taken:
            raise UserError(f"{table.file}: has a column {taken[0]!r} already; rename it")
        status = table.file.stat()
        facts = [str(table.file.resolve()), status.st_size, status.st_mtime_ns, options.dtype, options.device]
        prints = [_fingerprint([*facts, model]) for model in models]
        parts = path.with_name(f".{path.name}.parts")
        jobs.append(Job(table, path, [parts / each for each in prints], _fingerprint(prints)))
    return jobs


def reward_columns(table: Table, name: str, num_models: int) -> list[str]:
    """Columns that a model adds; its name goes before them when there are several models."""
    return [f"{name}/{column}" if num_models > 1 else column for column in table.gives]


def _model_facts(model: str) -> list[Any]:
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return [model]
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [str(folder.resolve()), [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]]


def _fingerprint(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
