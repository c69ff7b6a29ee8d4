"""Asks servers over HTTP and gRPC whether they are ready: ask.py http(s)://host:port ... [host:port ...]"""

import ssl
import sys
import urllib.request
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

CA = Path("/etc/kdmesh/tls/ca.crt")
NO_PROXY = urllib.request.ProxyHandler({})  # one from the environment does not lead to a server
IS_OURS = CA.exists()  # else the system knows who vouches for the servers


def ask_http(url: str) -> None:
    context = ssl.create_default_context(cafile=str(CA) if IS_OURS else None)
    opener = urllib.request.build_opener(NO_PROXY, urllib.request.HTTPSHandler(context=context))
    with opener.open(f"{url}/readyz", timeout=10) as answer:
        sys.stdout.write(f"{url}/readyz: {answer.status}\n")


def ask_grpc(address: str, *, is_encrypted: bool) -> None:
    credentials = grpc.ssl_channel_credentials(CA.read_bytes() if IS_OURS else None)
    options = [("grpc.enable_http_proxy", 0)]
    opened = (
        grpc.secure_channel(address, credentials, options) if is_encrypted else grpc.insecure_channel(address, options)
    )
    with opened as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        sys.exit(f"{address}: not serving")
    sys.stdout.write(f"{address}: serving\n")


urls = [place for place in sys.argv[1:] if "://" in place]
for url in urls:
    ask_http(url)
for address in (place for place in sys.argv[1:] if "://" not in place):
    ask_grpc(address, is_encrypted=urls[0].startswith("https:"))
