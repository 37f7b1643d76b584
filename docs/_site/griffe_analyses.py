"""Let mkdocstrings see the analyses that are made by a call, with their signatures and texts of Python."""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

from layersurgery.analyses import signals


class MadeFunctions(griffe.Extension):
    """Replace each public analysis that is an assignment in the source by the function that it is."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Name the section of examples as griffe does."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Replace them once the package's source is read."""
        if pkg.name != "layersurgery" or "analyses" not in pkg.members:
            return
        module = pkg.members["analyses"].members["signals"]
        for name in [name for name, member in module.members.items() if not member.is_alias and member.is_attribute]:
            value = getattr(signals, name)
            signature = inspect.signature(value)
            parameters = griffe.Parameters(
                *(
                    griffe.Parameter(
                        parameter.name,
                        annotation=str(parameter.annotation),
                        kind=griffe.ParameterKind[parameter.kind.name.lower()],
                        default=None if parameter.default is parameter.empty else repr(parameter.default),
                    )
                    for parameter in signature.parameters.values()
                )
            )
            function = griffe.Function(
                name,
                parameters=parameters,
                returns=str(signature.return_annotation),
                docstring=griffe.Docstring(inspect.getdoc(value) or "", parser="google"),
            )
            module.set_member(name, function)
