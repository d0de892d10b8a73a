"""Real gateways: uvicorn over a real port, before the run's Triton or over the engine itself."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import uvicorn
import yaml
from conftest import MODEL, ROOT, free_options, wait_until

from halimede.config.resolve import resolve
from halimede.gateway.app import create
from halimede.gateway.edge.protocol import Protocol
from halimede_tools.serve import ports, wheel
from halimede_tools.settings import Settings


@contextlib.contextmanager
def gateway(
    models: dict[str, Any], fallback: tuple[str, ...] = (), **options: Any
) -> Iterator[str]:
    """The address of a gateway for models of a configuration, with these options of `gateway`."""
    config = resolve({"models": models, "fallback": fallback, "gateway": options})
    [port] = ports.free_ports(1)
    server = uvicorn.Server(
        uvicorn.Config(
            create(config), port=port, http=Protocol, log_level="warning", access_log=False
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


def triton_model(server: wheel.Server, name: str = MODEL, **options: Any) -> dict[str, Any]:
    """The configuration of a model on a running Triton."""
    return {name: {"provider": "triton", "model_id": name, "url": server.grpc_address, **options}}


@pytest.fixture(scope="session")
def address(server: wheel.Server) -> Iterator[str]:
    """A gateway before the run's Triton, without keys."""
    with gateway(triton_model(server), kserve_url=f"http://{server.http_address}") as running:
        yield running


KINDS = {
    "unscaled": "like_distiluse",
    "prompted": "like_e5",
    "clip": "clip",
    "reranker": "bert_reranker",
    "logits": "like_cross_encoder",
    "classifier": "topic_classifier",
    "splade": "like_splade",
    "colbert": "like_colbert",
}
"""Small models of every kind, each with what makes it. The vectors of the first have other lengths
than 1, and the scores of `logits` are no probabilities. `fused` embeds pairs of texts and images."""


class Kinds(NamedTuple):
    """A running Triton with a model of every kind, and what it was built of."""

    server: wheel.Server
    repository: Path
    folders: Path


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kinds]:
    """A running Triton with a model of every kind."""
    import small_models  # imports torch, for which every other test would wait

    from halimede_tools.build import fusion
    from halimede_tools.build.plan import build, build_request

    folder = tmp_path_factory.mktemp("kinds")
    home = Settings(home=folder / "home", repository=folder / "repository")
    for name, make in KINDS.items():
        source = getattr(small_models, make)(folder / name)
        build(build_request(str(source), name, precisions=("fp32",)), home)
    fusion.write_untrained("fused", "prompted", "clip-image", 0.5, home.repository)
    with wheel.serve(
        home.repository, home.python_backend, folder / "run", free_options()
    ) as running:
        yield Kinds(running, home.repository, folder)


@pytest.fixture(scope="session")
def kinds_address(kinds: Kinds) -> Iterator[str]:
    """A gateway before a model of every kind."""
    with gateway(triton_model(kinds.server, "unscaled")) as running:
        yield running


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def vectors(source: Path) -> Any:
    """sentence-transformers' vectors of texts, with the same weights."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(source), device="cpu")
    return lambda texts: model.encode(texts, normalize_embeddings=True, show_progress_bar=False)


def assert_alike(given: Any, expected: np.ndarray, lowest: float = 0.9999) -> None:
    """Each row has a cosine of at least `lowest` to the row expected."""
    rows = np.asarray(given, np.float32)
    assert rows.shape == expected.shape
    cosines = (rows * expected).sum(1) / (
        np.linalg.norm(rows, axis=1) * np.linalg.norm(expected, axis=1)
    )
    assert cosines.min() >= lowest


@contextlib.contextmanager
def command(
    tmp_path: Path, models: dict[str, Any], *arguments: str, **options: Any
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`halimede gateway` as a user runs it, with these options of `gateway`: its address and its
    process. What it prints is in the file `log`.
    """
    config = tmp_path / "halimede.yaml"
    config.write_text(yaml.safe_dump({"models": models, "gateway": options}))
    [port] = ports.free_ports(1)
    program = str(Path(sys.executable).parent / "halimede")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [program, "gateway", "--config", str(config), "--port", str(port), *arguments],
            cwd=ROOT,
            env=dict(os.environ),
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            wait_until(lambda: _answers(address))
            yield address, process
        finally:
            process.terminate()
            process.wait(60)


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health/live").status_code == 200
    except httpx.TransportError:
        return False
