"""Where the rows of a trainer's teachers come from, and what the teachers are called."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from kdmesh.auth.config import AccessConfig
from kdmesh_trainer.sections.replicas_config import LONGEST_WAIT_S, ReplicatedConfig, check_can_be_known
from kdmesh_trainer.sections.rollouts_config import SendingConfig

TEACHER_NAME = "[A-Za-z0-9_-]+"
"""What a teacher's name may be, as a regular expression."""

TeacherName = Annotated[str, StringConstraints(pattern=f"^{TEACHER_NAME}$")]
"""Of a teacher among several; also in the data and in the names of figures."""


def teacher_key(name: str) -> str:
    """The section of a teacher; the only one has no name."""
    return f"teachers.{name}" if name else "teacher"


class FollowConfig(SendingConfig):
    """Self-distillation: the teacher servers get the student's weights as it learns, and serve no other job."""

    every: int = Field(1, ge=1)
    """Optimizer steps between two updates of the teacher."""

    decay: float | None = Field(None, gt=0, lt=1)
    """The teacher is a moving average, a <- decay * a + (1 - decay) * student after every step; null: the student."""


class TeacherConfig(ReplicatedConfig):
    """The teacher servers that answer this job."""

    access: AccessConfig = AccessConfig()
    """How this job gets in; with `follows_student` it must be an operator there."""

    door: Literal["auto", "shm", "rdma", "collective", "stream"] = "auto"
    """How rows travel; auto takes the first that works of shared memory (on one node), RDMA, NCCL (a group with a
    server that makes them, where both hold a GPU) and the stream."""

    wire: Literal["exact", "fp8"] = "exact"
    """How a stream carries rows: fp8 halves the bytes of 16-bit rows, for thin networks, and rounds every element by up
    to a sixteenth (docs/across_nodes.md). Other doors, and the head, are always exact."""

    prefetch: int = Field(4, ge=0)
    """Micro-batches each rank asks for ahead of the one it trains on; 0 asks only when needed."""

    deadline_s: float = Field(300.0, gt=0, le=LONGEST_WAIT_S)
    """Longest wait for one answer, or for an update with `follows_student`, a teacher's restart included."""

    follows_student: FollowConfig | None = None
    """Replace the teacher's weights by the student's as it learns; null: the teacher is frozen."""

    @model_validator(mode="after")
    def _all_can_be_told(self) -> TeacherConfig:
        if self.follows_student is not None and self.has_names:
            raise ValueError("follows_student needs every address as host:port: new weights go to each of them")
        check_can_be_known(self.access, self.addresses)
        return self
