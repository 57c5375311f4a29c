"""What must hold of the protocol's model, as suites of cases: each takes cases and tells those that violate it.

An operation that only looks is not struck by a crash: what it leaves is what a crash before the next write leaves.
Run as a program it goes through a small part of every suite, with what is on the path, and exits with 1 on a violation.
"""

import logging
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

from protocol_model import CRASHES, OUTAGES, Fault, ModelBackend, make_contents
from protocol_reading import Found, list_dangling, list_leaks, list_whole, read_newest
from protocol_writer import KEEP, TRAINING, Writer, run_together

from internvl_core.checkpoint import garbage, handover
from internvl_core.checkpoint.commits import CommitName
from internvl_core.checkpoint.lease import find_lease, list_fences
from internvl_core.checkpoint.lineage import iter_verified

A_STEPS, B_STEPS, C_STEPS = 5, 7, (8, 9)

T = TypeVar("T")

Objects = dict[str, bytes]
DoubleCrash = tuple[Fault | None, Fault | None]


def list_crashes(last_step: int, objects: Mapping[str, bytes], writer: str) -> list[Fault | None]:
    """List every way in which a writer can die on the way, and that it does not."""
    backend = ModelBackend(dict(objects))
    Writer(writer, backend, last_step).run()
    hows = {"look": (), "write": CRASHES, "remove": ("before", "after")}
    faults = [Fault(at, how) for at, operation in enumerate(backend.operations) for how in hows[operation]]
    return [None, *faults]


def run_writer(name: str, objects: Mapping[str, bytes], last_step: int, fault: Fault | None, **more: Any) -> Writer:
    writer = Writer(name, ModelBackend(dict(objects), fault), last_step, **more)
    writer.run()
    return writer


def tell_violation(objects: Objects, writers: Iterable[Writer]) -> str | None:
    """Say what is wrong with a store that these wrote one after the other; None if nothing is."""
    acknowledged = [name for writer in writers for name in writer.acknowledged]
    newest = read_newest(objects)
    if dangling := list_dangling(objects):
        return f"{dangling} are committed, but not whole"
    if acknowledged and (newest is None or newest.name.age < max(name.age for name in acknowledged)):
        return f"{acknowledged} were acknowledged, {newest and newest.name} is read"
    if newest and newest.content != make_contents(tell_writer(objects, newest.name), newest.name.step):
        return f"{newest.name} is not what its writer wrote"
    if len(list_whole(objects)) < min(KEEP, len(acknowledged)):
        return f"{acknowledged} were acknowledged, only {list_whole(objects)} are left"
    found = handover.find_handover(ModelBackend(dict(objects)))
    if any(writer.has_handed_over for writer in writers) and found is None:
        return "the handover is lost"
    return None


def tell_writer(objects: Objects, name: CommitName) -> str:
    record = find_lease(ModelBackend(dict(objects)), name.fence)
    assert record is not None
    return record.owner.run_id


def tell_leak(objects: Objects) -> str | None:
    """Say what is left over after one more writer has saved twice."""
    c = Writer("C", ModelBackend(dict(objects)), 0)
    c.take_lease()
    for step in C_STEPS:
        c.save(step, TRAINING)
    c.collect()
    leaks = list_leaks(c.backend.objects)
    return f"{leaks} are left over" if leaks else None


def check_crashes(faults: Iterable[DoubleCrash]) -> list[str]:
    """Crash A, then B, which takes over; faults of B that its run never reaches are passed over."""
    violations = []
    after_a: dict[Fault | None, Writer] = {}
    for fault_a, fault_b in faults:
        if fault_a not in after_a:
            after_a[fault_a] = run_writer("A", {}, A_STEPS, fault_a)
        a = after_a[fault_a]
        b = run_writer("B", a.backend.objects, B_STEPS, fault_b)
        violation = tell_violation(b.backend.objects, [a, b]) or tell_leak(b.backend.objects)
        if violation:
            violations.append(f"A {fault_a}, B {fault_b}: {violation}")
    return violations


def list_double_crashes(fault_a: Fault | None) -> list[DoubleCrash]:
    a = run_writer("A", {}, A_STEPS, fault_a)
    return [(fault_a, fault_b) for fault_b in list_crashes(B_STEPS, a.backend.objects, "B")]


def check_outages(faults: Iterable[Fault]) -> list[str]:
    """Lose an answer, or a question, of a writer that is patient: it loses nothing, and tells so only once."""
    violations = []
    for fault in faults:
        writer = run_writer("A", {}, A_STEPS, fault, patience=fault.num_times)
        objects = writer.backend.objects
        violation = tell_violation(objects, [writer])
        if writer.ending != "finished":
            violation = f"it ended as {writer.ending}"
        if violation or (violation := tell_leak(objects)):
            violations.append(f"{fault}: {violation}")
    return violations


def list_outages() -> list[Fault]:
    backend = run_writer("A", {}, A_STEPS, None).backend
    return [Fault(at, how, times) for at, how, times in product(range(len(backend.operations)), OUTAGES, (1, 3))]


def damage(objects: Objects, name: str, how: int | None) -> Objects:
    """Flip a bit of the first, middle or last byte of an object, or remove it."""
    if how is None:
        return {other: body for other, body in objects.items() if other != name}
    body = bytearray(objects[name])
    body[(0, len(body) // 2, len(body) - 1)[how]] ^= 1
    return objects | {name: bytes(body)}


def list_damages(objects: Objects) -> list[tuple[str, int | None]]:
    return list(product(objects, (0, 1, 2, None)))


@dataclass(frozen=True)
class Store:
    """A store with what is whole and live in it, newest first: step and writer."""

    objects: Objects
    live: list[tuple[int, str]]


def make_finished_store() -> Store:
    return Store(run_writer("A", {}, A_STEPS, None).backend.objects, [(A_STEPS, "A"), (A_STEPS, "A")])


def make_forked_store() -> Store:
    """Make a store where a zombie of the first lease committed after the second had taken over."""
    objects: Objects = {}
    a, b = (Writer(name, ModelBackend(objects), 0) for name in "AB")
    a.take_lease()
    for step in (1, 2, 3):
        a.save(step, TRAINING)
    fork = Writer("A", ModelBackend(dict(objects)), 0, lease=a.lease)
    for step in (4, 9):
        fork.save(step, TRAINING)
    b.take_lease()
    for step in (4, 5):
        b.save(step, TRAINING)
    return Store(fork.backend.objects | objects, [(5, "B"), (4, "B"), (3, "A"), (2, "A"), (1, "A")])


def check_damages(store: Store, damages: Iterable[tuple[str, int | None]]) -> list[str]:
    """Whatever one object suffers, something whole of the right lineage is read, and hardly older."""
    violations = []
    for name, how in damages:
        newest = read_newest(damage(store.objects, name, how))
        if not is_among(newest, store.live[:2]):
            violations.append(f"{name}, {how}: {newest} is read")
    return violations


def is_among(found: Found | None, live: Iterable[tuple[int, str]]) -> bool:
    return found is not None and any(
        found.name.step == step and found.content == make_contents(writer, step) for step, writer in live
    )


def check_damages_before_collection(
    store: Store, damages: Iterable[tuple[str, int | None, int]], *, reads: bool
) -> list[str]:
    """C takes the lease, then an object suffers, then C collects garbage: something whole is left.

    Args:
        store: what was left.
        damages: object, what it suffers, and how many commits C is to keep.
        reads: whether C reads everything again, as a process does that has read nothing yet.
    """
    c = Writer("C", ModelBackend(dict(store.objects)), 0)
    c.take_lease()
    c.verified = set() if reads else {found.checkpoint.digest for found in iter_verified(c.backend)}
    violations = []
    for name, how, keep in damages:
        backend = ModelBackend(damage(c.backend.objects, name, how))
        garbage.collect_garbage(backend, c.fence, keep=keep, verified=set(c.verified))
        newest = read_newest(backend.objects)
        if not is_among(newest, store.live):
            violations.append(f"{name}, {how}, keep {keep}: {newest} is read")
    return violations


def check_interleaving(seed: int) -> str | None:
    """Let two living writers loose on one store: the last one's work, or what it went on with, is what is read."""
    chance = random.Random(seed)
    objects: Objects = {}
    writers = [
        Writer(name, ModelBackend(objects), steps, takes_over=chance.random() < 0.5, tries_for_lease=3)
        for name, steps in (("A", A_STEPS), ("B", B_STEPS))
    ]
    run_together(writers, seed, crash_chance=chance.choice((0.0, 0.0, 0.01)))
    newest = read_newest(objects)
    fence = list_fences(ModelBackend(objects))[-1] if objects else 0
    record = find_lease(ModelBackend(objects), fence)
    if record is None:
        return None if newest is None else f"{newest.name} is read without a lease"
    last = next(writer for writer in writers if writer.name == record.owner.run_id)
    floor = next((name for name in reversed(last.acknowledged) if name.fence == fence), record.origin.base)
    if newest is None:
        return None if floor is None else f"nothing is read, {floor} should be"
    if newest.name != floor and (newest.name.fence != fence or (floor and newest.name.order < floor.order)):
        return f"{newest.name} is read, {floor} should be"
    if newest.content != make_contents(tell_writer(objects, newest.name), newest.name.step):
        return f"{newest.name} is not what its writer wrote"
    if list_dangling(objects) and not any(writer.ending in {"Fenced", "crashed"} for writer in writers):
        return f"{list_dangling(objects)} are committed, but not whole"
    if last.has_handed_over and handover.find_handover(ModelBackend(objects)) is None:
        return "the handover is lost"
    return None


def check_interleavings(seeds: Iterable[int]) -> list[str]:
    return [f"seed {seed}: {violation}" for seed in seeds if (violation := check_interleaving(seed))]


def sample_double_crashes(size: int, seed: int) -> list[DoubleCrash]:
    chance = random.Random(seed)
    faults = chance.sample(list_crashes(A_STEPS, {}, "A"), min(size, 12))
    return [pair for fault in faults for pair in _sample(list_double_crashes(fault), size // 12, chance)]


def sample_outages(size: int, seed: int) -> list[Fault]:
    return _sample(list_outages(), size, random.Random(seed))


def _sample(cases: list[T], size: int, chance: random.Random) -> list[T]:
    return chance.sample(cases, min(size, len(cases)))


def check_briefly(size: int, seed: int) -> Iterator[str]:
    """Go through a part of every suite; yields the violations."""
    for store in (make_finished_store(), make_forked_store()):
        damages = list_damages(store.objects)
        yield from check_damages(store, damages)
        for reads, keeps in ((True, (1, 2)), (False, (2,))):
            cases = [(name, how, keep) for name, how in damages for keep in keeps]
            yield from check_damages_before_collection(store, cases, reads=reads)
    operations = run_writer("A", {}, A_STEPS, None).backend.operations
    unanswered = [Fault(at, "unanswered", times) for at, times in product(range(len(operations)), (1, 3))]
    yield from check_outages(fault for fault in unanswered if operations[fault.at] == "write")
    yield from check_interleavings(range(seed, seed + size * 2))
    yield from check_crashes(sample_double_crashes(size, seed))


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    for violation in check_briefly(int(sys.argv[1]), int(sys.argv[2])):
        print(violation)
        sys.exit(1)
