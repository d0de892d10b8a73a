"""The client in processes of every kind: forked, patched by gevent, exiting, interrupted.

Each test runs a real program against a real server, or against the model in its own process, and
the program has a time limit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import NAMES

from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

LIMIT_S = 120
"""For programs that take a few seconds: a hang is found, a busy machine is not blamed."""
OURS = ("grpc", "http", "onnx")

Run = Callable[..., str]


@pytest.fixture(params=OURS)
def configured(request: pytest.FixtureRequest, server: wheel.Server, settings: Settings) -> str:
    """The source text of an embedder's configuration, for each provider of built models."""
    name = NAMES["int8"]
    model = {
        "grpc": {"provider": "triton", "model_id": name, "url": server.grpc_address},
        "http": {"provider": "triton", "model_id": name, "url": f"http://{server.http_address}"},
        "onnx": {"provider": "onnx", "model_id": name, "path": str(settings.repository)},
    }[request.param]
    return repr({"models": {"m": model}})


def run(code: str, *arguments: str, **environment: str) -> str:
    """Return what a program prints. It must end in time, without error and without noise."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, **environment},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


FORKED = """
import os, signal, sys
from halimede import Embedder
embedder = Embedder(config=CONFIG)
expected = embedder.embed("a").vectors
for attempt in range(3):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        USE
        END
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, attempt
    assert (embedder.embed("a").vectors == expected).all()
embedder.close()
"""


@pytest.mark.parametrize(
    "use",
    [
        'assert abs(embedder.embed("a").vectors - expected).max() < 1e-5',
        'assert abs(Embedder(config=CONFIG).embed("a").vectors - expected).max() < 1e-5',
        "embedder.close()",
        "pass",
    ],
    ids=["its parent's embedder", "an embedder of its own", "close", "nothing"],
)
@pytest.mark.parametrize("end", ["os._exit(0)", "sys.exit(0)"])
def test_a_forked_child_embeds_and_ends(configured: str, use: str, end: str) -> None:
    """After a fork, parent and child both embed, close and exit."""
    code = FORKED.replace("USE", use).replace("END", end).replace("CONFIG", configured)
    run(code)


def test_a_fork_beside_calls_in_other_threads(configured: str) -> None:
    """A process that forks while its threads embed: every child embeds."""
    code = f"""
import os, signal, threading
from halimede import Embedder
embedder = Embedder(config={configured})
embedder.embed("a")
stop = threading.Event()
def load():
    while not stop.is_set():
        embedder.embed("beside")
threads = [threading.Thread(target=load) for _ in range(4)]
for thread in threads:
    thread.start()
for attempt in range(5):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        with embedder:
            embedder.embed("a")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, attempt
stop.set()
for thread in threads:
    thread.join()
"""
    run(code)


def test_a_process_pool_that_forks(configured: str) -> None:
    """multiprocessing's fork and spawn, with an embedder passed to the workers."""
    code = f"""
import multiprocessing, sys
from halimede import Embedder
def dims(embedder):
    return embedder.embed("a").dims
if __name__ == "__main__":
    with Embedder(config={configured}) as embedder:
        embedder.embed("a")
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(dims, [embedder] * 4) == [384] * 4
"""
    run(code)


def test_pickled_and_copied(configured: str) -> None:
    """A pickled or copied embedder has the same configuration and opens its own connections."""
    code = f"""
import copy, pickle
from halimede import AsyncEmbedder, Embedder
with Embedder(config={configured}) as embedder:
    expected = embedder.embed("a").vectors
    for other in (pickle.loads(pickle.dumps(embedder)), copy.deepcopy(embedder)):
        with other:
            assert other.config == embedder.config
            assert abs(other.embed("a").vectors - expected).max() < 1e-5
assert pickle.loads(pickle.dumps(AsyncEmbedder(config={configured}))).config == embedder.config
"""
    run(code)


def test_under_gevent(configured: str) -> None:
    """After `monkey.patch_all()` calls are answered, and greenlets run meanwhile."""
    code = f"""
from gevent import monkey
monkey.patch_all()
import gevent
from halimede import Embedder
ticks = 0
def tick():
    global ticks
    while True:
        gevent.sleep(0.001)
        ticks += 1
with gevent.Timeout(60):
    with Embedder(config={configured}) as embedder:
        embedder.embed("warm")
        ticking = gevent.spawn(tick)
        jobs = [gevent.spawn(embedder.embed, [f"text {{index}}"] * 3) for index in range(20)]
        gevent.joinall(jobs, raise_error=True)
        ticking.kill()
        assert len(list(embedder.embed_iter(f"text {{index}}" for index in range(3000)))) == 3
print(ticks > 0)
"""
    # A model that runs in this process holds its only thread.
    assert run(code) == "True\n" or "'onnx'" in configured


@pytest.mark.parametrize("registered", ["before", "after"])
def test_in_an_atexit_handler(configured: str, registered: str) -> None:
    """An exit handler embeds and closes, whether it was registered before or after the import."""
    register = """
import atexit
@atexit.register
def last():
    print(embedder.embed("bye").dims, Embedder(config=CONFIG).embed(["a", "b"]).dims)
    embedder.close()
"""
    use = """
from halimede import Embedder
embedder = Embedder(config=CONFIG)
embedder.embed("a")
"""
    code = register + use if registered == "before" else use + register
    assert run(code.replace("CONFIG", configured)) == "384 384\n"


def test_closed_by_a_finaliser(configured: str) -> None:
    """`close()` in `__del__`, during a collection and at the end of the program, returns."""
    code = f"""
import gc
from halimede import Embedder
class Holder:
    def __init__(self):
        self.me = self
        self.embedder = Embedder(config={configured})
        self.embedder.embed("a")
    def __del__(self):
        self.embedder.close()
Holder()
gc.collect()
last = Holder()
"""
    run(code)


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(0)", "embedder.close()"])
def test_what_was_embedded_is_on_disk_after_any_exit(
    configured: str, tmp_path: Path, end: str
) -> None:
    """Without `close()` too, all of 100 embedded texts are found by the next program."""
    cached = configured[:-1] + f", 'cache': {{'disk': {{'path': {str(tmp_path)!r}}}}}}}"
    code = f"""
from halimede import Embedder
embedder = Embedder(config={cached})
print(int(embedder.embed([f"text {{index}}" for index in range(100)]).cached.sum()))
{end}
"""
    assert (run(code), run(code)) == ("0\n", "100\n")


def test_two_event_loops_one_after_the_other(configured: str) -> None:
    """One AsyncEmbedder is used from two loops in turn, and from two threads' loops at once."""
    code = f"""
import asyncio, threading
from halimede import AsyncEmbedder
embedder = AsyncEmbedder(config={configured})
async def many():
    results = await asyncio.gather(*[embedder.embed(f"text {{index}}") for index in range(50)])
    assert all(result.dims == 384 for result in results)
asyncio.run(many())
asyncio.run(many())
threads = [threading.Thread(target=lambda: asyncio.run(many())) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
asyncio.run(embedder.close())
"""
    run(code)


def test_a_blocking_call_on_a_running_loop(configured: str) -> None:
    """As in a notebook, a blocking call made by a coroutine returns."""
    code = f"""
import asyncio
from halimede import Embedder
async def cell():
    with Embedder(config={configured}) as embedder:
        return embedder.embed(["a", "b"]).dims
print(asyncio.run(cell()))
"""
    assert run(code) == "384\n"


def test_in_jupyter(configured: str) -> None:
    """Cells of a real kernel embed, blocking and with await, and interrupting a cell works."""
    from jupyter_client.manager import start_new_kernel

    cells = [
        f"from halimede import AsyncEmbedder, Embedder\nembedder = Embedder(config={configured})",
        "assert embedder.embed('a').dims == 384",
        f"other = AsyncEmbedder(config={configured})\nassert (await other.embed('a')).dims == 384",
        "embedder.close()\nawait other.close()",
    ]
    manager, client = start_new_kernel(startup_timeout=LIMIT_S, extra_arguments=["--quiet"])
    try:
        for cell in cells:
            reply = client.execute_interactive(cell, timeout=LIMIT_S)
            assert reply["content"]["status"] == "ok", reply["content"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_ctrl_c_ends_a_program_at_once(configured: str) -> None:
    """SIGINT during a long call raises KeyboardInterrupt within a few seconds."""
    code = f"""
from halimede import Embedder
embedder = Embedder(config={configured})
embedder.embed("warm")
print("ready", flush=True)
try:
    embedder.embed(["word " * 200] * 20_000)
except KeyboardInterrupt:
    print("interrupted", embedder.embed("still here").dims)
"""
    program = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    time.sleep(1)
    program.send_signal(signal.SIGINT)
    out, errors = program.communicate(timeout=LIMIT_S)
    assert (program.returncode, out, errors) == (0, "interrupted 384\n", "")


def test_close_under_load(configured: str) -> None:
    """Calls in 16 threads at the moment of `close()` end in a result or in words, and nothing
    runs after it.
    """
    code = f"""
import threading, time
from collections import Counter
from halimede import Embedder, HalimedeError
outcomes = Counter()
before = threading.active_count()
def calls():
    while True:
        try:
            embedder.embed(["word " * 20] * 40)
            outcomes["answered"] += 1
        except HalimedeError as error:
            outcomes[str(error)] += 1
            return
embedder = Embedder(config={configured})
embedder.embed("warm")
threads = [threading.Thread(target=calls) for _ in range(16)]
for thread in threads:
    thread.start()
time.sleep(1)
embedder.close()
for thread in threads:
    thread.join(20)
assert not any(thread.is_alive() for thread in threads)
outcomes.pop("answered", 0)
assert outcomes == {{"this embedder is closed. Open another.": 16}}, outcomes
until = time.monotonic() + 30  # an answer that was under way is still read
while threading.active_count() > before and time.monotonic() < until:
    time.sleep(0.1)
assert threading.active_count() == before, threading.enumerate()
"""
    run(code)
