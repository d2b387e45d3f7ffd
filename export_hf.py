"""Write a checkpoint as a folder that transformers loads, and as a file that llama.cpp runs.

python export_hf.py                      the best checkpoint there is -> exports/v4-dpo/
python export_hf.py --gguf q8_0          and a GGUF file in the same folder

The folder needs no code of ours: a Llama, its tokenizer, chat template, sampling and model card. It
is loaded again before it gets its name. Ids, logits and greedy answers must be the checkpoint's.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from hamner import checkpoints
from hamner.checkpoints import Checkpoint
from hamner.conversation import load_best
from hamner.errors import UserError, first_line, run
from hamner.export import export_check as check
from hamner.export import hf_folder
from hamner.export.export_check import Probe, Question
from hamner.export.gguf_file import TYPES, read_back, write_gguf
from hamner.export.model_card import Exported, model_card
from hamner.files import write_text_whole
from hamner.recipe import STAGES, Recipe, check_recipe
from hamner.tokenization import Message, Tokenizer
from model import Transformer

PROMPTS = 3  # of the recipe's, to answer and compare


@dataclass(frozen=True)
class Source:
    """What is exported: a checkpoint, opened."""

    path: Path
    stage: str
    step: int
    tokens: int
    recipe: Recipe
    model: Transformer  # fp32
    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        return f"{self.recipe.name}-{self.stage}"

    @property
    def stop(self) -> list[int]:
        return [self.tokenizer.im_end, self.tokenizer.end_of_text]


def open_source(path: Path, checkpoint: Checkpoint) -> Source:
    """Raises UserError if the checkpoint's stage, recipe or weights aren't what they should be."""
    stage = checkpoint["stage"]
    if stage not in STAGES:
        raise UserError(f"{path} is of stage {stage!r}: known are {', '.join(STAGES)}")
    return Source(
        path=path,
        stage=stage,
        step=checkpoint["step"],
        tokens=checkpoint["position"]["tokens"],
        recipe=check_recipe(checkpoint["recipe"], f"the recipe in {path}"),
        model=checkpoints.load_model(checkpoint, path).eval(),
        tokenizer=checkpoints.load_tokenizer(checkpoint),
    )


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder to fill, which gets the name `out` at the end, or disappears if that fails.

    Raises:
        UserError: there is something at `out`, or it can't be written.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out} is there already: move it away, or name another with --out")
        checkpoints.make_folder(out.parent)
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if out.exists():
            out.rmdir()
        temporary.rename(out)
        checkpoints.flush_folder(out.parent)
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        reason = (error.strerror or first_line(error)) + place
        raise UserError(f"can't write {out} ({reason}); nothing was left behind") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def questions_of(source: Source) -> dict[str, Question]:
    """The recipe's prompts for this stage: questions once it taught to talk, texts before that."""
    prompts = source.recipe.stage(source.stage).prompts[:PROMPTS] or ["Hello!"]
    if source.stage not in hf_folder.CHAT_STAGES:
        return {prompt: prompt for prompt in prompts}
    system = source.recipe.system_prompt
    begin: list[Message] = [{"role": "system", "content": system}] if system else []
    return {prompt: [*begin, {"role": "user", "content": prompt}] for prompt in prompts}


def export_folder(
    source: Source, folder: Path, dtype: torch.dtype, exact: list[Probe]
) -> tuple[list[Probe], str]:
    """Write what transformers loads, load it, and compare.

    Returns:
        The probes of the model as it was written, which are the `exact` ones in fp32, and a line
        that says what was compared.

    Raises:
        UserError: anything is not the same.
    """
    tokenizer, sampling = source.tokenizer, source.recipe.sampling
    hf_folder.write_folder(folder, source.model, tokenizer, source.stage, sampling, dtype)
    model, their_tokenizer = check.open_folder(folder)
    texts = check.check_text(tokenizer, their_tokenizer)
    probes, tolerance = exact, check.TRANSFORMERS_FP32
    if dtype != torch.float32:
        rounded = copy.deepcopy(source.model).to(dtype)
        probes = check.make_probes(rounded, tokenizer, questions_of(source))
        tolerance = check.tolerance_of(probes, source.model, times=2)
    worst = check.check_model(model, probes, tolerance)
    check.check_answers(model, probes, source.stop, tolerance)
    return probes, (
        f"transformers: the same ids of {texts} texts and conversations, logits within {worst:.1g} "
        f"(allowed: {tolerance.logits:.1g}), {len(check.answered(probes))} greedy answers the same"
    )


def export_gguf(source: Source, path: Path, type_name: str, exact: list[Probe]) -> str:
    """Write a GGUF file, read it, run it where llama.cpp is installed; a line on what was compared.

    Raises:
        UserError: anything is not the same, or llama.cpp has no such tokenizer.
    """
    template = hf_folder.chat_template(hf_folder.control_tokens(source.tokenizer), " ")
    write_gguf(
        path, source.model, source.tokenizer, type_name,
        name=source.name, end=hf_folder.end_token(source.stage), sampling=source.recipe.sampling,
        template=hf_folder.without_generation_marks(template),
    )  # fmt: skip
    rounded = read_back(path, source.model, type_name)
    if not check.has_llama_cpp():
        return f"{path.name}: weights read back; not run, llama-cpp-python isn't installed"
    tolerance = check.LLAMA_CPP_FP32
    if type_name != "f32":  # there what the weights are multiplied with is rounded as well
        tolerance = check.tolerance_of(exact, rounded, times=4)
    context, count = source.model.config.max_position_embeddings, len(check.answered(exact))
    with contextlib.closing(check.open_gguf(path, context)) as llama:
        worst = check.check_llama_cpp(llama, source.tokenizer, exact, tolerance)
        same = check.same_answers(llama, source.tokenizer, exact, source.stop)
    if same < count and not tolerance.tie:
        raise UserError(f"llama.cpp answers {count - same} of {count} prompts differently")
    return (
        f"{path.name}: weights read back; llama.cpp: the same ids, logits within {worst:.1g} "
        f"(allowed: {tolerance.logits:.1g}), {same} of {count} greedy answers the same"
    )


def export(source: Source, out: Path, dtype: torch.dtype, gguf_type: str | None) -> list[str]:
    """Write a whole folder; lines that say how it was checked.

    Raises:
        UserError: it can't be written, or isn't the same as the checkpoint. Nothing is left.
    """
    with whole_folder(out) as folder:
        exact = check.make_probes(source.model, source.tokenizer, questions_of(source))
        probes, line = export_folder(source, folder, dtype, exact)
        lines, gguf = [line], None
        if gguf_type is not None:
            gguf = f"{source.name}-{gguf_type}.gguf"
            lines.append(export_gguf(source, folder / gguf, gguf_type, exact))
        answers = {
            probe.prompt: source.tokenizer.decode(probe.answer(source.stop))
            for probe in check.answered(probes)
        }
        card = model_card(
            Exported(
                recipe=source.recipe, stage=source.stage, step=source.step, tokens=source.tokens,
                shape=source.model.config, dtype=hf_folder.dtype_name(dtype), answers=answers,
                gguf=gguf,
            )
        )  # fmt: skip
        write_text_whole(folder / "README.md", [card])
    return lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="v4", help="name in recipes/, or path (default: v4)")
    parser.add_argument("--checkpoint", type=Path, help="export this checkpoint")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: exports/<recipe>-<stage>"
    )
    parser.add_argument(
        "--dtype", choices=hf_folder.DTYPES, default="float32", help="default: float32"
    )
    parser.add_argument(
        "--gguf", nargs="?", const="f16", choices=TYPES, help="for llama.cpp too (f16 if not said)"
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    source = open_source(*load_best(arguments.recipe, arguments.checkpoint))
    out = arguments.out or Path("exports", source.name)
    lines = export(source, out, hf_folder.DTYPES[arguments.dtype], arguments.gguf)
    size = source.model.config.num_parameters()
    print(f"{source.path} (stage {source.stage}, step {source.step:,}), {size:,} parameters")
    print("\n".join(lines))
    print(f"written to {out}/")
    return 0


if __name__ == "__main__":
    run(main)
