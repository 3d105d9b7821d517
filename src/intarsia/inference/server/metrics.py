"""What a server tells about itself, as Prometheus reads it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from intarsia.inference.worker import Worker

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Watch:
    """The times of one request."""

    def __init__(self, first: Histogram, between: Histogram) -> None:
        self._first, self._between = first, between
        self._began = self._last = time.perf_counter()
        self._written = 0

    def note(self, written: int) -> None:
        """So many tokens have been written now."""
        if written > self._written:
            now = time.perf_counter()
            if self._written:
                self._between.observe((now - self._last) / (written - self._written))
            else:
                self._first.observe(now - self._began)
            self._last, self._written = now, written


class Metrics(Collector):
    """Counters of the engine, and times of requests."""

    def __init__(self, worker: Worker, registry: CollectorRegistry) -> None:
        self._worker = worker
        named = {"registry": registry, "namespace": "intarsia"}
        self.turned_away = Counter("turned_away", "Requests that were told to come again.", **named)  # type: ignore[arg-type]
        self._requests = Counter("requests", "Requests that were answered, by how.", ["result"], **named)  # type: ignore[arg-type]
        self._first = Histogram(
            "first_token_seconds",
            "Until the first token of a request.",
            buckets=SECONDS,
            **named,  # type: ignore[arg-type]
        )
        self._between = Histogram(
            "token_seconds",
            "Between tokens of a request.",
            buckets=SECONDS,
            **named,  # type: ignore[arg-type]
        )
        registry.register(self)

    @contextmanager
    def watch(self) -> Iterator[Watch]:
        """Take the times of a request, and count how it went."""
        try:
            yield Watch(self._first, self._between)
        except BaseException as error:
            self._requests.labels(type(error).__name__).inc()
            raise
        self._requests.labels("done").inc()

    def collect(self) -> Iterable[Metric]:
        """The engine's counts as they are now."""
        report = self._worker.report
        for name, told, value in (
            ("running", "Texts that run.", report.running),
            ("waiting", "Texts that wait.", report.waiting),
            ("unread_tokens", "Tokens of prompts that are still to be read.", report.unread),
            ("open_requests", "Requests that have not got all their answers.", self._worker.open),
            ("snapshots", "States that are kept for later texts.", report.snapshots),
            ("state_bytes", "Memory of slots.", report.state_bytes),
            ("page_bytes", "Memory of pages.", report.page_bytes),
            ("used_pages_ratio", "Share of the pages that is in use.", report.used_pages),
        ):
            yield GaugeMetricFamily(f"intarsia_{name}", told, value)
        for name, told, value in (
            ("steps", "Steps of the engine.", report.steps),
            ("read_tokens", "Tokens that the model has read.", report.read),
            ("produced_tokens", "Tokens of answers.", report.produced),
            ("saved_tokens", "Tokens that were found read.", report.hits.saved_tokens),
            ("prefix_hits", "Texts of which something was found read.", report.hits.hits),
            ("preempted", "How often a text made way.", report.preempted),
            ("begun_anew", "How often all states were forgotten after an error.", report.begun_anew),
            ("guessed_tokens", "Tokens that were guessed ahead.", report.guessed),
            ("confirmed_tokens", "Those of them that were right.", report.confirmed),
        ):
            yield CounterMetricFamily(f"intarsia_{name}", told, value)
        misses = CounterMetricFamily(
            "intarsia_prefix_misses",
            "Texts that had to read more than they might, by reason.",
            labels=["reason"],
        )
        for reason, count in report.hits.misses.items():
            misses.add_metric([reason], count)
        yield misses
