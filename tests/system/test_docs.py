"""The documentation: the site builds, and its reference is what the code has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import documents
import pytest
import reference_pages
from conftest import MODEL, ROOT
from prometheus_client import CollectorRegistry
from scrapes import figures

from halimede import Embedder, UnknownInputType
from halimede.observability import monitor, prometheus
from halimede_tools.deploy import shadow
from halimede_tools.serve.wheel import Server

ZENSICAL = shutil.which("zensical", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
METRICS = (ROOT / "docs" / "reference" / "metrics.md").read_text()
FOLDERS = ("client", "python_backend", "tools", "tests", "deploy", "model_repository", ".ci")
QUESTIONS = 20


@pytest.mark.skipif(ZENSICAL is None, reason="zensical is not installed: pip install '.[docs]'")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """No link, anchor, page or documented name is missing, and no page asks another host."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for name in ("client", "python_backend"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [str(ZENSICAL), "build", "--strict"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        assert not re.findall(r'(?:src|<link[^>]* href)="https?://[^"]*"', page.read_text()), page


@pytest.mark.parametrize("name", reference_pages.PAGES)
def test_generated_pages_are_current(name: str) -> None:
    """A page is what the code gives; `make docs-reference` writes it."""
    assert (reference_pages.FOLDER / name).read_text() == reference_pages.PAGES[name]()


def documented(section: str) -> set[str]:
    """Names of the metrics in the table of a section."""
    [text] = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", METRICS, re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_metrics_of_backends_are_documented(server: Server) -> None:
    """The page lists what is on a real server's metrics port of ours, and nothing else."""
    with Embedder(server.grpc_address, MODEL) as embedder, pytest.raises(UnknownInputType):
        embedder.embed("an error's metric is there after the first", input_type="none")
    names = set(figures(server, lambda found: found["halimede_errors_total"] > 0))
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names if name[:9] == "halimede_"}
    assert documented("Backends") == ours


def test_metrics_of_the_client_are_documented() -> None:
    """The page lists every metric of a registered embedder, and nothing else."""
    registry = CollectorRegistry()
    models = {"model": {"provider": "hash", "model_id": "hash"}}
    with Embedder(config={"models": models, "cache": {}}) as embedder:
        prometheus.register(embedder, registry)
        families = list(registry.collect())
    names = {one.name + ("_total" if one.type == "counter" else "") for one in families}
    assert documented("Client") == names


def test_metrics_of_the_monitor_are_documented() -> None:
    """The page lists every metric of `halimede monitor`, and nothing else."""
    assert documented("Monitor") == {one.name for one in monitor.Monitor({}, None).collect()}


def test_metrics_of_the_shadow_are_documented(tmp_path: Path) -> None:
    """The page lists every metric of `halimede deploy shadow`, and nothing else."""
    shadow.export([], tmp_path / "metrics.prom")
    text = (tmp_path / "metrics.prom").read_text()
    assert documented("Shadow") == set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))


@pytest.mark.parametrize("page", documents.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_that_a_page_names_exist(page: Path) -> None:
    """Every path of the checkout in a page is there; parts in <…> stand for any name."""
    named = re.findall(rf"`((?:{'|'.join(map(re.escape, FOLDERS))})/[^`\s]*)`", page.read_text())
    patterns = [re.sub(r"<[^>]*>", "*", path).rstrip("/") for path in named]
    assert [path for path in patterns if not any(ROOT.glob(path))] == []


@pytest.mark.parametrize("page", documents.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    """Relative links lead to files of the checkout, so that pages can be read there too."""
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).is_file()] == []


def test_questions_of_a_newcomer_are_answered() -> None:
    """CONTRIBUTING answers twenty of them, each with a folder and a file."""
    text = documents.CONTRIBUTING.read_text()
    [section] = re.findall(
        r"^## Where do I find…\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE
    )
    rows = re.findall(r"^\| (?!question|---)(.*?) \| `(.*?)` \|", section, re.MULTILINE)
    assert len(rows) == QUESTIONS
    assert [path for _, path in rows if not (ROOT / path).is_file()] == []


def test_the_way_of_a_text_is_short_and_as_documented(server: Server) -> None:
    """From `embed` to the wire a text passes at most 5 files and 20 functions of ours: those of the
    table in "How it works".
    """
    text = "a text that is followed"
    passed: list[tuple[str, str]] = []

    def holds(value: object) -> bool:
        if isinstance(value, (str, bytes)):
            return (text if isinstance(value, str) else text.encode()) in value
        if isinstance(value, (list, tuple)):
            return any(map(holds, value))
        parts = ("inputs", "raw_input_contents")  # of a Call, and of a message to Triton
        return any(holds(list(getattr(value, part, ()))) for part in parts)

    def follow(frame: Any, event: str, argument: object) -> None:
        name = frame.f_code.co_filename
        if event != "call" or "/client/halimede/" not in name or frame.f_code.co_name[0] == "<":
            return
        step = name.partition("/client/halimede/")[2], frame.f_code.co_qualname
        wanted = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        if step not in passed and any(holds(frame.f_locals.get(one)) for one in wanted):
            passed.append(step)

    class Sent(BaseException):
        pass

    def wire(*_: object, **__: object) -> None:
        sys.setprofile(None)
        raise Sent

    with Embedder(server.grpc_address, MODEL) as embedder:
        embedder.embed("warm")
        [replica] = embedder._pipeline._fallback.first._replicas
        replica._provider._connection._stub.ModelInfer = wire  # type: ignore[attr-defined]
        sys.setprofile(follow)
        try:
            with pytest.raises(Sent):
                embedder.embed(text)
        finally:
            sys.setprofile(None)
    *before_the_wire, wired = passed
    assert wired == ("providers/triton/grpc_connection.py", "GrpcConnection.start")
    assert len({file for file, _ in before_the_wire}) <= 5, passed
    assert len(passed) <= 20, passed
    page = (ROOT / "docs" / "how-it-works" / "index.md").read_text()
    for file, function in passed:
        assert file.rpartition("/")[0] in page
        assert f"{function.rpartition('.')[2]}" in page, function
