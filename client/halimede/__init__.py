"""halimede: embeddings from Triton and other providers, with results that say what they are."""

from halimede.config import Config
from halimede.embedder import AsyncEmbedder, Embedder
from halimede.results import Embeddings, ServedModel
from halimede_ops.errors import (
    AccessDenied,
    DeadlineExceeded,
    HalimedeError,
    InvalidConfig,
    InvalidDimensions,
    InvalidInput,
    InvalidModel,
    InvalidText,
    MissingExtra,
    ModelChanged,
    ModelNotFound,
    OutOfMemory,
    ServerError,
    ServerOverloaded,
    ServerUnreachable,
    SpaceRefused,
    UnknownInputType,
)

__all__ = [
    "AccessDenied",
    "AsyncEmbedder",
    "Config",
    "DeadlineExceeded",
    "Embedder",
    "Embeddings",
    "HalimedeError",
    "InvalidConfig",
    "InvalidDimensions",
    "InvalidInput",
    "InvalidModel",
    "InvalidText",
    "MissingExtra",
    "ModelChanged",
    "ModelNotFound",
    "OutOfMemory",
    "ServedModel",
    "ServerError",
    "ServerOverloaded",
    "ServerUnreachable",
    "SpaceRefused",
    "UnknownInputType",
]
