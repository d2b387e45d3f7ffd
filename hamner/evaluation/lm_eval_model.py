"""Our model as lm-evaluation-harness asks for one.

Contexts and continuations are cut into tokens by the harness's own base class, too long ones are
cut off on the left, and an empty context becomes `<|endoftext|>`, all as in its HFLM: a checkpoint
and its export to Hugging Face get the same scores.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hamner.errors import UserError
from hamner.evaluation.scoring import Window, bar, score
from hamner.generation import Sampling, generate_ids
from hamner.tokenization import CHAT_TEMPLATE, Tokenizer
from model import Transformer

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # strings, context, continuation
TOP_K = 50  # what `transformers` samples from where a task doesn't say


class HamnerLM(TemplateLM):
    """A model and its tokenizer; `progress` is a terminal to draw bars on."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        batch_size: int,
        progress: TextIO | None = None,
    ):
        super().__init__()
        self._model, self._tokenizer = model, tokenizer
        self._batch_size, self._progress = batch_size, progress
        self._device = model.lm_head.weight.device
        # The harness passes chats on as text. What stands for control tokens in it can't be
        # guessed, so that the text of a task never becomes one.
        secret = secrets.token_hex(16)
        self._start, self._end = f"<{secret}:start>", f"<{secret}:end>"
        self._controls = {self._start: tokenizer.im_start, self._end: tokenizer.im_end}
        self._control = re.compile(f"({self._start}|{self._end})")

    @property
    def max_length(self) -> int:
        return self._model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end_of_text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        ids: list[int] = []
        for part in self._control.split(string):
            control = self._controls.get(part)
            ids += self._tokenizer.encode(part) if control is None else [control]
        return ids

    # --------------------------------------------------------------------------- likelihoods

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[Request], **options: Any
    ) -> list[tuple[float, bool]]:
        """log p of each continuation after its context, and whether it is the likeliest.

        Raises:
            UserError: a continuation that is longer than the model's context.
        """
        asked = [self._window(context, continuation) for _, context, continuation in requests]
        scores = score(self._model, asked, self._batch_size, self._progress, "likelihoods")
        return [(each.total(), bool(each.likeliest.all())) for each in scores]

    def _window(self, context: list[int], continuation: list[int]) -> Window:
        if len(continuation) > self.max_length:
            raise UserError(
                f"an answer of {len(continuation):,} tokens doesn't fit into the model's context "
                f"of {self.max_length:,}: leave its task out"
            )
        ids = (context + continuation)[-(self.max_length + 1) :]
        return Window(ids, len(continuation))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """log p of each text, in windows that the harness lays."""
        owners: list[int] = []
        parts: list[Request] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            own = [(None, *make_disjoint_window(pair)) for pair in rolling]
            owners += [number] * len(own)
            parts += own
        totals = [0.0] * len(requests)
        for owner, (log_p, _) in zip(owners, self._loglikelihood_tokens(parts), strict=True):
            totals[owner] += log_p
        return totals

    # --------------------------------------------------------------------------- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        answers = []
        with bar(len(requests), "answers", self._progress) as shown:
            for number, request in enumerate(requests):
                answers.append(self._answer(number, *request.args))
                shown.update()
        return answers

    def _answer(self, number: int, context: str, settings: Mapping[str, Any]) -> str:
        """The continuation of a context, up to the first of the strings that end it.

        Raises:
            UserError: the task asks for a way of sampling that we haven't got.
        """
        wanted: dict[str, Any] = {**normalize_gen_kwargs(dict(settings), DEFAULT_MAX_GEN_TOKS)}
        until, count = wanted.pop("until"), wanted.pop("max_gen_toks")
        if count >= self.max_length:  # the harness's own models refuse
            count = self.max_length // 2
        prompt = self.tok_encode(context)[-(self.max_length - count) :] or [self.prefix_token_id]
        how, ids, text = sampling(wanted, count, seed=number), [], ""
        ends = (self._tokenizer.im_end, self._tokenizer.end_of_text)
        for id_ in generate_ids(self._model, prompt, how, ends):
            ids.append(id_)
            text = self._tokenizer.decode(ids)
            if any(stop in text for stop in until if stop):
                break
        return postprocess_generated_text(text, until, None)

    # --------------------------------------------------------------------------- chat

    @property
    def tokenizer_name(self) -> str:
        return "hamner"

    def chat_template(self, chat_template: bool | str = False) -> str:
        return CHAT_TEMPLATE

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as text for `tok_encode`; its last message stays open if it is to be continued."""
        text = "".join(
            f"{self._start}{turn['role']}\n{turn['content'].strip()}{self._end}\n"
            for turn in chat_history
        )
        if add_generation_prompt:
            return f"{text}{self._start}assistant\n"
        return text.removesuffix(f"{self._end}\n")


def sampling(settings: Mapping[str, Any], count: int, seed: int) -> Sampling:
    """The harness's settings of a generation as ours."""
    known = {"do_sample", "temperature", "top_k", "top_p"}
    if unknown := sorted(set(settings) - known):
        raise UserError(
            f"a task asks for generation with {', '.join(unknown)}, which is not supported here: "
            f"leave it out, or set no more than {', '.join(sorted(known))} in its YAML file"
        )
    return Sampling(
        temperature=float(settings.get("temperature", 1.0)) if settings["do_sample"] else 0.0,
        top_k=int(settings.get("top_k", TOP_K)),
        top_p=float(settings.get("top_p", 1.0)),
        repetition_penalty=1.0,
        max_new_tokens=count,
        seed=seed,
    )
