"""Held-out questions: records whose last answer the model must give by itself.

Read and encoded by the code of training, never augmented. A held-out record that is bad is an
error: a score over fewer questions would be another score.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from internvl_core.data.annotation import fetch_annotation
from internvl_core.data.dataset import Prompt
from internvl_core.data.encoding import Encoding
from internvl_core.data.meta import DatasetMeta, load_meta
from internvl_core.data.order import build_keys, permute
from internvl_core.data.pixels import PixelRules, PixelSource
from internvl_core.data.records import Record, iter_lines, parse_record
from internvl_core.data.templates import get_template
from internvl_core.errors import DataError


@dataclass(frozen=True)
class Question:
    """A held-out record without its last answer."""

    meta: DatasetMeta
    record: Record
    """The conversation up to the last human turn."""
    answer: str


def load_questions(meta_path: str | Path, cache_dir: Path) -> list[Question]:
    """Load the questions of a held-out meta file, data set by data set.

    Raises:
        DataError: the meta file or a record is wrong.
    """
    return [question for meta in load_meta(meta_path) for question in _load_dataset(meta, cache_dir)]


def _load_dataset(meta: DatasetMeta, cache_dir: Path) -> list[Question]:
    questions = []
    with fetch_annotation(meta.annotation, cache_dir).open("rb") as file:
        for number, line in enumerate(iter_lines(file), start=1):
            if line.strip():
                questions.append(_ask(meta, number, line))
    if not questions:
        raise DataError(f"{meta.annotation}: holds no record. Remove dataset {meta.name!r} or fill the file.")
    if meta.length is not None and meta.length != len(questions):
        raise DataError(f"{meta.annotation}: has {len(questions)} records, but length is {meta.length}. Correct one.")
    passes, extra = meta.count_samples(len(questions))
    subset = permute(np.arange(extra), np.array(len(questions)), build_keys([f"subset/{meta.name}"]))
    return questions * passes + [questions[position] for position in sorted(subset.tolist())]


def _ask(meta: DatasetMeta, number: int, line: bytes) -> Question:
    try:
        content = parse_record(line, ignore_keys=meta.ignore_keys)
    except DataError as error:
        raise DataError(f"{meta.annotation}:{number}: {error}", reason=error.reason) from None
    *context, answer = content.turns
    record = Record(meta.name, meta.annotation, number, replace(content, turns=tuple(context)))
    return Question(meta, record, answer["value"])


class QuestionEncoder:
    """Turn questions into prompts."""

    def __init__(self, encoding: Encoding, pixel_rules: PixelRules) -> None:
        self._encoding = encoding
        self._pixel_rules = pixel_rules
        self._sources: dict[str, tuple[Encoding, PixelSource]] = {}

    def encode(self, question: Question) -> Prompt:
        """Encode a question up to the place where the answer begins.

        Raises:
            DataError: names file and line.
        """
        encoding, pixels = self._find_source(question.meta)
        record = question.record
        try:
            media = pixels.load(record, key=record.sample_id, is_training=False)
            input_ids = encoding.encode_prompt(media.turns, media.tile_counts)
        except DataError as error:
            raise DataError(f"{record.where}: {error}", reason=error.reason) from None
        return {"input_ids": torch.tensor(input_ids), "tiles": media.tiles, "sample_id": record.sample_id}

    def get_end_token_id(self, question: Question) -> int:
        """Get the token with which an answer ends in the chat format of the question's data set.

        Raises:
            ArgumentError: the tokenizer has no such token.
        """
        encoding, _ = self._find_source(question.meta)
        encoder, template = encoding.get_encoder(), get_template(encoding.conv_style)
        encoder.check_tokens(template.tokens)
        return encoder.get_id(template.endings["gpt"].strip())

    def _find_source(self, meta: DatasetMeta) -> tuple[Encoding, PixelSource]:
        if meta.name not in self._sources:
            encoding = self._encoding.for_dataset(meta)
            self._sources[meta.name] = encoding, PixelSource(meta, encoding, self._pixel_rules)
        return self._sources[meta.name]
