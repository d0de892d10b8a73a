"""The two commands of `make security` that look for secrets and for known vulnerabilities, as the
Makefile has them; vulnerabilities come from a mirror of OSV.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT

KNOWN = {"id": "TEST-1", "summary": "", "details": "", "aliases": [], "affected": []}
BASELINE = ".secrets.baseline"
INSTALLED = ".venv/installed.txt"


class Mirror(BaseHTTPRequestHandler):
    """Knows of one vulnerability, in numpy."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = [KNOWN] if asked["package"]["name"] == "numpy" else []
        body = json.dumps({"vulns": known} if known else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def mirror() -> Iterator[str]:
    """Its url."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
        server.shutdown()
        thread.join()


def recipe(program: str) -> str:
    """The line of `make security` that runs a program."""
    printed = subprocess.run(
        ["make", "--dry-run", "security"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    [line] = [line for line in printed.stdout.splitlines() if program in line and "#" not in line]
    return line


def run(command: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def audit(folder: Path, packages: str, mirror: str) -> subprocess.CompletedProcess[str]:
    """pip-audit of what `packages` lists."""
    listed = folder / "installed.txt"
    listed.write_text(packages)
    return run(
        recipe("pip-audit").replace(INSTALLED, str(listed)),
        PIP_AUDIT_VULNERABILITY_SERVICE="osv",
        PIP_AUDIT_OSV_URL=mirror,
    )


def test_what_is_installed_is_looked_up(mirror: str, tmp_path: Path) -> None:
    """Every package but our own is listed; a bad one is named, and alone fails."""
    packages = run(recipe("pip freeze").removesuffix(f"> {INSTALLED}")).stdout
    listed = [line.partition("==")[0] for line in packages.splitlines()]
    installed = json.loads(run(".venv/bin/python -m pip list --format=json").stdout)
    assert len(listed) == len(installed) - 1 > 50
    assert "halimede" not in listed
    found = audit(tmp_path, packages, mirror)
    assert re.search(r"^numpy +[\d.]+ +TEST-1", found.stdout, re.MULTILINE)
    assert "Found 1 known vulnerability in 1 package" in found.stderr
    assert found.returncode == 1
    others = "".join(line for line in packages.splitlines(True) if not line.startswith("numpy=="))
    assert audit(tmp_path, others, mirror).returncode == 0


def test_no_vulnerability_data_fails(tmp_path: Path) -> None:
    """Where nobody answers for a package, that is no pass."""
    assert audit(tmp_path, "numpy==1.26.4\n", "http://127.0.0.1:9/v1/query").returncode == 1


def secrets(baseline: Path, files: str = "$(git ls-files)") -> subprocess.CompletedProcess[str]:
    command = recipe("detect-secrets-hook").replace(BASELINE, str(baseline))
    return run(command.replace("$(git ls-files)", files))


def test_no_new_secret_is_in_what_git_has(tmp_path: Path) -> None:
    """Each possible secret in the checkout is one that somebody looked at; a new one fails."""
    baseline = tmp_path / BASELINE
    shutil.copy(ROOT / BASELINE, baseline)
    looked_at = secrets(baseline)
    assert looked_at.returncode == 0, looked_at.stdout
    leak = tmp_path / "settings.py"
    leak.write_text('url = "redis://user:' + "hunter2" + '@cache:6379"\n')
    found = secrets(baseline, str(leak))
    assert f"{leak}:1" in found.stdout
    assert found.returncode == 1
