"""Addresses, keys and words of HTTP servers: which can be used, and what of them may be shown.

Whatever a server says is cut to a line that a terminal can show. Pure, but for the clock that a date in Retry-After is
compared with. Units: seconds.
"""

from __future__ import annotations

import email.utils
import ipaddress
import json
import re
import ssl
from datetime import UTC, datetime

import httpx
import pydantic_core

from fire_data.schemas.errors import ConfigError

_SHOWN = 300  # characters of a server's own words


def base_url(url: str, who: str) -> str:
    """`url` without a slash at its end. Raises ConfigError, which never repeats credentials, if it cannot be used."""
    fix = "url: http://host:8000/v1"
    if "@" in url:
        text = f"{who}: the url holds credentials, which would end up in logs and manifests"
        raise ConfigError(text, fix="take them out, export the key and name its variable: api_key_env")
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{who}: the url cannot be read: {error}", fix=fix) from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"{who}: {url!r} is not the address of a server", fix=fix)
    if parsed.query or parsed.fragment:
        raise ConfigError(f"{who}: the url has a query or fragment; a base address has none", fix=fix)
    return str(parsed).rstrip("/")


def authorization(key: str | None, who: str) -> dict[str, str]:
    if key is None:
        return {}
    if not re.fullmatch(r"[!-~]+", key):
        text = f"{who}: the key in the environment is empty or holds blanks or characters that no header may hold"
        raise ConfigError(text, fix="export it again, without quotes or line ends")
    return {"Authorization": f"Bearer {key}"}


def is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def is_certificate(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None


def retry_after_seconds(value: str | None) -> float | None:
    """Seconds from a Retry-After header, a number or an HTTP date; None where there is none that can be read."""
    if value is None:
        return None
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
        return float(value)
    try:
        then = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, ((then if then.tzinfo else then.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds())


def own_words(body: bytes) -> str:
    """What a server says in an error: the usual fields of JSON, else the text without tags, shortened."""
    text = body[: 1 << 16].decode("utf-8", "replace")
    try:
        found = pydantic_core.from_json(body)
    except ValueError:
        found = None
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and key in found:
            inner = found[key]
            found = inner.get("message", inner) if isinstance(inner, dict) else inner
            text = found if isinstance(found, str) else json.dumps(found, default=str)
            break
    text = " ".join(re.sub(r"<[^>]{0,200}>", " ", text).split())
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def printable(text: str, key: str | None) -> str:
    """Without the key, and without characters that could move a terminal's cursor."""
    if key:
        text = text.replace(key, "***")
    return "".join(c if c.isprintable() else " " for c in text)
