"""Spans: which models can be built for late chunking.

A span's vector is the mean of its tokens' vectors. So the model must pool by a mean, and what
follows must give the same for the mean of vectors as for the mean of what it makes of each.
"""

from __future__ import annotations

from typing import Any

from halimede_ops.errors import InvalidModel

WHY = "Late chunking takes the mean over each span's tokens"
AFTER_MEAN = ("Normalize", "Dropout")
"""Modules that leave a vector's direction as it is."""


def unsupported(name: str, what: str) -> InvalidModel:
    """The error for a model that has no vectors of spans."""
    return InvalidModel(f"{name} {what}. Leave out --late-chunking.")


def layers(model: Any, name: str) -> list[Any]:
    """The Dense modules behind the mean of a loaded model, in order: all are linear.

    Raises:
        InvalidModel: it does not pool by a mean, or a module behind has no such form.
    """
    from halimede_tools.build.graph import packing  # needs torch

    modules = list(model)
    pooling = modules[1] if len(modules) > 1 else None
    mode = packing.pooling_mode(pooling) if type(pooling).__name__ == "Pooling" else ""
    if mode != "mean":
        by = f"by {mode or 'a module of its own'}"
        raise unsupported(
            name, f"pools {by}, not by the mean. {WHY}, which are no vectors of this model"
        )
    found = []
    for module in modules[2:]:
        kind = type(module).__name__
        if kind == "Dense" and type(module.activation_function).__name__ == "Identity":
            found.append(module.linear)
        elif kind not in AFTER_MEAN:
            raise unsupported(
                name,
                f"has a {kind} behind its pooling that is not linear. {WHY}, and such a module "
                "would make another vector of a mean than of each token",
            )
    return found
