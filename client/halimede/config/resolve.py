"""The configuration of an embedder: argument > environment > file > default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halimede import providers
from halimede.config.environment import Settings
from halimede.config.file import load, parse
from halimede.config.schema import Config
from halimede.config.validation import check_known, validated
from halimede.models import catalogue
from halimede.providers.base import Options
from halimede_ops.errors import InvalidConfig


def resolve(
    config: Config | Mapping[str, Any] | Path | str | None = None,
    *,
    url: str | Sequence[str] | None = None,
    model: str | None = None,
    timeout_s: float | None = None,
    deadline_s: float | None = None,
) -> Config:
    """Return the configuration after these arguments, the environment, the file and the defaults.

    `config` is a configuration, a mapping, or the path of a file. `url` and `timeout_s` apply to
    the default model.

    Raises:
        InvalidConfig: the configuration or an argument is invalid.
    """
    arguments: dict[str, Any] = {
        "url": url,
        "model": model,
        "timeout_s": timeout_s,
        "deadline_s": deadline_s,
    }
    settings = Settings(**{key: value for key, value in arguments.items() if value is not None})
    base = _base(config, settings)
    name = base.default_model
    if settings.model is not None:
        check_known(settings.model, base.models, "models")
        name = settings.model
    return base.model_copy(
        update={
            "default_model": name,
            "models": {**base.models, name: _overridden(name, base.models[name], settings)},
            "fallback": tuple(other for other in base.fallback if other != name),
            "deadline_s": base.deadline_s if settings.deadline_s is None else settings.deadline_s,
        }
    )


def _base(config: Config | Mapping[str, Any] | Path | str | None, settings: Settings) -> Config:
    """The configuration given, else that of the environment, else one of a single model."""
    source = config if config is not None else settings.config
    if isinstance(source, Config):
        return source
    if isinstance(source, Mapping):
        return parse(source)
    if isinstance(source, (str, Path)):
        return load(Path(source))
    if source is not None:
        raise InvalidConfig(
            f"config is {type(source).__name__}; give a Config, a mapping or the path of a file."
        )
    name = settings.model or catalogue.DEFAULT
    return parse({"models": {name: {"provider": "triton", "model_id": name}}})


def _overridden(name: str, options: Options, settings: Settings) -> Options:
    """A model's options with the url and the time limit of the settings."""
    if settings.url is not None and "url" not in type(options).model_fields:
        raise InvalidConfig(f"url is given, but {name} is of provider {options.provider}.")
    overrides = {"url": settings.url, "timeout_s": settings.timeout_s}
    given = {key: value for key, value in overrides.items() if value is not None}
    if not given:
        return options
    return validated(type(options), options.model_dump() | given, name)


def in_process(config: Config) -> Config:
    """Return the configuration with its default model run in this process, without Triton."""
    name = config.default_model
    given = {"provider": "onnx", "model_id": config.models[name].model_id}
    options = validated(providers.options_of("onnx"), given, f"models.{name}")
    return config.model_copy(update={"models": {**config.models, name: options}})
