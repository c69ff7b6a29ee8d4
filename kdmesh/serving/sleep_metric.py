"""The metric of a server's sleep."""

from __future__ import annotations

from collections.abc import Set

from prometheus_client.core import GaugeMetricFamily

from kdmesh.types import SleepTag


def asleep_gauge(namespace: str, asleep: Set[SleepTag]) -> GaugeMetricFamily:
    """Which memory of the device a server has given back."""
    gauge = GaugeMetricFamily(f"{namespace}_asleep", "1 where memory of the device is given back.", labels=["tag"])
    for tag in SleepTag:
        gauge.add_metric([tag.value], float(tag in asleep))
    return gauge
