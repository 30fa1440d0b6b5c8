"""A teacher's distributions, written down once, so that training with it needs no second model in memory.

Of every position the k likeliest tokens and the mass of all others are kept. The student is held against those k + 1
events,

    KL_k = Σ_{i in top k} p_i log(p_i / q_i) + p_R log(p_R / q_R),     p_R = 1 − Σ p_i,  q_R = 1 − Σ q_i over the same i

which is at most the exact KL, and equal to it where k is the whole vocabulary. Files are memory-mapped numpy arrays in
a folder that appears when it is complete.

Shape legend: n positions, k tokens kept, N tokens a row.
"""

import gc
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.shards import write_json
from ..data.rows import Rows
from ..errors import DijiangError
from ..files import new_folder
from ..progress import console, count_bar
from .logits import ChunkLoss, counted, head, hidden_states, parts, tokens

BATCH_TOKENS = 8192  # that the teacher runs on at once
DTYPES = {"indices": np.int32, "log_p": np.float16, "log_rest": np.float32}
PREFIX = "teacher_"  # of their names in a batch


@dataclass(frozen=True)
class CachedRows:
    """Rows of text, each with the teacher's word on it: teacher_indices and teacher_log_p [N, k], teacher_log_rest [N].

    Whatever order they are read in, text and teacher belong together.
    """

    rows: Rows
    arrays: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.arrays["log_rest"])

    @property
    def packed(self) -> bool:
        return self.rows.packed

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        cached = {PREFIX + name: torch.from_numpy(np.array(array[index])) for name, array in self.arrays.items()}
        return {**self.rows[index], **cached}


def cache_teacher(
    rows: Rows, count: int, load: Callable[[], Any], *, top: int, folder: Path, name: str = ""
) -> CachedRows:
    """The first ``count`` rows with what the teacher says of them.

    Args:
        load: gives the teacher. It is not called where ``folder`` has the same rows' cache already.
        top: how many tokens to keep a position; all of a smaller vocabulary.
        name: the teacher's, to tell its cache from another's.

    Raises:
        DijiangError: the disk is too small.
    """
    count = min(count, len(rows))
    about = {"teacher": name, "top": top, "rows": count, "sha256": _digest(rows, count)}
    if not _is_of(folder, about):
        teacher = load()
        with new_folder(folder, force=True) as new, torch.no_grad():
            _write(new, rows, count, teacher, top)
            write_json(new / "about.json", about)
        del teacher
        gc.collect()  # before anything is allocated for training
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return CachedRows(rows, {key: np.load(folder / f"{key}.npy", mmap_mode="r") for key in DTYPES})


def cached_teacher(inputs: dict[str, Any]) -> ChunkLoss:
    """KL_k to the teacher in a batch of `CachedRows`."""
    at = counted(inputs)
    indices, log_p, log_rest = (inputs[PREFIX + name][:, :-1][at] for name in DTYPES)
    return lambda logits, part: top_divergence(logits, indices[part], log_p[part], log_rest[part])


def top_divergence(logits: Tensor, indices: Tensor, log_p: Tensor, log_rest: Tensor) -> Tensor:
    """KL_k, summed over positions. logits [n, vocabulary], indices and log_p [n, k], log_rest [n]."""
    log_q, indices = logits.float().log_softmax(-1), indices.long()
    of_q, of_p = log_q.gather(-1, indices), log_p.float()
    if indices.shape[-1] < log_q.shape[-1]:
        others = log_q.scatter(-1, indices, -torch.inf).logsumexp(-1)
        of_q, of_p = (torch.cat([a, b[:, None]], -1) for a, b in ((of_q, others), (of_p, log_rest.float())))
    of_p = of_p.clamp_min(-1e4).log_softmax(-1)  # half precision rounded it: it sums to 1 again
    return (of_p.exp() * (of_p - of_q)).sum()


def top_distribution(logits: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest tokens [n, k], their log-probabilities [n, k] and the log of what is left [n]."""
    log_p = logits.float().log_softmax(-1)
    best, indices = log_p.topk(top, -1)
    return indices, best, log_p.scatter(-1, indices, -torch.inf).logsumexp(-1)


def cache_bytes(positions: int, top: int) -> int:
    """On disk."""
    entry = np.dtype(DTYPES["indices"]).itemsize + np.dtype(DTYPES["log_p"]).itemsize
    return positions * (top * entry + np.dtype(DTYPES["log_rest"]).itemsize)


def _write(folder: Path, rows: Rows, count: int, teacher: Any, top: int) -> None:
    length = len(rows[0]["input_ids"])
    top = min(top, teacher.config.get_text_config().vocab_size)
    size, free = cache_bytes(count * length, top), shutil.disk_usage(folder).free
    told = f"the teacher's top {top} of {count * length:,} tokens take {size / 1e9:.2f} GB in {folder.parent}"
    if size > free:
        raise DijiangError(f"{told}, which has {free / 1e9:.2f} GB free: give a smaller --cache-teacher or --tokens")
    console.print(told)
    shapes = {"indices": (count, length, top), "log_p": (count, length, top), "log_rest": (count, length)}
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype=DTYPES[name], shape=shape)
        for name, shape in shapes.items()
    }
    step = max(BATCH_TOKENS // length, 1)
    with count_bar("teacher (rows)", count) as advance:
        for start in range(0, count, step):
            batch = [rows[i] for i in range(start, min(start + step, count))]
            inputs = {key: torch.stack([row[key] for row in batch]).to(teacher.device) for key in batch[0]}
            hidden = hidden_states(teacher, **tokens(inputs)).flatten(0, 1)
            pieces = [top_distribution(head(teacher, hidden[part]), top) for part in parts(teacher, hidden)]
            for name, values in zip(DTYPES, zip(*pieces, strict=True), strict=True):
                written = torch.cat(values).cpu().numpy().astype(DTYPES[name])
                arrays[name][start : start + len(batch)] = written.reshape(len(batch), *shapes[name][1:])
            advance(len(batch))
    for array in arrays.values():
        array.flush()


def _is_of(folder: Path, about: dict[str, Any]) -> bool:
    path = folder / "about.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == about


def _digest(rows: Rows, count: int) -> str:
    """Of what the teacher reads."""
    digest = hashlib.sha256()
    for i in range(count):
        row = rows[i]
        for key in ("input_ids", "position_ids"):
            digest.update(row[key].numpy().tobytes())
    return digest.hexdigest()
