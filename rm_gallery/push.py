"""`rm-gallery push`: uploads a checkpoint to the Hugging Face hub, without its training state."""

from __future__ import annotations

import logging
from pathlib import Path

from rm_gallery.data.sources.hub import client_errors
from rm_gallery.errors import UserError, one_line
from rm_gallery.files import MANIFEST, check_manifest
from rm_gallery.modeling.weight_files import read_adapter_files
from rm_gallery.training.model_card import NOT_UPLOADED

log = logging.getLogger(__name__)


def push(
    folder: str | Path,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a model folder to the repository `name` of the hub, and return its URL.

    name: `organization/name`; the repository is created if it does not exist. private: of a new repository.
    revision: branch to upload to, created if needed. The token is that of `hf auth login`, or $HF_TOKEN.
    Raises UserError for a folder that is no model or is damaged, and when the hub refuses or cannot be reached.
    """
    folder = Path(folder).expanduser()
    _check_folder(folder)
    adapter = read_adapter_files(str(folder), key="model")
    if adapter is not None and Path(adapter.base).is_absolute():
        log.warning(
            "%s: adapter_config.json names the base model by a local path, %s; write its hub name there, or push the "
            "folder that rm-gallery merge writes", folder, adapter.base,
        )  # fmt: skip
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"{name}: write the name of the repository as ORGANIZATION/NAME")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            ignore_patterns=list(NOT_UPLOADED),
            revision=revision,
            commit_message=message or f"Upload {folder.name}",
        )
    except LocalTokenNotFoundError as error:
        raise UserError(f"{name}: no token; run `hf auth login`, or set HF_TOKEN") from error
    except HFValidationError as error:
        raise UserError(f"{name}: {one_line(error)}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = "the token is missing, wrong, or may not write there; run `hf auth login`, or set HF_TOKEN"
        raise UserError(
            f"{name}: {api.endpoint} refused the upload (status {status}): "
            + (reason if status in (401, 403) else one_line(error))
        ) from error
    except client_errors() as error:
        raise UserError(f"{name}: {api.endpoint} cannot be reached ({one_line(error)}); check the network") from error
    return f"{api.endpoint}/{name}" + (f"/tree/{revision}" if revision else "")


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a checkpoint, e.g. checkpoints/bt/my-rm/global_step_500")
    checkpoints = sorted(folder.glob("global_step_*"), key=lambda path: (len(path.name), path.name))
    if not (folder / "config.json").is_file():
        hint = f"; its newest checkpoint is {checkpoints[-1]}" if checkpoints else ""
        raise UserError(f"{folder}: not a model folder (no config.json){hint}")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: holds no weights (*.safetensors)")
    if (folder / MANIFEST).is_file() and (fault := check_manifest(folder)):
        raise UserError(f"{folder}: damaged ({fault}); push another checkpoint")
