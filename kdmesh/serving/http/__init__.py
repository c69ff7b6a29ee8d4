"""What a server shows over HTTP."""
