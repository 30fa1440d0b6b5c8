"""A fixed few of the types that `make sweep` goes through, by the very same checks."""

from __future__ import annotations

import pytest

from tests.sweep.forks import Answer
from tests.sweep.run import ENCODERS, fails, sweep, works

WORK = (
    "gpt_neox",  # a part of each head rotated, old tensor names
    "opt",  # learned positions
    "gemma2",  # soft-capped logits, sliding layers left as they are
    "gpt_oss",  # attention sinks, experts
    "mixtral",  # experts that checkpoints hold one by one
    "deepseek_v3",  # latent attention: values of another size than keys
    "smollm3",  # a layer without rotation
    "gemma3n_text",  # layers that share keys and values
    "gemma3",  # the text part of a multimodal model
    "qwen3_5_text",  # recurrent layers between
    "jamba",  # recurrent layers that can't go on with several tokens at once
    "roberta",  # learned positions that are counted by the tokens of a call
    "exaone",  # a model class of several types
    "bart",  # the decoder of an encoder-decoder
)
REFUSED = {
    "falcon": "does not route its attention through AttentionInterface",
    "mamba": "is recurrent: it has no attention to convert",
    "doge": "reads or changes its attention mask itself",
    "zamba": "attention and a recurrent state at once",
}


ENCODERS_WORK = (
    "bert",
    "distilbert",  # no positions from outside
    "roberta",  # positions that padding moves
    "modernbert",  # rotary embedding, and layers with a window on both sides
    "esm",  # layers that don't know their number
    "eurobert",  # a Llama that sees both sides
    "vit",  # images
)
ENCODERS_REFUSED = {
    "albert": "runs the same attention module several times a token",
    "siglip_vision_model": "hands nothing on to its attention function",
    "clip": "of images and texts",
    "swin": "several attention modules of one layer number",
    "deberta-v2": "does not route its attention through AttentionInterface",
}


@pytest.fixture(scope="module")
def answers() -> dict[str, Answer]:
    return sweep([*WORK, *REFUSED])


@pytest.mark.parametrize("kind", WORK)
def test_works(kind: str, answers: dict[str, Answer]) -> None:
    assert fails(answers[kind]) is None
    assert works(answers[kind])


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str, answers: dict[str, Answer]) -> None:
    assert REFUSED[kind] in answers[kind]["refused"]


@pytest.fixture(scope="module")
def encoders() -> dict[str, Answer]:
    return sweep([*ENCODERS_WORK, *ENCODERS_REFUSED], modules=ENCODERS)


@pytest.mark.parametrize("kind", ENCODERS_WORK)
def test_encoder_works(kind: str, encoders: dict[str, Answer]) -> None:
    assert fails(encoders[kind]) is None
    assert works(encoders[kind]) and not encoders[kind]["causal"]


@pytest.mark.parametrize("kind", ENCODERS_REFUSED)
def test_encoder_is_refused(kind: str, encoders: dict[str, Answer]) -> None:
    assert ENCODERS_REFUSED[kind] in encoders[kind]["refused"]
