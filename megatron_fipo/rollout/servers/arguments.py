"""Checks further launch arguments for SGLang against its own list.

The list is read from SGLang's source, which takes a tenth of a second; importing SGLang takes many, and a GPU's driver.
"""

import ast
import difflib
import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.config.base import require

log = logging.getLogger(__name__)

# Where what this program sets itself comes from.
_OWN = {
    "model_path": "model.path",
    "model": "model.path",
    "tokenizer_path": "model.path",
    "json_model_override_args": "model.context_length and model.rope_base",
    "dtype": "model.dtype",
    "context_length": "model.context_length",
    "tp_size": "rollout.sglang.tensor_parallel_size",
    "tensor_parallel_size": "rollout.sglang.tensor_parallel_size",
    "nnodes": "rollout.sglang.nodes_per_server",
    "enable_memory_saver": "rollout.colocated",
    "enable_return_routed_experts": "rollout.replay_routing",
    **dict.fromkeys(
        ("config", "host", "port", "api_key", "admin_api_key", "node_rank", "dist_init_addr", "nccl_init_addr")
        + ("nccl_port", "base_gpu_id", "device", "skip_tokenizer_init"),
        "this program",
    ),
    # Servers with equal seeds would give equal samples of a prompt.
    "random_seed": "each server",
}

_SCALARS: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}


@dataclass(frozen=True, slots=True)
class _Argument:
    """One of SGLang's arguments.

    Attributes:
        type: Its type, where that is a scalar.
        choices: What it may be, where that is listed in place.
    """

    type: str | None = None
    choices: tuple[Any, ...] | None = None


def check_server_arguments(arguments: dict[str, Any]) -> None:
    """Refuse launch arguments that SGLang does not have, that this program sets itself, or of the wrong type.

    Where SGLang is not installed, or has no such list, this says so and checks the names of this program alone.

    Args:
        arguments: `rollout.sglang.server_arguments`.

    Raises:
        ConfigError: One cannot be used.
    """
    for name, value in arguments.items():
        require(
            _plain(name) not in _OWN,
            field=f"rollout.sglang.server_arguments.{name}",
            value=value,
            rule=f"is set by {_OWN.get(_plain(name))}",
            way_out="leave it away",
        )
    if not arguments:
        return
    _check_ranks({_plain(name): value for name, value in arguments.items()})
    known = _read_arguments()
    if not known:
        log.warning("rollout.sglang.server_arguments cannot be checked here: SGLang's list of arguments is not there")
        return
    for name, value in arguments.items():
        _check(name, value, known)


def _check_ranks(arguments: dict[str, Any]) -> None:
    """Refuse ranks that take each other's place: SGLang numbers those that take in weights by tensor rank alone."""
    for name in ("pp_size", "pipeline_parallel_size"):
        require(
            arguments.get(name, 1) in (None, 1),
            field=f"rollout.sglang.server_arguments.{name}",
            value=arguments.get(name),
            rule="must be 1: SGLang's pipeline stages would join a weight update under the same ranks",
            way_out="spread a server by rollout.sglang.tensor_parallel_size",
        )
    for name in ("dp_size", "data_parallel_size"):
        require(
            arguments.get(name, 1) in (None, 1) or arguments.get("enable_dp_attention") is True,
            field=f"rollout.sglang.server_arguments.{name}",
            value=arguments.get(name),
            rule="must be 1 without enable_dp_attention: copies would join a weight update under the same ranks",
            way_out="start more servers by rollout.sglang.servers_per_node, or set enable_dp_attention to true",
        )


def _check(name: str, value: Any, known: dict[str, _Argument]) -> None:
    field = f"rollout.sglang.server_arguments.{name}"
    plain = _plain(name)
    near = difflib.get_close_matches(plain, known, n=1)
    require(
        plain in known,
        field=field,
        value=value,
        rule="SGLang has no such argument",
        way_out=f"perhaps {near[0]} is meant" if near else "`python -m sglang.launch_server --help` lists them all",
    )
    argument = known[plain]
    if argument.type is not None:
        types = _SCALARS[argument.type]
        require(
            isinstance(value, types) and (bool in types or not isinstance(value, bool)),
            field=field,
            value=repr(value),
            rule=f"must be of type {argument.type}",
            way_out="see `python -m sglang.launch_server --help`",
        )
    require(
        argument.choices is None or value in argument.choices,
        field=field,
        value=value,
        rule="is none of SGLang's choices",
        way_out=f"choose one of {', '.join(map(str, argument.choices or ()))}",
    )


def _read_arguments() -> dict[str, _Argument]:
    """SGLang's launch arguments by name, without importing it; empty where they are not found."""
    # Finding a package's own spec runs none of it.
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        return {}
    source = Path(spec.origin).parent / "srt"
    known: dict[str, _Argument] = {}
    for path in [source / "server_args.py", *sorted((source / "arg_groups" / "fields").glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else ():
            known |= _declared(node)
    return known


def _declared(node: ast.AST) -> dict[str, _Argument]:
    """What a piece of SGLang's source declares: a field of its settings, or an argument by `add_argument`."""
    match node:
        case ast.AnnAssign(target=ast.Name(id=field), annotation=annotation):
            return _argument(field, annotation)
        case ast.Call(func=ast.Attribute(attr="add_argument"), args=names):
            return {_plain(name): _Argument() for name in map(_literal, names) if isinstance(name, str)}
        case _:
            return {}


def _argument(field: str, annotation: ast.expr) -> dict[str, _Argument]:
    """An argument under all its names, from `A[TYPE, HELP]` or `A[TYPE, Arg(...)]`; nothing where it is none."""
    match annotation:
        case ast.Subscript(value=ast.Name(id="A"), slice=ast.Tuple(elts=[declared, about, *_])):
            pass
        case _:
            return {}
    settings = {each.arg: each.value for each in about.keywords if each.arg} if isinstance(about, ast.Call) else {}
    if "no_cli" in settings:
        return {}
    names = [_literal(settings.get("cli_name")) or field, *(_literal(settings.get("aliases")) or ())]
    parsed = settings.keys() & {"type_parser", "action", "nargs"}
    argument = _Argument() if parsed else _Argument(_scalar(declared), _choices(settings.get("choices")))
    return {_plain(name): argument for name in names}


def _plain(name: str) -> str:
    """An argument's name as Python writes it."""
    return name.lstrip("-").replace("-", "_")


def _scalar(declared: ast.expr) -> str | None:
    """The scalar type that is declared, plain or as one that may be left away."""
    match declared:
        case ast.Name(id=name) if name in _SCALARS:
            return name
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return _scalar(inner)
        case _:
            return None


def _choices(node: ast.expr | None) -> tuple[Any, ...] | None:
    """Choices that are listed in place; those with a name can be extended while SGLang runs."""
    found = _literal(node)
    return None if found is None else tuple(found)


def _literal(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None
