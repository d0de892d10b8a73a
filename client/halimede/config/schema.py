"""The configuration as one typed object."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

from halimede import providers
from halimede.config.cache import CacheConfig
from halimede.config.gateway import GatewayConfig
from halimede.config.validation import validated
from halimede.inputs.urls import UrlOptions
from halimede.pipeline.fallback import Rules
from halimede.providers.base import Options
from halimede.providers.hash import MIN_DIMS


class Config(BaseModel):
    """Everything that an embedder needs to know."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, arbitrary_types_allowed=True)

    models: dict[str, Options]
    """Models by name. The names are yours; `default_model` and `fallback` use them."""
    default_model: str
    """Model that answers as long as it can. Default: the first of `models`."""
    fallback: tuple[str, ...] = ()
    """Models that answer, in this order, when those before them cannot."""
    space: str | None = None
    """Only space that may answer. Default: that of the default model."""
    allow_spaces: tuple[str, ...] = ()
    """Further spaces that a fallback may have. Vectors of two spaces cannot be compared."""
    min_cosine: float | None = Field(None, ge=-1, le=1)
    """Lowest recorded mean cosine of a fallback with the space of the default model."""
    deadline_s: PositiveFloat | None = Field(None, alias="deadline")
    """Longest time that one call may take, in seconds."""
    cache: CacheConfig | None = None
    """Cache of vectors. Without this key nothing is cached; `cache: {}` caches in memory."""
    urls: UrlOptions = Field(default_factory=lambda: UrlOptions.model_validate({}))
    """Which image urls are fetched."""
    gateway: GatewayConfig = Field(default_factory=lambda: GatewayConfig.model_validate({}))
    """What `halimede gateway` answers, and to whom."""
    development: bool = False
    """Answer with deterministic hashes of the texts instead of a model's vectors."""

    def chain(self) -> list[Options]:
        """Return the options of the models in the order in which they are asked."""
        if self.development:
            return [_hash_options(self.models[self.default_model])]
        return [self.models[name] for name in (self.default_model, *self.fallback)]

    def rules(self) -> Rules:
        """Return the rules that say which models may answer."""
        return Rules(self.space, self.allow_spaces, self.min_cosine)


def _hash_options(options: Options) -> Options:
    """Options of a hash provider whose vectors have the dimensions of these options.

    Raises:
        InvalidConfig: a hash has at most 3072 dims.
    """
    given: dict[str, object] = {"provider": "hash", "model_id": "development"}
    if options.dimensions is not None:
        dims = max(options.dimensions, MIN_DIMS)
        given |= {"dims": dims, "dimensions": options.dimensions}
    return validated(providers.options_of("hash"), given, "development")
