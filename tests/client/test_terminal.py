"""The command line with streams that are closed, broken or full, and with names of others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from halimede import Embedder, InvalidConfig
from halimede.cli.printing import printable

CLI = f"{sys.executable} -c 'from halimede.cli import main; main()'"
DEVELOPMENT = "models: {a: {provider: hash, model_id: a}}\n"


def run(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "c.yaml").write_text(DEVELOPMENT)
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line.replace("halimede", CLI, 1)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("halimede embed --config c.yaml <&-", 1),
        ("halimede embed --config c.yaml a >/dev/full", 1),
        ("halimede config reference >/dev/full", 1),
        ("halimede config check c.yaml >/dev/full", 1),
        ("halimede embed --config c.yaml --npy none/x.npy a", 1),
        ("halimede embed --config c.yaml --npy /dev/full a", 1),
        ("halimede embed --timeout-s x a", 2),
        ("halimede embed --timeout-s -1 a", 1),
    ],
)
def test_a_stream_or_file_that_fails_is_one_line(line: str, code: int, tmp_path: Path) -> None:
    """A closed stdin, a full disk, a missing folder and a wrong number: no traceback."""
    done = run(line, tmp_path)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    if code == 1:
        assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    """A broken pipe and a closed stdout print nothing on stderr."""
    assert run("halimede config reference | true", tmp_path).stderr == ""
    assert "Traceback" not in run("halimede config reference >&-", tmp_path).stderr


def test_a_wrong_variable_is_named(tmp_path: Path) -> None:
    """A setting of the environment is one line that names the variable."""
    done = run("halimede store ls", tmp_path, HALIMEDE_TIMEOUT_S="30s")
    assert done.returncode == 1
    assert done.stderr.startswith("error: HALIMEDE_TIMEOUT_S: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "given", [{"timeout_s": "x"}, {"url": 5}, {"model": 3}, {"deadline_s": -1}, {"config": 5}]
)
def test_a_wrong_argument_is_named(given: dict[str, Any]) -> None:
    """A wrong argument is InvalidConfig, in one line that names it."""
    with pytest.raises(InvalidConfig, match=f"^{next(iter(given))}") as raised:
        Embedder(**given)
    assert "\n" not in str(raised.value)


def test_development_keeps_every_dimensions() -> None:
    """Hashes have the configured dimensions, also below 384; too many are one line."""
    for dimensions in (5, 384, 400):
        with Embedder(config=development(dimensions)) as embedder:
            assert embedder.embed("a").dims == dimensions
    with pytest.raises(InvalidConfig, match=r"^development\.dims"):
        Embedder(config=development(5000))


def development(dimensions: int) -> dict[str, Any]:
    model = {"provider": "triton", "model_id": "m", "dimensions": dimensions}
    return {"models": {"a": model}, "development": True}


def test_a_user_without_home_has_paths(tmp_path: Path) -> None:
    """Without HOME and an entry in passwd, the current folder stands in; ~ is one line."""
    code = (
        "import os; os.environ.pop('HOME', None); os.environ.pop('XDG_DATA_HOME', None);"
        "import pwd; pwd.getpwuid = lambda uid: {}[uid];"
        "from halimede.config import environment, file; environment.CHECKOUT = None;"
        "print(environment.Settings().home);"
        "from pathlib import Path; from halimede import InvalidConfig\n"
        "try: file.load(Path('~/c.yaml'))\n"
        "except InvalidConfig as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    home, message = done.stdout.splitlines()
    assert Path(home) == tmp_path / ".halimede" / "home"
    assert "no home" in message


def test_names_of_others_cannot_command_the_terminal() -> None:
    """Escape codes, bytes that are not UTF-8, and marks of direction are replaced."""
    assert printable("a\x1b[2J\udcff\u202eb\n") == "a\ufffd[2J\ufffd\ufffdb\ufffd"
    assert printable("Größe 日本.jpg") == "Größe 日本.jpg"


def test_config_check_refuses_a_cache_that_cannot_open(tmp_path: Path) -> None:
    """What the embedder would refuse is refused: here a variable that is not set."""
    (tmp_path / "d.yaml").write_text(DEVELOPMENT + "cache: {redis: {url_env: NO_SUCH_URL}}\n")
    done = run("halimede config check d.yaml", tmp_path)
    assert done.returncode == 1
    assert "NO_SUCH_URL" in done.stderr
