"""What a run leaves in its output directory."""
