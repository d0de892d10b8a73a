"""API keys: who may ask which models, how much, and how often."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import hmac
import os
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from halimede.config.file import read_yaml
from halimede.config.gateway import GatewayConfig
from halimede.config.validation import validated
from halimede.gateway.edge.limits import Allowance, Limits
from halimede.gateway.errors import Problem
from halimede_ops.errors import InvalidConfig

ENVIRONMENT = "HALIMEDE_GATEWAY_KEYS"
"""Variable of keys without limits, separated by commas."""
HEADERS = (b"authorization", b"x-api-key", b"api-key")
"""Headers in which a key comes."""
BEARER = b"bearer "


class Key(BaseModel):
    """An API key and what it is for. The key itself is not kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[\w.@-]{1,64}$")
    """Its name in logs, metrics and errors."""
    sha256: str = Field(pattern="^[0-9a-fA-F]{64}$")
    """SHA-256 of the key, in hex."""
    models: tuple[str, ...] = Field(default=("*",), min_length=1)
    """Patterns of the names of the models that it is for, such as `bge-*`."""
    requests_per_s: PositiveInt | None = None
    tokens_per_min: PositiveInt | None = None
    tokens_per_day: PositiveInt | None = None


@dataclasses.dataclass
class Caller:
    """Who asks."""

    key_id: str = ""
    """Name of the key. Empty: the gateway has no keys."""
    space: str | None = None
    """The only space whose answers are wanted."""
    models: Sequence[str] = ("*",)
    """Patterns of the names of the models that the key is for."""
    allowance: Allowance | None = None
    """What is left of the key's limits. None: it has none."""

    def check_model(self, name: str) -> None:
        """Raise unless the key is for this model."""
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.models):
            raise Problem(
                403,
                f"the key {self.key_id} is not for this model. Ask another model, or have the "
                "model added to the key's `models`.",
            )

    async def check_tokens(self) -> None:
        """Raise unless tokens are left of the key's rate and quota."""
        if self.allowance is not None:
            self.allowance.check_tokens()

    async def charge(self, tokens: int) -> None:
        """Count tokens that were answered."""
        if self.allowance is not None:
            await self.allowance.charge(tokens)


class Keys:
    """The keys of a gateway."""

    def __init__(self, keys: Sequence[Key], limits: Limits) -> None:
        self._by_id = {key.id: key for key in keys}
        self._digests = [(bytes.fromhex(key.sha256), key) for key in keys]
        self._limits = limits

    @classmethod
    def read(cls, config: GatewayConfig) -> Keys:
        """Return the keys of the configured file and of the environment.

        Raises:
            InvalidConfig: the file cannot be read, or an entry of it is invalid.
        """
        keys = [] if config.keys is None else parse(read_yaml(config.keys, "the file of API keys"))
        secrets = [part.strip() for part in os.environ.get(ENVIRONMENT, "").split(",")]
        keys += [
            Key(id=f"environment-{number}", sha256=sha256(secret.encode()))
            for number, secret in enumerate(filter(None, secrets), 1)
        ]
        return cls(keys, Limits(config.limits_storage))

    def find(self, headers: Iterable[tuple[bytes, bytes]]) -> Key | None:
        """Return the key that a request's headers have.

        Raises:
            Problem: there are keys, and the headers have none of them.
        """
        if not self._digests:
            return None
        given = [value for name, value in headers if name in HEADERS]
        found = None
        for value in given:
            secret = value[len(BEARER) :] if value[: len(BEARER)].lower() == BEARER else value
            digest = hashlib.sha256(secret.strip()).digest()
            for known, key in self._digests:  # all, so that the time tells nothing
                if hmac.compare_digest(digest, known):
                    found = key
        if found is None:
            what = "is not known" if given else "is missing"
            raise Problem(
                401,
                f"the API key {what}. Send it as `Authorization: Bearer KEY`, or as `x-api-key`.",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found

    async def caller(self, key: Key | None, space: str | None, requests: int = 1) -> Caller:
        """Return the caller with a key, and count these requests of it."""
        if key is None:
            return Caller(space=space)
        allowance = await self._limits.allowance(key, requests)
        return Caller(key.id, space, key.models, allowance)

    async def caller_of(self, key_id: str, space: str | None) -> Caller:
        """Return the caller of a key for work in the background, of which no request is counted.

        Raises:
            Problem: the key is gone.
        """
        if not key_id and not self._digests:
            return Caller(space=space)
        if key_id not in self._by_id:
            raise Problem(401, "the API key that this was asked with is not known any more.")
        return await self.caller(self._by_id[key_id], space, requests=0)

    async def close(self) -> None:
        """Close the connection to the limits' storage."""
        await self._limits.close()


def parse(raw: object) -> list[Key]:
    """Return the keys in the content of a file.

    Raises:
        InvalidConfig: it is no list of keys, or two keys have one id.
    """
    if not isinstance(raw, list) or not all(isinstance(entry, dict) for entry in raw):
        raise InvalidConfig(
            "the file of API keys is a list of entries with `id` and `sha256`. "
            "`halimede gateway-key` prints one."
        )
    keys = [
        validated(Key, {str(name): value for name, value in entry.items()}, f"keys.{index}")
        for index, entry in enumerate(raw)
    ]
    if len({key.id for key in keys}) < len(keys):
        raise InvalidConfig("two API keys have the same id. Give each its own.")
    return keys


def sha256(secret: bytes) -> str:
    """Return the SHA-256 of a key, in hex."""
    return hashlib.sha256(secret).hexdigest()
