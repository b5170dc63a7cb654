"""The token ids of a cohort's texts: an Arrow file with one row for each distinct text, by its number."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from client.text.tokens import pieces_of, rules_of, shipped_pipeline

TOKENS = "tokens.arrow"
_ROWS = 1024  # in a record batch, all but the last: a row is found by division
_FACTS = b"clipward.tokens"  # key of the schema's metadata
_SCHEMA = pa.schema([pa.field("token_ids", pa.large_list(pa.int32()), nullable=False)])


def write_tokens(file: IO[bytes], texts: Iterable[str], *, facts: Mapping[str, Any]) -> None:
    """Write the pieces of ``texts`` under the shipped vocabulary, with ``facts`` as JSON in the metadata.

    A batch of them is in memory at a time.
    """
    rules = rules_of(shipped_pipeline())
    schema = _SCHEMA.with_metadata({_FACTS: json.dumps({**facts, "rules": rules})})
    pieces = pieces_of(texts)
    with pa.ipc.new_file(file, schema) as writer:
        while rows := list(islice(pieces, _ROWS)):
            ends = np.cumsum([0, *map(len, rows)], dtype=np.int64)
            lists = pa.LargeListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(rows)))
            writer.write_batch(pa.RecordBatch.from_arrays([lists], schema=schema))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MappedTokens:
    """The token ids in their file, mapped and not read.

    Attributes:
        facts: What was written beside them.
        rules: Identity of the vocabulary and the rules that they were cut by, see `rules_of`.
    """

    facts: Mapping[str, Any]
    rules: str
    _batches: Sequence[Any]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map the file at ``path``.

        Raises:
            OSError: There is no such file.
            ValueError: It is damaged, or holds something else.
        """
        try:
            with pa.memory_map(os.fsencode(path)) as file, pa.ipc.open_file(file) as reader:
                schema = reader.schema
                batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            for batch in batches:
                batch.validate(full=True)  # what it points to lies within it
        except pa.ArrowException as error:  # children of many types
            raise ValueError(f"damaged: {error}") from error
        if not schema.equals(_SCHEMA) or any(batch.num_rows != _ROWS for batch in batches[:-1]):
            raise ValueError("not the columns of token ids")
        facts = json.loads((schema.metadata or {}).get(_FACTS, b"{}"))
        return cls(facts=facts, rules=facts.get("rules", ""), _batches=batches)

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self._batches)

    def __getitem__(self, number: int) -> NDArray[np.int32]:
        """Return the ids of the pieces of a text by its number, as a view of the file."""
        lists = self._batches[number // _ROWS].column(0)
        start, end = lists.offsets[number % _ROWS].as_py(), lists.offsets[number % _ROWS + 1].as_py()
        ids: NDArray[np.int32] = lists.values[start:end].to_numpy()
        return ids
