"""A stage's directory in memory whose every operation can go wrong.

A fault is named by the number of the operation that it strikes and by how: so a case can be told, and replayed.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from internvl_core.checkpoint.manifest import FileEntry
from internvl_core.errors import StoreUnavailable

FILES = ("model", "optimizer/rank-0", "state")
# What a crash in the middle of a write leaves: nothing, an empty object, half of it, all of it.
CRASHES = ("before", "empty", "half", "after")
OUTAGES = ("refused", "unanswered")


class PowerCut(BaseException):
    """Nothing catches this, as nothing catches SIGKILL."""


@dataclass(frozen=True)
class Fault:
    """What happens at an operation, counted from zero, and at the `num_times - 1` after it."""

    at: int
    how: str
    num_times: int = 1


@dataclass
class ModelBackend:
    """A stage's directory in memory; a switch of writers, or a fault, may come before each single object is touched."""

    objects: dict[str, bytes] = field(default_factory=dict)
    fault: Fault | None = None
    on_operation: Callable[[], None] = lambda: None
    operations: list[str] = field(default_factory=list)
    """Of every one so far, what it does: "look", "write", "remove"."""

    uri: ClassVar[str] = "model://store/stage"

    def create(self, name: str, body: bytes) -> None:
        def apply(fraction: float) -> None:
            if name in self.objects:
                raise FileExistsError(name)
            self.objects[name] = _cut(body, fraction)

        self._operate("write", apply)

    def put(self, name: str, body: bytes) -> None:
        self._operate("write", lambda fraction: self.objects.update({name: _cut(body, fraction)}))

    def read(self, name: str) -> bytes:
        self._operate("look")
        try:
            return self.objects[name]
        except KeyError:
            raise FileNotFoundError(name) from None

    def list_names(self, folder: str) -> list[str]:
        self._operate("look")
        return sorted({name[len(folder) + 1 :].split("/")[0] for name in self.objects if name.startswith(f"{folder}/")})

    def get_sizes_bytes(self, folder: str) -> dict[str, int]:
        self._operate("look")
        return {
            name[len(folder) + 1 :]: len(body) for name, body in self.objects.items() if name.startswith(f"{folder}/")
        }

    def upload(self, directory: Path, paths: Sequence[str], folder: str) -> list[FileEntry]:
        entries = []
        for path in paths:
            body = make_content(directory.parts[0], int(directory.parts[1]), path)
            self.put(f"{folder}/{path}", body)
            entries.append(_describe(path, body))
        return entries

    def describe(self, folder: str, paths: Sequence[str]) -> list[FileEntry]:
        return [_describe(path, self.read(f"{folder}/{path}")) for path in paths]

    def download(self, folder: str, paths: Sequence[str], directory: Path) -> list[FileEntry]:
        raise NotImplementedError("the writers of the model verify where the data lies")

    def remove(self, name: str) -> None:
        self._operate("remove", lambda _: self.objects.pop(name, None))

    def remove_all(self, folder: str) -> None:
        for name in [name for name in self.objects if name.startswith(f"{folder}/")]:
            self.remove(name)

    def _operate(self, operation: str, apply: Callable[[float], object] = lambda _: None) -> None:
        """Do one operation, as well as the fault lets it."""
        self.on_operation()
        number = len(self.operations)
        self.operations.append(operation)
        fault = self.fault
        how = fault.how if fault and fault.at <= number < fault.at + fault.num_times else "well"
        if how == "well":
            apply(1.0)
            return
        # Nobody hears that a name is taken; what was there stays.
        with suppress(FileExistsError):
            if how not in {"before", "refused"}:
                apply({"empty": 0.0, "half": 0.5}.get(how, 1.0))
        if how in CRASHES:
            raise PowerCut
        raise StoreUnavailable(f"{how}.")


def make_content(writer: str, step: int, path: str) -> bytes:
    return f"{writer} {step} {path} ".encode() * 4


def make_contents(writer: str, step: int) -> dict[str, bytes]:
    return {path: make_content(writer, step, path) for path in FILES}


def _describe(path: str, body: bytes) -> FileEntry:
    return FileEntry(path, len(body), hashlib.sha256(body).hexdigest())


def _cut(body: bytes, fraction: float) -> bytes:
    return body[: int(len(body) * fraction)]
