"""halimede: embeddings from a Triton Inference Server, with results that say what they are."""

from halimede.embedder import Embedder
from halimede.results import Embeddings, ServedModel
from halimede_ops.errors import (
    DeadlineExceeded,
    HalimedeError,
    InvalidDimensions,
    InvalidInput,
    InvalidText,
    ModelNotFound,
    ServerError,
    ServerOverloaded,
    ServerUnreachable,
    UnknownInputType,
)

__all__ = [
    "DeadlineExceeded",
    "Embedder",
    "Embeddings",
    "HalimedeError",
    "InvalidDimensions",
    "InvalidInput",
    "InvalidText",
    "ModelNotFound",
    "ServedModel",
    "ServerError",
    "ServerOverloaded",
    "ServerUnreachable",
    "UnknownInputType",
]
