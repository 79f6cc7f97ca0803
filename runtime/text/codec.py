"""Between text and token ids, by an engine folder's tokenizer and chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engine_folder import TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from ...errors import EngineError, RequestError
from .checks import check_text

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, str]
_SHOWN = ("<think>", "</think>")  # special tokens that are part of an answer's text
_ROLES = ("system", "user", "assistant", "tool")

_SHOWN_BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # characters of their own
_BYTES = {chr(b): b for b in _SHOWN_BYTES} | {
    chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in _SHOWN_BYTES)
}


class TextCodec:
    """Tokenizer and chat template of one engine. Raises EngineError if a file is missing or broken."""

    def __init__(self, folder: Path) -> None:
        import tokenizers.decoders  # takes time to import, and the command line's help needs none

        path = folder / TOKENIZER_FILE
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise EngineError(f"{path}: not a tokenizer ({error}); build the engine again") from None
        self._byte_level = isinstance(self._tokenizer.decoder, tokenizers.decoders.ByteLevel)
        self.source = path.read_text(encoding="utf-8")  # tokenizer.json
        self._tokenizer.encode_special_tokens = True  # text is text: specials are added by id
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}
        longest_first = sorted(map(re.escape, self._special), key=len, reverse=True)
        self._any_special = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        self.end_think = self._special.get("</think>")
        self._hidden_ids = frozenset(i for token, i in self._special.items() if token not in _SHOWN)
        config = folder / TOKENIZER_CONFIG_FILE
        self._config: dict[str, Any] = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        self._template = self._load_template(folder)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, as a raw prompt; starts with the BOS only if the tokenizer says so."""
        bos = self._special.get(str(self._config.get("bos_token")))
        return ([bos] if self._config.get("add_bos_token") and bos is not None else []) + self.encode_plain(text)

    def encode_chat(self, messages: Sequence[Message], thinking: bool = False) -> list[int]:
        """Ids of a conversation that ends with the start of the assistant's turn.

        Args:
            messages: `{"role": ..., "content": ...}` in order.
            thinking: whether the template opens a think block.

        Raises:
            RequestError: a message is malformed, the template refuses it, or there is no template.
        """
        if self._template is None:
            raise RequestError("the engine has no chat template; use --raw (chat=False) for plain completion")
        for message in messages:
            content = message.get("content")
            if isinstance(content, str):
                check_text(content, "message")
            if message.get("role") not in _ROLES or not isinstance(content, str):
                raise RequestError(
                    f"message {dict(message)!r} is malformed; allowed: role ({', '.join(_ROLES)}) and content as text"
                )
        breaker = self._breaker("".join(m["content"] for m in messages))
        # An assistant's earlier turn keeps its think markers and nothing else: whoever sends it may have made it up.
        safe = [{**m, "content": self._defuse(m["content"], breaker, m["role"] == "assistant")} for m in messages]
        try:
            text = self._template.render(
                messages=safe,
                add_generation_prompt=True,
                enable_thinking=thinking,
                bos_token=self._config.get("bos_token", ""),
                eos_token=self._config.get("eos_token", ""),
            )
        except Exception as error:  # a template is a program: it can divide by zero
            raise RequestError(
                f"the chat template refuses the conversation ({error}); change the messages, or use --raw (chat=False)"
            ) from None
        return self._with_specials(text, breaker)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens other than the think markers left out."""
        return str(self._tokenizer.decode(self._visible(ids), skip_special_tokens=False))

    def piece(self, token: int) -> str:
        """One token as text, for displays."""
        return str(self._tokenizer.decode([token], skip_special_tokens=False))

    def pieces(self, ids: Iterable[int]) -> tuple[dict[int, str], dict[int, str], dict[int, str]]:
        """What each id stands for: text, or bytes (hexadecimal) that are no whole character, or a special token.

        Texts and bytes of an answer's ids in a row, special tokens left out, are what `decode` makes of them.
        """
        text, parts, special = dict[int, str](), dict[int, str](), dict[int, str]()
        for i in ids:
            if i in self._hidden_ids:
                special[i] = str(self._tokenizer.id_to_token(i))
                continue
            raw = self._bytes(i)
            try:
                text[i] = raw.decode("utf-8")
            except UnicodeDecodeError:
                parts[i] = raw.hex()
        return text, parts, special

    def _bytes(self, token: int) -> bytes:
        """A token's bytes; a byte-level vocabulary writes each byte as one character."""
        name = self._tokenizer.id_to_token(token)
        if name is None:  # the model has ids that its tokenizer lacks
            return b""
        if not self._byte_level:
            return self.piece(token).encode("utf-8")
        if all(c in _BYTES for c in name):
            return bytes(_BYTES[c] for c in name)
        return str(name).encode("utf-8")  # an added token, as it is

    def _visible(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i not in self._hidden_ids]

    def encode_plain(self, text: str) -> list[int]:
        """Ids of text and nothing else."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _breaker(self, content: str) -> str:
        """A character that the content does not hold, to break up the literal text of special tokens in it."""
        return next(c for c in map(chr, range(0xE000, 0xF900)) if c not in content)

    def _defuse(self, content: str, breaker: str, thinks: bool) -> str:
        def broken(special: re.Match[str]) -> str:
            text = special[0]
            return text if thinks and text in _SHOWN else text[0] + breaker + text[1:]

        return self._any_special.sub(broken, content)

    def _with_specials(self, text: str, breaker: str) -> list[int]:
        """Ids of rendered text: specials by id, and between them plain text with the breaker taken out."""
        ids: list[int] = []
        for i, part in enumerate(self._any_special.split(text)):  # odd parts are the specials
            ids += [self._special[part]] if i % 2 else self.encode_plain(part.replace(breaker, ""))
        return ids

    def _load_template(self, folder: Path) -> jinja2.Template | None:
        import jinja2.ext
        import jinja2.sandbox

        path = folder / TEMPLATE_FILE
        try:
            source = path.read_text(encoding="utf-8") if path.is_file() else self._config.get("chat_template")
        except UnicodeDecodeError as error:
            raise EngineError(f"{path}: not UTF-8 at byte {error.start}; build the engine again") from None
        if not isinstance(source, str):
            return None

        def refuse(message: str) -> str:
            raise jinja2.TemplateError(message)

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.globals["raise_exception"] = refuse
        try:
            return environment.from_string(source)
        except jinja2.TemplateError as error:
            raise EngineError(f"{path}: not a chat template ({error}); build the engine again") from None
