"""Asks a language model over HTTP: any server of OpenAI's chat protocol, or a provider of Hugging Face.

Reads the token from the environment (`DACO_ENDPOINT_TOKEN`) or, for Hugging Face's providers alone, where
huggingface_hub keeps it; never prints or writes it. `sleep` waits.
"""

import os
import re
from email.utils import parsedate_to_datetime
from time import sleep, time
from urllib.parse import urlsplit

from huggingface_hub import InferenceClient, errors, get_token

from daco.errors import EndpointError, EndpointQuestionError

TOKEN = "DACO_ENDPOINT_TOKEN"
"""Environment variable of the token for `base_url`; Hugging Face's token is never sent to another host."""

ATTEMPTS = 6
"""How often one question is asked before giving up."""

LONGEST_WAIT = 60.0
"""Seconds waited at most before asking again, whatever a server wants."""

_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""Statuses after which asking again may help."""

_OF_THE_QUESTION = frozenset({400, 413, 422})
"""Statuses of a question that is too long, or that the server's own filter does not let through."""

_SECRET = re.compile(r"hf_[A-Za-z0-9]{8,}|sk-[\w-]{8,}|(?i:bearer\s+\S+)|(?<=://)[^/\s@]+@")


class Endpoint:
    """A language model behind an HTTP server.

    Args:
        model: Its id; may be empty where the server at `base_url` has one model only.
        base_url: Of a server of OpenAI's chat protocol, such as vLLM, llama.cpp or an Inference Endpoint;
            empty: a provider of Hugging Face.
        provider: Name of the provider, or `auto`.
        timeout: Seconds an answer may take.

    Raises:
        EndpointError: a provider of Hugging Face, and nobody is logged in.
    """

    def __init__(
        self, model: str, base_url: str = "", provider: str = "auto", timeout: float = 120.0
    ) -> None:
        self.model, self.name = model, model or str(urlsplit(base_url).hostname)
        self._token = (os.environ.get(TOKEN, "") if base_url else get_token()) or ""
        if not base_url and not self._token:
            raise EndpointError(
                f"{self.name}: expected a token of Hugging Face, got none; run `hf auth login`"
            )
        if base_url:  # without a token of its own the client would send that of Hugging Face
            self._client = InferenceClient(base_url=base_url, token=self._token or "none", timeout=timeout)
        else:
            self._client = InferenceClient(provider=provider, token=self._token, timeout=timeout)

    def ask(self, prompt: str, max_tokens: int) -> str:
        """The answer to one prompt, as text; what the server cannot answer now is asked again.

        Raises:
            EndpointQuestionError: the server refused this question, and may answer others.
            EndpointError: the server refused, or gave no answer within `ATTEMPTS`.
        """
        for attempt in range(ATTEMPTS):
            try:
                return self._answer(prompt, max_tokens)
            except (errors.HTTPError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
                trouble = error
                if not is_passing(error):
                    raise _refusal(error)(f"{self.name}: refused: {self._told(error)}") from None
            if attempt < ATTEMPTS - 1:
                sleep(wait_seconds(trouble, attempt))
        raise EndpointError(
            f"{self.name}: gave up after {ATTEMPTS} tries: {self._told(trouble)}; run it again to go on"
        )

    def _answer(self, prompt: str, max_tokens: int) -> str:
        answer = self._client.chat_completion(
            [{"role": "user", "content": prompt}],
            model=self.model or None,
            max_tokens=max_tokens,
            temperature=0.0,
            seed=0,
        )
        return answer.choices[0].message.content or ""

    def _told(self, error: BaseException) -> str:
        """An error in one line, without tokens."""
        text = " ".join(str(error).split())[:300]
        if self._token:
            text = text.replace(self._token, "***")
        response = getattr(error, "response", None)
        status = "" if response is None else f"HTTP {response.status_code}, "
        return f"{status}{type(error).__name__}: {_SECRET.sub('***', text)}"


def _refusal(error: BaseException) -> type[EndpointError]:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return EndpointQuestionError if status in _OF_THE_QUESTION else EndpointError


def is_passing(error: BaseException) -> bool:
    """Whether asking again may help: a busy server, a lost connection, an answer that is no chat answer."""
    if isinstance(error, errors.OfflineModeIsEnabled):
        return False
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in _PASSING
    return True


def wait_seconds(error: BaseException, attempt: int) -> float:
    """Seconds to wait after the failed `attempt` (from 0): what the server asked for, else 1, 2, 4 ..."""
    response = getattr(error, "response", None)
    asked = "" if response is None else response.headers.get("retry-after", "").strip()
    return min(max(_seconds(asked) if asked else float(2**attempt), 0.0), LONGEST_WAIT)


def _seconds(retry_after: str) -> float:
    """Of a Retry-After header, which counts seconds or names a time."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return parsedate_to_datetime(retry_after).timestamp() - time()
    except (TypeError, ValueError):
        return LONGEST_WAIT
