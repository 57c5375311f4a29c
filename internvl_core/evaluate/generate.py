"""Answer held-out questions by greedy generation, each rank its share."""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import GenerationMixin, PreTrainedTokenizerBase

from internvl_core.arguments import Arguments
from internvl_core.data.collate import PromptCollator
from internvl_core.data.questions import Question, QuestionEncoder, load_questions
from internvl_core.data.tiles import normalise
from internvl_core.evaluate.score import count_matches, summarize_accuracy

logger = logging.getLogger(__name__)

END_OF_TURN = "<|im_end|>"


def evaluate_held_out(
    model: GenerationMixin, tokenizer: PreTrainedTokenizerBase, encoder: QuestionEncoder, arguments: Arguments
) -> dict[str, float]:
    """Score the model on the held-out meta file by exact match.

    Every rank answers each `world_size`-th question; all return the same scores.

    Returns:
        `accuracy` and `accuracy/<dataset>`, 0 to 1; empty without `eval_meta_path`.
    """
    if arguments.extension.eval_meta_path is None:
        return {}
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    cache_dir = Path(arguments.extension.cache_dir).expanduser()
    questions = load_questions(arguments.extension.eval_meta_path, cache_dir)[rank::world_size]
    answers = list(iter_answers(model, tokenizer, encoder, questions, arguments))
    correct, asked = count_matches(questions, answers)
    if dist.is_initialized():
        correct, asked = _sum_over_ranks(correct), _sum_over_ranks(asked)
    scores = summarize_accuracy(correct, asked)
    logger.info("Held-out exact match: %s", {name: round(score, 4) for name, score in scores.items()})
    return scores


def iter_answers(
    model: GenerationMixin,
    tokenizer: PreTrainedTokenizerBase,
    encoder: QuestionEncoder,
    questions: list[Question],
    arguments: Arguments,
) -> Iterator[str]:
    """Yield the greedy answer to each question, `per_device_eval_batch_size` of them at a time."""
    model.eval()
    collate = PromptCollator(tokenizer.pad_token_id)
    parameter = next(model.parameters())
    batch_size = arguments.training.per_device_eval_batch_size
    for start in range(0, len(questions), batch_size):
        prompts = [encoder.encode(question) for question in questions[start : start + batch_size]]
        batch = collate(prompts)
        inputs = {name: batch[name].to(parameter.device) for name in ("input_ids", "attention_mask")}
        if "pixel_values" in batch:
            tiles = batch["pixel_values"].to(parameter.device)
            inputs["pixel_values"] = normalise(tiles, arguments.data.normalize_type, parameter.dtype)
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                max_new_tokens=arguments.extension.eval_max_new_tokens,
                # Greedy whatever generation config the model came with: those of chat models penalise repetition.
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                use_cache=True,
                eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TURN),
                pad_token_id=tokenizer.pad_token_id,
            )
        yield from tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _sum_over_ranks(counts: Counter[str]) -> Counter[str]:
    gathered: list[Counter[str]] = [Counter()] * dist.get_world_size()
    dist.all_gather_object(gathered, counts)
    return sum(gathered, Counter())
