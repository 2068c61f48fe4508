"""Rendering kernel templates: an undefined name is an error, decisions are made in Python."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Hole:
    """Text for a hole of a template.

    ``row`` comes once per output row, ``element`` inside the vector loop, and ``finish``, where the template takes such
    a part, after it.
    """

    row: str = ""
    element: str = ""
    finish: str = ""


@functools.cache
def _environment(dialect: str) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES / dialect),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, **context: Any) -> str:
    """A C template's text with its context filled in."""
    return _environment("c").get_template(template).render(**context)


def render_triton(template: str, **context: Any) -> str:
    """A Triton template's text with its context filled in."""
    return _environment("triton").get_template(template).render(**context)
