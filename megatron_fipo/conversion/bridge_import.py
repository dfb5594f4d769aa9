"""Imports megatron-bridge where Transformer Engine or ModelOpt is not installed.

megatron-bridge imports both without a guard in parts that conversion never uses (LoRA layers, distillation). While it
is being imported, and only then, placeholder modules answer for whatever is missing; constructing a placeholder raises.
megatron-core is imported before, so that its own checks for Transformer Engine see the truth.
"""

import importlib
import importlib.util
import os
import sys
import tempfile
import types
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from typing import Any

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

from megatron_fipo.runtime.logging import quiet_imports

_OPTIONAL = ("transformer_engine", "modelopt")


class _PlaceholderType(type):
    """Class-level attributes of a placeholder are placeholders too, and it may stand in a type union."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _placeholder(f"{cls.__name__}.{name}")

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__


def _placeholder(name: str) -> Any:
    def refuse(self: Any, *_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError(f"{name} is not installed on this machine")

    return _PlaceholderType(name, (), {"__init__": refuse})


class _PlaceholderModule(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full_name = f"{self.__name__}.{name}"
        return sys.modules.get(full_name) or _placeholder(full_name)


class _PlaceholderFinder:
    """Import finder that answers for missing packages while it is installed."""

    def __init__(self, roots: Sequence[str]) -> None:
        self.roots = frozenset(roots)
        self.created: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.split(".")[0] not in self.roots:
            return None
        self.created.append(name)
        return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _PlaceholderModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__version__ = "0.0.0"  # type: ignore[attr-defined]


def import_bridge() -> Any:
    """The `megatron.bridge` package.

    Its lock on a model folder's config.json goes to this machine's temporary folder: the default, the home folder, is
    often shared by all nodes, and every rank of the job would wait for all others.
    """
    os.environ.setdefault("MEGATRON_CONFIG_LOCK_DIR", f"{tempfile.gettempdir()}/megatron_fipo_locks_{os.getuid()}")
    if "megatron.bridge" in sys.modules:
        return sys.modules["megatron.bridge"]
    for settled_first in ("extensions.transformer_engine", "models.gpt.gpt_layer_specs", "optimizer"):
        importlib.import_module(f"megatron.core.{settled_first}")
    missing = [name for name in _OPTIONAL if importlib.util.find_spec(name) is None]
    finder = _PlaceholderFinder(missing)
    sys.meta_path.append(finder)  # type: ignore[arg-type]
    try:
        with quiet_imports():
            return importlib.import_module("megatron.bridge")
    finally:
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
        for name in finder.created:
            sys.modules.pop(name, None)
