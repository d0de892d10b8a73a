"""The configuration: what is read, what is refused and in which words, what goes before what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from halimede import Config, Embedder, InvalidConfig
from halimede.config import reference
from halimede.config.file import load, parse
from halimede.config.resolve import resolve
from halimede.providers import KINDS, open_providers

FULL = """
default_model: minilm
models:
  minilm:
    provider: triton
    model_id: all-MiniLM-L6-v2
    url: [127.0.0.1:8001, "http://127.0.0.1:8100"]
    dimensions: 256
    max_tokens: 256
    batch_size: 64
    timeout: 5
    cache_enabled: true
    cache_ttl: 3600
    retries: 1
    requests_per_s: 100
  local: {provider: onnx, model_id: all-MiniLM-L6-v2-int8, path: /srv/models, device: cpu}
  cloud:
    provider: openai
    model_id: text-embedding-3-small
    api_key_env: CLOUD_KEY
    other_space: true
fallback: [local, cloud]
min_cosine: 0.99
deadline: 60
cache:
  memory_mb: 64
  disk: {path: ~/.cache/halimede, max_mb: 512, ttl: 86400}
  redis: {url: "redis://127.0.0.1:6379/0", hot_ttl: 60}
"""


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("URL", "MODEL", "TIMEOUT_S", "DEADLINE_S", "CONFIG"):
        monkeypatch.delenv(f"HALIMEDE_{name}", raising=False)


def written(folder: Path, text: str) -> Path:
    path = folder / "halimede.yaml"
    path.write_text(text)
    return path


def test_every_key_is_read(tmp_path: Path) -> None:
    """Each key of the file arrives in the typed object, in its unit."""
    config = load(written(tmp_path, FULL))
    minilm, local, cloud = config.chain()
    assert (minilm.timeout_s, minilm.cache_ttl_s, minilm.batch_size) == (5, 3600, 64)
    assert len(minilm.url) == 2
    assert (local.provider, local.path, cloud.other_space) == ("onnx", Path("/srv/models"), True)
    assert (config.deadline_s, config.min_cosine) == (60, 0.99)
    assert config.cache.disk.ttl_s == 86400
    assert config.cache.redis.hot_ttl_s == 60
    tiers = config.cache.open().stats()["tiers"]
    assert list(tiers) == ["memory", "disk", "redis"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("default_model", "defaultmodel"), "defaultmodel is not known. Did you mean default_mod"),
        (("batch_size", "batchsize"), "models.minilm.batchsize is not known. Did you mean batch_s"),
        (("memory_mb", "memory"), "cache.memory is not known. Did you mean memory_mb?"),
        (("max_mb", "max_gb"), "cache.disk.max_gb is not known. Did you mean max_mb?"),
        (("provider: onnx", "provider: onxx"), "provider 'onxx' is unknown; use triton, onnx, se"),
        (("provider: onnx, ", ""), "models.local names no provider"),
        (("batch_size: 64", "batch_size: 0"), "models.minilm.batch_size: "),
        (("timeout: 5", "timeout: fast"), "models.minilm.timeout: "),
        (("device: cpu", "device: gpu"), "models.local.device: "),
        (("model_id: all-MiniLM-L6-v2\n", "\n"), "models.minilm.model_id: Field required"),
        (("[local,", "[locale,"), "'locale' is not among models: minilm, local, cloud. Did you"),
        (("127.0.0.1:8001", "ftp://x"), "models.minilm.url: url is 'ftp://x'; give host:port"),
        (("models:", "modules:"), "a configuration is a mapping with `models`"),
        (("deadline: 60", "deadline: ["), "the configuration is no YAML (line"),
    ],
)
def test_what_cannot_be_is_told(tmp_path: Path, change: tuple[str, str], told: str) -> None:
    """Each mistake is one line that names the place and the nearest key."""
    with pytest.raises(InvalidConfig) as raised:
        load(written(tmp_path, FULL.replace(*change, 1)))
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "line",
    [
        "    api_key: sk-1234567890",
        "    token: 'plain-secret'",
        "    password: plain-secret",
        "    model_id: sk-1234567890",
        "    url: http://user:plain-secret@host:1",
    ],
)
def test_secrets_are_refused_and_not_repeated(tmp_path: Path, line: str) -> None:
    """A key, token or password in the file is refused; the message names where one may be."""
    text = f"models:\n  m:\n    provider: openai\n{line}\n"
    with pytest.raises(InvalidConfig, match="api_key_env") as raised:
        load(written(tmp_path, text))
    assert "secret@" not in str(raised.value)
    assert "plain-secret" not in str(raised.value)
    assert "sk-1234567890" not in str(raised.value)


def test_a_secret_comes_from_the_environment_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """api_key_env and api_key_file name where the key is; a missing one is told by its name."""
    base = {"provider": "openai", "model_id": "text-embedding-3-small"}
    named = parse({"models": {"m": {**base, "api_key_env": "NO_SUCH_VARIABLE"}}}).chain()[0]
    with pytest.raises(InvalidConfig, match="NO_SUCH_VARIABLE"):
        open_providers(named)
    monkeypatch.setenv("NO_SUCH_VARIABLE", "from-environment")
    assert named.key("X") == "from-environment"
    file = tmp_path / "key"
    file.write_text("from-file\n")
    filed = parse({"models": {"m": {**base, "api_key_file": str(file)}}}).chain()[0]
    assert filed.key("X") == "from-file"
    file.unlink()
    with pytest.raises(InvalidConfig, match="api_key_file cannot be read"):
        open_providers(filed)
    missing = parse({"models": {"m": base}, "cache": {"redis": {"url_env": "NO_SUCH_URL"}}})
    with pytest.raises(InvalidConfig, match="NO_SUCH_URL"):
        missing.cache.open()


def test_argument_before_environment_before_file_before_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timeout and url of the default model, and the default model itself."""

    def timeouts(**given: Any) -> float:
        return resolve(**given).chain()[0].timeout_s

    path = written(tmp_path, FULL)
    assert timeouts() == 30
    assert timeouts(config=path) == 5
    monkeypatch.setenv("HALIMEDE_TIMEOUT_S", "7")
    monkeypatch.setenv("HALIMEDE_CONFIG", str(path))
    monkeypatch.setenv("HALIMEDE_URL", "127.0.0.1:9")
    assert timeouts() == 7
    assert timeouts(timeout_s=9) == 9
    assert resolve().chain()[0].url == ("127.0.0.1:9",)
    assert resolve(url=["127.0.0.1:1", "127.0.0.1:2"]).chain()[0].url[1] == "127.0.0.1:2"
    monkeypatch.delenv("HALIMEDE_URL")
    chain = resolve(model="local").chain()
    assert [options.provider for options in chain] == ["onnx", "openai"]
    with pytest.raises(InvalidConfig, match="is not among models"):
        resolve(model="minlm")
    with pytest.raises(InvalidConfig, match="of provider onnx"):
        resolve(model="local", url="127.0.0.1:1")


def test_development_mode_answers_without_any_model() -> None:
    """`development: true` gives the same vectors everywhere, in a space of their own."""
    config = {
        "models": {"m": {"provider": "triton", "model_id": "x", "dimensions": 512}},
        "development": True,
    }
    with Embedder(config=config) as one, Embedder(config=parse(config)) as two:
        first, second = one.embed("a"), two.embed("a")
    assert (first.provider, first.dims) == ("hash", 512)
    assert first.vectors.tobytes() == second.vectors.tobytes()
    assert first.space == second.space


def test_a_config_is_made_in_code_as_well() -> None:
    """A Config object, a mapping and a path are all taken."""
    made = parse({"models": {"m": {"provider": "hash"}}})
    assert isinstance(made, Config)
    with Embedder(config=made) as embedder:
        assert embedder.embed("a").provider == "hash"
    with pytest.raises(InvalidConfig, match="cannot be read"):
        Embedder(config="/no/such/file.yaml")


def test_every_provider_has_options() -> None:
    """Each kind refuses an unknown key by its own keys."""
    for kind in KINDS:
        with pytest.raises(InvalidConfig, match=r"models\.m\.modelid is not known\. Did you mean"):
            parse({"models": {"m": {"provider": kind, "modelid": "x"}}})


def test_every_key_is_in_the_reference_with_its_meaning() -> None:
    """docs/reference/configuration.md is what `halimede config reference` prints, and no key of
    the file or the environment is without a description.
    """
    page = (ROOT / "docs" / "reference" / "configuration.md").read_text("utf-8")
    assert page == reference.markdown(), "run: halimede config reference > " + (
        "docs/reference/configuration.md"
    )
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert [row for row in rows if row[-1].strip(" |") == ""] == []
    keys = {row[0].strip("| `") for row in rows}
    assert {"default_model", "model_id", "ca_file", "hot_ttl", "allow_http", "streams"} <= keys
    assert {"HALIMEDE_URL", "HALIMEDE_STORE_LIMIT_GIB"} <= keys
