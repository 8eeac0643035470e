"""From a dataset directory to packed rows: `tokens` (what every sample costs), `plan` (which samples form
which row of which step: pure), `reader` (bytes from tars), `collate` (samples -> row), `loader` (rows, ahead
of time).
"""
