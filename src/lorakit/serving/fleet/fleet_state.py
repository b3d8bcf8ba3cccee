"""The servers of a fleet at the moment when Prometheus asks."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from lorakit.serving.api.metrics import Gauges
from lorakit.serving.fleet.fleet import Fleet
from lorakit.serving.fleet.fleet_names import FleetNames


class FleetState(Gauges):
    """The gauges of a fleet.

    Args:
        fleet: whose servers are shown.
        names: whose base names them.
    """

    def __init__(self, fleet: Fleet, names: FleetNames) -> None:
        self._fleet, self._names = fleet, names

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yield what runs, and of each server whether it answers, what it does and did."""
        members = self._fleet.members
        running = GaugeMetricFamily(
            "vllm:num_requests_running", "Requests that are relayed.", labels=["model_name"]
        )
        running.add_metric([self._names.name], sum(member.busy for member in members))
        yield running
        up = GaugeMetricFamily("lora_upstream_up", "Whether a server answers.", labels=["upstream"])
        busy = GaugeMetricFamily(
            "lora_upstream_requests_running", "Requests that it is answering.", labels=["upstream"]
        )
        given = CounterMetricFamily(
            "lora_upstream_requests", "Requests that it was given.", labels=["upstream"]
        )
        held = GaugeMetricFamily(
            "lora_upstream_adapters", "Adapters that it holds.", labels=["upstream"]
        )
        for member in members:
            up.add_metric([member.url], float(member.is_up))
            busy.add_metric([member.url], member.busy)
            given.add_metric([member.url], member.answered)
            held.add_metric([member.url], len(member.holds))
        yield from (up, busy, given, held)
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        info = GaugeMetricFamily("vllm:lora_requests_info", "Adapters in use.", labels=labels)
        info.add_metric(["0", ",".join(self._names.running), ""], time.time())
        yield info
