"""`halimede bench mteb`, and mteb's protocol, with mteb itself in a folder of its own.

mteb wants an older fsspec than the one tested here, so its packages are installed beside.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from filelock import FileLock

from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

PACKAGES = (
    "mteb==2.26.24",
    "datasets==5.0.1",
    "dill==0.4.1",
    "fsspec==2026.6.0",
    "multiprocess==0.70.19",
    "polars==2.1.0",
    "polars-runtime-32==2.1.0",
    "pytrec_eval-terrier==0.5.11",
)
STSB = ROOT.parent / "shared" / "data" / "stsb-dev.tsv"
COMPARE = """
import sys
from sentence_transformers import SentenceTransformer
import mteb
from halimede import Reranker, as_sentence_transformer
from halimede.testing import FakeProvider
from halimede_tools.bench.mteb import local

url, source = sys.argv[1:]
real = SentenceTransformer(source, device="cpu")
with as_sentence_transformer("all-MiniLM-L6-v2", url=url) as ours:
    for model in (ours, real):
        task = local.retrieval_task(local.SHIPPED)
        result = mteb.evaluate(model, task, cache=None, show_progress_bar=False)
        print(result.task_results[0].get_score())

task = local.retrieval_task(local.SHIPPED)
task.load_data()
split = task.dataset["default"]["test"]
split["top_ranked"] = {query: split["corpus"]["id"] for query in split["queries"]["id"]}
reranker = as_sentence_transformer(Reranker(providers=[FakeProvider(kind="reranker")]))
result = mteb.evaluate(reranker, task, cache=None, show_progress_bar=False)
print(result.task_results[0].get_score())
"""


@pytest.fixture(scope="module")
def environment(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a process that has mteb. Its folder is filled once, in some seconds."""
    cache = settings.home / "test-packages"
    cache.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(f"{sys.version_info[:2]} {PACKAGES}".encode()).hexdigest()[:16]
    folder = cache / f"mteb-{digest}"
    with FileLock(cache / f"mteb-{digest}.lock"):
        if not folder.exists():
            beside = folder.with_suffix(".new")
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--target", str(beside), *PACKAGES], check=True)
            beside.rename(folder)
    own = [str(ROOT / part) for part in os.environ.get("PYTHONPATH", "").split(":") if part]
    home = tmp_path_factory.mktemp("hugging-face")
    return {**os.environ, "PYTHONPATH": ":".join([str(folder), *own]), "HF_HOME": str(home)}


def bench(environment: dict[str, str], *arguments: str) -> dict[str, float]:
    """The score of each task that the verb prints."""
    program = str(Path(sys.executable).parent / "halimede")
    done = subprocess.run(
        [program, "bench", "mteb", *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {
        task: float(score) for task, _, score in map(str.split, done.stdout.strip().splitlines())
    }


def test_tasks_run_on_local_data(
    server: wheel.Server, environment: dict[str, str], tmp_path: Path
) -> None:
    """The set that ships, an STS file, and a task of mteb's whose data set is in a folder."""
    pairs = [("5", "a red fox", "a fox that is red"), ("2", "a red fox", "a red house"),
             ("0", "a red fox", "the museum opens at nine"), ("4", "it rains", "rain falls")]  # fmt: skip
    file = tmp_path / "pairs.tsv"
    file.write_text(
        "score\tsentence1\tsentence2\n" + "".join("\t".join(pair) + "\n" for pair in pairs)
    )
    (tmp_path / "data" / "STSBenchmark").mkdir(parents=True)
    rows = [{"score": float(s), "sentence1": a, "sentence2": b} for s, a, b in pairs]
    (tmp_path / "data" / "STSBenchmark" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scores = bench(
        environment,
        "--tasks", f"handbook,{file},STSBenchmark", "--url", server.grpc_address,
        "--data", str(tmp_path / "data"), "--output", str(tmp_path / "results"),
    )  # fmt: skip
    assert scores["handbook"] == pytest.approx(0.9773, abs=0.002)
    assert scores["pairs"] == scores["STSBenchmark"] > 0.7
    assert len(list((tmp_path / "results").rglob("STSBenchmark.json"))) == 1


@pytest.mark.skipif(not STSB.exists(), reason="../shared/data/stsb-dev.tsv is not here")
def test_sts_is_the_known_score(server: wheel.Server, environment: dict[str, str]) -> None:
    """all-MiniLM-L6-v2 has 0.8672 on the development set of STS-B."""
    scores = bench(environment, "--tasks", str(STSB), "--url", server.grpc_address)
    assert scores == {"stsb-dev": pytest.approx(0.8672, abs=0.0005)}


def test_mteb_scores_ours_as_theirs(
    server: wheel.Server, environment: dict[str, str], source: Path
) -> None:
    """`mteb.evaluate` takes both unchanged, and gives one score; a reranker is a cross-encoder."""
    code = [sys.executable, "-c", COMPARE, server.grpc_address, str(source)]
    done = subprocess.run(code, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, real, reranked = map(float, done.stdout.split())
    assert ours == pytest.approx(real, abs=0.002)
    assert 0 < reranked < 1


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("Nothing", "there is no task"),
        ("nowhere.tsv", "cannot be read"),
        ("STSBenchmark", "not on this machine"),
        (".", "corpus.jsonl cannot be read"),
    ],
)
def test_what_is_missing_is_named(
    server: wheel.Server, environment: dict[str, str], tmp_path: Path, tasks: str, message: str
) -> None:
    """In one line: an unknown task, a file, a data set."""
    program = str(Path(sys.executable).parent / "halimede")
    command = [program, "bench", "mteb", "--tasks", tasks, "--url", server.grpc_address]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_without_mteb_the_extra_is_named(server: wheel.Server) -> None:
    """The verb says what to install."""
    program = str(Path(sys.executable).parent / "halimede")
    command = [program, "bench", "mteb", "--url", server.grpc_address]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "pip install 'halimede[mteb]'" in " ".join(done.stderr.split())
