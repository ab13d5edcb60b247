"""mlflow and trackio, the real packages on this machine: what each stored is read back.

They need many packages, so they have an environment of their own (`make trackers`), with which `make test-all` runs
this file.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.errors import UserError
from rm_gallery.training.trackers import Trackers
from tests.training.short_runs import rows, send, train, when_logged, write_data
from tests.training.tracker_runs import FACTS, LOG_CALLS, PAGE, REPORT, log_all, make_run, write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def mlflow_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Makes a client of the store of a run directory."""
    pytest.importorskip("mlflow", reason="mlflow is not installed: run make trackers")
    pytest.importorskip("sqlalchemy", reason="mlflow has no local store without sqlalchemy: run make trackers")
    from mlflow import MlflowClient

    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, {"MLFLOW_DISABLE_TELEMETRY": "true"}.get(name, "0"))
    monkeypatch.chdir(tmp_path)

    def of(run_dir: Path) -> MlflowClient:
        return MlflowClient(tracking_uri=f"sqlite:///{run_dir.resolve()}/mlflow.db")

    return of


@pytest.fixture
def trackio_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The real trackio, which stores in the folder of the test."""
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed: run make trackers")
    from trackio import cas, sqlite_storage, utils

    for module in (trackio, utils, sqlite_storage, cas):  # it reads TRACKIO_DIR when it is imported
        for name, part in (("TRACKIO_DIR", ""), ("MEDIA_DIR", "media"), ("ARTIFACTS_DIR", "artifacts")):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, tmp_path / "trackio" / part)
    monkeypatch.chdir(tmp_path)
    yield trackio


def run_id(run_dir: Path, name: str) -> str:
    return str(json.loads((run_dir / "tracker_ids.json").read_text())[name])


def steps_and_values(client: Any, run: str, name: str) -> list[tuple[int, float]]:
    return [(each.step, each.value) for each in client.get_metric_history(run, name)]


def test_mlflow_holds_metrics_parameters_names_and_the_report(
    mlflow_client: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = replace(make_run(tmp_path / "a b"), facts=FACTS)
    trackers = Trackers(["mlflow"], run)
    log_all(trackers)
    trackers.log({"val/accuracy/a,b": 0.5}, 2)
    trackers.attach(write_report(run.run_dir))
    trackers.close(failed=True)
    assert capfd.readouterr() == ("", "")
    client, name = mlflow_client(run.run_dir), run_id(run.run_dir, "mlflow")
    stored = client.get_run(name)
    assert client.get_experiment(stored.info.experiment_id).name == "a-project"
    assert (stored.info.run_name, stored.info.status) == ("an-experiment", "FAILED")
    assert stored.data.params == {
        "trainer.learning_rate": "0.0001", "trainer.output_dir": "runs/a", "data.path": "pairs.jsonl",
        "run.versions.torch": "2", "run.data_fingerprints.train": "abc",
    }  # fmt: skip
    assert steps_and_values(client, name, "train/loss") == [(1, 0.75), (2, 0.5)]
    assert steps_and_values(client, name, "val/loss") == [(2, 0.625)]
    assert steps_and_values(client, name, "val/accuracy/a_b") == [(2, 0.5)], "it refuses a comma"
    assert math.isnan(stored.data.metrics["val/accuracy"])
    files = {each.path: Path(client.download_artifacts(name, each.path)) for each in client.list_artifacts(name)}
    assert sorted(files) == ["config.json", "report.html", "report.json"]
    assert files["report.html"].read_text() == PAGE and json.loads(files["report.json"].read_text()) == REPORT
    assert json.loads(files["config.json"].read_text())["run"] == FACTS


def test_mlflow_continues_its_run_on_resume_and_only_then(
    mlflow_client: Any, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = []
    for start_step, config in ((0, {"a": 1}), (1, {"a": 2, "b": 3}), (0, {})):
        run = replace(make_run(tmp_path, start_step=start_step), config=config)
        trackers = Trackers(["mlflow"], run)
        for step in (1, 2) if start_step == 0 else (2, 3):
            trackers.log({"train/loss": step / 4}, step)
        if start_step:
            trackers.log({"val/loss": 0.5}, 2)  # was lost with the process
        trackers.close()
        ids.append(run_id(run.run_dir, "mlflow"))
    assert ids[0] == ids[1] != ids[2]
    client = mlflow_client(tmp_path / "run")
    assert steps_and_values(client, ids[0], "train/loss") == [(1, 0.25), (2, 0.5), (3, 0.75)], "step 2 once"
    assert steps_and_values(client, ids[0], "val/loss") == [(2, 0.5)]
    stored = client.get_run(ids[0])
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"a": "1", "b": "3"}, "a parameter cannot change"
    assert json.loads(Path(client.download_artifacts(ids[0], "config.json")).read_text()) == {"a": 2, "b": 3}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    Trackers(["mlflow"], make_run(tmp_path, start_step=1)).close()
    assert "cannot be continued" in caplog.text and run_id(tmp_path / "run", "mlflow") not in ids


def test_a_server_that_is_not_there_stops_before_training(
    mlflow_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"mlflow cannot start \(.+\): fix or unset MLFLOW_TRACKING_URI") as error:
        Trackers(["mlflow"], make_run(tmp_path))
    assert "\n" not in str(error.value)


def trackio_logs(run: str) -> list[dict[str, Any]]:
    from trackio.sqlite_storage import SQLiteStorage

    found = SQLiteStorage.get_logs("a-project", "an-experiment", run_id=run)
    return [{name: value for name, value in row.items() if name != "timestamp"} for row in found]


def test_trackio_holds_metrics_config_and_the_report(
    trackio_package: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = replace(make_run(tmp_path), facts=FACTS)
    trackers = Trackers(["trackio"], run)
    log_all(trackers)
    trackers.attach(write_report(run.run_dir))
    trackers.close()
    assert capfd.readouterr() == ("", "")
    assert trackio_package.context_vars.current_run.get() is None, "it prints nothing when the process ends"
    name = run_id(run.run_dir, "trackio")
    stored = trackio_logs(name)
    assert math.isnan(stored[2].pop("val/accuracy"))
    assert stored == [{**LOG_CALLS[0][1], "step": 1}, {**LOG_CALLS[1][1], "step": 2}, {"val/loss": 0.625, "step": 2}]
    (listed,) = trackio_package.Api().runs("a-project")
    assert (listed.id, listed.name) == (name, "an-experiment")
    assert listed.config["run"] == FACTS and listed.config["trainer"]["learning_rate"] == 0.0001
    reader = trackio_package.init("a-project", name="reader", embed=False)
    try:
        for file, text in (("report.html", PAGE), ("report.json", json.dumps(REPORT))):
            folder = Path(reader.use_artifact(f"run-{name}-{file}:latest").download(str(tmp_path / f"back-{file}")))
            assert (folder / file).read_text() == text
    finally:
        reader.finish()


def test_trackio_continues_its_run_on_resume_and_only_then(trackio_package: Any, tmp_path: Path, caplog: Any) -> None:
    ids = []
    for folder, start_step in (("a", 0), ("a", 1), ("b", 0), ("a", 1)):
        trackers = Trackers(["trackio"], make_run(tmp_path / folder, start_step=start_step))
        trackers.log({"train/loss": 0.5}, start_step + 1)
        trackers.close()
        ids.append(run_id(tmp_path / folder / "run", "trackio"))
    assert ids[0] == ids[1] and len(set(ids)) == 3, "never that of another run directory with the same name"
    assert [row["step"] for row in trackio_logs(ids[0])] == [1, 2]
    assert [row["step"] for row in trackio_logs(ids[2])] == [1]
    assert "a newer one of the name an-experiment: a new run is started" in caplog.text


@pytest.mark.curves
def test_a_run_that_is_stopped_and_resumed_is_one_run_in_both(
    mlflow_client: Any, trackio_package: Any, qwen2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data()
    options = ("trainer.logger=[mlflow, trackio]", "trainer.project_name=a-project", "trainer.test_freq=2")
    when_logged(monkeypatch, 3, send(signal.SIGTERM))
    train(qwen2_folder, "an-experiment", *options, status=143)
    before = [run_id(Path("runs/an-experiment"), name) for name in ("mlflow", "trackio")]
    run_dir = train(qwen2_folder, "an-experiment", *options)
    assert [run_id(run_dir, name) for name in ("mlflow", "trackio")] == before
    client = mlflow_client(run_dir)
    expected = [(row["step"], row["train/loss"]) for row in rows(run_dir) if "train/loss" in row]
    assert steps_and_values(client, before[0], "train/loss") == expected
    assert [row["step"] for row in trackio_logs(before[1]) if "train/loss" in row] == [step for step, _ in expected]
    figures = json.loads(Path(client.download_artifacts(before[0], "report.json")).read_text())
    assert (figures["step"], figures["total_steps"]) == (6, 6)
    assert figures["metrics"]["train/loss"] == pytest.approx(expected[-1][1])
    assert figures["facts"]["versions"]["torch"] and figures["facts"]["data"]["train"]["fingerprint"]
    page = Path(client.download_artifacts(before[0], "report.html")).read_text()
    assert page == (run_dir / "report.html").read_text()
