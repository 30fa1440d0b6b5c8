"""Converted models from the Hub: by transformers alone, where this package is not; and by this package's verbs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from dijiang_convert.checkpoint.loading import load_any, load_converted, load_tokenizer
from dijiang_convert.push import push
from tests.hub import Hub
from tests.modeling.test_loading import run
from tests.models import difference, forget_far_part, load, logits_of, moved_checkpoint, tokens

FROM_HUB = """
def load(name, revision=None):
    return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, revision=revision).eval()

def all_of(model):
    made = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    return logits_of(model), made

tokenizer = AutoTokenizer.from_pretrained("from/hub", trust_remote_code=True, revision="v1")
found["tokenizer"] = tokenizer.decode(tokenizer("far and near")["input_ids"])
models = {"v1": load("from/hub", "v1"), "dev": load("from/hub", "dev"), "other": load("from/other")}
first = {name: all_of(model) for name, model in models.items()}
again = {name: all_of(model) for name, model in models.items()}  # each still runs its own code beside the others
found["stays"] = [torch.equal(a, b) for name in models for a, b in zip(first[name], again[name])]
found["files"] = {name: sys.modules[type(model).__module__].__file__ for name, model in models.items()}
torch.save({name: logits for name, (logits, _) in first.items()}, out / "logits.pt")
found["imported"] = [name for name in sys.modules if name.partition(".")[0] in HIDDEN]
(out / "found.json").write_text(json.dumps(found))
"""


def of_another_version(folder: Path) -> None:
    """Code that has forgotten its far part, and says so."""
    forget_far_part(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dijiang"]["version"] = "0.0.1"
    (folder / "config.json").write_text(json.dumps(config))


def test_transformers_alone_loads_revisions_and_versions_side_by_side(tmp_path: Path, hub: Hub) -> None:
    folder = moved_checkpoint("llama", tmp_path / "model")
    push(folder, "from/hub", tag="v1")
    shutil.copytree(folder, tmp_path / "old")
    of_another_version(tmp_path / "old")
    push(tmp_path / "old", "from/hub", revision="dev")
    push(moved_checkpoint("neox", tmp_path / "other"), "from/other")

    found = run(FROM_HUB, tmp_path / "out", tmp_path, offline=False)
    assert found["imported"] == [] and found["tokenizer"] == "far and near"
    assert all(found["stays"]) and len(found["stays"]) == 6
    logits = torch.load(tmp_path / "out" / "logits.pt")
    assert difference(logits["v1"], logits_of(load_converted(folder).eval(), tokens(2, 150))) <= 1e-5
    assert difference(logits["dev"], logits["v1"]) > 1e-2  # another code, other logits
    assert difference(logits["other"], logits_of(load("neox"), tokens(2, 150))) <= 1e-5
    assert len(set(found["files"].values())) == 3 and all("modules" in file for file in found["files"].values())


def test_the_packages_verbs_run_it_by_their_own_code(tmp_path: Path, hub: Hub) -> None:
    folder = moved_checkpoint("llama", tmp_path / "model")
    of_another_version(folder)
    push(folder, "from/verbs")
    here = logits_of(load_converted(folder).eval(), tokens(1, 150))
    assert difference(logits_of(load_any("from/verbs").eval(), tokens(1, 150)), here) <= 1e-5
    assert load_tokenizer("from/verbs").decode(load_tokenizer("from/verbs")("far")["input_ids"]) == "far"
