"""Exit codes of every phi3v process, and the exceptions that end a run with one of them."""

DONE = 0
CRASHED = 1
USAGE = 2  # bad config or usage: one line says what and how to mend it
PREEMPTED = 3  # stopped by a signal after a checkpoint: requeue me
DIVERGED = 4  # training diverged, or the data is unusable


class DivergedError(RuntimeError):
    """Loss or gradients are not finite, or the data is unusable: running again would not help."""
