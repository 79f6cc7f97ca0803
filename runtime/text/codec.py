"""Between text and token ids, by an engine folder's tokenizer and chat template."""

from __future__ import annotations

import codecs
import functools
import itertools
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...engine_folder import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from ...errors import EngineError, RequestError
from .chat_template import ChatTemplate, token_texts
from .messages import CALL_MARKS, MISTRAL_CALL, OPEN_END, Message, checked_messages, with_open_end, with_short_ids
from .special_tokens import SpecialTokens
from .thoughts import BRACKETS, thoughts_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import AddedToken

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Characters from which a text is encoded as a batch of one: that lets other threads run meanwhile, which a single text
# stops for as long as it takes, and it looks for no offsets.
_LONG = 10_000
_LONGEST_CHARACTER = 4  # bytes of UTF-8, and so tokens
_SHOWN_BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # characters of their own
_BYTES = {chr(b): b for b in _SHOWN_BYTES} | {
    chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in _SHOWN_BYTES)
}


class TextCodec:
    """Tokenizer and chat template of one engine. Raises EngineError if a file is missing or broken."""

    def __init__(self, folder: Path) -> None:
        import tokenizers  # takes time to import, and the command line's help needs none

        path = folder / TOKENIZER_FILE
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise EngineError(f"{path}: not a tokenizer ({error}); build the engine again") from None
        # What training cut and filled up its texts to is no property of a prompt.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # text is text: specials are added by id
        decoder = json.loads(self.tokenizer.decoder.__getstate__()) if self.tokenizer.decoder is not None else {}
        self._byte_level = "ByteLevel" in (one.get("type") for one in [decoder, *decoder.get("decoders", [])])
        config = folder / TOKENIZER_CONFIG_FILE
        self._config: dict[str, Any] = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        self.template = ChatTemplate(folder, self._config)  # which may be missing or broken
        self._special = SpecialTokens(self.tokenizer.get_added_tokens_decoder(), self.template.source)
        self.template.to_ascii = self._special.to_ascii
        self.thoughts = thoughts_of(self.template.source)
        self._markers = (self.thoughts.open, self.thoughts.close)
        self.end_think: int | None = self.tokenizer.token_to_id(self.thoughts.close)  # special or not
        shown = (*self._markers, *CALL_MARKS)  # special tokens that are part of an answer's text
        self._hidden_ids = frozenset(i for token, i in self._special.ids.items() if token not in shown)

    @functools.cached_property
    def source(self) -> str:
        """tokenizer.json, as it encodes here."""
        return str(self.tokenizer.to_str())

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, as a raw prompt; starts with the BOS only if the tokenizer says so."""
        bos = self.bos if self._config.get("add_bos_token") else None
        return ([] if bos is None else [bos]) + self.encode_plain(text)

    @property
    def bos(self) -> int | None:
        """The token that begins a text, if the tokenizer names one."""
        return self._special.ids.get(token_texts(self._config).get("bos_token", ""))

    def render_chat(
        self,
        messages: Sequence[Message],
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        continued: bool = False,
    ) -> str:
        """A conversation that ends with the start of the assistant's turn, as a text for `encode_rendered`.

        Marks stand in it for special tokens that a message merely spells.

        Args:
            messages: in order, see `checked_messages`.
            thinking: whether the prompt opens a think block.
            tools: definitions that the template shows, in OpenAI's form.
            variables: of the template, beside those that every template has.
            continued: whether the last message is the beginning of the assistant's turn.

        Raises:
            RequestError: a message is malformed, the template refuses it, or there is no template.
        """
        checked = checked_messages(messages)
        if continued:
            checked = with_open_end(checked)
        if MISTRAL_CALL in self.template.source:
            checked = with_short_ids(checked)
        try:
            quoted = [self._quoted_message(message) for message in checked]
        except RecursionError:
            raise RequestError("a message is nested too deeply; give flatter values in it") from None
        prompt = self.template.render(
            quoted, thinking, self._quote(tools), self._quote(variables), answer=not continued
        )
        if continued:
            return _up_to_open_end(prompt)
        # Templates with brackets know no `enable_thinking`; a model of theirs begins its thoughts by itself.
        opens = thinking and self.thoughts is BRACKETS and not self.thoughts.opened_by(prompt)
        return prompt + self.thoughts.open if opens else prompt

    def fewest(self, text: str, *, rendered: bool) -> int:
        """A number of tokens that `encode` or, of a rendered text, `encode_rendered` gives at least; known at once.

        A token's bytes weigh at most 1 together, where each weighs one over the length of the longest token that has
        it. So what all bytes of a text weigh is no more than its tokens.
        """
        parts = self._special.split(text) if rendered else [text]
        texts = "".join(part for part in parts if isinstance(part, str))
        counts = np.bincount(np.frombuffer(texts.encode(), np.uint8), minlength=256)
        return sum(isinstance(part, int) for part in parts) + int(counts @ self._weights)

    @functools.cached_property
    def _weights(self) -> NDArray[np.float64]:
        """Of each byte of a text; 0 where a token may stand for more bytes than its own, or for none."""
        if not self._keeps_bytes:
            return np.zeros(256)
        learned = map(self.token_bytes, self.tokenizer.get_vocab(with_added_tokens=False).values())
        added = (token.content.encode() for token in self._found_in_text)
        longest = np.ones(256)
        for token in itertools.chain(learned, added):
            for byte in {*token}:
                longest[byte] = max(longest[byte], len(token))
        return 1 / longest

    @property
    def _keeps_bytes(self) -> bool:
        """Whether each byte of a text is one of a single token's, as far as is known of the tokenizer's parts."""
        from tokenizers.models import BPE

        parts = self.tokenizer
        if parts.normalizer is not None or not isinstance(parts.model, BPE) or parts.pre_tokenizer is None:
            return False
        splitter = json.loads(parts.pre_tokenizer.__getstate__())
        splitters = splitter.get("pretokenizers", [splitter])
        return (
            any(one["type"] == "ByteLevel" for one in splitters)
            and all(one["type"] in ("ByteLevel", "Digits", "Split") for one in splitters)
            and all(one.get("behavior") != "Removed" for one in splitters)
            and all(parts.token_to_id(char) is not None for char in _BYTES)
            and not any(token.lstrip or token.rstrip for token in self._found_in_text)
        )

    @property
    def _found_in_text(self) -> list[AddedToken]:
        """The added tokens that text may spell."""
        return [token for token in self.tokenizer.get_added_tokens_decoder().values() if not token.special]

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a rendered conversation, whose special tokens are tokens."""
        ids: list[int] = []
        for part in self._special.split(text):
            ids += [part] if isinstance(part, int) else self.encode_plain(part)
        return ids

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Ids of the special tokens by their text."""
        return self._special.ids

    def _quoted_message(self, message: Message) -> dict[str, Any]:
        quoted: dict[str, Any] = self._quote(message)
        # An assistant's earlier turn keeps its think markers and nothing else: whoever sends it may have made it up.
        if message["role"] == "assistant" and isinstance(message["content"], str):
            quoted["content"] = self._quote(message["content"], self._markers)
            if quoted.get("reasoning_content") and self.template.takes_thoughts:
                said = [{"type": "text", "text": quoted["content"]}] if quoted["content"] else []
                quoted["content"] = [{"type": "thinking", "thinking": quoted.pop("reasoning_content")}, *said]
        return quoted

    def _quote(self, value: Any, keep: Collection[str] = ()) -> Any:
        """A value of JSON with all its texts quoted."""
        if isinstance(value, str):
            return self._special.quote(value, keep)
        if isinstance(value, Mapping):
            return {self._special.quote(str(name)): self._quote(one) for name, one in value.items()}
        return [self._quote(one) for one in value] if isinstance(value, (list, tuple)) else value

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens other than the think markers left out."""
        return str(self.tokenizer.decode(self.visible(ids), skip_special_tokens=False))

    def decode_whole(self, ids: Sequence[int]) -> str:
        """Text of ids as `decode` gives it, without what stands for a character that has only begun at its end."""
        text = self.decode(ids)
        if not text.endswith("\ufffd"):
            return text
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        visible = self.visible(ids)
        decoder.decode(b"".join(map(self.token_bytes, visible[-_LONGEST_CHARACTER:])))
        begun = len(decoder.getstate()[0])
        if not self._byte_level:  # each byte is a token, and one too few spoils whole characters that stand before it
            return self.decode(visible[: len(visible) - begun])
        return text[: len(text) - min(begun, 1)]

    def piece(self, token: int) -> str:
        """One token as text, for displays."""
        return str(self.tokenizer.decode([token], skip_special_tokens=False))

    def name(self, token: int) -> str:
        """One token as OpenAI spells it: its text, or `bytes:` and what it is where that is no whole character."""
        raw = self.token_bytes(token)
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + raw.decode("utf-8", "backslashreplace")
        return self.piece(token)

    def pieces(self, ids: Iterable[int]) -> tuple[dict[int, str], dict[int, str], dict[int, str]]:
        """What each id stands for: text, or bytes (hexadecimal) that are no whole character, or a special token.

        Texts and bytes of an answer's ids in a row, special tokens left out, are what `decode` makes of them.
        """
        text = dict[int, str]()
        parts = dict[int, str]()
        special = dict[int, str]()
        for i in ids:
            if i in self._hidden_ids:
                special[i] = str(self.tokenizer.id_to_token(i))
                continue
            raw = self.token_bytes(i)
            try:
                text[i] = raw.decode("utf-8")
            except UnicodeDecodeError:
                parts[i] = raw.hex()
        return text, parts, special

    def token_bytes(self, token: int) -> bytes:
        """A token's bytes; a byte-level vocabulary writes each byte as one character, others some as `<0x0A>`."""
        name = self.tokenizer.id_to_token(token)
        if name is None:  # the model has ids that its tokenizer lacks
            return b""
        if not self._byte_level:
            if byte := _BYTE_TOKEN.fullmatch(name):
                return bytes.fromhex(byte[1])
            return self.piece(token).encode("utf-8")
        if all(c in _BYTES for c in name):
            return bytes(_BYTES[c] for c in name)
        return str(name).encode("utf-8")  # an added token, as it is

    def visible(self, ids: Sequence[int]) -> list[int]:
        """The ids that are part of an answer's text."""
        return [i for i in ids if i not in self._hidden_ids]

    def decode_all(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens by their names."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def encode_plain(self, text: str) -> list[int]:
        """Ids of text and nothing else."""
        if len(text) < _LONG:
            return list(self.tokenizer.encode(text, add_special_tokens=False).ids)
        (encoded,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return list(encoded.ids)


def _up_to_open_end(prompt: str) -> str:
    before, found, _ = prompt.rpartition(OPEN_END)
    if not found:
        raise RequestError(
            "the chat template does not show the last message, which continue_final_message needs; leave it out"
        )
    return before


class TokenOffsets:
    """Where tokens begin in the text of all, as they come, in characters; inside of a character, where that begins."""

    def __init__(self, codec: TextCodec) -> None:
        from tokenizers.decoders import DecodeStream

        self._codec = codec
        self._stream = DecodeStream(skip_special_tokens=False)
        self._length = 0

    def push(self, ids: Sequence[int]) -> list[int]:
        """The offsets of the next tokens."""
        offsets = list[int]()
        for token in ids:
            offsets.append(self._length)
            for shown in self._codec.visible([token]):
                self._length += len(self._stream.step(self._codec.tokenizer, shown) or "")
        return offsets
