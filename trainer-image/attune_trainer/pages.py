"""Reports as pages: templates that escape what comes from outside, and drawings inside them."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

_TEMPLATES = Path(__file__).parent


def render_page(template: str, **values: Any) -> str:
    """Fills in a template of this package; in those that end in .html.j2, whatever comes from outside is escaped.

    Args:
        template: its path in the package, such as scoring/report.html.j2.
        values: what it names; a name that is missing is an error.
    """
    environment = jinja2.Environment(
        autoescape=jinja2.select_autoescape(("html.j2",)),
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)


def draw(size: tuple[float, float], paint: Callable[[Any], None], work_directory: Path) -> markupsafe.Markup:
    """Draws a figure; gives an <svg> element that is the same for the same figure.

    Args:
        size: width and height in inches.
        paint: fills the matplotlib figure that it is given.
        work_directory: where the plotting library may keep its caches.
    """
    # The root file system is read-only, and matplotlib wants to keep a cache of fonts.
    os.environ.setdefault("MPLCONFIGDIR", str(work_directory / "matplotlib"))
    import matplotlib as mpl  # noqa: PLC0415 (it reads MPLCONFIGDIR when it is imported)
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context({"svg.hashsalt": "attune", "svg.fonttype": "none"}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    return markupsafe.Markup(drawn[drawn.index("<svg") :])  # noqa: S704 (matplotlib escapes text)
