import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from internvl_core.data.media_root import open_root
from internvl_core.data.meta import load_meta
from internvl_core.data.records import ParsedRecord, parse_record
from internvl_core.data.video import FrameSampling, iter_frames, probe_video
from internvl_core.errors import ArgumentError, DataError
from internvl_core.smoke.clips import write_clip
from internvl_core.smoke.components import ComponentsSettings, generate_components
from internvl_core.smoke.digits import WORDS, DigitsSettings, generate_digits

SMALL = DigitsSettings(num_train=40, num_held_out=20)


def digest_folder(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_records(meta_path: Path) -> dict[str, list[ParsedRecord]]:
    return {
        meta.name: [parse_record(line) for line in Path(meta.annotation).read_bytes().splitlines()]
        for meta in load_meta(meta_path)
    }


def list_images(record: ParsedRecord) -> list[str]:
    """Name the images of a record; a clip is named after those that it shows."""
    if record.video is None:
        return list(record.images)
    return [f"{stem}.png" for stem in Path(record.video).stem.split("-")]


def read_images(*meta_paths: Path) -> set[str]:
    return {
        image
        for path in meta_paths
        for records in read_records(path).values()
        for record in records
        for image in list_images(record)
    }


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smoke") / "digits"
    assert generate_digits(folder, DigitsSettings())
    return folder


@pytest.fixture(scope="module")
def components(digits: Path) -> Path:
    folder = digits.parent / "components"
    assert generate_components(folder, digits / "annotations", ComponentsSettings())
    return folder


def test_every_meta_file_loads_and_every_record_is_sound(digits: Path) -> None:
    counts = {
        name: {dataset: len(records) for dataset, records in read_records(digits / f"{name}.json").items()}
        for name in ("pretrain", "pretrain_held_out", "finetune", "finetune_held_out")
    }
    assert counts["pretrain"]["digit"] == counts["pretrain"]["even"] == counts["finetune"]["word"] == 1437
    assert counts["pretrain_held_out"]["digit"] == counts["finetune_held_out"]["word"] == 360
    assert set(counts["pretrain"]) == {"digit", "seven", "even", "text", "pair", "clip"}
    assert counts["pretrain"]["pair"] == counts["pretrain"]["clip"] == 239
    assert counts["pretrain_held_out"]["pair"] == counts["pretrain_held_out"]["clip"] == 60


def test_every_record_says_how_large_its_images_are(digits: Path) -> None:
    for name in ("pretrain", "pretrain_held_out", "finetune", "finetune_held_out"):
        for records in read_records(digits / f"{name}.json").values():
            assert all(record.sizes == ((32, 32),) * len(record.images) for record in records if record.images)


def test_no_held_out_image_is_ever_trained_on(digits: Path) -> None:
    trained = read_images(digits / "pretrain.json", digits / "finetune.json")
    held_out = read_images(digits / "pretrain_held_out.json", digits / "finetune_held_out.json")
    assert (len(trained), len(held_out)) == (1437, 360)
    contents = {(digits / "images" / name).read_bytes() for name in trained}
    assert not any((digits / "images" / name).read_bytes() in contents for name in held_out)


def test_half_of_the_questions_about_seven_are_about_a_seven(digits: Path) -> None:
    for name in ("pretrain", "pretrain_held_out"):
        answers = [record.turns[-1]["value"] for record in read_records(digits / f"{name}.json")["seven"]]
        assert answers.count("yes") == answers.count("no") > 30


@pytest.mark.parametrize("part", ["", "_held_out"])
def test_the_answers_to_one_image_agree_with_each_other(part: str, digits: Path) -> None:
    pretrain = read_records(digits / f"pretrain{part}.json")
    values = {record.images[0]: int(record.turns[-1]["value"]) for record in pretrain["digit"]}
    expected: dict[str, Callable[[int], str]] = {
        "seven": lambda digit: "yes" if digit == 7 else "no",
        "even": lambda digit: "no" if digit % 2 else "yes",
        "word": lambda digit: WORDS[digit],
    }
    finetune = read_records(digits / f"finetune{part}.json")
    for dataset, answer in expected.items():
        for record in {**pretrain, **finetune}[dataset]:
            assert record.turns[-1]["value"] == answer(values[record.images[0]])
    for record in [*pretrain["pair"], *pretrain["clip"]]:
        first, second = (values[image] for image in list_images(record))
        assert record.turns[-1]["value"] == f"{first} {second}"


def test_a_clip_shows_its_two_digits_for_four_frames_each(digits: Path) -> None:
    root = open_root(str(digits / "videos"))
    for record in read_records(digits / "pretrain_held_out.json")["clip"][:5]:
        assert record.video is not None
        info = probe_video(root, record.video)
        assert (info.num_frames, info.width, info.height) == (8, 32, 32)
        frames = list(iter_frames(root, record.video, info, FrameSampling.parse("middle", 8, 8), count=8, key=""))
        images = [np.asarray(Image.open(digits / "images" / name), np.float32) for name in list_images(record)]
        for number, frame in enumerate(frames):
            distances = [np.abs(np.asarray(frame, np.float32) - image).mean() for image in images]
            assert np.argmin(distances) == number // 4
            assert min(distances) < 8


def test_equal_settings_give_equal_bytes(digits: Path, tmp_path: Path) -> None:
    generate_digits(tmp_path / "again", DigitsSettings())
    assert digest_folder(tmp_path / "again") == digest_folder(digits)


def test_a_clip_does_not_depend_on_what_lay_in_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(10):
        cells = rng.integers(0, 256, (2, 14, 14, 3), dtype=np.uint8)
        pictures = [Image.fromarray(picture.repeat(8, 0).repeat(8, 1)) for picture in cells]
        versions = set()
        for junk in (0, 13, 255):
            blocks = [np.full(size, junk, dtype=np.uint8) for size in rng.integers(100, 40_000, 200)]
            del blocks
            write_clip(tmp_path / "clip.mp4", pictures)
            versions.add((tmp_path / "clip.mp4").read_bytes())
        assert len(versions) == 1, number


def test_another_seed_gives_another_split(tmp_path: Path) -> None:
    for seed in (0, 1):
        generate_digits(tmp_path / str(seed), DigitsSettings(40, 20, seed=seed))
    assert read_images(tmp_path / "0/finetune.json") != read_images(tmp_path / "1/finetune.json")


def test_a_complete_folder_is_left_as_it_is(tmp_path: Path) -> None:
    assert generate_digits(tmp_path / "a", SMALL)
    (tmp_path / "a" / "images" / "0000.png").write_bytes(b"mine")
    assert not generate_digits(tmp_path / "a", SMALL)
    assert (tmp_path / "a" / "images" / "0000.png").read_bytes() == b"mine"


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ArgumentError, match="holds other settings or other files"):
        generate_digits(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_generation_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text('{"conversations": []}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: conversations must be"):
        generate_components(tmp_path / "out", tmp_path / "texts", ComponentsSettings())
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_too_many_images_are_refused() -> None:
    with pytest.raises(ArgumentError, match="1797 together"):
        DigitsSettings(num_train=1700, num_held_out=100)


def test_the_components_are_ordinary_hugging_face_folders(components: Path) -> None:
    vision, llm = (
        AutoModel.from_pretrained(components / "vision"),
        AutoModelForCausalLM.from_pretrained(components / "llm"),
    )
    tokenizer = AutoTokenizer.from_pretrained(components / "llm")
    assert vision(torch.zeros(2, 3, 32, 32)).last_hidden_state.shape == (2, 17, 64)
    assert llm.config.vocab_size % 64 == 0
    assert llm.config.vocab_size >= len(tokenizer)
    assert not llm.config.tie_word_embeddings
    assert llm.lm_head.weight is not llm.model.embed_tokens.weight
    assert 100_000 < sum(p.numel() for model in (vision, llm) for p in model.parameters()) < 500_000


def test_patches_differ_by_their_place(components: Path) -> None:
    positions = AutoModel.from_pretrained(components / "vision").embeddings.position_embeddings
    assert positions.std() > 0.01


def test_the_tokenizer_reads_digits_singly_and_chat_tokens_whole(components: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(components / "llm")
    assert tokenizer.tokenize("<|im_start|>user\n42<|im_end|>") == ["<|im_start|>", "user", "Ċ", "4", "2", "<|im_end|>"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert "<IMG_CONTEXT>" not in tokenizer.get_vocab()
    for text in ("What digit is this?", "数字七 é \n\t x"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_tokenizer_has_words_for_what_is_said_of_images_and_frames(components: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(components / "llm")
    assert len(tokenizer.tokenize("Image-1: \nImage-2: \n")) <= 12
    assert len(tokenizer.tokenize("Frame-1: \nFrame-2: \n")) <= 12


def test_equal_components_have_equal_weights(digits: Path, components: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    generate_components(tmp_path / "again", digits / "annotations", ComponentsSettings())
    generate_components(tmp_path / "other", digits / "annotations", ComponentsSettings(seed=1))
    assert digest_folder(tmp_path / "again") == digest_folder(components)
    for weights in ("vision/model.safetensors", "llm/model.safetensors"):
        assert digest_folder(tmp_path / "other")[weights] != digest_folder(components)[weights]
    assert json.loads((components / "settings.json").read_text())["seed"] == 0


def test_components_without_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.jsonl file"):
        generate_components(tmp_path / "out", tmp_path, ComponentsSettings())


@pytest.mark.parametrize(("name", "value"), [("hidden_size", 60), ("patch_size", 5), ("patch_size", 32)])
def test_sizes_that_do_not_fit_each_other_are_refused(name: str, value: int) -> None:
    with pytest.raises(ArgumentError, match="is not a"):
        ComponentsSettings(**{name: value})
