"""Holds objects of cert-manager, KEDA and prometheus-operator against models made from those projects' definitions."""

from __future__ import annotations

from typing import Any

from cloudcoil.models.cert_manager.v1 import Certificate
from cloudcoil.models.keda.v1alpha1 import TriggerAuthentication
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule, ServiceMonitor

_KINDS = (Certificate, PodMonitor, PrometheusRule, ServiceMonitor, TriggerAuthentication)
MODELS = {model.__name__: model for model in _KINDS}


def understood(manifest: dict[str, Any]) -> dict[str, Any]:
    """The object without what its model does not know. Raises pydantic.ValidationError for a wrong value."""
    model = MODELS[manifest["kind"]]
    kept: dict[str, Any] = model.model_validate(manifest).model_dump(by_alias=True, exclude_unset=True, mode="json")
    return kept
