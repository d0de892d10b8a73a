"""Fallback: the order in which providers are asked, and which of their spaces may answer."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence

from halimede.pipeline.guard import GuardedProvider
from halimede.results import ServedModel
from halimede_ops.errors import HalimedeError, SpaceRefused

log = logging.getLogger("halimede")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which models may answer."""

    space: str | None = None
    """The only space that may answer. None: that of the first provider."""
    allow_spaces: Collection[str] = ()
    """Further spaces that may answer."""
    min_cosine: float | None = None
    """Lowest recorded mean cosine of a fallback in the same space. None: any."""


class Fallback:
    """Providers in their configured order.

    The first provider's space is the one that may answer. Until the first was described, the first
    that is described stands in for it. `Rules.space` decides it for good.
    """

    def __init__(self, providers: Sequence[GuardedProvider], rules: Rules) -> None:
        self.providers = providers
        self.first = providers[0]
        """The provider that answers as long as it can."""
        self._rules = rules
        self._space = rules.space
        for provider in providers[:-1]:
            provider.has_next = True

    def in_order(self) -> Sequence[GuardedProvider]:
        """Providers in the order to try them: one that is known to be down comes last."""
        if len(self.providers) == 1:
            return self.providers
        return sorted(self.providers, key=lambda provider: provider.is_down)

    def admit(self, provider: GuardedProvider, model: ServedModel) -> None:
        """Check that a provider's model may answer.

        Raises:
            SpaceRefused: its space is another and not allowed, or its precision is too low.
        """
        if self._rules.space is None and model.space != self._space:
            self._learn_space(provider, model)
        if model.space != self._space:
            self._check_allowed(provider, model)
        elif provider is not self.first:
            self._check_cosine(provider, model)

    def _learn_space(self, provider: GuardedProvider, model: ServedModel) -> None:
        if provider is self.first or (self._space is None and not provider.options.other_space):
            if self._space is not None:
                log.warning("space changed: %s → %s (%s)", self._space, model.space, provider.name)
            self._space = model.space

    def _check_allowed(self, provider: GuardedProvider, model: ServedModel) -> None:
        if provider.options.other_space or model.space in self._rules.allow_spaces:
            return
        raise SpaceRefused(
            f"{provider.name} has space {model.space}, not {self._space}: their vectors cannot be "
            "compared. Allow it by other_space or allow_spaces, if no result is compared with "
            "others."
        )

    def _check_cosine(self, provider: GuardedProvider, model: ServedModel) -> None:
        least = self._rules.min_cosine
        if least is None or (model.mean_cosine is not None and model.mean_cosine >= least):
            return
        recorded = "unknown" if model.mean_cosine is None else f"{model.mean_cosine:.6f}"
        raise SpaceRefused(
            f"{provider.name} ({model.precision}) has a mean cosine of {recorded}; min_cosine is "
            f"{least:g}."
        )

    def failed(self, failures: Mapping[GuardedProvider, HalimedeError]) -> HalimedeError:
        """Return the error of the first provider, in the words of all if there are several."""
        failed = [provider for provider in self.providers if provider in failures]
        error = failures[failed[0]]
        if len(failed) == 1:
            return error
        reasons = " | ".join(f"{provider.name}: {failures[provider]}" for provider in failed)
        return type(error)(f"no provider could answer. {reasons}", index=error.index)
