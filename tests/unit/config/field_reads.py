"""Which fields of the configuration the package reads, found in its source.

Expressions are given the configuration sections they may hold, from annotations and assignments, so that the `path` of
a run directory does not pass for the `path` of a prompt file.
"""

import ast
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

# Class name → attribute name → classes it may hold.
Attributes = dict[str, dict[str, set[str]]]
Names = dict[str, set[str]]


def read_fields(sources: Iterable[Path], skip: Path, sections: Iterable[type]) -> set[tuple[str, str]]:
    """(section, field) pairs that are read in `sources`, those under `skip` left out.

    The files under `skip` define the sections; they count for the types of fields alone.
    """
    trees = {path: ast.parse(path.read_text()) for path in sources}
    aliases = _aliases(trees.values())
    attributes: Attributes = {}
    # Twice: what a class takes from another one may be known only after that one was seen.
    for _ in range(2):
        for tree in trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    _learn_class(node, attributes, aliases)
    owners = {cls.__name__: _owners(cls) for cls in sections}
    reads: set[tuple[str, str]] = set()
    for path, tree in trees.items():
        if skip not in path.parents:
            reads |= {
                (owners[section][field], field)
                for section, field in _Reads(tree, attributes, aliases).found
                if field in owners.get(section, {})
            }
    return reads


def _owners(cls: type) -> dict[str, str]:
    """Name of the class that first declares each field."""
    return {
        field.name: [base.__name__ for base in cls.__mro__ if field.name in base.__dict__.get("__annotations__", {})][
            -1
        ]
        for field in dataclasses.fields(cls)
    }


def _aliases(trees: Iterable[ast.Module]) -> Names:
    """Unions with a name: `A = B | C` at the top of a module."""
    found: Names = {}
    for tree in trees:
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        found[target.id] = _names(node.value)
    return found


def _names(annotation: ast.AST | None) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(annotation) if annotation is not None else ():
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return names


def _annotated(annotation: ast.AST | None, aliases: Mapping[str, set[str]]) -> set[str]:
    return {member for name in _names(annotation) for member in aliases.get(name, {name})}


def _learn_class(node: ast.ClassDef, attributes: Attributes, aliases: Names) -> None:
    own = attributes.setdefault(node.name, {})
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            own.setdefault(item.target.id, set()).update(_annotated(item.annotation, aliases))
        elif isinstance(item, ast.FunctionDef):
            known = _arguments(item, node.name, aliases)
            for statement in ast.walk(item):
                if isinstance(statement, ast.Assign):
                    for target, value in _pairs(statement):
                        if isinstance(target, ast.Attribute) and _is_name(target.value, "self"):
                            own.setdefault(target.attr, set()).update(_classes(value, known, attributes))


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef, owner: str | None, aliases: Names) -> Names:
    arguments = function.args
    known = {
        argument.arg: _annotated(argument.annotation, aliases)
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    }
    return known | ({"self": {owner}} if owner else {})


def _pairs(statement: ast.Assign) -> list[tuple[ast.expr, ast.expr]]:
    pairs: list[tuple[ast.expr, ast.expr]] = []
    for target in statement.targets:
        if isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple):
            pairs += zip(target.elts, statement.value.elts, strict=True)
        else:
            pairs.append((target, statement.value))
    return pairs


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _classes(node: ast.expr, known: Names, attributes: Attributes) -> set[str]:
    """Classes that an expression of names and attributes may hold."""
    if isinstance(node, ast.Name):
        return known.get(node.id, set())
    if isinstance(node, ast.Attribute):
        owners = _classes(node.value, known, attributes)
        return {cls for owner in owners for cls in attributes.get(owner, {}).get(node.attr, set())}
    return set()


class _Reads(ast.NodeVisitor):
    """Collects (class, attribute) of every attribute that is read from something of a known class."""

    def __init__(self, tree: ast.Module, attributes: Attributes, aliases: Names) -> None:
        self.attributes, self.aliases = attributes, aliases
        self.found: set[tuple[str, str]] = set()
        self._known: Names = {}
        self._owner: str | None = None
        self._texts: set[str] = set()
        self.visit(tree)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self._owner = self._owner, node.name
        self.generic_visit(node)
        self._owner = outer

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        outer, texts = dict(self._known), self._texts
        self._known = self._known | _arguments(node, self._owner, self.aliases)
        self._texts = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
        self.generic_visit(node)
        self._known, self._texts = outer, texts

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Assign(self, node: ast.Assign) -> None:
        for target, value in _pairs(node):
            if isinstance(target, ast.Name):
                self._known[target.id] = _classes(value, self._known, self.attributes)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.found |= {(cls, node.attr) for cls in _classes(node.value, self._known, self.attributes)}
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        # getattr(section, name) reads each field whose name the function spells out.
        if _is_name(node.func, "getattr"):
            holders = _classes(node.args[0], self._known, self.attributes)
            self.found |= {(cls, text) for cls in holders for text in self._texts if isinstance(text, str)}
        self.generic_visit(node)
