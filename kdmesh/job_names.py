"""What a job may be called: servers count and log by its name, which comes from clients."""

from __future__ import annotations

MAX_CHARACTERS = 128


def problem_of(job: str) -> str | None:
    """Why a job cannot be called that; None: it can."""
    if len(job) <= MAX_CHARACTERS and job.isprintable():
        return None
    return (
        f"the job's name {job[:MAX_CHARACTERS]!r} has {len(job)} characters; it must be of at most {MAX_CHARACTERS} "
        "that can be printed"
    )
