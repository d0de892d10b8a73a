"""One engine in a process of its own: what it imports is the engine's, and counts as its memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tools import corpus

COUNTS = (1, 100, 1000)
REFERENCE = "sentence-transformers"


def _serve(embed: Callable[[list[str]], object]) -> None:
    """Answer each line of stdin, a count of texts, with the seconds they took."""
    texts = corpus.mixed_texts(max(COUNTS))
    for line in sys.stdin:
        began = time.perf_counter()
        embed(texts[: int(line)])
        print(time.perf_counter() - began, flush=True)


def _main(kind: str, folder: str, model: str = "") -> None:
    if kind == REFERENCE:
        from sentence_transformers import SentenceTransformer

        loaded = SentenceTransformer(folder, device="cpu", local_files_only=True)
        _serve(lambda texts: loaded.encode(texts, show_progress_bar=False))
        return
    from halimede import Embedder

    entry = {"provider": "onnx", "model_id": model, "path": folder}
    with Embedder(config={"models": {"local": entry}}) as embedder:
        _serve(embedder.embed)


if __name__ == "__main__":
    _main(*sys.argv[1:])
