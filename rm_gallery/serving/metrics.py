"""Figures of a server in the text format of Prometheus: no text and no key is part of any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from rm_gallery.serving.served import Models

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_COUNTERS: dict[str, tuple[str, Callable[[Any], float]]] = {
    "texts": ("Texts scored", lambda counts: counts.texts),
    "tokens": ("Tokens of the texts scored", lambda counts: counts.tokens),
    "computed_tokens": (
        "Tokens that the model computed; fewer where texts begin alike",
        lambda counts: counts.computed,
    ),
    "cached_tokens": ("Tokens that the prefix cache had", lambda counts: counts.cached),
    "packs": ("Forward passes", lambda counts: counts.packs),
    "queue_seconds": ("Seconds that requests waited for the model", lambda counts: counts.wait_seconds),
}


class _Queues:
    """Reads the queues when the figures are asked for."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterable[Any]:
        members = [
            (model.name, str(number), member)
            for model in self._models.by_name.values()
            for number, member in enumerate(model.members)
        ]
        waiting = GaugeMetricFamily(
            "rm_gallery_waiting_texts", "Texts accepted and not finished", labels=["model", "member"]
        )
        for name, number, member in members:
            waiting.add_metric([name, number], member.queue.num_waiting)
        yield waiting
        for what, (text, read) in _COUNTERS.items():
            family = CounterMetricFamily(f"rm_gallery_{what}", text, labels=["model", "member"])
            for name, number, member in members:
                family.add_metric([name, number], read(member.queue.counts))
            yield family


class Metrics:
    """The figures of one server."""

    def __init__(self, models: Models) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Queues(models))
        self.requests = Counter(
            "rm_gallery_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "rm_gallery_request_seconds", "Time to answer, by path", ["path"], buckets=_SECONDS, registry=self.registry
        )
        self.open = Gauge("rm_gallery_open_requests", "Requests that are being answered", registry=self.registry)
        self.left = Counter("rm_gallery_left_clients", "Clients that closed the connection", registry=self.registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)
