"""Tests of the kept references: the same numbers back, and never those of something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hamner.reference_cache import ReferenceCache, read_log_probabilities, weights_digest
from model import ModelConfig, Transformer

SHAPE = dict(
    vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
)  # fmt: skip
NUMBERS = torch.tensor([[-1.5, -2.25, -3e-7], [-40.125, -1e9, -0.1]])


def small_model(seed: int = 0, **changes: float) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(ModelConfig(**{**SHAPE, **changes}))  # type: ignore[arg-type]


def not_to_be_called() -> Tensor:
    raise AssertionError("computed again")


def filled(folder: Path) -> ReferenceCache:
    cache = ReferenceCache(folder, small_model(), "fp32 on cpu")
    assert cache.log_probabilities("abc", 3, lambda: NUMBERS) is NUMBERS
    return cache


def test_what_was_kept_comes_back_to_the_bit(tmp_path: Path) -> None:
    filled(tmp_path / "new" / "folder")
    again = ReferenceCache(tmp_path / "new" / "folder", small_model(), "fp32 on cpu")
    assert torch.equal(again.log_probabilities("abc", 3, not_to_be_called), NUMBERS)
    assert [path.suffix for path in (tmp_path / "new" / "folder").iterdir()] == [".pt"]


def test_each_thing_that_the_numbers_follow_from_has_a_file_of_its_own(tmp_path: Path) -> None:
    caches = {
        "weights": ReferenceCache(tmp_path, small_model(seed=1), "fp32 on cpu"),
        "shape": ReferenceCache(tmp_path, small_model(num_attention_heads=4), "fp32 on cpu"),
        "positions": ReferenceCache(tmp_path, small_model(rope_theta=5e5), "fp32 on cpu"),
        "precision": ReferenceCache(tmp_path, small_model(), "bf16 on cpu"),
        "device": ReferenceCache(tmp_path, small_model(), "fp32 on cuda"),
    }
    paths = {name: cache.path("abc") for name, cache in caches.items()}
    cache = ReferenceCache(tmp_path, small_model(), "fp32 on cpu")
    paths |= {"this": cache.path("abc"), "pairs": cache.path("abd")}
    assert len(set(paths.values())) == 7


def test_one_changed_weight_changes_the_fingerprint() -> None:
    model = small_model()
    before = weights_digest(model)
    assert before == weights_digest(small_model())
    for parameter in model.parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
            assert weights_digest(model) != before
            parameter.copy_(kept)
    assert weights_digest(model) == before


def test_the_template_is_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(tmp_path)
    before = cache.path("abc")
    monkeypatch.setattr("hamner.reference_cache.CHAT_TEMPLATE", "another")
    assert cache.path("abc") != before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def one_bit_off(path: Path) -> None:
    content = bytearray(path.read_bytes())
    at = content.index(NUMBERS.numpy().tobytes())
    content[at + 2] ^= 1
    path.write_bytes(bytes(content))


def of_other_pairs(path: Path) -> None:
    other = ReferenceCache(path.parent, small_model(), "fp32 on cpu")
    other.log_probabilities("others", 3, lambda: NUMBERS - 1)
    other.path("others").replace(path)


def fewer_pairs(path: Path) -> None:
    torch.save({"fingerprint": path.stem, "log_probabilities": NUMBERS[:, :2]}, path)


def something_else(path: Path) -> None:
    torch.save([1, 2], path)


def code(path: Path) -> None:
    kept = {"fingerprint": path.stem, "log_probabilities": NUMBERS, "beside": Path}
    torch.save(kept, path)


def text(path: Path) -> None:
    path.write_text("not a reference")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "spoil", [cut, one_bit_off, of_other_pairs, fewer_pairs, something_else, code, text, empty]
)
def test_a_file_that_is_spoilt_is_told_of_and_replaced(
    spoil: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = filled(tmp_path)
    path = cache.path("abc")
    spoil(path)
    assert torch.equal(cache.log_probabilities("abc", 3, lambda: NUMBERS * 2), NUMBERS * 2)
    told = capsys.readouterr().out
    assert told.startswith(f"{path} can't be used (") and told.count("\n") == 1
    assert told.endswith("): the reference is computed anew\n")
    found = read_log_probabilities(path, 3)
    assert found is not None and torch.equal(found, NUMBERS * 2)


def test_where_nothing_can_be_written_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = ReferenceCache(tmp_path / "file", small_model(), "fp32 on cpu")
    assert torch.equal(cache.log_probabilities("abc", 3, lambda: NUMBERS), NUMBERS)
    assert "is not kept for other runs" in capsys.readouterr().out
