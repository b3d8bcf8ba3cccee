"""Metrics for Prometheus, under vLLM's names where it has them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorakit.serving.names import Names
from lorakit.serving.requests import Delta, Request

LISTS = ("running_lora_adapters", "waiting_lora_adapters")
"""The labels that list adapters."""
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Gauges(Collector):
    """What is so at the moment when Prometheus asks."""


class Metrics:
    """Counts what is asked and answered.

    Args:
        names: whose adapters are shown.
        state: of what answers.
    """

    def __init__(self, names: Names[Any], state: Gauges) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(state)
        self._registry.register(_Adapters(names))
        self.model = names.name
        self.answers: dict[str, int] = defaultdict(int)

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(name, meaning, ("model_name", *labels), registry=self._registry)

        def histogram(name: str, meaning: str, *labels: str) -> Histogram:
            labels = ("model_name", *labels)
            return Histogram(name, meaning, labels, registry=self._registry, buckets=SECONDS)

        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.")
        self.written_tokens = counter("vllm:generation_tokens", "Tokens of answers.")
        self.success = counter("vllm:request_success", "Answers.", "finished_reason")
        self.first = histogram("vllm:time_to_first_token_seconds", "From arrival to first token.")
        self.between = histogram("vllm:inter_token_latency_seconds", "Between two tokens.")
        self.whole = histogram("vllm:e2e_request_latency_seconds", "From arrival to end.")
        adapter = "adapter_name"
        self.requests = counter("lora_requests", "Requests by adapter.", adapter)
        self.tokens = counter("lora_generation_tokens", "Tokens of answers by adapter.", adapter)
        self.errors = counter("lora_request_errors", "Failed requests by adapter.", adapter)
        self.own_first = histogram(
            "lora_time_to_first_token_seconds", "From arrival to first token by adapter.", adapter
        )

    def answered(self, name: str) -> int:
        """The requests that an adapter has answered, alone or with others."""
        return self.answers.get(name, 0)

    def text(self, may_ask: Callable[[str], bool] | None = None) -> bytes:
        """What Prometheus reads.

        Args:
            may_ask: whether an adapter may be named to those who read it; None: all may.
        """
        shown = self._registry if may_ask is None else _OfNames(self._registry, may_ask)
        return generate_latest(shown)

    def watched(
        self, request: Request, names: Sequence[str], deliver: Callable[[Delta], None]
    ) -> Callable[[Delta], None]:
        """A `deliver` that counts what a request of these adapters is told."""
        counted = CountedRequest(self, names, began=request.arrived)

        def watch(delta: Delta) -> None:
            if delta.tokens or delta.output is not None:
                counted.add(read=0 if counted.has_begun else len(request.prompt))
                counted.step()
            counted.add(written=len(delta.tokens))
            if delta.finish is not None:
                counted.end(delta.finish)
            deliver(delta)

        return watch


class _OfNames(Collector):
    """Metrics without those of adapters that may not be named.

    Args:
        every: the metrics.
        may_ask: whether an adapter may be named.
    """

    def __init__(self, every: CollectorRegistry, may_ask: Callable[[str], bool]) -> None:
        self._every, self._may_ask = every, may_ask

    def collect(self) -> Iterator[Metric]:
        """Yield them."""
        for metric in self._every.collect():
            metric.samples = [
                each._replace(labels={name: self._kept(name, v) for name, v in each.labels.items()})
                for each in metric.samples
                if self._are_known(each.labels.get("adapter_name", "").split("+"))
            ]
            yield metric

    def _are_known(self, names: Sequence[str]) -> bool:
        return all(not name or self._may_ask(name) for name in names)

    def _kept(self, label: str, value: str) -> str:
        """A label that lists adapters, without the others."""
        if label not in LISTS:
            return value
        return ",".join(name for name in value.split(",") if self._are_known([name]))


class CountedRequest:
    """A request as it is answered, in the metrics.

    Args:
        metrics: where it counts.
        names: of its adapters.
        began: when it came, by the monotonic clock.
    """

    def __init__(self, metrics: Metrics, names: Sequence[str], *, began: float) -> None:
        self._metrics, self._names, self._began = metrics, names, began
        self._labels = (metrics.model, "+".join(names))
        self._latest = 0.0

    @property
    def has_begun(self) -> bool:
        """Whether anything of the answer has come."""
        return self._latest > 0

    def step(self) -> None:
        """Something of the answer has come."""
        metrics, now = self._metrics, time.monotonic()
        if self.has_begun:
            metrics.between.labels(metrics.model).observe(now - self._latest)
        else:
            metrics.first.labels(metrics.model).observe(now - self._began)
            metrics.own_first.labels(*self._labels).observe(now - self._began)
        self._latest = now

    def add(self, *, read: int = 0, written: int = 0) -> None:
        """Count tokens of the prompt and of the answer."""
        metrics = self._metrics
        metrics.prompt_tokens.labels(metrics.model).inc(read)
        metrics.written_tokens.labels(metrics.model).inc(written)
        metrics.tokens.labels(*self._labels).inc(written)

    def end(self, finish: str) -> None:
        """The answer is over: stop, length, cancelled or error, or as a server calls it."""
        metrics = self._metrics
        for each in self._names or (metrics.model,):
            metrics.answers[each] += 1
        metrics.requests.labels(*self._labels).inc()
        if finish == "error":
            metrics.errors.labels(*self._labels).inc()
            return
        reason = "abort" if finish == "cancelled" else finish
        metrics.success.labels(metrics.model, reason).inc()
        metrics.whole.labels(metrics.model).observe(time.monotonic() - self._began)


class _Adapters(Gauges):
    """The adapters at the moment when Prometheus asks."""

    def __init__(self, names: Names[Any]) -> None:
        self._names = names

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield where they are, the time of their loads, and their memory."""
        labels = ["adapter_name", "level", "pinned", "rank"]
        loaded = GaugeMetricFamily("lora_adapter_loaded", "Adapters in memory.", labels=labels)
        seconds = GaugeMetricFamily(
            "lora_adapter_load_seconds", "Time of an adapter's load.", labels=labels[:1]
        )
        size = GaugeMetricFamily(
            "lora_adapter_bytes", "Bytes of an adapter, in memory or on disk.", labels=labels[:1]
        )
        whole = GaugeMetricFamily("lora_resident_bytes", "Memory of adapters.", labels=[])
        resident, pinned = set(self._names.resident), set(self._names.pinned)
        for name, each in self._names.adapters.items():
            level = "memory" if name in resident else "disk"
            rank = max((site.rank for site in each.record.sites), default=0)
            told = [name, level, str(name in pinned).lower(), str(rank)]
            loaded.add_metric(told, float(name in resident))
            seconds.add_metric([name], each.load_s)
            size.add_metric([name], each.size_bytes)
        whole.add_metric([], self._names.resident_bytes)
        yield from (loaded, seconds, size, whole)
