"""A corpus that is a Hugging Face dataset, streamed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from intarsia.data.documents import DEFAULT_HELDOUT, Corpus, Document, digest, valid_unicode
from intarsia.errors import DataError, MissingExtraError
from intarsia.extras import require


class HubCorpus(Corpus):
    """The training split of a dataset on the Hugging Face hub, or of one in a directory on this machine.

    Records are streamed, nothing is downloaded beyond what is read, and `limit_bytes` takes the first
    records. The held-out split is cut from the dataset's training split, as in every other corpus. A
    directory may hold data files, or what `Dataset.save_to_disk` wrote.

    Args:
        source: `NAME` or `NAME:CONFIG`.
    """

    def __init__(
        self,
        source: str,
        *,
        limit_bytes: int | None = None,
        heldout: float = DEFAULT_HELDOUT,
        text_field: str = "text",
    ) -> None:
        super().__init__(f"hf:{source}", limit_bytes=limit_bytes, heldout=heldout)
        self._source = source
        self.dataset, _, config = source.partition(":")
        self.config = config or None
        self.text_field = text_field
        if not self.dataset:
            raise DataError("'hf:' wants the name of a dataset, such as hf:wikitext:wikitext-2-raw-v1")

    @cached_property
    def _saved(self) -> bool:
        """Whether the source is a directory written by `save_to_disk`."""
        path = Path(self.dataset)
        return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))

    @cached_property
    def _builder(self) -> Any:
        datasets = require("datasets", "data")
        return self._call(lambda: datasets.load_dataset_builder(self.dataset, self.config))

    def _call(self, load: Any) -> Any:
        # The library raises errors of a dozen classes for a name that is wrong, private or out of reach.
        try:
            return load()
        except MissingExtraError:
            raise
        except Exception as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise DataError(f"cannot read the dataset {self._source!r}: {reason}") from error

    def _records(self) -> Iterable[Mapping[str, Any]]:
        datasets = require("datasets", "data")
        if self._saved:
            found = self._call(lambda: datasets.load_from_disk(self.dataset))
        else:
            found = self._call(self._builder.as_streaming_dataset)
        if not isinstance(found, dict):
            return found
        if "train" in found:
            return found["train"]
        if len(found) == 1:
            return next(iter(found.values()))
        raise DataError(
            f"the dataset {self._source!r} has no split 'train'; it has {', '.join(map(repr, found))}"
        )

    def candidates(self) -> Iterator[Document]:
        left = self.limit_bytes
        records = self._call(lambda: iter(self._records()))
        for number in itertools.count():
            record = self._call(lambda: next(records, None))
            if record is None:
                return
            text = self._text(record)
            size = len(text.encode())
            if left is not None:
                left -= size
                if left < 0:
                    return
            yield Document(f":{number}", text, source_bytes=size)

    def _text(self, record: Mapping[str, Any]) -> str:
        if self.text_field not in record:
            columns = ", ".join(map(repr, record))
            raise DataError(
                f"the dataset {self._source!r} has no column {self.text_field!r}; it has {columns}"
            )
        text = record[self.text_field]
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"{self._source!r}: the column {self.text_field!r} is no text but {type(text).__name__}"
            )
        return valid_unicode(text or "")

    def fingerprint(self) -> str:
        options = (self._source, self.limit_bytes, self.heldout, self.text_field)
        if self._saved:
            root = Path(self.dataset)
            files = sorted(path for path in root.rglob("*") if path.is_file())
            stats = [
                (path.relative_to(root).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
                for path in files
            ]
            return digest("hub", 1, options, stats)
        by_split = self._builder.config.data_files or {}
        # On the hub the metadata hold the commit; of local files, the times of their last change.
        versions = sorted(
            (str(split), repr(getattr(found, "origin_metadata", found))) for split, found in by_split.items()
        )
        return digest("hub", 1, options, self._builder.hash, str(self._builder.config.version), versions)

    def total_bytes(self) -> int | None:
        return self.limit_bytes

    def limited(self, limit_bytes: int) -> HubCorpus:
        limit = limit_bytes if self.limit_bytes is None else min(limit_bytes, self.limit_bytes)
        return HubCorpus(self._source, limit_bytes=limit, heldout=self.heldout, text_field=self.text_field)
