"""Private groups of two processes that hand each other bytes."""
