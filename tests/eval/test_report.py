"""What a study leaves: table.json, table.md, samples.png and a page that stands alone and fits every screen."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import yaml
from PIL import Image

from ssm_vlm import LlavaStyleImageProcessor
from ssm_vlm.eval.evaluate import Result
from ssm_vlm.eval.grounding import Box
from ssm_vlm.eval.report import compare_recipes, loss_curve, software_versions, write_report
from ssm_vlm.eval.report_page import loss_chart
from ssm_vlm.eval.scores import BoxFrame, score_answers, score_boxes
from ssm_vlm.eval.study_table import StudyRow
from ssm_vlm.eval.tasks import GROUNDING_PROMPT, VQA_PROMPT, EvalItem
from ssm_vlm.training.recipe import RunDirectory

PROCESSOR = LlavaStyleImageProcessor(geometry="letterbox", size=64, downsampling=[[8, "floor"]])
SIZES = [(64, 64), (48, 64), (64, 48)]  # height, width
TOYS = ["digit_vmamba.toy", "digit_vit.toy"]


def make_items(folder):
    items = []
    for number, (height, width) in enumerate(SIZES * 2):
        image = str(folder / f"{number}.png")
        Image.new("RGB", (width, height), (40 * number, 60, 90)).save(image)
        for kind, answer in (("count", str(number % 3)), ("colour", ["red", "blue"][number % 2])):
            prompt = VQA_PROMPT.replace("{question}", f"Which {kind}?")
            items.append(EvalItem(f"{kind}-{number}", image, prompt, "vqa", kind, answers=(answer,) * 10))
        box = Box(5 * number, 5 * number, 5 * number + 12, 5 * number + 16)
        prompt = GROUNDING_PROMPT.replace("{sentence}", f"the {number}")
        items.append(EvalItem(f"box-{number}", image, prompt, "grounding", "7", box=box, image_size=(height, width)))
    return items


def true_answers(items):
    said = {}
    for item in items:
        box = item.box and PROCESSOR.get_geometry(*item.image_size).to_frame(item.box, "centered_square")
        said[item.id] = item.answers[0] if box is None else str([round(side, 4) for side in box])
    return said


def scores(items, said):
    frame = BoxFrame(PROCESSOR, "centered_square")
    return {
        "vqa": score_answers("vqa", [item for item in items if item.task == "vqa"], said),
        "grounding": score_boxes([item for item in items if item.task == "grounding"], said, frame, 0.5),
    }


def make_study(folder, names=TOYS, wrong=0, blank=True, losses=True, **recipe):
    """The arguments of `write_report` for models of which each next one has `wrong` more answers wrong."""
    items = make_items(folder)
    rows, results, vlms, seconds = [], {}, {}, {"data": 6.0}
    for place, name in enumerate(names):
        run = folder / f"vlm-{place}"
        run.mkdir()
        PROCESSOR.save_pretrained(run)
        said = true_answers(items)
        said |= {item.id: "<b>no</b>" for item in items[: wrong * place]}
        files = {"answers_test.jsonl": said}
        of = scores(items, said)
        if blank:
            files["answers_test.blank.jsonl"] = nothing = dict.fromkeys(said, "1")
            for task, score in scores(items, nothing).items():
                of[task].floors["blank_image"] = score.score
        for file, answers in files.items():
            lines = [{"predictions": {}}, *({"id": key, "prediction": text} for key, text in answers.items())]
            (run / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
        log = [{"step": step, "loss": 5 / (step + place)} for step in range(10, 60, 10)] if losses else []
        (run / "finished.json").write_text(json.dumps({"log": log}))
        of_run = {"vision_encoder": name, "name": f"vlm-{name}", "learning_rate": 0.001, "tap_norm": "layernorm"}
        of_run |= {key: values[place] for key, values in recipe.items()}
        (run / "recipe.yaml").write_text(yaml.safe_dump(of_run))
        results[name] = Result(of, len(items), False, run / "answers_test.jsonl")
        vlms[name] = RunDirectory(run)
        rows.append(
            StudyRow.of(
                name, parameters=443_000, flops=81e6, tokens=64, accuracy=0.98, result=results[name], seconds=120.0
            )
        )
        seconds |= {f"vlm {name}": 90.0 + 30 * place}
    settings = {"encoders": list(names), "vlm_recipe": "/somewhere/recipes/digit_vlm.yaml", "data": None}
    return {
        "rows": rows,
        "results": results,
        "items": items,
        "settings": settings,
        "seconds": seconds,
        "vlms": vlms,
    }


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    study = make_study(folder, wrong=3)
    write_report(folder, **study)
    return folder, study


def page_of(folder, **changes):
    write_report(folder, **make_study(folder, **changes))
    return (folder / "report.html").read_text()


class Reader(HTMLParser):
    """Tags that are open, texts by tag, and everything a page asks to be loaded."""

    VOID = {"meta", "link", "img", "br", "wbr", "line", "rect", "path"}

    def __init__(self, page):
        super().__init__()
        self.open, self.loaded, self.tags, self.unclosed = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [value for key, value in attributes if key in ("src", "href", "srcset", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID and self.open.pop() != tag:
            self.unclosed.append(tag)


def test_files(report):
    folder, study = report
    table = json.loads((folder / "table.json").read_text())
    assert [row["encoder"] for row in table["rows"]] == TOYS
    assert table["settings"] == study["settings"] and table["seconds"] == study["seconds"]
    assert table["warnings"] == [] and any("VQA: 12 questions" in note for note in table["notes"])
    assert {"python", "torch", "transformers", "ssm-vlm", "device"} <= set(table["versions"])
    assert (folder / "table.md").read_text().startswith("| encoder |")
    assert Image.open(folder / "samples.png").width > 600


def test_scores_by_kind_stand_beside_their_floors(report):
    folder, _ = report
    kinds = {kind["title"]: kind for kind in json.loads((folder / "table.json").read_text())["kinds"]}
    assert list(kinds) == ["count", "colour", "localisation"]
    count, colour, boxes = kinds.values()
    assert (count["items"], count["floor"]) == (6, pytest.approx(1 / 3))
    assert (colour["items"], colour["floor"]) == (6, 0.5)
    assert (boxes["items"], boxes["floor_name"]) == (6, "mean box")
    assert [bar["score"] for bar in count["bars"]] == [1.0, pytest.approx(5 / 6)]
    assert [bar["score"] for bar in boxes["bars"]] == [1.0, pytest.approx(5 / 6)]
    assert [bar["blank"] for bar in count["bars"]] == [pytest.approx(1 / 3)] * 2, "always 1"
    assert [bar["blank"] for bar in colour["bars"]] == [bar["blank"] for bar in boxes["bars"]] == [0, 0]


def test_page_stands_alone(report):
    """One file without scripts, which loads nothing that is not in it."""
    page = (report[0] / "report.html").read_text()
    reader = Reader(page)
    assert reader.open == [] and reader.unclosed == []
    assert "script" not in reader.tags and "iframe" not in reader.tags
    assert reader.loaded and all(address.startswith("data:") for address in reader.loaded)
    assert not re.search(r"url\(|@import|https?://", page)


def test_page_holds_everything(report):
    folder, _ = report
    page = (folder / "report.html").read_text()
    for text in (
        "digit_vit",
        "98.0",
        "Blank pictures",
        "Ten symbols",
        "learning_rate",
        "transformers",
        "centered_square",
    ):
        assert text in page.replace("<wbr>", ""), text
    embedded = re.search(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)[1]
    assert base64.b64decode(embedded) == (folder / "samples.png").read_bytes()
    assert Image.open(io.BytesIO(base64.b64decode(embedded))).size == Image.open(folder / "samples.png").size
    assert page.count("<path") == 2, "two curves of the loss"
    assert re.search(r"<td>all|<b>all</b></td><td></td><td><b>3\.6</b>", page), "216 seconds in all"
    assert 'class="best"' in page


def test_paths_of_this_machine_stay_out(report):
    page = (report[0] / "report.html").read_text()
    assert "digit_vlm.yaml" in page and "/somewhere" not in page


def test_answers_cannot_break_the_page(tmp_path):
    name = "<script>alert(1)</script>.toy"
    page = page_of(tmp_path, names=[name], wrong=1)
    assert "<script" not in page and "&lt;script" in page.replace("<wbr>", "")


def test_models_that_have_not_learned_are_shouted_about(tmp_path):
    page = page_of(tmp_path, wrong=18)
    assert "NOT LEARNED: 1 of 2" in page and 'class="banner"' in page
    assert "WARNING: digit_vit HAS NOT LEARNED" in page
    assert page.index("NOT LEARNED") < page.index("<table")
    table = json.loads((tmp_path / "table.json").read_text())
    assert len(table["warnings"]) == 1


def test_no_banner_without_a_reason(report):
    page = (report[0] / "report.html").read_text()
    assert 'class="banner"' not in page and "NOT CONTROLLED" not in page


def test_recipes_that_differ_are_shouted_about(tmp_path):
    page = page_of(tmp_path, learning_rate=[0.001, 0.002])
    assert "NOT CONTROLLED" in page and "the recipes differ in learning_rate." in page


def test_no_blank_pictures_and_no_losses(tmp_path):
    page = page_of(tmp_path, blank=False, losses=False)
    assert "No loss was logged" in page and "<path" not in page
    assert '<line class="blank" x1="4"' in page and page.count('class="blank"') == 1, "only in the legend"


def test_one_encoder(tmp_path):
    page = page_of(tmp_path, names=["only.toy"])
    assert "1 encoder," in page and "All that differs" not in page


def test_compare_recipes():
    common, differing = compare_recipes({"a": {"x": 1, "y": [2], "z": None}, "b": {"x": 1, "y": [3]}})
    assert common == {"x": 1}
    assert differing == {"y": {"a": [2], "b": [3]}, "z": {"a": None, "b": None}}, (
        "a missing key is not the same as none"
    )


def test_loss_curve_of_a_run():
    log = [{"loss": 2.5, "step": 10, "epoch": 0.1}, {"loss": "1.5", "step": 20}]
    assert loss_curve({"log": log, "steps": 20}) == [(10, 2.5), (20, 1.5)]
    assert loss_curve({"steps": 3}) == []


def test_loss_chart():
    chart = loss_chart({"a": [(10, 10.0), (100, 1.0)], "b": [(100, 0.1)], "c": []})
    assert list(chart.curves) == ["a", "b"]
    ax1, ay1, ax2, ay2 = map(float, re.findall(r"-?\d+\.\d+", chart.curves["a"])[:4])
    (by,) = {float(y) for y in re.findall(r" (\d+\.\d+)", chart.curves["b"])}
    assert (ax1, ax2) == (100, 1000), "shares of the last step, of 1000"
    assert ay2 - ay1 == pytest.approx(by - ay2, abs=0.2), "a logarithmic axis: a factor of ten each"
    assert 0 < ay1 < by < 1000
    assert [text for _, text in chart.x_ticks] == ["0", "20", "40", "60", "80", "100"]
    assert [text for _, text in chart.y_ticks] == ["0.1", "0.2", "0.5", "1", "2", "5", "10"]
    assert {text: place for place, text in chart.y_ticks}["1"] == pytest.approx(ay2 / 1000, abs=1e-3)
    assert loss_chart({"a": [], "b": [(1, 0.0)]}) is None


@pytest.mark.parametrize(
    "points", [[(1, 3.0)], [(7, 3.0), (8, 3.0)], [(50, 0.31), (100, 0.3)], [(1, 1e-9), (10**6, 1e5)]]
)
def test_loss_chart_always_has_ticks(points):
    chart = loss_chart({"a": points})
    assert len(chart.y_ticks) >= 2 and 2 <= len(chart.x_ticks) <= 6
    assert all(0 <= place <= 1 for place, _ in [*chart.x_ticks, *chart.y_ticks])
    assert len({text for _, text in chart.y_ticks}) == len(chart.y_ticks)


def test_versions():
    assert all(software_versions().values())


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FRAME = '<iframe style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe>'
MEASURE = """
<script>
window.onload = () => {
  const results = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument;
    page.querySelectorAll("details").forEach(details => details.open = true);
    const images = [...page.images];
    return {
      width: page.documentElement.clientWidth,
      scroll: page.documentElement.scrollWidth,
      images: images.length,
      broken: images.filter(image => !image.naturalWidth).length,
      loaded: page.defaultView.performance.getEntriesByType("resource").map(entry => entry.name)
        .filter(name => !name.startsWith("data:")),
      collapsed: [...page.querySelectorAll("table, svg.track, .plot, img")]
        .filter(part => part.getBoundingClientRect().width < 40 || part.getBoundingClientRect().height < 8).length,
    };
  });
  document.body.innerHTML = "<pre>" + JSON.stringify(results) + "</pre>";
};
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize(
    "names", [TOYS, ["digit_window_attention.toy", "x" * 60 + ".y", *(f"encoder_number_{n}.z" for n in range(5))]]
)
def test_page_fits_in_a_browser(tmp_path, names):
    """On a phone and on a desktop no part sticks out sideways, no picture is missing, and nothing is fetched."""
    page = html.escape(page_of(tmp_path, names=names, wrong=3, learning_rate=["0.001" * 40] * len(names)))
    frames = "".join(FRAME.format(width=width, page=page) for width in (400, 1200))
    (tmp_path / "frames.html").write_text(f"<!DOCTYPE html><body>{frames}{MEASURE}</body>")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    output = subprocess.run(
        [
            *(BROWSER, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000"),
            *("--dump-dom", f"file://{tmp_path / 'frames.html'}"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout
    results = json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", output, re.S)[1]))
    assert len(results) == 2
    for width, found in zip((400, 1200), results, strict=True):
        assert found["width"] >= width - 20
        assert found["scroll"] <= found["width"], "the page must not scroll sideways"
        assert (found["images"], found["broken"], found["loaded"], found["collapsed"]) == (1, 0, [], 0)
