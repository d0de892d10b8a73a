"""sentence-transformers in a subprocess that speaks JSON lines.

The subprocess keeps PyTorch's memory and threads out of this process. If it dies, it is started
again.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Future as ConcurrentFuture
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import PositiveFloat

from halimede.extras import check_installed
from halimede.inputs.content import InputKind, serialise
from halimede.pipeline.pool import Pool
from halimede.pipeline.waiting import Future
from halimede.providers.answers import fingerprint, truncate, unknown_tokens
from halimede.providers.base import Answer, Request
from halimede.providers.base import Options as BaseOptions
from halimede.providers.http_errors import timed_out
from halimede.providers.input_kinds import check_texts, texts_of
from halimede.results import IMAGE, ServedModel
from halimede_engine import cores
from halimede_ops import errors

WORKER = "halimede.providers.sentence_transformers.worker"
MAX_BATCH_SIZE = 128
REQUESTS_IN_FLIGHT = 32
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


def connect(options: Options) -> list[SentenceTransformers]:
    """Return the provider for these options. Its subprocess starts on first use."""
    check_installed("sentence_transformers", "sentence-transformers")
    return [SentenceTransformers(options)]


class SentenceTransformers:
    """A model in a subprocess, which is started again after it died."""

    def __init__(self, options: Options) -> None:
        self.name = f"sentence_transformers:{options.model_id}"
        self._options = options
        self._pool = Pool(REQUESTS_IN_FLIGHT, "worker")
        self._starting = threading.Lock()
        self._worker: _Worker | None = None
        self._is_closed = False

    def close(self) -> None:
        """End the subprocess. A second call does nothing."""
        self._is_closed = True
        self._pool.close()
        self._end_worker()

    def describe(self, timeout_s: float, kind: InputKind | None = None) -> Future[ServedModel]:
        """Start to read the loaded model.

        Raises:
            UnsupportedInput: it does not embed this kind.
        """
        return self._pool.submit(self._describe, kind)

    def embed(self, request: Request, timeout_s: float) -> Future[Answer]:
        """Start to embed a request in the subprocess.

        Raises:
            UnsupportedInput: the model does not embed this kind.
        """
        return self._pool.submit(self._embed, request, timeout_s)

    def _describe(self, kind: InputKind | None) -> ServedModel:
        model = self._running().model
        if kind == "image" and model.image_model:
            return dataclasses.replace(model, input="image", max_tokens=0)
        check_texts(kind, self.name)
        return model

    def _embed(self, request: Request, timeout_s: float) -> Answer:
        worker = self._running()
        message: dict[str, Any]
        if request.kind == "image" and worker.model.image_model:
            images = [serialise(image) for image in request.inputs]
            message = {"images": [base64.b64encode(image).decode() for image in images]}
        else:
            texts = texts_of(request, self.name)
            message = {"texts": [text.decode() for text in texts], "input_type": request.input_type}
        try:
            answer = worker.request(message).result(timeout_s)
        except TimeoutError:
            if worker.is_stuck(timeout_s):
                self._end_worker()
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

    def _running(self) -> _Worker:
        with self._starting:
            worker = self._worker
            if worker is None or not worker.is_running:
                self._end_worker()
                worker = self._started()
            return worker

    def _end_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def _started(self) -> _Worker:
        if self._is_closed:
            raise errors.ServerUnreachable(f"{self.name} is closed.")
        worker = self._worker = _Worker(self.name)  # where `close` finds it
        opening = {"model": str(self._options.path or self._options.model_id)}
        try:
            facts = worker.request({**opening, "device": self._options.device}).result(
                self._options.start_timeout_s
            )
        except TimeoutError:
            worker.close()
            raise timed_out(self.name, self._options.start_timeout_s) from None
        except BaseException:
            worker.close()
            raise
        worker.model = self._served(facts)
        if self._is_closed:
            worker.close()
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
    """A subprocess and the requests that it has not answered. It ends with this process."""

    model: ServedModel

    def __init__(self, name: str) -> None:
        self._name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libraries may print a text there
            env={**cores.library_threads(cores.read()), **os.environ},
        )
        self._ids = itertools.count()
        self._sending = threading.Lock()
        self._waiting: dict[int, ConcurrentFuture[dict[str, Any]]] = {}
        self._answered_s = time.monotonic()
        self._has_ended = False
        _workers.add(self)
        self._listening = threading.Thread(target=self._listen, name="halimede-worker", daemon=True)
        self._listening.start()

    @property
    def is_running(self) -> bool:
        """Whether it accepts requests."""
        return self._process.poll() is None and not self._has_ended

    def is_stuck(self, timeout_s: float) -> bool:
        """Whether it has answered no request for this long."""
        return time.monotonic() - self._answered_s > timeout_s

    def request(self, message: dict[str, Any]) -> ConcurrentFuture[dict[str, Any]]:
        """Return the future of the answer to a message.

        Raises:
            ServerUnreachable: it died.
        """
        answer: ConcurrentFuture[dict[str, Any]] = ConcurrentFuture()
        assert self._process.stdin is not None
        with self._sending:
            number = next(self._ids)
            self._waiting[number] = answer
            try:
                self._process.stdin.write(json.dumps({"id": number, **message}).encode() + b"\n")
                self._process.stdin.flush()
            except (OSError, ValueError):  # it died, or was closed
                self._waiting.pop(number, None)
                raise self._died() from None
        if self._has_ended and self._waiting.pop(number, None) is not None:
            raise self._died()
        return answer

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listening.join(CLOSE_TIMEOUT_S)

    def _listen(self) -> None:
        """Give each answer to the request that waits for it, until the process ends."""
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._answered_s = time.monotonic()
                self._deliver(json.loads(line))
        except (ValueError, OSError):  # it died within a line, or the pipe was closed
            self._process.kill()
        finally:
            self._has_ended = True
            while self._waiting:
                with contextlib.suppress(KeyError):
                    self._waiting.popitem()[1].set_exception(self._died())

    def _deliver(self, answer: dict[str, Any]) -> None:
        waiting = self._waiting.pop(answer["id"], None)
        if waiting is None:
            return
        if "error" in answer:
            error_class = getattr(errors, answer["error"])
            waiting.set_exception(error_class(answer["message"], **answer.get("place", {})))
        else:
            waiting.set_result(answer)

    def _died(self) -> errors.ServerUnreachable:
        return errors.ServerUnreachable(
            f"the process of {self._name} ended. The next request starts it again."
        )


_workers: weakref.WeakSet[_Worker] = weakref.WeakSet()


def _close_copies() -> None:
    """Close the pipes that a forked child has of its parent's workers, which end with them."""
    for worker in list(_workers):
        for pipe in (worker._process.stdin, worker._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    os.close(pipe.fileno())


os.register_at_fork(after_in_child=_close_copies)
