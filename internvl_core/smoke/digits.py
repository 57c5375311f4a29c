"""The smoke data: scikit-learn's handwritten digits as PNG files with InternVL records about them.

    OUT/images/0000.png ...          32 x 32 px, RGB
    OUT/videos/0000-0001.mp4 ...     image 0000, then image 0001
    OUT/annotations/*.jsonl
    OUT/pretrain.json, OUT/pretrain_held_out.json, OUT/finetune.json, OUT/finetune_held_out.json

The split is by image: none of a held-out file occurs in any training file, nor in its videos. Every record says its
system message, the empty one: InternVL's default message would be most of such a short sequence.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvl_core.errors import ArgumentError
from internvl_core.smoke.clips import write_clip
from internvl_core.smoke.generated import generate_once, run_command

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_IMAGE_SIDE_PX = 32
_NUM_IMAGES = 1797
# Raise it when the content changes, so that folders of the old content are not taken for the new.
_FORMAT = 2

_DIGIT_QUESTIONS = ("What digit is this?", "Which digit is it?")
_SEVEN_QUESTION = "Is it a 7?"
_EVEN_QUESTION = "Is it even?"
_WORD_QUESTION = "Name this digit in a word."
_PAIR_QUESTION = "Image-1: <image>\nImage-2: <image>\nWhich digits are these?"
_CLIP_QUESTION = "<video>\nWhich digits are shown?"
# Pairs and clips, of each a sixth of the number of images: seen, but without a weight in the mix.
_IMAGES_PER_PAIR = 6


@dataclass(frozen=True)
class DigitsSettings:
    """What decides every byte of the folder."""

    num_train: int = 1437
    num_held_out: int = 360
    seed: int = 0
    format: int = _FORMAT

    def __post_init__(self) -> None:
        if min(self.num_train, self.num_held_out) < 20 or self.num_train + self.num_held_out > _NUM_IMAGES:
            raise ArgumentError(
                f"smoke data: {self.num_train} + {self.num_held_out} images; must be at least 20 each "
                f"and {_NUM_IMAGES} together at most."
            )


@dataclass(frozen=True)
class Digit:
    """One image and what it shows."""

    image: str
    value: int


def generate_digits(out_dir: Path, settings: DigitsSettings) -> bool:
    """Write images, annotations and meta files; a complete folder of equal settings is left as it is.

    Returns:
        Whether anything was written.
    """
    return generate_once(out_dir, asdict(settings), lambda folder: _write(folder, settings))


def _write(folder: Path, settings: DigitsSettings) -> None:
    digits = _write_images(folder / "images")
    (folder / "videos").mkdir()
    order = random.Random(settings.seed)  # noqa: S311
    digits = _mix(digits, order)
    train = digits[: settings.num_train]
    held_out = digits[settings.num_train : settings.num_train + settings.num_held_out]
    (folder / "annotations").mkdir()
    pretrain = {
        "digit": _ask_digit(train),
        "seven": _ask_seven(train, order, num_pairs=len(train) // 2),
        "even": _ask_even(train),
        "text": _ask_text(),
        "pair": _ask_pair(train, order),
        "clip": _ask_clip(folder, train, order),
    }
    _write_meta(folder, "pretrain", pretrain, data_augment=True, repeat_time={"digit": 2, "text": 4})
    pretrain_held_out = {
        "digit": _ask_digit(held_out),
        "seven": _ask_seven(held_out, order, num_pairs=sum(digit.value == 7 for digit in held_out)),
        "even": _ask_even(held_out),
        "pair": _ask_pair(held_out, order),
        "clip": _ask_clip(folder, held_out, order),
    }
    _write_meta(folder, "pretrain_held_out", pretrain_held_out)
    _write_meta(folder, "finetune", {"word": _ask_word(train)}, data_augment=True)
    _write_meta(folder, "finetune_held_out", {"word": _ask_word(held_out)})


def _write_images(folder: Path) -> list[Digit]:
    folder.mkdir()
    # A second of imports, which each later run of the recipe would wait for.
    from sklearn.datasets import load_digits

    source = load_digits()
    digits = []
    for number, (pixels, value) in enumerate(zip(source.images, source.target, strict=True)):
        # The source has 17 shades, 0 to 16; white on black.
        grey = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
        name = f"{number:04}.png"
        grey.resize((_IMAGE_SIDE_PX, _IMAGE_SIDE_PX), Image.Resampling.BICUBIC).convert("RGB").save(folder / name)
        digits.append(Digit(name, int(value)))
    return digits


def _mix(digits: list[Digit], order: random.Random) -> list[Digit]:
    """Shuffle, then deal the values in turn, so that any stretch of the list has all ten of them."""
    shuffled = order.sample(digits, len(digits))
    dealt: dict[int, int] = {}
    rounds = []
    for digit in shuffled:
        dealt[digit.value] = dealt.get(digit.value, 0) + 1
        rounds.append((dealt[digit.value], digit))
    return [digit for _, digit in sorted(rounds, key=lambda pair: pair[0])]


def _ask_digit(digits: Iterable[Digit]) -> list[dict[str, Any]]:
    return [
        _record(_DIGIT_QUESTIONS[number % len(_DIGIT_QUESTIONS)], str(digit.value), digit.image)
        for number, digit in enumerate(digits)
    ]


def _ask_seven(digits: Sequence[Digit], order: random.Random, *, num_pairs: int) -> list[dict[str, Any]]:
    """Ask as often about a seven as about another digit; sevens are repeated where they run out."""
    sevens = [digit for digit in digits if digit.value == 7]
    others = order.sample([digit for digit in digits if digit.value != 7], num_pairs)
    return [
        _record(_SEVEN_QUESTION, "yes" if digit.value == 7 else "no", digit.image)
        for pair in zip(itertools.cycle(sevens), others, strict=False)
        for digit in pair
    ]


def _ask_even(digits: Iterable[Digit]) -> list[dict[str, Any]]:
    return [_record(_EVEN_QUESTION, "no" if digit.value % 2 else "yes", digit.image) for digit in digits]


def _ask_word(digits: Iterable[Digit]) -> list[dict[str, Any]]:
    return [_record(_WORD_QUESTION, WORDS[digit.value], digit.image) for digit in digits]


def _ask_pair(digits: Sequence[Digit], order: random.Random) -> list[dict[str, Any]]:
    return [
        _converse(
            _PAIR_QUESTION,
            f"{first.value} {second.value}",
            image=[first.image, second.image],
            width_list=[_IMAGE_SIDE_PX, _IMAGE_SIDE_PX],
            height_list=[_IMAGE_SIDE_PX, _IMAGE_SIDE_PX],
        )
        for first, second in _draw_pairs(digits, order)
    ]


def _ask_clip(folder: Path, digits: Sequence[Digit], order: random.Random) -> list[dict[str, Any]]:
    """Ask about two digits that a video shows one after the other, and write the videos."""
    records = []
    for first, second in _draw_pairs(digits, order):
        name = f"{Path(first.image).stem}-{Path(second.image).stem}.mp4"
        write_clip(folder / "videos" / name, [Image.open(folder / "images" / digit.image) for digit in (first, second)])
        records.append(_converse(_CLIP_QUESTION, f"{first.value} {second.value}", video=name))
    return records


def _draw_pairs(digits: Sequence[Digit], order: random.Random) -> list[tuple[Digit, Digit]]:
    """Pair images at random, none with itself and none twice in the same place."""
    num_pairs = len(digits) // _IMAGES_PER_PAIR
    chosen = order.sample(digits, 2 * num_pairs)
    return list(zip(chosen[:num_pairs], chosen[num_pairs:], strict=True))


def _ask_text() -> list[dict[str, Any]]:
    """Ask, without an image, for the words that the finetune answers with."""
    records = []
    for value, word in enumerate(WORDS):
        records.append(_record(f"Write {value} as a word.", word))
        records.append(_record(f"Write {word} as a digit.", str(value)))
        records.append(_record(f"Is {word} even?", "no" if value % 2 else "yes"))
    for word, following in itertools.pairwise(WORDS):
        records.append(_record(f"What comes after {word}?", following))
    return records


def _record(question: str, answer: str, image: str | None = None) -> dict[str, Any]:
    if image is None:
        return _converse(question, answer)
    return _converse(f"<image>\n{question}", answer, image=image, width=_IMAGE_SIDE_PX, height=_IMAGE_SIDE_PX)


def _converse(question: str, answer: str, **media: Any) -> dict[str, Any]:
    turns = [
        {"from": "system", "value": ""},
        {"from": "human", "value": question},
        {"from": "gpt", "value": answer},
    ]
    return {**media, "conversations": turns}


def _write_meta(
    folder: Path,
    name: str,
    datasets: dict[str, list[dict[str, Any]]],
    *,
    data_augment: bool = False,
    repeat_time: dict[str, int] | None = None,
) -> None:
    meta = {}
    for dataset, records in datasets.items():
        annotation = f"annotations/{name}_{dataset}.jsonl"
        lines = [json.dumps({"id": number, **record}) for number, record in enumerate(records)]
        (folder / annotation).write_text("\n".join(lines) + "\n")
        meta[dataset] = {
            "root": "videos" if dataset == "clip" else "images",
            "annotation": annotation,
            "data_augment": data_augment,
            "repeat_time": (repeat_time or {}).get(dataset, 1),
            "length": len(records),
        }
    (folder / f"{name}.json").write_text(json.dumps(meta, indent=2) + "\n")


def _build_parser() -> argparse.ArgumentParser:
    defaults = DigitsSettings()
    parser = argparse.ArgumentParser(description="Write the smoke data: handwritten digits and questions about them.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--train", type=int, default=defaults.num_train, help="images to train on")
    parser.add_argument("--held-out", type=int, default=defaults.num_held_out, help="images to evaluate on")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="draws the split")
    return parser


def _run(args: argparse.Namespace) -> None:
    generate_digits(args.out_dir, DigitsSettings(args.train, args.held_out, args.seed))


if __name__ == "__main__":
    run_command(_run, _build_parser())
