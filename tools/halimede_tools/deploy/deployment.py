"""Deploy a new version of a served model: load it as a candidate, promote it, or roll it back.

The repository holds the state of a deployment, so each step can be repeated: a candidate's folder,
the share in its config, and the previous version of an ensemble. Each step changes the disk first,
then the servers. A server that cannot load a model keeps what it had.
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
    """A model's ensembles, and the servers that share their repository."""

    model: str
    """Name that the model is served under: all its precisions; or the name of one precision."""
    folder: Path
    """The repository."""
    servers: Sequence[Control]
    ignore_errors: bool = False
    """Whether to ignore a server's errors. Its next start reads the repository."""

    @property
    def built_as(self) -> str:
        """Name of the model, without a precision.

        Raises:
            DeployError: the repository does not serve it.
        """
        [(name, version), *_] = self._served(self._names()).items()
        return spec.load(self.folder / name / str(version)).name

    def pending(self) -> dict[str, int]:
        """Ensemble → version of its candidate.

        Raises:
            DeployError: there is no candidate.
        """
        pending = candidates.versions(self._names(), self.folder)
        if not pending:
            raise DeployError(
                f"{self.model} has no candidate. Build one: halimede build MODEL "
                f"--name {self.model} --candidate"
            )
        return pending

    def publish(self) -> dict[str, int]:
        """Load and warm up the candidates, without a share of the requests; return their versions.

        Raises:
            DeployError: there is no candidate, or one does not load: all are removed.
            HalimedeError: a server does not answer or refuses; run it again.
        """
        pending = self.pending()
        self._check_called(pending)
        try:
            self._load([candidates.candidate_name(name) for name in pending])
        except DeployError:
            self._remove(pending)
            raise
        return pending

    def canary(self, share: float) -> dict[str, int]:
        """Route this share of the requests to the candidates; clients follow within CHECK_S s.

        Raises:
            InvalidInput: the share is not from 0 to 1.
            SpaceChange: a candidate's vectors cannot be compared with the served ones.
            HalimedeError: as `publish`.
        """
        if not 0 <= share <= 1:
            raise InvalidInput(f"share is {share:g}; give a share of all requests, from 0 to 1.")
        pending = self.pending()
        self._check_fit(pending)
        self._check_mix(pending)
        before = {name: candidates.share(name, self.folder) for name in pending}
        try:
            self._set_shares(pending, dict.fromkeys(pending, share))
        except HalimedeError:
            self._ignoring_errors()._set_shares(pending, before)
            raise
        return pending

    def promote(self, change_space: bool = False) -> dict[str, int]:
        """Serve the candidates under their models' names, and remove the candidates' own names.

        Raises:
            SpaceChange: this changes the space of a name, and `change_space` is False.
            DeployError: a candidate does not fit its name, or does not load; the served versions
                stay.
            HalimedeError: as `publish`.
        """
        pending = self.pending()
        self._check_called(pending)
        self._check_fit(pending)
        self._check_space(pending, change_space)
        before = self._served(pending)
        repository.remember(pending, self.folder)
        try:
            self._serve_versions(pending)
        except HalimedeError:
            self._ignoring_errors()._serve_versions(before)
            raise
        self._remove(pending)
        repository.prune(pending, self.folder)
        return pending

    def roll_back(self) -> dict[str, int]:
        """Remove the candidates. If there are none, or a promotion has begun, serve the previous
        versions. Return the versions that are then served.

        Raises:
            DeployError: there is no candidate and no previous version.
            HalimedeError: as `publish`.
        """
        names = self._names()
        pending = candidates.versions(names, self.folder)
        served = self._served(names)
        before = {name: repository.previous(self.folder / name) for name in names}
        back = {
            name: version
            for name, version in before.items()
            if version not in (None, served[name])
            and (not pending or pending.get(name) == served[name])
        }
        if not pending and not back:
            raise DeployError(
                f"{self.model} has no candidate, and no version before the served one."
            )
        if pending:
            self._remove(pending)
        self._serve_versions({**served, **back})
        for name in back:
            repository.forget(self.folder / name)
        repository.prune(served, self.folder)
        return self._served(names)

    def status(self) -> Iterator[dict[str, Any]]:
        """One row for each ensemble: its served, candidate and previous versions, and on how many
        servers each is ready.
        """
        names = self._names()
        pending = candidates.versions(names, self.folder)
        loaded = [server.loaded() for server in self.servers]
        for name, version in self._served(names).items():
            ready = sum(version in models.get(name, ()) for models in loaded)
            row: dict[str, Any] = {"model": name, "version": version, "ready_on": ready}
            if name in pending:
                candidate = candidates.candidate_name(name)
                ready = sum(pending[name] in models.get(candidate, ()) for models in loaded)
                row |= {"candidate": pending[name], "candidate_ready_on": ready}
                row["share"] = candidates.share(name, self.folder)
            yield row | {"before": repository.previous(self.folder / name) or ""}

    def _names(self) -> list[str]:
        names = candidates.ensembles(self.model, self.folder)
        if not names:
            raise DeployError(f"the repository serves nothing under the name {self.model!r}.")
        return names

    def _served(self, names: Iterable[str]) -> dict[str, int]:
        return {name: max(repository.served(self.folder / name)) for name in names}

    def _other_space(self, pending: Iterable[str]) -> list[str]:
        """The ensembles whose candidates have another space."""
        return [
            name for name in pending if len({*map(model_config.space, self._configs(name))}) > 1
        ]

    def _check_mix(self, pending: Iterable[str]) -> None:
        """Raise unless one result can have vectors of both versions."""
        changed = self._other_space(pending)
        if changed:
            raise SpaceChange(
                f"the candidate of {changed[0]} is of another space: one index must not have "
                "vectors of both. Compare them with `shadow`, then promote it for all requests."
            )
        for name in pending:
            texts = [path.read_text() for path in self._configs(name)]
            limits = {configs.parameter(text, "max_tokens") for text in texts}
            if len(limits) > 1:
                raise DeployError(
                    f"the candidate of {name} truncates texts at another length, and a result "
                    "states one. Compare them with `shadow`, then promote it for all requests."
                )

    def _check_space(self, pending: Collection[str], change_space: bool) -> None:
        changed = self._other_space(pending)
        if not changed:
            return
        if not change_space:
            raise SpaceChange(
                f"the candidate of {changed[0]} is of another space: its vectors cannot be "
                "compared with stored ones. Build it under another name; or re-embed every index "
                "of the model, and pass --change-space."
            )
        unchanged = sorted(set(self._names()) - set(pending))
        if unchanged:
            raise SpaceChange(
                f"{', '.join(unchanged)} would stay in the old space. Build a candidate of every "
                "precision."
            )

    def _check_fit(self, pending: Iterable[str]) -> None:
        for name in pending:
            if not model_config.is_shaped_alike(*map(model_config.read, self._configs(name))):
                raise DeployError(
                    f"the candidate of {name} has vectors of another length or other outputs. "
                    "Build it under another name."
                )

    def _check_called(self, pending: Collection[str]) -> None:
        for path in self.folder.glob(f"*/{configs.CONFIG}"):
            for name in set(model_config.called(model_config.read(path))) & set(pending):
                raise DeployError(
                    f"{path.parent.name} is fitted to the served version of {name} and would fail. "
                    "Build the model under another name; a fusion must be fitted to that."
                )

    def _configs(self, name: str) -> tuple[Path, Path]:
        """Config files of an ensemble and its candidate."""
        candidate = candidates.candidate_name(name)
        return self.folder / name / configs.CONFIG, self.folder / candidate / configs.CONFIG

    def _serve_versions(self, versions: Mapping[str, int]) -> None:
        """Add, switch and release the versions on disk; reload the servers after each."""
        steps = {pin.model for pin in repository.steps(versions, self.folder)}
        repository.add(versions, self.folder)
        self._load(steps=steps)
        repository.switch(versions, self.folder)
        scoring = repository.with_maxsim(versions, self.folder).keys() - versions.keys()
        self._load(versions, steps=scoring)
        repository.release(versions, self.folder)
        self._load(steps=steps)

    def _set_shares(self, pending: Mapping[str, int], shares: Mapping[str, float]) -> None:
        for name, version in pending.items():
            candidates.set_share({name: version}, shares[name], self.folder)
        self._load([candidates.candidate_name(name) for name in pending])

    def _ignoring_errors(self) -> Deployment:
        return dataclasses.replace(self, ignore_errors=True)

    def _load(self, ensembles: Collection[str] = (), steps: Collection[str] = ()) -> None:
        """Load ensembles, and reload the steps that a server has loaded. It has none if it serves
        each ensemble from one process.
        """
        ignored = (HalimedeError,) if self.ignore_errors else ()
        for server in self.servers:
            with contextlib.suppress(*ignored):
                reloaded = sorted(server.loaded().keys() & set(steps)) if steps else []
                server.load([*ensembles, *reloaded])

    def _remove(self, pending: Mapping[str, int]) -> None:
        """Remove candidates from the servers and from disk. Clients return to the served model."""
        candidates.set_share(pending, 0, self.folder)  # a server that starts now does not load them
        ensembles = {candidates.candidate_name(name) for name in pending}
        for server in self.servers:
            server.unload(sorted(server.loaded().keys() & ensembles))
        candidates.remove(pending, self.folder)
        repository.prune(pending, self.folder)
