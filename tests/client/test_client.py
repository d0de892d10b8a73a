"""The client as a library: cache, output types, figures, processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MODEL, free_options

from halimede import AsyncEmbedder, Embedder, HalimedeError, InvalidInput
from halimede_ops import quantise, vectors
from halimede_tools.bench import redis_server
from halimede_tools.serve import wheel

HASH: dict[str, Any] = {"models": {"m": {"provider": "hash"}}}


def test_what_is_cached_needs_no_server(server: wheel.Server, tmp_path: Path) -> None:
    """Vectors come from memory, then from disk in another process's place, labelled as cached."""
    config = {
        "models": {"m": {"provider": "triton", "model_id": MODEL, "url": server.grpc_address}},
        "cache": {"disk": {"path": str(tmp_path)}},
    }
    with Embedder(config=config) as embedder:
        first = embedder.embed(["one", "two", "one"])
        again = embedder.embed(["two", "three"])
        assert first.cached.tolist() == [False, False, False]
        assert again.cached.tolist() == [True, False]
        assert embedder.stats()["cache"]["tiers"]["memory"]["hits"] == 1
    with Embedder(config=config) as embedder:
        other = embedder.embed(["three", "one", "new"])
        assert other.cached.tolist() == [True, True, False]
        assert vectors.cosine(other.vectors[1:2], first.vectors[:1])[0] >= 0.999999
        assert other.tokens.tolist() == [3, 3, 3]
        embedder.clear_cache()
        assert not embedder.embed("one").cached.any()


def test_what_changes_a_vector_is_in_its_key(server: wheel.Server) -> None:
    """Another input type, other dims and another precision are never given from the cache."""
    config: dict[str, Any] = {
        "models": {"m": {"provider": "triton", "model_id": MODEL, "url": server.grpc_address}},
        "cache": {},
    }
    with Embedder(config=config) as embedder:
        embedder.embed("a")
        assert not embedder.embed("a", input_type="query").cached.any()
        assert not embedder.embed("a", dimensions=64).cached.any()
        assert embedder.embed("a", output_type="binary").cached.all()


@pytest.mark.needs("redis-server")
def test_redis_is_shared(tmp_path: Path) -> None:
    """A second embedder finds in Redis what the first computed; its metrics say how hot it was."""
    from prometheus_client import CollectorRegistry, generate_latest

    from halimede.observability import prometheus

    with redis_server.serve(tmp_path) as url:
        config = {**HASH, "cache": {"memory_mb": None, "redis": {"url": url, "timeout": 30}}}
        with Embedder(config=config) as first:
            first.embed(["a", "b"])
        with Embedder(config=config) as second:
            assert second.embed(["b", "a"]).cached.all()
            tiers = second.stats()["cache"]["tiers"]
            registry = CollectorRegistry()
            prometheus.register(second, registry)
            metrics = generate_latest(registry).decode()
    assert set(tiers) == {"redis"}
    assert 'halimede_cache_hits_hot_total{embedder="m",tier="redis"} 2.0' in metrics
    assert 'halimede_cache_hits_cold_total{embedder="m",tier="redis"} 0.0' in metrics
    assert tiers["redis"]["hits"] == tiers["redis"]["hits_hot"] == 2


def test_cache_enabled_and_cache_ttl_are_a_models_own() -> None:
    """cache_enabled: false keeps a model out; after cache_ttl its vectors are computed anew."""
    for options, seconds, cached in (
        ({"cache_enabled": False}, 0, False),
        ({"cache_ttl": 60}, 0, True),
        ({"cache_ttl": 0.2}, 0.3, False),
    ):
        config = {"models": {"m": {"provider": "hash", **options}}, "cache": {}}
        with Embedder(config=config) as embedder:
            embedder.embed("a")
            time.sleep(seconds)
            assert embedder.embed("a").cached.tolist() == [cached]


@pytest.mark.parametrize("output_type", quantise.OUTPUT_TYPES)
def test_output_types(output_type: quantise.OutputType) -> None:
    """Each output type is that of `quantise`, says so, and tells its dims."""
    texts = [f"text {index}" for index in range(50)]
    with Embedder(config=HASH) as embedder:
        floats = embedder.embed(texts).vectors
        ranges = quantise.measure_ranges(floats)
        result = embedder.embed(texts, output_type=output_type, ranges=ranges)
        assert np.array_equal(result.vectors, quantise.quantise(floats, output_type, ranges))
        assert (result.output_type, result.dims) == (output_type, 384)
        assert embedder.embed([], output_type=output_type, ranges=ranges).vectors.shape[0] == 0
        if output_type in ("int8", "uint8"):
            with pytest.raises(InvalidInput, match="measure_ranges"):
                embedder.embed("a", output_type=output_type)


def test_an_unknown_output_type_is_refused() -> None:
    """The output types are named."""
    with Embedder(config=HASH) as embedder, pytest.raises(InvalidInput, match="ubinary"):
        embedder.embed("a", output_type="float64")  # type: ignore[arg-type]


def test_a_million_texts_stream_in_bounded_memory() -> None:
    """From a generator of 1,000,000 texts the process grows by less than 100 MB."""
    code = """
import psutil
from halimede import Embedder
def endless():
    for index in range(1_000_000):
        yield f"text {index} " + "x" * 100
with Embedder(config={"models": {"m": {"provider": "hash"}}}) as embedder:
    rows = 0
    for part in embedder.embed_iter(endless(), window=4096):
        if not rows:
            before = psutil.Process().memory_info().rss
        rows += len(part)
    print(rows, psutil.Process().memory_info().rss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows, grown_bytes = map(int, done.stdout.split())
    assert rows == 1_000_000
    assert grown_bytes < 100 * 2**20


def test_an_async_stream() -> None:
    """Async generators and plain iterables stream alike, in order; leaving early is fine."""

    async def texts():
        for index in range(100):
            yield f"text {index}"

    async def run() -> None:
        async with AsyncEmbedder(config=HASH) as embedder:
            whole = (await embedder.embed([f"text {index}" for index in range(100)])).vectors
            for stream in (texts(), (f"text {index}" for index in range(100))):
                parts = [part async for part in embedder.embed_iter(stream, window=30)]
                assert [len(part) for part in parts] == [30, 30, 30, 10]
                assert np.array_equal(np.concatenate([part.vectors for part in parts]), whole)
            async for part in embedder.embed_iter(texts(), window=10):
                assert len(part) == 10
                break
            assert (await embedder.describe()).provider == "hash"
            assert (await embedder.stats())["calls"] >= 3
            assert (await embedder.health())[0]["healthy"]
            await embedder.clear_cache()

    asyncio.run(run())


def test_statistics_count_what_was_done() -> None:
    """Calls, texts, latencies, requests per provider and errors add up."""
    with Embedder(config=HASH) as embedder:
        for _ in range(10):
            embedder.embed(["a", "b"])
        with pytest.raises(InvalidInput):
            embedder.embed("a", dimensions=0)
        stats = embedder.stats()
    assert (stats["calls"], stats["texts"], stats["errors"]) == (11, 20, {"InvalidDimensions": 1})
    latency = stats["latency_ms"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
    assert latency["count"] == 10
    assert stats["providers"]["hash:hash"]["requests"] == 10
    assert stats["models"]["hash:hash"]["dims"] == 384


def test_prometheus_reads_the_statistics() -> None:
    """The figures of every registered embedder are in Prometheus' own text, with buckets."""
    from prometheus_client import CollectorRegistry, generate_latest

    from halimede.observability import prometheus

    registry = CollectorRegistry()
    with Embedder(config={**HASH, "cache": {}}) as embedder, Embedder(config=HASH) as other:
        prometheus.register(embedder, registry)
        second = prometheus.register(other, registry)
        third = prometheus.register(AsyncEmbedder(config=HASH), registry, name="async")
        assert (second.name, third.name) == ("m-2", "async")
        with pytest.raises(InvalidInput, match="'async'"):
            prometheus.register(other, registry, name="async")
        embedder.embed(["a", "b"])
        embedder.embed(["a", "c"])
        other.embed("a")
        text = generate_latest(registry).decode()
        for line in (
            'halimede_calls_total{embedder="m"} 2.0',
            'halimede_calls_total{embedder="m-2"} 1.0',
            'halimede_calls_total{embedder="async"} 0.0',
            'halimede_texts_total{embedder="m"} 4.0',
            'halimede_texts_cached_total{embedder="m"} 1.0',
            'halimede_call_seconds_count{embedder="m"} 2.0',
            'halimede_call_seconds_bucket{embedder="m",le="30"} 2.0',
            'halimede_call_seconds_bucket{embedder="m",le="+Inf"} 2.0',
            'halimede_provider_requests_total{embedder="m",provider="hash:hash"} 2.0',
            'halimede_cache_hits_total{embedder="m",tier="memory"} 1.0',
        ):
            assert line in text, line
        second.unregister()
        assert 'embedder="m-2"' not in generate_latest(registry).decode()
        assert prometheus.register(other, registry).name == "m-2"
        second.unregister()  # it ended before; this is another registration
        second.unregister()


def test_opentelemetry_spans_hold_facts_and_no_text(tracers: Any) -> None:
    """Each call is a span, child of the caller's, with model and space; an error by its class."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    with Embedder(config=HASH) as embedder:
        with trace.get_tracer("test").start_as_current_span("caller"):
            embedder.embed(["xylophone"])
        with pytest.raises(InvalidInput):
            embedder.embed("xylophone", dimensions=0)
    good, caller, bad = exporter.get_finished_spans()
    assert good.attributes["halimede.texts"] == 1
    assert good.attributes["halimede.provider"] == "hash"
    assert good.parent.span_id == caller.context.span_id
    assert bad.attributes["error.type"] == "InvalidDimensions"
    assert "xylophone" not in good.to_json() + bad.to_json()


def test_a_closed_embedder_says_so() -> None:
    """After close, a call is refused in words."""
    embedder = Embedder(config=HASH)
    embedder.close()
    with pytest.raises(HalimedeError, match="is closed"):
        embedder.embed("a")


def test_a_program_that_forgets_to_close_ends_in_silence() -> None:
    """Without close, with a server down and probes under way, the program ends with no noise."""
    address = f"127.0.0.1:{free_options().grpc_port}"
    code = f"""
from halimede import Embedder, ServerUnreachable
for url in ("{address}", "http://{address}"):
    embedder = Embedder(url)
    for _ in range(3):
        try:
            embedder.embed("a")
        except ServerUnreachable:
            pass
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupt_ends_a_blocking_call(server: wheel.Server) -> None:
    """Ctrl-C in a long call raises KeyboardInterrupt at once, and the embedder goes on."""
    with Embedder(server.grpc_address, MODEL) as embedder:
        embedder.embed("warm")

        def sent() -> dict[str, Any]:
            return embedder.stats()["providers"][f"triton:{MODEL}"]

        def interrupt_midway() -> None:
            while sent()["requests"] < 3:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            threading.Thread(target=interrupt_midway, daemon=True).start()
            embedder.embed(["word " * 100] * 3000)
        assert sent()["texts"] < 3000
        assert len(embedder.embed("still here")) == 1
