"""The types of the package, checked at every call while tests run.

jaxtyping's import hook wraps every function; it reads the shapes and dtypes in annotations, and beartype the rest.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import jax
import jaxtyping
from beartype import BeartypeConf, beartype
from beartype.door import is_bearable
from beartype.vale import Is
from jax.typing import ArrayLike

# As type checkers have it, an int is a float, too.
_CONF = BeartypeConf(is_pep484_tower=True)
_check = beartype(conf=_CONF)
_jaxtyped = jaxtyping.jaxtyped


def install(package: str) -> None:
    """Checks all that is imported of the package from here on."""
    jaxtyping.jaxtyped = _wrap
    jaxtyping.install_import_hook(package, "checked.types")


def types(function: Callable[..., Any]) -> Callable[..., Any]:
    """What jaxtyping has check a signature."""
    function.__annotations__ = {
        name: _tellable(hint if name == "return" else _given(hint)) for name, hint in function.__annotations__.items()
    }
    return _check(function)


def _wrap(function: Any = None, *, typechecker: Any) -> Any:
    """`jaxtyping.jaxtyped`, but where an argument is of another type, what the package itself says of that comes first.

    Users are not type-checked: what they mistype has to end in an error of the package's own.
    """
    wrap = functools.partial(_wrap, typechecker=typechecker)
    if function is None:
        return wrap
    if function.__module__ == "esd_jax.suggest":
        return function  # its warnings name the line of the caller, so many frames above
    if isinstance(function, classmethod | staticmethod):
        return type(function)(wrap(function.__func__))
    if isinstance(function, property):
        return property(function.fget and wrap(function.fget))
    if isinstance(function, type):
        # JAX makes pytrees of whatever it is about: shapes, axes, one example of a batch.
        if dataclasses.is_dataclass(function) and not _is_pytree(function):
            function.__init__ = wrap(function.__init__)
        return function
    strict = _jaxtyped(function, typechecker=typechecker)
    own = f"checking the parameters of {function.__module__}.{function.__qualname__}."

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return strict(*args, **kwargs)
        except jaxtyping.TypeCheckError as error:
            if own in str(error):
                function(*args, **kwargs)
            raise

    return checked


def _is_pytree(kind: type) -> bool:
    return not jax.tree_util.all_leaves([object.__new__(kind)])


def _given(hint: Any) -> Any:
    """What fits a parameter: all that JAX takes for an array does where its own is asked for."""
    if hint is jax.Array:
        return ArrayLike
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return hint.dtype[ArrayLike, hint.dim_str] if hint.array_type is jax.Array else hint
    return _each(_given, hint)


def _tellable(hint: Any) -> Any:
    """A type without what Python cannot tell: whether a class is of a protocol that has attributes."""
    kind = get_args(hint)[0] if get_origin(hint) is type else None
    return type if getattr(kind, "_is_protocol", False) else _each(_tellable, hint)


def _each(change: Callable[[Any], Any], hint: Any) -> Any:
    parts = tuple(change(part) for part in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return functools.reduce(operator.or_, parts)
    if get_origin(hint) is Mapping:
        return Mapping  # beartype would look at an item, which what stands for absent weights does not allow
    if get_origin(hint) in (list, Sequence) or get_origin(hint) is tuple and parts[1:] == (...,):
        return Annotated[get_origin(hint), Is[functools.partial(_all_are, parts[0])]]
    return get_origin(hint)[parts] if get_origin(hint) is tuple else hint


def _all_are(kind: Any, items: Any) -> bool:
    """beartype itself would look at one item, drawn at random."""
    return all(is_bearable(item, kind, conf=_CONF) for item in items)
