"""Refusing options that a command would ignore."""

from __future__ import annotations

from collections.abc import Collection

import click
from click.core import ParameterSource

__all__ = ["refuse"]


def refuse(names: Collection[str], mode: str) -> None:
    """Refuses options that would be ignored; `mode` says by what, and ends where the option is named."""
    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if given and option.name in names:
            raise click.UsageError(f"{mode} {option.opts[0]}")
