"""Evaluation from items to scores: with a scripted model, whose scores are known, and with a real one."""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerFast

from ssm_vlm import (
    LlavaStyleConfig,
    LlavaStyleForConditionalGeneration,
    LlavaStyleImageProcessor,
    LlavaStyleProcessor,
)
from ssm_vlm.eval.evaluate import evaluate, main, model_fingerprint, processor_fingerprint
from ssm_vlm.eval.grounding import Box
from ssm_vlm.eval.tasks import EvalItem

IMAGE_SIZE = 16  # canvas in pixels; four image tokens


def make_processor(**settings):
    """A tokenizer of bytes and a small letterbox."""
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    settings = {"geometry": "letterbox", "size": IMAGE_SIZE, "downsampling": [[8, "floor"]], **settings}
    return LlavaStyleProcessor(LlavaStyleImageProcessor(**settings), tokenizer)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five pictures, 20 pixels high and 40 wide, each of its own colour."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(5):
        Image.new("RGB", (40, 20), (50 * number, 20, 200 - 40 * number)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def items(pictures):
    """Three questions and two boxes, with prompts of different length."""
    answers = [("2",) * 10, ("2",) * 9 + ("3",), ("yes",) * 10]
    questions = [
        EvalItem(f"vqa-{n}", str(pictures / f"{n}.png"), f"Question {n}" + "?" * (3 * n + 1), "vqa", kind, answers[n])
        for n, kind in enumerate(["how many", "how many", "is it"])
    ]
    boxes = [
        EvalItem(f"ref-{n}", str(pictures / f"{n}.png"), f"Box {n}", "grounding", "cat", (), Box(*xyxy), (20, 40))
        for n, xyxy in [(3, (0, 0, 20, 20)), (4, (20, 0, 40, 20))]
    ]
    return questions + boxes


RIGHT = {
    "vqa-0": "2",
    "vqa-1": " Two.",
    "vqa-2": "yes",
    "ref-3": "[0.0, 0.25, 0.5, 0.75]",
    "ref-4": "[0.5, 0.25, 1.0, 0.75]",
}


class Scripted(torch.nn.Module):
    """Stands in for a model: gives the answer written down for each prompt, and may fail at some call."""

    device = torch.device("cpu")

    def __init__(self, processor, items, replies, fail_at=None):
        super().__init__()
        self.config, self.weight = AutoConfig.for_model("llama"), torch.nn.Parameter(torch.arange(5.0))
        self.tokenizer, self.items, self.replies, self.fail_at = processor.tokenizer, items, replies, fail_at
        self.asked, self.seen = [], []  # ids of items by batch, and pixels

    def generate(self, input_ids, attention_mask, pixel_values, image_sizes, max_new_tokens, pad_token_id, **greedy):
        assert not self.training and greedy["do_sample"] is False and torch.is_inference_mode_enabled()
        assert (attention_mask[:, -1] == 1).all() and ((input_ids == pad_token_id) == (attention_mask == 0)).all()
        if len(self.asked) == self.fail_at:
            raise KeyboardInterrupt
        prompts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        asked = [next(item for item in self.items if f"USER: {item.prompt} ASSISTANT:" in text) for text in prompts]
        self.asked.append([item.id for item in asked])
        self.seen.extend(pixel_values)
        tokens = [self.tokenizer.encode(self.replies[item.id] + "</s>", add_special_tokens=False) for item in asked]
        longest = max(map(len, tokens))
        answers = torch.tensor([row + [pad_token_id] * (longest - len(row)) for row in tokens])
        return torch.cat([input_ids, answers], 1)


@pytest.fixture
def ask(processor, items, tmp_path):
    """Evaluates a scripted model; returns it and the result."""

    def run(replies=RIGHT, fail_at=None, model=None, processor=processor, items=items, **options):
        model = model or Scripted(processor, items, replies, fail_at)
        options = {"output_jsonl": tmp_path / "answers.jsonl", "batch_size": 2, "progress": False, **options}
        return model, evaluate(model, processor, items, **options)

    return run


def test_scores_of_known_answers(ask, tmp_path):
    _, result = ask()
    vqa, boxes = result.scores["vqa"], result.scores["grounding"]
    assert (vqa.score, vqa.num_items, boxes.score, boxes.num_items) == (1, 3, 1, 2)
    assert list(vqa.kinds) == ["how many", "is it"] and vqa.floors["constant_answer_per_kind"] == 1
    assert (boxes.box_frame, boxes.iou_threshold, boxes.mean_iou) == ("centered_square", 0.5, 1)
    assert (result.num_items, result.blank_images) == (5, False)

    wrong = {**RIGHT, "vqa-0": "Two.", "ref-3": "on the left", "ref-4": RIGHT["ref-3"]}
    _, result = ask(wrong, output_jsonl=tmp_path / "wrong.jsonl")
    assert result.scores["vqa"].score == pytest.approx(2 / 3)  # ten same answers are not normalised
    assert result.scores["grounding"].score == 0 and result.scores["grounding"].invalid_share == 0.5

    result.save(tmp_path / "scores.json")
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved == result.to_dict() and saved["scores"]["grounding"]["invalid_share"] == 0.5


def test_frame_and_threshold_reach_the_scorer(ask):
    assert ask(box_frame="raw", iou_threshold=0.6)[1].scores["grounding"].score == 0
    _, lenient = ask(box_frame="raw", iou_threshold=0.25)
    assert lenient.scores["grounding"].score == 1  # read from the file, nothing asked again
    assert lenient.scores["grounding"].mean_iou == pytest.approx(0.5)


def test_longest_prompts_come_first_and_nothing_is_asked_twice(ask, items):
    model, _ = ask()
    assert model.asked == [["vqa-2", "vqa-1"], ["vqa-0", "ref-3"], ["ref-4"]]
    again, result = ask()
    assert again.asked == [] and result.scores["vqa"].score == 1


@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_run_goes_on(ask, tmp_path, torn):
    straight, expected = ask(output_jsonl=tmp_path / "straight.jsonl")
    path = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ask(fail_at=2)
    assert len(path.read_bytes().splitlines()) == 5
    if torn:
        path.write_bytes(path.read_bytes()[:-20])
    rest, result = ask(batch_size=4)
    assert rest.asked == ([["ref-3", "ref-4"]] if torn else [["ref-4"]])
    assert result.scores == expected.scores
    assert sorted(path.read_text().splitlines()) == sorted((tmp_path / "straight.jsonl").read_text().splitlines())


def test_answers_of_another_run_are_refused(ask, items, processor):
    model, _ = ask()
    other_weights = Scripted(processor, items, RIGHT)
    other_weights.weight.data[3] += 0.01
    changes = {
        "model": {"model": other_weights},
        "items": {"items": items[:-1] + [EvalItem("new", items[0].image, "New", "vqa", "", ("a",) * 10)]},
        "num_items": {"items": items[:-1]},
        "processor": {"processor": make_processor(size=24)},
        "max_new_tokens": {"max_new_tokens": 7},
        "blank_images": {"blank_images": True},
    }
    for key, change in changes.items():
        with pytest.raises(ValueError, match=rf"answers.jsonl holds predictions of another run, .*{key} \("):
            ask(**change)
    assert ask(items=items[::-1])[1].scores["vqa"].score == 1  # the same questions in another order


def test_blank_pictures(ask, items, tmp_path):
    model, result = ask(blank_images=True)
    assert result.blank_images and len(model.seen) == 5
    assert all(pixels.std(dim=(1, 2)).max() == 0 and pixels.abs().max() < 0.02 for pixels in model.seen)
    assert all(pixels.abs().max() > 0.5 for pixels in ask(output_jsonl=tmp_path / "seen.jsonl")[0].seen)


def test_blank_floor(ask, processor, items, tmp_path):
    class OnlySeeing(Scripted):
        """Right where it sees something."""

        def generate(self, pixel_values, **inputs):
            blind = pixel_values.abs().max() < 0.1
            self.replies = {**RIGHT, "vqa-0": "3", "ref-3": "?"} if blind else RIGHT
            return super().generate(pixel_values=pixel_values, **inputs)

    _, result = ask(model=OnlySeeing(processor, items, RIGHT), blank_floor=True)
    assert result.scores["vqa"].score == result.scores["grounding"].score == 1
    assert result.scores["vqa"].floors["blank_image"] == pytest.approx(2 / 3)
    assert result.scores["grounding"].floors["blank_image"] == 0.5
    assert (tmp_path / "answers.blank.jsonl").is_file()


def test_floors_from_training_items(ask, items):
    training = [EvalItem("t", "", "", "vqa", "how many", ("2",) * 10)]
    scores = ask(floor_items=training)[1].scores
    assert scores["vqa"].floor_source == "other items" and scores["vqa"].floors["constant_answer"] == pytest.approx(
        2 / 3
    )
    assert scores["grounding"].floor_source == "the scored items"


def test_training_mode_is_given_back(ask, processor, items):
    model = Scripted(processor, items, RIGHT).train()
    ask(model=model)
    assert model.training
    ask(model=model.eval(), output_jsonl=items[0].image + ".jsonl")
    assert not model.training


def test_bad_requests(ask, items, tmp_path):
    gone = EvalItem("gone", str(tmp_path / "gone.png"), "", "vqa", "", ("a",) * 10)
    turned = EvalItem("turned", items[3].image, "", "grounding", "", (), Box(0, 0, 1, 1), (40, 20))
    requests = [
        ({"items": []}, "There is no item to ask"),
        ({"items": items + items[:1]}, "The id 'vqa-0' comes twice among the items"),
        (
            {"items": [EvalItem("x", "", "", "ocr", "")]},
            "The item 'x' has the task 'ocr'; known are vqa, textvqa",
        ),
        ({"box_frame": "square"}, "The box frame 'square' is unknown; known are centered_square, canvas, raw"),
        ({"batch_size": 0}, "batch_size is 0, but must be at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1, but must be at least 1"),
        ({"items": [*items, gone]}, r"'gone', .*gone.png, is missing \(1 of 6 items have none\)"),
        ({"items": [turned]}, "3.png, is 20 pixels high and 40 wide, but the data set says 40 and 20"),
    ]
    for number, (request, message) in enumerate(requests):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            ask(**request, output_jsonl=tmp_path / f"{number}.jsonl")


def test_a_tokenizer_that_cannot_pad(ask):
    processor = make_processor()
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="has no padding token, .* set one, for example"):
        ask(processor=processor)


# --- with a real model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vision = AutoConfig.for_model(
        "convnext", hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, out_features=["stage2"], image_size=IMAGE_SIZE
    )
    text = AutoConfig.for_model(
        "llama", vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlavaStyleForConditionalGeneration(
        LlavaStyleConfig(vision_config=vision, text_config=text, image_token_id=3)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
    return model.eval()


def answers_in(path):
    return {row["id"]: row["prediction"] for row in map(json.loads, path.read_text().splitlines()[1:])}


def test_a_batch_answers_as_each_item_alone(model, processor, items, tmp_path):
    model.generation_config = GenerationConfig(
        **{**model.generation_config.to_dict(), "do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0}
    )
    paths = {size: tmp_path / f"{size}.jsonl" for size in (1, 5)}
    for size, path in paths.items():
        evaluate(model, processor, items, output_jsonl=path, batch_size=size, max_new_tokens=6, progress=False)
    assert answers_in(paths[1]) == answers_in(paths[5]) and len(set(answers_in(paths[1]).values())) > 1

    (first, *_) = items
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "path": first.image}, {"type": "text", "text": first.prompt}]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    ids = inputs["input_ids"]
    for _ in range(6):  # the definition of greedy decoding
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0, -1]
        logits[3] = -torch.inf
        ids = torch.cat([ids, logits.argmax().view(1, 1)], 1)
    said = ids[0, inputs["input_ids"].shape[1] :].tolist()
    said = said[: said.index(2)] if 2 in said else said
    assert answers_in(paths[1])[first.id] == processor.decode(said, skip_special_tokens=True).strip()


def test_pictures_matter_and_blank_ones_do_not_differ(model, processor, pictures, tmp_path):
    items = [EvalItem(str(n), str(pictures / f"{n}.png"), "Colour?", "vqa", "", ("a",) * 10) for n in range(5)]
    said = {}
    for blank in (False, True):
        path = tmp_path / f"{blank}.jsonl"
        evaluate(model, processor, items, output_jsonl=path, max_new_tokens=6, blank_images=blank, progress=False)
        said[blank] = set(answers_in(path).values())
    assert len(said[False]) > 1 and len(said[True]) == 1


def test_fingerprints_outlive_saving_and_notice_changes(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = LlavaStyleForConditionalGeneration.from_pretrained(tmp_path)
    assert model_fingerprint(loaded) == model_fingerprint(model)
    assert processor_fingerprint(LlavaStyleProcessor.from_pretrained(tmp_path)) == processor_fingerprint(processor)

    loaded.config.tap_norm = "layernorm"
    assert model_fingerprint(loaded) != model_fingerprint(model)
    assert processor_fingerprint(make_processor(geometry="resize")) != processor_fingerprint(processor)
    rounded = copy.deepcopy(model).bfloat16()
    assert model_fingerprint(rounded) != model_fingerprint(copy.deepcopy(rounded).float())


def task_files(folder, pictures):
    """The questions and boxes of two pictures as VQA v2 and RefCOCO files."""
    questions = [{"question_id": n, "image_id": n, "question": f"What is {n}?"} for n in range(2)]
    annotations = [
        {"question_id": n, "image_id": n, "question_type": "what", "answers": [{"answer": "a"}] * 10} for n in range(2)
    ]
    refs = [
        {"ref_id": n, "ann_id": n, "image_id": n, "split": "val", "sentences": [{"sent_id": n, "sent": "it"}]}
        for n in range(2)
    ]
    instances = {
        "images": [{"id": n, "file_name": f"{n}.png", "height": 20, "width": 40} for n in range(2)],
        "annotations": [{"id": n, "bbox": [0, 0, 20, 20], "category_id": 1} for n in range(2)],
        "categories": [{"id": 1, "name": "cat"}],
    }
    contents = {"q": {"questions": questions}, "a": {"annotations": annotations}, "refs": refs, "instances": instances}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("task, asked, known", [("vqa", "q", "a"), ("grounding", "refs", "instances")])
def test_command(model, processor, pictures, tmp_path, capsys, task, asked, known):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    task_files(tmp_path, pictures)
    command = [
        "--model", str(tmp_path / "model"), "--task", task, "--questions", str(tmp_path / f"{asked}.json"),
        "--annotations", str(tmp_path / f"{known}.json"), "--images", str(pictures), "--device", "cpu",
        "--image-pattern", "{image_id}.png", "--output", str(tmp_path / "out.jsonl"), "--max-new-tokens", "3",
    ]  # fmt: skip
    assert main([*command, "--blank-floor"]) == 0
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "out.scores.json").read_text())
    assert saved["data"] == {"vqa": "q.json", "grounding": "refs.json, val"}[task]
    scores = saved["scores"][task]
    assert scores["num_items"] == 2 and "blank_image" in scores["floors"]
    assert re.search(r"all +│ +2 │ +0.00", printed) and "constants are chosen on the scored items" in printed

    assert main([*command, "--limit", "1"]) == 1
    assert "error: " in (error := capsys.readouterr().err) and "num_items (2 there, 1 here)" in error


@pytest.mark.slow
def test_command_runs_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "ssm_vlm.eval.evaluate", "--help"], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0 and "--blank-floor" in run.stdout and "RuntimeWarning" not in run.stderr
