"""gRPC: servers, clients, retries, and the translation between wire and types."""
