"""Providers in the order to ask them, and which of their spaces may stand in for which."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence

from halimede.pipeline.link import Link
from halimede.results import ServedModel
from halimede_ops.errors import HalimedeError, SpaceRefused

log = logging.getLogger("halimede")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which models may answer."""

    space: str | None = None
    """The only space wanted; None: that of the first provider."""
    allow_spaces: Collection[str] = ()
    """Further spaces that may answer; results say so."""
    min_cosine: float | None = None
    """Lowest recorded mean cosine of a fallback in the same space; None: any."""


class Chain:
    """Links in configured order.

    The first link's space is the chain's. Until the first was heard of, the first link that is
    heard of stands in for it; `Rules.space` decides it for good.
    """

    def __init__(self, links: Sequence[Link], rules: Rules) -> None:
        self.links = links
        self.rules = rules
        self._space = rules.space
        for link in links[:-1]:
            link.has_next = True

    @property
    def first(self) -> Link:
        """The link that answers as long as it can."""
        return self.links[0]

    def in_order(self) -> list[Link]:
        """Links in the order to try them: one known to be down comes after the others."""
        return sorted(self.links, key=lambda link: link.breaker.is_open)

    def admit(self, link: Link, model: ServedModel) -> None:
        """Nothing when this model may answer.

        Raises:
            SpaceRefused: its space is not the chain's and not allowed, or its precision is too low.
        """
        if self.rules.space is None:
            self._learn_space(link, model)
        if model.space != self._space:
            self._check_allowed(link, model)
        elif link is not self.first:
            self._check_cosine(link, model)

    def _learn_space(self, link: Link, model: ServedModel) -> None:
        if self._space == model.space or (link is not self.first and self._space is not None):
            return
        if link is self.first or not link.options.other_space:
            if self._space is not None:
                log.warning("space changed: %s → %s (%s)", self._space, model.space, link.name)
            self._space = model.space

    def _check_allowed(self, link: Link, model: ServedModel) -> None:
        if link.options.other_space or model.space in self.rules.allow_spaces:
            return
        raise SpaceRefused(
            f"{link.name} has space {model.space}, not {self._space}: their vectors cannot be "
            "compared. Allow it by other_space or allow_spaces, if no result is compared with "
            "others."
        )

    def _check_cosine(self, link: Link, model: ServedModel) -> None:
        least = self.rules.min_cosine
        if least is None or (model.mean_cosine is not None and model.mean_cosine >= least):
            return
        recorded = "unknown" if model.mean_cosine is None else f"{model.mean_cosine:.6f}"
        raise SpaceRefused(
            f"{link.name} ({model.precision}) has a mean cosine of {recorded}; min_cosine is "
            f"{least:g}."
        )

    def failed(self, failures: Mapping[Link, HalimedeError]) -> HalimedeError:
        """The failure of the first link; of several, in words of each."""
        told = [(link, failures[link]) for link in self.links if link in failures]
        _, error = told[0]
        if len(told) == 1:
            return error
        words = " | ".join(f"{link.name}: {failure}" for link, failure in told)
        return type(error)(f"no provider could answer. {words}")
