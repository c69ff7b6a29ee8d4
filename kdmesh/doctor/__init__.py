"""What kdmesh needs of a machine or a cluster, whether it is there, and what it costs where it is not."""
