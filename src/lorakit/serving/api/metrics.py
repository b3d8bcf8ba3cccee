"""Metrics for Prometheus, under vLLM's names where it has them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from lorakit.serving.catalog import Catalog
from lorakit.serving.requests import Delta, Request
from lorakit.serving.worker import Worker

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counts what is asked and answered.

    Args:
        engine: whose queue and slots are shown.
        catalog: whose adapters are shown.
    """

    def __init__(self, engine: Worker, catalog: Catalog) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_State(engine, catalog))
        self._model = catalog.name
        self._answered: dict[str, int] = defaultdict(int)

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(name, meaning, ("model_name", *labels), registry=self._registry)

        def histogram(name: str, meaning: str, *labels: str) -> Histogram:
            labels = ("model_name", *labels)
            return Histogram(name, meaning, labels, registry=self._registry, buckets=SECONDS)

        self._prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.")
        self._written_tokens = counter("vllm:generation_tokens", "Tokens of answers.")
        self._success = counter("vllm:request_success", "Answers.", "finished_reason")
        self._first = histogram("vllm:time_to_first_token_seconds", "From arrival to first token.")
        self._between = histogram("vllm:inter_token_latency_seconds", "Between two tokens.")
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From arrival to end.")
        adapter = "adapter_name"
        self._requests = counter("lora_requests", "Requests by adapter.", adapter)
        self._tokens = counter("lora_generation_tokens", "Tokens of answers by adapter.", adapter)
        self._errors = counter("lora_request_errors", "Failed requests by adapter.", adapter)
        self._own_first = histogram(
            "lora_time_to_first_token_seconds", "From arrival to first token by adapter.", adapter
        )

    def answered(self, name: str) -> int:
        """The requests that an adapter has answered, alone or with others."""
        return self._answered.get(name, 0)

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self._registry)

    def watched(
        self, request: Request, names: Sequence[str], deliver: Callable[[Delta], None]
    ) -> Callable[[Delta], None]:
        """A `deliver` that counts what a request of these adapters is told."""
        model, name = self._model, "+".join(names)
        latest = 0.0

        def watch(delta: Delta) -> None:
            nonlocal latest
            now = time.monotonic()
            if (delta.tokens or delta.output is not None) and not latest:
                self._prompt_tokens.labels(model).inc(len(request.prompt))
                self._first.labels(model).observe(now - request.arrived)
                self._own_first.labels(model, name).observe(now - request.arrived)
            elif delta.tokens:
                self._between.labels(model).observe(now - latest)
            latest = now if delta.tokens else latest
            self._written_tokens.labels(model).inc(len(delta.tokens))
            self._tokens.labels(model, name).inc(len(delta.tokens))
            if delta.finish is not None:
                self._ended(delta, names, now - request.arrived)
            deliver(delta)

        return watch

    def _ended(self, delta: Delta, names: Sequence[str], seconds: float) -> None:
        name = "+".join(names)
        for each in names or (self._model,):
            self._answered[each] += 1
        self._requests.labels(self._model, name).inc()
        if delta.finish == "error":
            self._errors.labels(self._model, name).inc()
            return
        reason = "abort" if delta.finish == "cancelled" else str(delta.finish)
        self._success.labels(self._model, reason).inc()
        self._whole.labels(self._model).observe(seconds)


class _State(Collector):
    """What is so at the moment when Prometheus asks."""

    def __init__(self, engine: Worker, catalog: Catalog) -> None:
        self._engine, self._catalog = engine, catalog

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yield the gauges, and the counters that the engine keeps."""
        engine, name = self._engine, self._catalog.name
        running, waiting = engine.running(), engine.queue.waiting()
        share = engine.used_share
        for metric, meaning, value in (
            ("vllm:num_requests_running", "Requests in slots.", len(running)),
            ("vllm:num_requests_waiting", "Requests that wait for a slot.", len(waiting)),
            ("vllm:kv_cache_usage_perc", "Share of the tokens that slots may hold.", share),
        ):
            gauge = GaugeMetricFamily(metric, meaning, labels=["model_name"])
            gauge.add_metric([name], value)
            yield gauge
        prefixes = engine.prefixes
        for metric, meaning, value in (
            (
                "vllm:prefix_cache_queries",
                "Tokens of prompts that were looked up.",
                prefixes.asked_tokens,
            ),
            ("vllm:prefix_cache_hits", "Those that were read before.", prefixes.found_tokens),
        ):
            counter = CounterMetricFamily(metric, meaning, labels=["model_name"])
            counter.add_metric([name], value)
            yield counter
        steps = CounterMetricFamily("lora_decode_steps", "Steps by how.", labels=["how"])
        for how, count in dict(engine.step_counts).items():
            steps.add_metric([how], count)
        yield steps
        kept = GaugeMetricFamily("lora_prefix_bytes", "Memory of kept prompts.", labels=[])
        kept.add_metric([], prefixes.size_bytes)
        yield kept
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        info = GaugeMetricFamily("vllm:lora_requests_info", "Adapters in use.", labels=labels)
        info.add_metric([str(engine.limits.slots), _names(running), _names(waiting)], time.time())
        yield info
        yield from self._adapters()

    def _adapters(self) -> Iterator[GaugeMetricFamily]:
        labels = ["adapter_name", "level"]
        loaded = GaugeMetricFamily("lora_adapter_loaded", "Adapters in memory.", labels=labels)
        seconds = GaugeMetricFamily(
            "lora_adapter_load_seconds", "Time of an adapter's load.", labels=labels[:1]
        )
        size = GaugeMetricFamily("lora_resident_bytes", "Memory of adapters.", labels=[])
        bank = self._catalog.bank
        resident = set(bank.resident)
        for name, each in self._catalog.adapters.items():
            level = "memory" if name in resident else "disk"
            loaded.add_metric([name, level], float(name in resident))
            seconds.add_metric([name], each.load_s)
        size.add_metric([], bank.resident_bytes)
        yield from (loaded, seconds, size)


def _names(requests: Sequence[Request]) -> str:
    return ",".join(dict.fromkeys(name for each in requests for name in each.use.names))
