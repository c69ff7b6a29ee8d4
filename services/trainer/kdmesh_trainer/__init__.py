"""The trainer: an ordinary FSDP2 job that asks a teacher, trains, and owns neither."""
