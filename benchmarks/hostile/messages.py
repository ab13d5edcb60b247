"""Messages and files that are written: secrets, terminal escapes, results files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.hostile.box import Box, Outcome, attempt, check, text_checkpoint
from rm_gallery.core.graders.base_grader import BaseGrader, GraderScore
from rm_gallery.core.models import OpenAIChatModel
from rm_gallery.core.runner import GradingRunner
from rm_gallery.errors import UserError
from tests.small import text_pairs, write_pairs

ESCAPES = "\x1b[31mred\x1b]0;title\x07\r\x9b2J\u202e\u2066\u2028"


def nothing_of(secrets: Sequence[str], box: Box, *done: Outcome) -> str:
    """Neither a file of the run nor what was printed holds a secret."""
    paths = [path for path in box.path("runs").rglob("*") if path.is_file()]
    for path in paths:
        content = path.read_bytes()
        found = [secret for secret in secrets if secret.encode() in content]
        check(not found, f"{found} in {path.name}")
    for each in done:
        found = [secret for secret in secrets if secret in each.text]
        check(not found, f"{found} printed: {each.last}")
    return f"nothing in {len(paths)} files and {len(done)} outputs"


@attempt("the value is in no file; config.yaml reads back")
def secret_of_the_environment(box: Box) -> str:
    os.environ.update(MY_SECRET="sk-abc-123", OTHER_TOKEN="t0ken/with+slash", MY_NUMBER="0.015625")
    done = box.train(
        "trainer.project_name=${oc.env:MY_SECRET}", "data.source_key=${oc.env:NONE,source}",
        "optim.weight_decay=${oc.env:MY_NUMBER}", f"data.cache_dir={box.path('cache')}-${{oc.env:MY_SECRET}}",
        f"data.train_files=[{{path: '{box.pairs('a.parquet')}', name: 'n-${{oc.env:OTHER_TOKEN}}'}}]",
        "trainer.logger=[console,tensorboard]",
    )  # fmt: skip
    done.done()
    happened = nothing_of(["sk-abc-123", "t0ken/with"], box, done)
    config = box.path("runs/run/config.yaml").read_text()
    check("weight_decay: ${oc.env:MY_NUMBER}" in config, "a number was written to config.yaml")
    card = box.path("runs/run/global_step_3/README.md").read_text()
    check("0.015625" not in card, "a number was written to the model card")
    again = box.run("validate-config", "--config", str(box.path("runs/run/config.yaml")))
    again.done()
    return happened


@attempt("a changed secret resumes with a warning that does not hold it")
def secret_that_changes_before_a_resume(box: Box) -> str:
    override = "trainer.project_name=${oc.env:MY_SECRET}"
    os.environ["MY_SECRET"] = "first-secret-1"
    box.train(override, "trainer.save_freq=1").done()
    box.path("runs/run/global_step_3").rename(box.path("gone"))
    os.environ["MY_SECRET"] = "other-secret-2"
    done = box.train(override, "trainer.save_freq=1")
    nothing_of(["first-secret", "other-secret"], box, done)
    return done.done("changed settings")


@attempt("no file and no message holds the credentials")
def credentials_in_a_url_of_data(box: Box) -> str:
    from rm_gallery.data.sources import remote

    remote._WAITS = (0.01,)  # type: ignore[assignment]
    urls = ("http://user:pass-word@127.0.0.1:9/a.parquet?token=tok-en", "s3://AKEY:se/cret+1@bucket/a.parquet",
            "zip://a.csv::http://user:pass-word@127.0.0.1:9/a.zip?sig=sig-nature")  # fmt: skip
    done = [box.train(f"data.train_files='{url}'", "data.max_length=64") for url in urls]
    done += [box.run("show-data", f"data.train_files='{urls[0]}'"), box.score(urls[0])]
    done.append(box.run(*box.arguments(f"data.train_files='{urls[0]}'"), "--debug"))
    for each in done:
        each.refused() if "--debug" not in each.text and "Traceback" not in each.err else None
    return nothing_of(["pass-word", "tok-en", "se/cret", "sig-nature"], box, *done)


@attempt("no file and no message holds the credentials")
def credentials_in_the_url_of_the_mirror(box: Box) -> str:
    done = box.train("trainer.default_hdfs_dir=memory://user:pass-word@host/a?token=tok-en")
    happened = nothing_of(["pass-word", "tok-en"], box, done)
    unknown = box.train("trainer.resume_mode=nope://user:pass-word@host/global_step_1", name="b")
    nothing_of(["pass-word"], box, unknown)
    unknown.refused()
    return happened


@attempt("no message, representation or results file holds key or password")
def credentials_of_a_chat_model(box: Box) -> str:
    model = OpenAIChatModel("judge", api_key="my-own-key-1", base_url="http://user:pass-word@127.0.0.1:9/v1",
                            max_retries=0, timeout=2)  # fmt: skip

    class Judge(BaseGrader):
        def __init__(self) -> None:
            super().__init__("judge")
            self.model, self.api_key = model, "my-own-key-1"

        async def aevaluate(self, text: str, **kwargs: Any) -> GraderScore:  # type: ignore[override]
            response = await self.model.achat(text)
            return GraderScore(score=float(response.content))

    path = box.path("results.jsonl")
    results = GradingRunner({"a": Judge()}, output_path=path, show_progress=False).run([{"text": "x"}])
    text = repr(model) + repr(vars(model)) + str(results) + path.read_text()
    found = re.findall("my-own-key|pass-word", text)
    check(not found, f"{found} in {text[:200]}")
    return str(results["a"][0].error)


@attempt("a credential that was removed is named when config.yaml is read back")
def config_without_its_credentials(box: Box) -> str:
    box.train("trainer.default_hdfs_dir=memory://user:pass-word@host/a").done()
    done = box.run("validate-config", "--config", str(box.path("runs/run/config.yaml")))
    return done.refused("a credential was removed")


@attempt("no raw control character; the names are shown with escapes")
def escapes_in_column_names(box: Box) -> str:
    rows = [{ESCAPES: "a", "chosen\x1b": "b"}]
    path = box.write("a.jsonl", rows)
    export = box.run("export-data", "--input", path, "--output-dir", str(box.path("out")))
    shown = box.run("show-data", f"data.train_files={path}")
    for done in (box.train(f"data.train_files={path}"), shown, box.score(path), export):
        done.plain()
        happened = done.refused()
    return happened


@attempt("no raw control character; the file is named with escapes")
def escapes_in_file_names(box: Box) -> str:
    path = box.path(f"{ESCAPES}\n.jsonl".replace("/", ""))
    write_pairs(path.with_suffix(".parquet"), text_pairs(4))
    path.write_text('{"a": 1}\n')
    for done in (box.train(f'data.train_files="{path}"'), box.run("show-data", f'data.train_files="{path}"'),
                 box.score(str(path)), box.score(str(path.with_suffix(".parquet"))), box.run("train", f"--{ESCAPES}"),
                 box.run("estimate", f"model={ESCAPES}"), box.run("train", f"trainer.{ESCAPES}=1")):  # fmt: skip
        done.plain()
    return done.last


@attempt("no raw control character in the report as text, HTML and JSON")
def escapes_in_rows(box: Box) -> str:
    rows = [
        {
            "prompt": f"q{n} {ESCAPES}",
            "chosen": f"good {ESCAPES} {n}",
            "rejected": f"bad {n}",
            "source": f"s{n % 2}{ESCAPES}",
        }
        for n in range(24)
    ]
    path = box.write("a.jsonl", rows)
    page = box.path("a.html")
    box.run("show-data", f"data.train_files={path}", "--html", str(page)).plain()
    box.run("show-data", f"data.train_files={path}", "--json").plain()
    found = sorted(set(page.read_text()) & set("\x1b\x9b\u202e\u2066\u2028\r\x07"))
    check(not found, f"raw {found!r} in the page")
    done = box.train(f"data.train_files={path}", f"data.val_files={path}", "trainer.logger=[console]")
    done.done()
    done.plain()
    return "no control character; names of metrics are escaped"


@attempt("one log line: a name with line breaks forges no second one")
def line_breaks_that_forge_a_log_line(box: Box) -> str:
    forged = "x\nI 12:00:00 saved /tmp/evil\nrm-gallery: error: all is lost\r\n"
    rows = [
        {"chosen": f"good {n}", "rejected": f"bad {n}", forged: f"a long text that looks like input {n}"}
        for n in range(24)
    ]
    done = box.train(f"data.train_files={box.write('a.jsonl', rows)}")
    started = [line for line in done.err.splitlines() if line.startswith(("I 12:00:00", "rm-gallery: error: all"))]
    check(not started, f"forged: {started}")
    return done.done()


@attempt("no raw control character in an error, with --debug too")
def escapes_in_configuration_values(box: Box) -> str:
    for override in (
        f"trainer.logger=['{ESCAPES}']", f"data.format='{ESCAPES}'", f"model.partial_pretrain='/no{ESCAPES}'",
        f"trainer.resume_mode='{ESCAPES}'", f"trainer.experiment_name='a/{ESCAPES}'",
    ):  # fmt: skip
        for debug in ([], ["--debug"]):
            done = box.run(*box.arguments(override), *debug)
            check(done.status == 2, f"status {done.status}: {done.last}")
            done.plain()
    return done.last


class Length(BaseGrader):
    """Scores the length of a text."""

    async def aevaluate(self, text: str, **kwargs: Any) -> GraderScore:  # type: ignore[override]
        return GraderScore(score=len(text))

    def fingerprint(self) -> str:
        return "length"


def grade(path: Path, count: int = 5) -> list[Any]:
    runner = GradingRunner({"a": Length("a")}, output_path=path, show_progress=False)
    return runner.run([{"text": "x" * n} for n in range(count)])["a"]


@attempt("refused in words; the file keeps its bytes")
def results_file_that_no_run_wrote(box: Box) -> str:
    path = box.path("results.jsonl")
    grade(path)
    good = path.read_bytes()
    first = json.loads(good.splitlines()[0])
    happened = ""
    lines = ['{"index": ' + "[" * 100_000, '{"a": ' * 5000, "[]", '{"prompt": "x"}', "\x1b[2J"]
    changes: list[tuple[str, Any]] = [
        ("index", -1), ("index", "0"), ("index", 1e400), ("index", True), ("grader", 5), ("kind", []),
        ("result", {"score": "9"}), ("result", {"score": float("nan")}),
    ]  # fmt: skip
    lines += [json.dumps({**first, key: value}) for key, value in changes]
    for line in lines:
        path.write_bytes(good + line.encode() + b"\n")
        before = path.read_bytes()
        try:
            grade(path)
        except UserError as error:
            happened = str(error)
        else:
            check(False, f"read {line[:60]}")
        check(path.read_bytes() == before, f"{line[:60]}: the file was changed")
    return happened


@attempt("refused in words; the file keeps its bytes")
def results_file_is_another_file(box: Box) -> str:
    path = box.path("notes.txt")
    for text in ("my notes, without a line end", "# Title\n\nText", '{"index": 3', "{", "\ufeff"):
        path.write_text(text, encoding="utf-8")
        try:
            grade(path)
        except UserError as error:
            happened = str(error)
            check(path.read_text(encoding="utf-8") == text, f"{text!r} was changed")
        else:
            check(text.startswith('{"index": ') or text in ("{", "\ufeff"), f"{text!r} was overwritten")
    return happened


@attempt("the same results; only what is missing is graded again")
def results_file_cut_at_every_byte_of_its_last_line(box: Box) -> str:
    path = box.path("results.jsonl")
    expected = grade(path)
    content = path.read_bytes()
    start = content[:-1].rindex(b"\n") + 1
    for end in range(start, len(content) + 1):
        path.write_bytes(content[:end])
        check(grade(path) == expected, f"other results after {end - start} bytes")
    return f"{len(content) - start + 1} places, the same results"


@attempt("the same results, duplicates and another order included")
def results_file_shuffled_and_duplicated(box: Box) -> str:
    path = box.path("results.jsonl")
    expected = grade(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"\xef\xbb\xbf" + b"".join([*reversed(lines), b"\r\n", *lines]))
    check(grade(path) == expected, "other results")
    return "the same results"


@attempt("as many rewards as rows; a model path with control characters is escaped")
def model_folder_with_escapes_in_its_name(box: Box) -> str:
    folder = box.copy(text_checkpoint(), f"m{ESCAPES}")
    done = box.score(box.responses(count=4), model=folder)
    done.plain()
    return done.done()
