"""Results files of the benchmark, read back: records, those of one machine together, and rows found in them."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .benchmark_settings import Row

Record = dict[str, Any]


class Taken(NamedTuple):
    """On what, with what and when results were taken. Results for which this is equal are shown together."""

    device: str
    cuda: str | None
    cores: int
    threads: int
    torch: str
    date: str
    commit: str | None

    def __str__(self) -> str:
        """One sentence."""
        on = f"CUDA {self.cuda}" if self.cuda else f"{self.cores} cores, {self.threads} threads"
        return f"{self.device}, {on}, PyTorch {self.torch}, {self.date}, {self._code()}."

    def _code(self) -> str:
        if self.commit is None:
            return "commit unknown"
        commit, _, changes = self.commit.partition("+")
        return f"commit {commit[:12]}{' with changes that are not committed' if changes else ''}"


def read_records(paths: Sequence[Path]) -> dict[Taken, list[Record]]:
    """The records of files, those taken alike together, CPUs first, then by device and day.

    Raises:
        ValueError: there is no file, or one that the benchmark did not write.
    """
    if not paths:
        raise ValueError("There are no results files: run the benchmark with --output, or name files after --report.")
    groups: dict[Taken, list[Record]] = {}
    for path in paths:
        try:
            record = json.loads(path.read_text())
            machine = record["machine"]
            taken = Taken(**{field: (machine | machine["versions"])[field] for field in Taken._fields})
            for row in record["rows"]:
                summary = (row["part"], row["variant"], row["median"], row["lower_quartile"], row["upper_quartile"])
                assert None not in summary
            groups.setdefault(taken, []).append(record)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no results file of this benchmark ({error!r}).") from error
    return dict(sorted(groups.items(), key=lambda group: (group[0].cuda is not None, group[0].device, group[0].date)))


def matching(rows: Sequence[Row], wanted: Mapping[str, Any]) -> Iterator[Row]:
    """Rows that hold the wanted values."""
    return (row for row in rows if all(row.get(key) == value for key, value in wanted.items()))


def fastest(rows: Sequence[Row], wanted: Mapping[str, Any]) -> Row | None:
    """The row with the least median of those that hold the wanted values."""
    return min(matching(rows, wanted), key=lambda row: row["median"], default=None)


def merged_rows(records: Sequence[Record]) -> list[Row]:
    """The rows of several records. Of what was taken more than once the one with most rounds counts."""
    keys = ("part", "name", "variant", "passes", "height", "width", "batch", "dtype")
    best: dict[tuple, Row] = {}
    for record in records:
        for row in record["rows"]:
            key = tuple(row[field] for field in keys)
            if key not in best or len(row["seconds"]) > len(best[key]["seconds"]):
                best[key] = row
    return list(best.values())


class Measured(NamedTuple):
    """A figure, and the quartiles around it where there are any."""

    value: float
    lower: float | None = None
    upper: float | None = None


def ratio(over: Row, under: Row) -> Measured:
    """Of two rows that were taken in turns: the ratio of their medians, and the quartiles of the rounds' ratios."""
    # Round by round; the budget may have given one of them fewer rounds.
    ratios = [a / b for a, b in zip(over["seconds"], under["seconds"], strict=False)]
    lower, _, upper = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Measured(over["median"] / under["median"], lower, upper)


def fastest_pair(
    records: Sequence[Record], over: Mapping[str, Any], under: Mapping[str, Any]
) -> tuple[Row, Row] | None:
    """The fastest row that holds the values of `over`, and of `under`, in the one record with most rounds of both.
    Ratios between records would compare two states of a machine."""
    pairs = []
    for record in records:
        above, below = (fastest(record["rows"], wanted) for wanted in (over, under))
        if above is not None and below is not None:
            pairs.append((above, below))
    return max(pairs, key=lambda pair: min(len(row["seconds"]) for row in pair), default=None)
