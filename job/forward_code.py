"""What the code of a module's forward pass says: whether it is that of another, and which parts get the same input.

transformers copies its modules from family to family, so that code tells more than classes do.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any


def code(kind: Any) -> str:
    """The code of a class's forward pass, or of a function, but for documentation and annotations; where there is no
    source, equal to no other's."""
    function = _parsed(getattr(kind, "forward", kind))
    if function is None:
        return f"none of {kind}"
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    for argument in function.args.args:
        argument.annotation = None
    around = [ast.dump(part) for part in (*function.decorator_list, function.args)]
    return "\n".join([*around, ast.dump(ast.Module(body, []))])


def called_alike(kind: Any) -> list[list[str]]:
    """The names of modules that a forward pass calls with nothing but the same variable, which it never sets: of
    `self.q_proj(x)` and `self.k_proj(x)`, q_proj and k_proj."""
    groups: dict[str, dict[str, None]] = {}
    for node in _nodes(kind):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="self"), attr=name), args=[ast.Name(id=given)], keywords=[]
            ) if given not in changed(kind):
                groups.setdefault(given, {})[name] = None
    return [list(names) for names in groups.values() if len(names) > 1]


@cache
def calls(kind: Any) -> dict[str, list[set[str]]]:
    """The functions that a class's forward pass calls by a plain name, and the keywords of each call; ** stands for
    those that are passed on."""
    found: dict[str, list[set[str]]] = {}
    for node in _nodes(kind):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.setdefault(node.func.id, []).append({one.arg or "**" for one in node.keywords})
    return found


@cache
def together(kind: Any) -> list[set[str]]:
    """The names of what a class's forward pass puts into one dictionary, or gives to one call by keywords."""
    found = []
    for node in _nodes(kind):
        if isinstance(node, ast.Call):
            found.append({one.arg for one in node.keywords if one.arg})
        elif isinstance(node, ast.Dict):
            found.append({str(key.value) for key in node.keys if isinstance(key, ast.Constant)})
    return found


@cache
def names(kind: Any) -> set[str]:
    """The variables and functions that a class's forward pass names, its arguments among them."""
    found = {node.id for node in _nodes(kind) if isinstance(node, ast.Name)}
    return found | {node.arg for node in _nodes(kind) if isinstance(node, ast.arg)}


@cache
def changed(kind: Any) -> set[str]:
    """The names that a class's forward pass sets."""
    return {node.id for node in _nodes(kind) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}


def _nodes(kind: Any) -> Iterator[ast.AST]:
    function = _parsed(kind.forward)
    return ast.walk(function) if function is not None else iter(())


def _parsed(function: Callable[..., Any]) -> ast.FunctionDef | None:
    try:
        (found,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # no source: built in, or made while running
        return None
    return found if isinstance(found, ast.FunctionDef) else None
