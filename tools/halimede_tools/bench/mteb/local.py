"""mteb's tasks over files of yours: an STS file, or a retrieval set in BEIR's form."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTask, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata

from halimede_ops.errors import InvalidInput

SHIPPED = Path(__file__).parent / "handbook"
CORPUS, QUERIES, QRELS = "corpus.jsonl", "queries.jsonl", "qrels.tsv"
SPLIT = "test"


def sts_task(file: Path) -> AbsTask:
    """Return the task of a file with the columns score, sentence1 and sentence2, tab-separated.

    Raises:
        InvalidInput: it cannot be read, or lacks a column.
    """
    rows = _table(file, ("score", "sentence1", "sentence2"))
    columns: dict[str, list[Any]] = {
        name: [row[name] for row in rows] for name in ("sentence1", "sentence2")
    }
    columns["score"] = [_number(file, row["score"]) for row in rows]

    class Local(AbsTaskSTS):  # type: ignore[misc]
        metadata = _metadata(file, "STS", "t2t", "cosine_spearman")

        def load_data(self, **_: Any) -> None:
            self.dataset = DatasetDict({SPLIT: Dataset.from_dict(columns)})
            self.data_loaded = True

    return Local()


def retrieval_task(folder: Path) -> AbsTask:
    """Return the task of a folder with corpus.jsonl, queries.jsonl and qrels.tsv, as BEIR has them.

    A document and a query have `_id` and `text`, a document perhaps `title`. A judgement has
    query-id, corpus-id and score.

    Raises:
        InvalidInput: a file cannot be read, or lacks a column.
    """
    corpus, queries = _lines(folder / CORPUS), _lines(folder / QUERIES)
    relevant: dict[str, dict[str, int]] = {}
    for row in _table(folder / QRELS, ("query-id", "corpus-id", "score")):
        grade = int(_number(folder / QRELS, row["score"]))
        relevant.setdefault(row["query-id"], {})[row["corpus-id"]] = grade

    class Local(AbsTaskRetrieval):  # type: ignore[misc]
        metadata = _metadata(folder, "Retrieval", "t2t", "ndcg_at_10")

        def load_data(self, **_: Any) -> None:
            judged = [row for row in queries if row["id"] in relevant]
            split = RetrievalSplitData(
                corpus=Dataset.from_list(corpus),
                queries=Dataset.from_list(judged),
                relevant_docs=relevant,
                top_ranked=None,
            )
            self.dataset = {"default": {SPLIT: split}}
            self.data_loaded = True

    return Local()


def _metadata(path: Path, kind: str, category: str, score: str) -> Any:
    return TaskMetadata(
        name=path.stem,
        description=f"{kind} on a file of yours.",
        dataset={"path": str(path), "revision": "local"},
        type=kind,
        category=category,
        eval_splits=[SPLIT],
        eval_langs=["eng-Latn"],
        main_score=score,
    )


def _lines(path: Path) -> list[dict[str, str]]:
    """Return the id, title and text of each line of a JSONL file."""
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        return [
            {"id": str(row["_id"]), "title": str(row.get("title", "")), "text": row["text"]}
            for row in rows
        ]
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidInput(
            f"{path} has a line without `_id` and `text`, or without JSON."
        ) from None


def _table(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Return the rows of a tab-separated file with a line of headings."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            missing = set(columns) - set(reader.fieldnames or ())
            rows = list(reader)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read ({type(error).__name__}).") from None
    if missing or any(None in row.values() for row in rows):
        raise InvalidInput(f"{path} needs the columns {', '.join(columns)}, separated by tabs.")
    return rows


def _number(path: Path, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise InvalidInput(f"{path} has a score that is no number.") from None
