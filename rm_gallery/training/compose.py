"""Composing: a YAML file with `key=value` overrides, read by Hydra, becomes nested plain values, not yet checked."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rm_gallery.errors import UserError


def compose(file: str | None, overrides: Sequence[str], *, text_keys: Collection[str] = ()) -> dict[str, Any]:
    """The YAML file with overrides applied, as Hydra composes it: defaults lists and override grammar included.

    Hydra knows only keys that the file holds; here every override may also add one, and the check that follows
    decides which keys exist. Hydra writes no files this way.
    text_keys: keys whose values are text, so that `~/data`, `a=b` and `123` need no quotes.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = None if file is None else Path(file).expanduser().absolute()
    if path is not None and not path.is_file():
        raise UserError(f"{file}: no such configuration file (working directory {Path.cwd()})")
    if path is not None and path.suffix != ".yaml":
        raise UserError(f"{file}: the name of a configuration file ends with .yaml; rename it")
    folder = Path(__file__).parent.absolute() if path is None else path.parent
    arguments = [_for_hydra(override, folder, text_keys) for override in overrides]
    try:
        with initialize_config_dir(str(folder), version_base="1.3", job_name="rm-gallery"):
            composed = hydra_compose(None if path is None else path.stem, arguments)
        container = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OverrideParseException as error:
        override = error.override.removeprefix("++")
        raise UserError(
            f"{override}: cannot be read; close its brackets, or quote it if it is text, as in 'key=\"a b, c\"'"
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_sentence(error, file)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as UTF-8 text ({error}); write it again") from error
    except Exception as error:  # YAML that cannot be parsed ends in an error of the YAML library
        if type(error).__module__.startswith("yaml"):
            raise UserError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from error
        raise
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _for_hydra(override: str, folder: Path, text_keys: Collection[str]) -> str:
    """`key=value` as Hydra's `++key=value`, which sets a key whether or not the file holds it."""
    key, equals, value = override.partition("=")
    if not re.fullmatch(r"(\+{0,2}|~)[A-Za-z_][\w./@:-]*", key) or not (equals or key.startswith("~")):
        raise UserError(f"{override!r}: an override is written key=value without spaces, as in optim.lr=1e-6")
    is_hydra = key.startswith("hydra.") or (folder / key).is_dir()
    if not re.fullmatch(r"[\w.]+", key) or is_hydra:
        return override
    has_grammar = value.startswith(("'", '"', "[")) or "," in value or "${" in value
    if key in text_keys and value not in ("", "null") and not has_grammar:
        escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + (found[2] and '\\"'), value)
        return f'++{key}="{escaped}"'
    return f"++{override}"


def _sentence(error: Exception, file: str | None) -> str:
    text = " ".join(str(error).split()).partition(" See https://")[0].partition(" object_type=")[0]
    text = text.replace("++", "")
    if "Ambiguous value" in text:
        override = text.partition("'")[2].partition("' 1.")[0]
        key, _, value = override.partition("=")
        return f"{override}: write a list as {key}=[{value}], and quote text with a comma, as in '{key}=\"{value}\"'"
    if "must be a DictConfig" in text:
        return f"{file}: the file must hold keys with values, as in `optim: {{lr: 1e-6}}`"
    return f"{file or 'configuration'}: {text}"
