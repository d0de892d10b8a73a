"""KServe v2 through the gateway, by Triton's own client over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as async_triton
from conftest import MODEL
from gateways import assert_alike, gateway, triton_model
from tritonclient.utils import InferenceServerException

from halimede_tools.serve import ports, wheel

TEXTS = ["hello world", "What is Triton?", "a"]


@pytest.fixture
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(urlsplit(address).netloc) as client:
        yield client


def text_input(texts: list[str], binary: bool = True, kind: Any = triton) -> Any:
    tensor = kind.InferInput("TEXT", [len(texts), 1], "BYTES")
    tensor.set_data_from_numpy(np.array(texts, np.object_).reshape(-1, 1), binary_data=binary)
    return tensor


@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("binary_output", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_inference(
    client: triton.InferenceServerClient,
    vectors: Any,
    binary_input: bool,
    binary_output: bool,
    compression: str | None,
) -> None:
    """Tensors as JSON and as binary data after it, compressed both ways."""
    answer = client.infer(
        MODEL,
        [text_input(TEXTS, binary_input)],
        outputs=[triton.InferRequestedOutput("EMBEDDING", binary_data=binary_output)],
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    assert_alike(answer.as_numpy("EMBEDDING"), vectors(TEXTS))


def test_asyncio(address: str, vectors: Any) -> None:
    async def infer() -> Any:
        async with async_triton.InferenceServerClient(urlsplit(address).netloc) as client:
            return await client.infer(MODEL, [text_input(TEXTS)])

    assert_alike(asyncio.run(infer()).as_numpy("EMBEDDING"), vectors(TEXTS))


def test_the_same_answers_as_the_servers_own(http: httpx.Client, server: wheel.Server) -> None:
    for path in ("", "/health/live", "/health/ready", f"/models/{MODEL}", f"/models/{MODEL}/ready",
                 f"/models/{MODEL}/config", "/models/nothing", "/models/stats?x=a%20b"):  # fmt: skip
        direct = httpx.get(f"http://{server.http_address}/v2{path}")
        through = http.get(f"/v2{path}")
        assert (through.status_code, through.content) == (direct.status_code, direct.content)
        assert through.headers.get("content-type") == direct.headers.get("content-type")


def test_reading_is_proxied(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert client.get_model_metadata(MODEL)["name"] == MODEL
    assert MODEL in {model["name"] for model in client.get_model_repository_index()}
    assert client.get_inference_statistics(MODEL)["model_stats"]


def test_control_is_not(client: triton.InferenceServerClient) -> None:
    for control in (
        lambda: client.load_model(MODEL),
        lambda: client.unload_model(MODEL),
        lambda: client.update_trace_settings(settings={"trace_level": ["OFF"]}),
        lambda: client.update_trace_settings(MODEL, {"trace_level": ["OFF"]}),
        lambda: client.update_log_settings({"log_info": False}),
        lambda: client.register_system_shared_memory("a", "/a", 1),
        lambda: client.unregister_system_shared_memory(),
        lambda: client.get_cuda_shared_memory_status(),
    ):
        with pytest.raises(InferenceServerException, match="not proxied") as raised:
            control()
        assert raised.value.status() == "403"
    assert client.is_model_ready(MODEL)


@pytest.mark.parametrize(
    "path",
    [
        f"/v2/repository/models/{MODEL}/unload",
        f"/v2/models/..%2frepository%2fmodels%2f{MODEL}%2funload",
        f"/v2/models/a/..%2f..%2frepository/models/{MODEL}/unload",
        f"/v2/models/%2e%2e/repository/models/{MODEL}/unload",
        f"/v2//repository/models/{MODEL}/unload",
        f"/v2/repository%2fmodels/{MODEL}/unload",
        f"/v2/models/x%252f..%252frepository%252fmodels%252f{MODEL}%252funload/infer",
    ],
)
def test_no_way_around(address: str, client: triton.InferenceServerClient, path: str) -> None:
    """Paths that only look as if they infer."""
    host, port = urlsplit(address).netloc.split(":")
    answer = raw_post(host, int(port), path)
    assert answer.split()[1] in (b"400", b"403", b"404")
    assert client.is_model_ready(MODEL)


def raw_post(host: str, port: int, path: str) -> bytes:
    """The answer to a path as it is: clients would make it plain."""
    import socket

    with socket.create_connection((host, port), timeout=30) as connection:
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 2\r\n"
            "Connection: close\r\n\r\n{}".encode()
        )
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)


def test_bad_inference_is_tritons_own_error(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException) as raised:
        client.infer("nothing", [text_input(["a"])])
    assert raised.value.status() in ("400", "404")


def test_a_pinned_space(http: httpx.Client) -> None:
    """An answer of another space is refused before Triton is asked."""
    body = {"inputs": [{"name": "TEXT", "shape": [1, 1], "datatype": "BYTES", "data": ["a"]}]}
    path = f"/v2/models/{MODEL}/infer"
    space = http.post("/api/embed", json={"model": MODEL, "input": "a"}).headers["halimede-space"]
    for pinned, status in ((space, 200), ("0" * 16, 409)):
        answer = http.post(path, json=body, headers={"halimede-space": pinned})
        assert answer.status_code == status


def test_only_configured_models(server: wheel.Server) -> None:
    """Without `serve_all` the server's other models are not to be reached."""
    url = f"http://{server.http_address}"
    with (
        gateway(triton_model(server), serve_all=False, kserve_url=url) as running,
        triton.InferenceServerClient(urlsplit(running).netloc) as client,
    ):
        client.infer(MODEL, [text_input(["a"])])
        with pytest.raises(InferenceServerException, match="no model of this name"):
            client.infer(f"{MODEL}-int8", [text_input(["a"])])


def test_the_models_own_http_address(server: wheel.Server) -> None:
    models = triton_model(server)
    models[MODEL]["url"] = f"http://{server.http_address}"
    with gateway(models) as running:
        assert httpx.get(f"{running}/v2/health/ready").status_code == 200


def test_no_triton() -> None:
    """A model that runs in the gateway's own process, and a server that is down."""
    onnx = {MODEL: {"provider": "onnx", "model_id": MODEL}}
    with gateway(onnx) as running:
        answer = httpx.get(f"{running}/v2")
        assert answer.status_code == 501
        assert "gateway.kserve_url" in answer.json()["error"]
    [port] = ports.free_ports(1)
    with gateway(onnx, kserve_url=f"http://127.0.0.1:{port}") as running:
        answer = httpx.get(f"{running}/v2")
        assert (answer.status_code, answer.json()["error"]) == (503, "Triton does not answer.")
