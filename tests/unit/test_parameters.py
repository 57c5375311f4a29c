"""The form of the deployed flows: what the server lets through, and what becomes of it."""

from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate

from flows.finetune import finetune
from flows.finetune_nightly import finetune_nightly
from flows.parameters import merge_overrides
from flows.pretrain import pretrain
from tasks.stage import Launcher


@pytest.fixture(params=[pretrain, finetune], ids=["pretrain", "finetune"])
def schema(request: pytest.FixtureRequest) -> dict[str, Any]:
    return parameter_schema(request.param).model_dump_for_openapi()


def refuse(schema: dict[str, Any], parameters: dict[str, Any]) -> list[str]:
    return [error.message for error in validate(parameters, schema)]


@pytest.mark.parametrize(
    "parameters",
    [
        {"recipe": "smoke"},
        {"recipe": "/data/mine.yaml", "stages": ["stage1", "stage1.5"], "is_fresh": True},
        {"recipe": "smoke", "start_from": "s3://bucket/runs/stage2-0123456789abcdef"},
        {"recipe": "smoke", "launcher": {"nproc_per_node": 8}, "store_uri": "/data/store"},
        {"recipe": "smoke", "tracking_uri": "http://127.0.0.1:5000", "overrides": {"stages.a.arguments.x": [1]}},
    ],
)
def test_right_parameters_pass(schema: dict[str, Any], parameters: dict[str, Any]) -> None:
    assert refuse(schema, parameters) == []


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"recipe": "smokee"},
        {"recipe": "smoke", "stages": ["Stage 1"]},
        {"recipe": "smoke", "start_from": "http://127.0.0.1/x"},
        {"recipe": "smoke", "store_uri": "runs"},
        {"recipe": "smoke", "tracking_uri": "databricks"},
        {"recipe": "smoke", "tracking_uri": "http://user:pa55@127.0.0.1:5000"},
        {"recipe": "smoke", "tracking_uri": "http://127.0.0.1:5000/?token=pa55"},
        {"recipe": "smoke", "store_uri": "s3://key:pa55@bucket/runs"},
        {"recipe": "smoke", "start_from": "s3://bucket/runs?signature=pa55"},
        {"recipe": "smoke", "launcher": {"nproc_per_node": 0}},
        {"recipe": "smoke", "launcher": {"gpus": 8}},
        {"recipe": "smoke", "overrides": "x=1"},
        {"recipe": "smoke", "is_fresh": "perhaps"},
    ],
)
def test_wrong_parameters_are_refused_before_a_run_is_made(schema: dict[str, Any], parameters: dict[str, Any]) -> None:
    assert refuse(schema, parameters) != []


@pytest.mark.parametrize("flow", [pretrain, finetune, finetune_nightly], ids=lambda flow: flow.name)
def test_every_field_of_the_form_is_described_and_the_recipe_is_picked(flow: Any) -> None:
    schema = parameter_schema(flow).model_dump_for_openapi()
    fields = schema["properties"]
    assert [name for name, field in fields.items() if not field.get("description")] == []
    assert sorted(fields, key=lambda name: fields[name]["position"])[0] == "recipe"
    shipped, _ = fields["recipe"]["anyOf"]
    assert {"smoke", "internvl2_5-8b"} <= set(shipped["enum"])
    # Prefect's form cannot edit a discriminated union.
    assert "oneOf" not in str(schema)


def test_fields_of_the_form_come_before_overrides() -> None:
    none: dict[str, Any] = {"start_from": None, "launcher": None, "store_uri": None, "tracking_uri": None}
    assert merge_overrides({}, **none) == {}
    merged = merge_overrides(
        {"launcher.nproc_per_node": 4, "store_uri": "/b"},
        **{**none, "store_uri": "/a", "launcher": Launcher(nproc_per_node=2)},
    )
    assert merged["store_uri"] == "/b"
    assert merged["launcher"]["nproc_per_node"] == 2
    assert list(merged).index("launcher") < list(merged).index("launcher.nproc_per_node")


@pytest.mark.parametrize(
    "parameters", [{"model": "a/b"}, {"keep_last": 0}, {"start_from": "champion"}, {"is_fresh": "perhaps"}]
)
def test_wrong_parameters_of_a_nightly_finetune_are_refused(parameters: dict[str, Any]) -> None:
    schema = parameter_schema(finetune_nightly).model_dump_for_openapi()
    assert refuse(schema, {"recipe": "smoke-nightly"}) == []
    assert refuse(schema, {"recipe": "smoke-nightly", **parameters}) != []
