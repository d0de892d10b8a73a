"""Deploy: another version of a served model, loaded beside it, then in its place, and back.

The repository says how far a deployment is, so each step can be run again: a candidate that lies
there waits, its config says its share, and an ensemble remembers the version before. Disk first,
then the servers; a server that cannot load what it is told goes on with what it had.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from halimede_ops import spec
from halimede_ops.errors import DeployError, HalimedeError, InvalidInput, SpaceChange
from halimede_repository import configs
from halimede_tools.build import candidates, model_config, repository
from halimede_tools.deploy.control import Control


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A model's ensembles, and the servers that serve them from one repository."""

    model: str
    """Name it is served under: all its precisions; or the name of one of them."""
    folder: Path
    """The repository."""
    servers: Sequence[Control]
    forgiving: bool = False
    """Whether a server that cannot be told is passed over: on disk it finds what to serve."""

    @property
    def built_as(self) -> str:
        """Name of the model without a precision.

        Raises:
            DeployError: the repository does not serve it.
        """
        [(name, version), *_] = self._served(self._names()).items()
        return spec.load(self.folder / name / str(version)).name

    def waiting(self) -> dict[str, int]:
        """Ensemble → version of its candidate.

        Raises:
            DeployError: there is none.
        """
        waiting = candidates.versions(self._names(), self.folder)
        if not waiting:
            raise DeployError(
                f"{self.model} has no candidate. Build one: halimede build MODEL "
                f"--name {self.model} --candidate"
            )
        return waiting

    def publish(self) -> dict[str, int]:
        """Load the candidates; each is warm, and takes no share yet.

        Raises:
            DeployError: there is none, or one does not load: it is removed.
            HalimedeError: a server cannot be told; run it again.
        """
        waiting = self.waiting()
        self._check_fusions(waiting)
        try:
            self._load([candidates.candidate_name(name) for name in waiting])
        except DeployError:
            self._remove(waiting)
            raise
        return waiting

    def canary(self, share: float) -> dict[str, int]:
        """Give the candidates this share of the requests; clients follow within CHECK_S seconds.

        Raises:
            InvalidInput: the share is not from 0 to 1.
            SpaceChange: a candidate's vectors cannot be compared with those that are served.
            HalimedeError: as `publish`.
        """
        if not 0 <= share <= 1:
            raise InvalidInput(f"share is {share:g}; give a share of all requests, from 0 to 1.")
        waiting = self.waiting()
        self._check_fit(waiting)
        self._check_mix(waiting)
        before = {name: candidates.share(name, self.folder) for name in waiting}
        try:
            self._give(waiting, dict.fromkeys(waiting, share))
        except HalimedeError:
            self._forgiving()._give(waiting, before)
            raise
        return waiting

    def promote(self, change_space: bool = False) -> dict[str, int]:
        """Serve the candidates under their models' names, and nothing beside them.

        Raises:
            SpaceChange: that changes the space of a name, and `change_space` is not given.
            DeployError: they cannot take the names, or do not load; what was served is served on.
            HalimedeError: as `publish`.
        """
        waiting = self.waiting()
        self._check_fusions(waiting)
        self._check_fit(waiting)
        self._check_space(waiting, change_space)
        before = self._served(waiting)
        repository.remember(waiting, self.folder)
        try:
            self._move(waiting)
        except HalimedeError:
            self._forgiving()._move(before)
            raise
        self._remove(waiting)
        repository.prune(waiting, self.folder)
        return waiting

    def roll_back(self) -> dict[str, int]:
        """Take the candidates away; where there are none, or a promotion was begun, serve what was
        served before it. The versions that are served then.

        Raises:
            DeployError: there is no candidate and no version before.
            HalimedeError: as `publish`.
        """
        names = self._names()
        waiting = candidates.versions(names, self.folder)
        served = self._served(names)
        before = {name: repository.previous(self.folder / name) for name in names}
        back = {
            name: version
            for name, version in before.items()
            if version not in (None, served[name])
            and (not waiting or waiting.get(name) == served[name])
        }
        if not waiting and not back:
            raise DeployError(f"{self.model} has no candidate, and no version before this one.")
        if waiting:
            self._remove(waiting)
        self._move({**served, **back})
        for name in back:
            repository.forget(self.folder / name)
        repository.prune(served, self.folder)
        return self._served(names)

    def status(self) -> Iterator[dict[str, Any]]:
        """What the repository has served, waiting and from before, one row an ensemble; how many
        servers have each ready.
        """
        names = self._names()
        waiting = candidates.versions(names, self.folder)
        loaded = [server.loaded() for server in self.servers]
        for name, version in self._served(names).items():
            ready = sum(version in one.get(name, ()) for one in loaded)
            row: dict[str, Any] = {"model": name, "version": version, "ready_on": ready}
            if name in waiting:
                beside = candidates.candidate_name(name)
                ready = sum(waiting[name] in one.get(beside, ()) for one in loaded)
                row |= {"candidate": waiting[name], "candidate_ready_on": ready}
                row["share"] = candidates.share(name, self.folder)
            yield row | {"before": repository.previous(self.folder / name) or ""}

    def _names(self) -> list[str]:
        found = candidates.ensembles(self.model, self.folder)
        if not found:
            raise DeployError(f"the repository serves nothing under the name {self.model!r}.")
        return found

    def _served(self, names: Iterable[str]) -> dict[str, int]:
        return {name: max(repository.served(self.folder / name)) for name in names}

    def _other_space(self, waiting: Iterable[str]) -> list[str]:
        """The ensembles whose candidates are of another space."""
        return [
            name for name in waiting if len({*map(model_config.space, self._configs(name))}) > 1
        ]

    def _check_mix(self, waiting: Iterable[str]) -> None:
        """A share of the requests needs what one result says of all its vectors to be the same."""
        moved = self._other_space(waiting)
        if moved:
            raise SpaceChange(
                f"the candidate of {moved[0]} is of another space: vectors of both in one index "
                "could not be compared. Look at it in shadow, then promote it to all at once."
            )
        for name in waiting:
            texts = [path.read_text() for path in self._configs(name)]
            limits = {configs.parameter(text, "max_tokens") for text in texts}
            if len(limits) > 1:
                raise DeployError(
                    f"the candidate of {name} cuts texts at another length, and results tell one. "
                    "Look at it in shadow, then promote it to all at once."
                )

    def _check_space(self, waiting: Collection[str], change_space: bool) -> None:
        moved = self._other_space(waiting)
        if not moved:
            return
        if not change_space:
            raise SpaceChange(
                f"the candidate of {moved[0]} is of another space: what was embedded before could "
                "not be compared with what will be. Build it under another name; or, if every "
                "index of it is to be embedded anew, pass --change-space."
            )
        left = sorted(set(self._names()) - set(waiting))
        if left:
            raise SpaceChange(
                f"{', '.join(left)} would stay in the old space. Build a candidate of every "
                "precision."
            )

    def _check_fit(self, waiting: Iterable[str]) -> None:
        for name in waiting:
            if not model_config.is_shaped_alike(*map(model_config.read, self._configs(name))):
                raise DeployError(
                    f"the candidate of {name} gives vectors of another length or other outputs. "
                    "Build it under another name."
                )

    def _check_fusions(self, waiting: Collection[str]) -> None:
        for path in self.folder.glob(f"*/{configs.CONFIG}"):
            for name in set(model_config.fused(model_config.read(path))) & set(waiting):
                raise DeployError(
                    f"{path.parent.name} is a fusion of {name} as it is now and would fail. Build "
                    "under another name, and fit a fusion to it."
                )

    def _configs(self, name: str) -> tuple[Path, Path]:
        """Of an ensemble and its candidate."""
        paths = [
            self.folder / one / configs.CONFIG for one in (name, candidates.candidate_name(name))
        ]
        return paths[0], paths[1]

    def _move(self, versions: Mapping[str, int]) -> None:
        """The three moves of `repository`, each told to every server."""
        steps = {pin.model for pin in repository.steps(versions, self.folder)}
        repository.add(versions, self.folder)
        self._load(steps=steps)
        repository.switch(versions, self.folder)
        self._load(versions)
        repository.release(versions, self.folder)
        self._load(steps=steps)

    def _give(self, waiting: Mapping[str, int], shares: Mapping[str, float]) -> None:
        for name, version in waiting.items():
            candidates.set_share({name: version}, shares[name], self.folder)
        self._load([candidates.candidate_name(name) for name in waiting])

    def _forgiving(self) -> Deployment:
        return dataclasses.replace(self, forgiving=True)

    def _load(self, ensembles: Collection[str] = (), steps: Collection[str] = ()) -> None:
        """Load ensembles, and those of the steps that a server has: it may serve each model from
        one process.
        """
        passed_over = (HalimedeError,) if self.forgiving else ()
        for server in self.servers:
            with contextlib.suppress(*passed_over):
                again = sorted(server.loaded().keys() & set(steps)) if steps else []
                server.load([*ensembles, *again])

    def _remove(self, waiting: Mapping[str, int]) -> None:
        """Take candidates from the servers and from disk; clients ask the served model again."""
        candidates.set_share(waiting, 0, self.folder)  # a server that starts now does not load them
        beside = {candidates.candidate_name(name) for name in waiting}
        for server in self.servers:
            server.unload(sorted(server.loaded().keys() & beside))
        candidates.remove(waiting, self.folder)
        repository.prune(waiting, self.folder)
