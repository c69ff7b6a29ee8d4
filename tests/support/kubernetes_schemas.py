"""Holds objects against Kubernetes' own schemas, closed to keys that a version does not know."""

from __future__ import annotations

from functools import cache
from typing import Any

import kubernetes_validate
from kubernetes_validate import utils

# It reads the same megabytes anew for every object.
utils.schema_contents = cache(utils.schema_contents)


def check(manifest: dict[str, Any], version: str) -> None:
    """Raises kubernetes_validate.ValidationError, also for a kind that this version lacks."""
    kubernetes_validate.validate(manifest, version, strict=True)
