"""The start-up probe: does a store answer, and does it keep the one promise that commits rest on?"""

import logging
import secrets
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier, Thread

from internvl_core.checkpoint.backend import Backend, create_once, open_backend
from internvl_core.checkpoint.uri import UNVERIFIED_PROTOCOLS, normalize_store_uri
from internvl_core.errors import CheckpointError, StoreUnavailable

logger = logging.getLogger(__name__)

PROBE_LIMIT_S = 15.0
NUM_RACERS = 8


def check_store(store_uri: str) -> None:
    """Try a store before anything is trained: create, create again, read, list, race to create, remove.

    Raises:
        ArgumentError: the URI cannot be that of a store.
        StoreUnavailable: it does not answer within 15 s, refuses, or lies about exclusive creation.
        DiskFull: there is no room for even a small file.
    """
    backend = open_backend(normalize_store_uri(store_uri))
    protocol = backend.uri.partition("://")[0]
    if protocol in UNVERIFIED_PROTOCOLS:
        logger.warning(
            "%s:// stores are built after the documentation and tested against no server. This probe passes or refuses "
            "yours; keep a copy of what you cannot lose.",
            protocol,
        )
    outcome: Future[None] = Future()

    def probe() -> None:
        try:
            _probe(backend)
        except Exception as error:  # noqa: BLE001 (raised again by the waiting thread)
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    # A thread because a hanging network mount cannot be interrupted; a daemon because nobody waits for it then.
    Thread(target=probe, name="store-probe", daemon=True).start()
    try:
        outcome.result(timeout=PROBE_LIMIT_S)
    except StoreUnavailable as error:
        raise StoreUnavailable(_tell(backend.uri, str(error))) from error
    except TimeoutError as error:
        raise StoreUnavailable(_tell(backend.uri, f"No answer within {PROBE_LIMIT_S:.0f} s.")) from error


def _probe(backend: Backend) -> None:
    name, body = f".probe-{secrets.token_hex(8)}", secrets.token_bytes(32)
    backend.create(name, body)
    try:
        _check_promises(backend, name, body)
        _race(backend, f"{name}-race")
    finally:
        for left in (name, f"{name}-race"):
            try:
                backend.remove(left)
            except CheckpointError as error:
                logger.warning("The probe %s/%s could not be removed: %s", backend.uri, left, error)


def _check_promises(backend: Backend, name: str, body: bytes) -> None:
    try:
        backend.create(name, body[::-1])
    except FileExistsError:
        pass
    else:
        raise StoreUnavailable("It let the same object be created twice, so two runs could overwrite each other.")
    if backend.read(name) != body:
        raise StoreUnavailable("What was written is not what is read.")
    if name not in backend.list_names(""):
        raise StoreUnavailable("What was written is not listed.")


def _race(backend: Backend, name: str) -> None:
    """Create one object from several threads at once: a store that looks first and writes then lets more than one."""
    start = Barrier(NUM_RACERS)

    def create(body: bytes) -> bool:
        start.wait()
        return create_once(backend, name, body)

    bodies = [bytes([racer]) * 32 for racer in range(NUM_RACERS)]
    with ThreadPoolExecutor(NUM_RACERS) as pool:
        winners = [body for body, has_won in zip(bodies, pool.map(create, bodies), strict=True) if has_won]
    if len(winners) != 1 or backend.read(name) != winners[0]:
        raise StoreUnavailable(
            f"It lies: {len(winners)} of {NUM_RACERS} racing writers were told that they alone created one object, so "
            "two runs could overwrite each other."
        )


def _tell(uri: str, cause: str) -> str:
    return (
        f"{uri} cannot be used as a checkpoint store. {cause} "
        "Check the address, the credentials and the rights to write there, or choose another store."
    )
