"""Generated from proto/kdmesh/v1 by `make proto`; never edited."""
