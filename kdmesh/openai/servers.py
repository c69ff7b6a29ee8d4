"""Servers with OpenAI's chat completions, and how all requests of a command are made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from kdmesh.auth.config import AccessConfig
from kdmesh.chats.chat_template import TemplateSetting
from kdmesh.config import named_value
from kdmesh.errors import ConfigError
from kdmesh.openai.client import KEY_VARIABLE, Endpoint, EndpointClient
from kdmesh.rpc.background_loop import BackgroundLoop
from kdmesh.types import Sampling

NUM_SEEDS = 2**31
"""Of requests; some servers refuse larger ones."""

_OWN_FIELDS = ("model", "messages", "tools", "n", "stream")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatServers:
    """Who is asked, and how.

    Raises:
        ConfigError: a field is one that every request gives, or a seed for all of them.
    """

    endpoint: Endpoint
    concurrency: int  # requests at a time
    fields: Mapping[str, Any] = field(default_factory=dict)  # of a request, over ours; None leaves one out

    def __post_init__(self) -> None:
        for name in self.fields:
            if name in _OWN_FIELDS:
                raise ConfigError(f"--request-field: {name!r} is no field that can be set")
        if self.fields.get("seed") is not None:
            raise ConfigError(
                f"--request-field seed={self.fields['seed']} would make all samples of a prompt the same; each has a "
                "seed of its own, and seed=null leaves it out for a server that takes none"
            )

    @classmethod
    def of_options(
        cls,
        *,
        urls: Sequence[str],
        model: str,
        concurrency: int,
        timeout_s: float,
        request_fields: Sequence[str],
        access: AccessConfig,
    ) -> ChatServers:
        """As commands name them; a key is taken from the environment.

        Args:
            request_fields: of the form NAME=VALUE.

        Raises:
            ConfigError: a value is none that can be.
        """
        endpoint = Endpoint(
            urls=urls,
            model=model,
            access=access,
            key=os.environ.get(KEY_VARIABLE, "").strip(),
            timeout_s=timeout_s,
        )
        return cls(endpoint=endpoint, concurrency=concurrency, fields=dict(map(_field, request_fields)))

    @contextmanager
    def connected(self) -> Iterator[tuple[EndpointClient, BackgroundLoop]]:
        """A client, and where it is to be used; requests that are under way at the end are cancelled."""
        with closing(BackgroundLoop()) as last:
            client = EndpointClient(self.endpoint)
            try:
                with closing(BackgroundLoop()) as loop:  # its end cancels the requests, and only then the client ends
                    yield client, loop
            finally:
                last.run(client.close)

    def request_fields(self, sampling: Sampling, template_settings: Mapping[str, TemplateSetting]) -> dict[str, Any]:
        """All of a request that is the same for every prompt, but the model; those of None are to be left out."""
        own: dict[str, Any] = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        # OpenAI's API has none of these; vLLM and SGLang have.
        neutral = Sampling(max_new_tokens=sampling.max_new_tokens)
        for name in ("top_k", "min_p", "repetition_penalty"):
            if getattr(sampling, name) != getattr(neutral, name):
                own[name] = getattr(sampling, name)
        if sampling.stop_strings:
            own["stop"] = list(sampling.stop_strings)
        if template_settings:
            own["chat_template_kwargs"] = dict(template_settings)
        return {**own, **self.fields}


def _field(text: str) -> tuple[str, Any]:
    name, value = named_value(text)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        name = None
    if name is None:
        raise ConfigError(f"--request-field {text!r} is not of the form NAME=VALUE, with a value that JSON has")
    return name, value
