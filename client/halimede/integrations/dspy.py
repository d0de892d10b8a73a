"""DSPy: an embedder for its retrievers. Needs the extra `dspy`."""

from __future__ import annotations

import numpy as np
from typing_extensions import Unpack

from halimede.embedder import Embedder
from halimede.extras import needs_extra
from halimede.integrations.clients import Arguments, open_embedder

with needs_extra("dspy"):
    import dspy

BATCH_SIZE = 1024
"""Texts that DSPy hands over at once. The client cuts them into requests itself."""


def dspy_embedder(
    model: str | None = None,
    *,
    embedder: Embedder | None = None,
    input_type: str | None = None,
    dimensions: int | None = None,
    **arguments: Unpack[Arguments],
) -> dspy.Embedder:
    """Return a `dspy.Embedder` of a served model, or of one in this process.

    DSPy's own cache is off: it knows a function by its source text, and would return the vectors of
    another model. Use the `cache` of halimede's configuration.

    Args:
        model: name of a served model, or of a model in the configuration. Default: as for
            `Embedder`.
        embedder: an embedder of yours, instead of a name and arguments.
        input_type: `query`, `document` or the name of another prompt. DSPy does not say which of
            them a text is.
        dimensions: leading components to keep, normalised again.
        arguments: `url`, `config`, `timeout_s`, `deadline_s` and `providers` as for `Embedder`.

    Raises:
        InvalidConfig: an argument is invalid.
    """
    opened = open_embedder(embedder, model, **arguments)

    def embed(texts: list[str]) -> np.ndarray:
        return opened.embed(texts, input_type=input_type, dimensions=dimensions).vectors

    return dspy.Embedder(embed, batch_size=BATCH_SIZE, caching=False)
