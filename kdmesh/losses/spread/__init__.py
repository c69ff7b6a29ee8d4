"""The fused loss of a vocabulary whose parts are on several ranks."""
