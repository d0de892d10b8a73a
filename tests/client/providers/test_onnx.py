"""The in-process provider: which thread does the work, and what ends it."""

from __future__ import annotations

import gc
import io
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import small_models
from conftest import MODEL, POISON, version_folder, wait_until
from PIL import Image

from halimede import Embedder
from halimede.inputs.content import Pair
from halimede.providers.base import Request
from halimede.providers.onnx import Onnx, Options, connect
from halimede.results import ServedModel
from halimede_engine.session import Session
from halimede_ops import vectors
from halimede_ops.errors import (
    InvalidImage,
    InvalidText,
    ModelChanged,
    ModelNotFound,
    NonFiniteVector,
)
from halimede_tools.build.fusion import write_untrained
from halimede_tools.build.plan import build, build_request
from halimede_tools.settings import Settings

TIMEOUT_S = 60.0


@pytest.fixture
def provider(settings: Settings) -> Iterator[Onnx]:
    [opened] = connect(Options(model_id=MODEL, path=settings.repository))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Onnx]:
    """A small model of texts, images and pairs."""
    folder = tmp_path_factory.mktemp("clip")
    home = Settings(home=folder / "home", repository=folder / "repository")
    source = small_models.like_sentence_clip(folder / "clip")
    build(build_request(str(source), "clip", precisions=("fp32",)), home)
    write_untrained("multimodal", "clip", "clip-image", 0.5, home.repository)
    opened = Onnx(Options(model_id="clip", path=home.repository))
    yield opened
    opened.close()


@pytest.fixture
def fused(clip: Onnx) -> Iterator[Onnx]:
    opened = Onnx(clip._options.model_copy(update={"model_id": "multimodal"}))
    yield opened
    opened.close()


class SlowRun:
    """Holds each run of a session until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.let_go = threading.Event(), threading.Event()
        self.rows: list[int] = []
        self.threads: set[threading.Thread] = set()
        run_together = Session.run_together

        def run(session: Session, rows: Any) -> np.ndarray:
            self.rows.append(len(rows))
            self.threads.add(threading.current_thread())
            self.entered.set()
            assert self.let_go.wait(TIMEOUT_S)
            return run_together(session, rows)

        monkeypatch.setattr(Session, "run_together", run)


def describe(provider: Onnx) -> ServedModel:
    return provider.describe(TIMEOUT_S).result(TIMEOUT_S)


def wait_for(future: Any) -> Any:
    wait_until(future.done, TIMEOUT_S)
    return future.result()


def own_threads(before: set[threading.Thread]) -> set[threading.Thread]:
    """Threads since then that run or answer: those of pools end when they are idle."""
    started = set(threading.enumerate()) - before
    return {thread for thread in started if not thread.name.startswith("halimede")}


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, 10, 90)).save(file, "PNG")
    return file.getvalue()


def test_a_lone_text_is_run_by_its_caller(provider: Onnx, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that may block does the work itself, and no thread runs models."""
    describe(provider)
    runs = SlowRun(monkeypatch)
    runs.let_go.set()
    before = set(threading.enumerate())
    future = provider.embed(Request([b"a cat"], may_block=True), TIMEOUT_S)
    assert future.done()
    assert future.result().vectors.shape == (1, 384)
    assert runs.threads == {threading.current_thread()}
    assert not own_threads(before)


def test_a_caller_that_may_not_block_gets_the_same_vectors(provider: Onnx) -> None:
    """An event loop's thread returns at once. Model, tokens and vectors are those of a caller that
    waits.
    """
    texts = [b"a cat", "一只猫".encode(), b"word " * 300]
    lone = provider.embed(Request(texts), TIMEOUT_S)  # also opens the model
    assert not lone.done()
    first = wait_for(lone)
    second = wait_for(provider.embed(Request(texts), TIMEOUT_S))
    blocking = wait_for(provider.embed(Request(texts, may_block=True), TIMEOUT_S))
    for answer in (second, blocking):
        assert vectors.cosine(answer.vectors, first.vectors).min() >= 0.99999
        assert answer.tokens.tolist() == first.tokens.tolist()
        assert answer.model == first.model == describe(provider)


def test_a_cancelled_request_is_not_run(provider: Onnx, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the engine is busy a request is queued; cancelled, its rows are dropped."""
    describe(provider)
    runs = SlowRun(monkeypatch)
    busy = []
    for _ in range(provider._streams):  # one after the other, or one run takes all
        busy.append(provider.embed(Request([b"a" * 999]), TIMEOUT_S))
        wait_until(lambda: len(runs.rows) == len(busy))
    queued = provider.embed(Request([b"queued"] * 7, may_block=True), TIMEOUT_S)
    assert not queued.done()
    queued.cancel()
    assert queued.done()
    kept = provider.embed(Request([b"kept"] * 3, may_block=True), TIMEOUT_S)
    runs.let_go.set()
    assert len(wait_for(kept).vectors) == 3
    for future in busy:
        wait_for(future)
    assert sum(runs.rows) == len(busy) + 3


def test_an_opening_goes_on_when_its_caller_gave_up(
    provider: Onnx, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that give up while the model is opened do not open it again: a cold start ends."""
    openings: list[str] = []
    read = Onnx._read

    def slow_read(self: Onnx, *arguments: Any) -> Any:
        openings.append(threading.current_thread().name)
        time.sleep(0.5)
        return read(self, *arguments)

    monkeypatch.setattr(Onnx, "_read", slow_read)
    for _ in range(5):
        future = provider.describe(0.05)
        time.sleep(0.05)
        future.cancel()
        provider.embed(Request([b"a"]), 0.05).cancel()
    assert describe(provider).name == MODEL
    assert wait_for(provider.embed(Request([b"a"]), TIMEOUT_S)).vectors.shape == (1, 384)
    assert len(openings) == 1


def test_changed_files_are_opened_by_describe_alone(settings: Settings, tmp_path: Path) -> None:
    """`embed` answers from the model in memory; after `describe` a request for the old model is an
    error.
    """
    for name in (MODEL, f"{MODEL}-tokenizer", f"{MODEL}-onnx"):
        shutil.copytree(settings.repository / name, tmp_path / name)
    [provider] = connect(Options(model_id=MODEL, path=tmp_path))
    before = describe(provider)
    for file in ("spec.json", "quality.json"):
        path = version_folder(tmp_path / MODEL) / file
        text = path.read_text().replace(before.space, "e" * 16)
        path.unlink()  # a hard link of the built one
        path.write_text(text)
    request = Request([b"a"], model=before)
    assert wait_for(provider.embed(request, TIMEOUT_S)).model.space == before.space
    after = describe(provider)
    assert after.space == "e" * 16
    with pytest.raises(ModelChanged):
        wait_for(provider.embed(request, TIMEOUT_S))
    answer = wait_for(provider.embed(request._replace(model=after), TIMEOUT_S))
    assert answer.model is after
    provider.close()


def test_a_vector_that_is_not_finite_is_an_error(poisoned: Path) -> None:
    """A text for which the model gives NaN is named, whoever runs it. It is not cached, and the
    texts beside it in a packed row have the vectors that they have alone.
    """
    model = {"provider": "onnx", "model_id": MODEL, "path": str(poisoned)}
    bad = f"a {POISON}"
    with Embedder(config={"models": {"m": model}, "cache": {}}) as embedder:
        for row in (0, 3, 40):
            texts = [f"text {index}" for index in range(row)] + [bad, "a dog"]
            for _ in range(2):
                with pytest.raises(NonFiniteVector, match=f"^input {row} has no vector") as raised:
                    embedder.embed(texts)
                assert raised.value.index == row
        assert not embedder.stats()["cache"]["tiers"]["memory"]["size_bytes"]
    [provider] = connect(Options(model_id=MODEL, path=poisoned))
    describe(provider)
    session = provider._open_models["text"].engine._scheduler._run_alone
    rows = provider._open_models["text"].engine._scheduler._make_rows(["a cat", bad, "a dog"])
    together = session(rows)
    assert np.isfinite(together).all(axis=1).tolist() == [True, False, True]
    alone = np.concatenate([session([rows[0]]), session([rows[2]])])
    assert vectors.cosine(together[[0, 2]], alone).min() >= 0.99999
    provider.close()


@pytest.mark.parametrize("name", ["clip-image", "multimodal"])
def test_an_image_or_a_pair_without_a_finite_vector_is_an_error(
    clip: Onnx, tmp_path: Path, name: str
) -> None:
    """Each image is named; with `errors="collect"` the call has the others' vectors."""
    repository = tmp_path / "repository"
    shutil.copytree(clip._options.path, repository)
    [path] = repository.glob("clip-image-onnx/*/model.onnx")
    graph = onnx.load(path)
    [weights] = [one for one in graph.graph.initializer if one.name.endswith("class_embedding")]
    values = np.full(tuple(weights.dims), np.nan, np.float32)
    weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
    onnx.save(graph, path)
    with Embedder(
        config={"models": {"m": {"provider": "onnx", "model_id": name, "path": str(repository)}}}
    ) as embedder:
        if name == "multimodal":
            inputs: dict[str, Any] = {"texts": ["a text"] * 2, "images": [None, png(1)]}
            embed: Any = embedder.embed_multimodal
        else:
            inputs, embed = {"images": [png(1), b"no image"]}, embedder.embed_images
        with pytest.raises(NonFiniteVector, match="NaN or infinity") as raised:
            embed(**inputs)
        assert raised.value.index == (1 if name == "multimodal" else 0)
        result = embed(**inputs, errors="collect")
        kinds = [type(error) for _, error in sorted(result.errors.items())]
        assert kinds == [NonFiniteVector] + ([InvalidImage] if name == "clip-image" else [])


def test_errors_name_the_input(provider: Onnx, fused: Onnx, clip: Onnx) -> None:
    """An error about input i of a request has index i, for texts, images and pairs."""
    for may_block in (True, False):
        with pytest.raises(InvalidText) as text:
            wait_for(provider.embed(Request([b"a", b"\xff"], may_block=may_block), TIMEOUT_S))
        images = Request([png(1), png(2), b"bad"], "image", may_block=may_block)
        with pytest.raises(InvalidImage) as image:
            wait_for(clip.embed(images, TIMEOUT_S))
        pairs = [Pair(b"a", None), Pair(b"b", png(1)), Pair(None, png(1)), Pair(b"c", b"bad")]
        with pytest.raises(InvalidImage) as pair:
            wait_for(fused.embed(Request(pairs, "pair", may_block=may_block), TIMEOUT_S))
        pairs = [Pair(None, png(1)), Pair(b"a", None), Pair(b"\xff", png(1))]
        with pytest.raises(InvalidText) as pair_text:
            wait_for(fused.embed(Request(pairs, "pair", may_block=may_block), TIMEOUT_S))
        indices = [error.value.index for error in (text, image, pair, pair_text)]
        assert indices == [1, 2, 3, 2]


def test_images_and_pairs_are_the_same_however_they_are_asked(clip: Onnx, fused: Onnx) -> None:
    """Several at once, one by one, and by a caller that may block: cosine of at least 0.9999."""
    images = [png(shade) for shade in range(0, 250, 60)]
    pairs = [Pair(b"a", images[0]), Pair(b"b", None), Pair(None, images[1]), Pair(b"c", images[2])]
    for provider, kind, inputs in ((clip, "image", images), (fused, "pair", pairs)):
        together = wait_for(provider.embed(Request(inputs, kind), TIMEOUT_S))
        for may_block in (True, False):
            requests = [Request([given], kind, may_block=may_block) for given in inputs]
            answers = [wait_for(provider.embed(one, TIMEOUT_S)) for one in requests]
            found = np.concatenate([answer.vectors for answer in answers])
            assert vectors.cosine(found, together.vectors).min() >= 0.9999
            if kind == "image":
                assert answers[0].images.tolist() == [(40, 30, b"PNG")]
                assert together.images.tolist() == [(40, 30, b"PNG")] * len(images)


def test_a_lone_image_is_decoded_and_run_by_its_caller(clip: Onnx) -> None:
    """A caller that may block has its answer when `embed` returns."""
    wait_for(clip.describe(TIMEOUT_S, "image"))
    assert clip.embed(Request([png(3)], "image", may_block=True), TIMEOUT_S).done()


def test_a_missing_model_is_an_error_of_the_future(tmp_path: Path) -> None:
    """Nothing is read before the model is needed, and each call tells that it is not there."""
    [provider] = connect(Options(model_id="none", path=tmp_path))
    for future in (provider.describe(1), provider.embed(Request([b"a"]), 1)):
        with pytest.raises(ModelNotFound):
            wait_for(future)
    provider.close()


def test_nothing_runs_after_close(settings: Settings) -> None:
    """`close` ends the engine's threads, and later calls are cancelled. Twice does nothing."""
    before = set(threading.enumerate())
    [provider] = connect(Options(model_id=MODEL, path=settings.repository))
    assert len(wait_for(provider.embed(Request([b"a"] * 40), TIMEOUT_S)).vectors) == 40
    assert own_threads(before)
    provider.close()
    provider.close()
    assert not own_threads(before)
    for future in (provider.describe(1), provider.embed(Request([b"a"]), 1)):
        with pytest.raises(CancelledError):
            wait_for(future)


def test_a_dropped_provider_ends_its_threads(settings: Settings) -> None:
    """Without `close`, the garbage collector ends its threads."""
    before = set(threading.enumerate())
    [provider] = connect(Options(model_id=MODEL, path=settings.repository))
    wait_for(provider.embed(Request([b"a"] * 40), TIMEOUT_S))
    assert own_threads(before)
    del provider
    # The opener's thread keeps its last call until it ends.
    wait_until(lambda: gc.collect() is not None and not own_threads(before), 10)


def test_many_callers_share_runs(provider: Onnx, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of concurrent callers are run together, whoever ran the first of them."""
    describe(provider)
    runs = SlowRun(monkeypatch)
    answers: list[Any] = []

    def call() -> None:
        answers.append(wait_for(provider.embed(Request([b"a"], may_block=True), TIMEOUT_S)))

    callers = [threading.Thread(target=call) for _ in range(16)]
    for caller in callers:
        caller.start()
    assert runs.entered.wait(TIMEOUT_S)
    time.sleep(0.1)
    runs.let_go.set()
    for caller in callers:
        caller.join(TIMEOUT_S)
    assert len(answers) == sum(runs.rows) == 16
    assert len(runs.rows) <= 4


PROGRAM = """
from halimede.providers.base import Request
from halimede.providers.onnx import Options, connect
import gc, os, sys, threading, time
PATH = {path!r}

def wait_for(future):
    until_s = time.monotonic() + 30
    while not future.done():
        assert time.monotonic() < until_s, "not answered"
        time.sleep(0.01)
    return future.result()

def opened():
    [provider] = connect(Options(model_id={model!r}, path=PATH))
    wait_for(provider.describe(30))
    return provider

def ask(provider, may_block):
    return wait_for(provider.embed(Request([b"a"], may_block=may_block), 30)).vectors.shape
"""


@pytest.fixture
def run(settings: Settings) -> Callable[..., str]:
    """Run a program after PROGRAM; return what it printed."""

    def run(code: str, before: str = "") -> str:
        program = PROGRAM.format(model=MODEL, path=str(settings.repository))
        done = subprocess.run(
            [sys.executable, "-c", before + program + code],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


def test_it_works_in_an_atexit_handler(run: Callable[..., str]) -> None:
    """Also for a provider that was used before, and for a handler registered before that."""
    code = """
import atexit
def late():
    print(ask(provider, True), ask(provider, False), ask(opened(), False))
atexit.register(late)
provider = opened()
ask(provider, False)
"""
    assert run(code) == "(1, 384) (1, 384) (1, 384)\n"


def test_a_forked_child_opens_its_own_and_ends(run: Callable[..., str]) -> None:
    """The parent's provider is dropped or closed in the child without a hang, whatever the parent
    did at that moment.
    """
    code = """
provider = opened()
ask(provider, False)
stop = threading.Event()
def load():
    while not stop.is_set():
        ask(provider, True), ask(provider, False)
loads = [threading.Thread(target=load) for _ in range(3)]
[thread.start() for thread in loads]
for way in range(3):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        if way == 1:
            del provider
            gc.collect()
        if way == 2:
            print("child", ask(opened(), True))
        sys.exit(0)
    until_s = time.monotonic() + 15
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        assert time.monotonic() < until_s, f"the child hangs ({way})"
        time.sleep(0.01)
stop.set()
[thread.join() for thread in loads]
print(ask(provider, True))
"""
    assert "(1, 384)" in run(code)


def test_it_works_under_gevent(run: Callable[..., str]) -> None:
    """Threads, locks and queues are gevent's after `monkey.patch_all`."""
    pytest.importorskip("gevent")
    code = """
import gevent
provider = opened()
calls = [gevent.spawn(ask, provider, index % 2 == 0) for index in range(20)]
gevent.joinall(calls, timeout=30, raise_error=True)
print({call.value for call in calls})
provider.close()
"""
    assert run(code, "from gevent import monkey\nmonkey.patch_all()\n") == "{(1, 384)}\n"


@pytest.mark.parametrize("moment", range(3))
def test_a_program_that_ends_amid_an_opening_ends_well(
    run: Callable[..., str], moment: int
) -> None:
    """A model that is being opened, which nobody waits for, does not crash the program."""
    code = f"""
[provider] = connect(Options(model_id={MODEL!r}, path=PATH))
provider.describe(0.01)
time.sleep({moment} / 10)
print("end")
"""
    assert run(code) == "end\n"


def test_a_program_that_ends_amid_its_requests_ends_well(run: Callable[..., str]) -> None:
    """Requests under way neither hold the program back nor crash it."""
    code = """
provider = opened()
for _ in range(20):
    provider.embed(Request([b"word " * 200] * 40), 30)
time.sleep(0.02)
print("end")
"""
    assert run(code) == "end\n"
