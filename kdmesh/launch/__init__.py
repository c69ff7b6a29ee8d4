"""Services and training jobs as processes of this machine."""
