"""Results files as pages: README's table, docs/performance.md, the bars, the plot."""

import json
import re
from pathlib import Path

import pytest

from ssm_vlm.eval import benchmark_bars, benchmark_pages, benchmark_plot, benchmark_results
from ssm_vlm.eval.benchmark_bars import VIT, VMAMBA
from ssm_vlm.eval.benchmark_timing import summarise

ROOT = Path(__file__).parents[2]
MACHINE = {
    "device": "A chip", "cores": 2, "threads": 1, "cuda": None, "date": "2026-01-01", "commit": "0123456789abcdef",
    "versions": {"torch": "2.9"}, "copy_bytes_per_second": 100e9, "peak_memory_is": "all of it",
}  # fmt: skip


def row(name: str, side: int, seconds: list[float], **others) -> dict:
    made = {
        "part": "encoder", "name": name, "variant": "default", "height": side, "width": side, "batch": 1,
        "dtype": "float32", "passes": "forward", "peak_bytes": 12e6, "flops": 5e9, "seconds": seconds,
    }  # fmt: skip
    made |= summarise(seconds) | others
    return made | {"images_per_second": made["batch"] / made["median"]}


def record(*rows: dict, skipped: tuple = (), **machine) -> dict:
    return {"rows": list(rows), "skipped": list(skipped), "settings": {}, "machine": MACHINE | machine}


def read(folder: Path, *records: dict) -> dict:
    paths = [folder / f"{number}.json" for number in range(len(records))]
    for path, made in zip(paths, records, strict=True):
        path.write_text(json.dumps(made))
    return benchmark_results.read_records(paths)


# What is committed


def committed() -> dict:
    return benchmark_results.read_records(sorted((ROOT / "benchmarks" / "results").glob("*.json")))


def test_readme_holds_the_table_of_the_results():
    start, end = benchmark_pages.MARKERS
    found = re.search(f"{start}\n(.*?)\n{end}", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert found is not None and found[1] == benchmark_pages.readme_block(committed())


def test_page_of_performance_is_that_of_the_results():
    assert (ROOT / "docs" / benchmark_pages.PAGE).read_text() == benchmark_pages.page(committed())
    assert (ROOT / "docs" / benchmark_pages.PICTURE).read_bytes().startswith(b"\x89PNG")


# README's table


def test_table_has_a_line_for_each_way_to_run_and_a_column_for_each_size(tmp_path):
    rows = [
        row(VIT, 224, [0.08]),
        row(VMAMBA, 224, [0.1, 0.2, 0.3], scan_share=0.25),
        row(VMAMBA, 224, [1.0], variant="copy_based"),
        row(VMAMBA, 224, [0.15], dtype="bfloat16"),
        row(VMAMBA, 384, [0.5]),
        row(VMAMBA, 1024, [4.0], variant="compiled"),
    ]
    groups = read(tmp_path, record(*rows), record(row(VMAMBA, 224, [1.6], batch=16)))
    lines = benchmark_pages.readme_block(groups).splitlines()
    assert lines[:-2] == [
        "| ms a picture | 224 px | 1024 px | 224 px, 16 at once |",
        "|---|---:|---:|---:|",
        "| vmamba_small_s2l15 | 200 |  | 100 |",
        "| vmamba_small_s2l15, compiled for inference |  | 4000 |  |",
        "| vmamba_small_s2l15, copy-based | 1000 |  |  |",
        "| vmamba_small_s2l15, bfloat16 | 150 |  |  |",
        "| vit_small_patch16 | 80.0 |  |  |",
    ]
    assert lines[-1].startswith("A chip, 2 cores, 1 threads, PyTorch 2.9, 2026-01-01, commit 0123456789ab. ")


def test_what_was_taken_with_changes_says_so(tmp_path):
    groups = read(tmp_path, record(row(VIT, 224, [0.1]), commit="0123456789abcdef+changes"))
    assert "commit 0123456789ab with changes that are not committed" in benchmark_pages.readme_block(groups)


def test_table_goes_between_the_markers(tmp_path):
    start, end = benchmark_pages.MARKERS
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    benchmark_pages.write_readme(readme, r"new \1")
    assert readme.read_text() == f"before\n{start}\nnew \\1\n{end}\nafter\n"
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="has no lines"):
        benchmark_pages.write_readme(readme, "new")


@pytest.mark.parametrize("damage", ["no json", "{}", '{"machine": {}, "rows": []}'])
def test_a_file_that_is_no_results_file_is_named(damage, tmp_path):
    file = tmp_path / "other.json"
    file.write_text(damage)
    with pytest.raises(ValueError, match=r"other\.json is no results file of this benchmark"):
        benchmark_results.read_records([file])
    with pytest.raises(ValueError, match="no results files"):
        benchmark_results.read_records([])


# Rows together


def test_of_what_was_taken_twice_the_row_with_most_rounds_counts():
    once, often = row(VIT, 224, [0.5]), row(VIT, 224, [0.1, 0.1, 0.1])
    assert benchmark_results.merged_rows([record(once), record(often)]) == [often]
    assert benchmark_results.merged_rows([record(often), record(once)]) == [often]


def test_a_ratio_is_of_medians_and_its_spread_of_rounds():
    over, under = row(VMAMBA, 224, [2.0, 4.0, 9.0]), row(VIT, 224, [1.0, 1.0, 3.0])
    assert benchmark_results.ratio(over, under) == (4.0, 2.5, 3.5)


def test_a_ratio_is_never_of_two_runs():
    here, there = record(row(VMAMBA, 224, [1.0])), record(row(VIT, 224, [2.0]))
    assert benchmark_results.fastest_pair([here, there], {"name": VMAMBA}, {"name": VIT}) is None
    both = record(row(VMAMBA, 224, [3.0]), row(VMAMBA, 224, [2.0], variant="compiled"), row(VIT, 224, [2.0]))
    over, _ = benchmark_results.fastest_pair([here, there, both], {"name": VMAMBA}, {"name": VIT})
    assert over["variant"] == "compiled"


# Bars


def verdict(records: list[dict], start: str, bars=benchmark_bars.CPU_BARS) -> tuple[str, str]:
    (line,) = (line for line in benchmark_bars.bars_table(bars, records) if line.startswith(f"| {start} |"))
    _, _, _, measured, _, verdict, _ = (cell.strip() for cell in line.split("|"))
    return measured, verdict


@pytest.mark.parametrize(
    "times, expected", [((0.5, 0.1), "met"), ((0.3, 0.1), "missed"), ((None, 0.1), "not measured")]
)
def test_a_bar_is_met_missed_or_not_measured(times, expected):
    copies, ours = times
    rows = [row(VMAMBA, 224, [ours])] + ([row(VMAMBA, 224, [copies], variant="copy_based")] if copies else [])
    words = "VMamba-S, 224 px, batch 1, with a compiler: copy-based / ours"
    assert verdict([record(*rows)], words)[1] == expected
    assert verdict([record(*rows)], words.replace("batch 1,", "batch 16,"))[1] == "not measured"


def test_bars_of_growth_and_crossing():
    sides = (224, 512, 1024, 2048)
    ours = [row(VMAMBA, side, [side**2 * 1e-6]) for side in sides]
    theirs = [row(VIT, side, [side**4 * 1e-6 / 900**2]) for side in sides]
    records = [record(*ours[:2], *theirs[:2]), record(*ours[2:], *theirs[2:])]
    assert verdict(records, "VMamba-S, exponent of time over pixels") == ("1.00", "met")
    assert verdict(records, "VMamba-S passes ViT-S at") == ("900 px", "met")
    assert verdict(records, "VMamba-S / ViT-S, 1024 px, batch 1") == ("0.77", "met")
    assert verdict(records[:1], "VMamba-S, exponent of time over pixels")[1] == "not measured"


@pytest.mark.parametrize(("times", "answer"), [(2.0, ("inf px", "missed")), (0.5, ("224 px", "met"))])
def test_where_nothing_crosses_the_dearer_one_is_told(times, answer):
    sides = (224, 384, 512, 768)
    rows = [row(VIT, side, [side**2]) for side in sides] + [row(VMAMBA, side, [times * side**2]) for side in sides]
    assert verdict([record(*rows)], "VMamba-S passes ViT-S at") == answer


def test_bars_of_a_gpu():
    op = {"part": "op", "batch": 64, "dtype": "bfloat16", "passes": "forward", "compulsory_bytes": 60e6}
    rows = [row("192 channels, 1 states", 56, [1e-3], variant="triton alone", **op)]
    rows += [
        row(VMAMBA, 512, [5e-3, 5e-3], dtype="bfloat16"),
        row(VMAMBA, 512, [3e-3], dtype="bfloat16", variant="compiled"),
    ]
    records, bars = [record(*rows, cuda="13.0")], benchmark_bars.CUDA_BARS
    share = "op 56x56x192, batch 64, forward: compulsory bytes, share of copy bandwidth"
    assert verdict(records, share, bars) == ("0.60", "met")
    assert verdict(records, "VMamba-S, 512 px, batch 1, bfloat16", bars) == ("3.00 ms", "met")
    assert verdict(records, "VMamba-S, 224 px, batch 1, bfloat16", bars) == ("", "not measured")


def test_every_bar_has_words_of_its_own():
    for bars in (benchmark_bars.CPU_BARS, benchmark_bars.CUDA_BARS):
        assert len({bar.words for bar in bars}) == len(bars) > 15


# The page and the plot


def test_page_holds_every_row_and_all_that_was_not_run(tmp_path):
    op = {"part": "op", "bytes_per_second": 30e9}
    vlm = {"part": "vlm", "encoder": VIT, "connector": "mlp2", "language_model": "7b", "image_tokens": 196}
    made = record(
        row(VMAMBA, 224, [0.2], scan_share=0.25),
        row("192 channels, 1 states", 56, [0.001], variant="cpp alone", **op),
        row("x", 224, [2.0], variant="first token", encoder_share=0.05, **vlm),
        skipped=({"what": "vlm with the 7b language model", "reason": "its weights are too many"},),
    )
    text = benchmark_pages.page(read(tmp_path, made))
    assert "| vmamba_small_s2l15 | default | float32 | 224x224 | 1 | 200 | 200-200 | 5 | 12.0 | 5.0 | 25 % |" in text
    assert (
        "| 56x56, 192 channels, 1 states | forward | cpp alone | float32 | 1 | 1.00 | 1.00-1.00 | 12.0 | 30 | 30 % |"
        in text
    )
    assert (
        "| vit_small_patch16 | mlp2 | 7b | float32 | 224x224 | 196 | first token | 2000 | 2000-2000 | 12.0 | 5 % |  |"
        in text
    )
    assert "- vm with" not in text and "- vlm with the 7b language model: its weights are too many" in text
    assert "Nothing has been measured on CUDA yet" in text
    both = benchmark_pages.page(read(tmp_path, made, record(row(VIT, 224, [1.0]), cuda="13.0", device="H200")))
    assert "## H200" in both and "Nothing has been measured on CUDA" not in both


def test_plot_draws_every_machine_and_dtype_that_has_a_curve(tmp_path):
    sides, powers = (224, 384, 512, 768), ((VMAMBA, 2), (VIT, 2.5))
    rows = [row(name, side, [side**power]) for name, power in powers for side in sides]
    rows += [
        row(VMAMBA, 224, [9e4], variant="copy_based"),
        row("my_own.tag", 224, [9e4]),
        row(VIT, 224, [1.0], batch=16),
    ]
    groups = read(tmp_path, record(*rows, row(VIT, 224, [1.0], dtype="bfloat16")))
    assert list(benchmark_pages.curves(groups)) == ["A chip, 2026-01-01, float32, batch 1"]
    benchmark_plot.plot(benchmark_pages.curves(groups), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
