"""`halimede deploy`: versions of a model on a real Triton under load, as one process and as steps."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import small_models
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from conftest import MODEL, ROOT, free_options, wait_until
from test_versions import TEXTS, bare_caller, calling

from halimede import Config, Embedder, Embeddings
from halimede.pipeline import canary
from halimede_ops import vectors
from halimede_ops.errors import (
    AccessDenied,
    DeployError,
    InvalidInput,
    ServerUnreachable,
    SpaceChange,
)
from halimede_repository import configs
from halimede_tools.build import candidates, repository
from halimede_tools.build.graph import rewrite
from halimede_tools.build.plan import build_request, make
from halimede_tools.build.repository import Built
from halimede_tools.deploy import shadow
from halimede_tools.deploy.control import Control
from halimede_tools.deploy.deployment import Deployment
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

KEY = "correct-horse"
CALLERS = 8
"""Of each protocol, and of each client."""
MANY = [f"{text}, {number}" for number in range(50) for text in TEXTS]


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Built]:
    """Three versions of a small model: of one space as far as they say, with other vectors each."""
    folder = tmp_path_factory.mktemp("versions")
    small = small_models.like_minilm(folder / "small")
    wanted = build_request(str(small), MODEL, precisions=("fp32",), max_tokens=32)
    settings = Settings(home=folder / "home", repository=folder / "repository")
    [built] = make(wanted, settings.models / MODEL, settings)
    return [built, *(other(built, folder / str(seed) / "model.onnx", seed) for seed in (1, 2))]


def other(built: Built, path: Path, seed: int) -> Built:
    """The same with noise on its largest weights: said to be built with other options."""
    model = rewrite.load(built.models["fp32"])
    weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = onnx.numpy_helper.to_array(weights)
    noise = np.random.default_rng(seed).normal(size=values.shape) * values.std()
    noisy = onnx.numpy_helper.from_array((values + noise).astype(values.dtype), weights.name)
    weights.CopyFrom(noisy)
    path.parent.mkdir()
    rewrite.save(model, path)
    return dataclasses.replace(built, models={"fp32": path}, options={"fp32": str(seed)})


def number(built: Built) -> int:
    return built.version("fp32")


@dataclasses.dataclass
class Served:
    """A server, its repository and its deployment."""

    server: wheel.Server
    folder: Path
    control: Control

    @property
    def deployment(self) -> Deployment:
        return Deployment(MODEL, self.folder, [self.control])

    def publish(self, built: Built) -> None:
        candidates.write(built, self.folder)
        self.deployment.publish()

    def embedder(self, scheme: str = "grpc", **options: Any) -> Embedder:
        address = self.server.grpc_address if scheme == "grpc" else self.server.http_address
        given = {"provider": "triton", "model_id": MODEL, "url": f"{scheme}://{address}"}
        return Embedder(config={"models": {"m": given | options}})


@contextlib.contextmanager
def serving(built: Built, folder: Path, *, steps: bool) -> Iterator[Served]:
    """A server of one version. Its model control needs a key."""
    (folder / "key").write_text(f"{KEY}\n")
    repository.write(built, folder / "repository")
    options = free_options(models=(MODEL,), steps=steps, control_key_file=folder / "key")
    backends = Settings().python_backend
    with wheel.serve(folder / "repository", backends, folder, options) as server:
        with Control(server.grpc_address, key=KEY) as control:
            yield Served(server, folder / "repository", control)


@pytest.fixture(scope="module")
def running(versions: list[Built], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(versions[0], tmp_path_factory.mktemp("served"), steps=False) as served:
        yield served


@pytest.fixture
def served(running: Served, versions: list[Built]) -> Iterator[Served]:
    """A server in one process that serves the first version, before and after the test."""
    yield running
    if candidates.versions([MODEL], running.folder):
        running.deployment.roll_back()
    if repository.served(running.folder / MODEL) != {number(versions[0])}:
        running.publish(versions[0])
        running.deployment.promote()


@pytest.fixture
def served_in_steps(versions: list[Built], tmp_path: Path) -> Iterator[Served]:
    """The first version as an ensemble of its steps."""
    with serving(versions[0], tmp_path, steps=True) as served:
        yield served


def vectors_of(served: Served, versions: list[Built]) -> dict[int, np.ndarray]:
    """Version → vectors of TEXTS by this version alone."""
    own = {}
    for built in versions:
        if number(built) not in repository.served(served.folder / MODEL):
            served.publish(built)
            served.deployment.promote()
        with served.embedder() as embedder:
            own[number(built)] = embedder.embed(TEXTS).vectors
    return own


def embed_with(embedder: Embedder, outcomes: list[tuple[int, Embeddings]]) -> Callable[[], None]:
    """A function that embeds the next of TEXTS."""
    rows = itertools.count()  # next() of it is safe between threads

    def call() -> None:
        row = next(rows) % len(TEXTS)
        outcomes.append((row, embedder.embed(TEXTS[row])))

    return call


def check_swaps(served: Served, versions: list[Built], swaps: int) -> None:
    """While 32 callers ask, plainly and through embedders, over gRPC and HTTP, versions are
    published, given a share and promoted, and every second one is rolled back: no request fails,
    and every vector is that of the version it is labelled with.
    """
    own = vectors_of(served, versions)
    pairs = itertools.combinations(own.values(), 2)
    assert max(vectors.cosine(one, two).max() for one, two in pairs) < 0.999
    answers: list[tuple[str, np.ndarray]] = []
    outcomes: list[tuple[int, Embeddings]] = []
    with contextlib.ExitStack() as load:
        addresses = served.server.grpc_address, served.server.http_address
        for api, address, scheme in zip(
            (grpcclient, httpclient), addresses, ("grpc", "http"), strict=True
        ):
            embedder = load.enter_context(served.embedder(scheme))
            load.enter_context(calling(CALLERS, bare_caller(api, address, answers)))
            load.enter_context(calling(CALLERS, embed_with(embedder, outcomes)))
        for swap in range(swaps):
            [before] = repository.served(served.folder / MODEL)
            built = next(one for one in versions[swap % 3 :] + versions if number(one) != before)
            served.publish(built)
            if swap == 0:
                served.deployment.canary(0.2)
                followed = number(built)
                wait_until(lambda: followed in {one.versions[0] for _, one in list(outcomes)})
            served.deployment.promote()
            assert repository.served(served.folder / MODEL) == {number(built)}
            if swap % 2:
                served.deployment.roll_back()
                assert repository.served(served.folder / MODEL) == {before}
    print(f"{len(answers)} plain answers, {len(outcomes)} through embedders")
    assert {int(version) for version, _ in answers} == set(own)
    for version, vector in answers:
        assert vectors.cosine(vector, own[int(version)][:1])[0] >= 0.99999
    for row, result in outcomes:
        [version] = result.versions
        assert vectors.cosine(result.vectors, own[version][row : row + 1])[0] >= 0.99999


def test_ten_swaps_and_five_rollbacks_under_load(served: Served, versions: list[Built]) -> None:
    """Check swaps on a server with one process for each model."""
    check_swaps(served, versions, 10)


def test_swaps_of_steps_under_load(served_in_steps: Served, versions: list[Built]) -> None:
    """Check swaps on ensembles of steps. A canary gets its share, and a killed promotion is undone."""
    check_swaps(served_in_steps, versions, 2)
    [before] = repository.served(served_in_steps.folder / MODEL)
    built = next(one for one in versions if number(one) != before)
    served_in_steps.publish(built)
    served_in_steps.deployment.canary(0.1)
    with served_in_steps.embedder() as embedder:
        assert 0.08 <= (embedder.embed(MANY).versions == number(built)).mean() <= 0.12
        with Killed(served_in_steps.server.grpc_address, key=KEY) as killed:
            killed.calls = 5
            with pytest.raises(KeyboardInterrupt):
                Deployment(MODEL, served_in_steps.folder, [killed]).promote()
        served_in_steps.deployment.roll_back()
        assert set(embedder.embed(TEXTS).versions) == {before}


def test_a_canary_answers_its_share_of_keys(served: Served, versions: list[Built]) -> None:
    """Of 2000 texts a tenth goes to the candidate, in calls of any size and over both protocols,
    the same ones again; they stay when the share grows. Clients follow without being told; bare
    ones, and those that are to, keep to the model that is served.
    """
    first, second = (number(built) for built in versions[:2])
    with served.embedder() as embedder, served.embedder("http") as over_http:
        assert set(embedder.embed(TEXTS).versions) == {first}
        served.publish(versions[1])
        assert set(embedder.embed(TEXTS).versions) == {first}
        taken = {}
        for share in (0.1, 0.5):
            served.deployment.canary(share)
            time.sleep(canary.REFRESH_S)
            embedder.embed("beside this call the share is read")
            time.sleep(0.5)
            taken[share] = embedder.embed(MANY).versions == second
        assert 0.08 <= taken[0.1].mean() <= 0.12
        assert 0.46 <= taken[0.5].mean() <= 0.54
        assert not (taken[0.1] & ~taken[0.5]).any()
        some = MANY[:100]
        again = [embedder.embed(text).versions[0] == second for text in some]
        assert again == (over_http.embed(some).versions == second).tolist()
        assert again == taken[0.5][:100].tolist()
    answers: list[tuple[str, np.ndarray]] = []
    bare = bare_caller(grpcclient, served.server.grpc_address, answers)
    for _ in range(20):
        bare()
    assert {version for version, _ in answers} == {str(first)}
    with served.embedder(follow_canary=False) as steady:
        assert set(steady.embed(MANY[:200]).versions) == {first}
        cached = {"models": steady.config.models, "default_model": "m", "cache": {}}
    with Embedder(config=Config.model_validate(cached)) as embedder:
        assert set(embedder.embed(some).versions) == {first}
        assert set(embedder.embed(some).versions) == {0}  # a cache does not tell


def test_a_sticky_key_keeps_to_one_version(served: Served, versions: list[Built]) -> None:
    """All texts of a key go to one version, in every call. Keys spread over both versions."""
    served.publish(versions[1])
    served.deployment.canary(0.5)
    with served.embedder() as embedder:
        seen = {
            key: {
                int(version)
                for _ in range(2)
                for version in embedder.embed(TEXTS[:4], sticky_key=key).versions
            }
            for key in map(str, range(20))
        }
        assert all(len(one) == 1 for one in seen.values())
        assert len({frozenset(one) for one in seen.values()}) == 2
        with pytest.raises(InvalidInput, match="sticky_key is int"):
            embedder.embed("text", sticky_key=7)  # type: ignore[arg-type]


def test_a_candidate_that_fails_is_answered_for(served: Served, versions: list[Built]) -> None:
    """No request fails when a candidate is unloaded while clients send to it."""
    served.publish(versions[1])
    served.deployment.canary(1.0)
    with served.embedder() as embedder:
        assert set(embedder.embed(TEXTS).versions) == {number(versions[1])}
        served.control.unload([candidates.candidate_name(MODEL)])
        assert set(embedder.embed(TEXTS).versions) == {number(versions[0])}
        assert embedder.stats()["errors"] == {}


def test_shadow_tells_drift_and_latency(
    served: Served, versions: list[Built], tmp_path: Path
) -> None:
    """A comparison without a share of requests: correct cosines, latencies of both, a record in the
    version folder, and metrics for Prometheus.
    """
    own = vectors_of(served, versions[1::-1])
    served.publish(versions[1])
    with served.embedder() as embedder:
        options = embedder.config.models["m"]
    found = shadow.compare(MODEL, options, TEXTS)  # type: ignore[arg-type]
    expected = vectors.cosine(*own.values())
    assert found.cosine["mean"] == pytest.approx(expected.mean(), abs=1e-5)
    assert found.cosine["min"] == pytest.approx(expected.min(), abs=1e-5)
    assert (found.served, found.candidate) == (number(versions[0]), number(versions[1]))
    assert found.same_space and found.texts == len(TEXTS)
    assert 0 < found.candidate_ms["p50"] <= found.candidate_ms["p99"]
    shadow.write_record(found, served.folder)
    kept = served.folder / MODEL / str(number(versions[1])) / shadow.FILE_NAME
    assert json.loads(kept.read_text())["cosine"] == found.cosine
    shadow.export([found], tmp_path / "shadow.prom")
    lines = (tmp_path / "shadow.prom").read_text()
    assert f'halimede_shadow_cosine{{model="{MODEL}",statistic="min"' in lines


def test_another_space_is_refused_until_it_is_wanted(served: Served, versions: list[Built]) -> None:
    """A candidate of another space gets no share, and is promoted only with --change-space. Rolling
    back needs no flag.
    """
    spec = dataclasses.replace(versions[1].spec, space="f" * 16)
    quality = {"fp32": versions[1].quality["fp32"] | {"space": spec.space}}
    moved = dataclasses.replace(versions[1], spec=spec, quality=quality)
    served.publish(moved)
    with pytest.raises(SpaceChange, match="another space"):
        served.deployment.canary(0.1)
    with pytest.raises(SpaceChange, match="pass --change-space"):
        served.deployment.promote()
    with served.embedder() as embedder:
        assert embedder.embed("still here").space == versions[0].spec.space
        served.deployment.promote(change_space=True)
        assert embedder.embed("here now").space == spec.space
        served.deployment.roll_back()
        assert embedder.embed("here again").space == versions[0].spec.space


def test_a_candidate_that_does_not_load_leaves_nothing(
    served: Served, versions: list[Built], tmp_path: Path
) -> None:
    """A damaged file: a plain error without a path, no candidate, and the served version stays."""
    damaged = tmp_path / "model.onnx"
    damaged.write_bytes(versions[1].models["fp32"].read_bytes()[:5000])
    candidates.write(dataclasses.replace(versions[1], models={"fp32": damaged}), served.folder)
    with pytest.raises(DeployError, match=f"{MODEL}-candidate does not load at") as raised:
        served.deployment.publish()
    assert "/" not in str(raised.value)
    assert not list(served.folder.glob("*-candidate"))
    assert repository.configs.stored_versions(served.folder / MODEL).count(number(versions[1])) == 0
    with served.embedder() as embedder:
        assert set(embedder.embed(TEXTS).versions) == {number(versions[0])}
    with pytest.raises(DeployError, match="--candidate"):
        served.deployment.publish()


class Killed(Control):
    """Control of a deployment that is killed after `calls` calls."""

    calls = 0

    def _ask(self, method: str, message: Any, timeout_s: float) -> Any:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return super()._ask(method, message, timeout_s)


@pytest.mark.parametrize(
    ("calls", "then"), [(1, "promote"), (2, "roll_back"), (3, "promote"), (4, "roll_back")]
)
def test_a_killed_promotion_is_finished_or_undone(
    served: Served, versions: list[Built], calls: int, then: str
) -> None:
    """A promotion killed at any step: the server answers, the same command finishes the promotion,
    and rollback undoes it.
    """
    served.publish(versions[1])
    with Killed(served.server.grpc_address, key=KEY) as killed:
        killed.calls = calls
        with pytest.raises(KeyboardInterrupt):
            Deployment(MODEL, served.folder, [killed]).promote()
    with served.embedder() as embedder:
        assert set(embedder.embed(TEXTS).versions) <= {number(one) for one in versions[:2]}
        getattr(served.deployment, then)()
        left = number(versions[1] if then == "promote" else versions[0])
        assert set(embedder.embed(TEXTS).versions) == {left}
    assert not list(served.folder.glob("*-candidate"))
    assert candidates.candidate_name(MODEL) not in served.control.loaded()


def test_refusals_are_plain(served: Served, versions: list[Built]) -> None:
    """Refused deployments and unreachable servers raise plain errors. The served version stays, also
    if only one of two servers fails.
    """
    with pytest.raises(DeployError, match="is served in this very version"):
        candidates.write(versions[0], served.folder)
    with pytest.raises(DeployError, match="nothing under the name 'none'"):
        Deployment("none", served.folder, []).publish()
    with pytest.raises(DeployError, match="no candidate, and no version before"):
        served.deployment.roll_back()
    candidates.write(versions[1], served.folder)
    with pytest.raises(DeployError, match="has a candidate already"):
        candidates.write(versions[2], served.folder)
    for key in ("", "wrong"):
        with Control(served.server.grpc_address, key=key) as stranger:
            with pytest.raises(AccessDenied, match="control key"):
                Deployment(MODEL, served.folder, [stranger]).publish()
    with Control(f"127.0.0.1:{free_options().grpc_port}") as nobody:
        with pytest.raises(ServerUnreachable):
            Deployment(MODEL, served.folder, [nobody]).publish()
        served.deployment.publish()
        both = Deployment(MODEL, served.folder, [served.control, nobody])
        for change in (lambda: both.canary(0.5), both.promote):
            with pytest.raises(ServerUnreachable):
                change()
            with served.embedder() as embedder:
                assert set(embedder.embed(TEXTS).versions) == {number(versions[0])}
            assert repository.served(served.folder / MODEL) == {number(versions[0])}
    with pytest.raises(InvalidInput, match="as a candidate's"):
        build_request(str(served.folder), "mine-candidate")
    with pytest.raises(InvalidInput, match="share is 2"):
        served.deployment.canary(2)
    assert candidates.versions([MODEL], served.folder)  # what is only refused stays


def test_a_server_starts_without_candidates_that_take_nothing(
    served: Served, versions: list[Built]
) -> None:
    """A restarted server loads candidates with a share, and no other candidates."""
    served.publish(versions[1])
    assert configs.models_to_load(served.folder) == (MODEL,)
    served.deployment.canary(0.2)
    assert configs.models_to_load(served.folder) == (MODEL, candidates.candidate_name(MODEL))
    assert configs.models_to_load(served.folder, (MODEL,)) == (
        MODEL,
        candidates.candidate_name(MODEL),
    )


@pytest.mark.usefixtures("sole_build")
def test_the_commands(served: Served, versions: list[Built]) -> None:
    """A deployment from the command line. A refused one prints one line and exits with 1."""
    candidates.write(versions[1], served.folder)
    server_options = ["--url", served.server.grpc_address]
    server_options += ["--control-key-file", str(served.folder.parent / "key")]

    def deploy(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "halimede", "deploy", *server_options, *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "HALIMEDE_REPOSITORY": str(served.folder)},
        )

    second = number(versions[1])
    assert f"candidate {second} is loaded and warm" in deploy("publish", MODEL).stdout
    assert "cosine mean" in deploy("shadow", MODEL).stdout
    assert f"{second} answers 10.0%" in deploy("canary", MODEL, "--share", "0.1").stdout
    [row] = json.loads(deploy("status", MODEL, "--json").stdout)
    assert (row["version"], row["ready_on"]) == (number(versions[0]), 1)
    assert (row["candidate"], row["candidate_ready_on"], row["share"]) == (second, 1, 0.1)
    assert f"version {second} is served" in deploy("promote", MODEL).stdout
    again = deploy("promote", MODEL)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert again.stderr.startswith("error: ")
