"""Stand-ins for heavy libraries, so that `--help` answers at once.

A job's settings lie in the modules that do its work, and those import torch, Ray and others: ten seconds for a page of
text. Settings need none of them. Under `lighten` an import of such a library gives an empty module, of which every name
may be asked for: classes to inherit from, functions to call, decorators that change nothing. Only for a process that
prints help and ends; nothing that was imported so can work.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HEAVY = frozenset(
    {"torch", "torchvision", "ray", "timm", "open_clip", "deepspeed", "transformers", "sklearn", "scipy", "pandas",
     "matplotlib", "safetensors", "huggingface_hub", "lightning", "wandb", "onnxruntime"}
)  # fmt: skip


def lighten() -> None:
    """From now on, imports of heavy libraries that are not there yet give stand-ins."""
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in HEAVY else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it."""


def _of(name: str) -> Any:
    """What a module or class has under a name: another one."""
    if name.startswith("__"):
        raise AttributeError(name)
    return _Meta(name, (_Thing,), {})


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return _of(name)


class _Meta(type):
    def __getattr__(cls, name: str) -> Any:
        return _of(name)


class _Thing(metaclass=_Meta):
    """A class, a function, a decorator or a constant."""

    def __new__(cls, *args: Any, **settings: Any) -> Any:
        is_decorating = len(args) == 1 and not settings and callable(args[0])
        return args[0] if is_decorating else super().__new__(cls)

    def __init__(self, *args: Any, **settings: Any):
        """Anything goes."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return args[0] if args else self

    def __getattr__(self, name: str) -> Any:
        return _of(name)

    def _reckon(self, *others: Any) -> Any:
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _reckon
    __pow__ = __rpow__ = __getitem__ = _reckon
