"""A fallback of providers: what it falls back to, what it refuses, and how soon it comes back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MODEL, NAMES, free_options, wait_until

from halimede import (
    Answer,
    AsyncEmbedder,
    Embedder,
    Embeddings,
    Future,
    InvalidInput,
    InvalidText,
    OutOfMemory,
    Request,
    ServerError,
    ServerUnreachable,
    SpaceRefused,
    completed,
)
from halimede.config.file import parse
from halimede.inputs.content import InputKind
from halimede.results import ServedModel
from halimede_ops import vectors
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

KILLS = 3
ROUNDS = 10
"""Of 100 texts, until each of two servers answered some."""
TEXTS = int(os.environ.get("HALIMEDE_KILL_TEXTS", "5000"))
"""Texts embedded while the server is killed; 20,000 take about two minutes on 2 cores."""


class Scripted:
    """A provider of our own: hash-like vectors of one number, and whatever goes wrong on demand."""

    def __init__(self, name: str, space: str = "a" * 16, precision: str = "fp32") -> None:
        self.name = name
        self.model = ServedModel(name, space, precision, 8, 100, 16, "own")
        self.error: Exception | None = None
        self.most_texts: int | None = None
        self.asked: list[int] = []
        self.fails_after: int | None = None
        self.refused: bytes | None = None

    def describe(self, timeout_s: float, kind: InputKind | None = None) -> Future[ServedModel]:
        if self.error is not None:
            raise self.error
        return completed(self.model)

    def embed(self, request: Request, timeout_s: float) -> Future[Answer]:
        texts = request.inputs
        self.asked.append(len(texts))
        if self.fails_after is not None and len(self.asked) > self.fails_after:
            raise ServerUnreachable("scripted")
        if self.error is not None:
            raise self.error
        if self.most_texts is not None and len(texts) > self.most_texts:
            raise MemoryError
        if self.refused in texts:
            raise InvalidText("is wrong.", subject="text", index=texts.index(self.refused))
        rows = [np.resize(np.frombuffer(text or b" ", np.uint8), 8) for text in texts]
        tokens = np.full(len(texts), 3, np.int32)
        return completed(Answer(np.array(rows, np.float32), tokens, self.model))

    def close(self) -> None:
        pass


def through(*providers: Scripted, **rules: Any) -> Embedder:
    config = parse({"models": {"m": {"provider": "hash"}}, **rules})
    return Embedder(config=config, providers=providers)


def test_the_same_space_stands_in_and_says_so() -> None:
    """When the first is down, the second answers; provider, space and precision are told."""
    first, second = Scripted("first"), Scripted("second", precision="int8")
    with through(first, second) as embedder:
        assert embedder.embed("a").model == "first"
        first.error = ServerUnreachable("down")
        result = embedder.embed(["a", "b"])
        assert (result.model, result.precision, result.space) == ("second", "int8", "a" * 16)
        assert embedder.stats()["fallbacks"] == 1


def test_another_space_is_refused_unless_allowed_by_name() -> None:
    """A fallback of another space never answers; named in allow_spaces it does, labelled."""
    first, other = Scripted("first"), Scripted("other", space="b" * 16)
    with through(first, other) as embedder:
        embedder.embed("a")
        first.error = ServerUnreachable("down")
        with pytest.raises(ServerUnreachable, match="cannot be compared"):
            embedder.embed("a")
        assert other.asked == []
    with through(first, other, allow_spaces=["b" * 16]) as embedder:
        first.error = None
        embedder.embed("a")
        first.error = ServerUnreachable("down")
        assert embedder.embed("a").space == "b" * 16


def test_a_wanted_space_is_the_only_one() -> None:
    """With `space` in the configuration not even the first provider may have another."""
    with through(Scripted("first"), space="c" * 16) as embedder:
        with pytest.raises(SpaceRefused, match="not cccc"):
            embedder.embed("a")


def test_a_fallback_of_unknown_or_low_quality_is_refused() -> None:
    """min_cosine keeps out a precision whose recorded cosine is lower, or not recorded."""
    first, second = Scripted("first"), Scripted("second", precision="int8")
    first.error = ServerUnreachable("down")
    with through(first, second, min_cosine=0.995) as embedder:
        with pytest.raises(ServerUnreachable, match="cosine of unknown; min_cosine is 0.995"):
            embedder.embed("a")
        second.model = ServedModel("second", "a" * 16, "int8", 8, 100, 16, "own", 0.996)
        assert embedder.embed("a").precision == "int8"


def test_one_result_is_of_one_precision_when_a_provider_dies_midway() -> None:
    """Of 100 requests the first answers 5 and dies: the second embeds all 1,600 texts anew."""
    first, second = Scripted("first"), Scripted("second", precision="int8")
    with through(first, second) as embedder:
        embedder.embed("a")
        first.fails_after = len(first.asked) + 5
        result = embedder.embed([f"text {index}" for index in range(1600)])
    assert (result.precision, len(result)) == ("int8", 1600)
    assert sum(second.asked) == 1600


def test_the_callers_own_mistake_is_not_passed_on() -> None:
    """An InvalidInput of the first provider is the caller's answer; nobody else is asked."""
    first, second = Scripted("first"), Scripted("second")
    with through(first, second) as embedder:
        embedder.embed("a")
        first.error = InvalidInput("wrong")
        with pytest.raises(InvalidInput, match="wrong"):
            embedder.embed("a")
    assert second.asked == []


@pytest.mark.parametrize("cache", [None, {}])
def test_an_error_has_its_texts_index(cache: dict[str, Any] | None) -> None:
    """Sorted by length, sent in many requests and halved, a text that a provider refuses keeps its
    index in the call or the stream, in the error's field and in its message.
    """
    first = Scripted("first")
    first.refused, first.most_texts = b"wrong", 3
    texts = ["x" * (index % 11 + 1) for index in range(500)]
    texts[317] = "wrong"
    with through(first, **({} if cache is None else {"cache": cache})) as embedder:
        with pytest.raises(InvalidText, match="^text 317 is wrong") as raised:
            embedder.embed(texts)
        assert raised.value.index == 317
        with pytest.raises(InvalidText, match="^text 317 is wrong") as raised:
            list(embedder.embed_iter(iter(texts), window=100))
        assert raised.value.index == 317
        assert len(embedder.embed(texts[:317])) == 317


def test_memory_that_runs_out_halves_the_batch() -> None:
    """A provider that takes 3 texts at once embeds 1,000, in order; one text too many is told."""
    first = Scripted("first")
    first.most_texts = 3
    texts = [f"{index:>8}" for index in range(1000)]
    with through(first) as embedder:
        result = embedder.embed(texts)
        assert result.vectors.astype(np.uint8).tobytes().decode() == "".join(texts)
        assert max(first.asked[-50:]) <= 4
        first.most_texts = 0
        with pytest.raises(OutOfMemory, match="1 texts"):
            embedder.embed("a")


def test_a_passing_error_is_retried_and_a_lasting_one_is_not() -> None:
    """ServerError is tried three times, a refusal once."""
    first = Scripted("first")
    with through(first) as embedder:
        embedder.embed("a")
        for error, tries in ((ServerError("busy"), 3), (InvalidInput("no"), 1)):
            first.error, first.asked = error, []
            with pytest.raises(type(error)):
                embedder.embed("a")
            assert len(first.asked) == tries


def test_requests_are_paced() -> None:
    """At 20 requests/s eleven requests take at least half a second; what could not be sent within
    its deadline is refused.
    """
    from halimede_ops.errors import ServerOverloaded

    def limited_to(requests_per_s: float) -> Embedder:
        limits = {"requests_per_s": requests_per_s, "batch_size": 1}
        return Embedder(config=parse({"models": {"m": {"provider": "hash", **limits}}}))

    with limited_to(20) as embedder:
        began = time.monotonic()
        embedder.embed([f"text {index}" for index in range(11)])
        assert time.monotonic() - began >= 0.49
    with limited_to(0.1) as embedder:  # the second is due in 10 s
        with pytest.raises(ServerOverloaded, match=r"limited to 0\.1"):
            embedder.embed(["a", "b"], deadline_s=5)


def test_a_model_that_changes_under_a_name_starts_the_call_anew() -> None:
    """Answers of two spaces are never joined, and the change is counted."""
    first = Scripted("first")
    with through(first, cache={"model_check": 0}) as embedder:
        before = embedder.embed(["a", "b"])
        assert embedder.embed(["a", "b"]).cached.all()
        first.model = ServedModel("first", "b" * 16, "fp32", 8, 100, 16, "own")
        after = embedder.embed(["a", "b"])
        assert (before.space, after.space) == ("a" * 16, "b" * 16)
        assert not after.cached.any()
        assert embedder.stats()["model_changes"] == 1


def test_a_stream_does_not_change_its_space() -> None:
    """When the model changes under a stream, the stream ends with SpaceRefused."""
    first = Scripted("first")
    with through(first) as embedder:
        parts = embedder.embed_iter((f"{index}" for index in range(10_000)), window=10)
        next(parts)
        first.model = ServedModel("first", "b" * 16, "fp32", 8, 100, 16, "own")
        with pytest.raises(SpaceRefused, match="Begin it again"):
            list(parts)


def test_a_stream_takes_no_more_than_it_needs() -> None:
    """From an endless generator only a few parts are taken ahead of what is read."""
    taken = Counter()

    def endless() -> Iterator[str]:
        while True:
            taken["texts"] += 1
            yield "text"

    with through(Scripted("first")) as embedder:
        parts = embedder.embed_iter(endless(), window=10)
        for _ in range(5):
            next(parts)
        parts.close()
    assert taken["texts"] <= 10 * (5 + 3)


@contextlib.contextmanager
def unavailable() -> Iterator[tuple[str, Counter[str]]]:
    """A server that answers 503 to everything, its url, and the requests that it counts."""
    asked: Counter[str] = Counter()

    class Unavailable(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked["requests"] += 1
            self.send_error(503)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Unavailable)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("count", [1, 2])
def test_each_server_is_probed_by_one_breaker(count: int) -> None:
    """A server that is down gets at most 4 probes in 3 s: two breakers would send 6 or more."""
    with contextlib.ExitStack() as running:
        servers = [running.enter_context(unavailable()) for _ in range(count)]
        model = {"provider": "triton", "model_id": "m", "url": [url for url, _ in servers]}
        config = {"models": {"m": {**model, "retries": 0}}}
        embedder = running.enter_context(Embedder(config=config))
        for _ in range(3):
            with pytest.raises(ServerUnreachable):
                embedder.embed("a")
        for _, asked in servers:
            asked.clear()
        time.sleep(3)
        probes = [asked["requests"] for _, asked in servers]
    assert all(1 <= probed <= 4 for probed in probes), probes


@contextlib.contextmanager
def restartable(settings: Settings, run: Path) -> Iterator[Any]:
    """A Triton that is killed and started again on the same ports."""
    options = free_options(models=(MODEL,))
    opened = contextlib.ExitStack()

    def start() -> wheel.Server:
        return opened.enter_context(
            wheel.serve(settings.repository, settings.python_backend, run, options)
        )

    def restart() -> None:
        servers[-1].process.send_signal(signal.SIGKILL)
        servers[-1].stop()  # its children, which outlive it
        servers.append(start())

    servers = [start()]
    try:
        yield options, restart
    finally:
        opened.close()


def by_threads(count: int, config: dict[str, Any], work: Any) -> Any:
    """Threads that each make one call after the other, and a function that stops them."""
    embedder = Embedder(config=config)
    embedder.embed("warm")
    callers = ThreadPoolExecutor(count)
    stop = threading.Event()

    def call(seed: int) -> None:
        pick = random.Random(seed)
        while not stop.is_set():
            rows = work.pick(pick)
            work.answered(embedder.embed(work.texts_of(rows)), rows)

    calling = [callers.submit(call, seed) for seed in range(count)]

    def end() -> dict[str, Any]:
        stop.set()
        for one in calling:
            one.result()  # raises what a caller met: nothing may be lost
        stats = embedder.stats()
        embedder.close()
        return stats

    return end, lambda: all(one.running() for one in calling)


def by_tasks(count: int, config: dict[str, Any], work: Any) -> Any:
    """As `by_threads`, by tasks on one event loop."""
    stop = threading.Event()
    failed = threading.Event()

    async def call(embedder: AsyncEmbedder, seed: int) -> None:
        pick = random.Random(seed)
        while not stop.is_set():
            rows = work.pick(pick)
            work.answered(await embedder.embed(work.texts_of(rows)), rows)

    async def run() -> dict[str, Any]:
        try:
            async with AsyncEmbedder(config=config) as embedder:
                await embedder.embed("warm")
                await asyncio.gather(*[call(embedder, seed) for seed in range(count)])
                return await embedder.stats()
        except BaseException:
            failed.set()
            raise

    runner = ThreadPoolExecutor(1)
    running = runner.submit(asyncio.run, run())

    def end() -> dict[str, Any]:
        stop.set()
        return running.result()

    return end, lambda: not failed.is_set()


class Work:
    """Calls of ten texts each, and what became of them."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.short = [row for row, text in enumerate(texts) if len(text) < 100]
        self.outcomes: list[tuple[float, Embeddings, list[int]]] = []

    def pick(self, chance: random.Random) -> list[int]:
        return chance.sample(self.short, 10)

    def texts_of(self, rows: list[int]) -> list[str]:
        return [self.texts[row] for row in rows]

    def answered(self, result: Embeddings, rows: list[int]) -> None:
        self.outcomes.append((time.monotonic(), result, rows))

    def backs_s(self, restarted_s: float) -> list[float]:
        """Seconds after a moment of each answer of Triton since."""
        return [
            at - restarted_s
            for at, result, _ in list(self.outcomes)
            if at > restarted_s and result.provider == "triton"
        ]


@pytest.mark.parametrize(
    ("start", "callers", "share"),
    [(by_threads, 32, 1.0), (by_tasks, 32, 1.0), (by_threads, 1, 0.3)],
    ids=["32 threads", "32 tasks", "1 thread"],
)
def test_triton_killed_three_times_under_load(
    settings: Settings,
    tmp_path: Path,
    texts: list[str],
    expected: np.ndarray,
    start: Any,
    callers: int,
    share: float,
) -> None:
    """No caller loses anything or gets anything wrong or mixed, and each is back on Triton soon."""
    work, backs_s = Work(texts), []
    with restartable(settings, tmp_path) as (options, restart):
        server = f"{options.host}:{options.grpc_port}"
        local = {"model_id": NAMES["int8"], "path": str(settings.repository)}
        config = {
            "models": {
                "server": {"provider": "triton", "model_id": MODEL, "url": server},
                "local": {"provider": "onnx", **local},
            },
            "fallback": ["local"],
        }
        end, is_running = start(callers, config, work)
        try:
            for _ in range(KILLS):
                time.sleep(2)
                restart()
                restarted_s = time.monotonic()
                wait_until(lambda: work.backs_s(restarted_s))
                backs_s.append(min(work.backs_s(restarted_s)))
            while 10 * len(work.outcomes) < share * TEXTS and is_running():
                time.sleep(0.1)
        finally:
            stats = end()
    assert 10 * len(work.outcomes) >= share * TEXTS
    assert stats["errors"] == {}
    bars = {"fp32": 0.9999, "int8": 0.85}
    for _, result, rows in work.outcomes:
        assert (result.provider, result.precision) in {("triton", "fp32"), ("onnx", "int8")}
        cosines = vectors.cosine(result.vectors, expected[rows])
        assert cosines.min() >= bars[result.precision]
    assert len({result.space for _, result, _ in work.outcomes}) == 1
    used = Counter(result.provider for _, result, _ in work.outcomes)
    assert used["onnx"] > 0
    print(f"back on Triton {[round(one, 2) for one in backs_s]} s after its return; {dict(used)}")
    assert max(backs_s) <= 5


def test_several_servers_share_the_load(
    server: wheel.Server, settings: Settings, tmp_path: Path
) -> None:
    """Two addresses both answer; when one is killed, the other answers without a fallback."""
    options = free_options(models=(MODEL,))
    with wheel.serve(settings.repository, settings.python_backend, tmp_path, options) as second:
        urls = [server.grpc_address, second.grpc_address]
        with Embedder(urls, MODEL) as embedder:
            before = [inferences(address) for address in urls]
            for _ in range(ROUNDS):  # a busy machine may hold one of them up for a while
                with ThreadPoolExecutor(8) as callers:
                    list(callers.map(lambda index: embedder.embed(f"text {index}"), range(100)))
                counts = [inferences(url) - known for url, known in zip(urls, before, strict=True)]
                if min(counts) >= 20:
                    break
            assert min(counts) >= 20, counts
            second.process.kill()
            for index in range(30):
                assert embedder.embed(f"text {index}").provider == "triton"
            assert embedder.stats()["errors"] == {}


def inferences(address: str) -> int:
    import tritonclient.grpc as grpcclient

    with grpcclient.InferenceServerClient(address) as client:
        told = client.get_inference_statistics(MODEL)
        return int(told.model_stats[0].inference_count)
