"""Small tokenizers of the two families that InternVL's language models have, with all tokens of all templates."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from internvl_core.data.templates import CHAT_TOKENS, SPECIAL_TOKENS

GOLDEN_FOLDER = Path(__file__).parents[1] / "data" / "tokenizer"


def load_golden(**changes: Any) -> PreTrainedTokenizerBase:
    """Load Qwen2's kind, with ChatML's tokens and InternVL's."""
    return AutoTokenizer.from_pretrained(GOLDEN_FOLDER, **changes)


def load_golden_with_chat_tokens() -> PreTrainedTokenizerBase:
    tokenizer = load_golden()
    tokenizer.add_tokens(sorted(CHAT_TOKENS), special_tokens=True)
    return tokenizer


def train_sentence_piece() -> PreTrainedTokenizerBase:
    """Train Llama's and InternLM2's kind: spaces are letters, a BOS opens every text.

    Its chat tokens swallow white space on their right, as those of Phi-3 do.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # Only while it learns: a piece has its space in front or none, as sentencepiece has it.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    text = "▁the▁red▁circle▁and▁the▁blue▁square\nuser\nassistant\n▁<human>:▁a▁<bot>:▁b"
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", *alphabet], show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator([text] * 9, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken(token, rstrip=True, special=True) for token in sorted(CHAT_TOKENS)])
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
