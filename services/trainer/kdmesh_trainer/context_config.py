"""What the teacher is told beyond what the student reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from kdmesh.config import StrictModel


class TeacherMessages(StrictModel):
    """A column of each row holds the chat that leads up to the response for the teacher."""

    kind: Literal["messages"]

    column: str = "teacher_messages"
    """Its name; messages as in the chat's own column."""


class TeacherSystemPrompt(StrictModel):
    """The same instruction for every chat."""

    kind: Literal["system_prompt"]

    text: str = Field(min_length=1)
    """The teacher's system message; one that the chat has follows it after an empty line."""


class TeacherTemplate(StrictModel):
    """The chat's own messages, rendered otherwise."""

    kind: Literal["template"]

    path: Path
    """Jinja file that renders chats for the teacher, in place of the student's chat template."""


TeacherContextConfig = Annotated[TeacherMessages | TeacherSystemPrompt | TeacherTemplate, Field(discriminator="kind")]
