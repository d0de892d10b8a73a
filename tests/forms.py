"""The folder forms that tests build, serve and compare: the record behind docs/reference/models.md.

Each test of models takes its forms from here, so the page lists what is verified and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import small_image_models
import small_models


class Form(NamedTuple):
    """One form of a model's folder."""

    make: Callable[[Path], Path]
    """Writes such a folder, with small random weights."""
    what: str
    """Its architecture, tokenizer, and what follows the transformer."""
    published: tuple[str, ...] = ()
    """Models of the catalogue that have this form."""
    more: str = ""
    """What else a user should know."""


class Suite(NamedTuple):
    """The forms of one kind, and how they are verified."""

    title: str
    kind: str
    """As in `halimede_ops.spec.KINDS`, or `image`."""
    reference: str
    bound: str
    test: str
    """The file of tests that builds and serves every form."""
    forms: Mapping[str, Form]


DENSE = {
    "bert": Form(
        small_models.bert,
        "BERT, plain transformers folder; mean",
        ("BiomedNLP-PubMedBERT-base-uncased-abstract-fulltext", "allenai-specter"),
        "all six poolings and their concatenation are compared too",
    ),
    "minilm": Form(
        small_models.like_minilm, "BERT; mean, normalised", ("all-MiniLM-L6-v2",),
        "verified on its own weights as well: FP32, FP16, INT8, STS",
    ),
    "bge": Form(
        small_models.like_bge,
        "BERT; cls, normalised, query prompt",
        (
            "bge-small-en-v1.5", "bge-base-en-v1.5", "mxbai-embed-large-v1",
            "snowflake-arctic-embed-m-v1.5",
        ),
    ),
    "e5": Form(
        small_models.like_e5, "BERT; mean, normalised, prompts `query` and `passage`",
        ("e5-small-v2",), "`document` means `passage`",
    ),
    "multilingual-minilm": Form(
        small_models.like_multilingual_minilm, "BERT with a Unigram tokenizer; mean",
        ("paraphrase-multilingual-MiniLM-L12-v2",),
    ),
    "mpnet": Form(
        small_models.like_mpnet, "MPNet, positions from 2; mean, normalised",
        ("all-mpnet-base-v2",),
    ),
    "distiluse": Form(
        small_models.like_distiluse, "DistilBERT; mean, Dense with tanh",
        ("distiluse-base-multilingual-cased-v2",),
    ),
    "codebert": Form(
        small_models.roberta, "RoBERTa, plain folder whose tokenizer names no limit; mean",
        ("codebert-base",), "512 tokens of 514 positions",
    ),
    "gte-modernbert": Form(
        small_models.like_gte_modernbert, "ModernBERT, local and global attention; cls",
        ("gte-modernbert-base",),
    ),
    "modernbert-embed": Form(
        small_models.like_modernbert_embed, "ModernBERT; mean, normalised, prompts",
        ("modernbert-embed-base",),
    ),
    "qwen3": Form(
        small_models.like_qwen3,
        "Qwen3 decoder, byte-level BPE; last token, left padding, instruction prompt",
        ("Qwen3-Embedding-0.6B",),
        "served up to 8192 tokens unless `--max-tokens` says more",
    ),
    "embeddinggemma": Form(
        small_models.like_embeddinggemma,
        "Gemma 3 in both directions, sliding window, byte-fallback BPE; mean, two Dense",
        ("embeddinggemma-300m",), "licence to be accepted: `--accept-licence Gemma`",
    ),
    "bge-m3": Form(
        small_models.like_bge_m3,
        "XLM-R; cls, normalised; sparse weights and multi-vectors by FlagEmbedding's definition",
        ("bge-m3", "snowflake-arctic-embed-l-v2.0"), "served up to 8192 tokens",
    ),
    "clip": Form(
        small_models.clip, "CLIP, both towers with their projections",
        ("clip-vit-base-patch32", "clip-vit-large-patch14"), "[Images](../guides/images.md)",
    ),
    "sentence-clip": Form(small_models.like_sentence_clip, "CLIP in a sentence-transformers folder"),
}  # fmt: skip
STATIC = {
    "static": Form(
        small_models.like_static, "sentence-transformers' StaticEmbedding",
        ("static-retrieval-mrl-en-v1",), "up to 32,768 tokens",
    ),
    "potion": Form(
        small_models.like_potion, "StaticEmbedding and Normalize",
        ("potion-base-8M", "potion-retrieval-32M", "potion-multilingual-128M"),
        "up to 32,768 tokens",
    ),
    "plain": Form(small_models.model2vec_plain, "plain model2vec folder"),
    "model2vec": Form(
        small_models.model2vec, "plain model2vec folder with weights and a mapping of ids", (),
        "unknown words are left out, as model2vec does",
    ),
}  # fmt: skip
RERANKERS = {
    "bert": Form(small_models.bert_reranker, "BERT with token types; sigmoid"),
    "xlm-roberta": Form(
        small_models.xlm_reranker, "XLM-R, no token types; sigmoid",
        ("bge-reranker-base", "bge-reranker-v2-m3"),
    ),
    "modernbert": Form(
        small_models.modernbert_reranker, "ModernBERT, local attention; sigmoid",
        ("gte-reranker-modernbert-base",),
    ),
    "cross-encoder": Form(
        small_models.like_cross_encoder, "BERT that CrossEncoder saved; the activation it names",
        ("ms-marco-MiniLM-L6-v2",),
    ),
}  # fmt: skip
CLASSIFIERS = {
    "nli": Form(small_models.nli_classifier, "BERT that CrossEncoder saved, three labels, pairs"),
    "topics": Form(
        small_models.topic_classifier, "plain BERT classifier, named labels, single texts", (),
        "probabilities, as transformers' pipeline gives them",
    ),
}  # fmt: skip
SPARSE = {
    "splade": Form(
        small_models.like_splade,
        "BERT, MLMTransformer and SpladePooling as sentence-transformers 5.0 named them; the maximum",
        ("splade-cocondenser-ensembledistil", "splade-v3"),
    ),
    "plain": Form(
        small_models.wide_bert_mlm, "plain BERT for masked language modelling; the maximum", (),
        "its folder says no kind: `--kind sparse`",
    ),
    "xlm-roberta": Form(
        small_models.splade_with_few_ids, "XLM-R with `max_active_dims`; the maximum",
    ),
    "roberta": Form(
        small_models.like_granite_sparse, "RoBERTa; the maximum", ("granite-embedding-30m-sparse",)
    ),
    "sums": Form(
        small_models.like_splade_with_sums, "RoBERTa; the sum over tokens, query prompt",
    ),
    "opensearch": Form(
        small_models.like_opensearch_sparse, "DistilBERT; the maximum, `log1p_relu`", (),
        "the form of opensearch-neural-sparse-encoding, for queries and documents alike",
    ),
    "auto-encoder": Form(
        small_models.sparse_auto_encoder, "BERT, mean, SparseAutoEncoder (CSR)", (),
        "ids are those of the auto-encoder, not of a vocabulary",
    ),
}  # fmt: skip
IMAGES = {
    "siglip": Form(
        small_image_models.siglip, "SigLIP, and SigLIP 2 of a fixed size: both towers, Gemma's "
        "tokenizer; texts padded to 64 tokens without a mask",
        ("siglip-base-patch16-224",),
        "its `tokenizer.json` is read, also where transformers has a slow tokenizer alone",
    ),
    "vit": Form(
        small_image_models.vit, "ViT with its pooler; `pooler_output`",
        ("vit-base-patch16-224-in21k",),
    ),
    "dinov2": Form(
        small_image_models.dinov2, "DINOv2, trained with larger images; `pooler_output`, its "
        "normalised class token", ("dinov2-base",),
    ),
    "swin": Form(small_image_models.swin, "Swin for classification; `pooler_output`, its mean"),
    "plain-clip": Form(
        small_image_models.plain_clip, "CLIP without `preprocessor_config.json`", (),
        "has the processor of the published CLIPs, and the build says so",
    ),
}  # fmt: skip
IMAGE_GRAPHS = {
    "vit-classifier": Form(
        small_image_models.vit_classifier, "ViT for classification, without a pooler; class token"
    ),
    "dinov2-with-registers": Form(
        small_image_models.dinov2_with_registers, "DINOv2 with registers; `pooler_output`"
    ),
    "beit": Form(
        small_image_models.beit, "BEiT for classification; `pooler_output`, the normalised mean"
    ),
    "deit": Form(
        small_image_models.deit, "DeiT for classification with a teacher; class token"
    ),
    "swinv2": Form(small_image_models.swinv2, "Swin v2; `pooler_output`"),
    "convnext": Form(small_image_models.convnext, "ConvNeXt; `pooler_output`"),
    "convnextv2": Form(small_image_models.convnextv2, "ConvNeXt v2; `pooler_output`"),
    "resnet": Form(small_image_models.resnet, "ResNet; `pooler_output`, the mean"),
    "mobilevit": Form(
        small_image_models.mobilevit, "MobileViT, blue first; `pooler_output`", (),
        "INT8 misses its bar in OpenVINO and is not published",
    ),
    "efficientnet": Form(small_image_models.efficientnet, "EfficientNet; `pooler_output`"),
    "ijepa": Form(small_image_models.ijepa, "I-JEPA; the mean of all positions"),
    "clip-vision": Form(
        small_image_models.clip_vision, "CLIP's vision tower alone, projected; `image_embeds`"
    ),
    "siglip-vision": Form(
        small_image_models.siglip_vision, "SigLIP's vision tower alone; `pooler_output`"
    ),
    "sentence-vit": Form(
        small_image_models.sentence_vit, "ViT that sentence-transformers saved; what its modules say"
    ),
}  # fmt: skip
ENGINES = {
    "deberta": Form(
        small_models.deberta_v2, "DeBERTa-v2; mean", (),
        "OpenVINO does not open it: it runs on onnxruntime's CPU engine",
    ),
    "deberta-reranker": Form(
        small_models.deberta_reranker, "DeBERTa-v2 reranker", ("mxbai-rerank-xsmall-v1",),
        "OpenVINO does not open it: it runs on onnxruntime's CPU engine",
    ),
    "longformer": Form(small_models.longformer, "Longformer; mean"),
}  # fmt: skip
DECODERS = {
    "qwen3": Form(
        small_models.qwen3_reranker,
        "Qwen3 decoder, plain folder with a chat template: the logits of yes and no",
        ("Qwen3-Reranker-0.6B",), "`--kind reranker` where the folder does not say it",
    ),
    "saved": Form(
        small_models.like_decoder_reranker, "the same, as CrossEncoder saved it with LogitScore"
    ),
    "joined": Form(
        small_models.decoder_reranker_without_a_template, "a decoder without a chat template"
    ),
}  # fmt: skip
ROUTERS = {
    "router": Form(
        small_models.like_router,
        "Router of a table of vectors for queries and BERT for documents, then Normalize",
    ),
    "asym": Form(small_models.like_asym, "BERT and Asym, with a Dense for each route"),
    "mapped": Form(
        small_models.like_mapped_router, "Router with route mappings and no route by default"
    ),
    "single": Form(small_models.like_router_of_one_route, "Router with one route for all texts"),
}  # fmt: skip
COSINE = "cosine ≥ 0.99999"
SCORE = "each score within 1e-4"
LATE = {
    "colbert": Form(
        small_models.like_colbert,
        "ColBERT checkpoint of BERT: `linear.weight`, `artifact.metadata`; queries filled up with "
        "tokens that nothing attends to",
        ("colbertv2.0", "answerai-colbert-small-v1"),
        "queries of 32 tokens; `--max-tokens` sets the limit of documents",
    ),
    "attending": Form(
        small_models.like_attending_colbert,
        "the same, queries attend to what fills them up; punctuation has vectors",
    ),
    "pylate": Form(small_models.like_pylate, "PyLate's folder of BERT: Transformer and Dense"),
    "modern-pylate": Form(
        small_models.like_modern_colbert,
        "PyLate's folder of ModernBERT, two Dense with residuals",
        (), "refused where a query is longer than half of the local attention",
    ),
    "without-expansion": Form(
        small_models.like_pylate_without_expansion,
        "PyLate's folder whose queries keep their length, with a prompt",
    ),
}  # fmt: skip
SUITES = (
    Suite(
        "Dense models", "dense", "sentence-transformers", COSINE, "tests/tools/test_models.py",
        DENSE,
    ),
    Suite(
        "Static models", "dense", "sentence-transformers, model2vec", COSINE,
        "tests/tools/kinds/test_static_models.py", STATIC,
    ),
    Suite(
        "Other engines, token types", "dense", "sentence-transformers, CrossEncoder",
        f"{COSINE}, or {SCORE}", "tests/tools/kinds/test_engines.py", ENGINES,
    ),
    Suite(
        "Towers for queries and documents", "dense", "encode_query and encode_document", COSINE,
        "tests/tools/kinds/test_router_models.py", ROUTERS,
    ),
    Suite(
        "Rerankers", "reranker", "CrossEncoder", SCORE, "tests/tools/kinds/test_rerankers.py", RERANKERS
    ),
    Suite(
        "Decoders as rerankers", "reranker", "CrossEncoder", SCORE,
        "tests/tools/kinds/test_decoder_rerankers.py", DECODERS,
    ),
    Suite(
        "Classifiers", "classifier", "CrossEncoder, transformers' pipeline", SCORE,
        "tests/tools/kinds/test_rerankers.py", CLASSIFIERS,
    ),
    Suite(
        "Sparse models", "sparse", "SparseEncoder", f"{COSINE}, the same ids",
        "tests/tools/kinds/test_sparse_models.py", SPARSE,
    ),
    Suite(
        "Late interaction", "late_interaction", "ColBERT's definition on transformers' model",
        "every vector's cosine ≥ 0.99999", "tests/tools/kinds/test_late_models.py", LATE,
    ),
    Suite(
        "Image encoders", "image", "transformers", COSINE,
        "tests/tools/kinds/test_image_models.py", IMAGES,
    ),
    Suite(
        "Image encoders, in process", "image", "transformers, by the built graph without a server",
        COSINE, "tests/tools/kinds/test_image_models.py", IMAGE_GRAPHS,
    ),
)  # fmt: skip
NOT_VERIFIED: dict[str, str] = {
    "nomic-embed-text-v1.5": "code of its own: `--trust-remote-code`. The opt-in is tested, and the "
    "layer norm before a cut as an operation; its architecture is not",
    "nomic-embed-text-v2-moe": "code of its own: `--trust-remote-code`. Its architecture, a mixture "
    "of experts, is not tested and may not trace",
    "gte-multilingual-base": "code of its own: `--trust-remote-code`. Its architecture is not tested",
    "jina-embeddings-v4": "code of its own, and a licence that must be accepted. Its architecture "
    "is not tested",
    "jina-reranker-v1-turbo-en": "code of its own: `--trust-remote-code`. Its architecture is not "
    "tested",
    "jina-reranker-v2-base-multilingual": "code of its own, and a licence that must be accepted. "
    "Its architecture is not tested",
}  # fmt: skip
"""Models of the catalogue whose architecture no test builds, and why."""
