"""Every deliberate error of kdmesh.

KdmeshError
  ConfigError            bad configuration; only before a service starts
  DataError              a dataset that cannot be used; only before the first step
  CheckpointError        a checkpoint that cannot be written or read
  ClusterError           a Kubernetes cluster that does not do what it is asked
  OutOfMemory            training takes more memory than its device has
  NotFinite              training went wrong: a loss, gradient or weight is infinite or not a number
  JudgeFailed            a judge of samples that failed on every one of a step
  EnvironmentFailed      what answers the student's turns has failed, or cannot be written by its chat template
  RpcError               has exactly one gRPC status (kdmesh/rpc/status.py)
    InvalidRequest       INVALID_ARGUMENT     caller's fault; never retried
    Unauthenticated      UNAUTHENTICATED      no token or certificate that counts; a client that was let in tries again
    PermissionDenied     PERMISSION_DENIED    the caller's role is not enough; never retried
    ModelMismatch        FAILED_PRECONDITION  weights or tokenizer disagree
    HandleGone           NOT_FOUND            released, or its lease ran out
    MessageTooLarge      RESOURCE_EXHAUSTED   use a handle; never retried
    Unavailable          UNAVAILABLE          loading, draining or full; the only one worth retrying
      Withdrawn                               new weights that were given up before they were taken
    DeadlineExpired      DEADLINE_EXCEEDED    the caller's time is up
    EngineFailure        INTERNAL             our fault; the process restarts

A message says what was wrong, the values, and the rule.
"""

from __future__ import annotations


class KdmeshError(Exception):
    """Anything kdmesh raises on purpose."""


class ConfigError(KdmeshError):
    """A configuration was refused before anything started."""


class DataError(KdmeshError):
    """A dataset was refused before the first step."""


class CheckpointError(KdmeshError):
    """A checkpoint could not be written or read; earlier ones are untouched."""


class ClusterError(KdmeshError):
    """A Kubernetes cluster cannot be reached, or refuses what it is asked."""


class OutOfMemory(KdmeshError):
    """A device has no memory left for the next tensor; the last checkpoint is untouched."""


class NotFinite(KdmeshError):
    """A loss, gradient or weight is infinite or not a number; where it went on to others, it changed nothing."""


class JudgeFailed(KdmeshError):
    """What says how much samples count has failed on every sample of a step."""


class EnvironmentFailed(KdmeshError):
    """What answers the student's turns has failed, or its answer cannot be written as a chat."""


class RpcError(KdmeshError):
    """An error that crosses a service boundary."""


class InvalidRequest(RpcError):
    """The request itself is wrong."""


class Unauthenticated(RpcError):
    """The server wants to know who calls, and does not."""


class PermissionDenied(RpcError):
    """The server knows who calls, and does not let them."""


class ModelMismatch(RpcError):
    """Weights or tokenizer are not those the request relies on."""


class HandleGone(RpcError):
    """The handle or session has ended."""


class MessageTooLarge(RpcError):
    """A message exceeds gRPC's limit."""


class Unavailable(RpcError):
    """The server cannot take the request now."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Withdrawn(Unavailable):
    """New weights that were not taken, and will not be: what is served is as it was."""


class DeadlineExpired(RpcError):
    """The caller's deadline passed."""


class EngineFailure(RpcError):
    """The server failed through no fault of the caller."""
