"""Divides the rows of a stage over optimizer steps, processes and forward passes."""

from dataclasses import dataclass

from ..recipe import Stage

LEAST_STEPS = 600  # a stage of few tokens takes smaller batches rather than fewer steps
MICRO_BATCH_TOKENS = 16384  # most tokens of a forward pass, unless one row has more; gradients are accumulated


@dataclass(frozen=True)
class Batches:
    """How a stage's rows are divided.

    Each of ``steps`` optimizer steps takes ``rows`` rows over all processes. Each process takes its share of them in
    ``accumulation`` forward passes of ``micro`` rows.
    """

    rows: int
    micro: int
    accumulation: int
    steps: int


def share_out(stage: Stage, count: int = 1) -> Batches:
    """The batches of a stage on ``count`` processes. Rows per step depend on ``count`` only to be divisible by it."""
    rows = max(min(stage.batch_tokens // stage.seq_len, stage.tokens // stage.seq_len // LEAST_STEPS), 1)
    rows = max(rows - rows % count, count)
    each = rows // count
    most = max(MICRO_BATCH_TOKENS // stage.seq_len, 1)
    micro = next(n for n in range(min(each, most), 0, -1) if each % n == 0)
    return Batches(rows, micro, each // micro, max(stage.tokens // (rows * stage.seq_len), 1))
