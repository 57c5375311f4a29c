import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_internvl import build_tiny_model
from torch import Tensor

from internvl_core.errors import ArgumentError, DiskFull
from internvl_core.model.weights import (
    LazyTensor,
    from_state_dict,
    open_weights,
    to_module_names,
    to_published_names,
    write_weights,
)


def make_state() -> dict[str, Tensor]:
    """Tensors of several types and of sizes that leave the next one unaligned, unless the file is in order."""
    torch.manual_seed(0)
    return {
        "b.half": torch.randn(3, 5).bfloat16(),
        "a.scalar": torch.tensor(2.5),
        "c.view": torch.randn(4, 6).T,
        "d.numbers": torch.arange(7),
        "e.flag": torch.tensor([True, False, True]),
        "f.empty": torch.zeros(0, 4),
        "a.tensor": torch.randn(9),
    }


def check_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def read_all(weights: dict[str, LazyTensor]) -> dict[str, Tensor]:
    return {name: tensor.read() for name, tensor in weights.items()}


def check_refused(folder: Path, *parts: str) -> None:
    with pytest.raises(ArgumentError) as refusal:
        open_weights(folder)
    message = str(refusal.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_weights(from_state_dict(make_state()), tmp_path, max_shard_bytes=60)
    return tmp_path


def test_a_file_is_byte_for_byte_what_the_librarys_own_writer_makes(tmp_path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in make_state().items()}
    assert write_weights(from_state_dict(state), tmp_path) == ["model.safetensors"]
    save_file(state, tmp_path / "library.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), cap=st.integers(4, 100))
def test_shards_hold_every_tensor_once_and_none_is_longer_than_the_cap(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], cap: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    state = {f"tensor{number}": torch.full((size,), float(number)) for number, size in enumerate(sizes)}
    names = write_weights(from_state_dict(state), folder, max_shard_bytes=cap)
    files = [name for name in names if name.endswith(".safetensors")]
    loaded = [load_file(folder / name) for name in files]
    for shard in loaded:
        assert len(shard) == 1 or sum(4 * tensor.numel() for tensor in shard.values()) <= cap
    check_equal({name: tensor for shard in loaded for name, tensor in shard.items()}, state)
    assert sum(map(len, loaded)) == len(state)
    check_equal(read_all(open_weights(folder)), state)
    if len(files) > 1:
        assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
        index = json.loads((folder / names[-1]).read_text())
        assert names[-1] == "model.safetensors.index.json"
        assert index["metadata"]["total_size"] == 4 * sum(sizes)
        assert all(name in loaded[files.index(file)] for name, file in index["weight_map"].items())


def test_a_cast_changes_floating_point_numbers_only(tmp_path: Path) -> None:
    state = make_state()
    write_weights(from_state_dict(state), tmp_path, dtype=torch.float16)
    expected = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    check_equal(read_all(open_weights(tmp_path)), expected)


def test_an_opened_file_says_shapes_and_types_without_being_read(shards: Path) -> None:
    weights = open_weights(shards)
    for name, tensor in make_state().items():
        assert (weights[name].shape, weights[name].dtype) == (tuple(tensor.shape), tensor.dtype)
    assert list(weights) == sorted(weights)


def test_one_tensor_at_a_time_is_in_memory_while_a_folder_is_written(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def read() -> Tensor:
        nonlocal most
        tensor = torch.ones(4)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    weights = {f"tensor{number}": LazyTensor((4,), torch.float32, read) for number in range(6)}
    write_weights(weights, tmp_path, max_shard_bytes=48)
    assert len(alive) == 6
    # The one that was written goes when the next one has come.
    assert most <= 2


def test_each_finished_file_is_handed_over_and_may_be_removed(tmp_path: Path) -> None:
    seen: dict[str, int] = {}

    def take(path: Path) -> None:
        if path.suffix == ".safetensors":
            seen[path.name] = len(load_file(path))
        path.unlink()

    state = make_state()
    names = write_weights(from_state_dict(state), tmp_path, max_shard_bytes=60, on_file=take)
    assert list(seen) == names[:-1]
    assert sum(seen.values()) == len(state)
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_is_not_as_announced_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not as announced"):
        write_weights({"a": LazyTensor((3,), torch.float32, lambda: torch.ones(2))}, tmp_path)


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match="no room for the weights"):
        write_weights(from_state_dict({"a": torch.zeros(1 << 20)}), tmp_path)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_pickled_folder_reads_as_the_same(tmp_path: Path, is_sharded: bool) -> None:
    state = make_state()
    if is_sharded:
        places = {name: f"pytorch_model-{name[0]}.bin" for name in state}
        for file in set(places.values()):
            torch.save({name: state[name] for name in state if places[name] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    check_equal(read_all(open_weights(tmp_path)), dict(sorted(state.items())))


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (print, ("boom",))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Bomb()}, tmp_path / "pytorch_model.bin")
    check_refused(tmp_path, "pytorch_model.bin is no file of weights")
    assert "boom" not in capsys.readouterr().out


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    check_refused(tmp_path, str(tmp_path), "holds no weights")


def test_a_missing_shard_is_named(shards: Path) -> None:
    (shards / "model-00002-of-00004.safetensors").unlink()
    check_refused(shards, "model-00002-of-00004.safetensors is missing", "model.safetensors.index.json")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "model.safetensors"
    write_weights(from_state_dict(make_state()), tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    check_refused(tmp_path, f"{path} is no file of weights, or cut off")


@pytest.mark.parametrize("kept", [0, 100, -30])
def test_a_pickle_that_is_cut_off_is_named(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(make_state(), path)
    path.write_bytes(path.read_bytes()[:kept])
    check_refused(tmp_path, f"{path} is no file of weights, or cut off")


def change_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


def test_an_index_that_names_more_than_there_is_is_refused(shards: Path) -> None:
    change_index(shards, lambda places: places.update({"z.more": places["c.view"]}))
    check_refused(shards, "has no tensor z.more (1 missing)")


def test_an_index_that_leads_out_of_the_folder_is_refused(shards: Path) -> None:
    change_index(shards, lambda places: places.update({"a.tensor": "../model.safetensors"}))
    check_refused(shards, "leads out of its folder")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": ["a"]}'])
def test_an_index_that_is_none_is_refused(shards: Path, text: str) -> None:
    index = shards / "model.safetensors.index.json"
    index.write_text(text)
    check_refused(shards, f"{index} is no index of weights")


def test_published_names_are_those_that_transformers_writes(tmp_path: Path) -> None:
    model = build_tiny_model()
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    published = to_published_names(from_state_dict(model.state_dict()))
    check_equal(read_all(dict(sorted(published.items()))), written)
    check_equal(read_all(to_module_names(open_weights(tmp_path))), dict(model.state_dict()))


def test_a_native_file_with_module_names_is_read_too() -> None:
    weights = from_state_dict(build_tiny_model().state_dict())
    assert to_module_names(weights) == weights
    assert to_module_names(to_published_names(weights)) == weights
