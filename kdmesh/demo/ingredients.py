"""What the demo works with, for servers and jobs of one's own: a teacher, a student, chats."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.markup import escape

from kdmesh.demo.live import Live
from kdmesh.demo.on_policy import warm_up
from kdmesh.demo.plan import Plan
from kdmesh.demo.stage import opened
from kdmesh.demo.workspace import WARM_UP
from kdmesh.errors import ConfigError

TEACHER, STUDENT, DATA = "teacher", "student", "data"


def make(plan: Plan, into: Path) -> None:
    """Two trained models and the chats, in `into`: `teacher`, `student`, `data`. What is there already is kept.

    Raises:
        ConfigError: `into` holds something else.
        ChildFailed: a training run failed.
        Stopped: a signal came; the same call continues.
    """
    if (into / DATA).exists():
        Live().say(escape(f"{into} is there already, and is kept; remove it to have it made anew"))
        return
    making = into / "making"
    for name in (TEACHER, STUDENT):
        if (into / name).exists() and not making.exists():
            raise ConfigError(f"{into / name} is not of this demo; give --make another directory")
    with opened(plan, output=making, cache=making / "cache", fresh=False) as stage:
        stage.train_teacher()
        warm_up(stage)
        workspace = stage.workspace
        for name, origin in (
            (TEACHER, workspace.teacher_model),
            (STUDENT, workspace.run(WARM_UP) / "final"),
            (DATA, workspace.corpus),
        ):
            if (into / name).exists():  # since an earlier call, which was stopped then
                continue
            unfinished = into / f"{name}.new"
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(origin, unfinished)
            unfinished.rename(into / name)
        stage.live.say(escape(f"made {into / TEACHER}, {into / STUDENT} and {into / DATA}"))
    shutil.rmtree(making)
