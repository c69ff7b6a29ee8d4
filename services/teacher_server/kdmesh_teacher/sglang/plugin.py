"""Our entry point in SGLang's processes (group `sglang.srt.plugins`)."""

from __future__ import annotations

import os

SOCKET_VARIABLE = "KDMESH_SGLANG_SOCKET"
"""Names the server's socket, in the environment of SGLang's processes. Without it the plugin does nothing."""


def register() -> None:
    """Called by SGLang in each of its processes, also in those that have nothing to do with kdmesh.

    Does nothing unless a teacher server started this process.
    """
    socket_path = os.environ.get(SOCKET_VARIABLE)
    if socket_path is not None:
        from kdmesh.sglang.server_death import end_if_server_is_dead
        from kdmesh_teacher.sglang.hooks import install

        end_if_server_is_dead()
        install(socket_path)
