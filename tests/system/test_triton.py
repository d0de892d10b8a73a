"""A real Triton with the real weights, asked as its users ask it."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from conftest import MODEL, NAMES, PRECISIONS, free_options, own_bytes, wait_until
from tritonclient.utils import InferenceServerException

from halimede import (
    Embedder,
    InvalidDimensions,
    InvalidInput,
    InvalidText,
    ModelNotFound,
    ServerOverloaded,
    ServerUnreachable,
    UnknownInputType,
)
from halimede.providers.triton import connection
from halimede_engine import arithmetic
from halimede_ops import vectors
from halimede_tools.bench.soak import BAD_REQUESTS
from halimede_tools.build import towers
from halimede_tools.build.samples import corpus
from halimede_tools.serve import wheel
from halimede_tools.serve.supervise import curl
from halimede_tools.settings import Settings


@pytest.fixture
def embedder(server: wheel.Server) -> Iterator[Embedder]:
    with Embedder(server.grpc_address, timeout_s=60) as opened:
        yield opened


@pytest.fixture
def request_fixture(request: pytest.FixtureRequest) -> Any:
    """Another fixture by its name."""
    return request.getfixturevalue


def request(
    api: Any,
    texts: list[Any],
    input_types: list[str] | None = None,
    dimensions: Any = None,
    binary: bool = True,
) -> list[Any]:
    """The inputs of one request, as tritonclient takes them."""
    options = {} if api is grpcclient else {"binary_data": binary}
    inputs = [api.InferInput("TEXT", [len(texts), 1], "BYTES")]
    inputs[0].set_data_from_numpy(np.array(texts, np.object_).reshape(-1, 1), **options)
    if input_types is not None:
        inputs.append(api.InferInput("INPUT_TYPE", [len(texts), 1], "BYTES"))
        values = np.array([value.encode() for value in input_types], np.object_)
        inputs[-1].set_data_from_numpy(values.reshape(-1, 1), **options)
    if dimensions is not None:
        inputs.append(api.InferInput("DIMENSIONS", [len(texts), 1], "INT32"))
        values = np.array(dimensions, np.int32).reshape(-1, 1)
        inputs[-1].set_data_from_numpy(values, **options)
    return inputs


@pytest.mark.parametrize("precision", PRECISIONS)
def test_vectors_are_those_of_sentence_transformers(
    server: wheel.Server, precision: str, texts: list[str], expected: np.ndarray
) -> None:
    """600 odd and ordinary texts reach the bars in every precision."""
    with Embedder(server.grpc_address, NAMES[precision], timeout_s=120) as embedder:
        result = embedder.embed(texts)
    cosines = vectors.cosine(result.vectors, expected)
    assert result.precision == precision
    bar = towers.BARS[precision]
    assert cosines.mean() >= bar.mean_cosine
    assert np.percentile(cosines[len(corpus.ODD_TEXTS) :], 1) >= bar.p1_cosine


@pytest.mark.skipif(not arithmetic.has_bf16(), reason="this CPU has no bf16")
def test_fp16_is_computed_in_bf16(server: wheel.Server, settings: Settings) -> None:
    """By the server and in this process: the vectors differ from those of f32, within the bar."""
    texts = corpus.check_texts()[40:90]

    def embed(name: str, **options: Any) -> np.ndarray:
        with Embedder(config={"models": {"own": {"model_id": name, **options}}}) as embedder:
            return embedder.embed(texts).vectors

    url = {"provider": "triton", "url": f"grpc://{server.grpc_address}"}
    in_process = {"provider": "onnx", "path": str(settings.repository)}
    exact = embed(MODEL, **url)
    for options in (url, in_process):
        assert 0.9999 <= vectors.cosine(embed(NAMES["fp16"], **options), exact).mean() < 0.999995


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_text_alone_is_the_text_in_a_batch(
    server: wheel.Server, precision: str, texts: list[str]
) -> None:
    """Each text sent alone, beside others' requests, has the vector it has in a large batch."""
    with Embedder(server.grpc_address, NAMES[precision], timeout_s=60) as embedder:
        together = embedder.embed(texts).vectors
        with ThreadPoolExecutor(16) as callers:
            alone = list(callers.map(lambda text: embedder.embed(text).vectors[0], texts))
    cosines = vectors.cosine(together, np.array(alone))
    assert cosines.min() >= towers.BARS[precision].invariance


def test_every_way_of_asking_gives_the_same_vector(server: wheel.Server) -> None:
    """gRPC, HTTP binary, HTTP JSON and the printed curl command agree with the client."""
    text = "hello world"
    with Embedder(server.grpc_address) as embedder:
        expected = embedder.embed(text).vectors
    with grpcclient.InferenceServerClient(server.grpc_address) as client:
        answers = [client.infer(MODEL, request(grpcclient, [text.encode()]))]
    with httpclient.InferenceServerClient(server.http_address) as client:
        answers.append(client.infer(MODEL, request(httpclient, [text.encode()])))
        json_output = httpclient.InferRequestedOutput("EMBEDDING", binary_data=False)
        answers.append(
            client.infer(MODEL, request(httpclient, [text], binary=False), outputs=[json_output])
        )
    given = [answer.as_numpy("EMBEDDING") for answer in answers]
    command = curl(f"http://{server.http_address}", MODEL)
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    outputs = {output["name"]: output for output in json.loads(done.stdout)["outputs"]}
    given.append(np.array(outputs["EMBEDDING"]["data"]).reshape(1, -1))
    with Embedder(f"http://{server.http_address}") as embedder:
        given.append(embedder.embed(text).vectors)
    for vector in given:
        assert vector.shape == (1, 384)
        assert vectors.cosine(vector, expected)[0] >= 0.999999


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_more_rows_than_the_server_takes_keep_their_order(
    server: wheel.Server, scheme: str
) -> None:
    """1,000 texts are sent in several requests and come back in order."""
    address = server.grpc_address if scheme == "grpc" else server.http_address
    texts = [f"text number {index} " + "word " * (index % 50) for index in range(1000)]
    with Embedder(f"{scheme}://{address}", timeout_s=60) as embedder:
        result = embedder.embed(texts)
        picked = [0, 127, 128, 129, 640, 999]
        alone = embedder.embed([texts[index] for index in picked])
    assert len(result) == 1000
    assert vectors.cosine(result.vectors[picked], alone.vectors).min() >= 0.99999


def test_truncation_is_visible(embedder: Embedder) -> None:
    """A text beyond 256 tokens says so, and its vector is that of its first 256 tokens."""
    result = embedder.embed(["short", "word " * 300, "word " * 254])
    assert result.tokens.tolist() == [3, 302, 256]
    assert result.truncated.tolist() == [False, True, False]
    assert vectors.cosine(result.vectors[1:2], result.vectors[2:3])[0] >= 0.99999


def test_results_are_labelled(embedder: Embedder, server: wheel.Server) -> None:
    """A result names its model, precision and space; all precisions share one space."""
    result = embedder.embed("a")
    assert (result.model, result.precision, result.dims) == (MODEL, "fp32", 384)
    with Embedder(server.grpc_address, NAMES["int8"]) as other:
        assert other.embed("a").space == result.space


@pytest.mark.parametrize("dimensions", [1, 64, 383, 384])
def test_dimensions_are_the_leading_ones_normalised(embedder: Embedder, dimensions: int) -> None:
    """Fewer dimensions are the vector's first components, of norm 1 again."""
    full = embedder.embed(["a cat", "a dog"]).vectors
    cut = embedder.embed(["a cat", "a dog"], dimensions=dimensions).vectors
    assert cut.shape == (2, dimensions)
    assert vectors.cosine(cut, full[:, :dimensions]).min() >= 0.99999
    assert np.allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-5)


def test_requests_of_different_dimensions_do_not_mix(server: wheel.Server) -> None:
    """Callers who ask for different dimensions at once each get their own."""
    with Embedder(server.grpc_address, timeout_s=60) as embedder:

        def ask(index: int) -> int:
            return embedder.embed(f"text {index}", dimensions=1 + index % 384).dims

        with ThreadPoolExecutor(16) as callers:
            assert list(callers.map(ask, range(200))) == [1 + i % 384 for i in range(200)]


@pytest.mark.parametrize("input_type", ["query", "document", ""])
def test_input_types_every_model_has(server: wheel.Server, input_type: str) -> None:
    """Query and document are always accepted; this model puts nothing in front."""
    with grpcclient.InferenceServerClient(server.grpc_address) as client:
        answer = client.infer(MODEL, request(grpcclient, [b"cats"], [input_type]))
        plain = client.infer(MODEL, request(grpcclient, [b"cats"]))
    assert np.allclose(answer.as_numpy("EMBEDDING"), plain.as_numpy("EMBEDDING"), atol=1e-6)


def test_empty_batch_and_empty_text(embedder: Embedder) -> None:
    """No text gives an array of no rows; an empty text has sentence-transformers' vector."""
    assert embedder.embed([]).vectors.shape == (0, 384)
    assert np.isclose(np.linalg.norm(embedder.embed("").vectors), 1, atol=1e-5)


def test_a_text_of_one_megabyte_is_cut_off(embedder: Embedder) -> None:
    """1 MB of text is answered, and says that it was truncated: its tokens are a lower bound."""
    result = embedder.embed(["word " * 200_000, "word " * 10_000])
    assert result.max_tokens < result.tokens[0] <= 200_002
    assert result.tokens[1] == 10_002
    assert result.truncated.all()


@pytest.mark.parametrize("name", BAD_REQUESTS)
@pytest.mark.parametrize("api", [grpcclient, httpclient], ids=["grpc", "http"])
def test_bad_requests_are_told_what_is_wrong(server: wheel.Server, api: Any, name: str) -> None:
    """Each bad request ends in one typed line that says what to do, and leaks nothing."""
    arguments, pattern = BAD_REQUESTS[name]
    address = server.grpc_address if api is grpcclient else server.http_address
    with api.InferenceServerClient(address) as client:
        with pytest.raises(InferenceServerException) as raised:
            client.infer(MODEL, request(api, **arguments))
    told = str(raised.value)
    assert re.search(pattern, told)
    assert raised.value.status() in ("StatusCode.INVALID_ARGUMENT", "400")
    for leak in ("Traceback", ".py", "/work", "/root", "s3cret", "aaaa"):
        assert leak not in told


@pytest.mark.parametrize(
    ("name", "shape", "datatype", "value"),
    [
        ("TEXT", [1, 1], "FP32", np.zeros((1, 1), np.float32)),
        ("TEXT", [1, 2], "BYTES", np.array([[b"a", b"b"]], np.object_)),
        ("TEXT", [1], "BYTES", np.array([b"a"], np.object_)),
        ("TEXTS", [1, 1], "BYTES", np.array([[b"a"]], np.object_)),
    ],
    ids=["dtype", "columns", "rank", "name"],
)
def test_wrong_tensors_are_refused(
    server: wheel.Server, name: str, shape: list[int], datatype: str, value: np.ndarray
) -> None:
    """A wrong dtype, shape or input name is INVALID_ARGUMENT, without a path."""
    tensor = grpcclient.InferInput(name, shape, datatype)
    tensor.set_data_from_numpy(value)
    with grpcclient.InferenceServerClient(server.grpc_address) as client:
        with pytest.raises(InferenceServerException) as raised:
            client.infer(MODEL, [tensor])
    assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert "/" not in raised.value.message().replace("https://", "")


def test_one_bad_request_fails_alone(server: wheel.Server) -> None:
    """Among many at once, bad requests fail and good ones are right."""
    with Embedder(server.grpc_address, timeout_s=60) as embedder:
        expected = embedder.embed([f"text {index}" for index in range(100)]).vectors
    outcomes: dict[int, Any] = {}
    done = threading.Event()
    with grpcclient.InferenceServerClient(server.grpc_address) as client:

        def answered(index: int, result: Any, error: Any) -> None:
            outcomes[index] = error or result.as_numpy("EMBEDDING")[0]
            if len(outcomes) == 100:
                done.set()

        for index in range(100):
            text = b"\xff" if index % 3 == 0 else f"text {index}".encode()
            client.async_infer(
                MODEL,
                request(grpcclient, [text]),
                lambda result, error, index=index: answered(index, result, error),
            )
        assert done.wait(60)
    for index, outcome in outcomes.items():
        if index % 3 == 0:
            assert "not valid UTF-8" in str(outcome)
        else:
            assert np.dot(outcome, expected[index]) >= 0.99999


def test_one_process_gives_what_the_steps_give(
    server: wheel.Server, steps_server: wheel.Server, texts: list[str]
) -> None:
    """Vectors, token counts, refusals and what a client reads of the model are the same."""
    with (
        Embedder(server.grpc_address, timeout_s=120) as one,
        Embedder(steps_server.grpc_address, timeout_s=120) as steps,
    ):
        for options in ({}, {"dimensions": 100, "input_type": "query"}):
            ours, theirs = one.embed(texts, **options), steps.embed(texts, **options)
            assert vectors.cosine(ours.vectors, theirs.vectors).min() >= 0.99999
            assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert one.model == steps.model
    told = []
    for address in (server.grpc_address, steps_server.grpc_address):
        with grpcclient.InferenceServerClient(address) as client:
            for arguments, _ in BAD_REQUESTS.values():
                with pytest.raises(InferenceServerException) as raised:
                    client.infer(MODEL, request(grpcclient, **arguments))
                message = raised.value.message().removeprefix(f"in ensemble '{MODEL}', ")
                told.append((raised.value.status(), message))
    half = len(told) // 2
    assert told[:half] == told[half:]


def test_a_bad_mask_at_the_onnx_step_fails_alone(steps_server: wheel.Server) -> None:
    """A mask of another shape, sent to the step itself, is INVALID_ARGUMENT."""
    ids = grpcclient.InferInput("input_ids", [1, 4], "INT64")
    ids.set_data_from_numpy(np.ones((1, 4), np.int64))
    mask = grpcclient.InferInput("attention_mask", [1, 3], "INT64")
    mask.set_data_from_numpy(np.ones((1, 3), np.int64))
    with grpcclient.InferenceServerClient(steps_server.grpc_address) as client:
        with pytest.raises(InferenceServerException, match="both must be"):
            client.infer(f"{MODEL}-onnx", [ids, mask])


def test_padding_at_the_onnx_step_does_not_matter(steps_server: wheel.Server) -> None:
    """The same ids in any padding give the same vector."""
    vectors_found = []
    with grpcclient.InferenceServerClient(steps_server.grpc_address) as client:
        for length in (5, 16, 77, 256):
            ids = np.zeros((1, length), np.int64)
            mask = np.zeros((1, length), np.int64)
            ids[0, :5], mask[0, :5] = [101, 7592, 2088, 999, 102], 1
            inputs = [
                grpcclient.InferInput("input_ids", [1, length], "INT64"),
                grpcclient.InferInput("attention_mask", [1, length], "INT64"),
            ]
            inputs[0].set_data_from_numpy(ids)
            inputs[1].set_data_from_numpy(mask)
            answer = client.infer(f"{MODEL}-onnx", inputs)
            vectors_found.append(answer.as_numpy("sentence_embedding")[0])
    found = np.array(vectors_found)
    assert vectors.cosine(found, found[:1].repeat(4, 0)).min() >= 0.99999


def test_client_errors_are_typed(server: wheel.Server, steps_server: wheel.Server) -> None:
    """The client raises the class that says what to do, over both protocols."""
    for url in (server.grpc_address, f"http://{server.http_address}"):
        with Embedder(url) as embedder:
            with pytest.raises(UnknownInputType, match="document, query"):
                embedder.embed("a", input_type="foo")
            with pytest.raises(InvalidDimensions, match="1 to 384"):
                embedder.embed("a", dimensions=0)
            with pytest.raises(InvalidText, match="text 1 is int"):
                embedder.embed(["a", 3])  # type: ignore[list-item]
            with pytest.raises(InvalidText, match="lone surrogate"):
                embedder.embed("\ud800")
            with pytest.raises(InvalidText, match="Split it"):
                embedder.embed("a" * (4 * 2**20 + 1))
            with pytest.raises(InvalidText, match="^text 1 has 4,194,305 bytes") as raised:
                embedder.embed(["a", "a" * (4 * 2**20 + 1), "b" * 100])
            assert raised.value.index == 1
        with Embedder(url, "no-such-model") as embedder, pytest.raises(ModelNotFound):
            embedder.embed("a")
    with Embedder(steps_server.grpc_address, f"{MODEL}-onnx") as embedder:
        with pytest.raises(ModelNotFound, match="ask for the model itself"):
            embedder.embed("a")
    with pytest.raises(InvalidInput, match="host:port"):
        Embedder("ftp://127.0.0.1:1")


def test_refused_texts_are_let_go(server: wheel.Server) -> None:
    """Texts of 4 MB that are refused take no memory for good."""
    inputs = request(grpcclient, ["a" * (4 * 2**20 + 1)])
    with grpcclient.InferenceServerClient(server.grpc_address) as client:

        def refused(times: int) -> int:
            for _ in range(times):
                with pytest.raises(InferenceServerException, match="Split it into parts"):
                    client.infer(MODEL, inputs)
            return own_bytes(server.process.pid)

        before = refused(5)
        assert refused(30) - before < 40_000_000


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_no_server_is_a_typed_error(scheme: str) -> None:
    """An address where nothing listens gives ServerUnreachable that names it."""
    address = f"127.0.0.1:{free_options().grpc_port}"
    with Embedder(f"{scheme}://{address}", timeout_s=5) as embedder:
        with pytest.raises(ServerUnreachable, match=address):
            embedder.embed("a")


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_server_that_dies_mid_request(settings: Settings, tmp_path, scheme: str) -> None:
    """When the server is killed under load every call ends in ServerUnreachable, none hangs."""
    options = free_options(models=(MODEL,))
    with wheel.serve(settings.repository, settings.python_backend, tmp_path, options) as server:
        address = server.grpc_address if scheme == "grpc" else server.http_address
        with Embedder(f"{scheme}://{address}", timeout_s=20) as embedder:
            embedder.embed("warm")
            killer = threading.Timer(0.5, server.process.kill)
            killer.start()
            began = time.monotonic()
            with pytest.raises(ServerUnreachable):
                embedder.embed(["word " * 200] * 5000)
            assert time.monotonic() - began < 20


@pytest.mark.parametrize("served", ["server", "steps_server"])
def test_full_queue_is_rejected_at_once_and_the_server_goes_on(
    served: str, request_fixture: Any
) -> None:
    """Far more requests than the queues hold: each is answered, by a vector or ServerOverloaded."""
    server: wheel.Server = request_fixture(served)
    outcomes: list[Any] = []
    done = threading.Event()
    count = 4000
    with grpcclient.InferenceServerClient(server.grpc_address) as client:

        def answered(result: Any, error: Any) -> None:
            outcomes.append(error)
            if len(outcomes) == count:
                done.set()

        inputs = request(grpcclient, [b"word " * 30] * 2)
        for _ in range(count):
            client.async_infer(MODEL, inputs, answered)
        assert done.wait(120), f"only {len(outcomes)} of {count} requests were answered"
    rejected = [error for error in outcomes if error is not None]
    assert rejected
    full = ("maximum queue size", "ServerOverloaded: the queue is full")
    assert all(any(word in str(error) for word in full) for error in rejected)
    with Embedder(server.grpc_address) as embedder:
        assert embedder.embed("still here").dims == 384


def test_overload_is_a_typed_error() -> None:
    """Triton's word for a full queue becomes ServerOverloaded, which can be retried."""
    message = "in ensemble 'm', Exceeds maximum queue size"
    error = connection.explained(message, connection.parse("host:1"))
    assert isinstance(error, ServerOverloaded)
    assert "host:1 has a full queue" in str(error)
    assert error.retryable


def test_health_metrics_and_config_are_triton_s_own(server: wheel.Server) -> None:
    """Readiness, the metrics port and the config's parameters are there for any Triton client."""
    http = f"http://{server.http_address}"
    assert httpx.get(f"{http}/v2/health/ready").status_code == 200
    metrics = httpx.get(f"http://127.0.0.1:{server.options.metrics_port}/metrics").text
    assert f'nv_inference_count{{model="{MODEL}"' in metrics
    parameters = httpx.get(f"{http}/v2/models/{MODEL}/config").json()["parameters"]
    assert parameters["dims"]["string_value"] == "384"


def test_stopping_under_load_answers_what_waits(settings: Settings, tmp_path) -> None:
    """SIGTERM while requests wait: each ends in its own vector or an error that may pass."""
    texts = [f"text {index} " + "word " * (index % 60) for index in range(200)]
    options = free_options(models=(MODEL,))
    outcomes: dict[int, Any] = {}
    with wheel.serve(settings.repository, settings.python_backend, tmp_path, options) as server:
        with Embedder(server.grpc_address) as embedder:
            expected = embedder.embed(texts).vectors
        with grpcclient.InferenceServerClient(server.grpc_address) as client:
            for index, text in enumerate(texts):
                client.async_infer(
                    MODEL,
                    request(grpcclient, [text.encode()]),
                    lambda result, error, index=index: outcomes.__setitem__(index, error or result),
                )
            wait_until(lambda: outcomes)
            server.process.terminate()
            server.process.wait(60)
            wait_until(lambda: len(outcomes) == len(texts))
    answered = {index: got for index, got in outcomes.items() if not isinstance(got, Exception)}
    assert answered
    for index, got in answered.items():
        assert np.dot(got.as_numpy("EMBEDDING")[0], expected[index]) >= 0.99999
    failed = [error for error in outcomes.values() if isinstance(error, Exception)]
    assert {error.status() for error in failed} <= {"StatusCode.UNAVAILABLE"}


def test_a_single_text_is_answered_before_bulk_that_came_first(server: wheel.Server) -> None:
    """Of 1,024 texts in requests of 128, most wait when a single one comes: it passes them."""
    order: list[str] = []
    with grpcclient.InferenceServerClient(server.grpc_address) as client:

        def ask(name: str, texts: list[bytes], priority: int) -> threading.Event:
            answered = threading.Event()

            def receive(result: Any, error: Any) -> None:
                order.append(name if error is None else "error")
                answered.set()

            inputs = request(grpcclient, texts)
            client.async_infer(NAMES["int8"], inputs, receive, priority=priority)
            return answered

        bulk = [ask("bulk", [b"word " * 80] * 128, priority=2) for _ in range(8)]
        waiting = [*bulk, ask("single", [b"hello world"], priority=0)]
        assert all(answered.wait(60) for answered in waiting)
    assert "error" not in order
    assert order.index("single") < 4


def test_what_runs_bulk_leaves_the_cores_to_single_texts(server: wheel.Server) -> None:
    """In each backend process the streams' threads are nicer than all others."""
    for process in psutil.Process(server.process.pid).children():
        threads = [psutil.Process(thread.id).nice() for thread in process.threads()]
        assert set(threads) == {process.nice(), process.nice() + 5}
        assert threads.count(process.nice()) > 3
