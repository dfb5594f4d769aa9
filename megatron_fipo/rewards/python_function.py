"""Calls a function of the user's."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.config.base import ConfigError
from megatron_fipo.rewards.base import Response, Verdict

ARGUMENTS = ("response", "prompt", "answer", "metadata", "finish_reason", "num_tokens")
"""What a function may ask for by the names of its parameters."""


@dataclass(frozen=True, slots=True)
class PythonFunction:
    """The number that a function returns.

    Attributes:
        function: The function.
        parameters: Those of `ARGUMENTS` that it names.
    """

    function: Callable[..., Any]
    parameters: tuple[str, ...]

    @classmethod
    def load(cls, path: str, field: str) -> "PythonFunction":
        """Import a function and check its signature.

        Args:
            path: package.module:function or path/to/file.py:function.
            field: Where the path stands in the configuration.

        Raises:
            ConfigError: It cannot be imported, cannot be called, or asks for something that there is not.
        """
        module_path, _, name = path.rpartition(":")
        try:
            module = _import(module_path)
        except (Exception, SystemExit) as error:
            raise ConfigError(
                field, path, f"{module_path} cannot be imported ({type(error).__name__}: {error})", "correct the path"
            ) from error
        function = getattr(module, name, None)
        if function is None:
            raise ConfigError(field, path, f"{module_path} has no {name}", "correct the function's name")
        if not callable(function) or inspect.isclass(function) or inspect.iscoroutinefunction(function):
            raise ConfigError(field, path, f"{name} is no plain function", "name a function that returns a number")
        try:
            signature = inspect.signature(function)
        except ValueError as error:
            way_out = "write a Python function that calls it"
            raise ConfigError(field, path, f"{name} does not tell its parameters", way_out) from error
        return cls(function, _parameters(signature, field, path))

    def read_reference(self, response: Response) -> None:
        """The function sees to the reference answer by itself."""

    def grade(self, response: Response) -> Verdict:
        """Call the function."""
        values = {
            "response": response.text,
            "prompt": response.prompt,
            "answer": response.reference,
            "metadata": response.metadata,
            "finish_reason": response.finish_reason,
            "num_tokens": response.num_tokens,
        }
        return Verdict(float(self.function(**{name: values[name] for name in self.parameters})))

    def same_answer(self, first: str, second: str) -> bool:
        """Whether the texts are the same."""
        return first == second


def _import(path: str) -> Any:
    if not path.endswith(".py"):
        # Behind everything else, so that a file there hides no library.
        if "" not in sys.path:
            sys.path.append("")
        return importlib.import_module(path)
    file = Path(path).resolve()
    spec = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
    assert spec is not None and spec.loader is not None, "there is a loader for .py"
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look a module up by its name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _parameters(signature: inspect.Signature, field: str, path: str) -> tuple[str, ...]:
    names = []
    for parameter in signature.parameters.values():
        if parameter.name in ARGUMENTS and parameter.kind != parameter.POSITIONAL_ONLY:
            names.append(parameter.name)
        elif parameter.kind == parameter.VAR_KEYWORD:
            return ARGUMENTS
        elif parameter.default is parameter.empty and parameter.kind != parameter.VAR_POSITIONAL:
            raise ConfigError(
                field, path, f"it asks for {parameter.name!r}", f"name its parameters from {', '.join(ARGUMENTS)}"
            )
    return tuple(names)
