import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import GOLDEN_FOLDER, load_golden, train_sentence_piece
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import import_protobuf

from internvl_core.data.templates import SPECIAL_TOKENS
from internvl_core.data.text_encoder import load_text_encoder
from internvl_core.errors import ArgumentError
from internvl_core.model.tokenizer import load_tokenizer, write_tokenizer

SENTENCE_PIECE = Path(__file__).parents[1] / "data" / "sentence_piece"
NUM_PIECES = 700
IM_END = 3
"""The unused piece that the folder calls `<|im_end|>`."""
TEXTS = ["", "a picture of two dogs", "<img><IMG_CONTEXT></img>", " \n x", "书生·万象 é", "<|im_end|>\n", "a <video> b"]


def write_internlm2_folder(folder: Path, **settings: Any) -> Path:
    """Write what InternLM2's published folders have: the sentencepiece model, and Python code to run it."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(SENTENCE_PIECE / "tokenizer.model", folder / "tokenizer.model")
    added = {0: "<unk>", 1: "<s>", 2: "</s>", IM_END: "<|im_end|>", IM_END + 1: "<|im_start|>"}
    added |= dict(enumerate(SPECIAL_TOKENS, start=NUM_PIECES))
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False) | {"special": True}
    content = {
        "added_tokens_decoder": {str(token_id): {"content": token, **flags} for token_id, token in added.items()},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>", *SPECIAL_TOKENS],
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "tokenizer_class": "InternLM2Tokenizer",
        "unk_token": "<unk>",
    } | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    # Importing it would be seen.
    (folder / "tokenization_internlm2.py").write_text("raise RuntimeError('remote code was run')")
    return folder


def test_a_sentencepiece_model_gives_the_ids_that_sentencepiece_gives(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_internlm2_folder(tmp_path)))
    for text, ids in json.loads((SENTENCE_PIECE / "ids.json").read_text()).items():
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text
        assert tokenizer.decode(ids) == text.replace("▁", " ")


@pytest.mark.parametrize("has_prefix", [False, True])
@pytest.mark.parametrize("is_trimmed", [False, True])
@pytest.mark.parametrize("rules", ["identity", "nmt_nfkc"])
def test_models_of_every_setting_are_converted_exactly(
    tmp_path: Path, has_prefix: bool, is_trimmed: bool, rules: str
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece to train a model with")
    # sentencepiece itself takes a token that a text spells for text.
    lines = [line for line in Path(__file__).read_text().splitlines() if line.strip() and "<" not in line]
    lines += ["是由上海人工智能"] * 3
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        add_dummy_prefix=has_prefix,
        remove_extra_whitespaces=is_trimmed,
        normalization_rule_name=rules,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**named, "tokenizer_class": "LlamaTokenizer"}))
    tokenizer = load_tokenizer(str(tmp_path))
    texts = [*lines, "  two  spaces \n  ", " \n", "", "ﬁ ＡＢ é 🙂", "a▁b", "\n\n"]
    for text in texts:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text), text
        assert tokenizer(text)["input_ids"] == [1, *reference.encode(text)]


def test_tokens_declared_on_unused_pieces_and_behind_them_keep_their_ids(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_internlm2_folder(tmp_path)))
    assert len(tokenizer) == NUM_PIECES + len(SPECIAL_TOKENS)
    assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"]) == [IM_END, IM_END + 1]
    assert tokenizer("<IMG_CONTEXT><|im_end|>", add_special_tokens=False)["input_ids"] == [NUM_PIECES + 2, IM_END]
    assert tokenizer.decode([IM_END, NUM_PIECES], skip_special_tokens=True) == ""


def test_the_older_way_of_declaring_tokens_gives_the_same(tmp_path: Path) -> None:
    new = load_tokenizer(str(write_internlm2_folder(tmp_path / "new")))
    folder = write_internlm2_folder(tmp_path / "old")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    declared = settings.pop("added_tokens_decoder")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "added_tokens.json").write_text(json.dumps({token["content"]: int(i) for i, token in declared.items()}))
    old = load_tokenizer(str(folder))
    assert old.backend_tokenizer.to_str() == new.backend_tokenizer.to_str()


@pytest.mark.parametrize(("settings", "opening"), [({}, [1]), ({"add_bos_token": False}, [])])
def test_a_bos_opens_the_text_unless_the_folder_says_no(
    tmp_path: Path, settings: dict[str, Any], opening: list[int]
) -> None:
    folder = write_internlm2_folder(tmp_path, **settings)
    assert load_tokenizer(str(folder))("<|im_end|>")["input_ids"] == [*opening, IM_END]
    assert load_text_encoder(str(folder)).bos_token_id == (opening[0] if opening else None)


def test_the_data_pipeline_reads_the_same_tokenizer(tmp_path: Path) -> None:
    folder = write_internlm2_folder(tmp_path)
    tokenizer = load_tokenizer(str(folder))
    encoder = load_text_encoder(str(folder))
    assert encoder.encode(TEXTS) == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]


def test_a_tokenizer_json_is_read_where_the_folder_asks_for_code(tmp_path: Path) -> None:
    load_tokenizer(str(write_internlm2_folder(tmp_path))).save_pretrained(tmp_path)
    write_internlm2_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not looked at")
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer("<IMG_CONTEXT>")["input_ids"] == [1, NUM_PIECES + 2]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())


def test_a_folder_with_nothing_but_code_is_refused(tmp_path: Path) -> None:
    (write_internlm2_folder(tmp_path) / "tokenizer.model").unlink()
    with pytest.raises(ArgumentError, match=r"neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(str(tmp_path))


def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    (write_internlm2_folder(tmp_path) / "tokenizer.model").write_bytes(b"\xff" * 100)
    with pytest.raises(ArgumentError, match=r"tokenizer.model: is not a sentencepiece model"):
        load_tokenizer(str(tmp_path))


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = write_internlm2_folder(tmp_path) / "tokenizer.model"
    proto = import_protobuf().ModelProto()
    proto.ParseFromString(file.read_bytes())
    proto.trainer_spec.model_type = 1
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(ArgumentError, match="only sentencepiece models of kind BPE"):
        load_tokenizer(str(tmp_path))


def test_added_tokens_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    added = {str(NUM_PIECES + 1): {"content": "<img>", "special": True}}
    folder = write_internlm2_folder(tmp_path, added_tokens_decoder=added, additional_special_tokens=[])
    with pytest.raises(ArgumentError, match=f"<img> should have the id {NUM_PIECES + 1}, but {NUM_PIECES}"):
        load_tokenizer(str(folder))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("build", [load_golden, train_sentence_piece])
def test_a_native_folder_names_the_tokens_of_the_processor(tmp_path: Path, build: Any) -> None:
    original: PreTrainedTokenizerBase = build()
    write_tokenizer(tmp_path, original, "native")
    written = AutoTokenizer.from_pretrained(tmp_path)
    assert written.start_image_token_id == original.convert_tokens_to_ids("<img>")
    assert written.end_image_token_id == original.convert_tokens_to_ids("</img>")
    assert written.context_image_token_id == original.convert_tokens_to_ids("<IMG_CONTEXT>")
    # Behind all tokens that have a row in the embeddings.
    assert written.convert_tokens_to_ids(written.video_token) == len(original)


@pytest.mark.parametrize("build", [load_golden, train_sentence_piece])
def test_both_formats_tokenize_as_the_source_and_lead_back_to_it(tmp_path: Path, build: Any) -> None:
    original: PreTrainedTokenizerBase = build()
    write_tokenizer(tmp_path / "native", original, "native")
    native = load_tokenizer(str(tmp_path / "native"))
    write_tokenizer(tmp_path / "chat", native, "chat")
    chat = load_tokenizer(str(tmp_path / "chat"))
    assert len(chat) == len(original)
    for text in TEXTS:
        expected = original(text)["input_ids"]
        assert chat(text)["input_ids"] == expected
        assert native(text.replace("<video>", ""))["input_ids"] == original(text.replace("<video>", ""))["input_ids"]
    settings = json.loads((tmp_path / "chat" / "tokenizer_config.json").read_text())
    assert not {"extra_special_tokens", "video_token", "processor_class", "auto_map"} & settings.keys()


@pytest.mark.parametrize("build", [load_golden, train_sentence_piece])
def test_tokens_behind_the_one_for_videos_keep_their_ids_in_both_formats(tmp_path: Path, build: Any) -> None:
    original: PreTrainedTokenizerBase = build()
    original.add_tokens(["<video>", "<|later|>"], special_tokens=True)
    expected = original("<|later|><img>")["input_ids"]
    for format in ("native", "chat"):
        write_tokenizer(tmp_path / format, original, format)
        assert load_tokenizer(str(tmp_path / format))("<|later|><img>")["input_ids"] == expected


def test_the_golden_tokenizer_is_found_without_its_tokenizer_json(tmp_path: Path) -> None:
    # Qwen2's published chat folders have vocab.json and merges.txt only.
    for file in GOLDEN_FOLDER.iterdir():
        if file.name != "tokenizer.json":
            shutil.copyfile(file, tmp_path / file.name)
    tokenizer = load_tokenizer(str(tmp_path))
    golden = load_golden()
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == golden(text)["input_ids"]


@pytest.mark.parametrize("build", [load_golden, train_sentence_piece])
def test_a_chat_folder_is_written_as_transformers_4_reads_it(tmp_path: Path, build: Any) -> None:
    # Checked by hand with 4.37.2 and tokenizers 0.15.2, which read no pairs, no TokenizersBackend and no jinja file.
    original: PreTrainedTokenizerBase = build()
    write_tokenizer(tmp_path, original, "chat")
    content, settings = (
        json.loads((tmp_path / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")
    )
    assert all(isinstance(merge, str) for merge in content["model"]["merges"])
    assert settings["tokenizer_class"] in {"Qwen2Tokenizer", "PreTrainedTokenizerFast"}
    declared = {int(token_id): token["content"] for token_id, token in settings["added_tokens_decoder"].items()}
    assert declared == {token_id: str(token) for token_id, token in original.added_tokens_decoder.items()}
    if settings["tokenizer_class"] == "Qwen2Tokenizer":
        # The class in Python has these only.
        (tmp_path / "tokenizer.json").unlink()
        for text in TEXTS:
            assert load_tokenizer(str(tmp_path))(text)["input_ids"] == original(text)["input_ids"]
