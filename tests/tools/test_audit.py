"""`tools audit` where it has data: against a mirror of OSV."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

KNOWN = {"id": "TEST-1", "summary": "", "details": "", "aliases": [], "affected": []}


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


def test_what_is_installed_is_looked_up(mirror: str) -> None:
    """Every package but our own is asked for; a bad one is named, with exit code 1, and no new
    secret is in what git has.
    """
    data = {"PIP_AUDIT_VULNERABILITY_SERVICE": "osv", "PIP_AUDIT_OSV_URL": mirror}
    done = subprocess.run(
        [sys.executable, "-m", "halimede_tools", "audit"],
        cwd=ROOT,
        env={**os.environ, **data},
        capture_output=True,
        text=True,
    )
    told = done.stdout + done.stderr
    looked_up, packages = re.findall(r"(\d+) of (\d+) packages looked up, 1 bad", told)[0]
    assert int(looked_up) == int(packages) - 1 > 50
    assert re.search(r"error: known vulnerabilities in numpy [\d.]+\n$", told)
    assert ", 0 new" in told
    assert done.returncode == 1
