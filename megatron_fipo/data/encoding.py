"""Prompts to token ids."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_fipo.config.base import ConfigError, require
from megatron_fipo.config.data import PromptFormat
from megatron_fipo.data.problem import Messages
from megatron_fipo.types import IntArray


class EncodingError(ValueError):
    """A prompt that cannot be turned into tokens."""


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Turns prompts into the tokens that an inference server would make of them.

    "chat" renders the conversation, a text being one user message, with the tokenizer's chat template up to where
    the assistant's turn begins. The template writes special tokens itself, so none are added. "raw" is what a
    completion endpoint does: the text as it is, with a beginning-of-sequence token where the tokenizer adds
    one (models trained with it answer badly without).

    Attributes:
        tokenizer: The model's tokenizer.
        config: The format and the system prompt.
        section: Where `config` lies in the whole configuration, such as data.
    """

    tokenizer: PreTrainedTokenizerBase
    config: PromptFormat
    section: str = "data"

    def __post_init__(self) -> None:
        """Try the format once, so that what is wrong for every prompt is told as such."""
        if self.config.prompt_format == "chat":
            self._try_chat()
        else:
            self._try_raw()

    def encode(self, prompt: str | Messages) -> tuple[str, IntArray]:
        """Turn one prompt into tokens.

        Returns:
            The text behind the tokens, and the token ids, [P] int32.

        Raises:
            EncodingError: The chat template refuses the conversation, a conversation is given with
                prompt_format raw, or the text is not valid Unicode.
        """
        if self.config.prompt_format == "raw":
            if not isinstance(prompt, str):
                raise EncodingError("a list of messages needs prompt_format chat")
            return prompt, self._ids(prompt, add_special_tokens=True)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        system = self.config.system_prompt
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        return self._encode_chat(messages)

    def _encode_chat(self, messages: Messages) -> tuple[str, IntArray]:
        # Templates raise errors of their own, and of jinja, for conversations they were not made for.
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:
            raise EncodingError(f"the chat template refuses it ({error})") from error
        return text, self._ids(text, add_special_tokens=False)

    def _ids(self, text: str, *, add_special_tokens: bool) -> IntArray:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise EncodingError(f"not valid Unicode at character {error.start}") from error
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids
        return np.array(ids, dtype=np.int32)

    def _try_chat(self) -> None:
        field = f"{self.section}.prompt_format"
        raw = f'set {field} to "raw" with a model that is not tuned for chat'
        require(
            self.tokenizer.chat_template is not None,
            field=field,
            value="chat",
            rule="needs a chat template, and the model's tokenizer has none",
            way_out=f"{raw}, or put a chat_template.jinja into the model folder",
        )
        user = {"role": "user", "content": "x"}
        try:
            self._encode_chat([user])
        except EncodingError as error:
            rule = f"needs a chat template that takes a user message ({error})"
            raise ConfigError(field, "chat", rule, raw) from error
        if self.config.system_prompt is None:
            return
        try:
            self._encode_chat([{"role": "system", "content": self.config.system_prompt}, user])
        except EncodingError as error:
            raise ConfigError(
                field=f"{self.section}.system_prompt",
                value=self.config.system_prompt,
                rule=f"needs a chat template that takes a system message ({error})",
                way_out="leave it out and put the text into the prompts",
            ) from error

    def _try_raw(self) -> None:
        with_special = self._ids("x", add_special_tokens=True)
        ends = len(with_special) > 0 and int(with_special[-1]) == self.tokenizer.eos_token_id
        require(
            not ends,
            field=f"{self.section}.prompt_format",
            value="raw",
            rule="needs a tokenizer that leaves the text open, and the model's adds its end-of-sequence token",
            way_out="set add_eos_token to false in the model folder's tokenizer_config.json",
        )
