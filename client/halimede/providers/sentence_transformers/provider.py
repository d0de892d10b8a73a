"""sentence-transformers in a subprocess that speaks JSON lines.

The subprocess keeps PyTorch's memory and threads out of this process. If it dies, it is started
again.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import PositiveFloat

from halimede.extras import check_installed
from halimede.inputs.content import InputKind, serialise
from halimede.providers.answers import fingerprint, truncate, unknown_tokens
from halimede.providers.base import Answer, Request
from halimede.providers.base import Options as BaseOptions
from halimede.providers.http_errors import timed_out
from halimede.providers.input_kinds import check_texts, texts_of
from halimede.results import IMAGE, ServedModel
from halimede_ops import errors

WORKER = "halimede.providers.sentence_transformers.worker"
MAX_BATCH_SIZE = 128
MAX_LINE_BYTES = 2**30
CLOSE_TIMEOUT_S = 5.0


class Options(BaseOptions):
    """A model run by sentence-transformers."""

    provider: str = "sentence_transformers"
    path: Path | None = None
    """Folder of the model. None: `model_id` is its name on the Hugging Face Hub."""
    device: str = "cpu"
    """PyTorch device that runs the model, such as `cpu` or `cuda`."""
    start_timeout_s: PositiveFloat = 120.0
    """Maximum time for the subprocess to load the model."""


def connect(options: Options) -> SentenceTransformers:
    """Return the provider for these options. Its subprocess starts on first use."""
    check_installed("sentence_transformers", "sentence-transformers")
    return SentenceTransformers(options)


class SentenceTransformers:
    """A model in a subprocess, which is started again after it died."""

    def __init__(self, options: Options) -> None:
        self.name = f"sentence_transformers:{options.model_id}"
        self._options = options
        self._starting = asyncio.Lock()
        self._worker: _Worker | None = None

    async def close(self) -> None:
        """End the subprocess. A second call does nothing."""
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.close()

    async def describe(self, timeout_s: float, kind: InputKind | None = None) -> ServedModel:
        """Return the loaded model.

        Raises:
            UnsupportedInput: it does not embed this kind.
        """
        model = (await self._running()).model
        if kind == "image" and model.image_model:
            return dataclasses.replace(model, input="image", max_tokens=0)
        check_texts(kind, self.name)
        return model

    async def health(self, timeout_s: float) -> None:
        """Raise unless a probe text can be embedded."""
        await self.embed(Request([b"health"]), timeout_s)

    async def embed(self, request: Request, timeout_s: float) -> Answer:
        """Return the answer of the subprocess.

        Raises:
            UnsupportedInput: the model does not embed this kind.
        """
        worker = await self._running()
        message: dict[str, Any]
        if request.kind == "image" and worker.model.image_model:
            images = [serialise(image) for image in request.inputs]
            message = {"images": [base64.b64encode(image).decode() for image in images]}
        else:
            texts = texts_of(request, self.name)
            message = {"texts": [text.decode() for text in texts], "input_type": request.input_type}
        try:
            answer = await asyncio.wait_for(worker.request(message), timeout_s)
        except TimeoutError:
            if worker.is_stuck(timeout_s):
                await self.close()
            raise timed_out(self.name, timeout_s) from None
        count = len(request.inputs)
        vectors = np.frombuffer(base64.b64decode(answer["vectors"]), "<f4").reshape(count, -1)
        has_tokens = "tokens" in answer
        return Answer(
            truncate(np.array(vectors), request.dimensions),
            np.array(answer["tokens"], np.int32) if has_tokens else unknown_tokens(count),
            worker.model,
            _images(answer["images"]) if "images" in answer else None,
        )

    async def _running(self) -> _Worker:
        async with self._starting:
            if self._worker is None or not self._worker.is_running:
                await self.close()
                self._worker = await self._started()
            return self._worker

    async def _started(self) -> _Worker:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            WORKER,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # Libraries may print a text there.
            stderr=asyncio.subprocess.DEVNULL,
            limit=MAX_LINE_BYTES,
        )
        worker = _Worker(self.name, process)
        opening = {"model": str(self._options.path or self._options.model_id)}
        try:
            facts = await asyncio.wait_for(
                worker.request({**opening, "device": self._options.device}),
                self._options.start_timeout_s,
            )
        except TimeoutError:
            await worker.close()
            raise timed_out(self.name, self._options.start_timeout_s) from None
        except BaseException:
            await worker.close()
            raise
        worker.model = self._served(facts)
        return worker

    def _served(self, facts: dict[str, Any]) -> ServedModel:
        return ServedModel(
            name=self._options.model_id,
            # A fingerprint of the weights in memory. A built model's covers its files instead.
            space=fingerprint("sentence_transformers", facts["weights"]),
            precision=facts["precision"],
            dims=facts["dims"],
            max_tokens=facts["max_tokens"],
            max_batch_size=MAX_BATCH_SIZE,
            provider="sentence_transformers",
            image_model=self._options.model_id if facts["images"] else "",
        )


def _images(facts: list[tuple[int, int, str]]) -> np.ndarray:
    return np.array([(width, height, name.encode()) for width, height, name in facts], IMAGE)


class _Worker:
    """A subprocess and the requests that it has not answered."""

    model: ServedModel

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self._name = name
        self._process = process
        self._ids = itertools.count()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._answered_at = time.monotonic()
        self._listening = asyncio.ensure_future(self._listen())

    @property
    def is_running(self) -> bool:
        """Whether it accepts requests."""
        return self._process.returncode is None and not self._listening.done()

    def is_stuck(self, timeout_s: float) -> bool:
        """Whether it has answered no request for this long."""
        return time.monotonic() - self._answered_at > timeout_s

    async def request(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a message.

        Raises:
            ServerUnreachable: it died.
        """
        stdin = self._process.stdin
        if stdin is None or not self.is_running:
            raise self._died()
        number = next(self._ids)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            stdin.write(json.dumps({"id": number, **message}).encode() + b"\n")
            await stdin.drain()
            return await answer
        except OSError:
            raise self._died() from None
        finally:
            self._waiting.pop(number, None)

    async def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), CLOSE_TIMEOUT_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await asyncio.wait({self._listening})

    async def _listen(self) -> None:
        """Give each answer to the request that waits for it, until the process ends."""
        out = self._process.stdout
        while out is not None and (line := await out.readline()):
            self._answered_at = time.monotonic()
            answer = json.loads(line)
            waiting = self._waiting.get(answer["id"])
            if waiting is None or waiting.done():
                continue
            if "error" in answer:
                error_class = getattr(errors, answer["error"])
                waiting.set_exception(error_class(answer["message"], **answer.get("place", {})))
            else:
                waiting.set_result(answer)
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(self._died())

    def _died(self) -> errors.ServerUnreachable:
        return errors.ServerUnreachable(
            f"the process of {self._name} ended. The next request starts it again."
        )
