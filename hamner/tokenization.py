"""The tokenizer, the chat template and its loss mask.

Text that people or files bring is encoded with special tokens switched off: it can spell
`<|im_end|>`, but never become that token. Only `chat` below places control tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream

from hamner.errors import UserError, first_line
from model import IGNORE_INDEX

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# The special tokens of HuggingFaceTB/cosmo2-tokenizer, ids 0 to 16, in its order.
SPECIAL_TOKENS = (
    END_OF_TEXT, IM_START, IM_END, "<repo_name>", "<reponame>", "<file_sep>", "<filename>",
    "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>",
    "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>",
)  # fmt: skip
ROLES = ("system", "user", "assistant")

# The same template for `transformers`; `generation` marks what an answer consists of.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Message = Mapping[str, Any]


class Tokenizer:
    """Text to ids and back, plus ChatML with real special tokens."""

    def __init__(self, backend: HFTokenizer):
        backend.encode_special_tokens = True  # text never turns into control tokens
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.end_of_text = self._special(END_OF_TEXT)
        self.im_start = self._special(IM_START)
        self.im_end = self._special(IM_END)
        self.vocab_size: int = backend.get_vocab_size()
        self.control_ids = frozenset(
            id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self._headers = {role: self.encode(f"{role}\n") for role in ROLES}
        self._newline = self.encode("\n")

    def _special(self, token: str) -> int:
        id_ = self._backend.token_to_id(token)
        if id_ is None:
            raise UserError(f"the tokenizer has no {token} token; ChatML needs it")
        return id_

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(whole_characters(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Many texts at once, on all cores."""
        encodings = self._backend.encode_batch_fast(
            [whole_characters(text) for text in texts], add_special_tokens=False
        )
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text without control tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def decode_stream(self) -> TextStream:
        return TextStream(self._backend)

    def chat(
        self, messages: Sequence[Message], *, answer_next: bool = False
    ) -> tuple[list[int], list[int]]:
        r"""Conversation -> (input_ids, labels), as `<|im_start|>role\ncontent<|im_end|>\n` a turn.

        Labels are the ids of the assistant's words and of the `<|im_end|>` after them, of every
        assistant turn; -100 elsewhere. Contents are stripped of surrounding white space.
        `answer_next` adds the header after which the assistant speaks.

        Raises:
            UserError: a message without a known role or without text.
        """
        ids: list[int] = []
        labels: list[int] = []
        for message in messages:
            role, content = check_message(message)
            header = [self.im_start, *self._headers[role]]
            body = [*self.encode(content.strip()), self.im_end]
            ids += header + body + self._newline
            wanted = body if role == "assistant" else [IGNORE_INDEX] * len(body)
            labels += [IGNORE_INDEX] * len(header) + wanted + [IGNORE_INDEX] * len(self._newline)
        if answer_next:
            header = [self.im_start, *self._headers["assistant"]]
            ids, labels = ids + header, labels + [IGNORE_INDEX] * len(header)
        return ids, labels

    def document(self, document: str | Sequence[Message]) -> list[int]:
        """A document for pretraining, text or conversation, ended by `<|endoftext|>`."""
        return self.documents([document])[0]

    def documents(self, documents: Sequence[str | Sequence[Message]]) -> list[list[int]]:
        texts = iter(self.encode_batch([doc for doc in documents if isinstance(doc, str)]))
        return [
            [*(next(texts) if isinstance(doc, str) else self.chat(doc)[0]), self.end_of_text]
            for doc in documents
        ]

    def to_json(self) -> str:
        """The whole tokenizer as the text of a tokenizer.json."""
        return self._backend.to_str()


def whole_characters(text: str) -> str:
    r"""Text whose lone surrogates (JSON may hold "\ud83d") have become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class TextStream:
    """Ids in, text out, never a broken UTF-8 character."""

    def __init__(self, backend: HFTokenizer):
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, id_: int) -> str:
        """The text that this id completes; empty while a character is still in pieces."""
        return self._stream.step(self._backend, id_) or ""


def check_message(message: Message) -> tuple[str, str]:
    """Role and content of a message, or a UserError that says what is wrong with it."""
    if not isinstance(message, Mapping):
        raise UserError(f"a message must have a role and a content, got {message!r:.60}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(f"a message's role must be one of {', '.join(ROLES)}, got {role!r}")
    if not isinstance(content, str):
        raise UserError(f"a message's content must be text, got {type(content).__name__}")
    return role, content


def from_json(text: str) -> Tokenizer:
    """The tokenizer that `to_json` wrote.

    Raises:
        UserError: not a tokenizer.json, or one without ChatML's tokens.
    """
    try:
        return Tokenizer(HFTokenizer.from_str(text))
    except UserError:
        raise
    except Exception as error:  # the backend raises bare Exceptions
        raise UserError(f"not a usable tokenizer.json: {error}") from None


def from_path(path: Path) -> Tokenizer:
    """Read a tokenizer.json, or the one in a folder."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no tokenizer at {path}: expected a tokenizer.json or a folder with one")
    return from_json(file.read_text(encoding="utf-8"))


def from_hub(name: str) -> Tokenizer:
    """A tokenizer.json of the Hugging Face hub: the copy fetched before, or else a new one."""
    import httpx
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from hamner.hub import prepare_client

    prepare_client()
    try:
        try:
            path = hf_hub_download(name, "tokenizer.json", local_files_only=True)
        except LocalEntryNotFoundError:
            path = hf_hub_download(name, "tokenizer.json")
        return from_path(Path(path))
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        raise UserError(
            f"tokenizer {name!r} can't be fetched from the hub ({first_line(error)}): check its "
            "name and the network, or point to a copy with --set tokenizer='{path: FOLDER}'"
        ) from None


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with cosmo2's special tokens and every digit on its own.

    Raises:
        UserError: vocab_size too small for the special tokens and the 256 bytes.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise UserError(f"tokenizer.train.vocab_size must be at least {smallest}, got {vocab_size}")
    backend = HFTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)
