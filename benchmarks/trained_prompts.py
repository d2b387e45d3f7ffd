"""How many of the questions that a model was fine-tuned on does it answer as it was taught?

    python benchmarks/trained_prompts.py --recipe tiny

Draws questions from the first turns of the prepared training file, answers them greedily with
chat.py's choice of checkpoint, and counts exact answers, and answers whose last number is right.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hamner import checkpoints
from hamner.conversation import best_checkpoint
from hamner.errors import UserError, run
from hamner.generation import Sampling, generate_text
from hamner.recipe import load_recipe
from hamner.sources import read_file

GREEDY = Sampling(temperature=0, top_k=0, top_p=1, repetition_penalty=1, max_new_tokens=80)
NUMBER = re.compile(r"-?\d+")


def trained_questions(path: Path) -> list[tuple[list[dict[str, str]], str]]:
    """Messages up to the first user turn, and the answer that training gave."""
    if not path.is_file():
        raise UserError(f"{path} doesn't exist: run prepare_sft_data.py first")
    found = []
    for _, row in read_file(path):
        messages = row["messages"]
        first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        found.append((messages[:first], messages[first]["content"]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--checkpoint", type=Path, help="default: the one that chat.py takes")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    path = arguments.checkpoint or best_checkpoint(arguments.recipe)
    checkpoint = checkpoints.load(path)
    model = checkpoints.load_model(checkpoint, path).eval()
    tokenizer = checkpoints.load_tokenizer(checkpoint)
    recipe = load_recipe(arguments.recipe)
    questions = trained_questions(Path(recipe.sft.data.folder) / "train.jsonl")
    random.Random(arguments.seed).shuffle(questions)
    exact = numbers = right_numbers = 0
    asked = questions[: arguments.count]
    for messages, wanted in asked:
        prompt, _ = tokenizer.chat(messages, answer_next=True)
        answer = "".join(generate_text(model, tokenizer, prompt, GREEDY)).strip()
        exact += answer == wanted
        if NUMBER.search(wanted):
            numbers += 1
            right_numbers += NUMBER.findall(answer)[-1:] == NUMBER.findall(wanted)[-1:]
    print(f"{path} (stage {checkpoint['stage']}, step {checkpoint['step']:,})")
    print(f"  answered word for word       {exact} of {len(asked)}")
    print(f"  last number of the answer    {right_numbers} of {numbers}")
    return 0


if __name__ == "__main__":
    run(main)
