"""Tasks of mteb's on a served model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from halimede.extras import check_installed
from halimede.integrations.sentence_transformers import SentenceTransformerAdapter
from halimede_ops.errors import InvalidInput

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

HANDBOOK = "handbook"
"""Name of the retrieval set that ships with halimede."""
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
"""Variables that keep mteb from downloading."""


class TaskScore(NamedTuple):
    """The main score of a task."""

    task: str
    measure: str
    """mteb's name of the score, such as ndcg_at_10."""
    score: float


def run_tasks(
    model: SentenceTransformerAdapter,
    tasks: Sequence[str],
    data: Path | None = None,
    output: Path | None = None,
) -> list[TaskScore]:
    """Run tasks and return the main score of each. Nothing is downloaded.

    Args:
        model: an embedder in the shape of `SentenceTransformer`.
        tasks: `handbook`, paths of an STS file (.tsv) or of a retrieval set in BEIR's form, or
            names of mteb's tasks.
        data: folder with a folder for each of mteb's tasks that are named, which has its data set.
            None: they are in Hugging Face's cache already.
        output: folder for mteb's result files. None: none are written.

    Raises:
        MissingExtra: mteb is not installed.
        InvalidInput: there is no such task, or its data is not on this machine.
        HalimedeError: as for `Embedder.embed`.
    """
    check_installed("mteb", "mteb")
    for name in OFFLINE:
        os.environ[name] = "1"
    import mteb

    asked = [_task(name, data) for name in tasks]
    cache = None if output is None else mteb.ResultCache(output)
    scores = []
    for task in asked:
        try:
            result = mteb.evaluate(
                model, task, cache=cache, show_progress_bar=False, overwrite_strategy="always"
            )
        except (FileNotFoundError, ConnectionError) as error:
            raise InvalidInput(
                f"the data of {task.metadata.name} is not on this machine "
                f"({type(error).__name__}). Give the folder that has it with --data."
            ) from None
        [done] = result.task_results
        scores.append(
            TaskScore(task.metadata.name, task.metadata.main_score, float(done.get_score()))
        )
    return scores


def _task(name: str, data: Path | None) -> AbsTask:
    import mteb

    from halimede_tools.bench.mteb import local

    if name == HANDBOOK:
        return local.retrieval_task(local.SHIPPED)
    path = Path(name)
    if path.suffix == ".tsv":
        return local.sts_task(path)
    if path.is_dir():
        return local.retrieval_task(path)
    try:
        task: Any = mteb.get_task(name)
    except KeyError:
        raise InvalidInput(
            f"there is no task {name}; give {HANDBOOK}, a .tsv file, a folder with corpus.jsonl, "
            "or the name of one of mteb's tasks."
        ) from None
    if data is not None:
        folder = data / name
        if not folder.is_dir():
            raise InvalidInput(f"{folder} is no folder; it must have the data of {name}.")
        dataset = {**task.metadata.dataset, "path": str(folder)}
        task.metadata = task.metadata.model_copy(update={"dataset": dataset})
    return task
