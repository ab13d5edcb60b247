"""report.html of a run, and the checks of its metrics."""

from __future__ import annotations

import json
import math
import os
import re
import threading
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from rm_gallery.cli import main
from rm_gallery.training.report import findings
from rm_gallery.training.report.history import History, Run, smooth, thin
from rm_gallery.training.report.live import serve
from rm_gallery.training.report.page import page_of
from rm_gallery.training.report.writer import ReportWriter
from rm_gallery.training.run_dir import tracked_facts
from tests.training.short_runs import train, write_data

STEPS = range(1, 201)


def run_of(total: int = 200, name: str = "a-run", **series: Any) -> Run:
    """A run with these metrics; `_` of a name stands for `/`, a function or a mapping gives the value of a step."""
    history = History()
    for key, values in series.items():
        metric = key.replace("__", "/")
        steps = STEPS if callable(values) else values
        for step in steps:
            history.add({metric: values(step) if callable(values) else values[step]}, step)
    return Run(name, history, {"optim": {"lr": 1e-6}}, {"total_steps": total})


def keys(check: Any, **series: Any) -> list[str]:
    return [each.key for each in check(run_of(**series))]


def noisy(level: float) -> Any:
    return lambda step: level + (0.01 if step % 2 else -0.01)


def test_a_loss_at_chance_is_found_and_one_that_falls_is_not() -> None:
    chance = {"train__margin": noisy(0), "train__accuracy": noisy(0.5)}
    assert keys(findings.loss_at_chance, train__loss=noisy(0.693), **chance) == ["loss at chance"]
    assert keys(findings.loss_at_chance, train__loss=lambda step: 0.693 - step / 1000, **chance) == []
    better = {**chance, "train__accuracy": noisy(0.7)}
    assert keys(findings.loss_at_chance, train__loss=noisy(0.693), **better) == [], "small margins, but right"
    assert keys(findings.loss_at_chance, train__loss={1: 0.693, 2: 0.693}, **chance) == [], "too early to tell"
    [found] = findings.loss_at_chance(run_of(train__loss=noisy(0.693), **chance))
    assert "raise optim.lr (now 1e-06)" in found.advice


def test_accuracy_that_is_perfect_early_is_found_and_at_the_end_is_not() -> None:
    check = findings.accuracy_too_early
    assert keys(check, val__accuracy={0: 1.0, 40: 1.0}) == ["accuracy 1.0 of the validation data"]
    assert keys(check, val__math__accuracy={40: 1.0}, val__accuracy={40: 0.9}) == ["accuracy 1.0 of math"]
    assert keys(check, val__accuracy={40: 0.9, 200: 1.0}) == []
    assert keys(check, train__accuracy=lambda step: 1.0 if step > 15 else 0.7) == ["accuracy 1.0 in training"]
    assert keys(check, train__accuracy=lambda step: 1.0 if step % 3 else 0.9) == []


def test_a_validation_loss_that_rises_while_the_training_loss_falls_is_found() -> None:
    falls: Any = lambda step: 0.7 - step / 400  # noqa: E731
    rises = {50: 0.6, 100: 0.5, 150: 0.6, 200: 0.7}
    assert keys(findings.overfitting, train__loss=falls, val__loss=rises) == ["overfitting of the validation data"]
    assert keys(findings.overfitting, train__loss=falls, val__a__loss=rises) == ["overfitting of a"]
    assert keys(findings.overfitting, train__loss=falls, val__loss={50: 0.6, 100: 0.5, 150: 0.51, 200: 0.505}) == []
    assert keys(findings.overfitting, train__loss=lambda step: 0.5 + step / 400, val__loss=rises) == [], "both rise"


def test_rewards_that_drift_beyond_their_margin_are_found() -> None:
    def rewards(level: Any, margin: float) -> dict[str, Any]:
        return {"train__reward_chosen": lambda step: level(step) + margin / 2,
                "train__reward_rejected": lambda step: level(step) - margin / 2,
                "train__margin": lambda step: margin}  # fmt: skip

    drift = rewards(lambda step: -step / 20, 1.0)
    assert keys(findings.drifting_rewards, **drift) == ["drifting rewards"]
    assert keys(findings.drifting_rewards, **rewards(lambda step: -step / 20, 9.0)) == [], "small beside the margin"
    assert keys(findings.drifting_rewards, **rewards(lambda step: math.sin(step), 1.0)) == []


def test_a_growing_length_correlation_is_found() -> None:
    check = findings.growing_length_bias
    assert keys(check, val__length_correlation={50: 0.1, 200: 0.5}) == ["length bias of the validation data"]
    assert keys(check, val__length_correlation={50: 0.5, 200: 0.55}) == [], "as in the data from the start"
    assert keys(check, val__length_correlation={50: -0.1, 200: 0.2}) == []


def test_skipped_steps_are_found() -> None:
    assert keys(findings.skipped_steps, train__bad_steps={1: 0.0, 2: 3.0}) == ["skipped steps"]
    assert keys(findings.skipped_steps, train__bad_steps={1: 0.0}) == []


def test_curves_are_smoothed_and_thinned_without_losing_their_ends() -> None:
    points = [(step, float(step)) for step in range(1000)]
    assert smooth([(0, 0.0), (1, 3.0), (2, 0.0)], 1) == [(0, 1.5), (1, 1.0), (2, 1.5)]
    assert len(thin(points, 300)) <= 300 and thin(points, 300)[-1] == points[-1] and thin(points[:9], 9) == points[:9]


EVIL = "<script>alert(1)</script>\u202e"


def test_the_page_is_self_contained_and_its_text_is_only_text() -> None:
    series = {"train__loss": noisy(0.693), "train__margin": noisy(0), "train__accuracy": noisy(0.5)}
    runs = [run_of(name=name, val__loss={50: 0.7, 200: 0.6}, val__a__accuracy={50: 0.5}, **series)
            for name in (EVIL, "b")]  # fmt: skip
    runs[0] = Run(EVIL, runs[0].history, {"data": {"x": EVIL}, "optim": {"lr": 1.0}}, {"total_steps": 200, "data": {
        "train": {"files": [EVIL], "comparisons": 3, "tokens": "x", "dropped": {EVIL: {"rows": 1, "first": ""}}},
        "eval_sets": {EVIL: {}},
    }})  # fmt: skip
    for page in (page_of(runs[:1]), page_of(runs)):
        assert "<script" not in page and "\u202e" not in page and "default-src 'none'" in page
        assert not re.findall(r'\s(src|href|on\w+)="', page), "nothing is fetched or run"
        assert "loss is still that of chance" in page
        pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
        assert len(pictures) > 3
        for picture in pictures:
            ElementTree.fromstring(picture)
    assert "data.x" in page and "not set" in page, "settings that differ"


@pytest.mark.curves
@pytest.mark.slow
def test_a_run_writes_its_report_and_one_that_cannot_be_written_does_not_end_it(
    qwen2_folder: Path, in_tmp: Path, caplog: Any
) -> None:
    write_data()
    run = train(qwen2_folder, "run", "trainer.test_freq=2", "trainer.eval_sets={other: train.parquet}")
    page = (run / "report.html").read_text()
    assert "step 6 of 6" in page and "val/other/accuracy" in page and "train.parquet" in page
    facts, recorded = json.loads((run / "run.json").read_text()), tracked_facts(run)
    assert recorded["versions"] == facts["versions"], "trackers get them, and the data fingerprints"
    assert recorded["data_fingerprints"]["other"] == facts["data"]["eval_sets"]["other"]["fingerprint"]
    assert os.listdir(run).count("report.html") == 1 and not list(run.glob(".report*")), "atomic"
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    (run / "report.html" / "x").touch()
    report = ReportWriter(run)
    report.log({"val/loss": 0.5}, 7)
    report.log({"val/loss": 0.5}, 8)
    assert caplog.text.count("report.html cannot be written and is omitted") == 1


def test_runs_are_compared_side_by_side(in_tmp: Path, capsys: Any) -> None:
    for name, rate in (("a", 0.001), ("b", 0.002)):
        Path(name).mkdir()
        lines = [{"step": 2, "time": 1.0, "val/loss": rate, "val/accuracy": None}, {"step": 4, "val/loss": 2 * rate}]
        Path(name, "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 5, "val/lo')
        Path(name, "config.yaml").write_text(f"optim: {{lr: {rate}, eps: 1}}\ntrainer: {{experiment_name: {name}}}\n")
    assert main(["report", "a", "b"]) == 0
    page = Path("compared.html").read_text()
    assert "optim.lr" in page and "optim.eps" not in page and "trainer.experiment_name" not in page
    assert "0.0020 (best 0.0010 at step 2)" in page and "0.0040 (best 0.0020 at step 2)" in page
    assert main(["report", "a"]) == 0 and Path("a/report.html").is_file()
    Path("mine.html").write_text("mine")
    for arguments, message in (
        (["a", "--output", "mine.html"], "mine.html: exists and is no report of a run"),
        (["c"], "c: no run (metrics.jsonl cannot be read: No such file or directory); give a run directory"),
        (["a", "--output", "no/such/a.html"], "no/such/a.html: cannot be written"),
    ):
        assert main(["report", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert Path("mine.html").read_text() == "mine"


def test_the_live_page_is_served_to_this_machine_only(in_tmp: Path, capsys: Any) -> None:
    Path("metrics.jsonl").write_text('{"step": 1, "val/loss": 0.5}\n')
    with serve(in_tmp, 0) as server:
        port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def ask(path: str, host: str, method: str = "GET") -> Any:
            connection = HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request(method, path, headers={"Host": host})
            answer = connection.getresponse()
            text = answer.read().decode()
            connection.close()
            return answer.status, answer.headers, text

        status, headers, page = ask("/", f"127.0.0.1:{port}")
        assert status == 200 and headers["Refresh"] == "10" and "0.5000" in page
        Path("metrics.jsonl").write_text('{"step": 1, "val/loss": 0.25}\n')
        assert "0.2500" in ask("/", f"localhost:{port}")[2], "made anew"
        assert ask("/", "evil.example")[0] == 403 and ask("/", "127.0.0.1")[0] == 403
        for path in ("/metrics.jsonl", "/../metrics.jsonl", "/?x"):
            assert ask(path, f"127.0.0.1:{port}")[0] == 404
        assert ask("/", f"127.0.0.1:{port}", "POST")[0] == 501
        assert main(["watch", ".", "--port", str(port)]) == 2
        assert f"--port {port}: cannot be used (another program uses it)" in capsys.readouterr().err
        server.shutdown()
    assert main(["watch", "nothing"]) == 2
