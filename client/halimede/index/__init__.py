"""Collections of vectors that know their space: the guard, and the way into another space."""

from halimede.index.export import Exported, export
from halimede.index.guard import Guard, guard
from halimede.index.load import Loaded, load
from halimede.index.plan import Plan, Price, plan
from halimede.index.record import SpaceRecord
from halimede.index.reembed import reembed
from halimede.index.stores.address import open_store
from halimede.index.stores.base import Match, Page, Store

__all__ = [
    "Exported",
    "Guard",
    "Loaded",
    "Match",
    "Page",
    "Plan",
    "Price",
    "SpaceRecord",
    "Store",
    "export",
    "guard",
    "load",
    "open_store",
    "plan",
    "reembed",
]
