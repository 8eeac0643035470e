"""`phi3v report`: one HTML page about runs. `read` reads files, `charts` draws SVG, `page` combines them."""

from phi3v_dist.tracking.report.page import report

__all__ = ["report"]
