"""Ends a process of SGLang whose server died while the process was still loading."""

from __future__ import annotations

import os
from pathlib import Path

SERVER_VARIABLE = "KDMESH_SGLANG_SERVER"
"""Names the server's process id, in the environment of SGLang's processes."""


def end_if_server_is_dead() -> None:
    """To be called where SGLang has had the kernel kill this process when its parent dies.

    That holds for deaths from then on. It takes seconds until a process is so far, and one whose server was killed
    before would wait for it for ever.
    """
    server = os.environ.get(SERVER_VARIABLE)
    if server is not None and not _is_running(int(server)):
        os._exit(1)


def _is_running(pid: int) -> bool:
    try:
        facts = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False
    return facts.rpartition(") ")[2][0] != "Z"  # the state stands behind the name, which may hold anything
