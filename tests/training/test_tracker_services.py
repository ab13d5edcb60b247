"""TensorBoard, wandb and swanlab, the real packages offline: each wrote what it was told, and none asks for a login."""

from __future__ import annotations

import io
import json
import math
import signal
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.errors import UserError
from rm_gallery.training.trackers import Trackers
from tests.training.tracker_runs import (
    FACTS,
    LOG_CALLS,
    PAGE,
    PLAIN_CONFIG,
    REPORT,
    FakeTerminal,
    log_all,
    make_run,
    write_report,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no login and no service settings from the machine the tests run on; files go to the test's folder."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "SWANLAB_MODE", "SWANLAB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "SWANLAB_ROOT"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def wandb_package(no_login: None) -> Iterator[Any]:
    """The real wandb; afterwards its service process is ended and its settings forgotten."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # settings that an earlier test's environment left
    yield wandb
    wandb.teardown()


@pytest.fixture
def swanlab_package(no_login: None) -> Any:
    return pytest.importorskip("swanlab")


def stored_records(path: Path) -> list[bytes]:
    """The records of a .wandb or .swanlab file: 7 bytes of file header, then LevelDB's log format.

    Blocks of 32 KiB hold pieces, each behind crc32 u32, length u16, type u8 (1 whole, 2 first, 3 middle, 4 last).
    """
    data, position, pieces, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        pieces += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            records.append(pieces)
            pieces = b""
    return records


def wandb_records(run_dir: Path) -> list[Any]:
    from wandb.proto import wandb_internal_pb2

    (path,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    return [wandb_internal_pb2.Record.FromString(data) for data in stored_records(path)]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_wandb_without_login_stops_and_never_asks(
    is_terminal: bool, wandb_package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = FakeTerminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdin", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(
        UserError, match=r"wandb cannot start \(.+\): run `wandb login`, set WANDB_MODE=offline"
    ) as error:
        Trackers(["wandb"], make_run(tmp_path))
    assert "\n" not in str(error.value)
    assert sys.stdin is stream


@pytest.mark.parametrize("is_terminal", [False, True])
def test_swanlab_without_login_stops_and_never_asks(
    is_terminal: bool, swanlab_package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = FakeTerminal() if is_terminal else io.StringIO()
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(UserError, match=r"swanlab cannot start \(.+\): run `swanlab login`, set SWANLAB_MODE=offline"):
        Trackers(["swanlab"], make_run(tmp_path))


def test_tensorboard_file_holds_the_scalars_and_the_config(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(["tensorboard"], make_run(tmp_path))
    log_all(trackers)
    trackers.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.75), (2, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("val/loss")] == [(2, 0.625)]
    assert math.isnan(events.Scalars("val/accuracy")[0].value)
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text.removeprefix("```json\n").removesuffix("```")) == PLAIN_CONFIG


def test_tensorboard_resume_hides_the_steps_after_the_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start_step, loss in ((0, 0.75), (1, 0.5)):
        trackers = Trackers(["tensorboard"], make_run(tmp_path, start_step=start_step))
        for step in range(start_step + 1, 4 - start_step):
            trackers.log({"train/loss": loss}, step)
        trackers.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.75), (2, 0.5)]


def test_wandb_offline_file_holds_history_config_and_names(
    wandb_package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    # Where another test of this process has loaded it, wandb advertises a package for it.
    monkeypatch.delitem(sys.modules, "openai", raising=False)
    trackers = Trackers(["wandb"], make_run(tmp_path))
    log_all(trackers)
    trackers.close(failed=True)
    wandb_package.teardown()  # finish() returns before the service has written the file out
    records = wandb_records(tmp_path / "run")
    (start,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (start.project, start.display_name) == ("a-project", "an-experiment")
    config = {item.key: json.loads(item.value_json) for item in start.config.update}
    assert {name: config[name] for name in PLAIN_CONFIG} == PLAIN_CONFIG
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in row.items() if "/" in name or name == "_step"})
    # wandb makes one row per step, and writes NaN as its name.
    assert str(rows[1].pop("val/accuracy")).lower() == "nan"
    assert rows == [{"_step": 1, **LOG_CALLS[0][1]}, {"_step": 2, **LOG_CALLS[1][1], "val/loss": 0.625}]
    (exit_record,) = [record.exit for record in records if record.WhichOneof("record_type") == "exit"]
    assert exit_record.exit_code == 1
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_wandb_run_keeps_its_id_on_resume_and_only_then(
    wandb_package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for start_step in (0, 1, 0):
        trackers = Trackers(["wandb"], make_run(tmp_path, start_step=start_step))
        trackers.log({"train/loss": 0.5}, start_step + 1)
        trackers.close()
        ids.append(json.loads((tmp_path / "run" / "tracker_ids.json").read_text())["wandb"])
    assert ids[0] == ids[1] != ids[2]


def test_swanlab_offline_file_holds_scalars_and_config(
    swanlab_package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml
    from swanlab.proto.swanlab.record.v1 import record_pb2

    monkeypatch.setenv("SWANLAB_MODE", "offline")
    trackers = Trackers(["swanlab"], make_run(tmp_path))
    log_all(trackers)
    trackers.close()
    (path,) = (tmp_path / "run" / "swanlog").glob("run-*/*.swanlab")
    records = [record_pb2.Record.FromString(data) for data in stored_records(path)]
    (start,) = [record.start for record in records if record.HasField("start")]
    assert (start.project, start.name) == ("a-project", "an-experiment")
    scalars = [record.scalar for record in records if record.HasField("scalar")]
    values = {(scalar.key, scalar.step): scalar.value.number for scalar in scalars}
    assert math.isnan(values.pop(("val/accuracy", 2)))
    expected = {(name, step): value for step, metrics in LOG_CALLS for name, value in metrics.items()}
    expected.pop(("val/accuracy", 2))
    assert values == expected
    config = yaml.safe_load((path.parent / "files" / "config.yaml").read_text())
    assert {name: entry["value"] for name, entry in config.items()} == PLAIN_CONFIG


def test_swanlab_leaves_our_interrupt_handler_alone(
    swanlab_package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def before(number: int, frame: object) -> None: ...

    def later(number: int, frame: object) -> None: ...

    monkeypatch.setenv("SWANLAB_MODE", "offline")
    original, excepthook = signal.signal(signal.SIGINT, before), sys.excepthook
    try:
        trackers = Trackers(["swanlab"], make_run(tmp_path))
        assert signal.getsignal(signal.SIGINT) is before
        assert sys.excepthook is excepthook
        signal.signal(signal.SIGINT, later)
        trackers.close(failed=True)
        assert signal.getsignal(signal.SIGINT) is later
    finally:
        signal.signal(signal.SIGINT, original)


def test_tensorboard_gets_the_report_as_json_and_the_configuration_of_each_start(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start_step in (0, 1):
        run = replace(make_run(tmp_path, start_step=start_step), facts={**FACTS, "commit": f"c{start_step}"})
        trackers = Trackers(["tensorboard"], run)
        trackers.log({"train/loss": 0.5}, start_step + 1)
        trackers.attach(write_report(run.run_dir))
        trackers.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()

    def texts(name: str) -> list[tuple[int, Any]]:
        found = [(each.step, each.tensor_proto.string_val[0].decode()) for each in events.Tensors(name)]
        return [(step, json.loads(text.removeprefix("```json\n").removesuffix("```"))) for step, text in found]

    config = [(step, {**PLAIN_CONFIG, "run": {**FACTS, "commit": f"c{step}"}}) for step in (0, 1)]
    assert texts("config/text_summary") == config
    assert texts("report/text_summary")[-1] == (2, REPORT)


def test_wandb_gets_facts_and_the_report(wandb_package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = replace(make_run(tmp_path / "a [b]"), facts=FACTS)  # a glob would not match this name
    trackers = Trackers(["wandb"], run)
    trackers.attach(write_report(run.run_dir))
    trackers.close()
    wandb_package.teardown()
    (files,) = (run.run_dir / "wandb").glob("offline-run-*/files")
    assert json.loads((files / "report.json").read_text()) == REPORT
    assert (files / "report.html").read_text() == PAGE
    records = wandb_records(run.run_dir)
    (start,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert FACTS in [json.loads(item.value_json) for item in start.config.update if item.key == "run"]
    sent = [
        each.path for record in records if record.WhichOneof("record_type") == "files" for each in record.files.files
    ]
    assert {"report.html", "report.json"} <= set(sent)


def test_swanlab_gets_facts_and_the_report_and_keeps_its_id_on_resume(
    swanlab_package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml
    from swanlab.proto.swanlab.record.v1 import record_pb2

    monkeypatch.setenv("SWANLAB_MODE", "offline")
    ids, folders = [], []
    for start_step in (0, 1, 0):
        run = replace(make_run(tmp_path, start_step=start_step), facts=FACTS)
        trackers = Trackers(["swanlab"], run)
        trackers.log({"train/loss": 0.5}, start_step + 1)
        trackers.attach(write_report(run.run_dir))
        trackers.close()
        ids.append(json.loads((run.run_dir / "tracker_ids.json").read_text())["swanlab"])
        (new,) = set((run.run_dir / "swanlog").glob("run-*")) - set(folders)
        folders.append(new)
        time.sleep(1.01)  # the folder of a start is named after its second
    assert ids[0] == ids[1] != ids[2]
    for folder, run_id, step in zip(folders, ids, (1, 2, 1), strict=True):
        (path,) = folder.glob("*.swanlab")
        records = [record_pb2.Record.FromString(data) for data in stored_records(path)]
        assert [record.start.id for record in records if record.HasField("start")] == [run_id]
        assert [record.scalar.step for record in records if record.HasField("scalar")] == [step]
        config = yaml.safe_load((folder / "files" / "config.yaml").read_text())
        assert config["run"]["value"] == FACTS
        assert json.loads((folder / "files" / "report.json").read_text()) == REPORT
        assert (folder / "files" / "report.html").read_text() == PAGE
