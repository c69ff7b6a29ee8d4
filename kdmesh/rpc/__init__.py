"""gRPC: servers, clients, retries, and the translation between wire and types."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it would print, we raise; read when grpc is imported
