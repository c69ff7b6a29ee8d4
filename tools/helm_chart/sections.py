"""What every section of the chart's values is made of."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict
from pydantic.alias_generators import to_camel

from kdmesh.config import StrictModel

Objects = list[dict[str, Any]]
"""Of Kubernetes' own API; the cluster checks them."""


class ChartModel(StrictModel):
    """A section of values.yaml, written as Helm charts write their keys."""

    model_config = ConfigDict(alias_generator=to_camel)


class SecretKey(ChartModel):
    """One key of a Secret that exists already. Values never hold a secret themselves."""

    name: str = ""
    """Name of the Secret; empty for none."""

    key: str
    """Key in it."""


class TokenSecret(SecretKey):
    """A token in a Secret."""

    key: str = "token"
    """Key in it."""


class TokensSecret(SecretKey):
    """A file of tokens in a Secret."""

    key: str = "tokens.yaml"
    """Key in it."""


class CaSecret(SecretKey):
    """Certificates of authorities in a Secret."""

    key: str = "ca.crt"
    """Key in it."""
