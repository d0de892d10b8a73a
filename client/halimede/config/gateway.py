"""The configuration of the gateway: the key `gateway` of the configuration file."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt


class GatewayConfig(BaseModel):
    """What the gateway answers, and to whom."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    aliases: dict[str, str] = Field(default_factory=dict)
    """Further names of models, such as `text-embedding-3-small: all-MiniLM-L6-v2`. An answer names
    the true model in the header `halimede-model`."""
    serve_all: bool = True
    """Answer for every model of the configured servers, not only for those in `models`."""
    keys: Path | None = None
    """File of API keys, of `halimede gateway-key`. Without it, and without
    `HALIMEDE_GATEWAY_KEYS`, everybody may ask."""
    limits_storage: str = "memory://"
    """Where rates and quotas are counted: `memory://` counts in each worker; `redis://host:port`
    counts for all workers and gateways together, and keeps quotas over a restart."""
    max_body_mib: PositiveFloat = 32.0
    """Largest body of a request, in MiB."""
    max_inputs: PositiveInt = 2048
    """Maximum texts, images or documents in one request."""
    max_request_tokens: PositiveInt | None = None
    """Maximum tokens of one request, those that were cut off included."""
    max_requests: PositiveInt = 1024
    """Maximum requests under way in one worker. Further ones are refused as overload."""
    body_timeout_s: PositiveFloat = Field(30.0, alias="body_timeout")
    """Seconds in which a body must have arrived."""
    drain_s: PositiveFloat = Field(30.0, alias="drain")
    """Seconds that requests under way get to end when the gateway is stopped."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may ask, such as `https://app.example`. Default: none."""
    kserve_url: str | None = None
    """`http://host:port` of the Triton to which `/v2` is proxied. Default: port 8000 of the default
    model's first server."""
    decode_tokens: str | None = None
    """Encoding of tiktoken, such as `cl100k_base`, in which texts given as token ids are decoded.
    Default: they are refused, because they are no ids of the model's own."""
    files: Path | None = None
    """Folder of the files and batches of the OpenAI dialect. Default: they are refused."""
    int8_range: PositiveFloat | None = None
    """Components of -int8_range … int8_range become int8 -128 … 127 and uint8 0 … 255. Default:
    4 / √dims. It is one for all texts, so vectors of two requests can be compared."""
    playground: bool = True
    """Serve the page to try models on, at `/`."""
