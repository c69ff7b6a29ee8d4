"""The ways in which a consumer gets at the bytes of a handle."""
