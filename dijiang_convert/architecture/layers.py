"""Which layers to convert: those that `--layers` names. `trace` checks whether a kernel can replace them."""

from ..errors import DijiangError, Unsupported

LAYER_SPECS = "all, none, sliding-only, 0,3,8-23, every:N, not-every:N or not-last:N"


def staying_softmax(spec: str) -> int:
    """N of ``auto:N``, how many layers stay softmax; 0 for any other ``spec``. Raises DijiangError for an N that is no
    number from 1 on."""
    head, _, number = spec.partition(":")
    if head != "auto":
        return 0
    if not _is_number(number) or int(number) < 1:
        raise DijiangError(f"--layers {spec!r} is not valid: give auto:N, N the layers that stay softmax, as auto:3")
    return int(number)


def select_layers(spec: str, count: int, full: list[int], local: list[int], kind: str) -> list[int]:
    """The numbers of the layers that ``spec`` names, in order.

    spec: ``all`` (every layer that sees all tokens before), ``none``, ``sliding-only``, ``0,3,8-23``, ``every:2``,
        ``not-every:4``, ``not-last:2``; or several with commas between them. The last three choose from ``all``.
    count: how many layers the model has.
    full, local: the layers that see all tokens before, and those that see a part of these tokens.
    kind: the model type, for messages.

    Raises DijiangError for a ``spec`` that is not valid, names a layer without attention or chooses no layer, and
    Unsupported if ``all`` chooses none.
    """
    bad = DijiangError(f"--layers {spec!r} is not valid: give {LAYER_SPECS}; convert takes auto:N, too")
    chosen: set[int] = set()
    for part in spec.split(","):
        head, _, number = part.partition(":")
        first, dash, last = part.partition("-")
        if part == "none":
            continue
        if part == "sliding-only":
            chosen |= {*local}
        elif part == "all":
            chosen |= {*full}
        elif head in ("every", "not-every", "not-last"):
            if not _is_number(number) or int(number) < 1:
                raise bad
            n = int(number)
            chosen |= {
                i for i in full
                if (head == "every" and i % n == 0)
                or (head == "not-every" and i % n != n - 1)
                or (head == "not-last" and i < count - n)
            }  # fmt: skip
        else:
            if not _is_number(first) or (dash and not _is_number(last)):
                raise bad
            start, end = int(first), int(last or first)
            if end < start:
                raise bad
            if max(start, end) >= count:
                beyond = max(start, count)
                raise DijiangError(f"--layers {spec!r}: there is no layer {beyond}, the model has 0 to {count - 1}")
            missing = sorted({*range(start, end + 1)} - {*full, *local})
            if missing:
                raise DijiangError(f"--layers {spec!r}: layer {missing[0]} has no attention to convert")
            chosen |= {*range(start, end + 1)}
    if not chosen and spec == "all":
        raise Unsupported(
            f"every attention layer of {kind} has a sliding window: it is linear already, "
            "--layers sliding-only converts it all the same"
        )
    if not chosen and spec != "none":
        raise DijiangError(f"--layers {spec!r} chooses no layer of {count}: give {LAYER_SPECS}")
    return sorted(chosen)


def _is_number(text: str) -> bool:
    """Whether a text is a number that a layer may have: `int` refuses thousands of digits."""
    return text.isascii() and text.isdecimal() and len(text) < 100
