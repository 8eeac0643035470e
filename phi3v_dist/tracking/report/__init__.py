"""`phi3v report`: one HTML page about runs that needs no network. `read` (files), `charts` (SVG), `page`."""

from phi3v_dist.tracking.report.page import report

__all__ = ["report"]
