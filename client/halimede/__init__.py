"""halimede: embeddings and scores from Triton and other providers, with results that say what they
are.
"""

from halimede.classifier import AsyncClassifier, Classifier
from halimede.config.schema import Config
from halimede.documents.chunking import Chunk, Chunker
from halimede.embedder import AsyncEmbedder, Embedder
from halimede.index.guard import Guard, guard
from halimede.inputs.archives import find_images
from halimede.integrations.sentence_transformers import as_sentence_transformer
from halimede.pipeline.sharing import completed
from halimede.pipeline.waiting import Future
from halimede.providers.base import Answer, Provider, Request
from halimede.reranker import AsyncReranker, Reranker
from halimede.results import (
    Classification,
    DocumentEmbeddings,
    Embeddings,
    ImageInfo,
    MultiEmbeddings,
    Ranked,
    Ranking,
    Result,
    Scores,
    ServedModel,
    SparseEmbeddings,
)
from halimede_ops import maxsim
from halimede_ops.errors import (
    AccessDenied,
    DeadlineExceeded,
    FetchFailed,
    HalimedeError,
    ImageTooLarge,
    InvalidConfig,
    InvalidDimensions,
    InvalidImage,
    InvalidInput,
    InvalidModel,
    InvalidText,
    MissingExtra,
    ModelChanged,
    ModelNotFound,
    NonFiniteVector,
    OutOfMemory,
    ServerError,
    ServerOverloaded,
    ServerUnreachable,
    SpaceRefused,
    UnknownInputType,
    UnsupportedInput,
    UrlRefused,
)

__all__ = [
    "AccessDenied",
    "Answer",
    "AsyncClassifier",
    "AsyncEmbedder",
    "AsyncReranker",
    "Chunk",
    "Chunker",
    "Classification",
    "Classifier",
    "Config",
    "DeadlineExceeded",
    "DocumentEmbeddings",
    "Embedder",
    "Embeddings",
    "FetchFailed",
    "Future",
    "Guard",
    "HalimedeError",
    "ImageInfo",
    "ImageTooLarge",
    "InvalidConfig",
    "InvalidDimensions",
    "InvalidImage",
    "InvalidInput",
    "InvalidModel",
    "InvalidText",
    "MissingExtra",
    "ModelChanged",
    "ModelNotFound",
    "MultiEmbeddings",
    "NonFiniteVector",
    "OutOfMemory",
    "Provider",
    "Ranked",
    "Ranking",
    "Request",
    "Reranker",
    "Result",
    "Scores",
    "ServedModel",
    "ServerError",
    "ServerOverloaded",
    "ServerUnreachable",
    "SpaceRefused",
    "SparseEmbeddings",
    "UnknownInputType",
    "UnsupportedInput",
    "UrlRefused",
    "as_sentence_transformer",
    "completed",
    "find_images",
    "guard",
    "maxsim",
]
