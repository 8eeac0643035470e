"""Peak memory of the loss head at 16,384 positions and the published vocabulary, against a plain head.

    python benchmarks/loss_head.py [--positions 16384] [--json PATH]

Ours takes the supervised positions and computes the loss in chunks; the plain head makes all logits, casts
them to float32 and calls cross_entropy, as the published code does. Each runs forward and backward in a
process of its own. Measured is the peak memory above that of the process before. A quarter of the positions
is supervised.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

VOCABULARY, WIDTH = 32064, 512


def measure(way: str, positions: int) -> tuple[float, float]:
    """(peak memory above the start in GiB, loss)."""
    import torch
    import torch.nn.functional as F

    from phi3v_dist.model.modeling import LossHead

    torch.manual_seed(0)
    torch.set_num_threads(2)
    head = LossHead(WIDTH, VOCABULARY, bias=False).to(torch.bfloat16)
    torch.nn.init.normal_(head.weight, std=0.02)
    hidden = torch.randn(positions, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (positions,))
    supervised = torch.arange(positions) % 4 == 0
    head(hidden[:8], targets[:8]).backward()  # the first call allocates buffers that stay
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if way == "ours":
        loss = head(hidden[supervised], targets[supervised])
    else:
        logits = F.linear(hidden, head.weight).float()
        loss = F.cross_entropy(
            logits, targets.masked_fill(~supervised, -100), ignore_index=-100, reduction="sum"
        )
    loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak - before) / 2**20, float(loss)


def main() -> int:
    """Runs both ways. Returns the exit status."""
    from benchmarks.record import Comparison, report

    parser = argparse.ArgumentParser(description="memory of the loss head")
    parser.add_argument("--positions", type=int, default=16384)
    parser.add_argument("--json")
    parser.add_argument("--way", choices=["ours", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(*measure(options.way, options.positions))
        return 0
    found = {}
    for way in ("plain", "ours"):
        command = [sys.executable, __file__, "--way", way, "--positions", str(options.positions)]
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
        found[way] = [float(word) for word in out.split()]
    (theirs, plain_loss), (ours, our_loss) = found["plain"], found["ours"]
    assert abs(our_loss / plain_loss - 1) < 1e-3, (our_loss, plain_loss)
    what = f"peak of the loss head, {options.positions} positions, {VOCABULARY} tokens"
    ratio = theirs / max(ours, 1e-3)
    comparison = Comparison(
        what, "all logits in float32", ours, theirs, "GiB", ratio, ">= 5 times less", ratio >= 5
    )
    return report("loss_head", [comparison], options.json)


if __name__ == "__main__":
    sys.exit(main())
