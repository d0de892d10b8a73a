"""One engine in a process of its own, in its own environment. Of ours it imports what embeds and
the load generator alone, so its memory is the engine's.

It reads one JSON command a line from stdin and answers each with one line.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from halimede_tools.bench import closed_loop

Embed = Callable[[Sequence[str]], Any]
Figures = dict[str, float | list[float]]


def sentence_transformers(
    folder: str, backend: str, file: str = "", device: str = "cpu", precision: str = "fp32"
) -> Embed:
    """sentence-transformers with one of its backends; `file` is a quantised model of `folder`,
    `precision` fp32 or, of torch, fp16.
    """
    from sentence_transformers import SentenceTransformer

    options: dict[str, Any] = {"file_name": file} if file else {}
    if file.endswith("openvino_model.xml"):
        # Else OpenVINO takes bfloat16 where the CPU has it, and that is not FP32.
        options["ov_config"] = {"INFERENCE_PRECISION_HINT": "f32"}
    model = SentenceTransformer(
        folder, device=device, backend=backend, local_files_only=True, model_kwargs=options
    )
    if precision == "fp16":
        model.half()
    # With OpenVINO it fails when two threads call it: each waits for its turn, as its users must.
    turn = threading.Lock() if backend == "openvino" else contextlib.nullcontext()

    def embed(texts: Sequence[str]) -> Any:
        with turn:
            return model.encode(list(texts), show_progress_bar=False)

    return embed


def fastembed(folder: str, model_file: str) -> Embed:
    """The vectors of fastembed, with an ONNX file that pools, on all cores."""
    from fastembed import TextEmbedding  # type: ignore[import-not-found]
    from fastembed.common.model_description import (  # type: ignore[import-not-found]
        ModelSource,
        PoolingType,
    )

    TextEmbedding.add_custom_model(
        model="bench",
        pooling=PoolingType.DISABLED,
        normalization=True,
        sources=ModelSource(hf="bench/bench"),
        dim=json.loads((Path(folder) / "config.json").read_text())["hidden_size"],
        model_file=model_file,
    )
    model = TextEmbedding("bench", specific_model_path=folder)
    return lambda texts: list(model.embed(list(texts)))


def infinity(folder: str, engine: str) -> Embed:
    """The vectors of infinity's engine in process: it joins the texts of all callers to batches."""
    import asyncio

    from infinity_emb import (  # type: ignore[import-not-found]
        AsyncEmbeddingEngine,
        EngineArgs,
    )
    from infinity_emb.primitives import Dtype  # type: ignore[import-not-found]

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    arguments = EngineArgs(
        model_name_or_path=folder,
        engine=engine,
        device="cpu",
        dtype=Dtype.float32,
        bettertransformer=False,
        model_warmup=False,
    )
    opened = AsyncEmbeddingEngine.from_args(arguments)
    asyncio.run_coroutine_threadsafe(opened.astart(), loop).result()

    def embed(texts: Sequence[str]) -> Any:
        embedding = opened.embed(sentences=list(texts))
        return asyncio.run_coroutine_threadsafe(embedding, loop).result()[0]

    return embed


def halimede(repository: str, model: str, device: str = "auto") -> Embed:
    """The client with the model in this process."""
    from halimede import Embedder

    entry = {"provider": "onnx", "model_id": model, "path": repository, "device": device}
    embedder = Embedder(config={"models": {"local": entry}})
    return lambda texts: embedder.embed(texts).vectors


def triton(address: str, model: str) -> Embed:
    """The client with the model on a server."""
    from halimede import Embedder

    embedder = Embedder(address, model, timeout_s=120)
    return lambda texts: embedder.embed(texts).vectors


ENGINES: dict[str, Callable[..., Embed]] = {
    "sentence-transformers": sentence_transformers,
    "fastembed": fastembed,
    "infinity": infinity,
    "halimede": halimede,
    "triton": triton,
}


def together(embed: Embed, texts: Sequence[str], _: int) -> Figures:
    """Seconds for all texts in one call."""
    done = closed_loop.threads(embed, [texts], 1)
    done.raise_errors()
    return {"seconds": done.seconds}


def each(embed: Embed, texts: Sequence[str], concurrency: int) -> Figures:
    """Seconds for one call a text, `concurrency` at a time, and those of each call."""
    done = closed_loop.threads(lambda text: embed([text]), texts, concurrency)
    done.raise_errors()
    return {"seconds": done.seconds, "latencies": done.latencies_s}


def load(embed: Embed, texts: Sequence[str], concurrency: int, address: str, model: str) -> Figures:
    """As `each`, to a server over bare gRPC."""
    from halimede_tools.bench import triton_request

    done = triton_request.send_singly(address, model, texts, concurrency)
    return {"seconds": done.seconds, "latencies": done.latencies_s}


def save(embed: Embed, texts: Sequence[str], alone: int, file: str) -> Figures:
    """Write two arrays of vectors `[texts, dims]` to a file: `together`, and of the first ones
    embedded `alone`.
    """
    one_by_one = [np.asarray(embed([text]), np.float32)[0] for text in texts[:alone]]
    np.savez(file, together=np.asarray(embed(texts), np.float32), alone=np.stack(one_by_one))
    return {}


WAYS: dict[str, Callable[..., Figures]] = {
    "together": together,
    "each": each,
    "load": load,
    "save": save,
}


def serve(embed: Embed, out: TextIO) -> None:
    """Answer each command of stdin, with the CPU seconds that this process took for it."""
    for line in sys.stdin:
        command = json.loads(line)
        texts = json.loads(Path(command["texts"]).read_text())[: command["count"]]
        before = _cpu_s()
        figures = WAYS[command["way"]](embed, texts, *command["arguments"])
        answer = figures | {"cpu_s": _cpu_s() - before}
        print(json.dumps(answer), file=out, flush=True)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # engines print
    serve(ENGINES[sys.argv[1]](*sys.argv[2:]), answers)
    os._exit(0)  # some engines leave threads behind that never end
