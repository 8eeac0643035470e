"""`phi3v report`: one HTML page about runs. `read` reads files, `charts` draws SVG, `page` puts them together."""

from phi3v_dist.tracking.report.page import report

__all__ = ["report"]
