"""The `internvl` command: one clear message and the right exit code for everything that is wrong."""

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import cli
from flows.recipe import load_recipe
from flows.repetition import said_once
from internvl_core.errors import StoreUnavailable
from tasks.stage_plan import check_stage_arguments

LIGHT = ("torch", "transformers", "deepspeed", "peft")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process; return its exit code, its output and its errors."""

    def run_main(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["internvl", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err  # type: ignore[return-value]

    return run_main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run nope", "ArgumentError: recipe nope: neither a file nor a shipped recipe. Shipped: "),
        ("run nowhere/recipe.yaml", "ArgumentError: recipe nowhere/recipe.yaml: neither a file nor"),
        ("check smoke --set foo", "ArgumentError: --set foo: should be a.b=value, such as "),
        ("check smoke --set a=[", "ArgumentError: --set a=[:1:2: not plain YAML: "),
        ("check smoke --set stages.stag2.x=1", "ArgumentError: --set stages.stag2.x: no stage named stag2 (did you "),
        (
            "check smoke --set stages.stage2.arguments.max_step=3",
            "ArgumentError: arguments of stage2: max_step: no such argument. Nearest: max_steps.",
        ),
        ("check smoke --set workspace=3", "ArgumentError: recipe smoke: workspace: 3: Input should be a valid string."),
        ("replay /nowhere sqlite:////x.db", "ArgumentError: /nowhere: holds no spool of a tracked run"),
        ("", "internvl: Missing command. See internvl --help."),
        ("fly", "internvl: No such command 'fly'. See internvl --help."),
        ("run", "internvl run: Missing argument 'recipe'. See internvl run --help."),
        ("run smoke --quickly", "internvl run: No such option: --quickly. See internvl run --help."),
        ("run smoke stage2", "internvl run: Got unexpected extra argument"),
        ("run smoke --set", "internvl: Option '--set' requires an argument. See internvl --help."),
        ("data", "internvl data: Missing command. See internvl data --help."),
        ("data check", "ArgumentError: Give either META, the path of a meta file, or --recipe."),
        ("data check m.json --recipe smoke", "ArgumentError: Give either META, the path of a meta file, or --recipe."),
        ("data check m.json --stage stage2", "ArgumentError: --stage: goes with --recipe. Leave it out."),
        ("data check --recipe nope", "ArgumentError: recipe nope: neither a file nor a shipped recipe. Shipped: "),
        (
            "data check --recipe smoke --tokenizer t",
            "ArgumentError: --tokenizer: with --recipe it is the",
        ),
        ("data check --recipe smoke --stage stag2", "ArgumentError: --stage: no stage stag2 (did you mean stage2?)."),
        ("data check m.json --set max_seq_lengt=1", "ArgumentError: max_seq_lengt: no such argument. Nearest: max_seq"),
        ("data check m.json --set max_seq_length=x", "ArgumentError: max_seq_length: 'x' should be a whole number."),
        ("data check m.json --samples -1", "ArgumentError: --samples: -1 must be at least 0."),
        ("data show m.json --line 0", "ArgumentError: --line: 0 must be at least 1."),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_64(run: Run, arguments: str, message: str) -> None:
    code, output, errors = run(*arguments.split())
    assert (code, output) == (64, "")
    (line,) = errors.splitlines()
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("command", "content", "code", "message"),
    [
        ("check", None, 65, "DataError: META: no such meta file."),
        ("show", "[]", 65, "DataError: META: must be an object with one key per data set"),
        ("index", "{", 65, "DataError: META:1:2: not JSON: "),
        ("index", '{"a": {"root": ".", "annotation": "a.jsonl"}}', 64, "ArgumentError: --tokenizer: missing. An index"),
    ],
)
def test_a_meta_file_that_is_none_is_refused_before_anything_is_started(
    run: Run, tmp_path: Path, command: str, content: str | None, code: int, message: str
) -> None:
    path = tmp_path / "meta.json"
    (tmp_path / "a.jsonl").write_text("{}\n")
    if content is not None:
        path.write_text(content)
    found, output, errors = run("data", command, str(path))
    (line,) = errors.splitlines()
    assert (found, output) == (code, "")
    assert line.startswith(message.replace("META", str(path)))


def test_a_tokenizer_that_is_nowhere_is_refused_before_anything_is_started(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "meta.json").write_text('{"a": {"root": ".", "annotation": "a.jsonl"}}')
    code, _, errors = run("data", "check", str(tmp_path / "meta.json"), "--tokenizer", "no/such/folder")
    assert code == 64
    assert errors.startswith("ArgumentError: --tokenizer: no/such/folder: no such folder, nor could it be the id")


def test_a_tokenizer_in_a_folder_that_is_there_is_not_asked_of_the_hub(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "meta.json").write_text('{"a": {"root": ".", "annotation": "a.jsonl"}}')
    code, _, errors = run("data", "check", "meta.json", "--tokenizer", "models/typo")
    assert code == 64
    assert errors.startswith("ArgumentError: --tokenizer: models/typo: no such folder, nor could it be the id")


def test_all_wrong_arguments_of_all_stages_are_told_at_once(run: Run) -> None:
    wrong = ["--set", "stages.stage1.arguments.learning_rat=1", "--set", "stages.stage2.arguments.sede=1"]
    code, _, errors = run("check", "smoke", *wrong)
    assert code == 64
    assert [line.rpartition("arguments of ")[2].split(":")[0] for line in errors.splitlines()] == ["stage1", "stage2"]


def test_an_error_keeps_the_exit_code_of_its_class(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StoreUnavailable("s3://b does not answer.")

    monkeypatch.setattr("flows.recipe.load_recipe", fail)
    assert run("check", "smoke") == (69, "", "StoreUnavailable: s3://b does not answer.\n")


@pytest.mark.parametrize(("is_delivered", "code"), [(True, 0), (False, 1)])
def test_a_replay_says_by_its_exit_code_whether_all_arrived(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_delivered: bool, code: int
) -> None:
    monkeypatch.setattr("tasks.track_run.replay", lambda *_: is_delivered)
    assert run("replay", str(tmp_path), "sqlite:////x.db")[0] == code


def test_ctrl_c_is_one_line_and_exit_code_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.recipe.load_recipe", interrupt)
    assert run("check", "smoke") == (130, "", "Stopped.\n")


def test_a_fault_of_our_own_keeps_its_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("step")

    monkeypatch.setattr("flows.recipe.load_recipe", fail)
    monkeypatch.setattr(sys, "argv", ["internvl", "check", "smoke"])
    with pytest.raises(KeyError):
        cli.main()


def test_the_smoke_recipe_is_right(run: Run) -> None:
    assert run("check", "smoke") == (0, "smoke: 4 stages, all arguments are right.\n", "")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["recipes"], ["check", "smoke"], ["data", "show", "--help"]]
)
def test_what_starts_nothing_imports_no_torch(arguments: list[str]) -> None:
    program = (
        "import json, sys\n"
        "from flows.cli import main\n"
        f"sys.argv = ['internvl', *{arguments!r}]\n"
        "try:\n    main()\n"
        "finally:\n    print('\\n' + json.dumps([name for name in sys.modules if '.' not in name]))\n"
    )
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    modules = set(json.loads(completed.stdout.splitlines()[-1]))
    assert "typer" in modules
    assert modules.isdisjoint(LIGHT)
    # `check` reads the tasks, which are Prefect's.
    if arguments != ["check", "smoke"]:
        assert modules.isdisjoint({"prefect", "mlflow"})


@pytest.mark.parametrize("api_url", [None, "http://10.0.0.1:4200/api"])
def test_the_commands_that_open_the_uis_can_be_pasted_into_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api_url: str | None
) -> None:
    home = tmp_path / "it's a home"
    settings = types.SimpleNamespace(api=types.SimpleNamespace(url=api_url), home=home)
    monkeypatch.setattr("prefect.settings.get_current_settings", lambda: settings)
    recipe = load_recipe("smoke", {"workspace": str(tmp_path / "my runs")})
    commands = cli._ui_commands(recipe)
    mlflow = commands["MLflow UI"].partition("    then ")[0]
    assert split_in_shell(mlflow)[-1] == f"sqlite:///{tmp_path}/my runs/mlflow.db"
    if api_url:
        assert commands["Prefect UI"] == "http://10.0.0.1:4200"
    else:
        prefect = commands["Prefect UI"].partition("    then ")[0]
        assert split_in_shell(prefect)[1] == f"PREFECT_HOME={home}"


def test_an_mlflow_server_is_its_own_ui_without_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example")
    assert cli._ui_commands(load_recipe("smoke"))["MLflow UI"] == "https://mlflow.example"


def split_in_shell(command: str) -> list[str]:
    """Let a real shell take a command line apart."""
    program = "import json, sys; print(json.dumps(sys.argv[1:]))"
    line = f"{sys.executable} -c '{program}' {command}"
    completed = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    return json.loads(completed.stdout)


def test_a_warning_about_an_argument_is_given_once_a_command(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        caplog.clear()
        assert run("check", "smoke")[0] == 0
        assert [record.name for record in caplog.records] == ["internvl_core.argument_renames"]
    caplog.clear()
    with said_once("internvl_core.argument_renames"):
        for _ in range(2):
            load_and_check("smoke")
    assert len(caplog.records) == 1


def load_and_check(name: str) -> None:
    check_stage_arguments(load_recipe(name).stages, starts_from_checkpoint=False)
