"""deploy/: Kubernetes manifests, Prometheus rules and the dashboard, without a cluster."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml
from conftest import MODEL
from scrapes import figures

from halimede import Embedder, UnknownInputType
from halimede_tools.serve import container, container_files
from halimede_tools.serve.wheel import ENVIRONMENT, Options, Server

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CLUSTER = DEPLOY.parent / "docs" / "guides" / "cluster.md"
BASE = DEPLOY / "kubernetes" / "base"
KUBERNETES = "1.31"


def kustomization(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "kustomization.yaml").read_text())


def resources() -> list[dict[str, Any]]:
    files = kustomization(BASE)["resources"]
    return [part for name in files for part in yaml.safe_load_all((BASE / name).read_text())]


def resource(kind: str, name: str) -> dict[str, Any]:
    return next(r for r in resources() if r["kind"] == kind and r["metadata"]["name"] == name)


@pytest.mark.parametrize(
    "manifest", resources(), ids=lambda r: f"{r['kind']}-{r['metadata']['name']}"
)
def test_every_manifest_is_what_kubernetes_expects(manifest: dict[str, Any]) -> None:
    """Each is valid by the schemas of the API server, with no field it does not know."""
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_every_file_is_part_of_the_kustomization() -> None:
    """No manifest lies beside the others unused."""
    files = {path.name for path in BASE.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == set(kustomization(BASE)["resources"])


def test_manifests_name_each_other_rightly() -> None:
    """Services, budget, autoscaler and policy find the server; it finds its ports and volumes."""
    triton = resource("Deployment", "triton")
    pod = triton["spec"]["template"]
    labels = pod["metadata"]["labels"].items()
    [container] = pod["spec"]["containers"]
    ports = {port["name"] for port in container["ports"]}
    for name in ("triton", "triton-grpc"):
        service = resource("Service", name)["spec"]
        assert service["selector"].items() <= labels
        assert {port["targetPort"] for port in service["ports"]} <= ports
    assert resource("Service", "triton-grpc")["spec"]["clusterIP"] == "None"
    for kind in ("PodDisruptionBudget", "NetworkPolicy"):
        spec = resource(kind, "triton")["spec"]
        selector = spec.get("selector") or spec["podSelector"]
        assert selector["matchLabels"].items() <= labels
    target = resource("HorizontalPodAutoscaler", "triton")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", "triton")
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] in ports
    for workload in (triton, resource("Job", "build")):
        spec = workload["spec"]["template"]["spec"]
        mounted = {mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
        claims = [
            v["persistentVolumeClaim"]["claimName"]
            for v in spec["volumes"]
            if "persistentVolumeClaim" in v
        ]
        assert all(resource("PersistentVolumeClaim", claim) for claim in claims)


def patched(base: Any, patch: Any) -> Any:
    """As Kustomize lays a patch over a manifest: maps are merged, and lists of what has a name."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {key: patched(base.get(key), value) for key, value in patch.items()}
    if isinstance(base, list) and patch and all(isinstance(one, dict) for one in patch):
        over = {one["name"]: one for one in patch}
        return [patched(one, over.get(one["name"], {})) for one in base]
    return patch


def test_the_gpu_overlay_patches_what_is_there() -> None:
    """It changes the base's deployment and container by their names, into what Kubernetes takes."""
    overlay = DEPLOY / "kubernetes" / "gpu"
    assert (overlay / kustomization(overlay)["resources"][0]).resolve() == BASE.resolve()
    patch = yaml.safe_load((overlay / "triton.yaml").read_text())
    base = resource("Deployment", "triton")
    assert patch["metadata"]["name"] == base["metadata"]["name"]
    whole = patched(base, patch)
    kubernetes_validate.validate(whole, KUBERNETES, strict=True)
    [container] = whole["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "halimede/triton-gpu"
    assert container["livenessProbe"]["exec"]["command"] == probes()["cluster"]
    assert container["startupProbe"] and container["securityContext"]["readOnlyRootFilesystem"]


def test_the_gpu_image_is_the_container_that_serve_starts() -> None:
    """Same base, packages, backends, arguments and environment; model control is closed."""
    dockerfile = (DEPLOY / "gpu.Dockerfile").read_text().replace("\\\n", "")
    assert f"ARG BASE={container.IMAGE}\n" in dockerfile
    constraints = (DEPLOY.parent / "constraints-py311.txt").read_text().split()
    for package in container_files.REQUIREMENTS:
        assert f"{package}=={importlib.metadata.version(package)}" in constraints
    assert " --constraint /tmp/constraints-py311.txt" in dockerfile
    assert " --requirement /tmp/requirements.txt" in dockerfile
    stages = dockerfile.split("\nFROM ${BASE}")
    assert "container_files ../python_backend /layout\n" in stages[1]
    copied = re.findall(r"^COPY (.*)", stages[2], re.MULTILINE)
    assert copied == [
        "constraints-py311.txt /tmp/",
        "--from=layout /layout/requirements.txt /tmp/",
        "--from=layout /layout/root /",
    ]
    [entry] = re.findall(r"^ENTRYPOINT (.*)", dockerfile, re.MULTILINE)
    arguments = Options().arguments(inside=container.ANY_ADDRESS)
    assert json.loads(entry) == [
        *["python3", "-m", "halimede_launch.start", "tritonserver", "--model-repository=/models"],
        *arguments,
        "--control-closed",
    ]
    [environment] = re.findall(r"^ENV (.*)", dockerfile, re.MULTILINE)
    assert {f"{name}={value}" for name, value in ENVIRONMENT.items()} <= set(environment.split())


def probes() -> dict[str, list[str]]:
    """The health commands of NVIDIA's containers, in the cluster and in compose."""
    patch = yaml.safe_load((DEPLOY / "kubernetes" / "gpu" / "triton.yaml").read_text())
    [pod] = patch["spec"]["template"]["spec"]["containers"]
    compose = yaml.safe_load((DEPLOY.parent / "docker-compose.yml").read_text())
    _, *health = compose["services"]["triton-gpu"]["healthcheck"]["test"]
    return {"cluster": pod["livenessProbe"]["exec"]["command"], "compose": health}


@pytest.mark.needs("curl")
@pytest.mark.parametrize("where", ["cluster", "compose"])
def test_probes_of_nvidias_containers_embed(server: Server, where: str) -> None:
    """A server answers them; one that does not have the model fails them."""
    command = [word.replace("localhost:8000", server.http_address) for word in probes()[where]]
    assert subprocess.run(command).returncode == 0
    assert subprocess.run([word.replace(MODEL, "none") for word in command]).returncode != 0


@pytest.mark.needs("promtool")
def test_alerts_fire_when_they_should() -> None:
    """promtool's own verdict over the rules and their tests."""
    for arguments in (["check", "config", "prometheus.yml"], ["test", "rules", "rules_test.yml"]):
        done = subprocess.run(
            ["promtool", *arguments], cwd=DEPLOY / "prometheus", capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_rules_dashboard_and_autoscaler_ask_for_metrics_that_there_are(
    server: Server, http: httpx.Client
) -> None:
    """Every metric they name is on the metrics port of a real server, or a gateway's; those of GPUs
    and of the response cache need either."""
    with Embedder(server.grpc_address) as embedder, pytest.raises(UnknownInputType):
        embedder.embed("an error's metric is there after the first", input_type="none")
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())
    asked = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "halimede.json").read_text())
    asked += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    [adapter] = re.findall(r"```yaml\n(rules:.*?)```", CLUSTER.read_text(), re.DOTALL)
    [rule] = yaml.safe_load(adapter)["rules"]
    assert rule["name"]["as"] in (BASE / "autoscaling.yaml").read_text()
    asked.append(rule["metricsQuery"])
    named = set(re.findall(r"\b(?:nv|halimede)_\w+", " ".join(asked)))
    exported = figures(server, lambda found: found["halimede_errors_total"] > 0)
    http.post("/v1/embeddings", json={"model": MODEL, "input": "a"}).raise_for_status()
    of_gateway = re.findall(r"^halimede_gateway_\w+", http.get("/metrics").text, re.M)
    missing = named - exported.keys() - set(of_gateway)
    assert {name for name in missing if not name.startswith(("nv_gpu_", "nv_cache_"))} == set()
