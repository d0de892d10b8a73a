"""What the backends tell on Triton's metrics port."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from conftest import MODEL, wait_until
from scrapes import figures

from halimede import Embedder, UnknownInputType
from halimede_tools.serve.wheel import Server

PUBLISHED_EVERY_S = 1.0
CALLS = 12
"""Of 64 long texts, all but two cancelled: far more than is run until the first is published."""
DESIGNS = {
    "server": (MODEL, MODEL),
    "steps_server": (f"{MODEL}-onnx", f"{MODEL}-tokenizer"),
}
"""Which model runs the rows and which one tokenizes, in one process and in steps."""


@pytest.fixture(params=DESIGNS)
def served(request: pytest.FixtureRequest) -> tuple[Server, str, str]:
    """A server, the model that runs and the model that tokenizes."""
    server = request.getfixturevalue(request.param)
    wait_until_published(server)
    return (server, *DESIGNS[request.param])


def wait_until_published(server: Server) -> None:
    """Until nothing is left of what was counted before, such as while the server warmed up."""

    def ours() -> dict[str, float]:
        told = figures(server).items()
        return {name: value for name, value in told if name.startswith("halimede_")}

    def is_published() -> bool:
        before = ours()
        time.sleep(2 * PUBLISHED_EVERY_S)
        return ours() == before

    wait_until(is_published)


def grown(before: Counter[str], after: Counter[str]) -> Counter[str]:
    return Counter({name: value - before[name] for name, value in after.items()})


def test_texts_tokens_padding_runs_and_truncations_are_counted(
    served: tuple[Server, str, str],
) -> None:
    """As many as were sent: every text and token once, in runs that pad a little, after a wait."""
    server, runs, tokenizes = served
    before = figures(server, model=runs), figures(server, model=tokenizes)
    texts = ["word " * length for length in (1, 8, 60, 400)] * 10
    with Embedder(server.grpc_address) as embedder:
        result = embedder.embed(texts)
    rows = before[0]["halimede_run_rows_sum"] + len(texts)  # what is published last
    after = figures(server, lambda found: found["halimede_run_rows_sum"] >= rows, model=runs)
    ran = grown(before[0], after)
    assert ran["halimede_rows_total"] == len(texts)
    assert ran["halimede_tokens_total"] == np.minimum(result.tokens, result.max_tokens).sum()
    assert 1 <= ran["halimede_padded_tokens_total"] / ran["halimede_tokens_total"] < 1.5
    assert ran["halimede_run_rows_sum"] == len(texts)
    assert 1 < len(texts) / ran["halimede_run_rows_count"] < len(texts)
    assert ran["halimede_wait_seconds_total"] > 0
    cut = before[1]["halimede_truncated_texts_total"] + 10
    figures(server, lambda found: found["halimede_truncated_texts_total"] == cut, model=tokenizes)


def test_errors_are_counted_by_the_class_that_the_client_raises(
    served: tuple[Server, str, str],
) -> None:
    """Once a request that a backend refused."""
    server, _, tokenizes = served
    labels = {"model": tokenizes, "error": "UnknownInputType"}
    before = figures(server, **labels)["halimede_errors_total"]
    with Embedder(server.grpc_address) as embedder:
        for _ in range(3):
            with pytest.raises(UnknownInputType):
                embedder.embed("a text", input_type="none")
    figures(server, lambda found: found["halimede_errors_total"] == before + 3, **labels)


def test_requests_whose_callers_have_gone_are_counted(server: Server) -> None:
    """Cancelled while others ran: rows of theirs that were not run yet never are."""
    wait_until_published(server)
    before = figures(server, model=MODEL)
    text = grpcclient.InferInput("TEXT", [64, 1], "BYTES")
    text.set_data_from_numpy(np.full((64, 1), b"word " * 250, np.object_))
    answered: list[Any] = []
    done = threading.Semaphore(0)

    def take(result: Any, error: Any) -> None:
        answered.append(error)
        done.release()

    with grpcclient.InferenceServerClient(server.grpc_address) as client:
        calls = [client.async_infer(MODEL, [text], take) for _ in range(CALLS)]
        running = before["halimede_rows_total"] + 1  # they have reached the backend, and wait there
        figures(server, lambda found: found["halimede_rows_total"] >= running, model=MODEL)
        for call in calls[2:]:
            call.cancel()
        for _ in calls:
            assert done.acquire(timeout=60)
    expected = before["halimede_cancelled_requests_total"] + 1
    after = figures(
        server,
        lambda found: (
            found["halimede_cancelled_requests_total"] >= expected
            and found["halimede_rows_total"] >= before["halimede_rows_total"] + 2 * 64
            and found["nv_inference_pending_request_count"] == 0
        ),
        model=MODEL,
    )
    ran = grown(before, after)
    assert 2 * 64 <= ran["halimede_rows_total"] < CALLS * 64
