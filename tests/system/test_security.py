"""TLS, the key of model control, and the contents of a server's log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tritonclient.grpc as grpcclient
import trustme
from conftest import MODEL, free_options
from tritonclient.utils import InferenceServerException

from halimede import Embedder
from halimede.providers.triton.connection import Tls, connect
from halimede_ops.errors import HalimedeError, InvalidInput, ServeError, ServerUnreachable
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

KEY = "correct-horse"
SECRET_TEXT = "the text that nobody else may read"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Certificates of an authority, a server on 127.0.0.1 and a client; the control key."""
    folder = tmp_path_factory.mktemp("certificates")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name, identity in (("server", "127.0.0.1"), ("client", "client.example")):
        issued = authority.issue_cert(identity)
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
    (folder / "control").write_text(f"{KEY}\n")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def secured(
    settings: Settings, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[wheel.Server]:
    """A server with TLS, client certificates and a key for model control."""
    options = free_options(
        models=(MODEL,),
        log_level="verbose",
        tls_cert=files["server.pem"],
        tls_key=files["server.key"],
        tls_client_ca=files["ca.pem"],
        control_key_file=files["control"],
    )
    run = tmp_path_factory.mktemp("secured")
    with wheel.serve(settings.repository, settings.python_backend, run, options) as server:
        yield server


def config(server: wheel.Server, files: dict[str, Path], *shown: str) -> dict[str, Any]:
    tls = {name: str(files[file]) for name, file in TLS.items() if name in shown}
    return {
        "models": {
            "server": {
                "provider": "triton",
                "model_id": MODEL,
                "url": f"grpcs://{server.grpc_address}",
                "retries": 0,
                "tls": tls,
            }
        }
    }


TLS = {"ca_file": "ca.pem", "cert_file": "client.pem", "key_file": "client.key"}


def test_a_client_with_a_certificate_embeds_over_tls(
    secured: wheel.Server, files: dict[str, Path]
) -> None:
    with Embedder(config=config(secured, files, *TLS)) as embedder:
        assert embedder.embed([SECRET_TEXT]).dims == 384


@pytest.mark.parametrize("shown", [("ca_file",), ()], ids=["no certificate", "an unknown server"])
def test_a_client_without_its_own_or_the_servers_certificate_is_refused(
    secured: wheel.Server, files: dict[str, Path], shown: tuple[str, ...]
) -> None:
    with Embedder(config=config(secured, files, *shown), timeout_s=30) as embedder:
        with pytest.raises(ServerUnreachable):
            embedder.embed([SECRET_TEXT])


def test_plain_grpc_is_refused(secured: wheel.Server) -> None:
    with Embedder(secured.grpc_address, MODEL, deadline_s=3) as embedder:
        with pytest.raises(HalimedeError):
            embedder.embed([SECRET_TEXT])


@pytest.mark.parametrize("url", ["localhost:8001", "http://localhost:8000"])
def test_certificates_are_never_left_unused(files: dict[str, Path], url: str) -> None:
    """Certificates with an address without TLS: an error before anything is sent."""
    tls = {"ca_file": str(files["ca.pem"])}
    given = {"provider": "triton", "model_id": MODEL, "url": url, "tls": tls}
    with pytest.raises(InvalidInput, match="certificates are given.* write (grpc|http)s://local"):
        Embedder(config={"models": {"server": given}})
    with pytest.raises(InvalidInput, match="certificates are given"):
        connect(url, Tls(**tls))


def test_http_which_has_no_tls_stays_on_loopback() -> None:
    """Whatever address gRPC listens on."""
    options = wheel.Options.model_construct(host="0.0.0.0", tls_cert=Path("x"))
    assert options.http_host == "127.0.0.1"


@pytest.mark.parametrize("api", ["load", "unload"])
def test_model_control_over_http_wants_the_key(secured: wheel.Server, api: str) -> None:
    """Without it and with a wrong one: refused, and the model is served on."""
    url = f"http://{secured.http_address}/v2/repository/models/{MODEL}/{api}"
    for headers in ({}, {"halimede-control-key": "wrong"}):
        assert httpx.post(url, headers=headers).status_code == 403
    ready = f"http://{secured.http_address}/v2/models/{MODEL}/ready"
    assert httpx.get(ready).status_code == 200


def test_model_control_opens_with_the_key(secured: wheel.Server, files: dict[str, Path]) -> None:
    """Over HTTP and over gRPC; there a wrong key is refused as well."""
    index = f"http://{secured.http_address}/v2/repository/index"
    assert httpx.post(index).status_code == 403
    assert httpx.post(index, headers={"halimede-control-key": KEY}).status_code == 200
    with grpcclient.InferenceServerClient(
        secured.grpc_address,
        ssl=True,
        root_certificates=str(files["ca.pem"]),
        certificate_chain=str(files["client.pem"]),
        private_key=str(files["client.key"]),
    ) as client:
        name = "triton-grpc-protocol-halimede-control-key"
        client.get_model_repository_index(headers={name: KEY})
        with pytest.raises(InferenceServerException, match="restricted"):
            client.get_model_repository_index(headers={name: "wrong"})


def test_a_server_for_others_without_a_key_gives_model_control_to_nobody() -> None:
    """Except on loopback, a new random key closes model control at each start."""
    closed = [a for a in wheel.Options(host="0.0.0.0").arguments() if "restricted" in a]
    assert len(closed) == 2
    assert closed != [a for a in wheel.Options(host="0.0.0.0").arguments() if "restricted" in a]
    assert not [a for a in wheel.Options().arguments() if "restricted" in a]


def test_no_text_is_in_the_log_even_when_verbose(
    secured: wheel.Server, files: dict[str, Path]
) -> None:
    """The log has no text of a valid, a refused or a malformed request, and not the key."""
    with Embedder(config=config(secured, files, *TLS)) as embedder:
        embedder.embed([SECRET_TEXT] * 3)
        with pytest.raises(HalimedeError):
            embedder.embed([SECRET_TEXT], input_type=SECRET_TEXT)
    body = {
        "inputs": [{"name": "TEXT", "datatype": "BYTES", "shape": [1, 1], "data": [SECRET_TEXT]}]
    }
    url = f"http://{secured.http_address}/v2/models/{MODEL}/infer"
    assert httpx.post(url, json=body).status_code == 200
    body["inputs"][0]["shape"] = [7, 7]
    assert httpx.post(url, json=body).status_code == 400
    log = secured.log.read_text(errors="replace")
    assert "TEXT" in log  # it is verbose
    assert SECRET_TEXT not in log
    assert KEY not in log


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tls_cert": "server.pem"}, "both --tls-cert and --tls-key"),
        ({"tls_client_ca": "ca.pem"}, "needs --tls-cert"),
        ({"control_key_file": "missing"}, "missing cannot be read"),
    ],
)
def test_half_a_setting_is_refused(
    files: dict[str, Path], given: dict[str, str], message: str
) -> None:
    fields = {name: files.get(file, Path(file)) for name, file in given.items()}
    with pytest.raises(ServeError, match=message):
        wheel.Options(**fields)
