"""What the ids of a tokenizer mean as bytes, whether two tokenizers agree, and which ids both models may use.

Tokenizers are compared id by id through the bytes a token stands for, never through `vocab_size`: the output matrix
of a model is usually padded beyond its tokenizer, and two files may spell one token differently (`Ġthe`, `▁the`).
Sampling, scoring and training all mask logits with `mask_logits`, so that no token can have probability in one of
them and none in another. Units: ids are rows of the output matrix, logits are nats.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fire_data.schemas.errors import TokenizerError

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

ROLES = ("bos", "eos", "pad", "unk")
_SHOWN = 5  # differing ids named in a message
_OTHER_END = (
    ": training may teach the student not to stop; see last_token_advantage of `fire score`, and weigh.end_token: mask"
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The ids that may be sampled and that share the probability: `size` is 1 + the largest, `allowed` bool [size]."""

    size: int
    allowed: npt.NDArray[np.bool_]
    _masks: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def mask(self, device: torch.device | str) -> torch.Tensor | None:
        """Bool tensor [size], true where allowed, on `device`; None if every id below `size` is allowed."""
        if self.allowed.all():
            return None
        import torch

        key = str(device)
        if key not in self._masks:
            self._masks[key] = torch.from_numpy(self.allowed.copy()).to(device)
        return self._masks[key]


def mask_logits(logits_TV: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """Logits [..., model rows] to logits [..., vocabulary.size] in fp32 or better, forbidden ids practically excluded.

    Forbidden ids get a quarter of the lowest finite number rather than -inf: exp() of it is exactly 0, and p log p and
    the terms of a KL divergence stay 0 instead of becoming NaN. Differentiable. Does not change its argument.

    Raises:
        TokenizerError: the model has fewer output rows than the vocabulary has ids.
    """
    import torch

    require_rows(logits_TV.shape[-1], vocabulary)
    logits_TV = logits_TV[..., : vocabulary.size]
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    allowed_V = vocabulary.mask(logits_TV.device)
    if allowed_V is None:
        return logits_TV
    return logits_TV.masked_fill(~allowed_V, lowest(logits_TV.dtype))


def require_rows(rows: int, vocabulary: Vocabulary) -> None:
    """Raise TokenizerError if a model with so many output rows lacks ids of the vocabulary."""
    if rows < vocabulary.size:
        text = f"the model has {rows} output rows, the vocabulary ids up to {vocabulary.size - 1}"
        raise TokenizerError(text, fix="use the tokenizer that belongs to the model")


def lowest(dtype: torch.dtype) -> float:
    """The logit of a forbidden id: far below all others, and its differences are finite."""
    import torch

    return torch.finfo(dtype).min / 4


@dataclass(frozen=True)
class Comparison:
    """How two tokenizers differ. `conflicts`: id, student's bytes, teacher's bytes; `roles`: role -> both ids."""

    conflicts: tuple[tuple[int, bytes, bytes], ...]
    only_student: tuple[int, ...]
    only_teacher: tuple[int, ...]
    roles: Mapping[str, tuple[int | None, int | None]]
    shared: int

    @property
    def warnings(self) -> list[str]:
        """Differences that do not stop a run: special roles, and ids that only one of the two has."""
        lines = [
            f"{role} is id {_or_none(student)} for the student and id {_or_none(teacher)} for the teacher"
            + (_OTHER_END if role == "eos" else "")
            for role, (student, teacher) in self.roles.items()
        ]
        for who, other, ids in (
            ("student", "teacher", self.only_student),
            ("teacher", "student", self.only_teacher),
        ):
            if ids:
                lines.append(f"{_count(ids)} only the {who} has ({_some(ids)}): masked in both, the {other} lacks them")
        return lines

    def record(self) -> dict[str, Any]:
        """JSON-ready summary for a manifest."""
        return {
            "shared": self.shared,
            "conflicts": len(self.conflicts),
            "only_student": len(self.only_student),
            "only_teacher": len(self.only_teacher),
            "roles": {role: list(ids) for role, ids in self.roles.items()},
        }


def compare(student: Any, teacher: Any) -> Comparison:
    """Compare two tokenizers by the bytes of every id and by the ids of the special roles."""
    ours, theirs = token_bytes(student), token_bytes(teacher)
    shared = sorted(ours.keys() & theirs.keys())
    student_roles, teacher_roles = special_roles(student), special_roles(teacher)
    return Comparison(
        conflicts=tuple((i, ours[i], theirs[i]) for i in shared if ours[i] != theirs[i]),
        only_student=tuple(sorted(ours.keys() - theirs.keys())),
        only_teacher=tuple(sorted(theirs.keys() - ours.keys())),
        roles={r: (student_roles[r], teacher_roles[r]) for r in ROLES if student_roles[r] != teacher_roles[r]},
        shared=len(shared),
    )


def require_compatible(comparison: Comparison, where: str) -> None:
    """Raise TokenizerError if a shared id stands for different bytes, or nothing is shared."""
    fix = "use a teacher with the student's tokenizer, or a student with the teacher's"
    if comparison.conflicts:
        shown = ", ".join(f"{i}: {ours!r} / {theirs!r}" for i, ours, theirs in comparison.conflicts[:_SHOWN])
        more = ", ..." if len(comparison.conflicts) > _SHOWN else ""
        ids = "1 id stands" if len(comparison.conflicts) == 1 else f"{len(comparison.conflicts)} ids stand"
        text = f"{ids} for different bytes in the two tokenizers (id: student / teacher): {shown}{more}"
        raise TokenizerError(text, where=where, fix=fix)
    if not comparison.shared:
        raise TokenizerError("the two tokenizers share no id", where=where, fix=fix)


def shared_vocabulary(*tokenizers: Any, rows: Iterable[int] = ()) -> Vocabulary:
    """The ids that all tokenizers have and that are rows of every model.

    Args:
        tokenizers: one or more.
        rows: numbers of output rows of the models, where known: an id at or beyond one of them cannot be predicted.

    Raises:
        TokenizerError: no id is shared.
    """
    ids = set.intersection(*(set(token_bytes(t)) for t in tokenizers))
    limit = min(rows, default=None)
    if limit is not None:
        ids = {i for i in ids if i < limit}
    if not ids:
        raise TokenizerError("no id is known to all tokenizers and models")
    allowed = np.zeros(max(ids) + 1, dtype=np.bool_)
    allowed[sorted(ids)] = True
    return Vocabulary(len(allowed), allowed)


def fingerprint(tokenizer: Any) -> str:
    """sha256 (hex) over every id with its bytes and over the special roles: equal for equal behaviour on ids."""
    state = hashlib.sha256()
    for i, token in sorted(token_bytes(tokenizer).items()):
        state.update(f"{i} {len(token)} ".encode() + token)
    state.update(json.dumps(special_roles(tokenizer), sort_keys=True).encode())
    return state.hexdigest()


def require_known_ids(column: pa.ChunkedArray, vocabulary: Vocabulary, name: str, where: str) -> None:
    """Raise TokenizerError naming the first row and id of a list column that the vocabulary lacks. Null rows pass."""
    import pyarrow.compute as pc

    values = pc.list_flatten(column).to_numpy()
    known = (values >= 0) & (values < vocabulary.size)
    known[known] = vocabulary.allowed[values[known]]
    if known.all():
        return
    at = int(np.argmin(known))
    row = pc.list_parent_indices(column)[at].as_py()
    text = f"column {name!r} holds id {int(values[at])}, which student and teacher do not both have"
    fix = "use a teacher whose tokenizer has this id, or remove the prompts that contain it"
    raise TokenizerError(text, where=f"{where}, row {row}", fix=fix)


def special_roles(tokenizer: Any) -> dict[str, int | None]:
    """The ids of bos, eos, pad and unk; None where the tokenizer has none."""
    return {role: getattr(tokenizer, f"{role}_token_id", None) for role in ROLES}


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """The bytes that every id of a fast tokenizer stands for, added and special tokens included.

    Byte-level BPE is decoded through GPT-2's alphabet, sentencepiece style through its blank mark and `<0xNN>` tokens.
    A WordPiece that starts a word stands for a blank and its text, `##ing` for `ing` alone. Special and added tokens
    are their UTF-8 text.

    Raises:
        TokenizerError: there is no Rust backend, whose file says how tokens become text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        text = f"{type(tokenizer).__name__} is not a fast tokenizer, so its ids cannot be compared"
        raise TokenizerError(
            text, fix="load it with transformers' AutoTokenizer and save it: tokenizer.json must exist"
        )
    spec = json.loads(backend.to_str())
    vocab = spec["model"]["vocab"]
    pieces = vocab.items() if isinstance(vocab, dict) else ((piece, i) for i, (piece, _) in enumerate(vocab))
    to_bytes = _decoder(spec)
    table = {i: to_bytes(piece) for piece, i in pieces}
    for token in spec["added_tokens"]:
        if token["special"] or token["id"] not in table:
            table[token["id"]] = _utf8(token["content"])
    return table


def _decoder(spec: dict[str, Any]) -> Any:
    """The function from a piece of the vocabulary to bytes, chosen by what the tokenizer's file says."""
    model = spec["model"]
    steps = [*_steps(spec["decoder"]), *_steps(spec["pre_tokenizer"])]
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _byte_level
    mark = _blank_mark(steps)
    if mark is not None or model.get("byte_fallback"):
        return lambda piece: _sentencepiece(piece, mark)
    prefix = model.get("continuing_subword_prefix")
    if model["type"] == "WordPiece" and prefix:
        return lambda piece: _utf8(piece[len(prefix) :] if piece.startswith(prefix) else " " + piece)
    return _utf8


def _steps(node: Any) -> Iterator[dict[str, Any]]:
    """The elementary steps of a decoder, pre-tokenizer or normalizer, sequences unfolded."""
    if not node:
        return
    inner = node.get("decoders") or node.get("pretokenizers")
    if inner is None:
        yield node
    else:
        for step in inner:
            yield from _steps(step)


def _blank_mark(steps: list[dict[str, Any]]) -> str | None:
    for step in steps:
        if step["type"] == "Metaspace":
            return str(step["replacement"])
        if step["type"] == "Replace" and step.get("content") == " ":
            return str(step["pattern"].get("String", "▁"))
    return None


def _sentencepiece(piece: str, mark: str | None) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(piece)
    if byte:
        return bytes([int(byte[1], 16)])
    return _utf8(piece.replace(mark, " ") if mark else piece)


def _byte_level(piece: str) -> bytes:
    """Through GPT-2's alphabet; a piece with a character outside it is a special token in plain text."""
    try:
        return bytes([_BYTE_OF[c] for c in piece])
    except KeyError:
        return _utf8(piece)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: printable Latin-1 stands for itself, the rest follows from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _or_none(value: int | None) -> str:
    return "none" if value is None else str(value)


def _count(ids: tuple[int, ...]) -> str:
    return "1 id" if len(ids) == 1 else f"{len(ids)} ids"


def _some(ids: tuple[int, ...]) -> str:
    return ", ".join(map(str, ids[:_SHOWN])) + (", ..." if len(ids) > _SHOWN else "")
