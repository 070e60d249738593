"""Tokenizers are compared by bytes, differences that matter are refused, and forbidden ids get no probability."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fire_data.schemas.errors import TokenizerError
from fire_data.vocabulary import (
    Vocabulary,
    compare,
    fingerprint,
    mask_logits,
    require_compatible,
    require_known_ids,
    shared_vocabulary,
    token_bytes,
)

TEXT = ["the cat sat on the mat, naïve 日本 \n and the mat sat on the cat"] * 4


def byte_level(**roles: str) -> PreTrainedTokenizerFast:
    """GPT-2 style: byte-level BPE trained on a few words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=["<|end|>", "<|pad|>"], show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", **roles)


def words(*vocabulary: str, **roles: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **roles)


def metaspace(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    """Sentencepiece style: blanks as ▁, unknown characters as <0xNN> bytes."""
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_byte_level_ids_add_up_to_the_bytes_of_the_text() -> None:
    tokenizer = byte_level()
    table = token_bytes(tokenizer)
    text = "the naïve cat 日本\n"
    assert b"".join(table[i] for i in tokenizer(text)["input_ids"]) == text.encode()
    assert table[tokenizer.eos_token_id] == b"<|end|>"
    assert set(table) == set(tokenizer.get_vocab().values())


def test_metaspace_ids_add_up_to_the_bytes_of_the_text() -> None:
    pieces = ["▁", "c", "a", "t", *(f"<0x{b:02X}>" for b in range(256))]
    tokenizer = metaspace({piece: i for i, piece in enumerate(pieces)})
    table = token_bytes(tokenizer)
    assert b"".join(table[i] for i in tokenizer("a cat é")["input_ids"]) == b"a cat \xc3\xa9"


def test_wordpiece_tells_a_word_start_from_its_continuation() -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "ing": 3}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    table = token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert (table[1], table[2], table[3]) == (b" play", b"ing", b" ing")


def test_byte_level_and_metaspace_spellings_of_equal_bytes_agree() -> None:
    ours = byte_level()
    pieces = {i: b.decode() if b.isascii() and b.isalpha() else None for i, b in token_bytes(ours).items() if i > 1}
    kept = {piece: i for i, piece in pieces.items() if piece}
    spaced = {"▁" + b[1:].decode(): i for i, b in token_bytes(ours).items() if b[:1] == b" " and b[1:].isalpha()}
    comparison = compare(ours, metaspace({**kept, **spaced}))
    assert comparison.conflicts == ()
    assert comparison.shared == len(kept) + len(spaced) > 60
    assert any(piece.startswith("▁t") for piece in spaced)


def test_a_tokenizer_agrees_with_itself_whatever_the_padding_of_the_model() -> None:
    comparison = compare(byte_level(), byte_level())
    require_compatible(comparison, "score")
    assert comparison.warnings == []
    assert fingerprint(byte_level()) == fingerprint(byte_level())


def test_permuted_ids_are_refused_with_ids_and_bytes() -> None:
    comparison = compare(words("<unk>", "cat", "dog", "cow"), words("<unk>", "dog", "cat", "cow"))
    with pytest.raises(TokenizerError, match=r"2 ids stand.*1: b'cat' / b'dog', 2: b'dog' / b'cat'") as caught:
        require_compatible(comparison, "score, round 0")
    assert caught.value.exit_code == 3
    assert caught.value.where == "score, round 0"
    assert caught.value.fix


def test_equal_sizes_do_not_make_tokenizers_equal() -> None:
    ours, theirs = words("<unk>", "a", "b"), words("<unk>", "a", "c")
    assert len(ours) == len(theirs)
    with pytest.raises(TokenizerError, match="1 id stands"):
        require_compatible(compare(ours, theirs), "score")


def test_extra_specials_and_other_roles_are_warnings() -> None:
    ours = words("<unk>", "a", "<end>", eos_token="<end>", pad_token="<end>")
    theirs = words("<unk>", "a", "<end>", "<im_end>", eos_token="<im_end>", pad_token="<end>")
    comparison = compare(ours, theirs)
    require_compatible(comparison, "score")
    assert comparison.roles == {"eos": (2, 3)}
    assert comparison.only_teacher == (3,)
    assert comparison.only_student == ()
    text = "\n".join(comparison.warnings)
    assert "eos is id 2 for the student and id 3 for the teacher" in text
    assert len(comparison.warnings) == 2
    assert "last_token_advantage" in next(line for line in comparison.warnings if "eos" in line)
    assert "1 id only the teacher has (3)" in text


def test_fingerprint_sees_a_renamed_token_and_a_changed_role() -> None:
    prints = {
        fingerprint(words("<unk>", "a", "b")),
        fingerprint(words("<unk>", "a", "c")),
        fingerprint(words("<unk>", "a", "b", eos_token="b")),
    }
    assert len(prints) == 3


def test_shared_vocabulary_holds_ids_that_all_tokenizers_and_models_have() -> None:
    big, small = words("<unk>", "a", "b", "c"), words("<unk>", "a", "b")
    assert shared_vocabulary(big).allowed.tolist() == [True] * 4
    assert shared_vocabulary(big, small).allowed.tolist() == [True] * 3
    assert shared_vocabulary(big, rows=[8, 2]).allowed.tolist() == [True] * 2
    gap = words("<unk>", "a", "b", "c")
    gap_table = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "c": 3}, unk_token="<unk>"))
    with_gap = PreTrainedTokenizerFast(tokenizer_object=gap_table)
    assert shared_vocabulary(gap, with_gap).allowed.tolist() == [True, True, False, True]
    with pytest.raises(TokenizerError):
        shared_vocabulary(big, rows=[0])


def test_an_unknown_id_is_named_with_its_row() -> None:
    vocabulary = Vocabulary(4, np.array([True, True, False, True]))

    def column(*last: int) -> pa.ChunkedArray:
        return pa.chunked_array([[[0, 3], None, []], [list(last)]], pa.list_(pa.int32()))

    require_known_ids(column(1), vocabulary, "prompt_ids", "scores")
    for bad in (2, 4, -1):
        with pytest.raises(TokenizerError, match=rf"'prompt_ids' holds id {bad}\b") as caught:
            require_known_ids(column(1, bad), vocabulary, "prompt_ids", "scores")
        assert caught.value.where == "scores, row 3"


def test_masked_ids_have_no_probability_and_make_no_nan() -> None:
    vocabulary = Vocabulary(4, np.array([True, True, False, True]))
    logits = torch.tensor([[1.0, 2.0, 90.0, 3.0, 50.0]], requires_grad=True)
    masked = mask_logits(logits, vocabulary)
    probabilities = masked.softmax(1)
    assert torch.allclose(probabilities[0, [0, 1, 3]], torch.tensor([1.0, 2.0, 3.0]).softmax(0))
    assert probabilities[0, 2] == 0
    entropy = -(probabilities * masked.log_softmax(1)).sum()
    entropy.backward()
    assert torch.isfinite(entropy)
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 2] == logits.grad[0, 4] == 0


def test_masking_is_in_single_precision_or_better() -> None:
    full = Vocabulary(3, np.ones(3, dtype=bool))
    kinds = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    for given, expected in kinds.items():
        assert mask_logits(torch.zeros(1, 5, dtype=given), full).dtype == expected
    assert full.mask("cpu") is None


def test_a_model_with_too_few_rows_is_refused() -> None:
    with pytest.raises(TokenizerError, match="3 output rows"):
        mask_logits(torch.zeros(1, 3), Vocabulary(4, np.ones(4, dtype=bool)))
