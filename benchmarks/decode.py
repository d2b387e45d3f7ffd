"""How fast an answer comes, token by token: ours beside Hugging Face's `generate` and llama.cpp.

    python benchmarks/decode.py                       # v4's shape, one answer at a time, on a CPU
    python benchmarks/decode.py --recipe tiny --device cpu

All answer the same prompt greedily with the same random weights, one answer at a time (batch 1).
"tokens/s" is the rate between the first new token and the last; "first token" is the time from the
prompt to the first, and beside it stands one forward pass over the same prompt. Rounds alternate in
a varying order in one process; a ratio is the median of the rounds' own. llama.cpp reads the same
weights from GGUF files, through llama-cpp-python, and is left out where that isn't installed.
Below the table stand a token's fp32 products alone, each at its fastest, which is what the memory
allows; and how long the first answer takes to begin, with the compilation and, if they are to be,
the rounding of the weights.

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from common import (
    add_json_option,
    add_recipe_options,
    hugging_face_llama,
    keep,
    median_ratio,
    narrow_table,
    optional,
    positive,
    read_recipe,
    seconds_of,
    shuffled_rounds,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hamner import few_rows, tokenization
from hamner.decode_step import WEIGHTS, compiled, speed_up
from hamner.errors import UserError, run
from hamner.export.gguf_file import write_gguf
from hamner.generation import Decoding, Sampling
from hamner.machine import pick_device
from hamner.recipe import Recipe
from hamner.tokenization import END_OF_TEXT
from model import Transformer

OURS, PEER = "ours", "hf generate"
Answer = Callable[[], Iterator[object]]  # something for every new token, as it comes


@dataclass
class Side:
    """One way to answer, and what was measured of it."""

    answer: Answer
    bytes_per_token: int  # of weights, which every token has to read
    rates: list[float] = field(default_factory=list)  # tokens/s between first and last, by round
    first: list[float] = field(default_factory=list)  # seconds until the first token

    def measure(self) -> None:
        begin = time.perf_counter()
        times = [time.perf_counter() for _ in self.answer()]
        self.first.append(times[0] - begin)
        self.rates.append((len(times) - 1) / (times[-1] - times[0]))


class Times:
    """A streamer for `generate`: what it was given, first the prompt and then each id, and when."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.said: list[Tensor] = []

    def put(self, ids: Tensor) -> None:
        self.times.append(time.perf_counter())
        self.said.append(ids)

    def end(self) -> None:
        """What `generate` calls at last."""


@dataclass
class PeerSide(Side):
    """`generate` returns when all is done: what it streams is timed."""

    def measure(self) -> None:
        begin = time.perf_counter()
        (times,) = self.answer()
        assert isinstance(times, Times)
        first, *rest = times.times[1:]  # the prompt comes before
        self.first.append(first - begin)
        self.rates.append(len(rest) / (rest[-1] - first))


def new_model(recipe: Recipe, device: torch.device) -> Transformer:
    torch.manual_seed(recipe.seed)
    return Transformer(recipe.model.config()).to(device).eval()


def sides(
    recipe: Recipe, device: torch.device, prompt: list[int], new: int, folder: Path
) -> dict[str, Side]:
    """Everything that is compared, by name."""
    greedy = Sampling(0.0, 0, 1.0, 1.0, max_new_tokens=new)
    size = 4 * recipe.model.config().matmul_parameters()
    plain = new_model(recipe, device)
    found = {"ours, torch's products": Side(lambda: Decoding(plain, [prompt], greedy), size)}
    if device.type == "cpu":
        fast = new_model(recipe, device)
        speed_up(fast)
        found[OURS] = Side(lambda: Decoding(fast, [prompt], greedy), size)
        for weights, part in (("fp16", 2), ("int8", 4)):
            rounded = new_model(recipe, device)
            speed_up(rounded, weights)
            answer = partial(Decoding, rounded, [prompt], greedy)
            found[f"{OURS}, {weights}"] = Side(answer, size // part)
    else:
        found[OURS] = found.pop("ours, torch's products")
    found[PEER] = PeerSide(hugging_face(plain, prompt, new), size)
    if importlib.util.find_spec("llama_cpp") and device.type == "cpu":
        for kind, share in (("f32", 1.0), ("q8_0", 1.0625 / 4)):  # 34 bytes for 32 numbers
            path = folder / f"{kind}.gguf"
            write_peer_file(path, plain, recipe, kind)
            found[f"llama.cpp {kind}"] = Side(llama_cpp(path, prompt, new), int(size * share))
    return found


def hugging_face(ours: Transformer, prompt: list[int], new: int) -> Answer:
    model = hugging_face_llama(ours, use_cache=True).eval()
    model.generation_config.eos_token_id = None  # it is to go on
    ids = torch.tensor([prompt], device=ours.lm_head.weight.device)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0}

    def answer() -> Iterator[object]:
        times = Times()
        model.generate(ids, attention_mask=torch.ones_like(ids), streamer=times, **settings)
        yield times

    return answer


def write_peer_file(path: Path, model: Transformer, recipe: Recipe, kind: str) -> None:
    tokenizer = tokenization.train(["it needs one, but nothing is tokenised"], 300)
    write_gguf(
        path, model, tokenizer, kind,
        name="decode", end=END_OF_TEXT, template="", sampling=recipe.sampling,
    )  # fmt: skip


def llama_cpp(path: Path, prompt: list[int], new: int) -> Answer:
    from llama_cpp import Llama

    threads, context = torch.get_num_threads(), len(prompt) + new
    model = Llama(
        str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def answer() -> Iterator[object]:
        model.reset()
        made = model.generate(prompt, temp=0.0, repeat_penalty=1.0, reset=True)
        yield from (token for token, _ in zip(made, range(new), strict=False))

    return answer


def measure(
    found: dict[str, Side], model: Transformer, prompt: list[int], rounds: int
) -> list[float]:
    """Measure all sides, round by round; returns the seconds of a forward pass in each round."""
    device = model.lm_head.weight.device
    ids = torch.tensor([prompt], device=device)
    passes = []
    with torch.no_grad():
        for number, names in enumerate(shuffled_rounds([*found, "pass"], rounds + 1)):
            for name in names:
                if name == "pass":
                    passes.append(seconds_of(lambda: model(ids, logits_to_keep=1), device))
                else:
                    found[name].measure()
            if number == 0:  # for caches to warm up
                passes.clear()
                for side in found.values():
                    side.rates.clear()
                    side.first.clear()
    return passes


def as_table(sides: dict[str, dict[str, Any]], title: str) -> Table:
    """The table of `figures`' sides, the fastest first."""
    headings = ("", "tokens/s", "lowest", "highest", "x HF", "x llama", "GB/s", "first", "x pass")
    table = narrow_table(title, headings)
    for name, side in sorted(sides.items(), key=lambda pair: -pair[1]["tokens_per_second"]):
        rate, rounds = side["tokens_per_second"], side["rounds"]
        table.add_row(
            name,
            *(f"{value:.1f}" for value in (rate, min(rounds), max(rounds))),
            f"{side['of_generate']:.2f}",
            optional(side["of_llama_cpp_f32"], ".2f"),
            f"{rate * side['bytes_per_token'] / 1e9:.0f}",
            f"{1000 * median(side['first_token_seconds']):.0f} ms",
            f"{side['first_token_of_a_pass']:.2f}",
        )
    return table


def figures(found: dict[str, Side], passes: list[float]) -> dict[str, Any]:
    """Speeds and ratios of every side, and its rounds: tokens/s, seconds until the first token."""
    llama = found.get("llama.cpp f32")
    sides = {
        name: {
            "tokens_per_second": median(side.rates),
            "of_generate": median_ratio(side.rates, found[PEER].rates),
            "of_llama_cpp_f32": median_ratio(side.rates, llama.rates) if llama else None,
            "first_token_of_a_pass": median_ratio(side.first, passes),
            "bytes_per_token": side.bytes_per_token,
            "rounds": side.rates,
            "first_token_seconds": side.first,
        }
        for name, side in found.items()
    }
    return {"sides": sides, "pass_seconds": passes}


def products_alone_seconds(recipe: Recipe, turns: int = 30) -> float:
    """Seconds of a token's products in fp32 with nothing between them, each at its fastest."""
    seconds, config = 0.0, recipe.model.config()
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    qkv = hidden + 2 * config.num_key_value_heads * config.head_dim
    of_layers = [(hidden, qkv), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)]
    sizes = [(*size, layers) for size in of_layers] + [(hidden, config.vocab_size, 1)]
    for size, out, times in sizes:
        weights = [torch.randn(out, size) for _ in range(times)]
        products = [partial(few_rows.product, weight=w) for w in weights]
        x = torch.randn(1, size)
        for product in products:  # each with weights of its own, as in a model: none is in a cache
            product(x)
        rounds = [[seconds_of(partial(f, x), x.device) for f in products] for _ in range(turns)]
        seconds += sum(min(each) for each in zip(*rounds, strict=True))
    return seconds


def first_answer_seconds(recipe: Recipe) -> dict[str, float]:
    """Seconds from a model in memory to the first single token, compiled anew, by weights."""
    result = {}
    for weights in WEIGHTS:
        compiled.cache_clear()
        model = new_model(recipe, torch.device("cpu"))
        begin = time.perf_counter()
        speed_up(model, weights)
        decoding = Decoding(model, [[0, 1]], Sampling(0.0, 0, 1.0, 1.0, max_new_tokens=2))
        for _ in decoding:  # the second token is the first that takes a single step
            pass
        result[weights] = time.perf_counter() - begin
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe_options(parser, "v4")
    add_json_option(parser)
    parser.add_argument("--prompt", type=positive, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=positive, default=64, help="tokens of the answer")
    parser.add_argument("--rounds", type=positive, default=5)
    arguments = parser.parse_args()
    recipe, device = read_recipe(arguments), pick_device(arguments.device)
    config, prompt_length, new = recipe.model.config(), arguments.prompt, arguments.new
    if prompt_length + new > config.max_position_embeddings or new < 3:
        raise UserError(
            f"--prompt {prompt_length} and --new {new}: together at most "
            f"{config.max_position_embeddings}, the context, and --new at least 3"
        )
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, config.vocab_size, (prompt_length,), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as folder:
        found = sides(recipe, device, prompt, new, Path(folder))
        passes = measure(found, new_model(recipe, device), prompt, arguments.rounds)
    threads = torch.get_num_threads()
    title = (
        f"{config.num_parameters():,} parameters, {device} ({threads} threads), torch "
        f"{torch.__version__}\n{new} tokens after {prompt_length}, {arguments.rounds} rounds"
    )
    result = figures(found, passes)
    Console(width=100).print(as_table(result["sides"], title))
    print(f"one forward pass over the prompt: {1000 * median(passes):.0f} ms")
    if device.type == "cpu":
        alone = products_alone_seconds(recipe)
        print(f"the products alone, fp32: {1000 * alone:.1f} ms, {1 / alone:.1f} tokens/s")
        ready = first_answer_seconds(recipe)
        told = ", ".join(f"{weights} {seconds:.1f} s" for weights, seconds in ready.items())
        print(f"from a loaded model to its first words: {told}")
        result |= {"products_alone_seconds": alone, "first_answer_seconds": ready}
    keep(arguments, result)
    return 0


if __name__ == "__main__":
    run(main)
