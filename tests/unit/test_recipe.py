"""Recipes: what loads, what is refused and with which words, and what an override changes."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flows.overrides import apply_override, parse_overrides
from flows.recipe import Recipe, list_recipes, load_recipe
from flows.strict_yaml import parse_yaml
from internvl_core.errors import ArgumentError
from tasks.stage_plan import check_stage_arguments, resolve_stage

RECIPE: dict[str, Any] = {
    "name": "small",
    "workspace": "/runs/small",
    "launcher": {"nproc_per_node": 2},
    "arguments": {"conv_style": "internvl2_5", "meta_path": "{workspace}/data/meta.json", "learning_rate": 1e-4},
    "stages": [
        {"name": "stage1", "entry": "pretrain", "arguments": {"vision_path": "/models/v", "llm_path": "/models/l"}},
        {"name": "stage1.5", "entry": "pretrain", "arguments": {"learning_rate": 1e-5}},
    ],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path, RECIPE)


def write(directory: Path, content: Any) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def refuse(path: Path, *items: str) -> list[str]:
    """Load a recipe that is wrong; return the lines of the refusal without the recipe's name."""
    with pytest.raises(ArgumentError) as caught:
        load_recipe(str(path), parse_overrides(list(items)))
    lines = str(caught.value).splitlines()
    assert all(line.startswith((f"recipe {path}: ", "--set ")) for line in lines), lines
    return [line.removeprefix(f"recipe {path}: ") for line in lines]


@pytest.mark.parametrize("name", list_recipes())
def test_a_shipped_recipe_loads_and_its_arguments_are_right(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    check_stage_arguments(recipe.stages, starts_from_checkpoint=recipe.start_from is not None)


def test_a_recipe_that_is_nowhere_is_refused_with_the_nearest_shipped_one() -> None:
    with pytest.raises(ArgumentError, match=r"^recipe smok: neither a file .*did you mean smoke\?.* Shipped: .*smoke"):
        load_recipe("smok")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    assert "neither a file nor a shipped recipe" in refuse(tmp_path)[0]


def test_a_binary_file_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as UTF-8 text" in refuse(path)[0]


def test_stages_get_the_recipes_arguments_and_launcher_below_their_own(path: Path) -> None:
    first, second = load_recipe(str(path)).stages
    assert first.arguments["learning_rate"] == 1e-4
    assert second.arguments["learning_rate"] == 1e-5
    assert {first.launcher.nproc_per_node, second.launcher.nproc_per_node} == {2}


def test_a_stage_changes_one_key_of_the_launcher_and_keeps_the_rest(path: Path) -> None:
    overrides = {"launcher.kind": "local", "stages.stage1.launcher.nproc_per_node": 4}
    first, second = load_recipe(str(path), overrides).stages
    assert (first.launcher.nproc_per_node, second.launcher.nproc_per_node) == (4, 2)


def test_the_workspace_stands_for_itself_in_every_argument_and_uri(path: Path) -> None:
    overrides = {
        "store_uri": "file://{workspace}/elsewhere",
        "stages.stage1.arguments.report_to": ["{workspace}", {"a": "{workspace}/b"}],
    }
    recipe = load_recipe(str(path), overrides)
    assert recipe.store == "file:///runs/small/elsewhere"
    assert recipe.stages[1].arguments["meta_path"] == "/runs/small/data/meta.json"
    assert recipe.stages[0].arguments["report_to"] == ["/runs/small", {"a": "/runs/small/b"}]


def test_a_relative_workspace_starts_at_the_current_directory(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(str(path), {"workspace": "runs/mine"})
    assert recipe.directory == tmp_path / "runs/mine"
    assert recipe.store == f"file://{tmp_path}/runs/mine/store"
    assert recipe.tracking == f"sqlite:///{tmp_path}/runs/mine/mlflow.db"


def test_a_tilde_in_the_workspace_is_the_home_directory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load_recipe(str(path), {"workspace": "~/runs"}).workspace == "/home/somebody/runs"


@pytest.mark.parametrize(
    ("item", "complaint"),
    [
        ("nme=x", "nme: no such key (did you mean name?). Known: name, description, "),
        ("name=Bad Name", "name: 'Bad Name': String should match pattern"),
        ("workspace=3", "workspace: 3: Input should be a valid string."),
        ("workspace=", "workspace: None: Input should be a valid string."),
        ("workspace=''", "workspace: '': String should have at least 1 character."),
        ("stages=3", "stages: 3: Input should be a valid list."),
        ("stages=[]", "stages: []: List should have at least 1 item after validation, not 0."),
        ("stages=[3]", "stages.#1: 3: Input should be a valid dictionary"),
        ("stages=[{entry: pretrain, arguments: {}}]", "stages.#1.name: missing. It is: Names the stage's directory"),
        ("launcher=3", "launcher: 3: Input should be a valid dictionary"),
        ("launcher.nproc_per_node=two", "launcher.nproc_per_node: 'two': Input should be a valid integer"),
        ("launcher.kind=slurm", "launcher: kind slurm is not built yet. Use local."),
        ("arguments=3", "arguments: 3: Input should be a valid dictionary."),
        ("stages.stage1.arguments=3", "stages.stage1.arguments: 3: Input should be a valid dictionary."),
        ("stages.stage1.5.entry=train", "stages.stage1.5.entry: 'train': Input should be 'pretrain', 'finetune' or"),
        ("stages.stage1.5.enty=x", "stages.stage1.5.enty: no such key (did you mean entry?)."),
        ("stages.stage1.gate.metric=accuracy", "stages.stage1.gate.at_least: missing. It is: Smallest score"),
        ("stages.stage1.gate.at_most=1", "stages.stage1.gate.at_most: no such key (did you mean at_least?)."),
        ("retry_delays_s=[-1]", "retry_delays_s.0: -1: Input should be greater than or equal to 0."),
        ("stages.stage1.start_from=s3://b/x", "stages.stage1: names both start_from and a model of its own."),
        ("stages.stage1.5.name=stage1", "stages: names must differ, but are stage1, stage1."),
    ],
)
def test_a_wrong_value_is_refused_at_its_place(path: Path, item: str, complaint: str) -> None:
    lines = refuse(path, item)
    assert any(line.startswith(complaint) for line in lines), lines


@pytest.mark.parametrize("item", ["launcher=3", "launcher.nproc_per_node=two", "launcher.kind=slurm"])
def test_a_wrong_default_is_said_once_and_not_for_every_stage(path: Path, item: str) -> None:
    assert len(refuse(path, item)) == 1


def test_all_problems_are_in_one_message(path: Path) -> None:
    lines = refuse(path, "nme=x", "stages.stage1.entry=train", "stages.stage1.5.gate.at_least=7")
    assert [line.partition(": ")[0] for line in lines if "missing" not in line] == [
        "stages.stage1.entry",
        "stages.stage1.5.gate.at_least",
        "nme",
    ]


def test_a_long_value_is_cut_in_the_message(path: Path) -> None:
    (line,) = refuse(path, f"name={'X' * 5000}")
    assert len(line) < 200


def test_a_first_stage_without_a_start_is_refused_and_start_from_heals_it(tmp_path: Path) -> None:
    path = write(tmp_path, {**RECIPE, "stages": RECIPE["stages"][1:]})
    assert refuse(path)[0].startswith("stages.stage1.5: has nothing to start from.")
    assert load_recipe(str(path), {"start_from": "file:///store/stage1"}).start_from == "file:///store/stage1"


@pytest.mark.parametrize("text", ["3", "- a", "''", ""])
def test_a_document_that_is_no_mapping_is_no_recipe(tmp_path: Path, text: str) -> None:
    assert refuse(write(tmp_path, text)) == ["should be a mapping with name, workspace and stages."]


# --- overrides


def test_an_override_reaches_the_stage_of_that_name_even_with_a_dot_in_it(path: Path) -> None:
    overrides = parse_overrides(["stages.stage1.5.arguments.max_steps=7", "stages.stage1.arguments.max_steps=3"])
    first, second = load_recipe(str(path), overrides).stages
    assert (first.arguments["max_steps"], second.arguments["max_steps"]) == (3, 7)


def test_an_override_of_a_shared_argument_is_weaker_than_the_stages_own(path: Path) -> None:
    first, second = load_recipe(str(path), {"arguments.learning_rate": 5.0}).stages
    assert (first.arguments["learning_rate"], second.arguments["learning_rate"]) == (5.0, 1e-5)


def test_a_mapping_that_is_missing_is_made(path: Path) -> None:
    items = ["stages.stage1.gate.metric=accuracy", "stages.stage1.gate.at_least=0.5"]
    gate = load_recipe(str(path), parse_overrides(items)).stages[0].gate
    assert gate is not None
    assert (gate.metric, gate.at_least) == ("accuracy", 0.5)


@pytest.mark.parametrize(
    ("item", "complaint"),
    [
        ("stages.stag1.entry=x", "no stage named stag1 (did you mean stage1?). Stages: stage1, stage1.5."),
        ("stages.qqq.entry=x", "no stage named qqq. Stages: stage1, stage1.5."),
        ("stages.stage1=3", "is a whole stage. Name a key of it: stages.stage1.arguments.max_steps=100."),
        ("name.first=x", "name is 'small', which has no keys below it."),
        ("stages.stage1.arguments.vision_path.a=x", "vision_path is '/models/v', which has no keys below it."),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(path: Path, item: str, complaint: str) -> None:
    assert refuse(path, item) == [f"--set {item.partition('=')[0]}: {complaint}"]


@pytest.mark.parametrize("item", ["foo", "=3", "a..b=3", ".a=3", "a.=3", ""])
def test_an_override_without_path_or_value_is_refused(item: str) -> None:
    with pytest.raises(ArgumentError, match=r"should be a\.b=value"):
        parse_overrides([item])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("True", True),
        ("", None),
        ("null", None),
        ("'3'", "3"),
        ("a=b", "a=b"),
        ("[1, b]", [1, "b"]),
        ("{a: 1}", {"a": 1}),
        ("s3://bucket/x", "s3://bucket/x"),
    ],
)
def test_the_value_of_an_override_is_yaml(text: str, value: Any) -> None:
    assert parse_overrides([f"a.b={text}"]) == {"a.b": value}


def test_a_value_that_is_not_yaml_is_refused_in_one_line() -> None:
    with pytest.raises(ArgumentError, match=r"^--set a=\[:1:2: not plain YAML: [^\n]*$"):
        parse_overrides(["a=["])


def test_the_exponent_that_yaml_reads_as_text_is_a_number_in_the_arguments(tmp_path: Path) -> None:
    text = yaml.safe_dump(RECIPE).replace("1.0e-05", "1e-5")
    assert "1e-5" in text
    stage = load_recipe(str(write(tmp_path, text)), parse_overrides(["arguments.weight_decay=1e-3"])).stages[1]
    values = resolve_stage(stage, has_parent=True)
    assert (values["learning_rate"], values["weight_decay"]) == (1e-5, 1e-3)


KEYS = st.text("abcdefgh_", min_size=1, max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(keys=st.lists(KEYS, min_size=1, max_size=4), value=VALUES, before=st.dictionaries(KEYS, st.integers()))
def test_an_override_sets_exactly_its_path(keys: list[str], value: Any, before: dict[str, int]) -> None:
    before = {key: kept for key, kept in before.items() if key != keys[0]}
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n")
    content = dict(before)
    for path, read in parse_overrides([f"{'.'.join(keys)}={text}"]).items():
        apply_override(content, path, read)
    expected: Any = value
    for key in reversed(keys):
        expected = {key: expected}
    assert content == {**before, **expected}


# --- YAML


def test_a_key_that_is_there_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"^here:3:1: the key name is there twice, first in line 1\. Remove one\.$"):
        parse_yaml("name: a\nworkspace: b\nname: c\n", where="here")


def test_a_key_twice_is_refused_at_any_depth() -> None:
    with pytest.raises(ArgumentError, match="the key lr is there twice"):
        parse_yaml("a: [{b: {lr: 1, lr: 2}}]", where="here")


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system ['true']", "a: !!python/name:os.system", "a: !unknown 3", "a: &x [*x]"],
)
def test_nothing_but_plain_data_is_built(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"^here"):
        parse_yaml(text, where="here")


@pytest.mark.parametrize("merge", ["", "<<: "])
def test_a_document_that_grows_when_it_is_read_is_refused(merge: str) -> None:
    opening, closing = ("{<<: [", "]}") if merge else ("[", "]")
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {opening}{', '.join([f'*a{n - 1}'] * 10)}{closing}" for n in range(1, 20)]
    with pytest.raises(ArgumentError, match="more than 100000 values"):
        parse_yaml("\n".join(lines), where="here")


def test_a_document_nested_too_deeply_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^here: nested too deeply"):
        parse_yaml("[" * 5000 + "]" * 5000, where="here")


@pytest.mark.parametrize("text", ["a: 2026-13-45", "a: \0", "a: [", "a: b: c", "--- 1\n--- 2\n", "a: *nowhere"])
def test_what_is_not_yaml_is_one_line(text: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse_yaml(text, where="here")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("here")


def test_what_an_alias_names_twice_changes_only_where_it_is_overridden(tmp_path: Path) -> None:
    text = """
name: aliased
workspace: /runs
stages:
  - {name: a, entry: pretrain, arguments: &common {model_name_or_path: m, max_steps: 1}}
  - {name: b, entry: pretrain, arguments: *common}
"""
    first, second = load_recipe(str(write(tmp_path, text)), {"stages.b.arguments.max_steps": 9}).stages
    assert (first.arguments["max_steps"], second.arguments["max_steps"]) == (1, 9)


@given(VALUES.filter(lambda value: not isinstance(value, str)))
def test_plain_data_reads_as_pyyaml_reads_it(value: Any) -> None:
    text = yaml.safe_dump(value)
    assert parse_yaml(text, where="here") == yaml.safe_load(text)


def test_every_field_of_a_recipe_tells_what_it_is() -> None:
    assert [name for name, field in Recipe.model_fields.items() if not field.description] == []


@pytest.fixture
def longer(tmp_path: Path) -> Path:
    stage2 = {"name": "stage2", "entry": "pretrain", "arguments": {}}
    return write(tmp_path, {**RECIPE, "stages": [*RECIPE["stages"], stage2]})


@pytest.mark.parametrize(
    ("only", "start_from", "kept"),
    [
        (None, None, ["stage1", "stage1.5", "stage2"]),
        ([], None, ["stage1", "stage1.5", "stage2"]),
        (["stage1.5"], None, ["stage1", "stage1.5"]),
        (["stage1.5"], "/runs/stage1-0123456789abcdef", ["stage1.5"]),
        (["stage2", "stage1.5"], "/runs/stage1-0123456789abcdef", ["stage1.5", "stage2"]),
    ],
)
def test_a_run_of_some_stages_keeps_them_and_what_they_start_from(
    longer: Path, only: list[str] | None, start_from: str | None, kept: list[str]
) -> None:
    overrides = {"start_from": start_from} if start_from else {}
    recipe = load_recipe(str(longer), overrides, only_stages=only)
    assert [stage.name for stage in recipe.stages] == kept


def test_a_start_that_the_recipe_names_itself_is_the_first_stage_s_and_cuts_none(tmp_path: Path) -> None:
    stages = [{"name": name, "entry": "finetune", "arguments": {}} for name in ("first", "second")]
    path = write(tmp_path, {**RECIPE, "start_from": "/runs/stage2-0123456789abcdef", "stages": stages})
    recipe = load_recipe(str(path), only_stages=["second"])
    assert [stage.name for stage in recipe.stages] == ["first", "second"]


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (["stage3"], "no stage named stage3 (did you mean stage2?). Stages: stage1, stage1.5, stage2."),
        (["stage1", "stage2"], "stages stage1, stage2 leave out stage1.5 between them. Add it."),
    ],
)
def test_stages_that_are_not_there_or_do_not_follow_one_another_are_refused(
    longer: Path, only: list[str], message: str
) -> None:
    with pytest.raises(ArgumentError) as caught:
        load_recipe(str(longer), only_stages=only)
    assert str(caught.value) == f"recipe {longer}: {message}"


def test_metrics_go_where_the_recipe_says_or_else_the_environment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert load_recipe(str(path)).tracking == "sqlite:////runs/small/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert load_recipe(str(path)).tracking == "http://127.0.0.1:5000"
    assert load_recipe(str(path), {"tracking_uri": "sqlite:////m.db"}).tracking == "sqlite:////m.db"


def test_a_recipe_with_two_starts_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {**RECIPE, "start_from": "s3://b/x"})
    with pytest.raises(ArgumentError, match=r"start_from: would be ignored, for stages\.stage1 names"):
        load_recipe(str(path))


def test_a_start_that_the_caller_gives_takes_the_place_of_the_recipe_s_own(path: Path) -> None:
    assert load_recipe(str(path)).stages[0].brings_own_weights
    recipe = load_recipe(str(path), {"start_from": "s3://b/x"})
    assert recipe.start_from == "s3://b/x"
    assert not recipe.stages[0].brings_own_weights
    check_stage_arguments(recipe.stages, starts_from_checkpoint=True)


def test_a_password_in_the_address_of_mlflow_is_refused_and_not_repeated(path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"tracking_uri: should be http.* without a user, a password or") as caught:
        load_recipe(str(path), {"tracking_uri": "http://admin:pa55@127.0.0.1:5000"})
    assert "pa55" not in str(caught.value)
