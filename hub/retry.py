"""Which troubles with a Hub pass, how long to wait for that, and how errors are told without secrets.

Reads and writes nothing; `sleep` waits.
"""

import json
import re
from collections.abc import Callable
from time import sleep
from typing import TypeVar

from huggingface_hub import errors
from huggingface_hub.utils import parse_ratelimit_headers

from daco.errors import DacoError, HubRefusedError, HubUnavailableError

T = TypeVar("T")

ATTEMPTS = 6
"""How often one piece of work is tried before giving up."""

LONGEST_WAIT = 300.0
"""Seconds waited at most, whatever a Hub asks for."""

CAUGHT = (errors.HTTPError, OSError, ValueError, RuntimeError, KeyError)
"""What huggingface_hub raises when a Hub fails, refuses, or answers without what it looks for there."""

_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}|(?i:bearer\s+\S+)")


def status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error of huggingface_hub, where there is one."""
    return error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None


def is_transient(error: BaseException | None) -> bool:
    """Whether trying again may help: 429, 5xx, a lost connection, HTML or other JSON than was due."""
    if error is None or isinstance(error, errors.OfflineModeIsEnabled):
        return False
    if (code := status(error)) is not None:
        return code == 429 or code >= 500
    if isinstance(error, errors.HTTPError | ConnectionError | TimeoutError | json.JSONDecodeError | KeyError):
        return True
    if isinstance(error, errors.FileMetadataError):  # an answer without the headers that are due
        return True
    # huggingface_hub wraps a failed upload in RuntimeError, a failed download in LocalEntryNotFoundError
    return is_transient(error.__cause__)


def wait_seconds(error: BaseException, attempt: int) -> float:
    """Seconds to wait after the failed `attempt` (from 0): what the Hub asked for, else 1, 2, 4 ..."""
    response = getattr(error, "response", None)
    headers = {} if response is None else response.headers
    limit = parse_ratelimit_headers(headers)
    if (after := headers.get("retry-after", "").strip()).isdecimal():
        asked = float(after)
    elif limit is not None and limit.remaining == 0:
        asked = float(limit.reset_in_seconds)
    else:
        asked = float(2**attempt)
    return min(asked, LONGEST_WAIT)


def redact(text: str, token: str | None = None) -> str:
    """`text` without tokens: the one in use, and whatever looks like one."""
    return _TOKEN.sub("***", text.replace(token, "***") if token else text)


def told(error: BaseException, token: str | None = None) -> str:
    """An error in one line, without tokens."""
    return redact(f"{type(error).__name__}: {' '.join(str(error).split())}", token)


def call(what: str, token: str | None, function: Callable[[], T]) -> T:
    """Call `function`, which only reads, until it works; `what` names it in errors.

    Raises:
        HubUnavailableError: it did not work within `ATTEMPTS`.
        HubRefusedError: the Hub said no.
    """
    for attempt in range(ATTEMPTS):
        try:
            return function()
        except DacoError:
            raise
        except CAUGHT as error:
            if not is_transient(error):
                raise HubRefusedError(f"{what}: {told(error, token)}") from None
            trouble = error
        if attempt < ATTEMPTS - 1:
            sleep(wait_seconds(trouble, attempt))
    raise HubUnavailableError(f"{what}: gave up after {ATTEMPTS} tries: {told(trouble, token)}; run it again")
