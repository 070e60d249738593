"""Turns messages or a plain prompt into the token ids a model sees, through its chat template or as raw text.

Why apart: student and teacher may have different templates, so the same messages can become two lists of ids, and a
base model has no template at all and must be asked for explicitly (`rollout.raw: true`). The template's text and its
arguments alone decide the prompt ids, so they have a fingerprint: a template that asks for today's date through
`strftime_now` is given `date_string` of `chat_template_kwargs` as it stands there, else the same date every day.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fire_data.schemas.config import ModelConfig
from fire_data.schemas.errors import ConfigError, DataError
from fire_data.schemas.manifest import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# 26 July 2024, midnight: the date that Llama's templates fall back to where there is no clock. Spelled out, because
# strftime speaks the language of the machine.
_DATE = {
    "%d": "26", "%-d": "26", "%e": "26", "%m": "07", "%-m": "7", "%Y": "2024", "%y": "24", "%j": "208",
    "%b": "Jul", "%h": "Jul", "%B": "July", "%a": "Fri", "%A": "Friday", "%F": "2024-07-26", "%D": "07/26/24",
    "%H": "00", "%I": "12", "%M": "00", "%S": "00", "%p": "AM", "%T": "00:00:00", "%R": "00:00", "%Z": "UTC",
    "%z": "+0000", "%x": "07/26/24", "%X": "00:00:00", "%c": "Fri Jul 26 00:00:00 2024", "%%": "%",
}  # fmt: skip
_FIX = "set rollout.raw: true to use the text as it is, or give the model a chat_template file in fire.yaml"
# A template is a program; besides errors of its own it can end in 1 / 0, a macro that calls itself or 'x' * 10**18.
_REFUSALS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError, MemoryError)


def render(
    tokenizer: PreTrainedTokenizerBase, cfg: ModelConfig, base: Path, messages: list[dict[str, Any]], raw: bool
) -> list[int]:
    """Prompt ids of a conversation, ending where the model's answer begins.

    With a template: the conversation with its generation prompt, special tokens only as the template writes them. Raw:
    the contents joined by line breaks and tokenized plainly; a beginning-of-sequence token is added if the tokenizer
    does so by default. `cfg.system` takes the place of system messages at the beginning. `base` is the folder that
    `cfg.chat_template` is relative to.

    Raises:
        ConfigError: there is no chat template and `raw` is false, or the template file cannot be read.
        DataError: the template refuses the messages, or nothing is left of them.
    """
    if cfg.system is not None:
        others = itertools.dropwhile(lambda m: m.get("role") == "system", messages)
        messages = [{"role": "system", "content": cfg.system}, *others]
    if raw:
        return _plain(tokenizer, "\n".join(_content(m) for m in messages))
    from jinja2 import TemplateError, TemplateSyntaxError

    template = chat_template(tokenizer, cfg, base)
    arguments = {"add_generation_prompt": True, **cfg.chat_template_kwargs}
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=True, return_dict=True, **arguments
        )
    except TemplateSyntaxError as error:
        fix = "correct the template (chat_template) or give another"
        raise ConfigError(f"the chat template is not valid Jinja: {error}", where=cfg.model, fix=fix) from None
    except (TemplateError, *_REFUSALS) as error:
        roles = ", ".join(str(m.get("role")) for m in messages)
        text = f"the chat template refuses the messages (roles: {roles}): {str(error) or type(error).__name__}"
        raise DataError(text, where=cfg.model, fix="change the messages or give another chat_template") from None
    return _some(list(encoded["input_ids"]))


def chat_template(tokenizer: PreTrainedTokenizerBase, cfg: ModelConfig, base: Path) -> str:
    """The Jinja text of `cfg.chat_template`, else the tokenizer's own; with a clock that stands if it asks for one.

    Raises:
        ConfigError: there is no template, or its file cannot be read.
    """
    text = _template_text(tokenizer, cfg, base)
    return _clock(cfg.chat_template_kwargs) + text if "strftime_now" in text else text


def _clock(arguments: dict[str, Any]) -> str:
    """A macro that hides transformers' function of this name. Jinja drops the line break after it."""
    if "date_string" in arguments:
        date = repr(str(arguments["date_string"]))
    else:
        date = "format" + "".join(f"|replace('{directive}', '{value}')" for directive, value in _DATE.items())
    return "{%- macro strftime_now(format) -%}{{ " + date + " }}{%- endmacro %}\n"


def _template_text(tokenizer: PreTrainedTokenizerBase, cfg: ModelConfig, base: Path) -> str:
    if cfg.chat_template:
        path = base / Path(cfg.chat_template).expanduser()
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the chat template cannot be read: {error}", where=str(path), fix=_FIX) from None
    if not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template", where=cfg.model, fix=_FIX)
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ConfigError(str(error), where=cfg.model, fix=_FIX) from None


def template_fingerprint(tokenizer: PreTrainedTokenizerBase, cfg: ModelConfig, base: Path, raw: bool) -> str:
    """sha256 (hex) of what turns messages into text; `raw` where nothing does. Raises ConfigError as `render`."""
    return "raw" if raw else digest([chat_template(tokenizer, cfg, base), cfg.chat_template_kwargs])


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return _some(list(tokenizer(text)["input_ids"]))


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise DataError(f"the content of a message is {type(content).__name__}, not text", fix="correct the prompt")
    return content


def _some(ids: list[int]) -> list[int]:
    if not ids:
        raise DataError("the prompt has no tokens", fix="remove the empty prompt")
    return ids
