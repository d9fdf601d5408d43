"""Figures of a server for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from medmoe_jax.serving.models import Served

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """Counts what is asked and answered, by model."""

    def __init__(self, models: Iterable[Served]) -> None:
        """`models`: whose waiting requests are counted."""
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "medmoe_requests", "Requests by HTTP status", ("model", "status"), registry=registry
        )
        self.seconds = Histogram(
            "medmoe_request_seconds",
            "Seconds to the end of an answer",
            ("model",),
            registry=registry,
            buckets=_SECONDS,
        )
        self.first_seconds = Histogram(
            "medmoe_first_token_seconds",
            "Seconds to the first token of an answer",
            ("model",),
            registry=registry,
            buckets=_SECONDS,
        )
        self.prompt_tokens = Counter(
            "medmoe_prompt_tokens", "Tokens read", ("model",), registry=registry
        )
        self.said_tokens = Counter(
            "medmoe_said_tokens", "Tokens generated", ("model",), registry=registry
        )
        pending = Gauge(
            "medmoe_pending_requests", "Requests that wait or are answered", ("model",),
            registry=registry,
        )  # fmt: skip
        places = Gauge(
            "medmoe_places", "The most requests that may wait or be answered", ("model",),
            registry=registry,
        )  # fmt: skip
        for one in models:
            pending.labels(one.name).set_function(lambda worker=one.worker: worker.pending)
            places.labels(one.name).set(one.worker.places)

    def page(self) -> tuple[bytes, str]:
        """All figures, and their type of content."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
