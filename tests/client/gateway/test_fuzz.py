"""Requests that no program should send, to every path: none fails the gateway, or gets a text back.

HALIMEDE_FUZZ_REQUESTS sets how many are sent, HALIMEDE_FUZZ_SEED which.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
from conftest import MODEL
from gateways import command, triton_model

from halimede_tools.serve import wheel

REQUESTS = int(os.environ.get("HALIMEDE_FUZZ_REQUESTS", "600"))
SEED = os.environ.get("HALIMEDE_FUZZ_SEED", "0")
AT_ONCE = 8
MARKER = "xq7-secret-marker"
"""A part of every text in a body. No error and no log may have it."""
OURS = re.compile("gateway failed|Triton does not answer|Triton did not answer")
"""A part of our own answers of 5xx to /v2. Triton's are passed on: it answers 500, too."""
MIB = 1024 * 1024
MAX_GROWTH_MIB = 96
"""Growth of the gateway's memory after the first third of the requests."""
UNLISTED = {
    f"/v2/models/{MODEL}/infer": {"inputs": [{"name": "text", "data": [MARKER]}]},
    "/v2/models/{name}/infer": {},
    "/v2/{name}": {},
    "/": {"inputs": MARKER},
    "/playground/api/similarity": {"model": MODEL, "texts": [MARKER, "a"]},
    "/playground/api/rank": {"model": MODEL, "query": MARKER, "documents": ["a"]},
    "/playground/api/images": {"model": MODEL, "images": [MARKER]},
    "/playground/api/map": {"model": MODEL, "texts": [MARKER, "a", "b"]},
    "/playground/{name}": {},
    "/{name}": {},
}
"""Paths that OpenAPI does not list, and bodies for them."""
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE")
NAMES = (
    "a", MODEL, "..", "../../etc/passwd", "%2e%2e%2f", "%00", "%ff%fe", "%ED%A0%80", "a%0d%0ab: c",
    "%F0%9F%A6%8A", "a/b/c", "/", "//", "a" * 10_000, "a/" * 5_000, "file-" + "0" * 32, "*", "?a=b",
    "{name}", "batch_" + "0" * 32, "",
)  # fmt: skip
"""What stands for a part of a path."""
QUERIES = (
    "",
    "?limit=-1",
    "?limit=9999999999999999999999",
    "?after=%00",
    "?order=%ff",
    "?a",
    "?&=",
)
RAW = (
    "-1", "0", "1", "2147483648", "18446744073709551616", "-9223372036854775809", "9" * 5000,
    "1e999999", "-1e999999", "0." + "1" * 5000, "NaN", "Infinity", "null", "true", '""', "[]",
    "{}", "[null]", "[[]]", '"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"a\\u0000b"',
    '"\x00"', "[1, 2, 3]", "[-1]", "[[9223372036854775807]]", '["a", 1]', '{"a": 1}',
    f'"{MARKER}"', f'["{MARKER}"]', f'[["{MARKER}"]]', f'{{"{MARKER}": "{MARKER}"}}',
    "[" * 5000 + "]" * 5000, "[" * 5000, '{"a":' * 5000 + "1" + "}" * 5000,
    "[" * 200 + "]" * 200, f'"{MARKER * 4096}"', "[" + ",".join(['"a"'] * 3000) + "]",
    '"data:image/png;base64,AAAA"', '"data:,"', '"http://127.0.0.1/"', '"file:///etc/passwd"',
    '"END"', '"float"', '"\U0001f98a"', '"\u202e\u0301"', "1.5", "[1.5]", "[true]",
)  # fmt: skip
"""What stands for a value, as JSON or almost."""
HEADERS: Mapping[str, tuple[bytes, ...]] = {
    "content-type": (
        b"application/json", b"", b"text/plain", b"application/json; charset=utf-16",
        b"multipart/form-data", b"multipart/form-data; boundary=a", b"\xff",
        b"application/x-www-form-urlencoded", b"a" * 5000,
    ),
    "halimede-space": (b"0" * 16, b"", b"a", b"\xff", b"f" * 5000),
    "x-request-id": (b"a", b"\xff", b"a" * 5000, b'"}'),
    "content-encoding": (b"gzip", b"identity"),
    "accept": (b"", b"application/xml", b"\xff"),
    "authorization": (b"", b"Bearer", b"Bearer \xff", b"Basic YTpi"),
    "traceparent": (b"", b"00-0-0-0", b"00-" + b"f" * 32 + b"-" + b"f" * 16 + b"-01", b"\xff"),
    "origin": (b"null", b"https://a.example"),
    "expect": (b"100-continue", b"a"),
    "x-model-id": (b"a", b"\xff", MODEL.encode()),
    "host": (b"", b"a:b:c", b"\xff"),
    "upgrade": (b"websocket", b"h2c"),
    "connection": (b"upgrade", b"close", b"a"),
    "range": (b"bytes=0-", b"bytes=9999999999999999999-", b"a"),
}  # fmt: skip


class Fuzzed(NamedTuple):
    """A request, without its origin."""

    method: str
    target: bytes
    headers: list[tuple[str, bytes]]
    content: bytes


class Fuzzer:
    """Makes requests: the same ones for the same seed."""

    def __init__(self, api: Mapping[str, Any]) -> None:
        self._schemas = api.get("components", {}).get("schemas", {})
        self.places: list[tuple[str, str, Any]] = [
            (path, method.upper(), self._schema_of(operation))
            for path, operations in sorted(api["paths"].items())
            for method, operation in sorted(operations.items())
        ]
        self.places += [(path, "POST", body) for path, body in UNLISTED.items()]

    def request(self, number: int) -> Fuzzed:
        """Return a request of a number."""
        r = random.Random(f"{SEED}-{number}")
        path, method, body = self.places[number % len(self.places)]
        if path not in UNLISTED:
            body = self._value(body, r) if body is not None else {}
        if r.random() < 0.05:
            method = r.choice(METHODS)
        target = re.sub(r"\{\w+(:path)?\}", lambda _: r.choice(NAMES), path)
        target += r.choice(QUERIES) if r.random() < 0.1 else ""
        names = r.sample(list(HEADERS), r.randrange(3)) if r.random() < 0.3 else []
        headers = [(name, r.choice(HEADERS[name])) for name in names]
        content = b"" if method == "GET" and r.random() < 0.9 else _content(body, r)
        if path == "/v1/files" and method == "POST" and r.random() < 0.8:
            headers.append(("content-type", b"multipart/form-data; boundary=a"))
            content = _form(content, r)
        return Fuzzed(method, target.encode(), headers, content)

    def _schema_of(self, operation: Mapping[str, Any]) -> Any:
        content = operation.get("requestBody", {}).get("content", {})
        return next((kind["schema"] for kind in content.values()), None)

    def _value(self, schema: Mapping[str, Any], r: random.Random, depth: int = 0) -> Any:
        """Return a value that a schema allows, or almost."""
        if "$ref" in schema:
            return self._value(self._schemas[schema["$ref"].rpartition("/")[2]], r, depth)
        if "enum" in schema:
            return r.choice(schema["enum"])
        for several in ("anyOf", "oneOf", "allOf"):
            if several in schema:
                return self._value(r.choice(schema[several]), r, depth)
        kind = schema.get("type")
        if kind == "object" or "properties" in schema:
            required = schema.get("required", ())
            return {
                name: MODEL if name == "model" else self._value(part, r, depth + 1)
                for name, part in schema.get("properties", {}).items()
                if name in required or r.random() < 0.3
            }
        if kind == "array":
            count = r.choice((0, 1, 1, 2, 3)) if depth < 8 else 0
            return [self._value(schema.get("items", {}), r, depth + 1) for _ in range(count)]
        values = {"integer": 2, "number": 0.5, "boolean": r.random() < 0.5, "null": None}
        return values.get(kind, schema.get("const", f"{MARKER} of ocelots"))  # type: ignore[arg-type]


def _content(body: Any, r: random.Random) -> bytes:
    """Return a body as JSON with a few faults."""
    fragments: list[str] = []
    for _ in range(r.choice((0, 1, 1, 1, 2))):
        fragments.append(r.choice(RAW))
        body = _replaced(body, f"@{len(fragments) - 1}@", r)
    text = json.dumps(body, ensure_ascii=r.random() < 0.5)
    for number, fragment in enumerate(fragments):
        text = text.replace(f'"@{number}@"', fragment)
    content = text.encode("utf-8", "surrogatepass")
    fault = r.random()
    if fault < 0.8:
        return content
    return r.choice(
        (
            lambda: b"",
            lambda: content[: r.randrange(len(content) + 1)],
            lambda: content + b"}",
            lambda: text.encode("utf-16", "surrogatepass"),
            lambda: b"\xef\xbb\xbf" + content,
            lambda: content.replace(b"o", b"\xff"),
            lambda: content.replace(b"o", b"\x00"),
            lambda: f'{{"input": "{MARKER}", '.encode() * 3 + content,
            lambda: f"{MARKER}=1&b".encode(),
            lambda: (
                f'--a\r\nContent-Disposition: form-data; name="file"; filename="{MARKER}"'
                f"\r\n\r\n{MARKER}\r\n--a--\r\n".encode()
            ),
            lambda: r.randbytes(300),
        )
    )()


def _form(content: bytes, r: random.Random) -> bytes:
    """Return a form with a file, with a few faults."""
    name = b'Content-Disposition: form-data; name="'
    parts = [
        name + b'purpose"\r\n\r\n' + r.choice((b"batch", b"batch", b"", b"\xff")),
        name
        + b'file"; filename="'
        + r.choice((b"a", b"../a", b"", b"\xff"))
        + b'"\r\n\r\n'
        + content,
        name + r.choice((b"a", b"")) + b'"\r\n\r\n' + MARKER.encode(),
        b"Content-Type\r\n\r\n",
    ]
    chosen = parts[: r.choice((1, 2, 2, 2, 3, 4))]
    form = b"".join(b"--a\r\n" + part + b"\r\n" for part in chosen) + b"--a--\r\n"
    return form if r.random() < 0.8 else form[: r.randrange(len(form))]


def _replaced(body: Any, value: str, r: random.Random) -> Any:
    """Return a body with a value at a random place, or in a field that nobody knows."""
    if isinstance(body, dict) and body and r.random() < 0.95:
        name = r.choice(list(body))
        return {**body, name: _replaced(body[name], value, r)}
    if isinstance(body, dict) and r.random() < 0.8:
        return {**body, r.choice((MARKER, "a.b", "")): value}
    if isinstance(body, list) and body and r.random() < 0.5:
        index = r.randrange(len(body))
        return [*body[:index], _replaced(body[index], value, r), *body[index + 1 :]]
    return value


async def send_all(address: str, fuzzer: Fuzzer, numbers: range) -> tuple[Counter[int], list[str]]:
    """Return how many answers had each status, and what was wrong."""
    statuses: Counter[int] = Counter()
    wrong: list[str] = []
    left = iter(numbers)

    async def send(client: httpx.AsyncClient, request: Fuzzed) -> httpx.Response:
        """The answer. Triton may close a connection that the gateway wanted to use again; that is
        503, to be sent again as every client does.
        """
        for _ in range(3):
            answer = await client.request(
                request.method,
                address,
                content=request.content,
                headers=[(name.encode(), value) for name, value in request.headers],
                extensions={"target": request.target},
            )
            if answer.status_code != 503 or not request.target.startswith(b"/v2"):
                break
        return answer

    async def sender(client: httpx.AsyncClient) -> None:
        for number in left:
            request = fuzzer.request(number)
            try:
                answer = await send(client, request)
            except httpx.LocalProtocolError:  # the client does not send this at all
                continue
            except httpx.TransportError as error:
                wrong.append(f"{number}: {type(error).__name__} {str(request)[:600]}")
                continue
            statuses[answer.status_code] += 1
            is_triton = request.target.startswith(b"/v2") and not OURS.search(answer.text)
            failed, refused = answer.status_code >= 500, answer.status_code >= 400
            if not is_triton and (failed or (refused and MARKER in answer.text)):
                wrong.append(
                    f"{number}: {answer.status_code} {answer.text[:300]} {str(request)[:600]}"
                )

    async with httpx.AsyncClient(timeout=120) as client:
        await asyncio.gather(*(sender(client) for _ in range(AT_ONCE)))
    return statuses, wrong


@pytest.fixture
def models(server: wheel.Server) -> dict[str, Any]:
    return triton_model(server)


def test_no_request_fails_the_gateway(
    models: dict[str, Any], server: wheel.Server, tmp_path: Path
) -> None:
    """No 5xx, no text in an error or the log, no growing memory; then it answers as before."""
    options = {"files": str(tmp_path / "files"), "kserve_url": f"http://{server.http_address}"}
    with command(tmp_path, models, **options) as (address, process):
        fuzzer = Fuzzer(httpx.get(f"{address}/openapi.json").json())
        asked = {"model": MODEL, "input": "hello world"}
        before = httpx.post(f"{address}/v1/embeddings", json=asked, timeout=60).json()
        third = REQUESTS // 3
        statuses, wrong = asyncio.run(send_all(address, fuzzer, range(third)))
        running = psutil.Process(process.pid)
        start_mib = running.memory_info().rss / MIB
        more = asyncio.run(send_all(address, fuzzer, range(third, REQUESTS)))
        growth_mib = running.memory_info().rss / MIB - start_mib
        statuses, wrong = statuses + more[0], wrong + more[1]
        assert httpx.get(f"{address}/health/ready").status_code == 200
        after = httpx.post(f"{address}/v1/embeddings", json=asked, timeout=60).json()
    log = (tmp_path / "log").read_text(errors="replace")
    print(f"\n{dict(sorted(statuses.items()))}, memory {start_mib:.0f} MiB {growth_mib:+.0f} MiB")
    assert not wrong, "\n".join(wrong[:40])
    assert after == before
    assert MARKER not in log
    assert "Traceback" not in log
    assert growth_mib < MAX_GROWTH_MIB
