"""A store on S3, or on what speaks its language, through botocore alone.

s3fs, which reads models and data, is not used here: it needed twice boto3's time for an upload and 370 MB of memory
(`benchmarks/bench_checkpoint.py`). Exclusive creation is a PUT with `If-None-Match: *`, which the start-up probe tries.
"""

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from internvl_core.checkpoint.faults import translated
from internvl_core.checkpoint.manifest import FileEntry
from internvl_core.checkpoint.part_pool import PART_BYTES, PartPool, choose_part_bytes
from internvl_core.checkpoint.s3_client import open_client

logger = logging.getLogger(__name__)

_ATTEMPTS = 4
_MAX_REMOVED = 1000  # of one request
_RANGE = re.compile(r"bytes \d+-\d+/(\d+)")
_MISSING = {"NoSuchKey", "404", "NotFound"}


class S3Backend:
    """`s3://bucket/prefix`."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._bucket, _, self._prefix = uri.partition("://")[2].partition("/")

    @property
    def _client(self) -> Any:
        return open_client()

    def create(self, name: str, body: bytes) -> None:
        with translated(f"Creating {self.uri}/{name}", answers=(FileExistsError,)):
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    self._client.put_object(**self._object(name), Body=body, IfNoneMatch="*")
                    return
                except ClientError as error:
                    code = error.response["Error"]["Code"]
                    if code in {"PreconditionFailed", "412"}:
                        raise FileExistsError(name) from error
                    # Another creation of the name is under way; S3 decides between them when asked again.
                    if code != "ConditionalRequestConflict" or attempt == _ATTEMPTS:
                        raise
                    time.sleep(0.1 * attempt)

    def put(self, name: str, body: bytes) -> None:
        with translated(f"Writing {self.uri}/{name}"):
            self._client.put_object(**self._object(name), Body=body)

    def read(self, name: str) -> bytes:
        with translated(f"Reading {self.uri}/{name}", answers=(FileNotFoundError,)):
            return self._get(name)[1]

    def list_names(self, folder: str) -> list[str]:
        with translated(f"Listing {self.uri}/{folder}"):
            names = [
                found["Prefix"].rstrip("/") for found in self._iter_listed(folder, "CommonPrefixes", Delimiter="/")
            ]
            names += [found["Key"] for found in self._iter_listed(folder, "Contents", Delimiter="/")]
        return [name.rpartition("/")[2] for name in names]

    def get_sizes_bytes(self, folder: str) -> dict[str, int]:
        root = self._folder(folder)
        with translated(f"Listing {self.uri}/{folder}"):
            return {
                found["Key"].removeprefix(root): int(found["Size"]) for found in self._iter_listed(folder, "Contents")
            }

    def upload(self, directory: Path, paths: Sequence[str], folder: str) -> list[FileEntry]:
        with (
            translated(f"Uploading {paths[0] if len(paths) == 1 else directory} to {self.uri}/{folder}"),
            PartPool() as pool,
        ):
            return pool.run(lambda path: self._upload_file(pool, directory / path, f"{folder}/{path}", path), paths)

    def download(self, folder: str, paths: Sequence[str], directory: Path) -> list[FileEntry]:
        def download_file(path: str) -> FileEntry:
            with (directory / path).open("wb") as file:
                return self._read_file(pool, _join(folder, path), path, file.write)

        with translated(f"Downloading {self.uri}/{folder} to {directory}", answers=(FileNotFoundError,)):
            for path in paths:
                (directory / path).parent.mkdir(parents=True, exist_ok=True)
            with PartPool() as pool:
                return pool.run(download_file, paths)

    def describe(self, folder: str, paths: Sequence[str]) -> list[FileEntry]:
        with translated(f"Reading {self.uri}/{folder}", answers=(FileNotFoundError,)), PartPool() as pool:
            return pool.run(lambda path: self._read_file(pool, _join(folder, path), path, len), paths)

    def remove(self, name: str) -> None:
        with translated(f"Removing {self.uri}/{name}"):
            self._client.delete_object(**self._object(name))

    def remove_all(self, folder: str) -> None:
        with translated(f"Removing {self.uri}/{folder}"):
            keys = [{"Key": found["Key"]} for found in self._iter_listed(folder, "Contents")]
            for start in range(0, len(keys), _MAX_REMOVED):
                chosen = {"Objects": keys[start : start + _MAX_REMOVED], "Quiet": True}
                answer = self._client.delete_objects(Bucket=self._bucket, Delete=chosen)
                if errors := answer.get("Errors"):
                    # One answer for all of them, which is no error to botocore.
                    raise ClientError({"Error": errors[0]}, "DeleteObjects")

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _folder(self, folder: str) -> str:
        key = self._key(folder).rstrip("/")
        return f"{key}/" if key else ""

    def _object(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._key(name)}

    def _iter_listed(self, folder: str, kind: str, **options: Any) -> Iterator[Any]:
        pages = self._client.get_paginator("list_objects_v2")
        root = self._folder(folder)
        for page in pages.paginate(Bucket=self._bucket, Prefix=root, **options):
            # Consoles make an empty object that stands for the folder itself.
            yield from (found for found in page.get(kind, []) if found.get("Key") != root)

    def _upload_file(self, pool: PartPool, source: Path, name: str, path: str) -> FileEntry:
        size_bytes = source.stat().st_size
        part_bytes = choose_part_bytes(size_bytes)
        if size_bytes < part_bytes:
            sent = pool.send(
                source, lambda _, body: self._client.put_object(**self._object(name), Body=body), part_bytes=part_bytes
            )
            return FileEntry(path, *sent)
        return FileEntry(path, *self._upload_parts(pool, source, name, part_bytes))

    def _upload_parts(self, pool: PartPool, source: Path, name: str, part_bytes: int) -> tuple[int, str]:
        client, target = self._client, self._object(name)
        # Told beforehand which checksums botocore puts on the parts, a store need not work out others.
        sums = client.meta.config.request_checksum_calculation == "when_supported"
        begun = client.create_multipart_upload(**target, **({"ChecksumAlgorithm": "CRC32"} if sums else {}))
        upload = {**target, "UploadId": begun["UploadId"]}
        parts: dict[int, dict[str, Any]] = {}

        def send_part(number: int, body: bytes) -> None:
            answer = client.upload_part(**upload, PartNumber=number, Body=body)
            # The store's checksums of the parts, if it gave any, are repeated to it when they are put together.
            sums = {key: value for key, value in answer.items() if key.startswith("Checksum") and key != "ChecksumType"}
            parts[number] = {"PartNumber": number, "ETag": answer["ETag"], **sums}

        try:
            sent = pool.send(source, send_part, part_bytes=part_bytes)
            client.complete_multipart_upload(
                **upload, MultipartUpload={"Parts": [parts[number] for number in sorted(parts)]}
            )
        except BaseException:
            self._abort(upload)
            raise
        return sent

    def _abort(self, upload: dict[str, str]) -> None:
        """Drop the parts of an upload that failed; they cost money and nobody sees them."""
        try:
            self._client.abort_multipart_upload(**upload)
        except (BotoCoreError, ClientError) as error:
            logger.warning("Parts of s3://%s/%s stay in the store: %s", self._bucket, upload["Key"], error)

    def _read_file(self, pool: PartPool, name: str, path: str, take: Callable[[bytes], Any]) -> FileEntry:
        """Read an object through in parallel ranges, and give its bytes on in order."""
        digest, size_bytes = hashlib.sha256(), 0

        def take_part(part: bytes) -> None:
            nonlocal size_bytes
            take(part)
            digest.update(part)
            size_bytes += len(part)

        with pool.slot():
            # The first part tells the size too.
            total_bytes, first = self._get(name, 0, PART_BYTES)
            take_part(first)
        ranges = [(start, start + PART_BYTES) for start in range(len(first), total_bytes, PART_BYTES)]
        del first
        for part in pool.iter_parts(lambda start, stop: self._get(name, start, stop)[1], ranges):
            take_part(part)
        return FileEntry(path, size_bytes, digest.hexdigest())

    def _get(self, name: str, start: int = 0, stop: int | None = None) -> tuple[int, bytes]:
        """Get an object or a range [start, stop) of it, again where the connection breaks in the middle.

        Returns:
            The size of the whole object, and the bytes.
        """
        wanted = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                answer = self._client.get_object(**self._object(name), **wanted)
            except ClientError as error:
                code = error.response["Error"]["Code"]
                if code in _MISSING:
                    raise FileNotFoundError(f"{self.uri}/{name}") from error
                if code == "InvalidRange" and start == 0:
                    return 0, b""  # An empty object has no first byte to give.
                raise
            total = _RANGE.fullmatch(answer.get("ContentRange", ""))
            try:
                body = answer["Body"].read()
            except BotoCoreError:
                # botocore itself asks again only until the answer begins.
                if attempt == _ATTEMPTS:
                    raise
                time.sleep(0.2 * attempt)
            else:
                return int(total[1]) if total else len(body), body
        raise RuntimeError("never reached: the last attempt returns or raises")


def _join(folder: str, path: str) -> str:
    return f"{folder}/{path}" if folder else path
