"""Readers of single files: plain text, JSON Lines and Parquet, each a stream of texts."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal, NamedTuple, cast

from intarsia.data.documents import valid_unicode
from intarsia.errors import DataError
from intarsia.extras import require

Format = Literal["text", "jsonl", "parquet"]

_JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
_PACKED_SUFFIXES = {".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz", ".7z", ".lz4"}
_BOM = b"\xef\xbb\xbf"
_READ_BYTES = 1 << 20
_PARQUET_ROWS = 256


class Text(NamedTuple):
    """A text, where in its file it stands ("" if it is the whole file), and the file bytes read for it."""

    place: str
    text: str
    source_bytes: int


class BinaryFileError(DataError):
    """A file that was taken for text and is not UTF-8."""


def file_format(path: Path) -> tuple[Format, bool]:
    """The format that a file's name says it has, and whether it is compressed with gzip.

    Raises:
        DataError: the file is compressed in a way that this package does not read.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED_SUFFIXES:
        raise DataError(
            f"{path} is packed as {suffixes[-1]}, which is not read: unpack it, or pack it with gzip"
        )
    gzipped = bool(suffixes) and suffixes[-1] == ".gz"
    last = (suffixes[:-1] if gzipped else suffixes)[-1:]
    if last == [".parquet"]:
        return "parquet", False
    return ("jsonl" if last and last[0] in _JSON_SUFFIXES else "text"), gzipped


def read_file(path: Path, *, text_field: str, document_bytes: int) -> Iterator[Text]:
    """The texts of one file, in its order.

    Raises:
        DataError: the file cannot be read or is damaged; a JSON line is bad (the message has its number);
            the text field or column is missing or is no text.
    """
    kind, gzipped = file_format(path)
    try:
        if kind == "parquet":
            yield from _read_parquet(path, text_field)
            return
        with path.open("rb") as raw:
            stream = cast("IO[bytes]", gzip.GzipFile(fileobj=raw) if gzipped else raw)
            texts = (
                _read_json_lines(stream, path, text_field)
                if kind == "jsonl"
                else _cut(stream, path, document_bytes)
            )
            before = 0
            for text in texts:
                # Of a compressed file only the position in the packed bytes can be compared with its size.
                position = raw.tell()
                yield text._replace(source_bytes=position - before)
                before = position
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is no complete gzip file ({error}): get it again, or drop .gz from its name"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _cut(stream: IO[bytes], path: Path, document_bytes: int) -> Iterator[Text]:
    """A short file whole; a longer one in pieces of at most `document_bytes`, cut where a paragraph ends."""
    rest = stream.read(len(_BOM))
    start = len(rest) if rest == _BOM else 0
    rest = rest[start:]
    while block := stream.read(max(_READ_BYTES, document_bytes)):
        rest += block
        begin = 0
        while len(rest) - begin > document_bytes:
            end = _end_of_piece(rest, begin, begin + document_bytes)
            yield Text(f"@{start}", _as_text(rest[begin:end], path, start), 0)
            start += end - begin
            begin = end
        rest = rest[begin:]
    if rest:
        yield Text(f"@{start}" if start > len(_BOM) else "", _as_text(rest, path, start), 0)


def _end_of_piece(buffer: bytes, begin: int, limit: int) -> int:
    """Where to cut `buffer[begin:limit]`: after a blank line, else a line, else a character."""
    middle = (begin + limit) // 2
    for mark in (b"\n\n", b"\n"):
        found = buffer.rfind(mark, middle, limit)
        if found >= 0:
            return found + len(mark)
    end = limit
    while end > max(begin + 1, limit - 4) and buffer[end] & 0xC0 == 0x80:  # inside a UTF-8 character
        end -= 1
    return end


def _as_text(content: bytes, path: Path, start: int) -> str:
    if b"\0" in content:
        raise BinaryFileError(f"{path} is not a text file: it has a zero byte at {start + content.index(0)}")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BinaryFileError(
            f"{path} is not UTF-8 text (byte {start + error.start} is 0x{content[error.start]:02x}): "
            "convert it with iconv, or leave it out"
        ) from error


def _read_json_lines(stream: IO[bytes], path: Path, text_field: str) -> Iterator[Text]:
    for number, line in enumerate(stream, start=1):
        if number == 1:
            line = line.removeprefix(_BOM)
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not UTF-8: convert the file with iconv") from error
        except json.JSONDecodeError as error:
            hint = " (one JSON object a line is wanted)" if line.strip() in (b"[", b"{") else ""
            raise DataError(f"{where} is not valid JSON: {error}{hint}") from error
        except RecursionError as error:
            raise DataError(f"{where} is not valid JSON: it is nested too deeply") from error
        if not isinstance(record, dict):
            raise DataError(f"{where} is a JSON {type(record).__name__}; one JSON object a line is wanted")
        yield Text(f":{number}", _field(record, text_field, where), 0)


def _field(record: dict[str, object], text_field: str, where: str) -> str:
    if text_field not in record:
        raise DataError(
            f"{where} has no field {text_field!r}; it has {', '.join(map(repr, record)) or 'none'}"
        )
    text = record[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f"{where}: the field {text_field!r} is no text but {type(text).__name__}")
    return valid_unicode(text)


def _read_parquet(path: Path, text_field: str) -> Iterator[Text]:
    arrow = require("pyarrow", "data")
    parquet = require("pyarrow.parquet", "data")
    try:
        file = parquet.ParquetFile(path)
    except arrow.ArrowInvalid as error:
        raise DataError(f"{path} is no Parquet file: {error}") from error
    with file:
        schema = file.schema_arrow
        if text_field not in schema.names:
            raise DataError(
                f"{path} has no column {text_field!r}; it has {', '.join(map(repr, schema.names))}"
            )
        kind = schema.field(text_field).type
        if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
            raise DataError(f"{path}: the column {text_field!r} is no text but {kind}")
        row_bytes = path.stat().st_size / max(1, file.metadata.num_rows)
        number = 0
        try:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    yield Text(
                        f":{number}", text or "", int((number + 1) * row_bytes) - int(number * row_bytes)
                    )
                    number += 1
        except (arrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{path} is damaged near row {number}: {error}") from error
