"""The wheel, installed outside any checkout: it builds, serves and embeds; nothing else is needed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import small_models
from conftest import MODEL, ROOT, free_options

from halimede_ops import vectors
from halimede_tools.settings import Settings

SAMPLE = "[-0.0345, 0.0310, 0.0067"


class Installed:
    """An environment of its own that has the wheel, and a home without anything of a checkout."""

    def __init__(self, folder: Path, wheel: Path, *requirements: str) -> None:
        self.home = folder / "home"
        self.data = self.home / ".local" / "share" / "halimede"
        self.data.mkdir(parents=True)
        self._bin = folder / "environment" / "bin"
        subprocess.run([sys.executable, "-m", "venv", self._bin.parent], check=True)
        pip = [self._bin / "python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *requirements, wheel], check=True)

    def command(self, *words: str | Path) -> list[str]:
        return [str(self._bin / words[0]), *map(str, words[1:])]

    @property
    def environment(self) -> dict[str, str]:
        return {"HOME": str(self.home), "PATH": os.defpath}

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            cwd=self.home,
            env=self.environment,
            capture_output=True,
            text=True,
        )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as a release builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", folder, ROOT], check=True)
    [built] = folder.glob("halimede-*.whl")
    return built


@pytest.fixture(scope="module")
def whole(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """What builds and serves, with the exact versions that were tested together."""
    lock = ROOT / f"constraints-py3{sys.version_info.minor}.txt"
    folder = tmp_path_factory.mktemp("whole")
    extras = wheel.with_name(f"{wheel.name}[build,server]")
    yield Installed(folder, extras, "--constraint", str(lock))
    shutil.rmtree(folder / "environment")


@pytest.fixture(scope="module")
def client(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """A client alone, with NumPy 2 and onnxruntime as most programs have it."""
    folder = tmp_path_factory.mktemp("client")
    yield Installed(folder, wheel, "numpy>=2", "onnxruntime", "tokenizers")
    shutil.rmtree(folder / "environment")


def test_serve_ends_with_an_embedding(whole: Installed, settings: Settings) -> None:
    """`halimede serve` serves the default model from the user's data directory; what was built
    before is used, as the build itself is tested elsewhere."""
    models, unlocked = whole.data / "home" / "models", shutil.ignore_patterns(".lock")
    shutil.copytree(settings.models, models, copy_function=os.link, ignore=unlocked)
    shutil.copytree(settings.repository, whole.data / "model_repository", copy_function=os.link)
    options = free_options()
    ports = ["--http-port", options.http_port, "--grpc-port", options.grpc_port]
    words = [*ports, "--metrics-port", options.metrics_port]
    process = subprocess.Popen(
        whole.command("halimede", "serve", *map(str, words)),
        cwd=whole.home,
        env=whole.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    printed = ""
    for line in process.stderr:
        printed += line
        if "Ctrl-C" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == 0, rest
    assert f"ready  {MODEL}" in printed
    assert SAMPLE in printed


def test_build_takes_a_folder(whole: Installed, tmp_path: Path) -> None:
    """`halimede build ./folder --name x` writes to the user's data directory."""
    folder = small_models.bert(tmp_path / "folder")
    done = whole.run("halimede", "build", folder, "--name", "x", "--precisions", "fp32")
    assert done.returncode == 0, done.stderr
    assert (whole.data / "model_repository" / "x" / "config.pbtxt").exists()


def test_nothing_of_the_package_is_left_out(whole: Installed) -> None:
    """Every module of the checkout is importable, or lies with the backends; types are marked."""
    code = "import halimede, pathlib; print(pathlib.Path(halimede.__file__).parents[1])"
    site = Path(whole.run("python", "-c", code).stdout.strip())
    for folder in ("client", "python_backend", "tools"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                name = path.relative_to(ROOT / folder)
                assert (site / name).exists() or (site / "halimede_backends" / name).exists(), name
    assert (site / "halimede" / "py.typed").exists()


def test_version_and_completion(client: Installed) -> None:
    """The command says its version, and gives what a shell needs to complete it."""
    assert client.run("halimede", "--version").stdout.startswith("halimede ")
    shown = client.run("halimede", "--show-completion", "bash")
    assert shown.returncode == 0, shown.stderr
    assert "_HALIMEDE_COMPLETE" in shown.stdout


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["build"], "build"),
        (["serve"], "server"),
        (["bench"], "server,build"),
        (["tune"], "server,build"),
        (["soak"], "server,build"),
        (["fusion", "untrained", "--image", "clip"], "build"),
    ],
)
def test_a_missing_extra_is_named(client: Installed, words: list[str], extra: str) -> None:
    """A verb whose packages are not installed says which extra brings them."""
    done = client.run("halimede", *words)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"pip install 'halimede[{extra}]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_client_embeds_with_numpy_2_and_plain_onnxruntime(
    client: Installed, settings: Settings, expected: np.ndarray, texts: list[str]
) -> None:
    """In process, from the built repository, it gives sentence-transformers' vectors."""
    code = (
        "import sys, json, numpy; from halimede import Embedder; "
        "assert numpy.__version__ >= '2'; "
        "model = dict(provider='onnx', model_id=sys.argv[1], path=sys.argv[2]); "
        "from halimede.config.file import parse; "
        "embedder = Embedder(config=parse({'models': {'local': model}})); "
        "print(json.dumps(embedder.embed(json.load(open(sys.argv[3]))).vectors.tolist()))"
    )
    import json

    asked = client.home / "texts.json"
    asked.write_text(json.dumps(texts[-20:]))
    done = client.run("python", "-c", code, MODEL, settings.repository, asked)
    assert done.returncode == 0, done.stderr
    embedded = np.array(json.loads(done.stdout.splitlines()[-1]), np.float32)
    assert vectors.cosine(embedded, expected[-20:]).min() > 0.99999
