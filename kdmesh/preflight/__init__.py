"""What is looked at before anything loads: configurations, and what they name."""
