"""How the API reference of the site reads this repository's docstrings: an extension of griffe (mkdocs.yml)."""

from typing import Any

from griffe import Class, Extension, Function

from launch import docs_text


class OneNameALine(Extension):
    """Griffe calls these after it has read a function or class, before docstrings are parsed."""

    def on_function(self, *, func: Function, **_: Any) -> None:
        if func.docstring:
            names = [one.name for one in func.parameters]
            func.docstring.value = docs_text.sectioned(func.docstring.value, names, "Args")

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        fields = [name for name, one in cls.members.items() if one.is_attribute and name.islower()]
        if cls.docstring:
            cls.docstring.value = docs_text.sectioned(cls.docstring.value, fields, "Attributes")
