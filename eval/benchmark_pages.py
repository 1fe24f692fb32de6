"""What the documentation says of speed, written from results files: README's table and docs/performance.md."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .benchmark_bars import CPU_BARS, CUDA_BARS, MIN_SIZES, VIT, VMAMBA, Bar, bars_table, count_verdicts
from .benchmark_encoder import crossovers, exponents
from .benchmark_plot import plot
from .benchmark_report import milliseconds
from .benchmark_results import Record, Taken, matching, merged_rows, read_records
from .benchmark_settings import Row

README_SIZES = (224, 512, 1024, 2048)
README_VARIANTS = {
    "default": "", "compiled": ", compiled for inference", "chunked": ", without a compiler",
    "copy_based": ", copy-based", "copy_based_prebuilt": ", copy-based, Mamba's kernel",
    "copy_based_own_scan": ", copy-based, our 1-D scan",
}  # fmt: skip
MARKERS = "<!-- performance -->", "<!-- /performance -->"
PAGE, PICTURE = "performance.md", "performance.png"


# README


def readme_block(groups: Mapping[Taken, Sequence[Record]]) -> str:
    """README's part: for each machine one table of times, and how many bars it meets."""
    blocks = []
    for taken, records in groups.items():
        table = readme_table(merged_rows(records))
        if table:
            bars = CUDA_BARS if taken.cuda else CPU_BARS
            blocks += ["\n".join(table), f"{taken} {count_verdicts(bars, records)}."]
    return "\n\n".join(blocks)


def readme_table(rows: Sequence[Row]) -> list[str]:
    """Lines of the README's table: encoders, ways to run them, and milliseconds of a picture."""
    forward = [row for row in rows if row["part"] == "encoder" and row["passes"] == "forward"]
    throughput = max((row["batch"] for row in forward if row["height"] == 224), default=1)
    columns = [(side, 1) for side in README_SIZES] + ([(224, throughput)] if throughput > 1 else [])
    columns = [place for place in columns if list(matching(forward, _place(*place)))]
    lines = []
    for name, variant, dtype in _in_order(forward):
        cells = []
        for place in columns:
            wanted = {"name": name, "variant": variant, "dtype": dtype} | _place(*place)
            row = next(matching(forward, wanted), None)
            cells.append("" if row is None else milliseconds(row["median"] / row["batch"]))
        if any(cells):
            words = name.partition(".")[0] + README_VARIANTS.get(variant, f", {variant}")
            lines.append(f"| {words}{'' if dtype == 'float32' else f', {dtype}'} | {' | '.join(cells)} |")
    if not lines:
        return []
    titles = [f"{side} px" if batch == 1 else f"{side} px, {batch} at once" for side, batch in columns]
    return [f"| ms a picture | {' | '.join(titles)} |", f"|---|{'---:|' * len(columns)}", *lines]


def _place(side: int, batch: int) -> Row:
    return {"height": side, "width": side, "batch": batch}


def _in_order(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Name, variant and dtype: the pair that the bars compare first, float32 first."""
    names = [VMAMBA, VIT, *sorted({row["name"] for row in rows} - {VMAMBA, VIT})]
    variants = [*README_VARIANTS, *sorted({row["variant"] for row in rows} - set(README_VARIANTS))]
    there = {(row["name"], row["variant"], row["dtype"]) for row in rows}
    dtypes = sorted({dtype for *_, dtype in there}, key=lambda dtype: (dtype != "float32", dtype))
    return [key for key in ((n, v, d) for n, d, v in itertools.product(names, dtypes, variants)) if key in there]


def write_readme(readme: Path, block: str) -> None:
    """Puts the block between the README's markers.

    Raises:
        ValueError: the README has no such markers.
    """
    start, end = MARKERS
    text = readme.read_text()
    pattern = re.compile(f"{re.escape(start)}\n.*?{re.escape(end)}", flags=re.DOTALL)
    if pattern.search(text) is None:
        raise ValueError(f"{readme} has no lines {start} and {end} to put the table between.")
    readme.write_text(pattern.sub(lambda _: f"{start}\n{block}\n{end}", text))


# docs/performance.md


def page(groups: Mapping[Taken, Sequence[Record]]) -> str:
    """All that results files say: the bars, then every row, machine by machine."""
    parts = [
        "# Performance",
        "Written from `benchmarks/results` by `python -m ssm_vlm.eval.benchmark --report`, not by hand. "
        "Random weights; encoders to the tap, no head. Contenders of one setting took turns in one process; times are "
        "medians, spreads quartiles, and those of a ratio the quartiles of the rounds' ratios. Ratios are of one run.",
        f"![Times of encoders over pixels]({PICTURE})",
        "Rings: where VMamba-S passes another encoder that runs alike; squares: 800x1333.",
    ]
    for taken, records in groups.items():
        parts += [f"## {taken.device}, {taken.date}", str(taken), *_machine_parts(taken, records)]
    if not any(taken.cuda for taken in groups):
        parts += ["## CUDA", "Nothing has been measured on CUDA yet; `benchmarks/gpu.sh` will.", _bars(CUDA_BARS, [])]
    return "\n\n".join(parts) + "\n"


def _bars(bars: Sequence[Bar], records: Sequence[Record]) -> str:
    return "\n".join(bars_table(bars, records))


def _machine_parts(taken: Taken, records: Sequence[Record]) -> list[str]:
    bars, rows = CUDA_BARS if taken.cuda else CPU_BARS, merged_rows(records)
    versions = ", ".join(f"{name} {version}" for name, version in records[0]["machine"]["versions"].items())
    copied = [record["machine"]["copy_bytes_per_second"] / 1e9 for record in records]
    bandwidth = f"{min(copied):.0f}" + (f" to {max(copied):.0f}" if len(copied) > 1 else "")
    meaning = " ".join(sorted({f"Peak memory: {record['machine']['peak_memory_is']}." for record in records}))
    parts = [
        f"{versions}. A copy moves {bandwidth} GB/s. {meaning}",
        f"### Bars\n\n{count_verdicts(bars, records)}.",
        _bars(bars, records),
    ]
    for title, lines in (
        ("Encoders", _encoder_table(rows)),
        ("How time grows", _growth(rows)),
        ("The scan", _op_table(records)),
        ("Whole VLMs", _vlm_table(rows)),
        ("Not run", [f"- {entry['what']}: {entry['reason']}" for entry in _skipped(records)]),
    ):
        if lines:
            parts += [f"### {title}", "\n".join(lines)]
    return parts


def _skipped(records: Sequence[Record]) -> list[dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for record in records:
        found |= {entry["what"]: entry for entry in record["skipped"]}
    return list(found.values())


def _table(columns: Mapping[str, Callable[[Row], str]], rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown; words on the left, figures on the right."""
    if not rows:
        return []
    cells = [[cell(row) for cell in columns.values()] for row in rows]
    words = [any(text[:1].isalpha() for text in column) for column in zip(*cells, strict=True)]
    marks = "".join("---|" if is_words else "---:|" for is_words in words)
    return [f"| {' | '.join(columns)} |", f"|{marks}", *(f"| {' | '.join(line)} |" for line in cells)]


def _times(row: Row) -> str:
    return milliseconds(row["median"])


def _quartiles(row: Row) -> str:
    return "-".join(milliseconds(row[f"{which}_quartile"]) for which in ("lower", "upper"))


def _size(row: Row) -> str:
    return f"{row['height']}x{row['width']}"


def _peak(row: Row) -> str:
    return milliseconds(row["peak_bytes"] / 1e9)  # megabytes


def _share(field: str) -> Callable[[Row], str]:
    return lambda row: f"{100 * row[field]:.0f} %" if field in row else ""


def _encoder_table(rows: Sequence[Row]) -> list[str]:
    encoders = [row for row in rows if row["part"] == "encoder"]
    places = {key: place for place, key in enumerate(_in_order(encoders))}
    encoders.sort(key=lambda row: (row["batch"], row["height"] * row["width"],
                                   places[row["name"], row["variant"], row["dtype"]]))  # fmt: skip
    columns = {
        "encoder": lambda row: row["name"].partition(".")[0],
        "variant": lambda row: row["variant"],
        "dtype": lambda row: row["dtype"],
        "size": _size,
        "batch": lambda row: str(row["batch"]),
        "ms": _times,
        "quartiles": _quartiles,
        "images/s": lambda row: f"{row['images_per_second']:.3g}",
        "peak MB": _peak,
        "GFLOP a picture": lambda row: f"{row['flops'] / row['batch'] / 1e9:.1f}",
        "scan": _share("scan_share"),
    }
    return _table(columns, encoders)


def _growth(rows: Sequence[Row]) -> list[str]:
    lines = []
    for dtype in sorted({row["dtype"] for row in rows}):
        of_dtype = [row for row in rows if row["dtype"] == dtype and row["passes"] == "forward"]
        sizes = Counter((row["name"], row["variant"]) for row in of_dtype if row.get("batch") == 1)
        enough = [row for row in of_dtype if sizes[row["name"], row["variant"]] >= MIN_SIZES]
        for key, exponent in exponents(enough).items():
            name, _, variant = key.partition(", ")
            lines.append(f"- {name.partition('.')[0]}, {variant}, {dtype}: time grows as pixels to the {exponent:.2f}.")
        for crossing in crossovers(of_dtype):
            above, below = (crossing[key].partition(".")[0] for key in ("cheaper_above", "cheaper_below"))
            words = f"{above} is cheaper than {below} from {crossing['side']:.0f} px up"
            lines.append(f"- {words}, {crossing['variant']}, {dtype}.")
    return lines


def _op_table(records: Sequence[Record]) -> list[str]:
    rows = []
    for record in records:  # a share is of the copy in the same run
        copied = record["machine"]["copy_bytes_per_second"]
        rows += [
            row | {"of_copy": row["bytes_per_second"] / copied} for row in matching(record["rows"], {"part": "op"})
        ]
    columns = {
        "map": lambda row: f"{_size(row)}, {row['name']}",
        "passes": lambda row: row["passes"],
        "variant": lambda row: row["variant"],
        "dtype": lambda row: row["dtype"],
        "batch": lambda row: str(row["batch"]),
        "ms": _times,
        "quartiles": _quartiles,
        "peak MB": _peak,
        "compulsory GB/s": lambda row: f"{row['bytes_per_second'] / 1e9:.3g}",
        "of copy": _share("of_copy"),
    }
    return _table(columns, rows)


def _vlm_table(rows: Sequence[Row]) -> list[str]:
    columns = {
        "encoder": lambda row: row["encoder"].partition(".")[0],
        "connector": lambda row: row["connector"],
        "language model": lambda row: row["language_model"],
        "dtype": lambda row: row["dtype"],
        "size": _size,
        "image tokens": lambda row: str(row["image_tokens"]),
        "": lambda row: row["variant"],
        "ms": _times,
        "quartiles": _quartiles,
        "peak MB": _peak,
        "encoder, connector": _share("encoder_share"),
        "tokens/s": lambda row: f"{row['tokens_per_second']:.3g}" if "tokens_per_second" in row else "",
    }
    return _table(columns, list(matching(rows, {"part": "vlm"})))


# All of it


def curves(groups: Mapping[Taken, Sequence[Record]]) -> dict[str, list[Row]]:
    """Title -> rows to draw together, for each machine and dtype with encoders at four sizes or more."""
    found = {}
    for taken, records in groups.items():
        rows = [row for row in merged_rows(records) if row["part"] == "encoder" and row["passes"] == "forward"]
        for dtype in sorted({row["dtype"] for row in rows}):
            of_dtype = [row for row in rows if row["dtype"] == dtype and row["batch"] == 1]
            if len({row["height"] * row["width"] for row in of_dtype}) > 3:
                found[f"{taken.device}, {taken.date}, {dtype}, batch 1"] = of_dtype
    return found


def write_pages(root: Path, paths: Sequence[Path]) -> None:
    """README's table, docs/performance.md and its picture, from results files.

    Raises:
        ValueError: a file is no results file, or the README has no place for the table.
        ImportError: matplotlib is not installed.
    """
    groups = read_records(paths)
    write_readme(root / "README.md", readme_block(groups))
    (root / "docs" / PAGE).write_text(page(groups))
    drawn = curves(groups)
    if drawn:
        plot(drawn, root / "docs" / PICTURE)
