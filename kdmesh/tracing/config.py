"""Where traces go."""

from __future__ import annotations

from pydantic import Field

from kdmesh.config import StrictModel


class TracingConfig(StrictModel):
    """An OpenTelemetry collector that takes OTLP over HTTP; needs the extra `tracing`."""

    endpoint: str = Field(pattern=r"^https?://.+")
    """Its URL, as http://collector:4318/v1/traces."""

    sampled_fraction: float = Field(1.0, gt=0, le=1)
    """Part of the steps that are traced; servers trace what they are asked for by a step that is."""
