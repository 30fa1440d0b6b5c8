"""A long prompt is worked on in chunks: the same numbers as all at once, with padding and with a cache."""

from pathlib import Path

import pytest
import torch

from dijiang_convert import convert
from dijiang_convert.checkpoint.loading import load_converted
from dijiang_convert.demo import MODEL
from dijiang_convert.modeling import modeling_dijiang

LENGTH = 400
SMALL = ["window=16", "block=16", "memory=8"]


@pytest.mark.parametrize("recipe", ["default", "frequency", "pure", "paper", "window-only"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, padding: str) -> None:
    settings = {"default": SMALL, "frequency": SMALL, "window-only": SMALL[:2]}.get(recipe, [])
    convert(str(MODEL), tmp_path / "out", recipe=recipe, settings=settings)
    model = load_converted(tmp_path / "out").eval()
    torch.manual_seed(0)
    ids = torch.randint(1, 1000, (2, LENGTH))
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[0, slice(0, 170) if padding == "left" else slice(-170, None)] = 0
    results = []
    for size in (LENGTH, 70):
        monkeypatch.setattr(modeling_dijiang, "CHUNK", size)
        with torch.no_grad():
            first = model(input_ids=ids[:, :-30], attention_mask=mask[:, :-30], use_cache=True)
            rest = model(input_ids=ids[:, -30:], attention_mask=mask, past_key_values=first.past_key_values)
        results.append(torch.cat([first.logits, rest.logits], 1)[mask.bool()])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-4)
    with torch.enable_grad():  # never in chunks
        whole = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(whole.detach(), results[1], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chunks") / "out"
    convert(str(MODEL), out, settings=SMALL)
    return out


def test_what_is_asked_for_is_returned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_converted(folder).eval()
    ids = torch.randint(1, 1000, (1, LENGTH))
    calls: list[int] = []
    model.gpt_neox.layers[0].register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    with torch.no_grad():
        whole = model(input_ids=ids)
        monkeypatch.setattr(modeling_dijiang, "CHUNK", 150)
        calls.clear()
        chunked = model(input_ids=ids, use_cache=False)
        assert calls == [150, 150, 100]
        assert chunked.past_key_values is None
        torch.testing.assert_close(chunked.logits, whole.logits, rtol=0, atol=1e-4)
        last = model(input_ids=ids, logits_to_keep=3)
        torch.testing.assert_close(last.logits, whole.logits[:, -3:], rtol=0, atol=1e-4)
        assert last.past_key_values.get_seq_length() == LENGTH
        calls.clear()
        hidden = model(input_ids=ids, output_hidden_states=True)  # asks for more than chunks give
        assert calls == [LENGTH]
        assert hidden.hidden_states[0].shape[1] == LENGTH
        assert model(input_ids=ids, labels=ids).loss > 0


def test_the_body_alone_goes_in_chunks_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_converted(folder).config
    body = modeling_dijiang.DiJiangGPTNeoXModel.from_pretrained(str(folder), config=config).eval()
    ids = torch.randint(1, 1000, (1, LENGTH))
    with torch.no_grad():
        whole = body(input_ids=ids).last_hidden_state
        monkeypatch.setattr(modeling_dijiang, "CHUNK", 150)
        chunked = body(input_ids=ids).last_hidden_state
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-4)
