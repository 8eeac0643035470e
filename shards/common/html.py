"""HTML pages from jinja2 templates: the page of a dataset and the report of a run.

In: the folder of the templates, the name of one, its values. Out: the page as text. Templates lie beside the
module that uses them, in `templates/NAME.html.j2` (package data in pyproject.toml).
"""

from __future__ import annotations

from pathlib import Path


def render_page(folder: Path, template: str, **values: object) -> str:
    """The template `folder`/`template` filled in with `values`.

    Every value is escaped (`&`, `<`, `>`, quotes) unless it is a `markupsafe.Markup`. A name that the
    template uses and `values` lacks raises jinja2.UndefinedError, so that no page is silently incomplete.
    """
    import jinja2  # here: it takes about 50 ms, and most imports of `shards` make no page

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)
