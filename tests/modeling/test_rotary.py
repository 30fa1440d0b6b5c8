"""Rotary embedding, which features of the default recipe are made without."""

import pytest
import torch

from dijiang_convert.modeling.rotary import known_rotation, without_rotation
from tests.models import KINDS, difference, kernels, load, logits_of, tokens, window_and_state

TOLERANCE = 1e-4
LENGTH = 310


@pytest.mark.parametrize("kind", KINDS)
def test_positions_do_not_matter_without_rotation(kind: str) -> None:
    """With rotary embedding removed the far part depends on content and distance alone."""
    ids = tokens(2, LENGTH)
    positions = torch.arange(LENGTH)[None].expand(2, -1)
    moved = {}
    for variant in ("frequency", "keep"):
        model = window_and_state(load(kind, variant))
        expected = logits_of(model, ids, position_ids=positions)
        assert difference(expected, logits_of(model, ids)) <= TOLERANCE
        moved[variant] = difference(logits_of(model, ids, position_ids=positions + 100), expected)
    assert moved["frequency"] <= 1e-3 < 1e-2 < moved["keep"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1.3])  # YaRN lengthens cos and sin
def test_rotation_is_undone(kind: str, scale: float) -> None:
    child, model = kernels(load(kind))[0], load(kind)
    x = torch.randn(2, 4, 50, child.layers.head_dim)
    cos, sin = (scale * t for t in model.base_model.rotary_emb(x, torch.arange(1000, 1050)[None]))
    dim = cos.shape[-1]
    assert dim == (child.layers.head_dim if kind == "llama" else child.layers.head_dim // 4)
    turned = torch.cat([child.apply_rotary(x[..., :dim], x[..., :dim], cos, sin)[0], x[..., dim:]], -1)
    assert difference(turned, x) > 0.1
    for undone in without_rotation(child.apply_rotary, turned, turned, cos, sin, dim=child.layers.rotary_dim):
        assert difference(undone, x) <= 1e-5
    turn = known_rotation(child.apply_rotary, cos, sin, child.layers.rotary_dim)
    assert turn is not None and turn.partner.shape == (dim,)  # though it is given the whole head
    assert difference(turn.back(turned, cos, sin), x) <= 1e-5
    for i in (0, 49):
        one = turn.back(turned[:, :, i : i + 1], cos[:, i : i + 1], sin[:, i : i + 1])
        assert difference(one, x[:, :, i : i + 1]) <= 1e-5
    rows = torch.cat([cos[:, :1], cos[:, 1:2]]), torch.cat([sin[:, :1], sin[:, 1:2]])  # each row of a place of its own
    first = torch.stack([turned[0, :, :1], turned[1, :, 1:2]])
    assert difference(turn.back(first, *rows), torch.stack([x[0, :, :1], x[1, :, 1:2]])) <= 1e-5
    assert known_rotation(child.apply_rotary, cos, sin, dim - 1) is None
