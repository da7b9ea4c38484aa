"""Whether Python in documents uses names and keyword arguments that the package has, without running it."""

import ast
import importlib
import inspect
from typing import Any

import esd_jax
from esd_jax import api, recipe

NAMESPACES = ("attacks", "evaluation", "formats", "guidance")
VERBS = ("attack", "erase", "evaluate", "export", "grid", "invert", "load", "purify", "report", "sample")
# What running text may use without importing it.
KNOWN = {"esd_jax": esd_jax, "Concept": esd_jax.Concept}
KNOWN |= {name: getattr(esd_jax, name) for name in (*NAMESPACES, *VERBS)}


class Missing(Exception):
    """A name or an argument that is not there."""


def faults(source: str, known: dict[str, Any] | None = None) -> list[str]:
    """What is wrong with a piece of Python. Raises SyntaxError for what is none."""
    tree, names, result = ast.parse(source), dict(known or {}), []
    for node in ast.walk(tree):
        try:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names |= imported(node)
        except (Missing, ImportError) as error:
            result.append(str(error))
    for node in ast.walk(tree):
        try:
            if isinstance(node, ast.Call):
                check_call(node, names)
            elif isinstance(node, ast.Attribute):
                value(node, names)
        except Missing as error:
            result.append(str(error))
    return result


def imported(node: ast.Import | ast.ImportFrom) -> dict[str, Any]:
    """Name -> what it is, of the package alone: other libraries need not be installed."""
    if isinstance(node, ast.Import):
        return {alias.asname or "esd_jax": esd_jax for alias in node.names if alias.name == "esd_jax"}
    if (node.module or "").partition(".")[0] != "esd_jax":
        return {}
    module, result = importlib.import_module(str(node.module)), {}
    for alias in node.names:
        if not hasattr(module, alias.name):
            importlib.import_module(f"{node.module}.{alias.name}")
        result[alias.asname or alias.name] = getattr(module, alias.name)
    return result


def value(node: ast.expr, names: dict[str, Any]) -> Any:
    """What an expression is, if it leads to something of the package; else None."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := value(node.value, names)) is not None:
        if not hasattr(owner, node.attr):
            raise Missing(f"{ast.unparse(node.value)} has no {node.attr}")
        return getattr(owner, node.attr)
    return None


def check_call(node: ast.Call, names: dict[str, Any]) -> None:
    """Raises Missing for arguments that a function of the package does not take."""
    function = value(node.func, names)
    if function is None:
        return
    given = [keyword.arg for keyword in node.keywords if keyword.arg]
    whole = not any(isinstance(argument, ast.Starred) or is_ellipsis(argument) for argument in node.args)
    try:
        signature = inspect.signature(function)
        signature.bind_partial(*(node.args if whole else ()), **dict.fromkeys(given))
    except TypeError as error:
        raise Missing(f"{ast.unparse(node)}: {error}") from None
    if function is api.erase:
        unknown = {*given} - {*recipe.field_types()} - {*signature.parameters}
        if unknown:
            raise Missing(f"{ast.unparse(node)}: no field {sorted(unknown)}")


def is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...
