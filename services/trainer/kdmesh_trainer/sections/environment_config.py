"""What a trainer can be told of code of the user's own that answers the student's turns."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from kdmesh.config import StrictModel


class EnvironmentConfig(StrictModel):
    """What answers the student, which then goes on, so that an episode has several turns: see docs/extending.md."""

    respond: str = Field(pattern=r"^[\w.]+:\w+$")
    """module:function, called as function(messages, row, **params) after each turn of the student; returns the messages
    that come next, or None where the episode has ended. Required."""

    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function; checked against its signature before anything loads."""

    max_turns: int = Field(8, ge=1)
    """Most turns of the student in an episode. Each may have sampling.max_new_tokens, all with what comes between them
    data.max_tokens."""

    history: Literal["templated", "drawn"] = "templated"
    """What the student reads of its earlier turns: what the chat template writes of them, so that an episode ends where
    that is not what was drawn (docs/on_policy.md); or always what was drawn."""

    deadline_s: float = Field(60.0, gt=0)
    """Longest time of one call; one that takes longer ends the run."""

    max_calls: int = Field(32, ge=1)
    """Most calls at once, each in a thread, on every rank."""
