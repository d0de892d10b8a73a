"""The chart as helm renders it, Kustomize as kubectl builds it, and Kubernetes' word on both."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import cluster_programs
import jsonschema
import kubernetes_validate
import pytest
import yaml
from conftest import ROOT

CHART = ROOT / "deploy" / "helm" / "halimede"
KUSTOMIZE = ROOT / "deploy" / "kubernetes"
NAMESPACE = "halimede"
VERSIONS = ("1.29", "1.37")
"""The oldest version of Kubernetes that the chart takes, and the newest whose schemas there are."""
HELM_ONLY_LABELS = {
    "app.kubernetes.io/instance",
    "app.kubernetes.io/managed-by",
    "app.kubernetes.io/version",
    "helm.sh/chart",
}
SOURCE = re.compile(r"^# Source: halimede/(\S+)$", re.M)
Manifest = dict[str, Any]


def program(name: str) -> str:
    """The path of helm or kubectl. Without it a test is skipped; in CI it fails."""
    path = cluster_programs.program(name)
    if path is not None:
        return path
    reason = f"{name} is not installed. Run: {cluster_programs.COMMAND}"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def helm(
    *arguments: str | Path, values: Manifest | None = None
) -> subprocess.CompletedProcess[str]:
    """What helm says of a command, with these values in its standard input."""
    given = ["--values", "-"] if values is not None else []
    return subprocess.run(
        [program("helm"), *map(str, arguments), *given],
        input=yaml.safe_dump(values) if values is not None else None,
        capture_output=True,
        text=True,
    )


def template(
    values: Manifest | None = None,
    *,
    chart: Path = CHART,
    release: str = "halimede",
    namespace: str = NAMESPACE,
) -> subprocess.CompletedProcess[str]:
    """What the chart makes of these values."""
    return _template(json.dumps(values or {}), chart, release, namespace)


@functools.cache
def _template(
    values: str, chart: Path, release: str, namespace: str
) -> subprocess.CompletedProcess[str]:
    return helm("template", release, chart, "--namespace", namespace, values=json.loads(values))


def rendered(values: Manifest | None = None, *, chart: Path = CHART) -> list[Manifest]:
    """The manifests of the chart with these values."""
    done = template(values, chart=chart)
    assert done.returncode == 0, done.stderr
    return documents(done.stdout)


def documents(text: str) -> list[Manifest]:
    return [one for one in yaml.load_all(text, yaml.CSafeLoader) if one]


def by_template(text: str) -> dict[str, list[Manifest]]:
    """Template → the manifests that helm says it made."""
    found: dict[str, list[Manifest]] = {}
    for part in re.split(r"^---$", text, flags=re.M):
        source = SOURCE.search(part)
        if source is not None:
            found.setdefault(source[1], []).extend(documents(part))
    return found


def built(folder: Path, *, gpu: bool = False, components: tuple[str, ...] = ()) -> list[Manifest]:
    """What Kustomize makes of base or gpu with these components, in an overlay in this folder."""
    base = KUSTOMIZE / ("gpu" if gpu else "base")
    overlay: Manifest = {
        "resources": [os.path.relpath(base, folder)],
        "components": [
            os.path.relpath(KUSTOMIZE / "components" / one, folder) for one in components
        ],
        "namespace": NAMESPACE,
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    done = subprocess.run([program("kubectl"), "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return documents(done.stdout)


def validate(manifest: Manifest, version: str) -> None:
    """Raise unless Kubernetes, KEDA or the Prometheus operator accepts a manifest, every field known."""
    schema = custom_schemas().get(manifest["kind"])
    if schema is None:
        kubernetes_validate.validate(manifest, version, strict=True)
    else:
        jsonschema.validate(manifest, schema)


@functools.cache
def custom_schemas() -> dict[str, Manifest]:
    """Kind → schema that refuses unknown fields."""
    if not cluster_programs.SCHEMAS.exists():
        program("schemas")
    schemas: dict[str, Manifest] = json.loads(cluster_programs.SCHEMAS.read_text())
    for schema in schemas.values():
        for part in (schema, *schema["$defs"].values()):
            if "properties" in part:
                part["additionalProperties"] = False
    return schemas


def comparable(manifests: list[Manifest]) -> dict[tuple[str, str], Manifest]:
    """Kind and name → manifest, without what only helm or only Kustomize has.

    Helm has labels of the release, a checksum of the configuration, the wish to keep the volume, and
    jobs with a checksum in their name. Kustomize has the namespace.
    """
    found = {}
    for one in copy.deepcopy(manifests):
        metadata = one["metadata"]
        metadata["labels"] = {
            name: value
            for name, value in metadata.get("labels", {}).items()
            if name not in HELM_ONLY_LABELS
        }
        if one["kind"] == "Job":
            metadata["name"] = re.sub(r"-[0-9a-f]{8}$", "", metadata["name"])
        if metadata.get("annotations") == {"helm.sh/resource-policy": "keep"}:
            del metadata["annotations"]
        if one["kind"] == "Deployment":
            one["spec"]["template"]["metadata"].get("annotations", {}).pop("checksum/config", None)
        if one["kind"] == "ConfigMap":
            one["data"] = {name: yaml.safe_load(text) for name, text in one["data"].items()}
        if one["kind"] != "Namespace":
            found[one["kind"], metadata["name"]] = one
    return found
