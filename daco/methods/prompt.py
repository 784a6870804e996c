"""Steering by words: no activation is touched."""

from collections.abc import Mapping, Sequence
from typing import Any

SAFETY_PROMPT = (
    "You are a careful assistant. Refuse to help with anything harmful, illegal, hateful or deceptive, "
    "whether it is asked in text or shown in an image; say briefly why, and offer a safe alternative."
)


class SafetyPrompt:
    """Steering by words: a system message in front of a conversation.

    Args:
        text: What the system message says.

    Raises:
        ValueError: the text is empty.
    """

    def __init__(self, text: str = SAFETY_PROMPT) -> None:
        if not text.strip():
            raise ValueError("text: expected a safety prompt, got an empty one")
        self.text = text

    def __str__(self) -> str:
        return "safety prompt"

    def apply(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The conversation with the prompt as its system message, before an existing one's text.

        Args:
            messages: As chat templates take them: role, and content as text or as parts; not changed.
        """
        copied = [dict(message) for message in messages]
        if not copied or copied[0].get("role") != "system":
            return [{"role": "system", "content": [{"type": "text", "text": self.text}]}, *copied]
        content = copied[0]["content"]
        if isinstance(content, str):
            copied[0]["content"] = f"{self.text}\n\n{content}"
        else:
            copied[0]["content"] = [{"type": "text", "text": f"{self.text}\n\n"}, *content]
        return copied
