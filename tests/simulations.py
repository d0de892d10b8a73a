"""Local servers that speak the protocols of OpenAI, Ollama and Hugging Face over real HTTP.

They are simulations: their vectors are hashes, and of each protocol they know the part that
embeds. What the official SDKs send and read is real.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from halimede.providers.hash import hash_embeddings

DIMS = 384


@dataclasses.dataclass
class Simulation:
    """A running server, and how it should behave."""

    url: str = ""
    status: int = 200
    """Answer everything with this."""
    delay_s: float = 0.0
    garbage: Any = None
    """Answer with this instead."""
    raw: bytes | None = None
    """Answer with exactly these bytes, with any status."""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    """Further headers of every answer."""
    refuses_base64: bool = False
    info: dict[str, Any] | None = None
    """What Ollama tells of the model, beside its own."""
    digest: str = "sha256:one"
    most_texts: int | None = None
    """Answer 500 'out of memory' above this."""
    key: str | None = None
    """The bearer token wanted."""
    requests: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def vectors(texts: list[str], dims: int) -> list[list[float]]:
    full = hash_embeddings([text.encode() for text in texts], max(dims, DIMS))
    cut = full[:, :dims]
    return (cut / (cut**2).sum(1, keepdims=True) ** 0.5).tolist()


def openai(path: str, body: dict[str, Any], simulation: Simulation) -> Any:
    """POST /v1/embeddings, with both encodings."""
    sizes = {"text-embedding-3-small": 1536, "text-embedding-3-large": 3072}
    dims = body.get("dimensions") or sizes.get(body["model"], DIMS)
    rows = vectors(body["input"], dims)
    if body.get("encoding_format") == "base64":
        import numpy as np

        rows = [base64.b64encode(np.array(row, "<f4").tobytes()).decode() for row in rows]
    tokens = sum(len(text.split()) for text in body["input"])
    return {
        "object": "list",
        "model": body["model"],
        # Out of order on purpose: the index says which is which.
        "data": [
            {"object": "embedding", "index": index, "embedding": row}
            for index, row in reversed(list(enumerate(rows)))
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def ollama(path: str, body: dict[str, Any], simulation: Simulation) -> Any:
    """/api/tags, /api/show and /api/embed."""
    if path == "/api/tags":
        return {"models": [{"model": "minilm:latest", "digest": simulation.digest}]}
    if path == "/api/show":
        info = {"bert.embedding_length": DIMS, "bert.context_length": 256}
        info |= simulation.info or {}
        return {
            "modelinfo": info,
            "model_info": info,
            "details": {"quantization_level": "F16"},
        }
    return {"model": body["model"], "embeddings": vectors(body["input"], DIMS)}


def huggingface(path: str, body: dict[str, Any], simulation: Simulation) -> Any:
    """POST /: a matrix."""
    return vectors(body["inputs"], DIMS)


@contextlib.contextmanager
def serve(protocol: Any, port: int = 0) -> Iterator[Simulation]:
    """A server of one of the protocols above."""
    simulation = Simulation()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            data = self.rfile.read(length)
            if len(data) == length:  # else the caller gave up
                self._answer(json.loads(data))

        def _answer(self, body: dict[str, Any]) -> None:
            simulation.requests.append({"path": self.path, **body})
            time.sleep(simulation.delay_s)
            status = simulation.status
            texts = body.get("input") or body.get("inputs") or []
            if simulation.key and self.headers.get("Authorization") != f"Bearer {simulation.key}":
                status = 401
            if simulation.refuses_base64 and body.get("encoding_format") == "base64":
                status = 400
            if simulation.most_texts is not None and len(texts) > simulation.most_texts:
                status = 413
            if status != 200:
                # As real servers do, it repeats what it was sent.
                told: Any = {"error": {"message": f"bad: {body} {dict(self.headers)}"}}
            elif simulation.garbage is not None:
                told = simulation.garbage
            else:
                told = protocol(self.path, body, simulation)
            data = json.dumps(told).encode() if simulation.raw is None else simulation.raw
            with contextlib.suppress(OSError):
                self.send_response(status)
                is_page = simulation.raw is not None
                self.send_header("Content-Type", "text/html" if is_page else "application/json")
                for name, value in simulation.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

    server = Server(("127.0.0.1", port), Handler)
    simulation.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield simulation
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
