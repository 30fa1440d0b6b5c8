"""Checks that a converted checkpoint's tokenizer gives the same tokens as the source's.

Tokenizers are loaded in `loading`, and their files copied in `companions`.
"""

import codecs
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..architecture.trace import first_line
from ..errors import DijiangError, Unsupported
from ..files import read_json
from ..progress import say
from .loading import load_tokenizer
from .shards import write_json

# Texts at which tokenizers differ: case, accents in one code point and in two, scripts, emoji of several code points,
# white space at the start, within and at the end, digits, code, control characters, and a word that no vocabulary has.
PROBES = (
    "Hello, world! It's the 21st of MAY; isn't it?",
    " leading, trailing  and   inner spaces\t\ttabs\r\n\n\nlines  ",
    "naïve café, cafe\u0301, Ångström, ﬁne, Straße, İstanbul, ǅ",
    "日本語のテキスト。中文字符，한국어, العربية, עברית, हिन्दी, ไทย, Ελληνικά, кириллица",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️ \u200b\u00a0\u2028\ufeff\x00\x1b",
    "1234567890 3.14159e-10 0x1F 1,000,000 ½ ² Ⅷ",
    "def f(x):\n    return x**2  # <b>&amp;</b> {{a}} [INST] </s> <unk> \\n",
    "Donaudampfschifffahrtsgesellschaftskapitän" * 3 + "x" * 200,
)


def source_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model to convert. Raises DijiangError if there is none or it can't be loaded, Unsupported if
    code of the model's own makes its tokens: that code is not run, so nobody could tell whether others are the same."""
    path = folder / "tokenizer_config.json"
    if path.is_file():
        if path.read_bytes().startswith(codecs.BOM_UTF8):
            raise DijiangError(f"{path} starts with a byte-order mark, which transformers can't read: save it without")
        named = read_json(path).get("auto_map")
        if named and (not isinstance(named, dict) or "AutoTokenizer" in named):
            raise Unsupported(
                f"{path} names code of the model's own for its tokenizer, which is not run: if a tokenizer of "
                "transformers gives the same tokens, save that there, without auto_map"
            )
    tokenizer = load_tokenizer(folder)
    # Without its files, transformers makes some tokenizers of nothing but special tokens.
    if tokenizer.get_vocab().keys() <= {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}:
        raise DijiangError(f"no tokenizer in {folder}: it needs tokenizer.json or the files of a slow tokenizer")
    return tokenizer


def settle_tokenizer(folder: Path, source: PreTrainedTokenizerBase, name: object, size: int) -> None:
    """Checks the tokenizer that was copied into a converted checkpoint as `check_tokenizer` does.

    AutoTokenizer has its own class for some types of models, whatever their tokenizer_config.json says, as for qwen2,
    and a converted model has another type. Where that makes another class of the copied files, the source's is named.
    """
    copied = load_tokenizer(folder)
    if type(copied) is not type(source):
        path = folder / "tokenizer_config.json"
        content = read_json(path) if path.is_file() else {}
        write_json(path, {**content, "tokenizer_class": type(source).__name__})
        copied = load_tokenizer(folder)
    check_tokenizer(copied, source, name, size)


def check_tokenizer(copied: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase, name: object, size: int) -> None:
    """Compares the tokenizer of a converted checkpoint with the one of its source, and with the model's embedding.

    Tokens that the model has no embedding for are said, as long as ordinary text does without them.

    name: of the source. size: tokens that the model has an embedding for, 0 if its config doesn't say.
    Raises DijiangError where a text gives other tokens than before, or tokens that the model lacks.
    """
    for text in PROBES:
        before, after = _ids(source, text), _ids(copied, text)
        if before != after:
            at = next((i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), -1)
            raise DijiangError(
                f"the tokenizer of {name} gives other tokens after conversion (at token {at} of {text[:20]!r}…): save "
                "it with save_pretrained, so that it has a tokenizer.json"
            )
        if size and max(before, default=0) >= size:
            raise DijiangError(
                f"the tokenizer of {name} gives token {max(before)} for {text[:20]!r}…, and its model knows {size:,}: "
                "get the tokenizer that belongs to it"
            )
    if source.get_added_vocab() != copied.get_added_vocab() or source.chat_template != copied.chat_template:
        raise DijiangError(
            f"the tokenizer of {name} has other special tokens or another chat template after conversion: save it with "
            "save_pretrained, so that it has a tokenizer.json"
        )
    beyond = sorted((number, token) for token, number in source.get_added_vocab().items() if size and number >= size)
    if beyond:
        told = f"{len(beyond)} tokens of the tokenizer have no embedding in the model, the first is {beyond[0][1]!r}"
        say(told)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    try:
        found: Any = tokenizer(text, verbose=False)["input_ids"]
    except Exception as error:  # a value of tokenizer_config.json is of a type that nothing checks before its use
        raise DijiangError(f"the tokenizer can't take {text[:20]!r}… ({first_line(error)}): get it again") from error
    return found
