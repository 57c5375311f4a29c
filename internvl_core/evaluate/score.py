"""Score answers by exact match."""

from collections import Counter
from collections.abc import Iterable

from internvl_core.data.questions import Question


def is_exact_match(answer: str, expected: str) -> bool:
    """Compare without surrounding white space; case and everything inside counts."""
    return answer.strip() == expected.strip()


def summarize_accuracy(correct: Counter[str], asked: Counter[str]) -> dict[str, float]:
    """Turn counts per held-out data set into `accuracy` (over all questions) and `accuracy/<dataset>`."""
    if not asked:
        return {}
    scores = {f"accuracy/{dataset}": correct[dataset] / count for dataset, count in sorted(asked.items())}
    return {"accuracy": correct.total() / asked.total(), **scores}


def count_matches(questions: Iterable[Question], answers: Iterable[str]) -> tuple[Counter[str], Counter[str]]:
    """Count correct and asked questions per data set."""
    correct: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for question, answer in zip(questions, answers, strict=True):
        asked[question.meta.name] += 1
        correct[question.meta.name] += is_exact_match(answer, question.answer)
    return correct, asked
