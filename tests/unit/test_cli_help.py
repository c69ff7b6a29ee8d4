"""Holds what the help pages of the command line show."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kdmesh import config
from kdmesh.commands import cli

COMMANDS = sorted(cli.main.commands)
ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: kdmesh {command}" in result.output


def test_the_first_help_page_names_every_command() -> None:
    output = run("--help").output
    assert all(f"kdmesh {command} " in output or f"kdmesh {command}\n" in output for command in COMMANDS)


def test_the_first_help_page_has_whole_sentences() -> None:
    listed = run("--help").output.partition("Commands:\n")[2]
    words = " ".join(listed.split())
    for command in COMMANDS:
        sentence = inspect.cleandoc(cli.main.commands[command].help or "").partition(".\n")[0].partition(". ")[0]
        assert " ".join(sentence.split()) in words.replace("fine- ", "fine-")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_help_pages_show_lacks_nothing_that_is_required(command: str) -> None:
    made = cli.main.commands[command]
    pages = [inspect.cleandoc(page.help or "").replace("\\\n", " ") for page in (cli.main, made)]
    shown = re.findall(rf"\bkdmesh {command}\b([^|>\n]*)", "\n".join(pages))
    assert shown
    for arguments in shown:
        made.make_context(command, shlex.split(arguments))  # an error of click's own says what is missing


@pytest.mark.parametrize("command", ["teacher", "rollout"])
def test_the_server_that_help_starts_runs_beside_one_of_the_file_as_it_is(command: str) -> None:
    shown = re.search(rf"Example: kdmesh {command} (.*)", inspect.cleandoc(cli.main.commands[command].help or ""))
    assert shown is not None
    file, *options = shlex.split(shown[1])
    first, second = (config.read_tree(ROOT / file, overrides)["server"] for overrides in ([], options[1::2]))
    assert not {first["port"], first["rest_port"]} & {second["port"], second["rest_port"]}
