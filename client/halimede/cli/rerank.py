"""`halimede rerank`."""

from __future__ import annotations

from typing import Annotated

import typer

from halimede.cli import options, printing
from halimede.reranker import Reranker
from halimede.results import Ranking


def rerank(
    query: Annotated[str, typer.Argument(help="The query.")],
    texts: options.Texts = None,
    file: options.File = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Texts to print. Default: all.")] = None,
    as_json: options.AsJson = False,
    url: options.Url = None,
    model: options.Model = None,
    config: options.ConfigFile = None,
    timeout_s: options.TimeoutS = None,
) -> None:
    """Rank texts from the arguments, a file or stdin by their relevance to a query."""
    documents = options.read_texts(texts, file)
    with Reranker(model, url=url, config=config, timeout_s=timeout_s) as reranker:
        ranking = reranker.rank(query, documents, top_k=top_k, return_documents=True, progress=True)
    if as_json:
        options.print_facts({**printing.facts(ranking), "ranking": _rows(ranking)}, as_json=True)
        return
    printing.print_model(ranking)
    for entry in ranking:
        print(f"{entry.score:10.6f}  {entry.index:>5}  {printing.printable(entry.document or '')}")


def _rows(ranking: Ranking) -> list[dict[str, object]]:
    return [
        {
            "index": entry.index,
            "score": entry.score,
            "tokens": int(ranking.tokens[rank]),
            "truncated": bool(ranking.truncated[rank]),
            "text": entry.document,
        }
        for rank, entry in enumerate(ranking)
    ]
