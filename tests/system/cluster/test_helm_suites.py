"""The chart's suites in helm-unittest's format, run on what real helm renders.

The plugin helm-unittest is in none of the package registries that CI reaches, so this file runs what
the suites use of its language. Where the plugin is installed, `helm unittest deploy/helm/halimede`
runs the same files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import charts
import pytest
import yaml

SUITES = sorted((charts.CHART / "tests").glob("*_test.yaml"))
STEP = re.compile(r'\["(?P<key>[^"]+)"\]|\[(?P<index>\d+)\]|\.?(?P<name>[^.\[]+)')
MISSING = object()


def jobs() -> Iterator[Any]:
    for path in SUITES:
        suite = yaml.safe_load(path.read_text())
        for job in suite["tests"]:
            yield pytest.param(suite, job, id=f"{suite['suite']} {job['it']}")


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted paths, as maps in maps."""
    result: dict[str, Any] = {}
    for path, value in values.items():
        parent = result
        *parents, last = path.split(".")
        for name in parents:
            parent = parent.setdefault(name, {})
        parent[last] = value
    return result


def at(manifest: Any, path: str) -> Any:
    """The value at a path such as `spec.volumes[0].name`; MISSING if there is none."""
    for step in STEP.finditer(path):
        key = int(step["index"]) if step["index"] else step["key"] or step["name"]
        try:
            manifest = manifest[key]
        except (KeyError, IndexError, TypeError):
            return MISSING
    return manifest


def contains(values: Any, content: Any) -> bool:
    return isinstance(values, list) and content in values


HOLDS: dict[str, Callable[[Any, dict[str, Any]], bool]] = {
    "equal": lambda one, want: at(one, want["path"]) == want["value"],
    "exists": lambda one, want: at(one, want["path"]) is not MISSING,
    "notExists": lambda one, want: at(one, want["path"]) is MISSING,
    "contains": lambda one, want: contains(at(one, want["path"]), want["content"]),
    "matchRegex": lambda one, want: bool(re.search(want["pattern"], str(at(one, want["path"])))),
    "isKind": lambda one, want: one["kind"] == want["of"],
}
"""Assertion about each manifest → whether it holds."""


@pytest.mark.parametrize(("suite", "job"), [*jobs()])
def test_suite(suite: dict[str, Any], job: dict[str, Any]) -> None:
    """Every assertion holds for every manifest that it is about, and is about at least one."""
    release = suite["release"]
    done = charts.template(
        nested({**suite.get("set", {}), **job.get("set", {})}),
        release=release["name"],
        namespace=release["namespace"],
    )
    names = [job["template"]] if "template" in job else suite["templates"]
    found = charts.by_template(done.stdout)
    manifests = [one for name in names for one in found.get(f"templates/{name}", [])]
    selector = job.get("documentSelector")
    if selector is not None:
        manifests = [one for one in manifests if at(one, selector["path"]) == selector["value"]]
        assert len(manifests) == 1
    for assertion in job["asserts"]:
        [(kind, want)] = assertion.items()
        if kind == "failedTemplate":
            assert done.returncode != 0 and re.search(want["errorPattern"], done.stderr)
            continue
        assert done.returncode == 0, done.stderr
        if kind == "hasDocuments":
            assert len(manifests) == want["count"]
            continue
        assert manifests and all(HOLDS[kind](one, want) for one in manifests), (want, manifests)


def test_every_template_has_a_suite() -> None:
    """Each template is named by a suite, or by the tests of the chart against Kustomize alone."""
    named = {name for path in SUITES for name in yaml.safe_load(path.read_text())["templates"]}
    templates = {path.name for path in (charts.CHART / "templates").glob("*.yaml")}
    assert templates - named == {"monitoring.yaml"}
