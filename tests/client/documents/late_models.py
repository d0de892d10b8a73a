"""Small models that are built for late chunking, and what their spans are by the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import small_models
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st

from halimede.documents.late import Window

PROMPTS = {"query": "find: ", "document": "a text of a store: "}
MAX_TOKENS = 64
Make = Callable[[Path], Path]


def _model(
    base: Make, *after: Callable[[], Any], max_tokens: int = MAX_TOKENS, **more: Any
) -> Make:
    def make(folder: Path) -> Path:
        further = [module() for module in after]
        pooling = st.Pooling(64, "mean")
        return small_models.sentence_transformer(
            base, folder, pooling, *further, max_tokens=max_tokens, **more
        )

    return make


def _linear() -> Any:
    return small_models.dense(64, 48, torch.nn.Identity())


MODELS: Mapping[str, Make] = {
    "bert": _model(small_models.bert, st.Normalize, prompts=PROMPTS),
    "dense": _model(small_models.bert, _linear, st.Normalize),
    "unigram": _model(small_models.xlm_roberta, st.Normalize, prompts=PROMPTS),
    "roberta": _model(small_models.roberta),
    "qwen": _model(small_models.qwen3, st.Normalize),
    "modernbert": _model(small_models.modernbert, st.Normalize, max_tokens=512),
}
"""WordPiece, Unigram and byte-level BPE; with and without prompts, a linear layer and
normalisation; in packed rows, in rows of their own, with local attention."""


def pooled(
    model: SentenceTransformer,
    text: str,
    spans: Sequence[tuple[int, int]],
    windows: Sequence[Window],
    prompt: str = "",
) -> np.ndarray:
    """Vectors of spans `[spans, dims]`: means of the token embeddings that sentence-transformers
    gives for each window, of the characters that are taken from it. NaN: a span has no token.
    """
    sums, counts = np.zeros((len(spans), 64)), np.zeros((len(spans), 1))
    for window in windows:
        read = prompt + text[window.start : window.end]
        hidden = model.encode(read, output_value="token_embeddings").numpy()
        offsets = model.tokenizer(read, return_offsets_mapping=True)["offset_mapping"]
        assert len(offsets) == len(hidden) <= model.max_seq_length
        shift = window.start - len(prompt)
        for (begin, end), vector in zip(offsets, hidden, strict=True):
            for place, (first, behind) in enumerate(spans):
                start, stop = max(first, window.first), min(behind, window.behind)
                if begin + shift < stop and end + shift > start and end:
                    sums[place] += vector
                    counts[place] += 1
    with np.errstate(invalid="ignore"):
        features = {"sentence_embedding": torch.tensor(sums / counts, dtype=torch.float32)}
    for module in list(model)[2:]:
        features = module(features)
    vectors: np.ndarray = features["sentence_embedding"].detach().numpy()
    return vectors
