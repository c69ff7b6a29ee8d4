"""The cluster as a pod finds it: by the variables and the files that Kubernetes gives every pod."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("kubernetes")

from kubernetes.config import incluster_config

from kdmesh.cluster import client
from kdmesh.cluster.kinds import ENDPOINT_SLICE
from tests.support.certificates import CertificateAuthority
from tests.support.fake_cluster import TOKEN, fake_cluster


def test_a_pod_asks_its_own_cluster_as_its_account_and_through_no_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = CertificateAuthority(tmp_path)
    for name, text in (("token", TOKEN), ("namespace", "ml")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(authority.cert))
    monkeypatch.setattr(client, "_SERVICE_ACCOUNT", tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with fake_cluster(tmp_path, certificate=authority.issue("kubernetes", ["kubernetes"])) as cluster:
        host, _, port = cluster.address.removeprefix("https://").partition(":")
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
        with closing(client.Cluster()) as opened:
            assert opened.namespace == "ml"
            assert opened.find(ENDPOINT_SLICE) == []
