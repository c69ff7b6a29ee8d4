"""kdmesh: distil large language models with a teacher, a rollout and a trainer as separate services."""
