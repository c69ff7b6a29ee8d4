"""The `kdmesh` command and its subcommands."""
