"""The pages' templates, filled in; nothing outside of the page is ever loaded."""

from importlib.resources import files

from .numbers import figures, human_bytes, percent


def fill(name: str, **values) -> str:
    """`templates/<name>` with these values.

    Raises:
        ImportError: jinja2 is not installed.
    """
    import jinja2

    folder = files("genai_perf.bench").joinpath("templates")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda part: folder.joinpath(part).read_text("utf-8")),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"size": human_bytes, "figures": figures, "percent": percent}
    return environment.get_template(name).render(**values)
