"""README and documentation are run, not read: every command in them, and every block of Python."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import documents
import pytest
import typer
from conftest import NAMES, ROOT, free_options
from PIL import Image

from halimede import Embedder
from halimede.cli import app
from halimede_tools.serve import wheel

README = documents.README.read_text()
FALLBACK = ROOT / "docs" / "guides" / "fallback-and-cache.md"
ELSEWHERE = {
    "make up": "needs a Docker engine: test_containers.py",
    "make down": "needs a Docker engine: test_containers.py",
    "make ": "test_verbs_exist; CI runs `make test`, which makes the environment and the models",
    "python3 -m venv ": "test_wheel.py does it",
    ". ": "activates an environment",
    "pip install ": "test_wheel.py installs the wheel in a fresh environment",
    "curl ": "test_serve.py: test_serve_shows_a_sample_and_stops_every_child prints this line",
    "docker build ": "needs a Docker engine: test_containers.py",
    "kubectl ": "needs a cluster: test_deploy.py checks the manifests",
    "halimede serve": "runs until Ctrl-C: test_serve.py, test_security.py, test_tracing.py",
    "halimede build": "needs a hub or minutes: test_build.py, test_models.py, test_clip.py",
    "halimede deploy": "needs a candidate: test_rollout.py",
    "halimede tune": "takes a minute: test_tune.py",
    "halimede bench": "takes minutes, or needs mteb: test_bench.py, test_mteb.py",
    "halimede fusion": "needs an image model: test_fusion.py",
    "halimede rerank": "needs a reranker: test_kind_contract.py",
    "halimede classify": "needs a classifier: test_kind_contract.py",
    "halimede bulk": "needs a dataset, or a cluster: test_bulk.py, test_bulk_ray.py",
    "helm ": "needs a cluster: test_helm.py renders the chart",
    "halimede gateway": "runs until Ctrl-C, or makes a key: tests/client/gateway",
    "halimede index": "needs a collection: test_index_reembed.py",
    "halimede monitor": "runs until Ctrl-C: test_monitor.py",
}
"""Beginning of a command → why it is not run here, and what runs it."""
MAY_LACK = {
    "chromadb": "chromadb is not installed: test_embedding_functions.py runs the block",
    "pyspark": "pyspark is not installed: it has 300 MB and needs Java",
}
"""Package that a page's code may use without being installed here → why it is not."""
COMMANDS = [one for one in documents.commands() if not one.line.startswith(tuple(ELSEWHERE))]
LISTED = [one for one in documents.commands() if one.line.startswith(tuple(ELSEWHERE))]
PYTHON = documents.blocks("python")
PYTHONPATH = ":".join(
    str(ROOT / part) for part in os.environ.get("PYTHONPATH", "").split(":") if part
)


def here(text: str, server: wheel.Server) -> str:
    """A text of a page with this server's addresses."""
    return text.replace("127.0.0.1:8001", server.grpc_address).replace(
        "127.0.0.1:8000", server.http_address
    )


def environment(server: wheel.Server, folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HALIMEDE_URL": server.grpc_address,
        "HALIMEDE_REPOSITORY": str(ROOT / "model_repository"),
        "HALIMEDE_HOME": str(folder / "home"),
        "PYTHONPATH": PYTHONPATH,
        "HAYSTACK_TELEMETRY_ENABLED": "False",
    }


def prepare(folder: Path, page: Path, server: wheel.Server) -> None:
    """Lay out in a folder what a page speaks of, its configurations on this server's address."""
    for name, text in documents.files(page):
        (folder / name).write_text(here(text, server))
    (folder / "photos").mkdir()
    for name, colour in (("cat.jpg", "grey"), ("bicycle.png", "red")):
        Image.new("RGB", (40, 30), colour).save(folder / "photos" / name)
    for name in ("model_repository", "README.md"):
        (folder / name).symlink_to(ROOT / name)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.place)
def test_commands_run_as_written(
    server: wheel.Server, tmp_path: Path, command: documents.Command
) -> None:
    """Every halimede command of a page succeeds; what is not run here is listed with the reason."""
    prepare(tmp_path, command.page, server)
    program, *words = shlex.split(here(command.line, server))
    assert program == "halimede"
    run = [str(Path(sys.executable).parent / program), *words]
    env = environment(server, tmp_path)
    subprocess.run(run, cwd=tmp_path, env=env, check=True, capture_output=True)


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
def test_python_runs_as_written(
    server: wheel.Server, address: str, tmp_path: Path, block: documents.Block
) -> None:
    """Every Python block of a page runs, on the addresses of this server and of a gateway."""
    for module in MAY_LACK:
        if re.search(rf"^(import|from) {module}\b", block.code, re.M):
            find = f"import importlib.util, sys; sys.exit(not importlib.util.find_spec({module!r}))"
            if subprocess.run([sys.executable, "-c", find]).returncode:
                pytest.skip(MAY_LACK[module])
    prepare(tmp_path, block.page, server)
    code = here(block.code, server).replace("http://127.0.0.1:8080", address)
    env = environment(server, tmp_path)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)


@pytest.mark.parametrize(
    "command",
    [*(one for one in LISTED if one.line.startswith("halimede ")), *documents.named_commands()],
    ids=lambda command: command.place,
)
def test_commands_that_are_not_run_exist(command: documents.Command) -> None:
    """Verb and options of a command that is run elsewhere, or named in a sentence, exist."""
    _, *words = shlex.split(command.line)
    asked = typer.main.get_command(app)
    while words:
        _, words, _ = asked.make_parser(typer.Context(asked)).parse_args(words)
        if not words or not hasattr(asked, "commands"):
            return
        asked, words = asked.commands[words[0]], words[1:]


@pytest.mark.parametrize("beginning", ELSEWHERE)
def test_no_reason_is_left_over(beginning: str) -> None:
    """Every reason not to run a command is that of a command on some page; the tests it names are
    there.
    """
    assert any(one.line.startswith(beginning) for one in LISTED)
    named = re.findall(r"test_\w+\.py", ELSEWHERE[beginning])
    assert [name for name in named if not list((ROOT / "tests").rglob(name))] == []


def test_the_chain_answers_without_the_server(server: wheel.Server, tmp_path: Path) -> None:
    """The guide's configuration gives vectors, from its fallback, when nothing listens."""
    prepare(tmp_path, FALLBACK, server)
    file = tmp_path / "halimede.yaml"
    file.write_text(
        re.sub(r"url: \S+\d", f"url: 127.0.0.1:{free_options().grpc_port}", file.read_text())
    )
    with Embedder(config=file) as embedder:
        os.chdir(tmp_path)
        try:
            result = embedder.embed("hello world")
        finally:
            os.chdir(ROOT)
    assert (result.provider, result.precision) == ("onnx", "int8")


@pytest.mark.parametrize("page", documents.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_verbs_exist(page: Path) -> None:
    """Every `make` verb that a page names is in the Makefile."""
    text = page.read_text()
    verbs = set(re.findall(r"`make ([a-z-]+)", text)) | set(
        re.findall(r"^make ([a-z-]+)", text, re.M)
    )
    makefile = (ROOT / "Makefile").read_text()
    assert verbs or page != documents.README
    assert all(f"\n{verb}:" in makefile for verb in verbs)


def test_models_are_those_served() -> None:
    """The README's table names every ensemble."""
    assert all(f"| `{name}` |" in README for name in NAMES.values())
