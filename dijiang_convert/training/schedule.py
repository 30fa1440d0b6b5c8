"""How a stage's rows are shared out over optimizer steps, processes and forward passes."""

from dataclasses import dataclass

from ..recipe import Stage

LEAST_STEPS = 600  # short runs take smaller batches rather than fewer steps
MICRO_BATCH_TOKENS = 16384  # of one forward pass; larger batches are accumulated


@dataclass(frozen=True)
class Batches:
    """How a stage's rows are shared out: ``rows`` an optimizer step, over all processes, in ``accumulation`` forward
    passes of ``micro`` rows on each."""

    rows: int
    micro: int
    accumulation: int
    steps: int


def share_out(stage: Stage, count: int = 1) -> Batches:
    """The batches of a stage on ``count`` processes. A step's rows don't depend on it, unless they can't be divided."""
    rows = max(min(stage.batch_tokens // stage.seq_len, stage.tokens // stage.seq_len // LEAST_STEPS), 1)
    rows = max(rows - rows % count, count)
    each = rows // count
    most = max(MICRO_BATCH_TOKENS // stage.seq_len, 1)
    micro = next(n for n in range(min(each, most), 0, -1) if each % n == 0)
    return Batches(rows, micro, each // micro, max(stage.tokens // (rows * stage.seq_len), 1))
