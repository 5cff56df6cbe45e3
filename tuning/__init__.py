"""Tune language models in JAX: `tuning.load` a model, `tuning.train` a config. Importing this package imports nothing heavy."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuning.api import LoadedModel, load, train

__all__ = ["LoadedModel", "load", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from tuning import api

        return getattr(api, name)
    raise AttributeError(f"module 'tuning' has no attribute {name!r}")
