"""`halimede serve` as a user runs it: start, stop, and plain errors."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import psutil
import pytest
from conftest import MODEL, ROOT, family, free_options, version_folder, wait_until

from halimede_engine.cores import Cores
from halimede_ops.errors import ServeError
from halimede_tools.serve import shared_memory, supervise, wheel
from halimede_tools.settings import Settings

STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """A test that fails leaves no server behind for the next one."""
    yield
    while STARTED:
        STARTED.pop().kill()


def start(
    options: wheel.Options, *more: str, within: Sequence[str] = (), **environment: str
) -> subprocess.Popen[str]:
    """`halimede serve` with these ports and the FP32 model alone, run by the command `within`.

    A test run under nohup ignores SIGHUP, and so would what it starts: `env` undoes that. A
    preexec_fn would fork this process, whose gRPC can crash the child before it is a program.
    """
    command = [
        *within,
        "env",
        "--default-signal=HUP",
        sys.executable,
        "-m",
        "halimede",
        "serve",
        "--models",
        MODEL,
    ]
    command += ["--http-port", str(options.http_port), "--grpc-port", str(options.grpc_port)]
    command += ["--metrics-port", str(options.metrics_port), *more]
    STARTED.append(
        subprocess.Popen(
            command,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
    )
    return STARTED[-1]


def read_until(process: subprocess.Popen[str], mark: str) -> str:
    """What the process prints, up to the line with `mark`."""
    printed = ""
    assert process.stderr is not None
    for line in process.stderr:
        printed += line
        if mark in line:
            return printed
    raise AssertionError(f"{mark!r} was not printed:\n{printed}")


STOPS_WITHIN_S = 8
"""Triton takes 2 s; its exit timeout, for which idle connections would keep it, is 30 s."""
IN_BACKGROUND = ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")
"""A shell without job control ignores SIGINT for what it starts with `&`."""


@contextlib.contextmanager
def idle_connection(address: str) -> Iterator[None]:
    """An HTTP client that has its answer and keeps its connection."""
    with contextlib.closing(HTTPConnection(address)) as connection:
        connection.request("GET", "/v2/health/ready")
        assert connection.getresponse().read() == b""
        yield


@pytest.mark.parametrize(
    ("sent", "host", "address"),
    [
        (signal.SIGINT, "localhost", "127.0.0.1"),
        (signal.SIGTERM, "::1", "[::1]"),
        (signal.SIGHUP, "0.0.0.0", "127.0.0.1"),  # noqa: S104
    ],
    ids=["Ctrl-C", "SIGTERM", "SIGHUP"],
)
def test_serve_shows_a_sample_and_stops_every_child(
    sent: signal.Signals, host: str, address: str
) -> None:
    """It prints a vector, the addresses and a curl command. A signal ends it and its children in
    seconds, also with idle clients, and where a shell ignores Ctrl-C for it.
    """
    options = free_options()
    process = start(options, "--host", host, within=IN_BACKGROUND)
    printed = read_until(process, "Ctrl-C")
    assert "[-0.0345, 0.0310, 0.0067" in printed
    assert f"gRPC     {address}:{options.grpc_port}" in printed
    curl = f"curl -s http://{address}:{options.http_port}/v2/models/{MODEL}/infer -d "
    [command] = [line for line in printed.splitlines() if curl in line]
    assert '"outputs":' in subprocess.check_output(["sh", "-c", command], text=True)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("tritonserver" in child.name() for child in children)
    with idle_connection(f"{address}:{options.http_port}"):
        process.send_signal(sent)
        assert process.wait(STOPS_WITHIN_S) == 0
    assert not psutil.wait_procs(children, timeout=30)[1]
    assert not list(Path("/dev/shm").glob(f"halimede-{process.pid}-*"))


def test_cores_are_those_of_the_cgroup(one_cpu: Path) -> None:
    """With a quota of one CPU, the server says so at its start."""
    join = ["sh", "-c", f'echo $$ > {one_cpu} && exec "$0" "$@"']
    process = start(free_options(), within=join)
    printed = read_until(process, "Ctrl-C")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    expected = f"  CPU      {Cores(os.cpu_count() or 1, len(os.sched_getaffinity(0)), 1)}\n"
    assert expected in printed


def test_exec_names_the_cores(one_cpu: Path) -> None:
    """`serve --exec` prints them before it becomes Triton."""
    join = ["sh", "-c", f'echo $$ > {one_cpu} && exec "$0" "$@"']
    process = start(free_options(), "--exec", within=join)
    printed = read_until(process, "CPU: ")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert printed.startswith("CPU: 1 core")


def test_exec_stops_in_seconds_with_an_idle_client() -> None:
    """Triton itself, as in a container: the process that watches it closes idle connections."""
    options = free_options()
    process = start(options, "--exec", within=IN_BACKGROUND)
    assert wheel.is_ready_within(60, Ready(process), options.http_address)
    children = psutil.Process(process.pid).children(recursive=True)
    with idle_connection(options.http_address):
        process.send_signal(signal.SIGINT)
        process.wait(STOPS_WITHIN_S)
    assert not psutil.wait_procs(children, timeout=5)[1]


class Ready:
    """A process as `is_ready_within` looks at it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def is_running(self) -> bool:
        return self._process.poll() is None

    def has_lost_a_process(self) -> bool:
        return False


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_requests_under_way_are_answered_when_the_server_stops(
    settings: Settings, tmp_path: Path, scheme: str
) -> None:
    """A request of seconds that has begun is answered; the connections of others are closed."""
    from halimede import Embedder

    options = free_options(models=(MODEL,))
    texts = [f"{'word ' * 200} {index}" for index in range(60)]
    with wheel.serve(settings.repository, settings.python_backend, tmp_path, options) as server:
        address = server.grpc_address if scheme == "grpc" else server.http_address
        with Embedder(f"{scheme}://{address}", MODEL) as embedder, ThreadPoolExecutor(1) as caller:
            embedder.embed("warm")
            with idle_connection(server.http_address):
                answer = caller.submit(embedder.embed, texts)
                time.sleep(0.5)
                assert not answer.done()
                server.stop()
            assert answer.result().vectors.shape == (len(texts), 384)


@pytest.mark.parametrize("sent", [signal.SIGHUP, signal.SIGKILL], ids=["SIGHUP", "SIGKILL"])
def test_a_launcher_that_ends_while_triton_starts_leaves_nothing(sent: signal.Signals) -> None:
    """Triton's backends do not notice that Triton ends while they start: they are killed."""
    process = start(free_options())
    launcher = psutil.Process(process.pid)
    wait_until(lambda: any("stub" in one.name() for one in launcher.children(recursive=True)))
    children = launcher.children(recursive=True)
    process.send_signal(sent)
    process.wait(60)
    assert not psutil.wait_procs(children, timeout=40)[1]
    assert not list(shared_memory.FOLDER.glob(f"halimede-{process.pid}-*"))


def test_a_signal_within_a_callback_of_a_library_stops_it_too() -> None:
    """Python drops what a signal's handler raises there, so the wait for the end asks again."""

    class Running:
        def is_running(self) -> bool:
            return True

    with supervise._interrupted_by_signals() as interrupted:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            supervise._wait_for_end(Running(), interrupted)  # type: ignore[arg-type]


def test_a_killed_launcher_takes_triton_with_it() -> None:
    """SIGKILL of the launcher ends the server, too."""
    process = start(free_options())
    read_until(process, "Ctrl-C")
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(children, timeout=40)[1]


def test_taken_port_is_named() -> None:
    """A taken port: one line names the port and the flag that changes it."""
    options = free_options()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", options.http_port))
        taken.listen()
        process = start(options)
        _, printed = process.communicate(timeout=60)
    assert process.returncode == 1
    assert printed == (
        f"error: HTTP port {options.http_port} on 127.0.0.1 is taken. Stop what uses it, or "
        "choose another with --http-port.\n"
    )


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (("--http-port", "70000"), "HTTP port is 70000; give 1 to 65535 with --http-port."),
        (("--grpc-port", "-1"), "gRPC port is -1; give 1 to 65535 with --grpc-port."),
        (("--metrics-port", "0"), "metrics port is 0; give 1 to 65535 with --metrics-port."),
        (("--http-port", "70000", "--exec"), "HTTP port is 70000; give 1 to 65535 with"),
        (("--http-port", "70000", "--runtime", "docker"), "HTTP port is 70000; give 1 to 65535"),
        (("--host", "no-such-host.invalid"), "host 'no-such-host.invalid' has no address: "),
        (("--host", ""), "host '' has no address: "),
        (("--host", "a..b"), "host 'a..b' has no address: "),
        (("--host", "fe80::1"), "host 'fe80::1' is the link-local address fe80::1, which Triton"),
        (("--host", "192.0.2.1"), "192.0.2.1 is not an address of this machine. Give one of its"),
        (("--host", "2001:db8::1"), "2001:db8::1 is not an address of this machine. Give one of"),
    ],
)
def test_an_address_that_cannot_be_listened_on_is_one_line(
    given: Sequence[str], error: str
) -> None:
    """It names the option or the address, and says what to give instead."""
    process = start(free_options(), *given)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 1
    assert printed.startswith(f"error: {error}")
    assert printed.count("\n") == 1


def test_two_endpoints_on_one_port_are_refused() -> None:
    with pytest.raises(ServeError, match="HTTP and gRPC have the same port 8001; give another"):
        wheel.Options(http_port=8001)


def test_a_host_name_becomes_an_address_and_ipv6_is_written_as_triton_takes_it() -> None:
    """Its HTTP server takes no names, its gRPC server brackets, its HTTP servers a prefix."""
    assert "--http-address=127.0.0.1" in wheel.Options(host="localhost").arguments()
    options = wheel.Options(host="::1")
    assert {a for a in options.arguments() if "address" in a} == {
        "--http-address=ipv6:::1", "--grpc-address=[::1]", "--metrics-address=ipv6:::1"
    }  # fmt: skip
    assert wheel.Options(host="[::1]").host == "::1"
    assert (options.http_address, options.grpc_address) == ("[::1]:8000", "[::1]:8001")
    assert wheel.Options(host="0.0.0.0").http_address == "127.0.0.1:8000"  # noqa: S104
    assert wheel.Options(host="::").metrics_address == "[::1]:8002"


@pytest.mark.parametrize(
    ("host", "is_open"),
    [("localhost", True), ("::1", True), ("127.0.0.2", True), ("0.0.0.0", False), ("::", False)],
)
def test_model_control_is_open_on_loopback_only(host: str, is_open: bool) -> None:
    assert (wheel.Options(host=host).control_key == "") == is_open


def test_unknown_model_lists_the_served() -> None:
    """An unknown model: one line lists the models of the repository."""
    process = start(free_options(), "--models", "no-such-model")
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 1
    assert printed.startswith("error: 'no-such-model' is not in the repository; it has: all-")
    assert printed.count("\n") == 1


def test_a_model_that_does_not_load_is_named(settings: Settings, tmp_path: Path) -> None:
    """A damaged model.onnx: one line names the model and says what to do."""
    damaged = tmp_path / "repository"
    shutil.copytree(settings.repository, damaged)
    onnx = version_folder(damaged / f"{MODEL}-onnx") / "model.onnx"
    onnx.unlink()
    onnx.write_bytes(b"damaged")
    process = start(free_options(), HALIMEDE_REPOSITORY=str(damaged))
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 1
    assert printed.startswith(f"error: model {MODEL} did not load: model.onnx is not")
    assert "build the model again" in printed
    assert printed.count("\n") == 1


SHELL_CHARACTERS = "a folder; echo: 'of $HOME\""
"""What a shell would split, expand or run, and what separates the folders of LD_LIBRARY_PATH."""


def test_paths_that_a_shell_would_not_read_as_one_word(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton starts its backends through a shell. Any folder serves all the same, and the links
    that make it possible end with the server.
    """
    folder = tmp_path / SHELL_CHARACTERS
    shutil.copytree(settings.repository, folder / "repository", copy_function=os.link)
    shutil.copytree(wheel.wheel_libraries(), folder / "libs", copy_function=os.link)
    monkeypatch.setattr(wheel, "wheel_libraries", lambda: folder / "libs")
    options = free_options(models=(MODEL,))
    with wheel.serve(folder / "repository", settings.python_backend, folder, options):
        assert list(shared_memory.FOLDER.glob(f"halimede-*-{options.grpc_port}-repository-*"))
    assert not list(shared_memory.FOLDER.glob(f"halimede-*-{options.grpc_port}-*"))


def test_a_backend_that_cannot_start_ends_the_wait(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the wheel's libraries the stub dies at once: the error says why, without the wait for
    the time limit.
    """
    began = time.monotonic()
    monkeypatch.setattr(wheel, "wheel_libraries", lambda: tmp_path)
    with pytest.raises(ServeError, match="a process of Triton's Python backend died: .*libcudart"):
        with wheel.serve(
            settings.repository, settings.python_backend, tmp_path, free_options(models=(MODEL,))
        ):
            pass
    assert time.monotonic() - began < wheel.READY_TIMEOUT_S / 3


def test_a_model_name_that_a_shell_would_split_is_refused(
    settings: Settings, tmp_path: Path
) -> None:
    """A folder that was copied by hand. Triton would wait for its backends until the time limit."""
    shutil.copytree(settings.repository / MODEL, tmp_path / "my model", copy_function=os.link)
    with pytest.raises(ServeError, match="'my model' has a character that a shell interprets"):
        wheel.check_models(tmp_path, free_options())


def halimede(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "halimede", *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [("build",), ("serve",), ("serve", "--exec")], ids=" ".join)
@pytest.mark.parametrize("home", ["file", "file/below", "/sys/none"])
def test_a_home_that_cannot_be_written_is_named(
    tmp_path: Path, home: str, arguments: tuple[str, ...]
) -> None:
    """A file, a folder below a file, and a folder that nobody can make: one line, with what to do."""
    (tmp_path / "file").touch()
    options = free_options()
    ports = ("--http-port", str(options.http_port), "--grpc-port", str(options.grpc_port))
    ports += ("--metrics-port", str(options.metrics_port))
    given = arguments if arguments == ("build",) else (*arguments, *ports)
    done = halimede(*given, HALIMEDE_HOME=str(tmp_path / home))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / home}")
    assert " cannot be written: " in done.stderr
    assert "or set HALIMEDE_HOME to another folder." in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_home_on_a_read_only_file_system(settings: Settings, tmp_path: Path) -> None:
    """What only reads works; what writes names the folder in one line, and the setting of it."""
    mount = f"mount --bind {settings.home} {tmp_path} && mount -o remount,ro,bind {tmp_path}"
    script = f'{mount}; for c in "store ls" "store prune --limit-gib 0" "build" "serve" "tune"'
    script += f'; do echo "== $c" >&2; {sys.executable} -m halimede $c; done'
    environment = {"HALIMEDE_HOME": str(tmp_path), "HALIMEDE_REPOSITORY": str(tmp_path / "none")}
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    answers = dict(part.split("\n", 1) for part in done.stderr.split("== ")[1:])
    assert MODEL in done.stdout
    assert answers["store ls"] == ""
    for command in ("build", "serve"):
        assert answers[command].startswith(f"error: {tmp_path}/none cannot be written: Read-only")
        assert "or set HALIMEDE_REPOSITORY to another folder." in answers[command]
        assert answers[command].count("\n") == 1
    assert "Traceback" not in done.stderr
    assert "the output cannot be written" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="another user needs root")
def test_another_users_shared_memory_is_left_alone() -> None:
    """What a killed server of another user left in /dev/shm does not stop this user's server."""
    port = free_options().grpc_port
    left = [shared_memory.FOLDER / f"halimede-{pid}-{port}-left" for pid in (999_999_999, "name")]
    for entry in left:
        entry.touch()
    try:
        code = f"""
import os
from halimede_tools.serve import shared_memory
os.setuid(65534)
shared_memory.remove_stale({port})
shared_memory.remove("halimede-999999999-{port}-")
"""
        subprocess.run([sys.executable, "-c", code], check=True)
        assert all(entry.exists() for entry in left)
        shared_memory.remove_stale(port)
        assert not any(entry.exists() for entry in left)
    finally:
        for entry in left:
            entry.unlink(missing_ok=True)


def test_missing_libpython_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a shared libpython, the error names its Debian package."""
    import sysconfig

    # A library name that does not exist is the same as a Python without a shared library.
    monkeypatch.setitem(sysconfig.get_config_vars(), "INSTSONAME", "libpython-none.so.1.0")
    with pytest.raises(ServeError, match="apt-get install libpython3"):
        wheel.libpython()


def test_unbuilt_model_says_how(settings: Settings, tmp_path: Path) -> None:
    """A repository with configs only, as in git: the error says how to build it."""
    folder = tmp_path / MODEL
    folder.mkdir()
    shutil.copy(settings.repository / MODEL / "config.pbtxt", folder)
    with pytest.raises(ServeError, match="make build"):
        with wheel.serve(tmp_path, settings.python_backend, tmp_path, free_options()):
            pass


def test_log_levels(settings: Settings) -> None:
    """Each level enables itself and the more severe levels. An unknown level is an error."""
    assert "--log-info=false" in wheel.Options(log_level="warning").arguments()
    assert "--log-verbose=1" in wheel.Options(log_level="verbose").arguments()
    with pytest.raises(ServeError, match="use one of error, warning, info, verbose"):
        wheel.Options(log_level="loud").arguments()


def test_loopback_by_default() -> None:
    """By default the server listens on loopback only."""
    arguments = wheel.Options().arguments()
    assert {a for a in arguments if "address" in a} == {
        "--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1"
    }  # fmt: skip


def test_ready_means_fast(settings: Settings, tmp_path: Path) -> None:
    """Models are warm when the server is ready: the first request takes at most 10 times the CPU
    time of the median.
    """
    from halimede import Embedder

    options = free_options(models=(MODEL,))
    with wheel.serve(settings.repository, settings.python_backend, tmp_path, options) as server:
        with Embedder(server.grpc_address) as embedder:
            embedder.model  # noqa: B018 - connect first
            took_s = []
            for _ in range(10):
                began_s = cpu_s(server.process.pid)
                embedder.embed("a first text")
                took_s.append(cpu_s(server.process.pid) - began_s)
    assert took_s[0] <= 10 * sorted(took_s)[5]


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and its children so far."""
    # Linux has a clock of each process (clock_getcpuclockid), finer than what /proc tells.
    return sum(time.clock_gettime((~process.pid << 3) | 2) for process in family(pid))


def test_precisions_that_are_built_meanwhile_join_the_server(
    settings: Settings, tmp_path: Path
) -> None:
    """A repository without versions is served from FP32; FP16 and INT8 join the running server."""
    from halimede import Embedder

    home, repository = tmp_path / "home", tmp_path / "repository"
    unlocked = shutil.ignore_patterns(".lock")
    shutil.copytree(settings.models, home / "models", copy_function=os.link, ignore=unlocked)
    for config in settings.repository.glob(f"{MODEL}*/config.pbtxt"):
        unbuilt = shutil.ignore_patterns("[0-9]*", "warmup")
        shutil.copytree(config.parent, repository / config.parent.name, ignore=unbuilt)
    options = free_options()
    variables = {"HALIMEDE_HOME": str(home), "HALIMEDE_REPOSITORY": str(repository)}
    process = start(options, "--models", "", **variables)
    watchdog = threading.Timer(300, process.kill)  # ends what waits for a line that never comes
    watchdog.start()
    marks = [f"ready  {MODEL}, fp32", f"joined {MODEL}-fp16", f"joined {MODEL}-int8"]
    printed = ""
    for line in process.stderr or ():
        printed += line
        if all(mark in printed for mark in marks):
            break
    assert [mark for mark in marks if mark not in printed] == []
    with Embedder(f"127.0.0.1:{options.grpc_port}", f"{MODEL}-int8") as embedder:
        assert embedder.embed("hello world").precision == "int8"
    watchdog.cancel()
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert not psutil.wait_procs(children, timeout=30)[1]
