"""What the benchmarks share: an optimizer step, shuffled rounds, the machine's own speed."""

from __future__ import annotations

import argparse
import math
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn

from hamner.errors import UserError
from hamner.files import write_report
from hamner.machine import PRECISIONS, Machine, autocast, compile_layers
from hamner.optim import LossScale, gradient_norm
from hamner.recipe import Recipe, load_recipe
from model import ModelConfig, Transformer

CPU_BATCHES = {"v4": (1, 512), "tiny": (32, 256)}  # sequences and their length that a CPU bears
GB = 1e9


class Stepper:
    """Whole optimizer steps: forward, loss, backward, clip, update, gradients dropped.

    With PyTorch's own loss scaler for fp16: what one writes for a model of Hugging Face's.
    """

    def __init__(
        self,
        model: Any,  # called with a batch, returns something with a loss
        optimizer: Any,
        precision: str,
        device: torch.device,
        clip: float,
    ):
        self.model, self.optimizer, self.clip = model, optimizer, clip
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.autocast = autocast(precision, device)
        self.prepare(precision, device)

    def prepare(self, precision: str, device: torch.device) -> None:
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def __call__(self, **batch: Tensor) -> Tensor:
        """One step on a batch that the model's forward takes; its loss, left on the device."""
        with self.autocast:
            loss = self.model(**batch).loss
        self.backward_and_update(loss)
        self.optimizer.zero_grad()
        return loss.detach()

    def backward_and_update(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()


class OurStepper(Stepper):
    """The same with our optimizer and loss scale: clipping is part of the divisor, no waiting."""

    def prepare(self, precision: str, device: torch.device) -> None:
        self.loss_scale = LossScale(device, enabled=precision == "fp16")

    def backward_and_update(self, loss: Tensor) -> None:
        scale = self.loss_scale.scale
        (loss * scale).backward()
        norm = gradient_norm(self.parameters) / scale
        finite = norm.isfinite().float()
        self.optimizer.step(scale * (norm / self.clip).clamp(min=1), finite)
        self.loss_scale.update(finite)


def hugging_face_llama(ours: Transformer, *, use_cache: bool) -> Any:
    """A `LlamaForCausalLM` with the shape and the weights of our model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
        "initializer_range", "tie_word_embeddings",
    )  # fmt: skip
    settings: dict[str, Any] = {name: getattr(ours.config, name) for name in names}
    rope = {"rope_type": "default", "rope_theta": ours.config.rope_theta}
    settings |= {"rope_parameters": rope, "attn_implementation": "sdpa", "use_cache": use_cache}
    model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(ours.state_dict())
    return model.to(ours.lm_head.weight.device)


def compile_blocks(model: Transformer) -> None:
    """Compile our model as training does: block by block, so that one compilation serves all."""
    compile_layers(model, Machine(next(model.parameters()).device))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


def matmul_flops(
    shapes: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    device: torch.device,
    seconds: float = 1.0,
) -> float:
    """FLOP/s of products (m, k) x (k, n): the fastest of all that fit the time."""
    best = 0.0
    for m, k, n in shapes:
        a = torch.randn(m, k, device=device).to(dtype)
        b = torch.randn(k, n, device=device).to(dtype)
        out = a @ b
        end = time.perf_counter() + seconds / len(shapes)
        while True:
            best = max(best, 2 * m * k * n / seconds_of_product(a, b, out))
            if time.perf_counter() > end:
                break
    return best


def seconds_of_product(a: Tensor, b: Tensor, out: Tensor) -> float:
    """What one product of a and b takes."""
    together = 20 if a.is_cuda else 1  # launched at once, or the launching is measured

    def work() -> None:
        for _ in range(together):
            torch.mm(a, b, out=out)

    return seconds_of(work, a.device) / together


def largest_products(config: ModelConfig, tokens: int) -> list[tuple[int, int, int]]:
    """The model's largest matrix products (m, k, n): into and out of the MLP, and the head."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = (tokens, hidden, config.vocab_size)
    return [(tokens, hidden, inner), (tokens, inner, hidden), head]


def all_products(config: ModelConfig) -> list[tuple[int, int, int]]:
    """The sizes (k, n) of the weights that a token is multiplied with, and how many there are."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv_size = config.num_key_value_heads * config.head_dim
    return [
        (hidden, hidden, 2 * layers),
        (hidden, kv_size, 2 * layers),
        (hidden, inner, 2 * layers),
        (inner, hidden, layers),
        (hidden, config.vocab_size, 1),
    ]


def own_products_flops(
    config: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device, repeats: int = 3
) -> float:
    """FLOP/s of nothing but a step's products with its weights: forward, and both gradients.

    Each of another size is measured so many times into memory at hand; its median counts as often
    as the model has it.
    """
    flops = seconds = 0.0
    for k, n, times in all_products(config):
        x = torch.randn(tokens, k, device=device).to(dtype)
        weight = torch.randn(n, k, device=device).to(dtype)
        g = torch.randn(tokens, n, device=device).to(dtype)  # of the output
        for a, b in ((x, weight.T), (g, weight), (g.T, x)):
            out = a @ b
            took = median(seconds_of_product(a, b, out) for _ in range(repeats))
            seconds += times * took
            flops += times * 2 * tokens * k * n
    return flops / seconds


def shuffled_rounds(names: Sequence[str], rounds: int, seed: int = 0) -> Iterator[list[str]]:
    """The names in another order every round: what runs after what must not favour any."""
    rng = random.Random(seed)
    for _ in range(rounds):
        yield rng.sample(list(names), len(names))


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios round by round: a machine that slows down slows both."""
    return median(value / other for value, other in zip(values, others, strict=True))


def spread(values: Sequence[float]) -> list[str]:
    """Median, lowest and highest, in whole numbers, for three columns of a table."""
    return [f"{value:,.0f}" for value in (median(values), min(values), max(values))]


def narrow_table(title: str, headings: Sequence[str]) -> Table:
    """A table that fits 80 columns: little padding, all but the first column to the right."""
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    return table


def optional(value: float | None, form: str) -> str:
    """The value in a format; a dash where there is none."""
    return "-" if value is None else format(value, form)


def limit_memory(cap: float | None, device: torch.device) -> None:
    """Have CUDA refuse more than `cap` GB (10^9 bytes) to this process.

    Raises:
        UserError: a cap without CUDA.
    """
    if cap is None:
        return
    if device.type != "cuda":
        raise UserError("--cap limits CUDA memory: leave it away on another device")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GB / total), device)


# ------------------------------------------------------------------------------- command line


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def more_than_zero(text: str) -> float:
    """A number above 0, for argparse."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return number


def file_to_write(text: str) -> Path:
    """The path that --json names, for argparse.

    Raises:
        UserError: it is a folder's, which should be told before the measuring and not after it.
    """
    path = Path(text)
    if path.is_dir():
        raise UserError(f"--json {path} is a folder: name a file")
    return path


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write all of it there")


def keep(arguments: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """With --json, write what was found there, beside the machine and the options.

    Raises:
        UserError: the file can't be written.
    """
    if arguments.json is None:
        return
    about = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "options": {name: value for name, value in vars(arguments).items() if value is not None},
    }
    write_report(arguments.json, {**about, **found})
    print(f"written to {arguments.json}")


def add_recipe_options(parser: argparse.ArgumentParser, recipe: str) -> None:
    parser.add_argument("--recipe", default=recipe, help=f"whose model; default {recipe}")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")


def add_batch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=positive, help="sequences a step")
    parser.add_argument("--length", type=positive, help="tokens a sequence")
    parser.add_argument("--layers", type=positive, help="fewer than the recipe's, for a small try")


def read_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe that --recipe, --set and, where there is one, --layers ask for."""
    layers = getattr(arguments, "layers", None)
    shrink = [f"model.num_hidden_layers={layers}"] if layers else []
    return load_recipe(arguments.recipe, [*arguments.overrides, *shrink])


def usual_precision(recipe: Recipe, device: torch.device) -> str:
    """fp32 on a CPU; on a GPU the recipe's, or the best that the GPU knows where it says auto."""
    if device.type != "cuda":
        return "fp32"
    if recipe.precision in PRECISIONS:
        return recipe.precision
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def batch_and_length(
    arguments: argparse.Namespace, recipe: Recipe, device: torch.device
) -> tuple[int, int]:
    """Sequences a step and tokens a sequence: as asked for, or what suits recipe and device.

    Raises:
        UserError: sequences longer than the model has positions.
    """
    batch, length = recipe.base.micro_batch, recipe.base.sequence_length
    if device.type == "cpu":
        batch, length = CPU_BATCHES.get(recipe.name, (batch, length))
    batch, length = arguments.batch or batch, arguments.length or length
    limit = recipe.model.max_position_embeddings
    if not 2 <= length <= limit:
        raise UserError(f"--length must be 2 to {limit}, the model's positions, got {length}")
    return batch, length
