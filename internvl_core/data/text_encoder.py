"""Texts to token ids with the `tokenizers` library alone, so that processes start without transformers.

Invariant: equal digests give equal ids, for every text. The digest survives saving and loading the tokenizer, and
saving a model in either format: the native one adds `<video>`, which is plain text here, as it is to the tokenizers
that models are assembled with.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tokenizers import Encoding, Tokenizer

from internvl_core.data.records import VIDEO_TAG
from internvl_core.data.templates import (
    CHAT_TOKENS,
    GROUNDING_TAGS,
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    SPECIAL_TOKENS,
)
from internvl_core.data.tokenizer_folder import load_tokenizer
from internvl_core.errors import ArgumentError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The library's results are large: more at once leave the processor's cache (measured: 1.5 times the time for 40,000).
_BATCH_TEXTS = 256
_ADDED_TOKENS_KEY = '"added_tokens":'


class TextEncoder:
    """A fast tokenizer without the settings of its last call; small to send to another process."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Copy a tokenizer of the `tokenizers` library; what the original does later does not touch the copy."""
        self._tokenizer = Tokenizer.from_str(_write_without_video(tokenizer))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._added = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}
        self._control_pattern = _compile_alternatives(self._iter_control_tokens())
        # Some tokens are looked for in the text as the normalizer leaves it, where full-width letters are plain ones.
        self._is_text_normalized = any(
            self._added[token].normalized for token in self._iter_control_tokens() if token in self._added
        )
        self._fixed: dict[str, tuple[int, ...]] = {}
        self.bos_token_id = self._find_bos_token_id()

    @staticmethod
    def from_tokenizer(tokenizer: "PreTrainedTokenizerBase | TextEncoder") -> "TextEncoder":
        """Take the fast tokenizer out of transformers' object; once, until that object is given new tokens.

        Raises:
            ArgumentError: it has none, because it is written in Python.
        """
        if isinstance(tokenizer, TextEncoder):
            return tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ArgumentError(
                f"tokenizer: {type(tokenizer).__name__} is none of the fast ones. Convert it to a tokenizer.json."
            )
        state = (len(tokenizer), getattr(tokenizer, "add_bos_token", None))
        cached = _ENCODERS.get(tokenizer)
        if cached is None or cached[0] != state:
            cached = _ENCODERS[tokenizer] = (state, TextEncoder(backend))
        return cached[1]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text by itself, without tokens that the text does not spell."""
        return [encoding.ids for encoding in self._iter_encodings(texts)]

    def encode_fixed(self, text: str) -> tuple[int, ...]:
        """Encode a text that comes again and again, such as a header; the ids are kept."""
        if text not in self._fixed:
            self._fixed[text] = tuple(self.encode([text])[0])
        return self._fixed[text]

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Encode a text; also where in the text each token begins, in characters."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Count what `encode` would give. Texts that repeat, as prompts do, cost once."""
        distinct = list(dict.fromkeys(texts))
        counts = dict(zip(distinct, map(len, self._iter_encodings(distinct)), strict=True))
        return [counts[text] for text in texts]

    def find_control_token(self, text: str) -> str | None:
        """Find the first token in a text that must not come from text: it would end a turn, or stand for an image."""
        found = self._control_pattern.search(text)
        if found is None and self._is_text_normalized and self._tokenizer.normalizer is not None:
            found = self._control_pattern.search(self._tokenizer.normalizer.normalize_str(text))
        return found and found.group()

    def check_tokens(self, tokens: frozenset[str]) -> None:
        """Refuse a tokenizer that would write tokens out as text.

        Raises:
            ArgumentError: names what it lacks.
        """
        missing = tokens - self._added.keys()
        if missing:
            raise ArgumentError(
                f"tokenizer: lacks {', '.join(sorted(missing))}. Add them as special tokens, or choose the conv_style "
                "that the language model was made for."
            )

    def get_id(self, token: str) -> int:
        """Get a token's id.

        Raises:
            ArgumentError: the vocabulary has it not.
        """
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ArgumentError(f"tokenizer: has no token {token!r}.")
        return int(found)

    def get_token(self, token_id: int) -> str:
        """Get a token as the vocabulary writes it."""
        return str(self._tokenizer.id_to_token(token_id))

    def decode(self, ids: Sequence[int]) -> str:
        """Read ids as text for people, control tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    @cached_property
    def digest(self) -> str:
        """Sha256 (hex) over what decides the ids of a text, and which texts are refused."""
        content = json.loads(self._tokenizer.to_str())
        rules = {
            "normalizer": content["normalizer"],
            "pre_tokenizer": content["pre_tokenizer"],
            # Options at rest are left out: an older file does not name those that came later.
            "model": {
                name: value
                for name, value in content["model"].items()
                if not (value is None or value is False or value == "")
            },
            "added_tokens": sorted(content["added_tokens"], key=lambda token: int(token["id"])),
            "bos": self.bos_token_id,
        }
        return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()

    def _iter_encodings(self, texts: Iterable[str]) -> Iterator[Encoding]:
        remaining = iter(texts)
        while batch := list(islice(remaining, _BATCH_TEXTS)):
            yield from self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)

    def _iter_control_tokens(self) -> Iterator[str]:
        yield from (IMAGE_START, IMAGE_CONTEXT, IMAGE_END)
        for content, token in self._added.items():
            if (token.special or content in CHAT_TOKENS) and content not in GROUNDING_TAGS:
                yield content

    def _find_bos_token_id(self) -> int | None:
        # Asked of the rules themselves: transformers' add_bos_token forgets on loading what it was told before saving.
        opened = self._tokenizer.encode("a")
        return opened.ids[0] if opened.ids and opened.special_tokens_mask[0] else None


_ENCODERS: "WeakKeyDictionary[Any, tuple[tuple[int, bool | None], TextEncoder]]" = WeakKeyDictionary()


def load_text_encoder(path: str) -> TextEncoder:
    """Load a tokenizer's folder, with InternVL's tokens added as assembling a model adds them.

    Raises:
        ArgumentError: there is none in it that can be made a fast one.
    """
    tokenizer = load_tokenizer(path)
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    return TextEncoder.from_tokenizer(tokenizer)


def _write_without_video(tokenizer: Tokenizer) -> str:
    """Write a tokenizer as JSON, without the token `<video>`.

    If other tokens were added behind it, it stays, in every tokenizer of that family: the library numbers tokens anew
    as it reads them, so without it they would lose their ids.
    """
    text = tokenizer.to_str()
    ids = {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    if VIDEO_TAG not in ids or (tokenizer.model.token_to_id(VIDEO_TAG) is None and ids[VIDEO_TAG] != max(ids.values())):
        return text
    # Only this list is parsed: with the vocabulary of 150,000 it would be 0.8 s more. No string of JSON can hold the
    # key with its quotes, and nothing before the list has such a key.
    start = text.index(_ADDED_TOKENS_KEY) + len(_ADDED_TOKENS_KEY)
    tokens, end = json.JSONDecoder().raw_decode(text, start)
    kept = [token for token in tokens if token["content"] != VIDEO_TAG]
    return f"{text[:start]}{json.dumps(kept)}{text[end:]}"


def _compile_alternatives(tokens: Iterable[str]) -> re.Pattern[str]:
    # The longest first, as the tokenizer matches: <|im_end|> before a token that is its beginning.
    ordered = sorted(set(tokens), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, ordered)))
