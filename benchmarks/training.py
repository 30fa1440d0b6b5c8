"""Memory and time of distillation beside those of training the softmax model, on random weights.

    python benchmarks/training.py --out benchmarks/results/training-cpu.json

Memory, every way of training in a process of its own, three steps of AdamW: the peak resident size of the process (on
CUDA the allocator's), and how much of it came after the model was loaded. The C library would keep much of what is
freed, whoever trains: MALLOC_MMAP_THRESHOLD_ makes it give back blocks from 1 MB on.

- plain: the softmax model (SDPA) with peft's LoRA and its own cross-entropy loss
- distill: the converted model with the same LoRA and its kernels, distilled from itself
- full-copy: the whole converted model, distilled from a frozen copy

Time of a step, medians of steps that take turns in one process; on the CPU the processor's time, in one thread with
OMP_NUM_THREADS=1, so that what else runs on the machine does not count:

- distill over plain: LoRA, as above
- transfer over softmax: attention transfer against one forward and backward pass of the softmax model (all gradients)

Each for a large vocabulary and a small one, where no output head hides what the layers cost.

With --against FOLDER, a checkout of this package, also the time of distill and of transfer by that version of it: each
version in a process of its own, step by step in turns. --set is for this version alone:

    OMP_NUM_THREADS=1 python benchmarks/training.py --memory --times distill --against ../before --set memory=256
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

import dijiang_convert
from dijiang_convert import convert
from dijiang_convert.checkpoint.loading import default_device, load_converted
from dijiang_convert.demo import MODEL
from dijiang_convert.training.adapters import lora_targets
from dijiang_convert.training.attention import original, recomputing
from dijiang_convert.training.attention_transfer import attention_transfer_loss, transferring
from dijiang_convert.training.logits import distillation_loss, inner_model, live_teacher

WAYS = ("plain", "distill", "full-copy")
TIMED = ("plain", "distill", "transfer", "softmax")
OURS = ("distill", "transfer")  # of these, what another version of this package can be slower at
STEPS = 3


def make_models(folder: Path, args: argparse.Namespace, vocabulary: int) -> tuple[Path, Path]:
    """A GPT-NeoX of random weights, and it converted."""
    source, converted = folder / "source", folder / "converted"
    config = GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=args.hidden, intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // args.head_dim,
        max_position_embeddings=args.length, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config).save_pretrained(source)
    for path in MODEL.glob("tokenizer*"):
        shutil.copy(path, source)
    convert(str(source), converted, recipe=args.recipe, settings=args.set)
    return source, converted


def batch(vocabulary: int, args: argparse.Namespace) -> dict[str, Tensor]:
    """One batch as the trainer gives it."""
    ids = torch.randint(vocabulary, (args.batch, args.length), device=default_device())
    ones, positions = torch.ones_like(ids), torch.arange(args.length, device=ids.device).expand_as(ids)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": ones, "loss_mask": ones}


# ----------------------------------------------------------------------------------------------- ways of training


def softmax_model(source: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(source, attn_implementation="sdpa").to(default_device()).train()


def plain_loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(input_ids=inputs["input_ids"], labels=inputs["input_ids"], use_cache=False).loss


def with_lora(model: Any, targets: list[str], kernels: bool) -> Any:
    config = LoraConfig(r=16, lora_alpha=32, target_modules=targets, modules_to_save=["dijiang"] if kernels else None)
    return get_peft_model(model, config)


def way(
    name: str, source: Path, converted: Path, inputs: dict[str, Tensor], args: argparse.Namespace
) -> tuple[Any, Callable[..., Tensor]]:
    """(what trains, its loss of a batch) of one of WAYS, "transfer" or "softmax"."""
    if name == "softmax":
        return softmax_model(source), plain_loss
    model = load_converted(converted).train()
    if name == "transfer":
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(".dijiang." in key)
        return model, attention_transfer_loss
    targets = lora_targets(model, "attention")
    if name == "plain":
        return with_lora(softmax_model(source), targets, kernels=False), plain_loss
    if name == "distill":
        return with_lora(model, targets, kernels=True), lambda student, inputs: distillation_loss(
            student, live_teacher(student, inputs, within=lambda: original(student)), inputs, 0.0
        )
    teacher = load_converted(converted, attention="softmax").eval().requires_grad_(False)
    return model, lambda student, inputs: distillation_loss(student, live_teacher(teacher, inputs), inputs, 0.0)


def stepper(name: str, model: Any, loss: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Callable[[], None]:
    """Runs one step; of "softmax" the two passes alone, which is what transfer is held against."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    inside = {"transfer": transferring, "plain": nullcontext, "softmax": nullcontext}.get(name, recomputing)

    def step() -> None:
        with inside(inner_model(model)):
            loss(model, inputs).backward()
        if name != "softmax":
            optimizer.step()
        optimizer.zero_grad()

    return step


# ------------------------------------------------------------------------------------------------------- measuring


def peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident() -> int:
    """Bytes in use now: of the GPU, or resident (Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_memory(name: str, folder: Path, vocabulary: int, args: argparse.Namespace) -> dict[str, int]:
    """Of this process, which does nothing else."""
    torch.manual_seed(0)
    inputs = batch(vocabulary, args)
    model, loss = way(name, folder / "source", folder / "converted", inputs, args)
    loaded = resident()
    step = stepper(name, model, loss, inputs)
    for _ in range(STEPS):
        step()
    peak = peak_memory()
    return {"peak_bytes": peak, "loaded_bytes": loaded, "growth_bytes": peak - loaded}


def clock() -> float:
    """Seconds: on the CPU those that the processor gave this process."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def measure_times(names: tuple[str, ...], folder: Path, vocabulary: int, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds a step."""
    torch.manual_seed(0)
    inputs = batch(vocabulary, args)
    steps = {n: stepper(n, *way(n, folder / "source", folder / "converted", inputs, args), inputs) for n in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(args.repeats + 1):
        for name, step in steps.items():
            taken = timed(step)
            if i:  # the first warms up
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def timed(step: Callable[[], None]) -> float:
    start = clock()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def answer_steps(folder: Path, vocabulary: int, args: argparse.Namespace) -> None:
    """Says where its package is; then takes names of ways from stdin, one a line, and answers each with the seconds of
    a step."""
    print(json.dumps(dijiang_convert.__file__), flush=True)
    source, converted = make_models(folder, args, vocabulary)
    torch.manual_seed(0)
    inputs, steps = batch(vocabulary, args), {}
    for line in sys.stdin:
        name = line.strip()
        if name not in steps:
            steps[name] = stepper(name, *way(name, source, converted, inputs, args), inputs)
        print(json.dumps(timed(steps[name])), flush=True)


def measure_against(names: list[str], vocabulary: int, args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Median seconds a step by this version of the package and by the one in args.against, and their ratio."""
    checkouts = {"this": Path(dijiang_convert.__file__).parents[1], "other": args.against.resolve()}
    times: dict[tuple[str, str], list[float]] = {(name, each): [] for name in names for each in checkouts}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:
        running = {}
        for each, checkout in checkouts.items():
            (Path(folder) / each).mkdir()
            settings = [] if each == "this" else ["--set"]  # none
            command = worker_command("steps", Path(folder) / each, vocabulary, [*argv, *settings])
            environment = {**os.environ, "PYTHONPATH": str(checkout)}
            process: Any = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            running[each] = processes.enter_context(process)
            package = Path(json.loads(process.stdout.readline()))
            if not package.is_relative_to(checkout):
                raise SystemExit(f"error: no dijiang_convert in {checkout}: {package} was imported")
        for i in range(args.repeats + 1):
            for (name, each), values in times.items():
                print(name, file=running[each].stdin, flush=True)
                taken = json.loads(running[each].stdout.readline())
                if i:  # the first warms up
                    values.append(taken)
    medians = {key: statistics.median(values) for key, values in times.items()}
    return {
        name: {
            "seconds": medians[name, "this"], "other_seconds": medians[name, "other"],
            "this_over_other": round(medians[name, "this"] / medians[name, "other"], 3),
        }
        for name in names
    }  # fmt: skip


def worker_command(name: str, folder: Path, vocabulary: int, argv: list[str]) -> list[str]:
    return [sys.executable, __file__, *argv, "--worker", name, str(folder), str(vocabulary)]


def worker(name: str, folder: Path, vocabulary: int, argv: list[str]) -> Any:
    environment = os.environ if name == "times" else {"MALLOC_MMAP_THRESHOLD_": "1000000", **os.environ}
    command = worker_command(name, folder, vocabulary, argv)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def ratios(memory: dict[str, dict[str, int]], times: dict[str, float]) -> dict[str, float]:
    values = {}
    for a, b, key in (
        ("distill", "plain", "peak"), ("distill", "plain", "growth"),
    ):  # fmt: skip
        if a in memory and b in memory:
            values[f"{a}_over_{b}_{key}"] = memory[a][f"{key}_bytes"] / memory[b][f"{key}_bytes"]
    for a, b in (("distill", "plain"), ("transfer", "softmax")):
        if a in times and b in times:
            values[f"{a}_over_{b}_time"] = times[a] / times[b]
    return {key: round(value, 3) for key, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[50_304, 512])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--recipe", default="frequency")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the recipe's kernel")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", nargs="*", choices=WAYS, default=WAYS)
    parser.add_argument("--times", nargs="*", choices=TIMED, default=TIMED)
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout of this package")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=3, metavar=("WAY", "FOLDER", "VOCABULARY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, folder, vocabulary = args.worker[0], Path(args.worker[1]), int(args.worker[2])
        if name == "steps":
            answer_steps(folder, vocabulary, args)
        elif name == "times":
            print(json.dumps(measure_times(tuple(args.times), folder, vocabulary, args)))
        else:
            print(json.dumps(measure_memory(name, folder, vocabulary, args)))
        return
    results = []
    for vocabulary in args.vocabularies:
        with tempfile.TemporaryDirectory() as name:
            make_models(Path(name), args, vocabulary)
            memory = {each: worker(each, Path(name), vocabulary, sys.argv[1:]) for each in args.memory}
            times = worker("times", Path(name), vocabulary, sys.argv[1:]) if args.times else {}
        ours = [each for each in OURS if each in args.times]
        against = measure_against(ours, vocabulary, args, sys.argv[1:]) if args.against else {}
        shape = {"hidden": args.hidden, "layers": args.layers, "length": args.length, "batch": args.batch}
        results.append({
            "vocabulary": vocabulary, **shape, "recipe": args.recipe, "settings": args.set,
            "threads": torch.get_num_threads(), "device": str(default_device()), "memory": memory, "seconds": times,
            "ratios": ratios(memory, times), **({"against": against} if against else {}),
        })  # fmt: skip
        print(json.dumps(results[-1], indent=1), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
