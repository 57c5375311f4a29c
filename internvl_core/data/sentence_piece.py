"""A sentencepiece BPE model as a fast tokenizer, without the package that made it and without anybody's remote code.

InternLM2's and Llama's published folders have a `tokenizer.model` and Python code that runs it. What that code does
beside sentencepiece is little: it cuts the text at the added tokens, and opens it with a BOS.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from internvl_core.errors import ArgumentError

# sentencepiece_model.proto: TrainerSpec.ModelType and ModelProto.SentencePiece.Type.
_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_SPACE = "▁"


def build_tokenizer(model_file: Path, added_tokens: Mapping[int, AddedToken]) -> Tokenizer:
    """Build the fast tokenizer of a `tokenizer.model`.

    Args:
        model_file: what sentencepiece's trainer wrote.
        added_tokens: tokens by id that the model's folder declares beside it. An id within the vocabulary gives the
            piece there a new name: InternLM2 makes its `<|im_end|>` of an unused piece so.

    Raises:
        ArgumentError: the file is not sentencepiece's, of another kind than BPE, or the ids have a gap.
    """
    proto = _parse(model_file)
    pieces = list(proto.pieces)
    names = [piece.piece for piece in pieces]
    for token_id, token in added_tokens.items():
        if token_id < len(names):
            names[token_id] = token.content
    vocabulary = {name: token_id for token_id, name in enumerate(names)}
    if len(vocabulary) != len(names):
        raise ArgumentError(f"{model_file}: added tokens repeat names of the vocabulary, so two ids have one name.")
    spec = proto.trainer_spec
    scores = {
        name: piece.score
        for name, piece in zip(names, pieces, strict=True)
        if piece.type == _NORMAL and name == piece.piece
    }
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            _list_merges(vocabulary, scores),
            unk_token=next((piece.piece for piece in pieces if piece.type == _UNKNOWN), None),
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    )
    tokenizer.normalizer = _build_normalizer(proto.normalizer_spec, model_file)
    tokenizer.decoder = _build_decoder(has_prefix=proto.normalizer_spec.add_dummy_prefix)
    _add_tokens(tokenizer, pieces, added_tokens, model_file)
    return tokenizer


def _parse(model_file: Path) -> Any:
    from transformers.convert_slow_tokenizer import import_protobuf
    from transformers.tokenization_utils_base import import_protobuf_decode_error

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(model_file.read_bytes())
    except (OSError, import_protobuf_decode_error()) as error:
        raise ArgumentError(f"{model_file}: is not a sentencepiece model: {error}.") from error
    if not proto.pieces:
        raise ArgumentError(f"{model_file}: is not a sentencepiece model: it has no pieces.")
    if proto.trainer_spec.model_type != _BPE or proto.trainer_spec.treat_whitespace_as_suffix:
        raise ArgumentError(
            f"{model_file}: only sentencepiece models of kind BPE with spaces in front of words are converted. "
            "Give a folder with a tokenizer.json."
        )
    return proto


def _list_merges(vocabulary: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """List every pair of pieces that makes a third, the best first.

    sentencepiece merges any two neighbours whose union is a piece, that of the highest score first; the `tokenizers`
    library needs the pairs written out, in that order.
    """
    ranked = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _build_normalizer(spec: Any, model_file: Path) -> normalizers.Normalizer:
    if not spec.escape_whitespaces:
        raise ArgumentError(f"{model_file}: leaves spaces as they are, which is not converted. Give a tokenizer.json.")
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        # Spaces at the ends of the text only: the library's own Strip takes line breaks too.
        steps += [normalizers.Replace(Regex(rf"\A +|[ {_SPACE}]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _build_decoder(*, has_prefix: bool) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)


def _add_tokens(
    tokenizer: Tokenizer, pieces: list[Any], added_tokens: Mapping[int, AddedToken], model_file: Path
) -> None:
    own = {
        token_id: AddedToken(piece.piece, normalized=False, special=piece.type != _USER_DEFINED)
        for token_id, piece in enumerate(pieces)
        if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    }
    # In runs of one kind, because the library numbers all special tokens of a call before the others.
    tokens = sorted({**own, **added_tokens}.items())
    for is_special, run in itertools.groupby(tokens, key=lambda item: item[1].special):
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([token for _, token in run])
    for token_id, token in tokens:
        found = tokenizer.token_to_id(token.content)
        if found != token_id:
            raise ArgumentError(
                f"{model_file}: {token.content} should have the id {token_id}, but {found} is the next free one. "
                "The added tokens belong to another vocabulary."
            )
