"""The options of commands that ask servers with OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from kdmesh.auth.config import AccessConfig
from kdmesh.commands.finite_range import FiniteRange
from kdmesh.errors import ConfigError

if TYPE_CHECKING:
    from kdmesh.openai.servers import ChatServers

Command = Callable[..., None]

_ALONE = ("model_name", "concurrency", "timeout_s", "request_fields", "skip_rejected")


def endpoint_options(command: Command) -> Command:
    """Adds --openai, as `urls`, and how such servers are asked."""
    options = (
        click.option(
            "--openai",
            "urls",
            multiple=True,
            metavar="URL",
            help="A server with OpenAI's chat completions, instead: https://HOST/v1. The key is in $OPENAI_API_KEY, or "
            "in the token_file of --access.",
        ),
        click.option("--model-name", metavar="NAME", help="The model to ask for, as the servers of --openai call it."),
        click.option(
            "--concurrency",
            type=click.IntRange(min=1),
            default=16,
            show_default=True,
            help="Requests at a time, of --openai.",
        ),
        click.option(
            "--timeout",
            "timeout_s",
            type=FiniteRange(min=0, min_open=True),
            default=600.0,
            show_default=True,
            help="Seconds for a request, of --openai.",
        ),
        click.option(
            "--request-field",
            "request_fields",
            multiple=True,
            metavar="NAME=VALUE",
            help="Field of the requests of --openai, reasoning_effort=low for example; VALUE is YAML, null leaves one "
            "out.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def refuse_others_options(context: click.Context, *, asks_openai: bool, others: Sequence[str]) -> None:
    """Raises ConfigError for an option that is only for servers of the kind that are not asked.

    Args:
        others: names of those that do not go with --openai.
    """
    strange = others if asks_openai else _ALONE
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in strange and context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            does = "does not go with" if asks_openai else "goes only with"
            raise ConfigError(f"{parameter.opts[0]} {does} --openai")


def read_endpoint(options: Mapping[str, Any], access: AccessConfig) -> ChatServers:
    """The servers that the options of `endpoint_options` name.

    Raises:
        ConfigError: one has a value that cannot be, or there is no --model-name.
    """
    from kdmesh.openai.servers import ChatServers

    if options["model_name"] is None:
        raise ConfigError("--openai needs --model-name")
    return ChatServers.of_options(
        urls=options["urls"],
        model=options["model_name"],
        concurrency=options["concurrency"],
        timeout_s=options["timeout_s"],
        request_fields=options["request_fields"],
        access=access,
    )


def endpoint_arguments(options: Mapping[str, Any]) -> list[str]:
    """The same options, and --access, as words of a command line."""
    access = options["access_file"]
    return [
        *(word for url in options["urls"] for word in ("--openai", url)),
        *(word for text in options["request_fields"] for word in ("--request-field", text)),
        *("--model-name", options["model_name"]),
        *("--concurrency", str(options["concurrency"])),
        *("--timeout", str(options["timeout_s"])),
        *(() if access is None else ("--access", str(access))),
    ]
