"""Whether predictions were made for the records they are held against. Standard library only.

Ids and sizes do not tell: importers number the images of every split from 0, and many data sets have images of one size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from coordexp.data.records import Record
from coordexp.errors import ComparisonError, DataError
from coordexp.evaluate.predictions import Prediction

# How it is known that predictions and records belong together; ``provenance.records_match`` of results.json.
Basis = Literal["settings", "ids and sizes", "forced"]
# In the settings file beside a prediction, of the records it was made for.
RECORDS_KEY: Final = "records_sha256"


def settings_path(predictions: Path) -> Path:
    """Where ``coordexp predict`` says what a prediction file was made with."""
    return predictions.with_name(predictions.name + ".settings.json")


class OriginHash:
    """Hash of id, image as the file spells it, and size of every record, in order. Objects are left out: labels may be mended later."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._between = ""

    def add(self, record: Record) -> None:
        """Note a record."""
        line = f"{self._between}{record.image_id}\t{record.image_name}\t{record.width}\t{record.height}"
        self._hash.update(line.encode(errors="backslashreplace"))
        self._between = "\n"

    def hexdigest(self) -> str:
        """The hash of the records so far."""
        return self._hash.hexdigest()

    def check(self, predictions: Path, records: Path, *, force: bool = False) -> Basis:
        """Compare with the hash in the settings file beside the predictions, where there is one.

        A file without settings, of another program or an older version, is known by ids and sizes only. With ``force`` another hash
        is no error.

        Raises:
            ComparisonError: predictions of other records.
            DataError: a settings file that cannot be read.
        """
        stated = _stated(settings_path(predictions))
        if stated is None:
            return "ids and sizes"
        if stated == self.hexdigest():
            return "settings"
        if force:
            return "forced"
        raise ComparisonError(
            f"{predictions}: was not predicted from {records}: the ids agree, but images or sizes are not those that "
            f"{settings_path(predictions).name} states (another split?): give the records that were predicted, or evaluate with --force"
        )


def records_sha256(records: Iterable[Record]) -> str:
    """:class:`OriginHash` of records."""
    made = OriginHash()
    for record in records:
        made.add(record)
    return made.hexdigest()


def check_origin(
    rows: Sequence[Prediction], truth: Mapping[str, Record], predictions: Path, records: Path, *, force: bool = False
) -> Basis:
    """:meth:`OriginHash.check` of the records of ``rows``; ``truth`` are records by ``image_id``, those of all rows among them.

    Raises:
        ComparisonError: predictions of other records.
        DataError: a settings file that cannot be read.
    """
    made = OriginHash()
    for row in rows:
        made.add(truth[row.image_id])
    return made.check(predictions, records, force=force)


def origin_note(basis: Basis) -> str | None:
    """What a reader of results must know of ``basis``; None where nothing is open."""
    if basis == "forced":
        return "the predictions were made for other records, as their settings file says; evaluated all the same (--force)"
    if basis == "ids and sizes":
        return "no settings file names the records that the predictions were made for: image ids and sizes agree, more is not known"
    return None


def _stated(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        content: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected the JSON that coordexp predict writes: {' '.join(str(error).split())}: predict again") from error
    value = content.get(RECORDS_KEY) if isinstance(content, dict) else None
    return value if isinstance(value, str) else None
