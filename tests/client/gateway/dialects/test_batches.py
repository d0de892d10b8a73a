"""OpenAI's Files and Batches, by OpenAI's own SDK."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from conftest import MODEL, ROOT, wait_until
from gateways import assert_alike, gateway, triton_model

from halimede.gateway.batches.store import FINAL, Batch, Store, new_id, now
from halimede_tools.serve import ports, wheel

WORDS = ("apple", "Paris", "violin", "rain", "engine", "winter", "coffee")
WAIT_S = 300.0


def text(number: int) -> str:
    return f"{WORDS[number % len(WORDS)]} {number} and {WORDS[number % 5]}"


def line(number: int, **body: Any) -> dict[str, Any]:
    return {
        "custom_id": f"line-{number}",
        "method": "POST",
        "url": "/v1/embeddings",
        "body": {"model": MODEL, "input": text(number), **body},
    }


def as_lines(rows: list[Any]) -> io.BytesIO:
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return io.BytesIO("\n".join(texts).encode())


def sdk(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)


def start(client: openai.OpenAI, rows: list[Any], **options: Any) -> str:
    """Start a batch of these lines; return its id."""
    file = client.files.create(file=("lines.jsonl", as_lines(rows)), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h", **options
    )
    return batch.id


def ended(client: openai.OpenAI, id_: str) -> Any:
    """A batch after its end."""
    wait_until(lambda: client.batches.retrieve(id_).status in FINAL, WAIT_S)
    return client.batches.retrieve(id_)


def rows_of(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(row) for row in client.files.content(file_id).text.splitlines()]


def assert_answered(rows: list[dict[str, Any]], count: int, vectors: Callable[..., Any]) -> None:
    """Each line has one answer, the first and the last with the right vectors."""
    by_id = {row["custom_id"]: row for row in rows}
    assert by_id.keys() == {f"line-{n}" for n in range(count)}
    assert len(rows) == len({row["id"] for row in rows}) == count
    some = [*range(16), *range(count - 16, count)]
    found = [by_id[f"line-{n}"]["response"]["body"]["data"][0]["embedding"] for n in some]
    assert_alike(found, vectors([text(n) for n in some]))


@pytest.fixture(scope="module")
def site(server: wheel.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with gateway(triton_model(server), files=tmp_path_factory.mktemp("files")) as running:
        yield running


@pytest.fixture
def client(site: str) -> openai.OpenAI:
    return sdk(site)


def test_files(client: openai.OpenAI, site: str) -> None:
    content = as_lines([line(0)]).getvalue()
    file = client.files.create(file=("lines.jsonl", content), purpose="batch")
    assert (file.filename, file.bytes, file.purpose) == ("lines.jsonl", len(content), "batch")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).content == content
    assert file.id in {each.id for each in client.files.list(purpose="batch")}
    assert client.files.delete(file.id).deleted
    for gone in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            gone(file.id)


def test_lists_have_pages(client: openai.OpenAI) -> None:
    made = [client.files.create(file=("f", b"{}"), purpose="batch").id for _ in range(5)]
    found = [file.id for file in client.files.list(limit=2)]
    assert found[:5] == made[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == found[::-1]
    first = client.files.list(limit=2)
    client.files.delete(first.data[-1].id)
    assert first.get_next_page().data[0].id == made[2]
    ids = [start(client, [line(0)]) for _ in range(3)]
    assert [batch.id for batch in client.batches.list(limit=2)][:3] == ids[::-1]


def test_a_batch(client: openai.OpenAI, vectors: Any) -> None:
    id_ = start(client, [line(n) for n in range(150)], metadata={"job": "seven"})
    batch = ended(client, id_)
    assert batch.status == "completed"
    assert batch.metadata == {"job": "seven"}
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (150, 150, 0)
    assert batch.error_file_id is None
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    rows = rows_of(client, batch.output_file_id)
    assert_answered(rows, 150, vectors)
    assert rows[0]["error"] is None
    assert rows[0]["response"]["status_code"] == 200
    assert rows[0]["response"]["body"]["usage"]["total_tokens"] > 3
    assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"
    with pytest.raises(openai.ConflictError, match="it is completed"):
        client.batches.cancel(id_)


def test_a_bad_line_fails_alone(client: openai.OpenAI) -> None:
    """Lines that are refused have the answer that the request would have; others a reason."""
    secret = "kingfisher"
    bad = [
        f"{{no json {secret}",
        "[1]",
        line(100) | {"method": "GET"},
        line(101) | {"url": "/v1/chat/completions"},
        line(102) | {"body": secret},
        line(0),
        line(103) | {"custom_id": None},
    ]
    refused = [line(104, model=secret), line(105, input=[]), line(106, dimensions=0),
               line(107, truncate="NONE", input="a " * 5000)]  # fmt: skip
    batch = ended(client, start(client, [line(0), *bad, "", *refused, line(1)]))
    assert batch.status == "completed"
    assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 11)
    assert [row["custom_id"] for row in rows_of(client, batch.output_file_id)] == [
        "line-0",
        "line-1",
    ]
    failed = rows_of(client, batch.error_file_id)
    for row in failed[: len(bad)]:
        assert row["response"] is None
        assert row["error"]["code"] == "invalid_line"
    for row, status in zip(failed[len(bad) :], (404, 400, 422, 400), strict=True):
        assert row["response"]["status_code"] == status
        assert row["response"]["body"]["error"]["message"]
    assert secret not in json.dumps(failed)


def test_too_many_and_no_lines(client: openai.OpenAI) -> None:
    for rows, code in (([], "empty_file"), (["{}"] * 50_001, "too_many_lines")):
        batch = ended(client, start(client, rows))
        assert batch.status == "failed"
        assert batch.errors.data[0].code == code


def test_bad_requests_are_refused(client: openai.OpenAI, site: str) -> None:
    made = client.files.create(file=("f", b"{}"), purpose="batch").id
    good = {"input_file_id": made, "endpoint": "/v1/embeddings", "completion_window": "24h"}
    for change, status in (
        ({"input_file_id": "file-" + "0" * 32}, 404),
        ({"input_file_id": "../files/" + made}, 404),
        ({"endpoint": "/v1/chat/completions"}, 422),
        ({"completion_window": "1h"}, 422),
        ({"metadata": {str(n): "" for n in range(17)}}, 422),
    ):
        answer = httpx.post(f"{site}/v1/batches", json=good | change)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
    for path in ("/v1/files/..%2f..%2fsecret", f"/v1/files/{made}.json", f"/v1/files/{made}%00",
                 "/v1/batches/batch_..", "/v1/batches/..%2ffiles%2f" + made):  # fmt: skip
        assert httpx.get(f"{site}{path}").status_code == 404
    answer = httpx.post(f"{site}/v1/files", files={"file": b"a"}, data={"purpose": "vision"})
    assert answer.status_code == 422
    assert httpx.post(f"{site}/v1/files", data={"purpose": "batch"}).status_code == 422


def test_a_gateway_without_a_folder(address: str) -> None:
    with pytest.raises(openai.NotFoundError, match=r"gateway\.files"):
        sdk(address).files.list()


def stored(folder: Path, key_id: str, count: int = 1) -> tuple[Store, Batch]:
    """A folder with a batch of a key that has not begun."""
    store = Store(folder)
    file = store.add_file(as_lines([line(n) for n in range(count)]), "f", "batch", key_id)
    batch = Batch(
        id=new_id("batch_"), endpoint="/v1/embeddings", input_file_id=file.id,
        completion_window="24h", created_at=now(), expires_at=now() + 3600, key_id=key_id,
        answers_id=new_id("file-"), failures_id=new_id("file-"),
    )  # fmt: skip
    store.add_batch(batch)
    return store, batch


def test_files_of_another_key_are_not_there(tmp_path: Path, server: wheel.Server) -> None:
    _, batch = stored(tmp_path, "somebody")
    with gateway(triton_model(server), files=tmp_path) as running:
        client = sdk(running)
        assert list(client.files.list()) == list(client.batches.list()) == []
        for get, id_ in ((client.files.retrieve, batch.input_file_id),
                         (client.files.content, batch.input_file_id),
                         (client.files.delete, batch.input_file_id),
                         (client.batches.retrieve, batch.id),
                         (client.batches.cancel, batch.id)):  # fmt: skip
            with pytest.raises(openai.NotFoundError):
                get(id_)


def test_a_batch_has_the_rights_of_its_key(tmp_path: Path, server: wheel.Server) -> None:
    """The models of the key that made it, and no other key sees it."""
    keys = tmp_path / "keys.yaml"
    entries = [
        {"id": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "models": models}
        for name, models in (("limited", [MODEL]), ("other", ["*"]))
    ]
    keys.write_text(yaml.safe_dump(entries))
    with gateway(triton_model(server), files=tmp_path / "files", keys=keys) as running:
        limited, other = (
            openai.OpenAI(base_url=f"{running}/v1", api_key=name, max_retries=0)
            for name in ("limited", "other")
        )
        id_ = start(limited, [line(0), line(1, model=f"{MODEL}-int8")])
        batch = ended(limited, id_)
        assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 1)
        [row] = rows_of(limited, batch.error_file_id)
        assert row["response"]["status_code"] == 403
        assert list(other.files.list()) == list(other.batches.list()) == []
        for get, stored_id in ((other.batches.retrieve, id_), (other.batches.cancel, id_),
                               (other.files.content, batch.output_file_id)):  # fmt: skip
            with pytest.raises(openai.NotFoundError):
                get(stored_id)
        file = limited.files.create(file=("f", b"{}"), purpose="batch")
        with pytest.raises(openai.NotFoundError):
            other.batches.create(
                input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
            )


def test_an_old_batch_expires(tmp_path: Path, server: wheel.Server) -> None:
    store, batch = stored(tmp_path, "")
    batch.expires_at = now() - 1
    store.save(batch)
    with gateway(triton_model(server), files=tmp_path) as running:
        assert ended(sdk(running), batch.id).status == "expired"


def test_a_batch_whose_file_was_deleted_fails(tmp_path: Path, server: wheel.Server) -> None:
    store, batch = stored(tmp_path, "")
    store.delete_file(batch.input_file_id, "")
    with gateway(triton_model(server), files=tmp_path) as running:
        found = ended(sdk(running), batch.id)
        assert (found.status, found.errors.data[0].code) == ("failed", "invalid_input_file")


def test_it_waits_for_a_server_and_can_be_cancelled(tmp_path: Path) -> None:
    [port] = ports.free_ports(1)
    models = {MODEL: {"provider": "triton", "model_id": MODEL, "url": f"127.0.0.1:{port}"}}
    with gateway(models, files=tmp_path) as running:
        client = sdk(running)
        id_ = start(client, [line(n) for n in range(3)])
        wait_until(lambda: client.batches.retrieve(id_).status == "in_progress")
        assert client.batches.cancel(id_).status == "cancelling"
        batch = ended(client, id_)
        assert (batch.status, batch.request_counts.failed) == ("cancelled", 0)
        assert batch.cancelling_at <= batch.cancelled_at
        assert batch.output_file_id is None


def test_two_gateways_share_a_folder(tmp_path: Path, server: wheel.Server, vectors: Any) -> None:
    """Each batch is run by one of them."""
    with (
        gateway(triton_model(server), files=tmp_path) as one,
        gateway(triton_model(server), files=tmp_path) as other,
    ):
        clients = sdk(one), sdk(other)
        ids = [start(clients[n % 2], [line(k) for k in range(200)]) for n in range(4)]
        for n, id_ in enumerate(ids):
            batch = ended(clients[(n + 1) % 2], id_)
            assert batch.request_counts.completed == 200
            assert_answered(rows_of(clients[n % 2], batch.output_file_id), 200, vectors)


def process(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """A gateway in a process of its own, with the model in it."""
    config = folder / "halimede.yaml"
    written = {"models": {MODEL: {"provider": "onnx", "model_id": MODEL}},
               "gateway": {"files": str(folder / "files")}}  # fmt: skip
    config.write_text(yaml.safe_dump(written))
    command = [sys.executable, "-m", "halimede", "gateway", "--in-process", "--port", str(port),
               "--config", str(config)]  # fmt: skip
    paths = os.pathsep.join([str(ROOT / "client"), str(ROOT / "python_backend")])
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/.well-known/live").status_code == 204
    except httpx.HTTPError:
        return False


def test_a_killed_gateway_goes_on(tmp_path: Path, vectors: Any) -> None:
    """Lines that were answered before are not asked again, and a torn row is not kept."""
    count = 1500
    [port] = ports.free_ports(1)
    address = f"http://127.0.0.1:{port}"
    client = sdk(address)
    running = process(tmp_path, port)
    try:
        wait_until(lambda: answers(address))
        id_ = start(client, [line(n) for n in range(count)])
        wait_until(lambda: client.batches.retrieve(id_).request_counts.completed)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    store = Store(tmp_path / "files")
    batch = store.batch(id_, "")
    assert batch.status == "in_progress"
    data = store.data(batch.answers_id)
    before = data.read_bytes()
    whole = before[: before.rindex(b"\n") + 1]
    assert 0 < whole.count(b"\n") < count
    data.write_bytes(whole + b'{"id":"batch_req_' + id_.encode()[6:] + b'_99999","custom_id":"li')
    running = process(tmp_path, port)
    try:
        wait_until(lambda: answers(address))
        assert ended(client, id_).request_counts.completed == count
        content = client.files.content(batch.answers_id).content
        assert content.startswith(whole)
        assert_answered(rows_of(client, batch.answers_id), count, vectors)
    finally:
        running.terminate()
        assert running.wait(60) in (0, -signal.SIGTERM)  # uvicorn raises it again
