"""Gathers the rows of every stage of a run once, and keeps them in the run's folder. `data` reads the text."""

import hashlib
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..data.readers import Sources
from ..data.rows import Rows, token_rows
from ..recipe import Recipe, Stage
from .run_folder import RunFolder


def corpus_of(own: str | list[str] | None, data: str | Sequence[str] | None, recipe: Recipe) -> Sequence[str]:
    """What a stage reads: its ``own`` corpora, else the run's ``data``, else those of the recipe.

    data: as `token_rows` takes it. The result is `Sources`, or a tuple of documents.
    """
    if own is None and data is not None and not isinstance(data, str):
        return data if isinstance(data, Sources) else tuple(data)
    names = own or data or recipe.data
    return Sources([names] if isinstance(names, str) else names)


def gather(
    corpora: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    plan: Sequence[Stage],
    seed: int,
    run: RunFolder,
    whole: bool = False,
) -> list[Rows]:
    """The rows of each stage. The main process writes them into the run's folder, and the others open them there.

    Stages with the same corpus and row length share one reading of it, and each gets other rows.

    corpora: what each stage reads, see `corpus_of`. whole: see `token_rows`.
    """
    groups: dict[tuple[type, Sequence[str], int], list[int]] = {}
    for i, (corpus, stage) in enumerate(zip(corpora, plan, strict=True)):
        groups.setdefault((type(corpus), corpus, stage.seq_len), []).append(i)
    rows: dict[int, Rows] = {}
    for number, ((_, corpus, seq_len), members) in enumerate(groups.items()):
        counts = [max(-(-plan[i].tokens // seq_len), 1) for i in members]
        total = sum(counts) * seq_len
        kept = run.folder / f"rows-{number}"
        run.wait_for(kept)
        gathered = token_rows(
            corpus, tokenizer, seq_len=seq_len, tokens=total, shuffle_seed=seed, folder=kept, whole=whole
        )
        rows |= zip(members, gathered.split(counts), strict=True)
    return [rows[i] for i in range(len(plan))]


def fingerprint(corpus: Sequence[str]) -> str:
    """Text that identifies a corpus: the names of its sources, or a hash of its documents."""
    return " ".join(corpus) if isinstance(corpus, Sources) else hashlib.blake2b("\0".join(corpus).encode()).hexdigest()
