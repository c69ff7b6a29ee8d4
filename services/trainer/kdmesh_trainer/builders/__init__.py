"""What `kdmesh_trainer.build` builds a run of, each part checked before anything loads."""
