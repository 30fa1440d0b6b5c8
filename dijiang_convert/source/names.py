"""What people call a model on the Hub: its id, an alias of the paper, an old id without an owner, or an address."""

import re

from ..errors import DijiangError

PYTHIA_SIZES = ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
OPT_SIZES = ("125m", "350m", "1.3b", "2.7b", "6.7b")

# The models of the paper, by the short names that it uses.
ALIASES: dict[str, str] = {
    **{f"pythia-{size}": f"EleutherAI/pythia-{size}" for size in PYTHIA_SIZES},
    **{f"pythia-{size}-deduped": f"EleutherAI/pythia-{size}-deduped" for size in PYTHIA_SIZES},
    **{f"opt-{size}": f"facebook/opt-{size}" for size in OPT_SIZES},
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
}

# Models that had no owner when the Hub began, with the owner that each has now.
PLAIN_IDS: dict[str, str] = {
    name: f"{owner}/{name}"
    for owner, names in {
        "openai-community": ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "openai-gpt"),
        "distilbert": ("distilgpt2", "distilbert-base-cased", "distilbert-base-uncased", "distilroberta-base"),
        "google-bert": (
            "bert-base-cased", "bert-base-uncased", "bert-large-cased", "bert-large-uncased",
            "bert-base-multilingual-cased", "bert-base-multilingual-uncased",
        ),
        "FacebookAI": ("roberta-base", "roberta-large", "xlm-roberta-base", "xlm-roberta-large"),
        "albert": ("albert-base-v2", "albert-large-v2", "albert-xlarge-v2", "albert-xxlarge-v2"),
    }.items()
    for name in names
}  # fmt: skip

# An address of the Hub's website, as people copy it: of a model's page, or of the files of a branch.
ADDRESS = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>\w[\w.-]*/\w[\w.-]*)"
    r"(?:/(?:tree|blob|commit)/(?P<revision>[^/?#]+)[^?#]*)?/?(?:[?#].*)?",
    re.ASCII,
)


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form owner/name; legacy names without an owner do not count."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text, re.ASCII) is not None


def parse_name(text: str, revision: str | None) -> tuple[str, str | None]:
    """The Hub id and the revision that a name means; a name that is none of the known forms stays as it is.

    revision: what the user asked for besides. Raises DijiangError where the name has another one in it.
    """
    name, found = text, None
    if address := ADDRESS.fullmatch(text):
        name, found = address["id"], address["revision"]
    elif "@" in text and is_hub_id(text.partition("@")[0]):
        name, _, found = text.partition("@")
    if found and revision and found != revision:
        raise DijiangError(f"{text} is at {found}, and --revision says {revision}: give one of them")
    lower = name.lower()
    return ALIASES.get(lower) or PLAIN_IDS.get(lower) or name, found or revision
