"""What /metrics says of every kind of server."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kdmesh.auth.certificates import ServerCertificate
from kdmesh.auth.watched import Watched
from kdmesh.serving.engine.gate import Gate
from kdmesh.types import SleepTag


class ServerCollector(Collector):
    """From the start on, also while the model loads."""

    def __init__(self, namespace: str, gate: Gate[Any], certificate: Watched[ServerCertificate] | None) -> None:
        self._namespace = namespace
        self._gate = gate
        self._certificate = certificate

    def collect(self) -> Iterator[Metric]:
        """Whether the server takes requests, and until when it can prove who it is."""
        is_ready = self._gate.refusal is None
        text = "1 while requests are taken; 0 while the server loads, sleeps or drains."
        yield GaugeMetricFamily(f"{self._namespace}_ready", text, value=is_ready)
        if self._certificate is not None:
            yield GaugeMetricFamily(
                f"{self._namespace}_certificate_expires_timestamp_seconds",
                "When the certificate that the server shows ends to be valid, in Unix time.",
                value=self._certificate.current().expires_at_s,
            )


def served_families(
    namespace: str, *, model: str, weights_updated_at_s: float | None, asleep: Set[SleepTag]
) -> Iterator[Metric]:
    """What is served, and what of the device's memory is given back meanwhile.

    Args:
        weights_updated_at_s: None where the weights are those of the start.
    """
    info = GaugeMetricFamily(f"{namespace}_model_info", "Always 1; says which model is served.", labels=["model"])
    info.add_metric([model], 1)
    yield info
    if weights_updated_at_s is not None:
        yield GaugeMetricFamily(
            f"{namespace}_weights_updated_timestamp_seconds",
            "When the weights that are served came, in Unix time; missing while they are those of the start.",
            value=weights_updated_at_s,
        )
    given_back = GaugeMetricFamily(f"{namespace}_asleep", "1 where memory of the device is given back.", labels=["tag"])
    for tag in SleepTag:
        given_back.add_metric([tag.value], float(tag in asleep))
    yield given_back
