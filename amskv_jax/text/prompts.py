"""Prompts become tokens."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from amskv_jax.errors import AmskvError, AmskvWarning, UsageError

MAX_TOKENS = 512
"""Longest prompt, its end token included; the one Infinity was trained with."""

TOKENIZER_FILE = "tokenizer.json"
END = "</s>"
LAST_WORDS, LAST_CHARACTERS = 6, 60


class PromptCutWarning(AmskvWarning):
    """A prompt has more tokens than the model can take; what is behind them has no influence."""


class PromptTokenizer:
    """Tokens of prompts, by the tokenizer that belongs to a text encoder.

    Attributes:
      size: one more than the largest number of a token.
      end: the number of the token which stands at the end of every prompt.
    """

    def __init__(self, content: bytes, source: str = TOKENIZER_FILE) -> None:
        """Make a tokenizer of a ``tokenizer.json`` as the Hugging Face hub has it.

        Args:
          content: of the file.
          source: what to call it in messages.

        Raises:
          AmskvError: if it cannot be read, puts no ``</s>`` at the end of a prompt, or the library
            ``tokenizers`` is not installed.
        """
        try:
            from tokenizers import Tokenizer  # noqa: PLC0415
        except ImportError as error:
            raise AmskvError(
                "turning prompts into tokens needs the library tokenizers: "
                "pip install 'amskv-jax[text]', or give text features instead"
            ) from error
        try:
            self._tokenizer = Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises no narrower type
            raise AmskvError(f"the tokenizer {source} cannot be read: {error}") from error
        # A file may ask for either; lengths are ours to decide.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids: list[int] = self._tokenizer.encode("").ids
        if not ids or ids[-1] != self._tokenizer.token_to_id(END):
            raise AmskvError(
                f"the tokenizer {source} puts no {END} at the end of a prompt: not T5's"
            )
        self.end = ids[-1]
        self.size: int = max(self._tokenizer.get_vocab().values()) + 1

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "PromptTokenizer":
        """Read a file, or ``tokenizer.json`` in a folder.

        Raises:
          AmskvError: as the constructor does, or if there is no such file.
        """
        path = Path(path)
        path = path / TOKENIZER_FILE if path.is_dir() else path
        try:
            content = path.read_bytes()
        except OSError as error:
            raise AmskvError(f"the tokenizer {path} cannot be read: {error.strerror}") from error
        return cls(content, str(path))

    def __call__(self, prompts: Sequence[str], what: str = "prompt") -> list[list[int]]:
        """Return the tokens of every prompt, which messages call ``what``; the end token last.

        A prompt of more than ``MAX_TOKENS`` tokens is cut, with a ``PromptCutWarning``.

        Raises:
          UsageError: if there is no prompt, or one is empty or no text.
        """
        if not prompts:
            raise UsageError(f"there is no {what}: expected at least one")
        return [self._tokens(f"{what} {number}", prompt) for number, prompt in enumerate(prompts)]

    def _tokens(self, name: str, prompt: str) -> list[int]:
        if not isinstance(prompt, str):
            raise UsageError(f"{name} is of type {type(prompt).__name__}, expected a text (str)")
        if not prompt.strip():
            raise UsageError(f"{name} is empty: say what is to be drawn")
        try:
            encoding = self._tokenizer.encode(prompt)
        except Exception as error:  # half of a surrogate pair, as from undecodable bytes
            raise UsageError(f"{name} {prompt[:40]!a} is no valid Unicode text") from error
        ids: list[int] = encoding.ids
        if set(ids) == {self.end}:
            raise UsageError(f"{name} {prompt[:40]!a} has no token: say what to draw")
        if len(ids) <= MAX_TOKENS:
            return ids
        kept = MAX_TOKENS - 1
        last = _last_words(prompt[: encoding.offsets[kept - 1][1]])
        warnings.warn(
            PromptCutWarning(
                f'{name} ("{prompt[:40].strip()}...") has {len(ids)} tokens, at most '
                f'{MAX_TOKENS} are used: it is cut after "...{last}"'
            ),
            stacklevel=2,
        )
        return [*ids[:kept], self.end]


def _last_words(text: str) -> str:
    """Return the end of a text, from the beginning of a word if words are short."""
    words = text.split()[-LAST_WORDS:]
    return " ".join(words)[-LAST_CHARACTERS:]


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Return the prompts in a text file (UTF-8), one on each line; empty lines are left out.

    Raises:
      AmskvError: if the file cannot be read, or holds none.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise AmskvError(f"the prompts {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise AmskvError(f"the prompts {path} are not UTF-8 text: see line {line}") from error
    # Not splitlines, which would also part a prompt at rarer characters.
    prompts = [line.strip() for line in text.replace("\r\n", "\n").split("\n")]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise AmskvError(f"{path} holds no prompt: expected one on each line")
    return prompts
