"""Answer held-out questions by greedy generation, each rank its share."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from transformers import GenerationMixin, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from internvl_core.arguments import Arguments
from internvl_core.data.collate import PromptCollator
from internvl_core.data.dataset import Prompt
from internvl_core.data.questions import Question, QuestionEncoder, load_questions
from internvl_core.data.tiles import normalise
from internvl_core.evaluate.examples import Example, choose_examples, merge_examples
from internvl_core.evaluate.score import count_matches, summarize_accuracy

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What a model made of the held-out questions."""

    scores: dict[str, float] = field(default_factory=dict)
    """`accuracy` and `accuracy/<dataset>`, 0 to 1; empty without `eval_meta_path`."""
    examples: list[Example] = field(default_factory=list)


def evaluate_held_out(
    model: GenerationMixin,
    tokenizer: PreTrainedTokenizerBase,
    encoder: QuestionEncoder,
    arguments: Arguments,
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score the model on the held-out meta file by exact match.

    Every rank answers each `world_size`-th question; all return the same. `on_batch` is called
    before each batch of them; what it raises ends the evaluation.
    """
    if arguments.extension.eval_meta_path is None:
        return Evaluation()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    cache_dir = Path(arguments.extension.cache_dir).expanduser()
    questions = load_questions(arguments.extension.eval_meta_path, cache_dir)
    shares = [questions[each::world_size] for each in range(world_size)]
    logger.info("Asking %d held-out questions", len(questions))
    answers = list(iter_answers(model, tokenizer, encoder, shares[rank], arguments, on_batch=on_batch))
    on_batch()
    if is_deepspeed_zero3_enabled():
        _keep_step(model, tokenizer, encoder, shares, rank, arguments)
    correct, asked = count_matches(shares[rank], answers)
    correct, asked = sum(_gather(correct), Counter()), sum(_gather(asked), Counter())
    scores = summarize_accuracy(correct, asked)
    logger.info("Held-out exact match: %s", {name: round(score, 4) for name, score in scores.items()})
    return Evaluation(scores, merge_examples(_gather(choose_examples(shares[rank], answers))))


def iter_answers(
    model: GenerationMixin,
    tokenizer: PreTrainedTokenizerBase,
    encoder: QuestionEncoder,
    questions: list[Question],
    arguments: Arguments,
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> Iterator[str]:
    """Yield the greedy answer to each question, `per_device_eval_batch_size` of them at a time.

    A batch has one chat format's end of an answer: what ends an answer in one is text in another.
    """
    model.eval()
    for end_token_id, batch in _iter_batches(encoder, questions, arguments):
        on_batch()
        prompts = [encoder.encode(question) for question in batch]
        yield from _generate(model, tokenizer, prompts, arguments, end_token_id)


def _iter_batches(
    encoder: QuestionEncoder, questions: list[Question], arguments: Arguments
) -> Iterator[tuple[int, list[Question]]]:
    batch_size = arguments.training.per_device_eval_batch_size
    for end_token_id, group in groupby(questions, key=encoder.get_end_token_id):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            yield end_token_id, alike[start : start + batch_size]


def _keep_step(
    model: GenerationMixin,
    tokenizer: PreTrainedTokenizerBase,
    encoder: QuestionEncoder,
    shares: list[list[Question]],
    rank: int,
    arguments: Arguments,
) -> None:
    """Answer a question for nothing until every rank has generated as often: under ZeRO-3 they need each other."""
    numbers = [sum(1 for _ in _iter_batches(encoder, share, arguments)) for share in shares]
    spare = next(share[:1] for share in shares if share)
    for _ in range(max(numbers) - numbers[rank]):
        list(iter_answers(model, tokenizer, encoder, spare, arguments))


def _generate(
    model: GenerationMixin,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    arguments: Arguments,
    end_token_id: int,
) -> list[str]:
    parameter = next(model.parameters())
    batch = PromptCollator(tokenizer.pad_token_id)(prompts)
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
            eos_token_id=end_token_id,
            pad_token_id=tokenizer.pad_token_id,
            # Ranks that are done go on for those that are not: each holds a share of every parameter.
            synced_gpus=is_deepspeed_zero3_enabled(),
        )
    answers = [_cut(row, end_token_id) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]
    texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return texts


def _cut(token_ids: list[int], end_token_id: int) -> list[int]:
    # Not left to the decoding: some tokenizers do not call the token special, and a pad may be text.
    return token_ids[: token_ids.index(end_token_id)] if end_token_id in token_ids else token_ids


def _gather(value: T) -> list[T]:
    """Gather every rank's value; its own alone where there is no group."""
    if not dist.is_initialized():
        return [value]
    gathered = [value] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
