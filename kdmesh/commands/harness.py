"""The command that has EleutherAI's lm-evaluation-harness judge a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from kdmesh.commands.model_directory import ModelDirectory
from kdmesh.errors import ConfigError
from kdmesh.outputs import make_writable, say

_DIRECTORY = click.Path(path_type=Path, file_okay=False)


@click.command("lm-eval")
@click.argument("model", type=ModelDirectory(with_weights=True))
@click.option("--tasks", required=True, metavar="NAME[,NAME]...", help="Tasks of the harness.")
@click.option("--include", type=_DIRECTORY, help="A directory of more tasks, as YAML files of the harness.")
@click.option("--few-shot", type=click.IntRange(min=0), help="Examples before each question.  [default: the task's]")
@click.option("--limit", type=click.IntRange(min=1), help="Only so many questions of each task.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1; auto takes a GPU if there is one."
)
@click.option("--chat", is_flag=True, help="Ask through the model's chat template.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file for everything it found.")
def lm_eval(
    model: Path,
    tasks: str,
    include: Path | None,
    few_shot: int | None,
    limit: int | None,
    batch_size: int,
    device: str,
    chat: bool,
    output: Path | None,
) -> None:
    """Have lm-evaluation-harness judge MODEL, a directory or hf://OWNER/MODEL, by its tasks.

    Of a run's directory its final model is taken; hf://OWNER/MODEL is fetched, and by the harness what a task asks.
    Needs kdmesh[lm-eval].

    \b
    Example: kdmesh lm-eval runs/distil --tasks hellaswag,arc_easy --limit 200
    """
    directory = directory_of(model)
    if output is not None:
        make_writable(output)
    found = judge(
        directory,
        tasks.split(","),
        include=include,
        num_fewshot=few_shot,
        limit=limit,
        batch_size=batch_size,
        device=device,
        apply_chat_template=chat,
    )
    from lm_eval.utils import make_table

    figures = json.dumps({task: _numbers(metrics) for task, metrics in found["results"].items()})
    try:
        say(f"{make_table(found)}\n{figures}\n")
    finally:  # hours of work, which a stdout that is full must not lose
        if output is not None:
            _write(output, json.dumps(found, indent=1, default=str))


def directory_of(model: Path) -> Path:
    """The model's directory: itself, or that of a run's final model. Raises ConfigError when there is none."""
    for path in (model, model / "final"):
        if (path / "config.json").is_file():
            return path
    raise ConfigError(f"{model} is no model's directory, and no run that has ended: it has no config.json, nor final/")


def judge(model: Path, tasks: list[str], *, include: Path | None, device: str, **options: Any) -> dict[str, Any]:
    """What the harness finds.

    Args:
        options: of `lm_eval.simple_evaluate`.

    Raises:
        ConfigError: the harness is not installed, or does not know a task.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"kdmesh lm-eval needs lm-eval (pip install 'kdmesh[lm-eval]'): {error}") from error
    import torch

    manager = TaskManager(include_path=None if include is None else str(include))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ConfigError(f"--tasks: the harness has no task {', '.join(unknown)}; `lm_eval --tasks list` names them")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "auto"},
        tasks=tasks,
        task_manager=manager,
        device=device,
        **options,
    )
    return found


def _write(output: Path, text: str) -> None:
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error}") from None


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, float)}
