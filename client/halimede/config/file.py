"""The configuration file: YAML, read into a `Config` and checked key by key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halimede import providers
from halimede.config.schema import Config
from halimede.config.secrets import refuse_secrets
from halimede.config.validation import check_known, validated
from halimede.providers.base import Options
from halimede_ops.errors import InvalidConfig


def load(path: Path) -> Config:
    """Return the configuration in a YAML file.

    Raises:
        InvalidConfig: the file cannot be read, is not YAML, or has an unknown key, an invalid
            value or a secret.
    """
    return parse(read_yaml(path, "the configuration"))


def read_yaml(path: Path, what: str) -> Any:
    """Return what a YAML file contains; `what` names the file in errors.

    Raises:
        InvalidConfig: the file cannot be read, or is not YAML.
    """
    import yaml

    try:
        return yaml.safe_load(path.expanduser().read_text("utf-8-sig"))
    except RuntimeError:  # ~ of a user without a home directory
        raise InvalidConfig(f"{what}'s path has ~, but the user has no home.") from None
    except OSError as error:
        raise InvalidConfig(f"{what} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise InvalidConfig(f"{what} is not UTF-8.") from None
    except yaml.YAMLError as error:
        # Not the message: it repeats what the file contains.
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise InvalidConfig(f"{what} is no YAML{line}.") from None


def parse(raw: Any) -> Config:
    """Return the configuration in a mapping.

    Raises:
        InvalidConfig: it has an unknown key, an invalid value or a secret.
    """
    if not isinstance(raw, Mapping) or not isinstance(raw.get("models"), Mapping):
        raise InvalidConfig(
            "a configuration is a mapping with `models`, such as "
            "models: {minilm: {provider: triton, model_id: all-MiniLM-L6-v2}}."
        )
    refuse_secrets(raw)
    models = {str(name): _options(str(name), given) for name, given in raw["models"].items()}
    if not models:
        raise InvalidConfig("`models` is empty. Name at least one model.")
    config = validated(Config, {"default_model": next(iter(models)), **raw, "models": models}, "")
    for name in (config.default_model, *config.fallback):
        check_known(name, models, "models")
    return config


def _options(name: str, given: Any) -> Options:
    place = f"models.{name}"
    if not isinstance(given, Mapping) or not isinstance(given.get("provider"), str):
        raise InvalidConfig(f"{place} names no provider; use {', '.join(providers.KINDS)}.")
    return validated(providers.options_of(given["provider"]), given, place)
