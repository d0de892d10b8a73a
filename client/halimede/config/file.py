"""The client's configuration: a YAML file, read into typed objects, checked key by key.

Argument > environment > file > default. Secrets are named here, never given.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from halimede import providers
from halimede.config.cache import CacheConfig
from halimede.config.environment import Settings
from halimede.inputs.urls import UrlOptions
from halimede.pipeline.chain import Rules
from halimede.providers.base import Options
from halimede_ops.errors import InvalidConfig

DEFAULT_MODEL = "all-MiniLM-L6-v2"
SECRET_KEY = re.compile(r"(?:^|_)(?:api_?key|key|token|password|passwd|secret)$", re.IGNORECASE)
SECRET_VALUE = re.compile(r"^(?:sk-|hf_|Bearer )|://[^/\s]*@")
Model = TypeVar("Model", bound=BaseModel)


class Config(BaseModel):
    """What an embedder is made of."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, arbitrary_types_allowed=True)

    models: dict[str, Options]
    """Models by the names that this configuration gives them."""
    default_model: str
    """The model that answers as long as it can."""
    fallback: tuple[str, ...] = ()
    """Models that answer when those before cannot, in this order."""
    space: str | None = None
    """The only space wanted; null: that of the default model."""
    allow_spaces: tuple[str, ...] = ()
    """Further spaces that a fallback may have."""
    min_cosine: float | None = Field(None, ge=-1, le=1)
    """Lowest recorded mean cosine of a fallback in the same space."""
    deadline_s: PositiveFloat | None = Field(None, alias="deadline")
    """Longest time that one call may take, in seconds."""
    cache: CacheConfig | None = None
    urls: UrlOptions = Field(default_factory=lambda: UrlOptions.model_validate({}))
    """Which urls of images are fetched."""
    development: bool = False
    """Answer with deterministic hashes of the texts instead of any model."""

    def chain(self) -> list[Options]:
        """Options of the models in the order to ask them."""
        if self.development:
            return [_hash_like(self.models[self.default_model])]
        return [self.models[name] for name in (self.default_model, *self.fallback)]

    def rules(self) -> Rules:
        """Which models may answer."""
        return Rules(self.space, self.allow_spaces, self.min_cosine)


def load(path: Path) -> Config:
    """The configuration in a YAML file.

    Raises:
        InvalidConfig: it cannot be read, is no YAML, has an unknown key, an impossible value or
            a secret.
    """
    import yaml

    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise InvalidConfig(f"the configuration cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise InvalidConfig("the configuration is not UTF-8.") from None
    except yaml.YAMLError as error:
        # The error itself repeats what stands there.
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise InvalidConfig(f"the configuration is no YAML{where}.") from None
    return parse(raw)


def parse(raw: Any) -> Config:
    """The configuration in a mapping.

    Raises:
        InvalidConfig: it has an unknown key, an impossible value or a secret.
    """
    if not isinstance(raw, Mapping) or not isinstance(raw.get("models"), Mapping):
        raise InvalidConfig(
            "a configuration is a mapping with `models`, such as "
            "models: {minilm: {provider: triton, model_id: all-MiniLM-L6-v2}}."
        )
    _refuse_secrets(raw, "")
    models = {str(name): _options(str(name), given) for name, given in raw["models"].items()}
    if not models:
        raise InvalidConfig("models is empty; name at least one.")
    given = {"default_model": next(iter(models)), **raw, "models": models}
    config = _validated(Config, given, "")
    for name in (config.default_model, *config.fallback):
        _check_known(name, models, "models")
    return config


def resolve(
    config: Config | Mapping[str, Any] | Path | str | None = None,
    *,
    url: str | Sequence[str] | None = None,
    model: str | None = None,
    timeout_s: float | None = None,
    deadline_s: float | None = None,
) -> Config:
    """The configuration of an embedder: these arguments, the environment, the file, the defaults.

    Raises:
        InvalidConfig: the configuration, or an argument, cannot be.
    """
    given: dict[str, Any] = {
        "url": url,
        "model": model,
        "timeout_s": timeout_s,
        "deadline_s": deadline_s,
    }
    settings = Settings(**{key: value for key, value in given.items() if value is not None})
    found = _found(config, settings)
    changes: dict[str, Any] = {}
    if settings.deadline_s is not None:
        changes["deadline_s"] = settings.deadline_s
    if settings.model is not None:
        _check_known(settings.model, found.models, "models")
        changes["default_model"] = settings.model
    found = found.model_copy(update=changes)
    overrides = {"url": settings.url, "timeout_s": settings.timeout_s}
    first = _overridden(
        found.default_model,
        found.models[found.default_model],
        {key: value for key, value in overrides.items() if value is not None},
    )
    fallback = tuple(name for name in found.fallback if name != found.default_model)
    models = {**found.models, found.default_model: first}
    return found.model_copy(update={"models": models, "fallback": fallback})


def _found(config: Config | Mapping[str, Any] | Path | str | None, settings: Settings) -> Config:
    source = config if config is not None else settings.config
    if isinstance(source, Config):
        return source
    if isinstance(source, Mapping):
        return parse(source)
    if source is not None:
        return load(Path(source))
    name = settings.model or DEFAULT_MODEL
    return parse({"models": {name: {"provider": "triton", "model_id": name}}})


def _overridden(name: str, options: Options, overrides: dict[str, Any]) -> Options:
    if "url" in overrides and "url" not in type(options).model_fields:
        raise InvalidConfig(f"url is given, but {name} is of provider {options.provider}.")
    if not overrides:
        return options
    given = options.model_dump() | overrides
    return _validated(type(options), given, name)


def _options(name: str, given: Any) -> Options:
    where = f"models.{name}"
    if not isinstance(given, Mapping) or not isinstance(given.get("provider"), str):
        raise InvalidConfig(f"{where} names no provider; use {', '.join(providers.KINDS)}.")
    return _validated(providers.options_of(given["provider"]), given, where)


def _hash_like(options: Options) -> Options:
    dims = {} if options.dimensions is None else {"dims": options.dimensions}
    return providers.options_of("hash").model_validate({"model_id": "development", **dims})


def _validated(model: type[Model], given: Mapping[str, Any], where: str) -> Model:
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        raise InvalidConfig(
            "; ".join(_told(problem, model, where) for problem in error.errors())
        ) from None


def _told(problem: Any, model: type[BaseModel], where: str) -> str:
    """One problem of pydantic's in our words; the value given is never repeated."""
    path = [str(part) for part in problem["loc"]]
    place = ".".join([where, *path] if where else path)
    if problem["type"] == "extra_forbidden":
        known = _keys(_model_at(model, path[:-1]))
        return f"{place} is not known.{_nearest(path[-1], known)} Known: {', '.join(known)}."
    said = problem["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{place}: {said}."


def _model_at(model: type[BaseModel], path: Iterable[str]) -> type[BaseModel]:
    """The nested model that a path of keys leads to."""
    for key in path:
        for name, field in model.model_fields.items():
            if key in (name, field.alias):
                nested = [field.annotation, *getattr(field.annotation, "__args__", ())]
                model = next(
                    part
                    for part in nested
                    if isinstance(part, type) and issubclass(part, BaseModel)
                )
    return model


def _keys(model: type[BaseModel]) -> list[str]:
    return sorted(field.alias or name for name, field in model.model_fields.items())


def _check_known(name: str, known: Iterable[str], what: str) -> None:
    known = list(known)
    if name not in known:
        raise InvalidConfig(
            f"{name!r} is not among {what}: {', '.join(known)}.{_nearest(name, known)}"
        )


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {near[0]}?" if near else ""


def _refuse_secrets(given: Any, where: str) -> None:
    if isinstance(given, Mapping):
        for key, value in given.items():
            place = f"{where}.{key}" if where else str(key)
            if SECRET_KEY.search(str(key)):
                raise InvalidConfig(_secret(place))
            _refuse_secrets(value, place)
    elif isinstance(given, list):
        for value in given:
            _refuse_secrets(value, where)
    elif isinstance(given, str) and SECRET_VALUE.search(given):
        raise InvalidConfig(_secret(where))


def _secret(place: str) -> str:
    return (
        f"{place} looks like a secret, and secrets do not belong in a configuration. Name the "
        "environment variable that holds it (api_key_env, url_env), or a file (api_key_file)."
    )
