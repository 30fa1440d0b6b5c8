"""inspect: the sizes that it tells are those of the checkpoint, and it reads the config alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from dijiang_convert.checkpoint.loading import load_converted
from dijiang_convert.convert import convert
from dijiang_convert.errors import DijiangError
from dijiang_convert.inspect import inspect
from dijiang_convert.measure.timing import cache_bytes
from tests.convert.converting import CPU, read_json
from tests.hub import Hub
from tests.sources_on_disk import llama_config, random_model, write_source


def test_inspect_by_hand(sources: Path) -> None:
    result = inspect(str(sources / "llama"), recipe="frequency")
    assert result.supported and result.reason is None and result.architecture == "LlamaForCausalLM"
    assert (result.layers, result.layers_converted, result.heads, result.kv_heads, result.head_dim) == (3, 3, 4, 2, 8)
    hidden, mlp, vocabulary = 32, 64, 258
    layer = 2 * hidden * hidden + 2 * hidden * 16 + 3 * hidden * mlp + 2 * hidden
    assert result.parameters == 3 * layer + 2 * vocabulary * hidden + hidden
    # A head's features have T (8), W (8 x 8), D (16) and a; c is a query head's, b and decay are a key/value head's.
    features = 8 + 64 + 16 + 1
    selection = 2 * 2 * hidden  # of a key's log-scale and decay, for two key/value heads
    of_features = 16 * hidden + 2 * 16 * 16 + 2 * 16  # down to 16 numbers, from them to each feature's decay, its start
    assert result.new_parameters == 3 * (4 * (features + 1) + 2 * (features + 2) + selection + of_features)
    # A key/value head's state has 16 features by 8 values and a weight. Keys and values are kept of 4 sinks and of
    # 432 keys of the memory, a byte a number, an exponent each, and a score; and of three blocks of 64 in the window.
    # Of these there are besides the keys before rotation and the attention received, and of a token two gates a head
    # and 16 numbers for features.
    state, memory, window = 4 * 16 * (8 + 1), (4 + 432) * (8 + 1 + 8 + 1 + 4), 4 * 192 * (8 + 8 + 8 + 1)
    window_alone = 4 * 192 * (8 + 8 + 1)  # without a state no key is needed before its rotation
    assert result.state_bytes == 3 * (2 * (state + memory + window) + 4 * 192 * (2 * 2 + 16))
    assert result.kv_cache_bytes_at == {n: 3 * 2 * (8 + 8) * 4 * n for n in (1024, 8192, 65536)}
    first = result.smaller_from
    assert first is not None and (first - 1) * 3 * 2 * 16 * 4 <= result.state_bytes < first * 3 * 2 * 16 * 4
    default = inspect(str(sources / "llama"))
    assert default.new_parameters == 0
    assert default.state_bytes == 3 * 2 * ((4 + 896) * (8 + 1 + 8 + 1 + 4) + window_alone)
    some = inspect(str(sources / "llama"), layers="0,1", recipe="pure", settings=["shift=false"])
    assert (some.layers, some.layers_converted) == (3, 2)
    assert some.state_bytes == 2 * 2 * 16 * (8 * 4 + 8)  # its weights are float64
    shifted = inspect(str(sources / "llama"), layers="0,1", recipe="pure")
    assert shifted.state_bytes == some.state_bytes + 2 * (4 + 2) * 8 * 4  # the last token's query and key
    assert some.kv_cache_bytes_at == {n: 2 * 2 * (8 + 8) * 4 * n for n in (1024, 8192, 65536)}


def test_inspect_tells_why_not(sources: Path, tmp_path: Path) -> None:
    config = read_json(sources / "llama" / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "falcon", "architectures": ["F"]}))
    result = inspect(str(tmp_path))
    assert not result.supported and result.reason and "\n" not in result.reason
    assert result.architecture == "F" and result.state_bytes == 0


def test_inspect_reads_only_the_config(hub: Hub, sources: Path) -> None:
    hub.add_repo("inspect/llama", {"config.json": (sources / "llama" / "config.json").read_bytes()})
    start = len(hub.requests)
    assert inspect("inspect/llama").supported
    files = {request.path.rpartition("/")[2] for request in hub.requests[start:] if "/resolve/" in request.path}
    assert files == {"config.json"}


@pytest.mark.parametrize("kind", ["llama", "llama-bfloat16", "opt"])
@pytest.mark.parametrize("recipe", ["default", "frequency", "pure", "paper", "window-only"])
def test_state_bytes_are_what_a_cache_holds(recipe: str, kind: str, sources: Path, tmp_path: Path) -> None:
    source = sources / kind
    if kind == "opt":  # without rotary embedding, the window's keys are kept once
        source = tmp_path / "opt"
        write_source(source, transformers.OPTConfig(
            hidden_size=32, ffn_dim=64, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=258, max_position_embeddings=256,
        ))  # fmt: skip
    convert(str(source), tmp_path / "out", recipe=recipe)
    model = load_converted(tmp_path / "out", device=CPU).eval()
    ids = torch.arange(200)[None]
    with torch.no_grad():
        cache = model(ids[:, :150], use_cache=True).past_key_values
        for token in ids[:, 150:].split(1, dim=1):
            cache = model(token, past_key_values=cache, use_cache=True).past_key_values
    assert cache.get_seq_length() == 200
    assert cache_bytes(cache) == inspect(str(source), recipe=recipe).state_bytes


def test_the_softmax_cache_is_as_inspect_says(sources: Path) -> None:
    model = random_model(llama_config())
    with torch.no_grad():
        cache = model(torch.arange(1024)[None] % 250, use_cache=True).past_key_values
    assert cache_bytes(cache) == (inspect(str(sources / "llama")).kv_cache_bytes_at or {})[1024]


def test_a_checkpoint_of_another_version_is_refused(sources: Path, tmp_path: Path) -> None:
    convert(str(sources / "llama"), tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    config["dijiang"]["version"] = "0.1.0"
    config["dijiang"]["kernel"]["chunk_size"] = 64
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DijiangError, match=r"written by dijiang-convert 0\.1\.0"):
        load_converted(tmp_path / "out", device=CPU)
