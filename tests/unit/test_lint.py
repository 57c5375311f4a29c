"""What is told of data sets before training, and that the indexes made on the way are those of the trainer."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from data_sets import record, write_meta, write_records

from internvl_core.argument_rules import resolve_arguments
from internvl_core.arguments import DataTrainingArguments, ModelArguments
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore
from internvl_core.data.encoding import Encoding
from internvl_core.data.index import open_index
from internvl_core.data.meta import load_meta
from internvl_core.data.mixture import Source
from internvl_core.data.text_encoder import TextEncoder
from internvl_core.errors import ArgumentError, DataError
from internvl_core.inspection import lint as lint_module
from internvl_core.inspection.lint import count_repeated_ids, lint
from internvl_core.inspection.lint_report import DatasetReport, Finding, LintJob, LintReport, MetaJob, TokenizerSource
from internvl_core.inspection.show import show
from internvl_core.inspection.show_job import ShowJob
from internvl_core.inspection.tokenizer_source import load_encoder
from internvl_core.model.load import LoadedModel, build_model
from internvl_core.smoke.components import ComponentsSettings, generate_components
from internvl_core.smoke.digits import DigitsSettings, generate_digits
from tasks.data_table import COLUMNS, data_rows, iter_problem_lines, list_distinct

TOKENIZER = TokenizerSource(str(Path(__file__).parents[1] / "data" / "tokenizer"))
# One token a tile, with the usual patch of 14 px.
SETTINGS = {
    "conv_style": "internvl2_5",
    "force_image_size": 28,
    "max_dynamic_patch": 6,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "max_seq_length": 256,
}
MISSPELT = '{"conversation": []}'
NO_ANSWER = {"conversations": [{"from": "human", "value": "Q"}]}


def build_job(
    path: Path,
    *,
    source: TokenizerSource | None = TOKENIZER,
    is_held_out: bool = False,
    entry: str = "finetune",
    **settings: Any,
) -> MetaJob:
    values = resolve_arguments({**SETTINGS, **settings, "meta_path": str(path)})
    return MetaJob("stage1", str(path), values, source, is_held_out, entry)


def run(
    path: Path, *, num_media: int = 0, counts_ids: bool = False, cache: str = "cache", **changes: Any
) -> list[DatasetReport]:
    job = LintJob(str(path.parent / cache), [build_job(path, **changes)], num_media, counts_ids)
    (meta,) = lint(job).metas
    return list(meta.datasets)


def run_one(path: Path, **changes: Any) -> DatasetReport:
    (dataset,) = run(path, **changes)
    return dataset


def test_a_sound_data_set_is_told_by_its_numbers(tmp_path: Path) -> None:
    records = [record("1.png"), record(["0.png", "1.png"]), "", record()]
    found = run_one(write_meta(tmp_path, {"pets": records}), num_media=9)
    assert (found.num_records, found.num_samples, found.num_bad, found.num_usable) == (3, 3, 0, 3)
    assert found.kinds == {"image": 1, "multi_image": 1, "text": 1}
    assert found.num_tiles == 7 + 4
    assert found.num_tokens is not None
    assert found.max_tokens is not None
    assert found.max_tokens < found.num_tokens <= 3 * found.max_tokens
    assert found.media is not None
    assert (found.media.num_with_media, found.media.num_decoded, found.media.findings) == (2, 2, [])
    assert (found.is_built, found.has_errors) == (True, False)
    assert not run_one(tmp_path / "meta.json").is_built


def test_problems_are_told_by_reason_with_their_first_lines(tmp_path: Path) -> None:
    records = [MISSPELT, record(), *[NO_ANSWER] * 7, MISSPELT, record("nowhere.png")]
    found = run_one(write_meta(tmp_path, {"pets": records}))
    assert found.has_errors
    reasons = {finding.reason: finding for finding in found.findings}
    assert (reasons["no_target"].count, reasons["no_target"].lines) == (7, [3, 4, 5, 6, 7])
    assert (reasons["record"].count, reasons["record"].lines) == (2, [1, 10])
    assert "Did you mean 'conversations'?" in reasons["record"].example
    assert (reasons["missing"].lines, found.num_bad) == ([11], 10)


def test_samples_that_are_too_long_are_no_error_while_others_are_left(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record(), record(answer="long " * 400)]})
    found = run_one(path)
    assert (found.num_too_long, found.too_long_lines, found.num_usable) == (1, [2], 1)
    assert not found.has_errors
    assert run_one(path, max_seq_length=8).has_errors


def test_a_held_out_question_may_be_of_any_length(tmp_path: Path) -> None:
    found = run_one(write_meta(tmp_path, {"pets": [record()]}), is_held_out=True, max_seq_length=8)
    assert (found.num_too_long, found.has_errors) == (None, False)


@pytest.mark.parametrize(
    ("settings", "is_packed"),
    [
        ({"entry": "pretrain"}, True),
        ({"use_packed_ds": True}, True),
        ({}, False),
        ({"entry": "pretrain", "is_held_out": True}, False),
        ({"entry": "pretrain", "source": None}, True),
    ],
)
def test_samples_that_no_pack_holds_are_told_where_the_stage_packs(
    tmp_path: Path, settings: dict[str, Any], is_packed: bool
) -> None:
    path = write_meta(tmp_path, {"pets": [record("0.png"), record("1.png"), record("1.png")]})
    found = run_one(path, num_images_expected=6, **settings)
    assert found.num_too_many_tiles == (2 if is_packed else None)
    assert found.too_many_tiles_lines == ([2, 3] if is_packed else [])
    assert (found.num_usable, found.has_errors) == (1 if is_packed else 3, False)


def test_what_no_pack_holds_is_told_with_its_lines_and_the_limit(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record("0.png"), record("1.png"), record(answer="long " * 400)]})
    jobs = [build_job(path, entry=entry, num_images_expected=6) for entry in ("pretrain", "finetune")]
    metas = list_distinct(lint(LintJob(str(tmp_path / "cache"), jobs)))
    # They read the same index, but leave out different samples.
    assert len(metas) == 2
    too_long = "pets: 1 × too long (line 3): more than max_seq_length, 256; left out, which is no fault"
    too_many = "pets: 1 × too many tiles (line 2): more than num_images_expected, 6; left out, which is no fault"
    assert [list(iter_problem_lines(meta)) for meta in metas] == [[too_long, too_many], [too_long]]
    place = [column.title for column in COLUMNS].index("too large")
    assert [data_rows(meta)[0][place] for meta in metas] == ["2", "1"]


def test_a_sample_that_no_pack_holds_is_shown_as_left_out(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record("1.png")]})
    job = build_job(path, entry="pretrain", num_images_expected=6)
    report = show(ShowJob(job, None, 1, str(tmp_path / "page.html"), str(tmp_path / "cache")))
    assert (report.problem or "").startswith("7 tiles, but a pack holds num_images_expected, 6.")
    assert "more tiles than a pack holds" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_check_counts_what_the_mixture_leaves_out(tmp_path: Path) -> None:
    long = {"answer": "long " * 400}
    records = [record(), record(**long), record("1.png"), record("1.png", **long), MISSPELT]
    path = write_meta(tmp_path, {"pets": records})
    found = run_one(path, num_images_expected=6, entry="pretrain")
    encoder = load_encoder(TOKENIZER, tmp_path / "cache")
    encoding = Encoding.from_arguments(build_job(path).values, encoder=encoder, tokens_per_tile=1)
    (meta,) = load_meta(path)
    source = Source(open_index(meta, encoding, tmp_path / "cache"), max_tokens=256, max_tiles=6)
    assert str(source.index.directory) == found.index_dir
    assert (found.num_too_long, found.too_long_lines) == (source.num_too_long, [2, 4])
    assert (found.num_too_many_tiles, found.too_many_tiles_lines) == (source.num_too_many_tiles, [3])
    assert found.num_usable == len(source.rows) == 1
    left = run_one(write_meta(tmp_path, {"pets": records[1:4]}), num_images_expected=6, entry="pretrain")
    assert (left.num_usable, left.has_errors) == (0, True)


def test_a_data_set_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"empty": [""], "pets": [record()]})
    empty, pets = run(path)
    assert empty.has_errors
    assert "holds no record" in (empty.error or "")
    assert pets.num_records == 1
    (miscounted,) = run(write_meta(tmp_path, {"pets": [record()]}, length=2))
    assert "length is 2" in (miscounted.error or "")


def test_without_a_tokenizer_form_and_tiles_are_looked_at(tmp_path: Path) -> None:
    found = run_one(write_meta(tmp_path, {"pets": [record("1.png"), MISSPELT]}), source=None)
    assert (found.num_tokens, found.max_tokens, found.num_too_long) == (None, None, None)
    assert (found.num_tiles, found.num_bad) == (7, 1)


def test_a_tokenizer_that_is_missing_is_refused(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record()]})
    with pytest.raises(ArgumentError, match=r"/nowhere: no such folder\."):
        run(path, source=TokenizerSource(str(tmp_path / "nowhere")))


def test_a_meta_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such meta file"):
        run(tmp_path / "nowhere.json")


# --- media


def test_a_broken_picture_is_found_by_decoding_alone(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record(), record("broken.png", width=48, height=32), record("1.png")]})
    (tmp_path / "broken.png").write_bytes((tmp_path / "1.png").read_bytes()[:200])
    assert not run_one(path).has_errors
    found = run_one(path, num_media=64)
    assert found.has_errors
    assert found.media is not None
    assert (found.media.num_with_media, found.media.num_decoded, found.media.num_failed) == (2, 2, 1)
    (finding,) = found.media.findings
    assert (finding.reason, finding.lines) == ("media", [2])
    assert "broken.png" in finding.example


def test_a_size_that_is_not_the_pictures_is_found(tmp_path: Path) -> None:
    found = run_one(write_meta(tmp_path, {"pets": [record("1.png", width=16, height=16)]}), num_media=1)
    assert found.media is not None
    (finding,) = found.media.findings
    assert finding.reason == "size_mismatch"
    assert finding.example.startswith("7 tiles, but 1 by the width and height")


def test_a_pick_is_spread_over_the_file_and_the_same_each_time(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record("nowhere.png", width=16, height=16)] * 100})
    picks = []
    for cache in ("first", "second"):
        found = run_one(path, num_media=4, cache=cache)
        assert found.media is not None
        assert (found.media.num_with_media, found.media.num_decoded, found.media.num_failed) == (100, 4, 4)
        picks.append(found.media.findings[0].lines)
    assert picks[0] == picks[1]
    assert [(line - 1) // 25 for line in picks[0]] == [0, 1, 2, 3]


# --- ids


def test_ids_that_come_again_are_counted_and_are_no_error(tmp_path: Path) -> None:
    ids: list[Any] = [1, 2, 1, "1", None, None, 2, 1, ["a"], ["a"]]
    path = write_meta(tmp_path, {"pets": [record(id=identity) for identity in ids]})
    found = run_one(path, counts_ids=True)
    assert (found.num_repeated_ids, found.has_errors) == (4, False)
    assert run_one(path).num_repeated_ids is None


def test_lines_that_are_no_records_have_no_id(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", ["[1]", "{", "3", '{"id": 5}', '{"id": 5}'])
    assert count_repeated_ids(tmp_path / "a.jsonl", 5) == 1


def test_a_line_that_is_too_long_for_a_record_is_not_held_for_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lint_module, "MAX_LINE_BYTES", 100)
    write_records(tmp_path / "a.jsonl", ['{"id": 5}', f'{{"id": 5, "note": "{"x" * 200}"}}', '{"id": 5}'])
    assert count_repeated_ids(tmp_path / "a.jsonl", 3) == 1


# --- reports


def test_a_report_and_a_job_survive_their_way_through_json(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record("1.png"), record("0.png", width=48, height=32), MISSPELT]})
    job = LintJob(str(tmp_path / "cache"), [build_job(path)], num_media=8, counts_ids=True)
    assert LintJob.from_json(json.loads(json.dumps(job.to_json()))) == job
    report = lint(job)
    assert report.metas[0].datasets[0].all_findings[0] == Finding(
        "record", 1, [3], "unknown key 'conversation'. Did you mean 'conversations'?"
    )
    assert LintReport.from_json(json.loads(json.dumps(report.to_json()))) == report


# --- the trainer's own index


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smoke")
    generate_digits(folder / "data", DigitsSettings(num_train=40, num_held_out=20))
    generate_components(folder / "components", folder / "data/annotations", ComponentsSettings())
    return folder


@pytest.fixture(scope="module")
def loaded(smoke: Path) -> LoadedModel:
    return build_model(
        ModelArguments(vision_path=str(smoke / "components/vision"), llm_path=str(smoke / "components/llm")),
        DataTrainingArguments(force_image_size=32),
        cache_dir=smoke / "cache",
        dtype=torch.float32,
    )


def find_in_trainer(smoke: Path, values: dict[str, Any], loaded: LoadedModel) -> list[str]:
    """Open the indexes as a rank does, with the tokenizer and the tile length of the loaded model."""
    encoder = TextEncoder.from_tokenizer(loaded.tokenizer)
    encoding = Encoding.from_arguments(values, encoder=encoder, tokens_per_tile=loaded.tokens_per_tile)
    metas = load_meta(smoke / "data/pretrain.json")
    return [str(open_index(meta, encoding, smoke / "cache").directory) for meta in metas]


def test_the_trainer_finds_the_index_that_was_made_without_the_model(smoke: Path, loaded: LoadedModel) -> None:
    components = TokenizerSource(str(smoke / "components/llm"), str(smoke / "components/vision"))
    job = build_job(smoke / "data/pretrain.json", source=components, force_image_size=32)
    (meta,) = lint(LintJob(str(smoke / "cache"), [job])).metas
    built = [dataset.index_dir for dataset in meta.datasets]
    before = {path: path.stat().st_mtime_ns for path in (smoke / "cache/index").iterdir()}
    assert find_in_trainer(smoke, job.values, loaded) == built
    assert {path: path.stat().st_mtime_ns for path in (smoke / "cache/index").iterdir()} == before


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_checkpoint_gives_the_same_index_as_the_components_it_came_from(
    smoke: Path, loaded: LoadedModel, tmp_path: Path, is_committed: bool
) -> None:
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    source = str(tmp_path / "model")
    if is_committed:
        store = StageStore(f"file://{tmp_path}/store", "stage1", "0" * 64)
        store.publish(tmp_path / "model", step=1, fence=1, kind=CheckpointKind.FINAL, parent=None, info={})
        shutil.rmtree(tmp_path / "model")
        source = store.uri
    job = build_job(smoke / "data/pretrain.json", source=TokenizerSource(source), force_image_size=32)
    (meta,) = lint(LintJob(str(smoke / "cache"), [job])).metas
    assert [dataset.index_dir for dataset in meta.datasets] == find_in_trainer(smoke, job.values, loaded)
