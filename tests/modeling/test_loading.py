"""Checkpoints without this package: transformers alone runs the code that lies in the folder.

A child process in which the package, and others that it does without, can't be imported does all that a user would and
writes down what it found; the tests read that. What needs no second process runs here.
"""

import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dijiang_convert.checkpoint.loading import load_converted
from dijiang_convert.errors import DijiangError
from dijiang_convert.modeling import configuration_dijiang
from tests.models import (
    KINDS,
    checkpoint,
    difference,
    forget_far_part,
    load,
    logits_of,
    moved_checkpoint,
    source,
    tokens,
)

# Hides packages from every finder, the one of an editable installation too.
PREAMBLE = """
import json, pickle, sys
from pathlib import Path

HIDDEN = ("dijiang_convert", "peft", "datasets", "triton", "fla")

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *args):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, *args)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
for name in HIDDEN:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is not hidden")

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

folder, out, found = Path(sys.argv[1]), Path(sys.argv[2]), {}
ids = torch.load(out / "ids.pt")

@torch.no_grad()
def logits_of(model):
    return model(ids).logits
"""

USE = """
original = sys.argv[3]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
found["config"] = type(config).__name__
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
found["tokenizer"] = tokenizer.decode(tokenizer("far and near")["input_ids"])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
found["model"] = type(model).__name__
found["dtypes"] = sorted({str(p.dtype) for p in model.parameters()})
logits = logits_of(model)
torch.save(logits, out / "logits.pt")

inner = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
found["inner"] = type(inner).__name__
with torch.no_grad():
    states = inner(ids).last_hidden_state
    found["inner_difference"] = (model.get_output_embeddings()(states) - logits).abs().max().item()

source_state = AutoModelForCausalLM.from_pretrained(original).state_dict()
state = model.state_dict()
found["new"] = sorted(state.keys() - source_state.keys())
found["gone"] = sorted(source_state.keys() - state.keys())
found["changed"] = [name for name, t in source_state.items() if name in state and not torch.equal(t, state[name])]

options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
made = [model.generate(ids, use_cache=use_cache, **options) for use_cache in (True, False)]
found["generated"] = list(made[0].shape)
found["generate_agrees"] = torch.equal(*made)

pipe = pipeline("text-generation", model=str(folder), tokenizer=str(folder), trust_remote_code=True)
found["pipeline"] = pipe("far and near", **options)[0]["generated_text"]
pipe.tokenizer.pad_token, pipe.tokenizer.padding_side = pipe.tokenizer.eos_token, "left"
found["pipeline_batch"] = len(pipe(["far and near", "far"], batch_size=2, **options))

copy = pickle.loads(pickle.dumps(model))
found["pickle"] = torch.equal(logits_of(copy), logits)

fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
found["from_config"] = bool(logits_of(fresh).isfinite().all())

model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for _ in range(3):
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
found["losses"] = losses
model.eval()
trained = logits_of(model)
model.save_pretrained(out / "saved")
tokenizer.save_pretrained(out / "saved")
again = AutoModelForCausalLM.from_pretrained(out / "saved", trust_remote_code=True).eval()
found["reloaded"] = torch.equal(logits_of(again), trained)
torch.save(trained, out / "trained.pt")
half = AutoModelForCausalLM.from_pretrained(out / "saved", trust_remote_code=True, dtype=torch.bfloat16)
found["half"] = sorted({(".dijiang." in name, str(p.dtype)) for name, p in half.named_parameters()})
found["imported"] = [name for name in sys.modules if name.partition(".")[0] in HIDDEN]
found["code"] = sys.modules[type(model).__module__].__file__
(out / "found.json").write_text(json.dumps(found))
"""

DAMAGED = """
for name in ("missing", "unknown"):
    try:
        AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True)
        found[name] = None
    except ValueError as error:
        found[name] = str(error)
(out / "found.json").write_text(json.dumps(found))
"""

TWO_VERSIONS = """
def load(name):
    return AutoModelForCausalLM.from_pretrained(folder / name / "model", trust_remote_code=True).eval()

def decoded(model):
    return model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False).tolist()

one = load("one")
alone = logits_of(one), decoded(one)
two = load("two")
other = logits_of(two), decoded(two)
found["differ"] = (alone[0] - other[0]).abs().max().item()
found["first_stays"] = torch.equal(logits_of(one), alone[0]) and decoded(one) == alone[1]
found["first_again"] = torch.equal(logits_of(load("one")), alone[0])
found["second_again"] = torch.equal(logits_of(load("two")), other[0]) and decoded(load("two")) == other[1]
found["files"] = [sys.modules[type(model).__module__].__file__ for model in (one, two)]
cache = one(ids, use_cache=True).past_key_values
try:
    two(ids, past_key_values=cache, use_cache=True)
    found["cache"] = None
except ValueError as error:
    found["cache"] = str(error)
(out / "found.json").write_text(json.dumps(found))
"""

OTHER_HEADS = """
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

long = ids.repeat(1, 20)[:1]  # of 3,000 tokens
with torch.no_grad():
    for auto in (AutoModelForTokenClassification, AutoModelForSequenceClassification):
        model = auto.from_pretrained(folder, trust_remote_code=True).eval()
        body = model.base_model
        kernels = [name for name, _ in model.named_modules() if name.endswith(".dijiang")]
        hooks = [len(module._forward_pre_hooks) for module in model.modules() if hasattr(module, "dijiang")]
        found[auto.__name__] = {
            "body": type(body).__name__, "kernels": len(kernels), "hooks": hooks,
            "shape": list(model(long).logits.shape),
            "as_body": (body(long).last_hidden_state - AutoModel.from_pretrained(folder, trust_remote_code=True)
                        .eval()(long).last_hidden_state).abs().max().item(),
        }
AutoModel.from_pretrained(folder, trust_remote_code=True).save_pretrained(out / "saved")
found["saved"] = sorted(path.name for path in (out / "saved").glob("*.py"))
(out / "found.json").write_text(json.dumps(found))
"""


def run(script: str, out: Path, *arguments: Path, offline: bool = True) -> dict[str, Any]:
    """What a script wrote down, run where neither this package nor its tests are."""
    out.mkdir(parents=True, exist_ok=True)
    torch.save(tokens(2, 150), out / "ids.pt")
    folder, *rest = arguments
    environment = {**os.environ, "HF_MODULES_CACHE": str(out / "modules"), "HF_HUB_OFFLINE": str(int(offline))}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(PREAMBLE + script), str(folder), str(out), *map(str, rest)],
        cwd=out,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((out / "found.json").read_text())
    return {**found, "out": out, "stderr": done.stderr}


@pytest.fixture(scope="module", params=KINDS)
def used(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    kind = request.param
    out = tmp_path_factory.mktemp("used")
    folder = moved_checkpoint(kind, out / "moved")
    return {**run(USE, out, folder, source(kind)), "kind": kind, "folder": folder}


def test_auto_classes(used: dict[str, Any]) -> None:
    name = {"llama": "Llama", "neox": "GPTNeoX"}[used["kind"]]
    assert used["config"] == f"DiJiang{name}Config"
    assert used["model"] == f"DiJiang{name}ForCausalLM"
    assert used["inner"] == f"DiJiang{name}Model"
    assert used["inner_difference"] <= 1e-5
    assert used["tokenizer"] == "far and near"
    assert used["dtypes"] == ["torch.float32"]


def test_runs_the_folders_code_alone(used: dict[str, Any]) -> None:
    assert used["imported"] == []
    assert used["code"].startswith(str(used["out"] / "modules"))


def test_same_logits_as_in_the_package(used: dict[str, Any]) -> None:
    here = logits_of(load_converted(used["folder"]).eval(), tokens(2, 150))
    assert difference(torch.load(used["out"] / "logits.pt"), here) <= 1e-5


def test_base_tensors_are_the_sources(used: dict[str, Any]) -> None:
    assert used["gone"] == used["changed"] == []
    assert used["new"] and all(".dijiang." in name for name in used["new"])


def test_generates(used: dict[str, Any]) -> None:
    assert used["generated"] == [2, 170]
    assert used["generate_agrees"]
    assert used["pipeline"].startswith("far and near") and len(used["pipeline"]) > len("far and near")
    assert used["pipeline_batch"] == 2


def test_trains_and_saves(used: dict[str, Any]) -> None:
    assert used["losses"][2] < used["losses"][0]
    assert used["reloaded"]
    assert used["half"] == [[False, "torch.bfloat16"], [True, "torch.float32"]]
    saved = used["out"] / "saved"
    names = {path.name for path in saved.iterdir()}
    assert {path.name for path in checkpoint(used["kind"]).glob("*.py")} <= names
    here = logits_of(load_converted(saved).eval(), tokens(2, 150))
    assert difference(torch.load(used["out"] / "trained.pt"), here) <= 1e-5


def test_pickle_and_fresh_weights(used: dict[str, Any]) -> None:
    assert used["pickle"]
    assert used["from_config"]


def test_pickle_of_the_packages_own_classes() -> None:
    model = load("llama")
    copied = pickle.loads(pickle.dumps(model))
    assert type(copied) is type(model) and type(copied.config) is type(model.config)
    assert torch.equal(logits_of(copied, tokens(1, 150)), logits_of(model, tokens(1, 150)))


@pytest.mark.parametrize("kind", KINDS)
def test_original_file_names_survive(kind: str) -> None:
    """Transformers without our code sees the source's own tensors under the source's own names."""
    before = {name: t for path in source(kind).glob("*.safetensors") for name, t in load_file(path).items()}
    after = {name: t for path in checkpoint(kind).glob("*.safetensors") for name, t in load_file(path).items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(".dijiang." in name for name in after.keys() - before.keys())


# ------------------------------------------------------------------------------------------------ what goes wrong


def without_a_tensor(folder: Path) -> Path:
    """A checkpoint whose index lacks one tensor of the kernel."""
    shutil.copytree(checkpoint("llama"), folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = max(name for name in index["weight_map"] if name.endswith(".dijiang.decay.decay"))
    shard = folder / index["weight_map"].pop(name)
    path.write_text(json.dumps(index))
    rewrite(shard, remove=name)
    return folder


def with_an_unknown_tensor(folder: Path) -> Path:
    shutil.copytree(checkpoint("llama"), folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = max(name for name in index["weight_map"] if name.endswith(".dijiang.decay.decay"))
    index["weight_map"][name + "_of_old"] = index["weight_map"][name]
    path.write_text(json.dumps(index))
    rewrite(folder / index["weight_map"][name], add=name + "_of_old")
    return folder


def rewrite(shard: Path, remove: str = "", add: str = "") -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor for name, tensor in load_file(shard).items() if name != remove}
    if add:
        tensors[add] = torch.zeros(2)
    save_file(tensors, shard, {"format": "pt"})


def test_damaged_checkpoints_are_errors(tmp_path: Path) -> None:
    """Where transformers would go on with random numbers."""
    folders = {"lacks": without_a_tensor(tmp_path / "missing"), "unknown": with_an_unknown_tensor(tmp_path / "unknown")}
    for word, folder in folders.items():
        with pytest.raises(DijiangError, match=f"{word}.*decay"):
            load_converted(folder)
    found = run(DAMAGED, tmp_path / "out", tmp_path)
    assert "lacks 1 tensor" in found["missing"] and "decay" in found["missing"]
    assert "unknown 1 tensor" in found["unknown"] and "decay_of_old" in found["unknown"]


def test_versions_do_not_mix(tmp_path: Path) -> None:
    """Two checkpoints of the same folder name, one with another kernel, each run their own code in one process."""
    for name in ("one", "two"):
        moved_checkpoint("llama", tmp_path / name / "model")
    forget_far_part(tmp_path / "two" / "model")
    found = run(TWO_VERSIONS, tmp_path / "out", tmp_path)
    assert found["differ"] > 1e-2
    assert found["first_stays"] and found["first_again"] and found["second_again"]
    assert len(set(found["files"])) == 2
    assert "another DiJiang version" in found["cache"]


def test_heads_that_serve_many_types(tmp_path: Path) -> None:
    """They make their body through AutoModel; and what judges a whole text sees it as a whole, however long it is."""
    found = run(OTHER_HEADS, tmp_path / "out", checkpoint("llama"))
    for name, shape in (
        ("AutoModelForTokenClassification", [1, 3000, 2]),
        ("AutoModelForSequenceClassification", [1, 2]),
    ):
        assert found[name] == {"body": "DiJiangLlamaModel", "kernels": 2, "hooks": [1, 1], "shape": shape, "as_body": 0}
    assert "modeling_dijiang.py" in found["saved"]


@pytest.mark.parametrize("version", ["4.57.1", "5.0.0", "5.17.3"])
def test_old_transformers_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line that names the version needed, before anything else can fail."""
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    spec = importlib.util.spec_from_file_location("configuration_of_old", configuration_dijiang.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.raises(ImportError) as caught:
        spec.loader.exec_module(module)
    message = str(caught.value)
    assert configuration_dijiang.REQUIRES_TRANSFORMERS in message and version in message and "\n" not in message


@pytest.mark.parametrize("version", [configuration_dijiang.REQUIRES_TRANSFORMERS, "5.99.0", "6.0.0"])
def test_newer_transformers_is_tried(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    spec = importlib.util.spec_from_file_location("configuration_of_new", configuration_dijiang.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "configuration_of_new", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    assert module.REQUIRES_TRANSFORMERS == configuration_dijiang.REQUIRES_TRANSFORMERS


def test_softmax_source_loads_beside_it() -> None:
    """Registering our attention leaves the source's own classes as they were."""
    ids = tokens(1, 150)
    original = AutoModelForCausalLM.from_pretrained(source("llama")).eval()
    before = logits_of(original, ids)
    logits_of(load("llama"), ids)
    assert torch.equal(logits_of(original, ids), before)
    assert type(original).__name__ == "LlamaForCausalLM" and original.config._attn_implementation == "sdpa"
