"""The Helm chart: what Kustomize holds, as real helm renders it, by the schemas of the API server."""

from __future__ import annotations

import copy
import importlib.metadata
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import charts
import pytest
import yaml
from conftest import ROOT

CASES = sorted((charts.CHART / "ci").glob("*.yaml"))
DEFAULTS = yaml.safe_load((charts.CHART / "values.yaml").read_text())
WHOLE = {"resources", "buildResources", "config", "pod", "podAnnotations", "annotations", "labels"}
"""Values that are maps of their own."""
Path_ = tuple[str, ...]


def leaves(values: dict[str, Any], path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Path and value of every value."""
    for name, value in values.items():
        if isinstance(value, dict) and name not in WHOLE:
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def without(values: dict[str, Any], path: Path_) -> dict[str, Any]:
    """The values but one, which then is the default."""
    values = copy.deepcopy(values)
    parent = values
    for name in path[:-1]:
        parent = parent[name]
    del parent[path[-1]]
    return values


@pytest.fixture(params=[None, *CASES], ids=lambda path: path.stem if path else "defaults")
def values(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load(request.param.read_text()) if request.param else {}


@pytest.mark.parametrize("version", charts.VERSIONS)
def test_what_the_chart_renders_is_what_kubernetes_expects(
    values: dict[str, Any], version: str
) -> None:
    """Every manifest of the defaults, and of every documented value, is valid with no unknown field."""
    for manifest in charts.rendered(values):
        charts.validate(manifest, version)


@pytest.mark.parametrize(
    ("gpu", "components", "given"),
    [
        (False, (), {}),
        (True, (), {"triton": {"device": "gpu"}}),
        (False, ("redis",), {"redis": {"enabled": True}}),
        (False, ("keda",), {"autoscaling": {"engine": "keda"}}),
        (False, ("pod-monitor",), {"podMonitor": {"enabled": True}}),
        (
            True,
            ("redis", "keda", "pod-monitor"),
            {
                "triton": {"device": "gpu"},
                "redis": {"enabled": True},
                "autoscaling": {"engine": "keda"},
                "podMonitor": {"enabled": True},
            },
        ),
    ],
    ids=["defaults", "gpu", "redis", "keda", "pod-monitor", "all"],
)
def test_chart_and_kustomize_agree(
    tmp_path: Path, gpu: bool, components: tuple[str, ...], given: dict[str, Any]
) -> None:
    """The chart renders, field by field, what Kustomize builds; both are valid."""
    expected = charts.built(tmp_path, gpu=gpu, components=components)
    for manifest in expected:
        charts.validate(manifest, charts.VERSIONS[0])
    assert charts.comparable(charts.rendered(given)) == charts.comparable(expected)


def test_every_value_is_documented_and_tried() -> None:
    """Each of values.yaml has another value in a file of ci/, and changes what is rendered there."""
    cases = [yaml.safe_load(case.read_text()) for case in CASES]
    tried = [(case, path) for case in cases for path, _ in leaves(case)]
    defaults = dict(leaves(DEFAULTS))
    assert {path for _, path in tried} == defaults.keys()

    def has_effect(one: tuple[dict[str, Any], Path_]) -> bool:
        case, path = one
        return charts.template(case).stdout != charts.template(without(case, path)).stdout

    with ThreadPoolExecutor(2) as pool:
        effects = dict(zip(((id(case), path) for case, path in tried), pool.map(has_effect, tried)))
    assert [path for (_, path), effect in effects.items() if not effect] == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"triton": {"replica": 3}}, "replica"),
        ({"triton": {"replicas": 0}}, "replicas"),
        ({"triton": {"device": "tpu"}}, "device"),
        ({"triton": {"pod": {"hostNetwork": True}}}, "hostNetwork"),
        ({"triton": {"tag": 0.2}}, "tag"),
        ({"gateway": {"requireKeys": "yes"}}, "requireKeys"),
        ({"autoscaling": {"engine": "vpa"}}, "engine"),
        ({"redis": {"maxMemory": "half"}}, "maxMemory"),
        ({"model": "BAAI/bge-m3"}, "model"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_a_wrong_value_is_refused(given: dict[str, Any], said: str) -> None:
    """values.schema.json names it before anything is rendered."""
    done = charts.template(given)
    assert done.returncode != 0
    assert "schema" in done.stderr and said in done.stderr
    assert done.stdout == ""


def test_the_chart_is_packaged(tmp_path: Path) -> None:
    """helm lints it and packs it, without the files of its tests; the package renders the same."""
    done = charts.helm("lint", "--strict", charts.CHART)
    assert done.returncode == 0, done.stdout + done.stderr
    done = charts.helm("package", charts.CHART, "--destination", tmp_path)
    assert done.returncode == 0, done.stderr
    [package] = tmp_path.glob("*.tgz")
    shutil.unpack_archive(package, tmp_path)
    assert {path.name for path in (tmp_path / "halimede").iterdir()} == {
        "Chart.yaml",
        ".helmignore",
        "templates",
        "values.schema.json",
        "values.yaml",
    }
    assert charts.rendered(chart=package) == charts.rendered()


def test_versions_are_those_of_the_package() -> None:
    """The chart, its images and Kustomize's have the version of halimede."""
    version = importlib.metadata.version("halimede")
    chart = yaml.safe_load((charts.CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (version, version)
    for name in ("base", "gpu"):
        text = (charts.KUSTOMIZE / name / "kustomization.yaml").read_text()
        assert {image["newTag"] for image in yaml.safe_load(text)["images"]} == {version}


def test_redis_is_that_of_compose() -> None:
    """Image and arguments are the same in the cluster and in docker-compose.yml."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["redis"]
    [redis] = [
        one["spec"]["template"]["spec"]["containers"][0]
        for one in charts.rendered({"redis": {"enabled": True}})
        if (one["kind"], one["metadata"]["name"]) == ("Deployment", "redis")
    ]
    assert (redis["image"], redis["args"]) == (compose["image"], compose["command"])


QUEUED = 'nv_inference_queue_duration_us{namespace="halimede",pod="triton-%s"}'
ANSWERED = 'nv_inference_request_success{namespace="halimede",pod="triton-%s"}'
IN_PROCESS = 'halimede_wait_seconds_total{namespace="halimede",pod="triton-%s"}'
ROWS = 'halimede_rows_total{namespace="halimede",pod="triton-%s"}'
LOADS: list[tuple[dict[str, str], float]] = [
    ({}, 0.0),
    ({QUEUED: "0+0x10", ANSWERED: "0+0x10"}, 0.0),
    # 600 requests a minute wait 20 ms each in Triton; with rows, 100 ms more in the process.
    ({QUEUED: "0+12e6x10", ANSWERED: "0+600x10"}, 0.02),
    ({QUEUED: "0+12e6x10", ANSWERED: "0+600x10", IN_PROCESS: "0+60x10", ROWS: "0+600x10"}, 0.12),
]


@pytest.mark.needs("promtool")
def test_keda_asks_for_the_time_that_texts_wait(tmp_path: Path) -> None:
    """By promtool: the mean wait of two servers in seconds, and 0 without requests or servers; those
    of another namespace do not count.
    """
    [scaled] = [
        one
        for one in charts.rendered({"autoscaling": {"engine": "keda"}})
        if one["kind"] == "ScaledObject"
    ]
    query = scaled["spec"]["triggers"][0]["metadata"]["query"]
    stranger = {QUEUED.replace("halimede", "other") % "x": "0+6e9x10"}
    stranger[ANSWERED.replace("halimede", "other") % "x"] = "0+1x10"
    groups = [
        {
            "interval": "1m",
            "input_series": [
                {"series": name, "values": values}
                for name, values in [
                    *stranger.items(),
                    *((name % pod, values) for name, values in load.items() for pod in "ab"),
                ]
            ],
            "promql_expr_test": [
                {
                    "expr": f"round({query}, 0.001)",
                    "eval_time": "10m",
                    "exp_samples": [{"labels": "{}", "value": wait_s}],
                }
            ],
        }
        for load, wait_s in LOADS
    ]
    file = tmp_path / "keda_test.yml"
    file.write_text(yaml.safe_dump({"tests": groups}))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
