"""`rm-gallery push`: what is uploaded, to a stand-in of the hub, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rm_gallery.cli import main
from rm_gallery.files import sha256_files, write_manifest
from tests.data.sources.stand_in import TOKEN, StandIn, serving


@pytest.fixture
def hub(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(in_tmp / "no_token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving() as state:
        monkeypatch.setattr(constants, "ENDPOINT", state.url)
        yield state


@pytest.fixture
def checkpoint(in_tmp: Path) -> Path:
    """A folder with the files of a checkpoint."""
    folder = in_tmp / "run/global_step_5"
    (folder / "training_state").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "README.md", ".gitignore", "training_state/state.json"):
        (folder / name).write_text(json.dumps({"file": name}))
    names = ["config.json", "model.safetensors", "README.md", "training_state/state.json"]
    write_manifest(folder, sha256_files(folder, names))
    return folder


def test_the_model_and_its_card_are_uploaded_and_the_training_state_is_not(
    hub: StandIn, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(checkpoint), "org/my-rm"]) == 0
    assert capsys.readouterr().out == f"{hub.url}/org/my-rm\n"
    assert hub.uploads == {
        "org/my-rm": {
            name: (checkpoint / name).read_bytes() for name in ("README.md", "config.json", "model.safetensors")
        }
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "org/my-rm"], "nowhere: no such folder; give a checkpoint, e.g."),
        (["run", "org/my-rm"], "run: not a model folder (no config.json); its newest checkpoint is run/global_step_5"),
        (["run/global_step_5", "my-rm"], "my-rm: write the name of the repository as ORGANIZATION/NAME"),
        (["run/global_step_5", "org/a b"], "org/a b: "),
    ],
)
def test_what_cannot_be_uploaded_is_refused_in_a_sentence(
    arguments: list[str], message: str, hub: StandIn, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"rm-gallery: error: {message}")
    assert not any(hub.uploads.values())


def test_a_damaged_checkpoint_is_not_uploaded(
    hub: StandIn, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "model.safetensors").write_text("other")
    assert main(["push", str(checkpoint), "org/my-rm"]) == 2
    assert "damaged (model.safetensors is not what was written)" in capsys.readouterr().err
    assert not hub.asked


def test_without_a_token_or_a_network_it_says_what_to_do(
    hub: StandIn, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    assert main(["push", str(checkpoint), "org/my-rm"]) == 2
    assert (
        "refused the upload (status 401): the token is missing, wrong, or may not write there"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(checkpoint), "org/my-rm"]) == 2
    assert "org/my-rm: http://127.0.0.1:9 cannot be reached (" in capsys.readouterr().err
