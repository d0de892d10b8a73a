"""Audit: known vulnerabilities in what is installed, and secrets in what git has."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from halimede_ops.errors import HalimedeError
from halimede_tools.build.steps import console
from halimede_tools.settings import ROOT

ACCEPTED = ROOT / ".secrets.baseline"
"""What detect-secrets finds and somebody looked at: hashes of examples and of checksums."""
SCAN = ("scan", "--exclude-files", ACCEPTED.name)
TIMEOUT_S = 10


def audit() -> None:
    """Print what both found.

    Raises:
        HalimedeError: a secret, a vulnerability, or no data to look for vulnerabilities in.
    """
    failed = [told for told in (_secrets(), _vulnerabilities()) if told]
    if failed:
        raise HalimedeError("; ".join(failed))


def _secrets() -> str:
    """What is wrong; empty: nothing."""
    accepted = _places(json.loads(ACCEPTED.read_text()))
    found = _places(json.loads(_run("detect_secrets", *SCAN)))
    new = [place for key, place in found.items() if key not in accepted]
    console.print(f"secrets: {len(found)} looked at, {len(new)} new {' '.join(new)}")
    return f"{len(new)} possible secrets in what git has" if new else ""


def _places(report: dict[str, Any]) -> dict[tuple[str, str], str]:
    """File and hash of each possible secret → where it stands."""
    return {
        (file, one["hashed_secret"]): f"{file}:{one['line_number']}"
        for file, several in report["results"].items()
        for one in several
    }


def _vulnerabilities() -> str:
    arguments = ["--local", "--skip-editable", "--format=json", f"--timeout={TIMEOUT_S}"]
    packages = json.loads(_run("pip_audit", *arguments) or '{"dependencies": []}')["dependencies"]
    audited = [one for one in packages if "skip_reason" not in one]
    bad = [f"{one['name']} {one['version']}" for one in audited if one["vulns"]]
    console.print(
        f"vulnerabilities: {len(audited)} of {len(packages)} packages looked up, {len(bad)} bad"
    )
    if not audited:
        return (
            "no package was audited: the package index gives no vulnerability data. Set "
            "PIP_AUDIT_VULNERABILITY_SERVICE=osv and PIP_AUDIT_OSV_URL to a mirror of OSV"
        )
    return f"known vulnerabilities in {', '.join(bad)}" if bad else ""


def _run(module: str, *arguments: str) -> str:
    """What a tool prints; its exit status says nothing of what it could not look at."""
    command: Sequence[str] = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
