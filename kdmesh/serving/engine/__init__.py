"""The engine of a server: its thread, its sleep, its revival."""
