"""Documents as inputs of a call: what is asked of a model, and the result that it makes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from halimede.documents import tokenizers
from halimede.documents.chunking import Chunker, chunker_of
from halimede.documents.late import LateParts, late_parts
from halimede.documents.parts import Parts, Spans, check_documents, chunked, spanned
from halimede.inputs.content import SpannedText
from halimede.inputs.options import check_options
from halimede.inputs.texts import encode_texts
from halimede.pipeline import tasks
from halimede.pipeline.pipeline import Pipeline
from halimede.pipeline.tasks import Task
from halimede.pipeline.waiting import Flow
from halimede.results import DocumentEmbeddings
from halimede_ops import vectors
from halimede_ops.errors import HalimedeError, InvalidInput

AFTER_JOINING = ("dimensions", "output_type", "ranges")
"""Options of a late call that are applied to the joined vectors."""


class Cut(NamedTuple):
    """How documents are cut. `Embedder.embed_documents` explains it."""

    tokens: int | None = None
    overlap: int = 0
    late: bool = False
    window_overlap: int | None = None
    spans: Spans | None = None


class DocumentCall(NamedTuple):
    """What is asked of the model for documents."""

    task: Task[Any]
    inputs: Sequence[bytes | SpannedText]
    documents: np.ndarray
    """`[inputs]` int64: index of the document of each input."""
    options: Mapping[str, Any]
    """Options of the call for the inputs."""
    parts: Parts
    late: LateParts | None
    """How the vectors of windows are joined. None: each input is a part."""

    @contextlib.contextmanager
    def located(self) -> Iterator[None]:
        """Raise an error about an input as one about its document."""
        try:
            yield
        except HalimedeError as error:
            if error.index is None:
                raise
            raise error.at(int(self.documents[error.index])) from None

    def result(self, answer: Any) -> DocumentEmbeddings:
        """The result of the model's answer."""
        if self.late is not None:
            return self.late.result(answer)
        facts = vars(answer) | {"indices": self.parts.documents}
        return DocumentEmbeddings(spans=self.parts.spans, **facts)


def prepare(
    texts: Iterable[str] | str, cut: Cut, folder: Path | None, options: Mapping[str, Any]
) -> DocumentCall:
    """Cut documents into the inputs of a call. It takes as long as tokenizing them.

    Args:
        texts: the documents. A single str is one document.
        cut: how they are cut.
        folder: folder of the model's tokenizer. None: `cut` needs none.
        options: options of `embed_documents`.

    Raises:
        InvalidInput: an argument is invalid.
        HalimedeError: as `Chunker`.
    """
    checked = check_options("embed_documents", options)
    documents, input_type = check_documents(texts), checked.input_type
    if cut.window_overlap is not None and not cut.late:
        raise InvalidInput("window_overlap is of late chunking; give late=True with it.")
    if cut.spans is not None:
        parts = spanned(documents, cut.spans)
    else:
        assert folder is not None
        parts = chunked(documents, chunker_of(folder, cut.tokens, cut.overlap, input_type))
    if not cut.late:
        inputs = encode_texts(parts.texts(documents))
        return DocumentCall(
            tasks.EMBED_DOCUMENTS, inputs, parts.documents, options, parts, late=None
        )
    assert folder is not None
    tokenizer = tokenizers.read(folder)
    vectors.check_dimensions(checked.dimensions, tokenizer.spec)
    late = late_parts(documents, parts, tokenizer, cut.window_overlap, checked)
    left = {name: value for name, value in options.items() if name not in AFTER_JOINING}
    return DocumentCall(tasks.EMBED_SPANS, late.inputs, late.documents, left, parts, late)


def find_chunker(
    pipeline: Pipeline, tokens: int | None, overlap: int, input_type: str | None
) -> Flow[Chunker]:
    """Return the chunker of a pipeline's first model.

    Raises:
        HalimedeError: as `tokenizers.folder_of` and `Chunker`.
    """
    folder = yield from find_folder(pipeline, input_type)
    return chunker_of(folder, tokens, overlap, input_type)


def find_tokenizer(pipeline: Pipeline, cut: Cut, input_type: str | None) -> Flow[Path | None]:
    """Return the folder of the tokenizer that documents are cut with. None: they need none.

    Raises:
        HalimedeError: as `tokenizers.folder_of`.
        UnsupportedInput: the model was not built for late chunking.
    """
    if cut.late:
        model = yield from pipeline.describe("text")
        tasks.EMBED_SPANS.check(pipeline.first_options.model_id, model)
    if not cut.late and cut.spans is not None:
        return None
    return (yield from find_folder(pipeline, input_type))


def find_folder(pipeline: Pipeline, input_type: str | None) -> Flow[Path]:
    """Return the folder of the tokenizer of a pipeline's first model.

    Raises:
        HalimedeError: as `tokenizers.folder_of`.
    """
    model = yield from pipeline.describe("text")
    return tokenizers.folder_of(pipeline.first_options, model, input_type)
