"""The sections of a trainer's configuration, which `kdmesh_trainer.config` joins: importing them loads no torch."""
