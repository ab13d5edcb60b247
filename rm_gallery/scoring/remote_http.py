"""Requests to reward servers: several endpoints in turn, retries with backoff, one deadline for a request."""

from __future__ import annotations

import email.utils
import itertools
import json
import logging
import random
import re
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rm_gallery.errors import UserError, one_line
from rm_gallery.scoring import forks
from rm_gallery.scoring.remote_protocols import PROTOCOLS, Protocol, RefusedText, Served, discover

log = logging.getLogger(__name__)

_CONNECT_S = _DISCOVERY_S = 10.0
_BACKOFF_S, _MAX_BACKOFF_S = 0.5, 30.0
_MAX_ANSWER = 64 * 2**20  # bytes
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class _Failed(Exception):
    """A try that may succeed later or elsewhere. wait: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass
class Endpoint:
    """One server."""

    url: str
    blocked_until: float = 0.0
    failures: int = 0
    """In a row."""
    served: Served | None = None
    lock: Any = field(default_factory=threading.Lock)


def split_url(url: str) -> tuple[str, Protocol | None]:
    """The address of a server without `/v1` or the path of a protocol, and the protocol of that path.

    Raises UserError for anything but http(s)://host[:port][/path].
    """
    try:
        parts = urlsplit(url)
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:
        raise UserError(f"{url!r} is not the URL of a server; write http://host:port") from None
    if parts.username is not None or parts.password is not None:
        raise UserError("the URL of a server has credentials; pass api_key=, or set RM_GALLERY_API_KEY")
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_valid or parts.query:
        raise UserError(f"{url!r} is not the URL of a server; write http://host:port")
    url = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
    for protocol in PROTOCOLS.values():
        if url.endswith(protocol.path):
            return url.removesuffix(protocol.path), protocol
    return url.removesuffix("/v1"), None


class Endpoints(forks.SurvivesFork):
    """Servers of one model, used in turn; one that fails is skipped for a while. Thread-safe."""

    def __init__(
        self, urls: Sequence[str], protocol: Protocol | None, model: str | None, *,
        api_key: str | None, timeout: float, retries: int, concurrency: int,
    ) -> None:  # fmt: skip
        """See `RemoteScorer`. Asks every server what it serves; raises UserError if none answers."""
        self.protocol, self.model = protocol, model
        self.timeout, self.retries, self.concurrency = timeout, retries, concurrency
        self._key = api_key
        self._headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {api_key}"} if api_key else {}),
        }
        self.endpoints = [Endpoint(url) for url in urls]
        self._turn = itertools.count()
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._client: Any = None
        self._pool: ThreadPoolExecutor | None = None
        forks.watch(self)
        self.served = self._first()

    def fork_locks(self) -> Sequence[Any]:
        return (self._lock,)

    def renew_after_fork(self) -> None:
        """Connections and threads are those of the other process."""
        self._client = self._pool = None
        for endpoint in self.endpoints:
            endpoint.lock = threading.Lock()

    def _first(self) -> Served:
        """What the endpoints serve. Those that do not answer are skipped with a warning."""
        errors: list[str] = []
        found: Served | None = None
        for endpoint in self.endpoints:
            try:
                served = self._served(endpoint, time.monotonic() + _DISCOVERY_S, found)
            except _Failed as error:
                errors.append(f"{endpoint.url}: {error}")
                self._block(endpoint, error)
            else:
                found = found or served
        if found is None:
            raise UserError(f"no reward server answers ({'; '.join(errors)}); check the address, or start the server")
        for text in errors:
            log.warning("%s; the server is skipped until it answers", text)
        return found

    def _served(self, endpoint: Endpoint, deadline: float, others: Served | None) -> Served:
        """What an endpoint serves, asked once. Raises UserError if it differs from what the others serve."""
        with endpoint.lock:
            if endpoint.served is None:
                served = discover(
                    endpoint.url, lambda path: self._get(endpoint, path, deadline), self.protocol, self.model
                )
                if others is not None and (served.protocol, served.model) != (others.protocol, others.model):
                    raise UserError(
                        f"{endpoint.url}: serves {served.model} by {served.protocol.title}, and another server "
                        f"{others.model} by {others.protocol.title}; several servers must have the same model"
                    )
                endpoint.served = served
            return endpoint.served

    def _get(self, endpoint: Endpoint, path: str, deadline: float) -> Any:
        status, _, content = self._request(
            "GET", endpoint.url + path, None, min(deadline, time.monotonic() + _DISCOVERY_S)
        )
        if status in (401, 403):
            raise self._unauthorized(endpoint)
        if status == 429 or status >= 500:
            raise _Failed(f"status {status}")
        try:
            return json.loads(content) if status == 200 else None
        except ValueError:
            return None

    def send(self, make: Callable[[Served], Mapping[str, Any]]) -> tuple[Any, Served]:
        """The answer to a request, and what the endpoint that gave it serves.

        Raises RefusedText if the server answers that the request itself cannot be scored (400, 413, 422), and
        UserError if no endpoint answers in time.
        """
        deadline = time.monotonic() + self.timeout
        reason = f"no answer within {self.timeout:g} s"
        for _ in range(self.retries + len(self.endpoints)):
            endpoint = self._next(deadline, reason)
            try:
                served = self._served(endpoint, deadline, self.served)
                url = endpoint.url + served.protocol.path
                body = json.dumps(make(served)).encode()
                answer = self._read(endpoint, url, *self._request("POST", url, body, self._limit(deadline)))
            except _Failed as error:
                reason = f"{endpoint.url}: {error}"
                self._block(endpoint, error)
                log.info("%s; trying again", reason)
                continue
            endpoint.failures = 0
            return answer, served
        raise UserError(f"{reason}, after {self.retries} retries; check the server, or raise retries")

    def _limit(self, deadline: float) -> float:
        """When a try ends: with several endpoints, another one may still answer after one that hangs."""
        now = time.monotonic()
        return deadline if len(self.endpoints) == 1 else now + (deadline - now) / 2

    def _next(self, deadline: float, reason: str) -> Endpoint:
        """The next endpoint that is not blocked; waits for one."""
        while not self._closed.is_set():
            now = time.monotonic()
            first = next(self._turn)
            order = [self.endpoints[(first + step) % len(self.endpoints)] for step in range(len(self.endpoints))]
            ready = next((each for each in order if each.blocked_until <= now), None)
            if ready is not None and now < deadline:
                return ready
            wait = min(each.blocked_until for each in order) - now
            if now + wait >= deadline:
                raise UserError(f"{reason}; gave up after timeout={self.timeout:g} seconds")
            self._closed.wait(max(wait, 0.0))
        raise RuntimeError("the scorer is closed")

    def _block(self, endpoint: Endpoint, error: _Failed) -> None:
        now = time.monotonic()
        with self._lock:
            if endpoint.blocked_until <= now:  # requests that failed together count once
                backoff = min(_MAX_BACKOFF_S, _BACKOFF_S * 2**endpoint.failures) * random.uniform(0.8, 1.2)
                endpoint.failures += 1
                endpoint.blocked_until = now + backoff
            endpoint.blocked_until = max(endpoint.blocked_until, now + error.wait)

    def _request(self, method: str, url: str, body: bytes | None, deadline: float) -> tuple[int, Any, bytes]:
        """Status, headers and body. Raises _Failed if there is no answer before the deadline."""
        client, library = self._open()
        left = max(deadline - time.monotonic(), 0.001)
        chunks: list[bytes] = []
        try:
            timeout = library.Timeout(left, connect=min(left, _CONNECT_S))
            with client.stream(method, url, content=body, headers=self._headers, timeout=timeout) as response:
                for chunk in response.iter_bytes():
                    chunks.append(chunk)
                    if time.monotonic() > deadline:  # a timeout of the library is one of each read
                        raise _Failed("the answer took too long")
                    if sum(map(len, chunks)) > _MAX_ANSWER:
                        raise UserError(f"{url}: an answer of more than {_MAX_ANSWER >> 20} MiB")
                return response.status_code, response.headers, b"".join(chunks)
        except library.TimeoutException as error:
            raise _Failed(f"no answer within {left:.3g} s") from error
        except library.HTTPError as error:
            raise _Failed(f"no connection ({self._hidden(one_line(error))})") from error

    def _read(self, endpoint: Endpoint, url: str, status: int, headers: Any, content: bytes) -> Any:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if status == 200:
            if answer is None:
                raise UserError(f"{url}: an answer that is not JSON; check the address and protocol=")
            return answer
        message = self._hidden(_message(answer))
        if status in (408, 425, 429) or status >= 500:
            raise _Failed(f"status {status}{message}", _retry_after(headers.get("retry-after", "")))
        if status in (400, 413, 422):
            raise RefusedText(f"the server refuses the text: status {status}{message}")
        if status in (401, 403):
            raise self._unauthorized(endpoint)
        raise UserError(f"{url}: status {status}{message}; check the address, model= and protocol=")

    def _unauthorized(self, endpoint: Endpoint) -> UserError:
        given = "does not accept the API key" if self._key else "needs an API key"
        return UserError(f"{endpoint.url}: the server {given}; pass api_key=, or set RM_GALLERY_API_KEY")

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _open(self) -> tuple[Any, Any]:
        """The HTTP client, and its library: that of huggingface_hub, httpx2 or before 2.0 httpx."""
        try:
            import httpx2 as library
        except ImportError:
            import httpx as library  # type: ignore[no-redef]
        with self._lock:
            if self._client is None:
                hosts = {urlsplit(each.url).hostname for each in self.endpoints}
                self._client = library.Client(
                    limits=library.Limits(max_connections=None, max_keepalive_connections=self.concurrency),
                    verify=any(each.url.startswith("https:") for each in self.endpoints),  # redirects are not followed
                    trust_env=not hosts <= _LOOPBACK,  # texts for this machine never pass a proxy
                )
                weakref.finalize(self, self._client.close)
            return self._client, library

    def pool(self) -> ThreadPoolExecutor:
        """The threads of requests."""
        with self._lock:
            if self._closed.is_set():
                raise RuntimeError("the scorer is closed")
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="rm-gallery-remote")
            return self._pool

    def close(self) -> None:
        """Stop waiting requests, close the connections. Idempotent."""
        self._closed.set()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._client is not None:
            self._client.close()


def _message(answer: Any) -> str:
    """`: what the server says`, from the shapes of error that servers have."""
    found = answer
    for key in ("error", "message", "detail"):
        if isinstance(found, Mapping) and key in found:
            found = found[key]
    return f": {one_line(found)}" if isinstance(found, str) and found.strip() else ""


def _retry_after(text: str) -> float:
    """Seconds of the header: a number or a date; 0 for anything else."""
    if re.fullmatch(r"\d+(\.\d+)?", text.strip()):
        return float(text)
    try:
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return 0.0
