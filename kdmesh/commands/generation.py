"""The command that writes a dataset of a served model's answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kdmesh import log
from kdmesh.auth.config import AccessConfig
from kdmesh.chats.chat_template import TemplateSetting
from kdmesh.commands.access_option import access_option, checked_addresses, read_access
from kdmesh.commands.endpoint_options import endpoint_options, read_endpoint, refuse_others_options
from kdmesh.commands.model_directory import ModelDirectory
from kdmesh.commands.stopping import stoppable
from kdmesh.config import named_value
from kdmesh.errors import ConfigError
from kdmesh.outputs import refuse_own_input, refuse_to_replace, say

if TYPE_CHECKING:
    from kdmesh.answering.source import Servers

_FILE = click.Path(path_type=Path, dir_okay=False)
_GENERATE_S = 3600.0  # for the answers to one prompt


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
@endpoint_options
@click.option(
    "--model",
    type=ModelDirectory(with_weights=False),
    help="Directory, or hf://OWNER/MODEL, with the servers' tokenizer and a chat template; not for --openai.",
)
@click.option("--prompts", required=True, type=_FILE, help="JSONL with `messages`, or else `prompt`, in each row.")
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
    with stoppable():
        report = generating.generate(servers, prompts, output, plan, image_root=options["image_root"])
    say(f"{report.sentence()}\n{report.json()}\n")


def _servers(context: click.Context, options: Mapping[str, Any]) -> Servers:
    """Those that the options name. Raises ConfigError when they are not of one kind, or an option is another kind's."""
    named = [key for key in ("rollouts", "teachers", "urls") if options[key]]
    if len(named) != 1:
        raise ConfigError(
            "generate needs servers of one kind: --rollout HOST:PORT, --teacher HOST:PORT, or --openai URL"
        )
    [kind] = named
    refuse_others_options(context, asks_openai=kind == "urls", others=("model",))
    access = read_access(options["access_file"])
    if kind == "urls":
        return _endpoint(access, options)
    if options["model"] is None:
        raise ConfigError(f"--{kind[:-1]} needs --model")
    return _kdmesh_servers(kind, access, options)


def _kdmesh_servers(kind: str, access: AccessConfig, options: Mapping[str, Any]) -> Servers:
    from kdmesh.answering.kdmesh_servers import KdmeshServers

    return KdmeshServers(
        kind="rollout" if kind == "rollouts" else "teacher",
        addresses=options[kind],
        model=options["model"],
        access=access,
    )


def _endpoint(access: AccessConfig, options: Mapping[str, Any]) -> Servers:
    chat_servers = read_endpoint(options, access)

    from kdmesh.answering.endpoint_answers import EndpointServers

    return EndpointServers(chat_servers=chat_servers, skips_rejected=options["skip_rejected"])


def _setting(text: str) -> tuple[str, TemplateSetting]:
    name, value = named_value(text)
    if name is None or not isinstance(value, TemplateSetting):
        raise ConfigError(
            f"--template-setting {text!r} is not of the form NAME=VALUE, with a text, a number, true or false"
        )
    return name, value
