"""Classifiers: scores of texts for each label, from a blocking and an asyncio class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from typing_extensions import Unpack

from halimede.embedder import AsyncClient, BlockingClient, CallOptions, ModelFirst
from halimede.inputs.content import Input
from halimede.inputs.pairs import paired
from halimede.inputs.texts import encode_texts
from halimede.pipeline import tasks
from halimede.pipeline.tasks import Task
from halimede.results import Classification


class Classifier(ModelFirst, BlockingClient):
    """Scores texts for each label of a classifier. Safe to use from several threads.

    The name of the model is the first argument; the others are those of `Embedder`, by name.

    >>> with Classifier("sentiment", url="127.0.0.1:8001") as classifier:
    ...     result = classifier.classify(["I like it"])
    ...     result.best
    """

    def classify(
        self,
        texts: Iterable[str] | str,
        pairs: Iterable[str] | str | None = None,
        *,
        progress: bool = False,
        **options: Unpack[CallOptions],
    ) -> Classification:
        """Score texts for each label: `scores` `[texts, labels]` float32, in the texts' order.

        A text or pair beyond the token limit is cut off; `truncated` of the result tells which. All
        scores of a result come from one model: if a provider fails midway, the next one scores the
        whole call.

        Args:
            texts: the texts. A single string is one text.
            pairs: a second text for each text, for models that judge two texts together, such as
                premise and hypothesis. None: there is none.
            progress: show a progress bar on a terminal.
            sticky_key: key that decides whether a canary of the model answers, as for
                `Embedder.embed`.
            deadline_s: maximum time of this call. Default: that of the classifier.

        Raises:
            InvalidText: a text is not a string, or cannot be encoded as UTF-8.
            UnsupportedInput: the model is no classifier.
            InvalidInput: an option is unknown or invalid, or the numbers of texts differ.
            HalimedeError: as for `Embedder.embed`.
        """
        return self._run(*_asked(texts, pairs), progress, options)


class AsyncClassifier(ModelFirst, AsyncClient):
    """`Classifier` for asyncio. Cancelling a call cancels its requests.

    >>> async with AsyncClassifier("sentiment") as classifier:
    ...     result = await classifier.classify(["I like it"])
    """

    async def classify(
        self,
        texts: Iterable[str] | str,
        pairs: Iterable[str] | str | None = None,
        *,
        progress: bool = False,
        **options: Unpack[CallOptions],
    ) -> Classification:
        """As `Classifier.classify`."""
        return await self._run(*_asked(texts, pairs), progress, options)


def _asked(
    texts: Iterable[str] | str, pairs: Iterable[str] | str | None
) -> tuple[Task[Classification], Sequence[Input]]:
    if pairs is None:
        return tasks.CLASSIFY, encode_texts(texts)
    return tasks.CLASSIFY_PAIRS, paired(texts, pairs)
