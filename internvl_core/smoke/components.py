"""The smoke components: a tiny InternViT and a tiny Qwen2 with its tokenizer, as Hugging Face folders.

    OUT/vision    InternVLVisionModel, 4 x 4 patches, so 4 tokens a tile after the pixel shuffle
    OUT/llm       Qwen2ForCausalLM, byte-level BPE trained on the annotations' own text

Weights are random but not arbitrary: equal settings give equal bytes. InternVL's nine special
tokens are not in the vocabulary; adding them is the loader's work, as with a real language model.
"""

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from internvl_core.data.conversation import render_frames
from internvl_core.data.records import IMAGE_TAG, ParsedRecord, parse_record
from internvl_core.errors import ArgumentError, DataError
from internvl_core.smoke.generated import generate_once, run_command

_ROLES = ("system", "user", "assistant")
# Of a video in the text that the tokenizer is trained on.
_NUM_FRAMES = 4
# Raise it when the content changes, so that folders of the old content are not taken for the new.
_FORMAT = 2


@dataclass(frozen=True)
class ComponentsSettings:
    """What decides every weight and every token."""

    hidden_size: int = 64
    num_vision_layers: int = 2
    num_llm_layers: int = 2
    num_attention_heads: int = 4
    image_size: int = 32
    patch_size: int = 8
    vocab_size: int = 480
    """Tokens at most; a small corpus has fewer merges to give."""
    seed: int = 0
    format: int = _FORMAT

    def __post_init__(self) -> None:
        # The rotary embedding turns pairs, so a head's width is even.
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ArgumentError(
                f"hidden_size: {self.hidden_size} is not a multiple of 2 x {self.num_attention_heads} heads."
            )
        if self.image_size % (2 * self.patch_size):
            raise ArgumentError(
                f"image_size: {self.image_size} px is not an even number of {self.patch_size}-px patches."
            )

    @property
    def initializer_range(self) -> float:
        """Standard deviation of the weights.

        Keeps the scale of what passes a layer of this width. With the usual 0.02 a width of 64 needs
        several times the steps before it learns anything.
        """
        return float(self.hidden_size**-0.5)


def generate_components(out_dir: Path, texts_dir: Path, settings: ComponentsSettings) -> bool:
    """Write both components; a complete folder of equal settings and texts is left as it is.

    Args:
        texts_dir: annotation files (jsonl) whose turns the tokenizer is trained on.

    Returns:
        Whether anything was written.

    Raises:
        DataError: there is no annotation file.
    """
    annotations = sorted(texts_dir.glob("*.jsonl"))
    if not annotations:
        raise DataError(f"{texts_dir}: holds no .jsonl file to train the tokenizer on.")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in annotations)).hexdigest()

    def write(folder: Path) -> None:
        # Seconds of imports, which each later run of the recipe would wait for.
        from internvl_core.smoke.tiny_models import write_models

        write_models(folder, _iter_texts(annotations), settings)

    return generate_once(out_dir, {**asdict(settings), "texts_sha256": digest}, write)


def _iter_texts(annotations: list[Path]) -> Iterator[str]:
    # The roles appear in every rendered turn but in no annotation.
    yield from (f"{role}\n" for role in _ROLES for _ in range(1000))
    for path in annotations:
        for record in _iter_records(path):
            turns = render_frames(record.turns, _NUM_FRAMES) if record.video else record.turns
            yield from (turn["value"].replace(IMAGE_TAG, "") for turn in turns)


def _iter_records(path: Path) -> Iterator[ParsedRecord]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield parse_record(line)
            except DataError as error:
                raise DataError(f"{path}:{number}: {error}", reason=error.reason) from None


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write a tiny vision tower and a tiny language model.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--texts", type=Path, required=True, help="folder of the annotations (jsonl)")
    for name, value in asdict(ComponentsSettings()).items():
        if name != "format":
            parser.add_argument(f"--{name}", type=int, default=value)
    return parser


def _run(args: argparse.Namespace) -> None:
    sizes = {name: value for name, value in vars(args).items() if name not in ("out_dir", "texts")}
    generate_components(args.out_dir, args.texts, ComponentsSettings(**sizes))


if __name__ == "__main__":
    run_command(_run, _build_parser())
