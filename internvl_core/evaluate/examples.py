"""A few held-out answers, right ones and wrong ones, for people to look at."""

import base64
import io
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from internvl_core.contract import EXAMPLES_FILE, write_json_atomically
from internvl_core.data.media import load_image
from internvl_core.data.media_root import open_root
from internvl_core.data.questions import Question
from internvl_core.errors import InternVLError
from internvl_core.evaluate.score import is_exact_match

NUM_RIGHT = 2
NUM_WRONG = 4
"""Of each data set: what is wrong teaches more."""
MAX_EXAMPLES = 48
_MAX_CHARACTERS = 2000
_SIDE_PX = 160

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A question with the answer that was expected and the one that was given."""

    sample_id: str
    question: str
    expected: str
    answer: str
    is_right: bool
    picture: str | None = None
    """The first image, small, as a data URI; None where there is none."""

    @property
    def dataset(self) -> str:
        return self.sample_id.rpartition(":")[0]

    @property
    def line(self) -> int:
        return int(self.sample_id.rpartition(":")[2])


def choose_examples(questions: Sequence[Question], answers: Sequence[str]) -> list[Example]:
    """Take the first answers of each data set, so many that are right and so many that are wrong, with pictures."""
    taken: Counter[tuple[str, bool]] = Counter()
    chosen = []
    for question, answer in zip(questions, answers, strict=True):
        is_right = is_exact_match(answer, question.answer)
        kind = (question.meta.name, is_right)
        if taken[kind] < _limit(is_right=is_right):
            taken[kind] += 1
            chosen.append(_build_example(question, answer, is_right=is_right))
    return chosen


def merge_examples(shares: Iterable[Iterable[Example]]) -> list[Example]:
    """Merge what the ranks chose down to what one would have chosen, the data sets in order."""
    taken: Counter[tuple[str, bool]] = Counter()
    merged: dict[str, list[Example]] = {}
    for example in sorted((example for share in shares for example in share), key=lambda example: example.line):
        kind = (example.dataset, example.is_right)
        if taken[kind] < _limit(is_right=example.is_right):
            taken[kind] += 1
            merged.setdefault(example.dataset, []).append(example)
    return [example for dataset in sorted(merged) for example in merged[dataset]][:MAX_EXAMPLES]


def write_examples(directory: Path, examples: Sequence[Example]) -> None:
    """Write them into an attempt's directory; what is only to be looked at is no reason to fail."""
    if not examples:
        return
    try:
        write_json_atomically(
            directory / EXAMPLES_FILE, {"version": 1, "examples": [asdict(example) for example in examples]}
        )
    except OSError as error:
        logger.warning("%s: not written: %s", directory / EXAMPLES_FILE, error)


def _limit(*, is_right: bool) -> int:
    return NUM_RIGHT if is_right else NUM_WRONG


def _build_example(question: Question, answer: str, *, is_right: bool) -> Example:
    turns = question.record.content.turns
    return Example(
        question.record.sample_id,
        turns[-1]["value"][:_MAX_CHARACTERS],
        question.answer[:_MAX_CHARACTERS],
        answer[:_MAX_CHARACTERS],
        is_right,
        _draw(question),
    )


def _draw(question: Question) -> str | None:
    images = question.record.content.images
    if not images:
        return None
    try:
        with open_root(question.meta.root).open(images[0]) as file:
            image = load_image(file, images[0])
    except InternVLError:
        return None
    image.thumbnail((_SIDE_PX, _SIDE_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
