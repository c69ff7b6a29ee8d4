"""Where the `kdmesh` command begins."""

from __future__ import annotations

from kdmesh.interrupt import quiet_interrupt


def main() -> None:
    """The command; what it consists of is imported only now."""
    with quiet_interrupt():
        from kdmesh.commands.cli import main as command
    command()
