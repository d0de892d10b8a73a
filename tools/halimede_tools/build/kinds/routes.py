"""Routes: a Router of sentence-transformers, taken apart into models for queries and documents.

A Router, which was called Asym before, chooses one of its routes by the task of a text:
`encode_query` and `encode_document` name one, `encode` names none. The modules before
the Router, those of one route and those after the Router are a model of their own: a tower. Its
folder has links to the files of the whole model's.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from halimede_ops.errors import InvalidModel
from halimede_tools.build.keys import key_of
from halimede_tools.build.kinds.files import read_json
from halimede_tools.build.kinds.recognise import SENTENCE_TRANSFORMERS

CLASSES = ("Router", "Asym")
CONFIGS = ("router_config.json", "config.json")
"""Files that name the routes: that of Router, then that of Asym."""
QUERY, DOCUMENT = "query", "document"
TOWERS = (QUERY, DOCUMENT)
"""Input types that choose a route, and suffixes of the names of the towers."""
DOCUMENT_KEYS = (DOCUMENT, "passage", "corpus", "doc")
"""Names that Routers have for the route of documents, the first that is there first."""
TEXT = "text"
FILE_NAME = "routes.json"


class Module(NamedTuple):
    """One module of a sentence-transformers folder."""

    kind: str
    """Its class, with the packages that it is in."""
    folder: Path
    """The folder of its files. Files of other modules may lie in folders below it."""


class Routes(NamedTuple):
    """The routes of the Router in a folder."""

    before: list[Module]
    modules: Mapping[str, list[Module]]
    """Name of a route → its modules."""
    after: list[Module]
    default: str | None
    """The route of a text without a task that names one."""
    mappings: Mapping[tuple[str | None, Any], str]
    """Task and modality → route; None stands for any."""

    def of(self, task: str | None) -> str | None:
        """The route of texts of a task, as Router chooses it; None where that raises."""
        for key in ((task, TEXT), (task, None), (None, TEXT), (None, None)):
            if key in self.mappings:
                return self.mappings[key]
        for name in (task, TEXT):
            if name in self.modules:
                return name
        return None if task else self.default


def is_router(folder: Path) -> bool:
    """Whether one of the folder's modules is a Router."""
    return any(_name(entry) in CLASSES for entry in _modules(folder))


def towers(routes: Routes, name: str) -> dict[str, str]:
    """Input type → route, of texts; the empty input type is that of a text that names none.

    Raises:
        InvalidModel: queries or documents have no route, or texts have more than two.
    """
    keys = {
        QUERY: [QUERY],
        DOCUMENT: [key for key in DOCUMENT_KEYS if key == DOCUMENT or key in routes.modules],
    }
    chosen = {
        task: next((route for route in map(routes.of, names) if route), None)
        for task, names in keys.items()
    }
    missing = [task for task, route in chosen.items() if route is None]
    default = routes.of(None)
    if missing or (default and default not in chosen.values()):
        raise InvalidModel(
            f"{name} has a Router with the routes {', '.join(routes.modules)}; supported is one "
            f"for each of {' and '.join(TOWERS)}, or one for both. Name the routes so, or map them "
            "in its route_mappings."
        )
    found = {task: route for task, route in chosen.items() if route}
    return found | ({"": default} if default else {})


def read(folder: Path, name: str) -> Routes:
    """The routes of the Router in a folder.

    Raises:
        InvalidModel: its files are damaged, or there is another Router.
    """
    modules = [Module(str(e["type"]), folder / str(e["path"])) for e in _modules(folder)]
    places = [place for place, module in enumerate(modules) if _last(module.kind) in CLASSES]
    if len(places) != 1:
        raise InvalidModel(f"{name} has {len(places)} Routers; supported is one.")
    router = modules[places[0]].folder
    try:
        config = read_json(next(router / file for file in CONFIGS if (router / file).exists()))
        parameters = dict(config.get("parameters") or {})
        routes = {
            route: [Module(str(config["types"][key]), router / key) for key in keys]
            for route, keys in config["structure"].items()
        }
        mappings = {
            ast.literal_eval(key): str(route)
            for key, route in (parameters.get("route_mappings") or {}).items()
        }
    except (StopIteration, LookupError, TypeError, ValueError, SyntaxError) as error:
        raise InvalidModel(f"{name}: the config of its Router is missing or damaged.") from error
    if any(_last(module.kind) in CLASSES for parts in routes.values() for module in parts):
        raise InvalidModel(f"{name} has a Router within a Router, which is not supported.")
    default = parameters.get("default_route")
    if default is None and parameters.get("allow_empty_key", True):
        default = next(iter(routes))
    return Routes(modules[: places[0]], routes, modules[places[0] + 1 :], default, mappings)


def take_apart(source: Path, name: str, folder: Path) -> None:
    """Build step: write a folder for each tower, with links to files of `source`, and FILE_NAME.

    Raises:
        InvalidModel: the routes are not supported.
    """
    routes = read(source, name)
    chosen = towers(routes, name)
    kept = {route: tower for tower, route in chosen.items() if tower}
    if chosen[QUERY] == chosen[DOCUMENT]:
        kept = {chosen[DOCUMENT]: DOCUMENT}
    for route, tower in kept.items():
        modules = [*routes.before, *routes.modules[route], *routes.after]
        _write(modules, source, folder / tower)
    by_type = {given: kept[route] for given, route in chosen.items()}
    (folder / FILE_NAME).write_text(json.dumps(by_type))


def load(folder: Path) -> dict[str, str]:
    """Input type → tower, of a folder that `take_apart` wrote."""
    return dict(read_json(folder / FILE_NAME))


def space(spaces: Mapping[str, str]) -> str:
    """The space of all towers, from what would be the space of each alone."""
    return key_of(*(part for tower in sorted(spaces) for part in (tower, spaces[tower])))


def _write(modules: list[Module], source: Path, folder: Path) -> None:
    listed = []
    for place, module in enumerate(modules):
        path = f"{place}_{_last(module.kind)}"
        listed.append({"idx": place, "name": str(place), "path": path, "type": module.kind})
        target = folder / path
        target.mkdir(parents=True)
        # The folder of the first module is that of the whole model, with all the others in it.
        is_whole = module.folder.resolve() == source.resolve()
        for file in module.folder.iterdir() if is_whole else _files(module.folder):
            if file.is_file():
                _link(file, target / file.relative_to(module.folder))
        for file in (target / "modules.json", target / SENTENCE_TRANSFORMERS):
            file.unlink(missing_ok=True)
    (folder / "modules.json").write_text(json.dumps(listed, indent=2))
    if (source / SENTENCE_TRANSFORMERS).exists():
        _link(source / SENTENCE_TRANSFORMERS, folder / SENTENCE_TRANSFORMERS)


def _files(folder: Path) -> Iterator[Path]:
    return folder.rglob("*") if folder.is_dir() else iter(())


def _link(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(file, target)


def _modules(folder: Path) -> list[dict[str, Any]]:
    path = folder / "modules.json"
    return list(read_json(path)) if path.exists() else []


def _name(entry: Mapping[str, Any]) -> str:
    return _last(str(entry.get("type")))


def _last(kind: str) -> str:
    return kind.rsplit(".", 1)[-1]
