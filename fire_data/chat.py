"""Turns messages or a plain prompt into the token ids a model sees, through its chat template or as raw text.

Why apart: student and teacher may have different templates, so the same messages can become two lists of ids, and a
base model has no template at all and must be asked for explicitly (`rollout.raw: true`). The template's text and its
arguments decide the prompt ids, so they have a fingerprint.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fire_data.schemas.config import ModelConfig
from fire_data.schemas.errors import ConfigError, DataError
from fire_data.schemas.manifest import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIX = "set rollout.raw: true to use the text as it is, or give the model a chat_template file in fire.yaml"


def render(
    tokenizer: PreTrainedTokenizerBase, cfg: ModelConfig, base: Path, messages: list[dict[str, Any]], raw: bool
) -> list[int]:
    """Prompt ids of a conversation, ending where the model's answer begins.

    With a template: the conversation with its generation prompt, special tokens only as the template writes them. Raw:
    the contents joined by line breaks and tokenized plainly; a beginning-of-sequence token is added if the tokenizer
    does so by default. `base` is the folder that `cfg.chat_template` is relative to.

    Raises:
        ConfigError: there is no chat template and `raw` is false, or the template file cannot be read.
        DataError: the template refuses the messages, or nothing is left of them.
    """
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
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        roles = ", ".join(str(m.get("role")) for m in messages)
        text = f"the chat template refuses the messages (roles: {roles}): {error}"
        raise DataError(text, where=cfg.model, fix="change the messages or give another chat_template") from None
    return _some(list(encoded["input_ids"]))


def render_prompt(tokenizer: PreTrainedTokenizerBase, cfg: ModelConfig, base: Path, text: str, raw: bool) -> list[int]:
    """Prompt ids of a plain `prompt`: one user message under a template, else the text itself. Raises as `render`."""
    return render(tokenizer, cfg, base, [{"role": "user", "content": text}], raw)


def chat_template(tokenizer: PreTrainedTokenizerBase, cfg: ModelConfig, base: Path) -> str:
    """The Jinja text of `cfg.chat_template`, else the tokenizer's own. Raises ConfigError if there is neither."""
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
