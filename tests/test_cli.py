"""The command line: exit statuses, what is printed, where options may stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rm_gallery import __version__
from rm_gallery.cli import main
from tests.small import text_pairs, write_pairs

NEEDED = ["model.partial_pretrain=./model", "data.train_files=train.parquet"]


@pytest.fixture(autouse=True)
def inputs(in_tmp: Path, qwen2_folder: Path) -> None:
    write_pairs(in_tmp / "train.parquet", text_pairs(1))
    (in_tmp / "model").symlink_to(qwen2_folder)


def test_a_valid_configuration_ends_with_0_and_names_the_run_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate-config", *NEEDED, "trainer.experiment_name=a"]) == 0
    assert capsys.readouterr().out == "configuration is valid; run directory: checkpoints/bt/a\n"


def test_validating_writes_nothing(in_tmp: Path) -> None:
    main(["validate-config", *NEEDED])
    assert sorted(path.name for path in in_tmp.iterdir()) == ["model", "train.parquet"]


def test_validating_looks_into_files_and_folders(capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(Path("other.parquet"), [{"chosen": "a good answer", "lost": "a bad answer"}])
    assert main(["validate-config", *NEEDED, "data.val_files=other.parquet"]) == 2
    assert "other.parquet: no column 'rejected'" in capsys.readouterr().err
    Path("checkpoints/bt/global_step_1").mkdir(parents=True)
    assert main(["validate-config", *NEEDED, "trainer.experiment_name=bt"]) == 2
    assert "checkpoints/bt: holds an earlier run" in capsys.readouterr().err


def test_problems_end_with_2_and_a_line_each_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate-config", *NEEDED, "optim.lr=x", "data.max_length=0"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "rm-gallery: error: optim.lr='x': must be a number",
        "rm-gallery: error: data.max_length=0: must be at least 1",
    ]


def test_debug_shows_the_traceback_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate-config", *NEEDED, "optim.lr=x", "--debug"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last):")
    assert printed.endswith("rm-gallery: error: optim.lr='x': must be a number\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "own.yaml", *NEEDED, "optim.lr=2"],
        [*NEEDED, "--config", "own.yaml", "optim.lr=2"],
        [NEEDED[0], "--debug", NEEDED[1], "--config=own.yaml", "optim.lr=1", "optim.lr=2"],
    ],
)
def test_options_may_stand_before_between_and_behind_overrides(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own.yaml").write_text("trainer:\n  experiment_name: own-${optim.lr}\noptim:\n  lr: 1\n")
    assert main(["validate-config", *arguments]) == 0
    assert capsys.readouterr().out.endswith("/own-2\n")


def test_a_recipe_gives_the_file_to_start_from(capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text("trainer:\n  experiment_name: recipe\n")
    assert main(["validate-config", *NEEDED], default_config="recipe.yaml") == 0
    assert capsys.readouterr().out.endswith("/recipe\n")


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train", "--confg=a"], ["train", "-x"]])
def test_a_wrong_command_or_option_ends_with_2_and_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("usage: rm-gallery")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"rm-gallery {__version__}\n"


def test_ctrl_c_ends_with_130_and_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rm_gallery.training.config.load_config", interrupt)
    assert main(["validate-config"]) == 130
    assert capsys.readouterr().err == "rm-gallery: stopped by Ctrl-C; rerun the command to resume\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--version"], 0),
        (["estimate", "--help"], 0),
        (["estimate", "n_gpus=0"], 2),
        (["show-data", "data.train_files=train.parquet"], 0),
    ],
)
def test_what_needs_no_model_loads_neither_torch_nor_transformers(arguments: list[str], status: int) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from rm_gallery.cli import main
try:
    status = main({arguments!r})
except SystemExit as stopped:
    status = stopped.code
loaded = [name for name in ("torch", "transformers", "datasets", "pandas") if name in sys.modules]
sys.exit(f"loaded: {{loaded}}" if loaded else status)
"""
    ran = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert ran.returncode == status, ran.stderr
