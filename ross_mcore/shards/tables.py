"""Records in tables: parquet, and the arrow files of Hugging Face's datasets, read with pyarrow a few rows at a time.

pyarrow is optional (pip install 'ross_mcore[parquet]'). Pictures embedded in a column are {"bytes", "path"}, which
data/records.py reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ross_mcore.errors import RecordsError

BUFFER_BYTES = 1 << 20
ROWS_AT_ONCE = 16
"""Rows that are held as Python objects: each may hold a picture of MAX_IMAGE_BYTES."""


def open_parquet(path: Path) -> tuple[int, Callable[[], Iterable[Any]]]:
    """(number of rows, opens them as records). Raises RecordsError, OSError."""
    with _errors(path):
        import pyarrow.parquet

        count = pyarrow.parquet.read_metadata(path).num_rows

    def read() -> Iterator[Any]:
        options = {"pre_buffer": False, "buffer_size": BUFFER_BYTES}
        with _errors(path), pyarrow.parquet.ParquetFile(path, **options) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE):  # a page is decoded whole: memory is bounded by its size
                yield from batch.to_pylist()

    return count, read


def open_arrow(path: Path) -> tuple[int, Callable[[], Iterable[Any]]]:
    """As open_parquet, of a file in arrow's stream or file format."""

    def batches() -> Iterator[Any]:
        import pyarrow

        with _errors(path), pyarrow.memory_map(str(path)) as source:
            if source.read_at(6, 0) == b"ARROW1":
                file = pyarrow.ipc.open_file(source)
                yield from map(file.get_batch, range(file.num_record_batches))
            else:
                yield from pyarrow.ipc.open_stream(source)

    def read() -> Iterator[Any]:
        for batch in batches():
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                rows = batch.slice(start, ROWS_AT_ONCE)
                with _errors(path):
                    rows.validate(full=True)  # offsets of a damaged file lead out of memory
                    records = rows.to_pylist()
                yield from records

    with _errors(path):
        return sum(batch.num_rows for batch in batches()), read


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise RecordsError(f"{path} needs pyarrow: pip install 'ross_mcore[parquet]'") from None
    except RecordsError:
        raise
    except (ValueError, OSError, RuntimeError, NotImplementedError) as error:  # ArrowInvalid is a ValueError
        problem = getattr(error, "strerror", None) or "it is damaged, or of another format than its name says"
        raise RecordsError(f"{path} cannot be read: {problem}; copy it again") from None
