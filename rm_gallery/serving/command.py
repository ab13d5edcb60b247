"""`rm-gallery serve`: its options, the models it loads, and the process that answers."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import re
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rm_gallery.errors import UserError
from rm_gallery.safe_text import register_secret, visible
from rm_gallery.scoring.command import add_ensemble_options

log = logging.getLogger(__name__)

_LOADING = ("device", "dtype", "token_budget", "trust_remote_code", "base", "template_date")  # as `from_folder` has it
_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def add_serve(commands: Any, add_loading_options: Callable[[argparse.ArgumentParser], None]) -> None:
    command = commands.add_parser(
        "serve",
        help="answer requests for rewards over HTTP",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Serve reward models over HTTP: /classify and /pooling as vLLM has them,\n"
            "/v1/embeddings (SGLang), /get_reward (OpenRLHF), /score, /rerank (Cohere, Jina),\n"
            "/v1/chat/completions, /v1/models, /health, /ready, /metrics, /openapi.json.\n"
            "A MODEL is a checkpoint, a run, an adapter or a classifier with one label, or an\n"
            "ensemble A+B; NAME=MODEL gives it a name for requests, by default the last part\n"
            "of its path.\n"
            "  rm-gallery serve runs/a\n"
            "  rm-gallery serve --port 9000 helpful=runs/a safe=runs/b\n"
            "Needs the extra serve: pip install 'rm-gallery[serve]'. docs/serving.md."
        ),
    )
    add = command.add_argument
    add("models", nargs="+", metavar="MODEL", help="[NAME=]FOLDER, or [NAME=]A+B")
    add("--host", default="127.0.0.1", help="address (default: 127.0.0.1); another one needs an API key")
    add("--port", type=int, default=8000, help="port (default: 8000; 0 for a free one)")
    add("--api-key", action="append", default=[], metavar="KEY", help="that requests must have; prefer a file")
    add("--api-key-file", metavar="FILE", help="one key per line, # for comments")
    add("--max-length", type=int, metavar="N", help="tokens of a text (default: as the model allows)")
    add("--max-texts", type=int, default=2048, metavar="N", help="texts of a request (2048)")
    add("--max-body-mb", type=float, default=16.0, metavar="N", help="MiB of a request (16)")
    add("--max-waiting", type=int, default=8192, metavar="N", help="texts that are accepted and not finished (8192)")
    add(
        "--prefix-cache-mb",
        type=float,
        default=0.0,
        metavar="N",
        help="MiB for prompts seen lately, per model, so that later responses compute only their own tokens (0)",
    )
    add("--stop-timeout", type=int, default=60, metavar="S", help="seconds to finish accepted requests (60)")
    add_ensemble_options(command, "subtract the mean of the validation rewards, divide by their std")
    add_loading_options(command)
    add("--debug", action="store_true", help="print tracebacks and debug messages")
    command.set_defaults(run=_serve, words="models", when_stopped="the server had not started")


def _serve(arguments: argparse.Namespace) -> None:
    check_extra()
    from rm_gallery.serving.limits import Limits

    limits = Limits(
        arguments.max_body_mb,
        arguments.max_texts,
        arguments.max_length,
        arguments.max_waiting,
        arguments.prefix_cache_mb,
    )
    limits.check()
    keys = read_keys(arguments.api_key, arguments.api_key_file)
    check_address(arguments.host, keys)
    named = name_served(arguments.models)
    with open_socket(arguments.host, arguments.port) as listener:
        from rm_gallery.serving.app import make_app

        loading = {name: getattr(arguments, name) for name in _LOADING}
        models = load_models(
            named, limits, reduce=arguments.ensemble or "mean", normalize=arguments.normalize,
            quantized=not arguments.unquantized, **loading,
        )  # fmt: skip
        listener.listen(2048)  # not before: who connects gets an answer at once
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(visible(f"serving {', '.join(named)} at http://{shown}:{port}"), flush=True)
        app = make_app(models, limits, keys)
        run(app, listener, stop_timeout=arguments.stop_timeout)
        if app.num_cut:
            log.warning("%d requests had no answer after --stop-timeout=%d s", app.num_cut, arguments.stop_timeout)
        print("stopped" if app.num_cut else "stopped; all accepted requests were answered", flush=True)


def check_extra() -> None:
    """Raise UserError naming the extra if a package of the server is missing."""
    from importlib.util import find_spec

    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"serve needs {', '.join(missing)}: pip install 'rm-gallery[serve]'")


def read_keys(given: Sequence[str], file: str | None) -> list[str]:
    """The API keys of options. Raises UserError for a file that has none, and for a key that no header can have."""
    keys = list(given)
    if file is not None:
        try:
            lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file={file}: cannot be read ({error})") from error
        found = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
        if not found:
            raise UserError(f"--api-key-file={file}: it has no key; write one per line")
        keys += found
    for key in keys:
        register_secret(key)
        if not re.fullmatch(r"[!-~]+", key):
            raise UserError("--api-key, --api-key-file: a key has spaces or characters other than ASCII, or is empty")
    return keys


def check_address(host: str, keys: Sequence[str]) -> None:
    """Raise UserError for an address that other machines reach, without a key."""
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    if not is_local and not keys:
        raise UserError(
            f"--host={host}: other machines may reach it, so requests need a key: add --api-key-file FILE, or use "
            "127.0.0.1"
        )


def name_served(models: Sequence[str]) -> dict[str, list[str]]:
    """Name in requests -> the folder of a model, or those of an ensemble. Raises UserError for a repeated name."""
    from rm_gallery.scoring.ensemble import members_of

    found: dict[str, list[str]] = {}
    for text in models:
        name, sign, model = ("", "", text) if Path(text).expanduser().exists() else text.partition("=")
        if not sign:
            name, model = "", text
        if (sign and not name) or not model:
            raise UserError(f"{text}: must be FOLDER, NAME=FOLDER or A+B")
        folders = members_of(model)
        name = name or "+".join(Path(each).expanduser().resolve().name for each in folders)
        if name in found:
            raise UserError(f"{text}: another model has the name {name}; write NAME={text}")
        found[name] = folders
    return found


def load_models(
    named: dict[str, list[str]], limits: Any, *, reduce: str = "mean", normalize: bool | None = None, **settings: Any
) -> Any:
    """The models by name. reduce, normalize: see `RewardScorer.from_folders`; settings: see `from_folder`."""
    from rm_gallery.scoring.ensemble import Reduction
    from rm_gallery.scoring.scorer import RewardScorer
    from rm_gallery.serving.served import Member, Models, ServedModel

    reduction = Reduction(reduce)
    models = []
    for name, folders in named.items():
        if len(folders) == 1:
            scorers: list[Any] = [RewardScorer.from_folder(folders[0], normalize=bool(normalize), **settings)]
        else:
            ensemble = RewardScorer.from_folders(folders, reduce=reduce, normalize=normalize, **settings)
            scorers = ensemble.members
        models.append(ServedModel(name, [Member(scorer, limits) for scorer in scorers], reduction))
    return Models(models)


def open_socket(host: str, port: int) -> socket.socket:
    """A socket with this address, which does not listen yet. Raises UserError for one that cannot be used."""
    listener = None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio turns Nagle's algorithm off for sockets of this protocol only; with it, each answer waits 40 ms.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        hint = "choose another port (--port 0 takes a free one)"
        raise UserError(f"--host={host} --port={port}: {error}; {hint}") from error
    return listener


def run(app: Any, listener: socket.socket, *, stop_timeout: int = 60) -> None:
    """Answer requests until SIGTERM or Ctrl-C; a second Ctrl-C stops at once, without finishing requests."""
    import uvicorn

    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, proxy_headers=False, lifespan="on",
        timeout_graceful_shutdown=stop_timeout, timeout_keep_alive=75,
    )  # fmt: skip
    server = uvicorn.Server(config)
    # uvicorn raises the signal again when it has stopped; the process then ends as after any other command.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
