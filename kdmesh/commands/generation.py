"""The command that writes a dataset of a served model's answers."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
import yaml
from click.core import ParameterSource

from kdmesh import log
from kdmesh.auth.config import AccessConfig
from kdmesh.chats.chat_template import TemplateSetting
from kdmesh.commands.access_option import access_option, checked_addresses, read_access
from kdmesh.errors import ConfigError
from kdmesh.launch.local import Stopped
from kdmesh.outputs import refuse_own_input, refuse_to_replace

if TYPE_CHECKING:
    from kdmesh.answering.source import Servers

_FILE = click.Path(path_type=Path, dir_okay=False)
_GENERATE_S = 3600.0  # for the answers to one prompt
_OPENAI_ALONE = ("model_name", "concurrency", "timeout_s", "request_fields", "skip_rejected")


@click.command()
@click.option(
    "--rollout", "rollouts", callback=checked_addresses, multiple=True, metavar="HOST:PORT", help="A rollout server."
)
@click.option(
    "--teacher",
    "teachers",
    callback=checked_addresses,
    multiple=True,
    metavar="HOST:PORT",
    help="A teacher, instead of rollout servers.",
)
@click.option(
    "--openai",
    "urls",
    multiple=True,
    metavar="URL",
    help="A server with OpenAI's chat completions, instead: https://HOST/v1. The key is in $OPENAI_API_KEY, or in the "
    "token_file of --access.",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path, file_okay=False),
    help="Hugging Face directory with the servers' tokenizer and a chat template; not for --openai.",
)
@click.option("--model-name", metavar="NAME", help="The model to ask for, as the servers of --openai call it.")
@click.option("--prompts", required=True, type=_FILE, help="JSONL with `messages` or `prompt` in each row.")
@click.option("--output", required=True, type=_FILE, help="JSONL to write: a chat dataset for a trainer.")
@click.option(
    "--image-root",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory that paths of images are relative to.  [default: that of --prompts]",
)
@click.option("--samples", type=click.IntRange(min=1), default=1, show_default=True, help="Answers to each prompt.")
@click.option("--max-new-tokens", type=int, default=1024, show_default=True, help="Longest answer.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option(
    "--stop",
    "stops",
    multiple=True,
    metavar="TEXT",
    help="Text that ends an answer, besides its end token, and is left out of it.",
)
@click.option(
    "--template-setting",
    "template_settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Value of a variable of the chat template, enable_thinking=false for example; VALUE is YAML.",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@click.option(
    "--concurrency", type=click.IntRange(min=1), default=16, show_default=True, help="Requests at a time, of --openai."
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds for a request, of --openai.",
)
@click.option(
    "--request-field",
    "request_fields",
    multiple=True,
    metavar="NAME=VALUE",
    help="Field of the requests of --openai, reasoning_effort=low for example; VALUE is YAML, null leaves one out.",
)
@click.option("--skip-rejected", is_flag=True, help="Leave out prompts that the servers of --openai refuse.")
@click.option("--keep-cut-off", is_flag=True, help="Write answers that reached the longest length, too.")
@click.option("--overwrite", is_flag=True, help="Replace the file of --output, if it is there.")
@access_option
@click.pass_context
def generate(context: click.Context, /, prompts: Path, output: Path, **options: Any) -> None:
    """Write a chat dataset of a served model's own answers, to fine-tune a student on.

    Rollout servers decode; a teacher computes the whole answer anew for each of its tokens, but for what its prefix
    cache holds; servers with OpenAI's API answer with text. All prompts are checked first. Interrupted, the same
    command continues.

    \b
    Example: kdmesh generate --rollout 127.0.0.1:50061 --model models/teacher \\
               --prompts data/train.jsonl --output data/answers.jsonl
    Example: kdmesh generate --openai https://HOST/v1 --model-name NAME \\
               --prompts data/train.jsonl --output data/answers.jsonl
    """
    refuse_own_input(output, {"--prompts": prompts})
    refuse_to_replace(output, is_wanted=options["overwrite"])

    from kdmesh.answering import generate as generating
    from kdmesh.answering.source import Plan
    from kdmesh.types import Sampling

    servers = _servers(context, options)
    sampling = Sampling(
        temperature=options["temperature"],
        top_p=options["top_p"],
        max_new_tokens=options["max_new_tokens"],
        stop_strings=options["stops"],
    )
    plan = Plan(
        samples=options["samples"],
        sampling=sampling,
        seed=options["seed"],
        keeps_cut_off=options["keep_cut_off"],
        deadline_s=_GENERATE_S,
        template_settings=dict(map(_setting, options["template_settings"])),
    )
    log.configure_command("generate")
    with _stoppable():
        report = generating.generate(servers, prompts, output, plan, image_root=options["image_root"])
    click.echo(report.sentence())
    click.echo(report.json())


def _servers(context: click.Context, options: Mapping[str, Any]) -> Servers:
    """Those that the options name. Raises ConfigError when they are not of one kind, or an option is another kind's."""
    named = [key for key in ("rollouts", "teachers", "urls") if options[key]]
    if len(named) != 1:
        raise ConfigError(
            "generate needs servers of one kind: --rollout HOST:PORT, --teacher HOST:PORT, or --openai URL"
        )
    [kind] = named
    strange = ("model",) if kind == "urls" else _OPENAI_ALONE
    given = [name for name in strange if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    names = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    if given:
        does = "does not go with" if kind == "urls" else "goes only with"
        raise ConfigError(f"{names[given[0]]} {does} --openai")
    needed = "model_name" if kind == "urls" else "model"
    if options[needed] is None:
        raise ConfigError(f"{names[kind]} needs {names[needed]}")
    access = read_access(options["access_file"])
    return _endpoint(access, options) if kind == "urls" else _kdmesh_servers(kind, access, options)


def _kdmesh_servers(kind: str, access: AccessConfig, options: Mapping[str, Any]) -> Servers:
    from kdmesh.answering.kdmesh_servers import KdmeshServers

    return KdmeshServers(
        kind="rollout" if kind == "rollouts" else "teacher",
        addresses=options[kind],
        model=options["model"],
        access=access,
    )


def _endpoint(access: AccessConfig, options: Mapping[str, Any]) -> Servers:
    from kdmesh.answering.endpoint import KEY_VARIABLE, Endpoint
    from kdmesh.answering.endpoint_answers import EndpointServers

    endpoint = Endpoint(
        urls=options["urls"],
        model=options["model_name"],
        access=access,
        key=os.environ.get(KEY_VARIABLE, "").strip(),
        timeout_s=options["timeout_s"],
    )
    return EndpointServers(
        endpoint=endpoint,
        concurrency=options["concurrency"],
        fields=dict(map(_field, options["request_fields"])),
        skips_rejected=options["skip_rejected"],
    )


def _setting(text: str) -> tuple[str, TemplateSetting]:
    name, value = _named(text)
    if name is None or not isinstance(value, TemplateSetting):
        raise ConfigError(
            f"--template-setting {text!r} is not of the form NAME=VALUE, with a text, a number, true or false"
        )
    return name, value


def _field(text: str) -> tuple[str, Any]:
    name, value = _named(text)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        name = None
    if name is None:
        raise ConfigError(f"--request-field {text!r} is not of the form NAME=VALUE, with a value that JSON has")
    return name, value


def _named(text: str) -> tuple[str | None, Any]:
    """NAME=VALUE, the value read as YAML; no name: it is not of that form."""
    name, equals, value = text.partition("=")
    try:
        return (name if name and equals else None), yaml.safe_load(value)
    except yaml.YAMLError:
        return None, None


@contextmanager
def _stoppable() -> Iterator[None]:
    """Inside, SIGTERM ends what is under way as Ctrl-C does: everything is put in order first."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Stopped(signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
