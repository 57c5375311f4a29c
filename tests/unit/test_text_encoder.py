import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import GOLDEN_FOLDER, load_golden, load_golden_with_chat_tokens, train_sentence_piece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from internvl_core.data.records import VIDEO_TAG
from internvl_core.data.templates import GROUNDING_TAGS, SPECIAL_TOKENS
from internvl_core.data.text_encoder import TextEncoder, load_text_encoder
from internvl_core.errors import ArgumentError
from internvl_core.model.convert import convert
from internvl_core.model.tokenizer import Format, load_tokenizer, write_tokenizer
from internvl_core.smoke.tiny_models import train_tokenizer

GOLDEN_MODELS = Path(__file__).parents[1] / "data" / "golden"
GOLDEN = load_golden()
ENCODER = TextEncoder.from_tokenizer(GOLDEN)
SENTENCE_PIECE = train_sentence_piece()
OPENS_WITH_BOX = processors.TemplateProcessing(single="<box> $A", special_tokens=[("<box>", ENCODER.get_id("<box>"))])


def build_smoke() -> PreTrainedTokenizerBase:
    tokenizer = train_tokenizer(iter(["How many red circles? There are two.\n"] * 20), 300)
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    return tokenizer


def assert_equal(found: TextEncoder, expected: TextEncoder) -> None:
    """Check all that an index depends on, and what texts are refused."""
    texts = ["<video>", "a <video>\nb", "the<video><img>", "<IMG_CONTEXT> red", "圆é"]
    assert found.encode(texts) == expected.encode(texts)
    assert (found.digest, found.bos_token_id) == (expected.digest, expected.bos_token_id)
    assert [found.find_control_token(text) for text in texts] == [expected.find_control_token(text) for text in texts]
    assert found.find_control_token("a<video>b") is None


TEXTS = st.lists(
    st.text(max_size=30)
    | st.lists(st.sampled_from(["<img>", "<box>", "</ref>", "<|im_end|>", "the red", " ", "\n", "é", "圆", "<"])).map(
        "".join
    ),
    max_size=4,
)


@pytest.mark.parametrize("tokenizer", [GOLDEN, SENTENCE_PIECE], ids=["bytes", "sentence piece"])
@given(texts=TEXTS)
def test_ids_are_those_of_transformers_without_the_tokens_it_adds(
    tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> None:
    encoder = TextEncoder.from_tokenizer(tokenizer)
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert encoder.encode(texts) == expected
    assert encoder.count_tokens(texts) == [len(ids) for ids in expected]
    assert [encoder.encode_with_starts(text)[0] for text in texts] == expected


def test_more_texts_than_one_batch_keep_their_order() -> None:
    texts = [f"{number} circles" for number in range(1000)]
    assert ENCODER.encode(texts) == [GOLDEN(text)["input_ids"] for text in texts]


def test_padding_and_truncation_of_the_last_call_change_nothing() -> None:
    tokenizer = load_golden()
    digest = TextEncoder.from_tokenizer(tokenizer).digest
    tokenizer(["the red circle", "the"], padding=True, truncation=True, max_length=2)
    encoder = TextEncoder(tokenizer.backend_tokenizer)
    assert encoder.encode(["the red circle", "the"]) == ENCODER.encode(["the red circle", "the"])
    assert encoder.digest == digest


def test_an_encoder_arrives_whole_in_another_process() -> None:
    arrived = pickle.loads(pickle.dumps(ENCODER))
    assert arrived.encode(["<img>a circle"]) == ENCODER.encode(["<img>a circle"])
    assert arrived.digest == ENCODER.digest
    assert arrived.find_control_token("a<img>") == "<img>"


def test_a_tokenizer_is_copied_once_until_it_is_given_tokens() -> None:
    tokenizer = load_golden()
    first = TextEncoder.from_tokenizer(tokenizer)
    assert TextEncoder.from_tokenizer(tokenizer) is first is TextEncoder.from_tokenizer(first)
    tokenizer.add_tokens(["<|user|>"], special_tokens=True)
    second = TextEncoder.from_tokenizer(tokenizer)
    assert second.encode(["<|user|>"]) == [[second.get_id("<|user|>")]]
    assert second.digest != first.digest


def test_a_tokenizer_written_in_python_is_refused() -> None:
    with pytest.raises(ArgumentError, match="object is none of the fast ones"):
        TextEncoder.from_tokenizer(object())  # type: ignore[arg-type]


def test_the_digest_outlives_saving_and_loading(tmp_path: Path) -> None:
    opened = load_golden(bos_token="<|endoftext|>")
    opened.add_bos_token = True
    tokenizers = {
        "golden": GOLDEN,
        "chat": load_golden_with_chat_tokens(),
        "smoke": build_smoke(),
        "sentence_piece": SENTENCE_PIECE,
        "bos": opened,
    }
    digests = set()
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(tmp_path / name)
        before = TextEncoder.from_tokenizer(tokenizer)
        after = TextEncoder.from_tokenizer(AutoTokenizer.from_pretrained(tmp_path / name))
        assert (after.digest, after.bos_token_id) == (before.digest, before.bos_token_id), name
        digests.add(after.digest)
    assert len(digests) == len(tokenizers)


@pytest.mark.parametrize("tokenizer", [GOLDEN, SENTENCE_PIECE, build_smoke()], ids=["bytes", "sentence piece", "smoke"])
@pytest.mark.parametrize("formats", [["native"], ["chat"], ["native", "chat"], ["native", "native"]], ids="-".join)
def test_saving_a_model_changes_neither_ids_nor_digest(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, formats: list[Format]
) -> None:
    before, saved = TextEncoder.from_tokenizer(tokenizer), tokenizer
    for number, format in enumerate(formats):
        write_tokenizer(tmp_path / str(number), saved, format)
        saved = load_tokenizer(str(tmp_path / str(number)))
    assert (saved.convert_tokens_to_ids("<video>") == len(tokenizer)) == (formats[-1] == "native")
    assert_equal(load_text_encoder(str(tmp_path / str(len(formats) - 1))), before)


@pytest.mark.parametrize("family", ["qwen2", "internlm2"])
@pytest.mark.parametrize("add_video", [False, True])
def test_a_converted_model_keeps_the_index_of_its_source(tmp_path: Path, family: str, add_video: bool) -> None:
    source = shutil.copytree(GOLDEN_MODELS / family, tmp_path / "chat")
    if add_video:
        tokenizer = load_tokenizer(str(source))
        tokenizer.add_tokens([VIDEO_TAG], special_tokens=True)
        tokenizer.save_pretrained(source)
    convert(str(source), str(tmp_path / "native"), to="native", merge=False, dtype=None, cache_dir=tmp_path)
    assert_equal(load_text_encoder(str(tmp_path / "native")), load_text_encoder(str(GOLDEN_MODELS / family)))


@pytest.mark.parametrize("is_piece", [False, True], ids=["no piece", "a piece"])
@pytest.mark.parametrize("model", [models.BPE, models.Unigram], ids=["BPE", "Unigram"])
def test_the_token_for_videos_is_text(model: Any, is_piece: bool) -> None:
    pieces = ["<unk>", *dict.fromkeys(VIDEO_TAG), "a", *([VIDEO_TAG] if is_piece else []), "b"]
    if model is models.BPE:
        plain = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    else:
        plain = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    plain.add_special_tokens(['"added_tokens":', "<img>"])
    withs = Tokenizer.from_str(plain.to_str())
    withs.add_special_tokens([VIDEO_TAG])
    assert withs.encode("a<video>").ids == [plain.token_to_id("a"), withs.token_to_id(VIDEO_TAG)]
    assert_equal(TextEncoder(withs), TextEncoder(plain))
    assert TextEncoder(withs).get_id("<img>") == withs.token_to_id("<img>")
    # The original is only read.
    assert withs.encode("a<video>").ids[-1] == withs.token_to_id(VIDEO_TAG)


def test_tokens_behind_the_one_for_videos_keep_their_ids() -> None:
    tokenizer = load_golden()
    tokenizer.add_tokens([VIDEO_TAG, "<|later|>"], special_tokens=True)
    encoder = TextEncoder.from_tokenizer(tokenizer)
    later = tokenizer.convert_tokens_to_ids("<|later|>")
    assert later == len(GOLDEN) + 1
    assert encoder.encode(["<|later|><img>"]) == [[later, GOLDEN.convert_tokens_to_ids("<img>")]]


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: tokenizer.add_tokens(["<new>"]),
        lambda tokenizer: tokenizer.add_tokens([AddedToken("<box>", special=False, normalized=False)]),
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.NFKC()),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False)),
        lambda tokenizer: setattr(tokenizer.model, "ignore_merges", True),
        lambda tokenizer: setattr(tokenizer, "post_processor", OPENS_WITH_BOX),
    ],
    ids=["a token", "what is special", "the normalizer", "the splitting", "the merging", "the opening"],
)
def test_the_digest_tells_apart_what_encodes_differently(change: Callable[[Tokenizer], object]) -> None:
    changed = Tokenizer.from_str(GOLDEN.backend_tokenizer.to_str())
    change(changed)
    assert TextEncoder(changed).digest != ENCODER.digest


def test_a_bos_is_found_by_what_the_tokenizer_does() -> None:
    assert ENCODER.bos_token_id is None
    assert TextEncoder.from_tokenizer(load_golden(bos_token="<|endoftext|>")).bos_token_id is None
    encoder = TextEncoder.from_tokenizer(SENTENCE_PIECE)
    assert encoder.bos_token_id == encoder.get_id("<s>")


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("a circle", None),
        ("<", None),
        ("<im", None),
        ("<IMG_context>", None),
        ("".join(GROUNDING_TAGS), None),
        ("<box>[[1, 2]]</box> and </img>", "</img>"),
        ("a<|im_end|><img>", "<|im_end|>"),
        ("<<|endoftext|>", "<|endoftext|>"),
        ("数字<IMG_CONTEXT>", "<IMG_CONTEXT>"),
    ],
)
def test_the_first_control_token_in_a_text_is_found(text: str, token: str | None) -> None:
    assert ENCODER.find_control_token(text) == token


def test_a_token_of_a_template_is_control_even_if_the_tokenizer_calls_it_text() -> None:
    tokenizer = load_golden()
    tokenizer.add_tokens([AddedToken("<|end|>", special=False), AddedToken("<tool>", special=False)])
    assert TextEncoder.from_tokenizer(tokenizer).find_control_token("<tool><|end|>") == "<|end|>"


def test_of_two_control_tokens_at_one_place_the_longer_is_found() -> None:
    tokenizer = load_golden()
    tokenizer.add_tokens(["<img>2", "<im"], special_tokens=True)
    assert TextEncoder.from_tokenizer(tokenizer).find_control_token("<img>2") == "<img>2"


def test_a_control_token_that_normalizing_would_make_is_found() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens([AddedToken("<stop>", normalized=True)])
    assert tokenizer.encode("a＜stop＞").ids == [0, 1]
    assert TextEncoder(tokenizer).find_control_token("a＜stop＞") == "<stop>"


@given(text=st.text(max_size=40) | st.lists(st.sampled_from(["<", ">", "|", "/", "im", "g", "_end", "a"])).map("".join))
def test_text_without_a_control_token_makes_none(text: str) -> None:
    if ENCODER.find_control_token(text) is None:
        assert not set(ENCODER.encode([text])[0]) & (set(GOLDEN.all_special_ids) | {ENCODER.get_id("<IMG_CONTEXT>")})


def test_a_token_that_is_not_there_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"has no token '<\|user\|>'"):
        ENCODER.get_id("<|user|>")
    with pytest.raises(ArgumentError, match=r"lacks <\|end\|>, <\|user\|>\. Add them"):
        ENCODER.check_tokens(frozenset({"<|user|>", "<|end|>", "<img>"}))


def test_a_word_of_the_vocabulary_is_no_token_of_a_template() -> None:
    # Text that spells it need not come out as that one id.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"</s>": 0}, merges=[])))
    with pytest.raises(ArgumentError, match="lacks </s>"):
        TextEncoder.from_tokenizer(tokenizer).check_tokens(frozenset({"</s>"}))


def test_a_folder_is_loaded_with_the_tokens_that_assembling_a_model_adds(tmp_path: Path) -> None:
    assert load_text_encoder(str(GOLDEN_FOLDER)).digest == ENCODER.digest
    train_tokenizer(iter(["How many red circles? There are two.\n"] * 20), 300).save_pretrained(tmp_path)
    assert load_text_encoder(str(tmp_path)).digest == TextEncoder.from_tokenizer(build_smoke()).digest


def test_a_folder_without_a_tokenizer_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=f"tokenizer: {tmp_path} cannot be loaded"):
        load_text_encoder(str(tmp_path))
