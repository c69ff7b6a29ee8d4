"""What every server of kdmesh is made of: its life, its health and numbers, its engine's thread."""
