from collections import Counter

import pytest

from internvl_core.data.meta import DatasetMeta
from internvl_core.data.questions import Question
from internvl_core.data.records import ParsedRecord, Record
from internvl_core.evaluate.score import count_matches, is_exact_match, summarize_accuracy


def ask(dataset: str, answer: str) -> Question:
    meta = DatasetMeta(dataset, root="/", annotation="/a.jsonl")
    return Question(meta, Record(dataset, "/a.jsonl", 1, ParsedRecord(())), answer)


@pytest.mark.parametrize(
    ("answer", "is_match"), [("7", True), (" 7\n", True), ("7.", False), ("17", False), ("", False)]
)
def test_an_answer_matches_up_to_surrounding_white_space(answer: str, is_match: bool) -> None:
    assert is_exact_match(answer, "7") is is_match


def test_case_and_inner_white_space_count() -> None:
    assert not is_exact_match("Yes", "yes")
    assert not is_exact_match("a  cat", "a cat")


def test_matches_are_counted_per_data_set() -> None:
    questions = [ask("digit", "7"), ask("even", "no"), ask("digit", "3")]
    assert count_matches(questions, ["7", "yes", "4"]) == ({"digit": 1, "even": 0}, {"digit": 2, "even": 1})


def test_every_question_needs_its_answer() -> None:
    with pytest.raises(ValueError, match="shorter"):
        count_matches([ask("digit", "7"), ask("digit", "8")], ["7"])


def test_accuracy_is_over_all_questions_and_not_over_data_sets() -> None:
    scores = summarize_accuracy(Counter(a=1), Counter(a=1, b=3))
    assert scores == {"accuracy": 0.25, "accuracy/a": 1.0, "accuracy/b": 0.0}


def test_no_questions_have_no_accuracy() -> None:
    assert summarize_accuracy(Counter(), Counter()) == {}
