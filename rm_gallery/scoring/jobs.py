"""What `rm-gallery score` writes: one job per input, with its output, its parts and its lock.

Next to an output NAME there are `.NAME.lock`, held by the command that writes it, `.NAME.parts/` while it is scored,
and `.NAME.score.json` afterwards, which tells the same command that the output is finished.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from rm_gallery import files
from rm_gallery.data.sources import DataFile
from rm_gallery.data.sources.records import without_query
from rm_gallery.data.sources.remote import is_url
from rm_gallery.errors import UserError
from rm_gallery.scoring.ensemble import ENSEMBLE, STD
from rm_gallery.scoring.model_folder import GivenRewards, ModelFolder, ServedModel, file_of
from rm_gallery.scoring.parts import Parts, cannot_write
from rm_gallery.scoring.ranking import Ranking
from rm_gallery.scoring.remote import names_servers
from rm_gallery.scoring.tables import JSON_LINES, PARQUET, InputTable, ScoreDataConfig

_SERVER_BUDGET = 16_384  # tokens; decides the size of parts alone
_TEMPLATE_FILES = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class ScoreOptions:
    """Arguments of `rm-gallery score`."""

    models: tuple[str, ...]
    inputs: tuple[str, ...]
    """Files, folders, globs, URLs and hub datasets."""
    output: str
    """A folder; or a file, for one input."""
    device: str = "auto"
    dtype: str = "auto"
    token_budget: int | None = None
    trust_remote_code: bool = False
    base: str | None = None
    """Base model of adapters (`--base`), instead of the one that their folders name."""
    quantized: bool = True
    """Quantize the base model of adapters that were trained so (without `--unquantized`)."""
    template_date: str | None = None
    """Date (YYYY-MM-DD) for chat templates that write today's."""
    normalize: bool | None = None
    """Subtract the mean of the validation rewards and divide by their standard deviation (`--normalize`). None does so
    for the rewards of an ensemble alone, if all models have these figures."""
    ensemble: str | None = None
    """How the rewards of the models become that of an ensemble (`--ensemble`); None for no ensemble."""
    weights: Mapping[str, float] | None = None
    """Of the models' attributes in their reward (`--weights`)."""
    best: bool = False
    """Name the best response of each list (`--best`)."""
    tokenizer: str | None = None
    """Folder or hub name of the model of a server (`--tokenizer`)."""
    ranking: Ranking | None = None
    """What `rm-gallery rank` writes; None for the input's rows with their rewards."""
    rewards: str | None = None
    """Column of rewards that the input has (`--rewards`), instead of models."""
    engine: str = "local"
    """`local` or `ray` (`--engine`)."""
    processes: int | None = None
    """Workers (`--processes`); None for one, or on Ray for one per GPU."""
    data: ScoreDataConfig = field(default_factory=ScoreDataConfig)


@dataclass(frozen=True)
class ComputeSettings:
    """What the last bits of a reward depend on, besides the row and the weights."""

    device: str
    dtype: str
    token_budget: int
    template_date: str | None
    """Date for chat templates that write today's; None if no model has such a template."""


def find_settings(options: ScoreOptions) -> ComputeSettings:
    folders = [model for model in options.models if not names_servers(model)]
    if not folders:
        return ComputeSettings("server", "", options.token_budget or _SERVER_BUDGET, None)
    from rm_gallery.scoring.engine import default_budget
    from rm_gallery.scoring.loading import find_device, find_dtype

    device = find_device(options.device)
    return ComputeSettings(
        device.type,
        str(find_dtype(options.dtype, device)),
        options.token_budget or default_budget(device),
        (options.template_date or datetime.date.today().isoformat()) if _write_date(folders) else None,
    )


def _write_date(models: Sequence[str]) -> bool:
    """Whether the chat template of a model may write today's date; that of an exported checkpoint has it frozen."""
    paths = [file_of(model, name) for model in models for name in _TEMPLATE_FILES]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths if path is not None]
    return any("strftime_now" in text and "macro strftime_now(" not in text for text in texts)


@dataclass(frozen=True)
class ScoringJob:
    """One input with its output."""

    table: InputTable
    output: Path
    models: list[str]
    """A fingerprint per model, of the input, the settings and the content of the model folder."""
    columns: list[str]
    """Columns that the output adds."""
    ensemble: str = ""
    """How the rewards of the models are combined; '' for no ensemble."""
    ranking: Ranking | None = None
    """What is written, of `rm-gallery rank`."""

    @property
    def fingerprint(self) -> str:
        facts: list[Any] = [*self.models, *["best"] * self.table.best, *([self.ensemble] if self.ensemble else [])]
        return _fingerprint([*facts, *([asdict(self.ranking)] if self.ranking is not None else [])])

    @property
    def ensemble_table(self) -> InputTable:
        """The table with the columns of the ensemble, whose standard deviation is stored as an attribute."""
        return replace(self.table, attributes=(STD,))

    def ensemble_parts(self) -> Parts:
        """The parts of the ensemble."""
        return Parts(self.parts_folder / ENSEMBLE, self.fingerprint, self.ensemble_table.reward_columns, 1)

    @property
    def parts_folder(self) -> Path:
        return self.output.with_name(f".{self.output.name}.parts")

    def parts(self, model: int, settings: ComputeSettings) -> Parts:
        """The parts of a model."""
        fingerprint = _fingerprint([self.models[model], asdict(settings)])
        return Parts(
            self.parts_folder / fingerprint, fingerprint, self.table.reward_columns, len(self.table.attributes)
        )

    @property
    def marker(self) -> Path:
        """Records the fingerprint of the command, the hash of the output, and its rows without a reward."""
        return self.output.with_name(f".{self.output.name}.score.json")

    def is_done(self) -> bool:
        """Whether the output exists; raises UserError if it is not an output of this command."""
        if not self.output.exists():
            return False
        try:
            record = json.loads(self.marker.read_text(encoding="utf-8"))
            fingerprint, digest = record["fingerprint"], record["sha256"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            fingerprint = digest = None
        if fingerprint != self.fingerprint:
            raise UserError(
                f"{self.output}: exists, and was not made of this input, these models and settings; "
                "move it away or choose another --output"
            )
        if files.sha256(self.output) != digest:
            raise UserError(
                f"{self.output}: was changed after it was written; move it away to score the input again, or choose "
                "another --output"
            )
        return True


@contextmanager
def lock_output(job: ScoringJob) -> Iterator[None]:
    """Hold the output: the parts and the output of a job are written by one command at a time."""
    path = job.output.with_name(f".{job.output.name}.lock")
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(files.lock(path, timeout=0))
        except TimeoutError as error:
            if not path.exists():  # a file system without files, such as /proc
                raise UserError(f"{job.output}: cannot be written to; choose another --output") from None
            raise UserError(
                f"{job.output}: another command is writing it ({error}); wait for it, or choose another --output"
            ) from None
        except OSError as error:
            raise cannot_write(job.output, error) from error
        yield


def name_models(models: Sequence[str]) -> list[str]:
    """Short names of model folders: the last part of each path, with as many parents as make the names unique.

    `a/x` and `b/y` are `x` and `y`; `a/x` and `b/x` keep both parts. Raises UserError for a repeated model.
    """
    paths = [Path(os.path.abspath(os.path.expanduser(model))) for model in models]
    if len(set(paths)) < len(paths):
        raise UserError("--model has the same folder twice; give it once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def name_outputs(tables: Sequence[InputTable]) -> list[Path]:
    """Paths in the output folder: file names, with as many folders of the input as make the names of these unique.

    `a/train.csv` and `a/test.csv` are `train.parquet` and `test.parquet`; `a/x/0.csv` and `a/y/0.csv` keep `x` and `y`.
    """
    folders = [_folders_of(table.file) for table in tables]
    names = [Path(table.output_name) for table in tables]
    for depth in range(1, max(map(len, folders), default=0) + 1):
        repeated = {name for name, count in Counter(names).items() if count > 1}
        for place, (table, parts) in enumerate(zip(tables, folders, strict=True)):
            if names[place] in repeated:
                names[place] = Path(*parts[-depth:], table.output_name)
    return names


def _folders_of(file: DataFile) -> list[str]:
    """The folders that a file is in, or the parts of its URL."""
    name = without_query(file.name.partition("::")[0])
    parts = PurePosixPath(name if is_url(file.path) else os.path.abspath(name)).parent.parts
    return [part for part in parts if part not in ("/", "..") and not part.endswith(":")]


def plan_jobs(
    options: ScoreOptions,
    tables: Sequence[InputTable],
    names: Sequence[str],
    models: Sequence[ModelFolder | ServedModel | GivenRewards],
    scale: Sequence[tuple[float, float]] | None = None,
) -> list[ScoringJob]:
    """Where the rewards and the output of each input go. scale: of the models of an ensemble; see `shared_scale`.

    Raises UserError for an output that does not suit the inputs, and for reward columns that exist already.
    """
    output = Path(options.output).expanduser()
    is_file = output.suffix in PARQUET + JSON_LINES and not output.is_dir()
    if is_file and len(tables) > 1:
        raise UserError(f"--output {output}: one file for {len(tables)} inputs; name a folder")
    outputs = [output] if is_file else [output / name for name in name_outputs(tables)]
    # A link is written through, so that two names of one file have one lock.
    outputs = [path.resolve() if path.is_symlink() else path for path in outputs]
    same = next((path for path in outputs if outputs.count(path) > 1), None)
    if same is not None:
        raise UserError(f"{same}: the output of two inputs; score them into different folders")
    jobs = []
    for table, path in zip(tables, outputs, strict=True):
        if path.resolve() == Path(table.file.path).resolve():
            raise UserError(f"{path}: is the input itself; choose another --output")
        ensemble = "" if options.ensemble is None else f"{options.ensemble} {scale}"
        job = ScoringJob(table, path, [], [], ensemble, options.ranking)
        columns = [column for name in names for column in output_columns(table, name, len(names))]
        if ensemble:
            columns += output_columns(job.ensemble_table, ENSEMBLE, len(names))
        columns = columns if options.ranking is None else []
        existing = [column for column in columns if column in table.columns]
        if existing:
            raise UserError(f"{table.file.name}: already has a column {existing[0]!r}; rename it")
        facts = [table.file.identity, table.format_name, asdict(table.config), options.dtype, options.device]
        facts += ["normalize"] * bool(options.normalize) + (
            [dict(options.weights)] if options.weights is not None else []
        )
        prints = [_fingerprint([*facts, model.fingerprint]) for model in models]
        jobs.append(replace(job, models=prints, columns=columns))
    return jobs


def output_columns(table: InputTable, name: str, num_models: int) -> list[str]:
    """Columns that a model adds, prefixed with `NAME/` if there are several models."""
    return [f"{name}/{column}" if num_models > 1 else column for column in table.added_columns]


def _fingerprint(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
