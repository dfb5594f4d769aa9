"""Reads a configuration from YAML and command-line overrides, and writes one back.

A file is read into plain mappings, overrides are put into those, and the sections are built from the result
once. So a field may be missing from the file and come from the command line, and a check that looks at two
fields sees both final values. Pydantic converts the values, one field at a time; tyro shows them on `--help`.
"""

import dataclasses
import difflib
import enum
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, cast, get_args, get_origin

import pydantic
import tyro
import yaml

from megatron_fipo.config.annotations import (
    container_of,
    default_of,
    fields_of,
    members_of,
    sections_in,
    union_of,
)
from megatron_fipo.config.base import ABSENT, ConfigError

CONFIG_FILE = "config.yaml"
"""Name of the resolved configuration, in every folder that is made with one."""

Keys = tuple[str, ...]
"""Where a value lies: the keys from the root to it."""


def load_config[T](cls: type[T], path: Path, overrides: Sequence[str] = (), wider: type | None = None) -> T:
    """Read a configuration.

    Args:
        cls: Root section, made with `config_class`.
        path: YAML file. Relative paths inside it are kept as written.
        overrides: Command-line words, `--section.field value ...` or `--section.field=value`; the later wins.
            Values are written as in YAML or, where that does not fit the field, as plain text. With `--help`
            among them the fields are printed and the program exits.
        wider: A root section that the file may have been written for; fields that it has and `cls` has not are left
            out of the file.

    Raises:
        ConfigError: The file cannot be read, a key is unknown or given twice, a value does not fit its field,
            or a section's own check refuses it.
    """
    words = [word for word in overrides if word not in ("--help", "-h")]
    content = _read_yaml(path)
    raw: object = content if wider is None else _shared_part(cls, wider, content)
    # A variant is chosen before its fields are set, whatever the order on the command line.
    for path_in_config, texts in sorted(_split_overrides(words), key=lambda setting: setting[0][-1] != "type"):
        raw = _override(cls, raw, path_in_config, texts, ())
    config = cast(T, _convert(cls, raw, ()))
    if len(words) < len(overrides):
        markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
        tyro.cli(cls, default=config, args=["--help"], use_underscores=True, config=markers)
    return config


def _shared_part(cls: Any, wider: Any, raw: Mapping[Any, Any]) -> dict[Any, Any]:
    """What is left of a section's plain values without the keys that the wider section alone has."""
    own, more = fields_of(cls), fields_of(wider)
    kept = {key: value for key, value in raw.items() if key in own or key not in more}
    for key in kept.keys() & own.keys() & more.keys():
        mine, others = sections_in(own[key][0]), sections_in(more[key][0])
        if isinstance(kept[key], Mapping) and len(mine) == len(others) == 1:
            kept[key] = _shared_part(mine[0], others[0], kept[key])
    return kept


def config_from_values[T](cls: type[T], values: Mapping[str, Any]) -> T:
    """The configuration that `plain_values` gave, also after a way through JSON.

    Raises:
        ConfigError: See `load_config`.
    """
    return cast(T, _convert(cls, values, ()))


def dump_config(config: object) -> str:
    """Write a configuration as YAML that `load_config` reads back as an equal one."""
    return yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def plain_values(config: object) -> dict[str, Any]:
    """A section as mappings, lists, texts and numbers."""
    return {name: _plain(getattr(config, name)) for name in fields_of(type(config))}


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return plain_values(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    return str(value) if isinstance(value, Path) else value


# YAML 1.1, which PyYAML speaks, reads 1e-6 as text, 02:00:00 as 7200, 010 as 8 and "on" as true. These are
# the plain scalars of YAML 1.2's core schema, plus underscores between digits, and how each may start.
_SCALARS = {
    "null": (r"~|null|Null|NULL|", [*"~nN", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
    "merge": (r"<<", ["<"]),
}


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice in one mapping."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[object, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if str(key) in seen:
                raise ConfigError(
                    field=f"{self.name}:{line}",
                    value=key,
                    rule=f"this key is already on line {seen[str(key)]}",
                    way_out="keep one of the two",
                )
            seen[str(key)] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or the loader here would read as something else."""

    yaml_implicit_resolvers = {key: list(rules) for key, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()}

    def ignore_aliases(self, data: object) -> bool:
        return True


for _name, (_pattern, _starts) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _starts)


def _parse_yaml(text: str, name: str) -> object:
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(name, "...", f"a tagged value does not fit its tag ({error})", "write it plainly") from error
    finally:
        loader.dispose()


def _read_yaml(path: Path) -> dict[Any, Any]:
    def refuse(value: object, rule: str, way_out: str) -> ConfigError:
        return ConfigError("configuration file", value, rule, way_out)

    try:
        content = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise refuse(path, "there is no such file", "correct the path") from None
    except OSError as error:
        raise refuse(path, f"it cannot be read ({error.strerror})", "give a readable YAML file") from error
    except UnicodeDecodeError as error:
        raise refuse(path, f"byte {error.start} is not UTF-8", "save the file as UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise refuse(f"{path}:{line}", f"it is not valid YAML ({problem})", "correct that line") from error
    except yaml.YAMLError as error:
        raise refuse(path, f"it is not valid YAML ({error})", "save the file as plain UTF-8 text") from error
    if content is None:
        raise refuse(path, "the file is empty", "write at least the required fields, or {} for all defaults")
    if not isinstance(content, dict):
        raise refuse(path, "it must be a mapping of sections", "write `section:` lines with fields under them")
    return content


def _variant(sections: Sequence[Any], raw: Mapping[Any, Any], keys: Keys) -> Any:
    """The section that `raw` describes: the only one, or the one that its `type` names."""
    if len(sections) == 1:
        return sections[0]
    named = {name: cls for cls in sections for name in get_args(fields_of(cls)["type"][0])}
    name = raw.get("type", ABSENT)
    if isinstance(name, str) and name in named:
        return named[name]
    raise ConfigError(
        field=".".join((*keys, "type")),
        value=name,
        rule="it must say which variant this section is",
        way_out=_suggest(str(name), named) or f"use one of {', '.join(named)}",
    )


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}?" if close else ""


def _unknown(cls: Any, key: object, value: object, keys: Keys) -> ConfigError:
    known = fields_of(cls)
    deeper = [
        f"did you mean {'.'.join((*keys, name, inner))}?"
        for name, (annotation, _) in known.items()
        for section in sections_in(annotation)
        for inner in fields_of(section)
        if inner == key
    ]
    return ConfigError(
        field=".".join((*keys, str(key))),
        value=value,
        rule=f"there is no such field in {'.'.join(keys) or 'the configuration'}",
        way_out=next(iter(deeper), _suggest(str(key), known)) or f"use one of {', '.join(known)}",
    )


def _convert(annotation: Any, raw: object, keys: Keys) -> object:
    """Make of a plain value what its field's type asks for."""
    sections = sections_in(annotation)
    if sections and isinstance(raw, Mapping):
        return _build(_variant(sections, raw, keys), raw, keys)
    others = [member for member in members_of(annotation) if member not in sections]
    if not others:
        rule, way_out = "it must be a section", "write its fields below it, or {} for its defaults"
        raise ConfigError(".".join(keys), raw, rule, way_out)
    container = container_of(annotation)
    if container and sections_in(container[1]):
        kind, item_type = container
        if kind is dict and isinstance(raw, Mapping):
            return {key: _convert(item_type, item, (*keys, str(key))) for key, item in raw.items()}
        if kind is not dict and isinstance(raw, list):
            return kind(_convert(item_type, item, (*keys, str(place))) for place, item in enumerate(raw))
    return _convert_leaf(union_of(others), raw, keys)


def _build(cls: Any, raw: Mapping[Any, Any], keys: Keys) -> object:
    fields = fields_of(cls)
    for key, value in raw.items():
        if key not in fields:
            raise _unknown(cls, key, value, keys)
    for name, (_, field) in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in raw:
            dotted = ".".join((*keys, name))
            raise ConfigError(dotted, ABSENT, "it is required", f"write it in the file or give --{dotted} a value")
    values = {key: _convert(fields[key][0], value, (*keys, key)) for key, value in raw.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise error.within(keys) from None


def _convert_leaf(annotation: Any, raw: object, keys: Keys) -> object:
    try:
        value: object = pydantic.TypeAdapter(annotation).validate_python(raw)
    except pydantic.ValidationError as error:
        problems = error.errors()
        place = [str(part) for part in problems[0]["loc"] if isinstance(part, int)] if len(problems) == 1 else []
        rules = [problem["msg"].replace("Input should be", "it must be") for problem in problems]
        raise ConfigError(
            field=".".join((*keys, *place)),
            value=raw,
            rule=" or ".join(dict.fromkeys(rules)),
            way_out=_leaf_way_out(annotation, raw),
        ) from None
    # pydantic takes true for 1.
    if isinstance(raw, bool) and isinstance(value, int | float) and not isinstance(value, bool):
        raise ConfigError(".".join(keys), raw, "it must be a number", _leaf_way_out(annotation, raw))
    return value


def _leaf_way_out(annotation: Any, raw: object) -> str:
    choices = [
        choice for member in members_of(annotation) if get_origin(member) is Literal for choice in get_args(member)
    ]
    return _suggest(str(raw), map(str, choices)) or f"write {_describe(annotation)}"


_TYPE_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text (in quotes if it looks like something else)",
    Path: "a path",
    NoneType: "null",
    Any: "any value",
}


def _describe(annotation: Any) -> str:
    words: list[str] = []
    for member in members_of(annotation):
        origin = get_origin(member)
        if origin is Literal:
            words.extend(str(choice) for choice in get_args(member))
        elif origin in (tuple, list):
            words.append("a list such as [a, b]")
        elif origin is not None and issubclass(origin, Mapping):
            words.append("a mapping such as {key: value}")
        else:
            words.append(_TYPE_WORDS.get(member, str(getattr(member, "__name__", member))))
    return " or ".join(words)


def _split_overrides(words: Sequence[str]) -> list[tuple[Keys, list[str]]]:
    """Group command-line words into (keys of the field, words of its value)."""
    settings: list[tuple[Keys, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, text = word[2:].partition("=")
            settings.append((tuple(flag.split(".")), [text] if equals else []))
        elif settings:
            settings[-1][1].append(word)
        else:
            raise ConfigError("command line", word, "it belongs to no field", "write --section.field before it")
    return settings


def _override(annotation: Any, raw: object, path: Keys, texts: list[str], keys: Keys) -> object:
    """Set one field from the command line.

    Args:
        annotation: Type of the field that `raw` is for.
        raw: The field's plain value so far, or `ABSENT`.
        path: Keys from there to the field to set.
        texts: The words of its value.
        keys: Keys from the root to `raw`.

    Returns:
        The plain value `raw` with that field set.
    """
    if not path:
        return _read_words(annotation, texts, keys)
    sections, container = sections_in(annotation), container_of(annotation)
    known = raw if isinstance(raw, Mapping) else {}
    if sections and (raw is known or raw in (ABSENT, None)):
        if len(sections) > 1 and path == ("type",):
            return {**known, "type": _read_words(str, texts, (*keys, "type"))}
        return _override_in_section(_variant(sections, known, keys), known, path, texts, keys)
    key = path[0]
    if container and isinstance(raw, list) and key.isdigit() and int(key) < len(raw):
        item = _override(container[1], raw[int(key)], path[1:], texts, (*keys, key))
        return [*raw[: int(key)], item, *raw[int(key) + 1 :]]
    if container and container[0] is dict:
        item = _override(container[1], known.get(key, ABSENT), path[1:], texts, (*keys, key))
        return {**known, key: item}
    dotted = ".".join(keys)
    raise ConfigError(
        ".".join((*keys, *path)),
        " ".join(texts),
        f"{dotted} has no part {key}",
        f"give --{dotted} a whole value",
    )


def _override_in_section(
    cls: Any, known: Mapping[Any, Any], path: Keys, texts: list[str], keys: Keys
) -> dict[Any, Any]:
    fields = fields_of(cls)
    key = path[0].replace("-", "_")
    if key not in fields:
        raise _unknown(cls, path[0], " ".join(texts), keys)
    annotation, field = fields[key]
    current = known.get(key, ABSENT)
    # A section that the file leaves out starts from its default, unless another variant of it is chosen.
    if current is ABSENT and path[1:] not in ((), ("type",)):
        current = _plain(default_of(field))
    return {**known, key: _override(annotation, current, path[1:], texts, (*keys, key))}


def _read_words(annotation: Any, texts: list[str], keys: Keys) -> object:
    """Read a value given on the command line: as YAML where that fits the field, else as text."""
    values = [_read_word(annotation, text) for text in texts]
    container = container_of(annotation)
    readings: list[object] = [*values[:1], *texts[:1]] if len(texts) == 1 else []
    if container and container[0] is not dict:
        readings += [values, texts]
    if not readings:
        rule = f"it takes one value, not {len(texts)}"
        raise ConfigError(".".join(keys), " ".join(texts), rule, f"write {_describe(annotation)}")
    for reading in readings:
        try:
            _convert(annotation, reading, keys)
        except ConfigError:
            continue
        return reading
    return readings[0]


def _read_word(annotation: Any, text: str) -> object:
    if text == "None" and NoneType in members_of(annotation):
        return None
    try:
        value = _parse_yaml(text, "command line")
    except (yaml.YAMLError, ConfigError):
        return text
    # YAML would cut text at " #" and at its ends, and take "#..." for nothing; only quotes ask for its reading of text.
    if text.lstrip().startswith("#"):
        return text
    return text if not text or isinstance(value, str) and text[0] not in "'\"" else value
