"""What happens to every request before and after the application: key, size of the body, a client that leaves, errors.

No text of a request is logged, nor the message of an exception, which may quote one.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, TypeAlias

from rm_gallery.log import safe_traceback
from rm_gallery.serving.limits import Limits, Refused
from rm_gallery.serving.metrics import Metrics

log = logging.getLogger(__name__)

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Any]]
Send: TypeAlias = Callable[[Any], Awaitable[None]]

OPEN_PATHS = {"/", "/health", "/ready", "/livez", "/readyz"}
"""Paths of probes, and the page, which has no model's name: none needs a key."""
_MAX_DRAINED = 8  # bodies of the maximum size, of which a longer one is read and dropped before the answer


_MAX_BODIES = 64  # of the maximum size, in memory at a time


class _Left(Exception):
    """The client closed the connection."""


class Keys:
    """The API keys of a server. Comparisons take the same time for every key."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find(self, authorization: bytes) -> str | None:
        """A name of the key of `Authorization: Bearer KEY`; None for a wrong one."""
        kind, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        is_known = False
        for each in self._digests:
            is_known |= hmac.compare_digest(each, digest)
        return digest.hex()[:16] if is_known and kind.lower() == b"bearer" else None


class Guard:
    """ASGI middleware, the outermost one."""

    def __init__(self, app: Any, *, keys: Keys, limits: Limits, metrics: Metrics, paths: set[str]) -> None:
        """paths: those of the application, which figures are counted by."""
        self.app, self.keys, self.limits, self.metrics, self.paths = app, keys, limits, metrics, paths
        self._held = 0  # bytes of the bodies of all open requests
        self.num_cut = 0
        """Requests that had no answer when the server stopped."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"
        status = 0

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started = time.monotonic()
        with self.metrics.open.track_inprogress():
            try:
                await self._answer(scope, receive, counted)
            except _Left:
                self.metrics.left.inc()
                return
            except asyncio.CancelledError:
                self.num_cut += 1
                raise
            except Refused as refused:
                await _send(counted, refused)
            except Exception as error:
                log.error("%s: %s\n%s", path, type(error).__name__, _frames(error))
                if not status:
                    await _send(counted, Refused(500, f"{type(error).__name__}; the log of the server has the place"))
        self.metrics.requests.labels(path, str(status)).inc()
        self.metrics.seconds.labels(path).observe(time.monotonic() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        scope["rm_gallery.client"] = self._client(scope, headers)
        held = [0]
        try:
            body = await self._read(headers, receive, held)
            await self._run(scope, receive, send, body)
        finally:
            self._held -= held[0]

    async def _run(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """The answer of the application, or _Left if the client closes the connection before."""
        given = is_sent = False

        async def watched(message: Any) -> None:
            nonlocal is_sent
            await send(message)
            is_sent = is_sent or (message["type"] == "http.response.body" and not message.get("more_body", False))

        async def replay() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        answer = asyncio.ensure_future(self.app(scope, replay, watched))
        watch = asyncio.ensure_future(_closed(receive))
        try:
            await asyncio.wait({answer, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and not is_sent:
                answer.cancel()
                await asyncio.wait({answer})
                if answer.cancelled():
                    raise _Left
            await answer
        finally:
            for task in (answer, watch):
                task.cancel()

    def _client(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        """Who asks: the key, or without keys the address. Raises Refused with status 401."""
        address = (scope.get("client") or ("", 0))[0]
        if not self.keys or scope["path"] in OPEN_PATHS:
            return str(address)
        found = self.keys.find(headers.get(b"authorization", b""))
        if found is None:
            given = "the API key is not one of the server's" if b"authorization" in headers else "an API key is needed"
            raise Refused(401, f"{given}: Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"})
        return found

    async def _read(self, headers: dict[bytes, bytes], receive: Receive, held: list[int]) -> bytes:
        """The body; its bytes are counted in `held`.

        Raises Refused with status 413 for a long one, and 408 for one that does not arrive.
        """
        limit = self.limits.body_bytes
        length = headers.get(b"content-length", b"")
        declared = int(length) if length.isdigit() else 0
        if declared > limit and b"expect" in headers:
            raise self._too_long(declared)
        chunks: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self.limits.body_timeout):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Left
                    more = message.get("more_body", False)
                    size += len(message.get("body", b""))
                    if max(size, declared) <= limit:
                        chunks.append(message.get("body", b""))
                        held[0] += len(chunks[-1])
                        self._held += len(chunks[-1])
                        if self._held > _MAX_BODIES * limit:
                            raise Refused(
                                429, f"the bodies of open requests have more than {_MAX_BODIES} times --max-body-mb",
                                headers={"Retry-After": "1", "Connection": "close"},
                            )  # fmt: skip
                    elif size > _MAX_DRAINED * limit:
                        break  # the connection is closed with the answer
                    else:
                        chunks.clear()  # read on: most clients read the answer only after they have sent the body
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {self.limits.body_timeout:g} s") from None
        if max(size, declared) > limit:
            raise self._too_long(max(size, declared))
        return b"".join(chunks)

    def _too_long(self, size: int) -> Refused:
        return Refused(
            413,
            f"the body has {size} bytes, more than the {self.limits.body_bytes} of --max-body-mb; send fewer texts",
            headers={"Connection": "close"},
        )


async def _closed(receive: Receive) -> None:
    """Wait until the client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(send: Send, refused: Refused) -> None:
    body = json.dumps(refused.content()).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refused.headers}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _frames(error: BaseException) -> str:
    """The traceback without the message of the exception, which may quote a text."""
    return "\n".join(line for line in safe_traceback(error).splitlines() if line.startswith("  "))
