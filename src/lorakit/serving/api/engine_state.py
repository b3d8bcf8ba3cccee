"""An engine's queue, slots and kept prompts at the moment when Prometheus asks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from lorakit.serving.api.metrics import Gauges
from lorakit.serving.catalog import Catalog
from lorakit.serving.requests import Request
from lorakit.serving.worker import Worker


class EngineState(Gauges):
    """The gauges of an engine.

    Args:
        engine: whose queue and slots are shown.
        catalog: whose base names them.
    """

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


def _names(requests: Sequence[Request]) -> str:
    return ",".join(dict.fromkeys(name for each in requests for name in each.use.names))
