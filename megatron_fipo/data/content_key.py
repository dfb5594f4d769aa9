"""What makes two prompts the same."""

import hashlib
import unicodedata

from megatron_fipo.data.problem import Messages, UnusableRow

KEY_BYTES = 16


def content_key(prompt: str | Messages) -> bytes:
    """A 128-bit digest of a prompt's roles and words.

    White space and the Unicode form of composed characters make no difference; a text is the same as a conversation of
    one user message.

    Raises:
        UnusableRow: The text is not valid Unicode.
    """
    if isinstance(prompt, str):
        text = _normalise(prompt)
    elif (alone := sole_text(prompt)) is not None:
        text = _normalise(alone)
    else:
        text = "\x1e".join(f"{turn['role']}\x1f{_normalise(turn['content'])}" for turn in prompt)
    try:
        return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).digest()
    except UnicodeEncodeError as error:
        raise UnusableRow("broken", f"not valid Unicode at character {error.start}") from None


def sole_text(messages: Messages) -> str | None:
    """The text of the user's message where it is the only one."""
    text: str | None = messages[0]["content"] if len(messages) == 1 and messages[0]["role"] == "user" else None
    return text


def _normalise(text: str) -> str:
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())
