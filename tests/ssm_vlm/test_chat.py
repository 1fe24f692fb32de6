"""`ssm-vlm chat`, with a tiny model that has learned a few answers by heart."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

from ssm_vlm import (
    LlavaStyleConfig,
    LlavaStyleForConditionalGeneration,
    LlavaStyleImageProcessor,
    LlavaStyleProcessor,
    SSMVisionConfig,
    cli,
)
from ssm_vlm.chat import COMMANDS, Session, main
from ssm_vlm.conversation import Conversation, load_chat_model
from ssm_vlm.eval.drawing import PREDICTED_COLOUR
from ssm_vlm.training.collator import ConversationCollator

RED, BLUE = (220, 30, 30), (30, 30, 220)
SHORT = "\nAnswer the question using a single word or phrase."
GROUNDING = 'Please provide the bounding box coordinate of the region this sentence describes: "the middle"'
BOX = "[0.25, 0.35, 0.75, 0.65]"
STORY = "one two three four five six seven eight nine ten eleven twelve"
# What the model knows by heart: the colour of the picture (None: no picture), then questions and answers in turn.
LESSONS = [
    (RED, ["What colour?", "It is red."]),
    (BLUE, ["What colour?", "It is blue."]),
    (RED, ["What colour?" + SHORT, "red"]),
    (BLUE, ["What colour?" + SHORT, "blue"]),
    (RED, [GROUNDING, BOX]),
    (BLUE, [GROUNDING, BOX]),
    (RED, ["What colour?", "It is red.", "And again?", "red again"]),
    (BLUE, ["What colour?", "It is blue.", "And again?", "blue again"]),
    (RED, ["And again?", "what?"]),
    (BLUE, ["And again?", "what?"]),
    (RED, ["Tell me a story.", STORY]),
    (None, ["Hello?", "Hi there."]),
]
TEMPLATE = """{{ bos_token }}
{%- for message in messages if message['content'] is not string -%}
  {%- for part in message['content'] if part['type'] == 'image' -%}{{ image_token }}{%- endfor -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- 'USER:' -}}
    {%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}
      {%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
    {%- endif -%}
    {{- 'ASSISTANT:' -}}
  {%- else -%}
    {%- generation -%}{{ ' ' + message['content'] + eos_token }}{%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}"""


def make_processor() -> LlavaStyleProcessor:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for _, turns in LESSONS for text in turns]
    backend.train_from_iterator(["USER: ASSISTANT:", *texts], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    image_processor = LlavaStyleImageProcessor(geometry="letterbox", size=16, downsampling=[[4, "floor"], [2, "ceil"]])
    return LlavaStyleProcessor(image_processor, tokenizer, chat_template=TEMPLATE)


def lesson(colour: tuple[int, int, int] | None, turns: list[str]) -> dict:
    content = [{"type": "image"}] if colour else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": turns[0]}]}]
    for number, text in enumerate(turns[1:], start=1):
        messages.append({"role": ("user", "assistant")[number % 2], "content": text})
    return {"id": turns[0], "image": Image.new("RGB", (40, 20), colour) if colour else None, "messages": messages}


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    """A folder as a finished run leaves it."""
    torch.manual_seed(0)
    processor = make_processor()
    vision_config = SSMVisionConfig(hidden_sizes=[8, 16], depths=[1, 1], image_size=16)
    text_config = AutoConfig.for_model(
        "llama", vocab_size=len(processor.tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaStyleConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=processor.image_token_id,
        tap_norm="layernorm",
    )
    model = LlavaStyleForConditionalGeneration(config).train()
    batch = ConversationCollator(processor)([lesson(*row) for row in LESSONS])
    batch.pop("sample_ids")
    batch["image_features"] = model.get_tap_features(batch.pop("pixel_values"), batch.pop("image_sizes"))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(400):
        loss = model(**batch).loss
        if loss < 0.01:
            break
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert loss < 0.01, f"the model has not learned its lessons: the loss is {loss:.4f}"
    folder = tmp_path_factory.mktemp("runs") / "vlm-0123456789"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "recipe.yaml").write_text("name: vlm\n")
    (folder / "finished.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def loaded(run_dir):
    """Model and processor, loaded once."""
    return load_chat_model(str(run_dir))


@pytest.fixture
def chat(loaded, monkeypatch, capsys):
    """Runs the command with the model at hand; gives what it prints."""
    monkeypatch.setattr("ssm_vlm.chat.load_chat_model", lambda name, device, dtype: loaded)

    def run(*argv, lines=None):
        monkeypatch.setattr(sys, "stdin", io.StringIO("" if lines is None else "\n".join(lines) + "\n"))
        assert main(["--model", "any", *map(str, argv)]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def says(loaded, monkeypatch):
    """Makes the model say something else, after a look at the picture."""
    model, processor = loaded
    generate = LlavaStyleForConditionalGeneration.generate

    def script(text):
        tokens = torch.tensor(processor.tokenizer.encode(" " + text + "</s>", add_special_tokens=False))

        def scripted(self, *args, streamer, max_new_tokens, **kwargs):
            generate(self, *args, max_new_tokens=1, **kwargs)
            streamer.put(kwargs["input_ids"])
            for token in tokens:
                streamer.put(token[None])
            streamer.end()
            return torch.cat([kwargs["input_ids"][0], tokens])[None]

        monkeypatch.setattr(LlavaStyleForConditionalGeneration, "generate", scripted)

    return script


@pytest.fixture
def photos(tmp_path):
    """A red and a blue picture, 40 pixels wide and 20 high."""
    for name, colour in [("red.png", RED), ("blue.png", BLUE)]:
        Image.new("RGB", (40, 20), colour).save(tmp_path / name)
    return tmp_path


def boxes_in(output: str) -> list[list[float]]:
    return [[float(v) for v in found.split(", ")] for found in re.findall(r"^box: ([-\d., ]+) \(", output, re.M)]


# One question


@pytest.mark.parametrize("colour", ["red", "blue"])
def test_it_answers_about_the_picture(chat, photos, colour):
    assert chat("--image", photos / f"{colour}.png", "--prompt", "What colour?") == f"It is {colour}.\n"
    assert chat("--image", photos / f"{colour}.png", "--prompt", "What colour?", "--short") == f"{colour}\n"


def test_without_a_picture(chat):
    assert chat("--prompt", "Hello?") == "Hi there.\n"


def test_a_box_is_told_in_pixels_and_drawn_where_asked(chat, photos):
    told = chat("--image", photos / "red.png", "--box", "the middle")
    assert told == (
        f"{BOX}\nbox: 10.0, 4.0, 30.0, 16.0 (left, top, right, bottom) in pixels of red.png (40 x 20)\n"
        "(--out annotated.png draws it on the picture)\n"
    )
    out = photos / "annotated.png"
    told = chat("--image", photos / "red.png", "--box", "the middle", "--out", out)
    assert told.endswith(f"\ndrawn in {out}, 11 times as large\n")
    with Image.open(out) as drawn:
        assert drawn.size == (440, 220) and drawn.getpixel((110, 110)) == PREDICTED_COLOUR


def exif_rotated(folder):
    picture, exif = Image.new("RGB", (40, 20), RED), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    picture.save(folder / "odd.jpg", exif=exif, quality=95)
    return folder / "odd.jpg"


def plain(mode, size, colour):
    def save(folder):
        Image.new(mode, size, colour).save(folder / "odd.png")
        return folder / "odd.png"

    return save


@pytest.mark.parametrize(
    ("save", "size", "box"),
    [
        pytest.param(plain("RGB", (1, 1), RED), (1, 1), (0.25, 0.35, 0.75, 0.65), id="1x1"),
        pytest.param(plain("RGB", (1333, 800), RED), (1333, 800), (333.25, 200.05, 999.75, 599.95), id="1333x800"),
        pytest.param(plain("L", (40, 20), 90), (40, 20), (10, 4, 30, 16), id="greyscale"),
        pytest.param(plain("RGBA", (40, 20), (*RED, 128)), (40, 20), (10, 4, 30, 16), id="RGBA"),
        pytest.param(exif_rotated, (20, 40), (0, 14, 20, 26), id="EXIF-rotated"),
        pytest.param(plain("RGB", (4, 4000), RED), (4, 4000), (0, 1400, 4, 2600), id="4x4000"),
    ],
)
def test_odd_pictures(chat, says, tmp_path, save, size, box):
    """The box is in pixels of the upright picture, and drawn there. Corners by hand: `BOX` of a centred square."""
    says(BOX)
    out = tmp_path / "annotated.png"
    told = chat("--image", save(tmp_path), "--prompt", "Where?", "--out", out)
    assert f"({size[0]} x {size[1]})" in told
    assert boxes_in(told) == [pytest.approx(box, abs=0.0501)]
    with Image.open(out) as drawn:
        scale = drawn.width / size[0]
        assert drawn.height == size[1] * scale
        left, top, right, bottom = (value * scale for value in box)
        middle = ((left + right) / 2, (top + bottom) / 2)
        edges = [(left, middle[1]), (right, middle[1]), (middle[0], top), (middle[0], bottom)]
        inside = [(min(x, drawn.width - 1), min(y, drawn.height - 1)) for x, y in edges]
        assert [drawn.getpixel(tuple(map(int, point))) for point in inside] == [PREDICTED_COLOUR] * 4
        if size != (4, 4000):  # where the line covers the whole width
            assert drawn.getpixel((drawn.width // 2, drawn.height // 2)) != PREDICTED_COLOUR


@pytest.mark.parametrize(
    ("frame", "geometry", "box"),
    [
        ("centered_square", "letterbox", (10, 4, 30, 16)),
        ("raw", "letterbox", (10, 7, 30, 13)),
        ("canvas", "letterbox_corner", (10, 14, 30, 20)),  # its lower part lies in the padding
    ],
)
def test_boxes_are_read_in_the_frame_of_the_model(chat, says, loaded, photos, monkeypatch, frame, geometry, box):
    says(BOX)
    monkeypatch.setattr(loaded[0].config, "box_frame", frame)
    monkeypatch.setattr(loaded[1].image_processor, "geometry", geometry)
    assert boxes_in(chat("--image", photos / "red.png", "--prompt", "Where?")) == [pytest.approx(box)]


def test_boxes_in_a_sentence(chat, says, photos):
    says("One at [0.25, 0.35, 0.5, 0.65], one at [0.5,0.25,1,0.75]; not [0.5, 0.5, 0.1, 0.9] nor [2].")
    out = photos / "two.png"
    told = chat("--image", photos / "blue.png", "--prompt", "Where?", "--out", out)
    assert boxes_in(told) == [[10, 4, 20, 16], [20, 0, 40, 20]]
    with Image.open(out) as drawn:
        assert drawn.getpixel((110, 110)) == drawn.getpixel((438, 110)) == PREDICTED_COLOUR


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("no box", "(the answer holds no box to draw, so {out} is not written)"),
        ("[0.0, 0.0, 1.0, 0.2]", "(a box lies beside the picture, where it was padded)"),
        ("[0.5, 0.2, 0.4, 0.9]", "(the answer holds no box to draw, so {out} is not written)"),
    ],
)
def test_without_a_box_in_the_picture_nothing_is_written(chat, says, photos, answer, told):
    says(answer)
    out = photos / "annotated.png"
    output = chat("--image", photos / "red.png", "--prompt", "Where?", "--out", out)
    assert told.format(out=out) in output and not out.exists() and not boxes_in(output)


def test_an_answer_that_is_cut_or_empty_is_told(chat, says, photos):
    options = ["--image", photos / "red.png", "--prompt", "Tell me a story."]
    assert "cut off" not in chat(*options)
    told = chat(*options, "--max-new-tokens", "3")
    assert STORY.startswith(told.splitlines()[0].strip()) and "cut off here; --max-new-tokens" in told
    says("")
    assert chat(*options) == "\n(the answer is empty)\n"


def test_an_answer_that_just_fits_is_not_cut(loaded):
    model, processor = loaded
    length = len(processor.tokenizer.encode(" " + STORY + "</s>", add_special_tokens=False))
    picture = Image.new("RGB", (40, 20), RED)
    for limit, is_cut in [(length, False), (length - 1, True)]:
        answer = Conversation(model, processor, picture, max_new_tokens=limit).ask("Tell me a story.")
        assert (answer.text, answer.is_cut) == (STORY, is_cut)


def test_a_model_cannot_steer_the_terminal(chat, says):
    says("a\x1b[31mb\x07\x9bc [bold]d[/bold]")
    assert chat("--prompt", "Hello?").strip() == "a[31mbc [bold]d[/bold]"


def test_temperature_draws_tokens(chat, monkeypatch):
    seen = []
    generate = LlavaStyleForConditionalGeneration.generate
    monkeypatch.setattr(
        LlavaStyleForConditionalGeneration,
        "generate",
        lambda self, *args, **kwargs: seen.append(kwargs) or generate(self, *args, **kwargs),
    )
    chat("--prompt", "Hello?")
    chat("--prompt", "Hello?", "--temperature", "0.5", "--max-new-tokens", "4")
    assert seen[0]["do_sample"] is False and seen[0]["max_new_tokens"] == 256
    assert (seen[1]["do_sample"], seen[1]["temperature"], seen[1]["max_new_tokens"]) == (True, 0.5, 4)
    torch.manual_seed(0)
    hot = {chat("--prompt", "Hello?", "--temperature", "50", "--max-new-tokens", "6") for _ in range(3)}
    assert len(hot) == 3


# Conversations


def test_a_conversation_remembers_until_it_is_reset(chat, photos):
    lines = ["What colour?", "", "And again?", "/reset", "And again?", f"/image {photos}/blue.png", "What colour?"]
    told = chat("--image", photos / "red.png", lines=[*lines, "And again?"])
    assert told.splitlines() == [
        "red.png (40 x 20); /help lists the commands, Ctrl-C stops an answer",
        "It is red.",
        "red again",
        "the conversation begins anew",
        "what?",
        "blue.png (40 x 20); the conversation begins anew",
        "It is blue.",
        "blue again",
        "",
    ]


def test_a_conversation_may_begin_without_a_picture(chat, photos):
    told = chat(lines=["Hello?", "/box the middle", f"/image '{photos}/red.png'", "What colour?"]).splitlines()
    assert told[0].startswith("no picture yet;")
    assert told[1:3] == [
        "Hi there.",
        "error: There is no picture to find a box in: give one with --image, or with /image PATH.",
    ]
    assert told[4] == "It is red."


def test_short_answers_in_a_conversation(chat, photos):
    told = chat("--image", photos / "red.png", "--short", lines=["What colour?", "/reset", "/box the middle"])
    assert told.splitlines()[1] == "red" and BOX in told.splitlines()


def test_boxes_in_a_conversation(chat, photos):
    first, second = photos / "first one.png", photos / "second.png"
    lines = ["What colour?", f"/save {first}", "/reset", "/box the middle", f"/save {first}", f"/save {photos}/red.png"]
    told = chat("--image", photos / "red.png", lines=[*lines, "/reset", f"/save {second}"])
    assert boxes_in(told) == [[10, 4, 30, 16]] and "(/save annotated.png draws it on the picture)" in told
    assert f"drawn in {first}" in told and first.exists()
    assert f"error: {photos}/red.png is the picture itself" in told
    assert told.count("error: The last answer holds no box to draw.") == 2 and not second.exists()

    told = chat("--image", photos / "red.png", "--out", second, lines=["/box the middle"])
    assert f"drawn in {second}" in told and second.exists()
    told = chat("--image", photos / "red.png", lines=["/box the middle", "/save", f"/save '{photos}/a b.png' "])
    assert "error: There is no path: say where to, for example /save annotated.png." in told
    assert (photos / "a b.png").exists()


def test_mistakes_leave_the_conversation_as_it_was(chat, photos):
    (photos / "broken.png").write_bytes(b"no picture")
    mistakes = {
        "/image none.png": "There is no image file 'none.png'.",
        f"/image {photos}/broken.png": f"Cannot decode the image file '{photos}/broken.png': it is not of an image",
        "/image": "There is no path: say which picture, for example /image photo.jpg.",
        "/box": "There is nothing to find: say what, for example /box the red car.",
        "/exit": f"There is no command /exit: known are {', '.join(COMMANDS)}.",
        "What <image> is this?": "A question cannot hold <image>, which stands for the picture itself.",
    }
    told = chat("--image", photos / "red.png", lines=["What colour?", *mistakes, "And again?"]).splitlines()
    assert told[1] == "It is red." and told[-2] == "red again"
    for line, message in zip(told[2:-2], mistakes.values(), strict=True):
        assert line.startswith(f"error: {message}")


def test_help_and_quit(chat):
    told = chat(lines=["/help", "/quit", "Hello?"])
    assert all(f"  {command.usage} " in told for command in COMMANDS.values()) and "Hi there" not in told


def test_an_interrupted_question_is_forgotten_and_the_conversation_goes_on(chat, photos, monkeypatch):
    """Ctrl-C in an answer stops the answer; where a question is expected, it ends the conversation."""
    lines = iter(["What colour?", "And again?", KeyboardInterrupt(), "Hello?"])
    write, interrupts = Session._write, iter([KeyboardInterrupt()])

    def typed(prompt):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    def interrupted_once(session, piece):
        for interrupt in interrupts:
            raise interrupt
        write(session, piece)

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(Session, "_write", interrupted_once)
    told = chat("--image", photos / "red.png").splitlines()
    assert told[1:] == ["", "(stopped; the question is forgotten)", "what?", ""] and next(lines) == "Hello?"


def test_an_answer_streams_while_it_is_generated(loaded):
    model, processor = loaded
    pieces, steps = [], []
    hook = model.language_model.register_forward_hook(lambda *_: steps.append(None))
    try:
        conversation = Conversation(model, processor, Image.new("RGB", (40, 20), RED))
        answer = conversation.ask("Tell me a story.", on_text=lambda piece: pieces.append((piece, len(steps))))
    finally:
        hook.remove()
    assert answer.text == STORY == "".join(piece for piece, _ in pieces) and not answer.is_cut
    assert len(pieces) == 12 and pieces[0][0] == "one " and pieces[0][1] <= 4 < len(steps) - 4
    assert conversation.ask("Tell me a story.").text  # nothing to stream to


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *argv):
        self.seen = ""
        code = "import sys; from ssm_vlm.cli import main; sys.exit(main())"
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # it is ignored where the tests run in the background
            os.execv(sys.executable, [sys.executable, "-c", code, "chat", *map(str, argv)])

    def wait_for(self, text, seconds=600):
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} did not come; the terminal shows {self.seen!r}"
            try:
                piece = os.read(self.fd, 4096)
            except OSError:  # Linux: the other end is closed
                piece = b""
            assert piece, f"it ended before {text!r} came; the terminal shows {self.seen!r}"
            self.seen += piece.decode()
        self.seen = self.seen.partition(text)[2]

    def type(self, text):
        os.write(self.fd, text.encode())

    def end(self, key):
        """The exit status after `key`, which is typed again where nothing comes of it: Python's line editor loses a
        Ctrl-C that arrives after it shows the prompt and before it waits for a key."""
        for _ in range(5):
            self.type(key)
            while select.select([self.fd], [], [], 20)[0]:
                try:
                    piece = os.read(self.fd, 4096)
                except OSError:  # Linux: the other end is closed
                    piece = b""
                if not piece:
                    os.close(self.fd)
                    return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"{key!r} did not end it")


@pytest.mark.parametrize("end", ["\x03", pytest.param("\x04", marks=pytest.mark.slow)], ids=["Ctrl-C", "Ctrl-D"])
def test_in_a_real_terminal(run_dir, photos, end):
    terminal = Terminal("--model", run_dir, "--image", photos / "red.png", "--device", "cpu")
    terminal.wait_for("red.png (40 x 20)")
    terminal.wait_for("> ")
    terminal.type("What colour?\r")
    terminal.wait_for("It is red.")
    terminal.wait_for("> ")
    terminal.type("What\x7f\x7f\x7f\x7fAnd again?\r")  # typed, taken back, typed
    terminal.wait_for("red again")
    terminal.wait_for("> ")
    assert terminal.end(end) == 0


# Loading


def test_loading_in_another_dtype(run_dir, loaded):
    assert loaded[0].dtype == torch.float32 and not loaded[0].training
    model, processor = load_chat_model(str(run_dir), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    picture = Image.new("RGB", (40, 20), BLUE)
    assert Conversation(model, processor, picture).ask("What colour?").text == "It is blue."


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(run_dir, photos, capsys):
    options = ["--model", str(run_dir), "--image", str(photos / "blue.png"), "--prompt", "What colour?"]
    assert main([*options, "--device", "cuda", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == "It is blue.\n"


def test_a_relative_folder_is_no_name_on_the_hub(run_dir, photos, monkeypatch, capsys):
    monkeypatch.chdir(run_dir.parents[1])
    name = f"{run_dir.parent.name}/{run_dir.name}"
    assert main(["--model", name, "--image", str(photos / "red.png"), "--prompt", "What colour?"]) == 0
    assert capsys.readouterr().out == "It is red.\n"
    assert cli.main(["chat", "--model", f"{run_dir.parent.name}/none", "--prompt", "Hello?"]) == 1
    assert f"does not exist: {WANTED} ({run_dir.parent.name} holds {run_dir.name})." in capsys.readouterr().err


WANTED = "give the run directory of a finished `ssm-vlm train`, or a folder with a saved model and its processor"


def nothing(folder):
    shutil.rmtree(folder)


def only_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("model")


def unfinished(folder):
    for name in ("finished.json", "config.json", "processor_config.json", "model.safetensors"):
        (folder / name).unlink()
    (folder / "checkpoint-5").mkdir()


def no_model(folder):
    shutil.copytree(folder, folder / "good")
    (folder / "config.json").unlink()


def other_model(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}')


def no_json(folder):
    (folder / "config.json").write_text("[1, 2")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def torn_weights(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])


def fewer_weights(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: w for name, w in weights.items() if "connector" not in name},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def wider_model(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 100
    (folder / "config.json").write_text(json.dumps(config))


def no_processor(folder):
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (nothing, f"The model folder {{0}} does not exist: {WANTED}."),
        (only_a_file, f"The model folder {{0}} is a file: {WANTED}."),
        (
            unfinished,
            "The run in {0} has not finished (it has no finished.json): start it again with the command that ",
        ),
        (no_model, f"The folder {{0}} holds no model (no config.json): {WANTED} ({{0}} holds good)."),
        (other_model, "{0} holds a model of type 'llama', which cannot be asked about pictures: give one of type"),
        (no_json, "{0}/config.json is no model's config: it should be a JSON object with a model_type."),
        (no_weights, "The model in {0} cannot be loaded: "),
        (torn_weights, "The model in {0} cannot be loaded: "),
        (
            fewer_weights,
            "The weights in {0} do not fit its config.json: 4 tensors are missing or of another shape, first ",
        ),
        (
            wider_model,
            "The weights in {0} do not fit its config.json: 6 tensors are missing or of another shape, first ",
        ),
        (no_processor, "The model in {0} cannot be loaded: "),
    ],
)
def test_a_model_that_cannot_be_loaded(run_dir, tmp_path, capsys, damage, message):
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    damage(folder)
    assert cli.main(["chat", "--model", str(folder), "--prompt", "Hello?"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: " + message.format(folder))
    assert captured.err.count("\n") == 1 and captured.err.rstrip().endswith(".")


def test_a_name_on_the_hub_that_cannot_be_had(capsys):
    assert cli.main(["chat", "--model", "nobody-here/no-model", "--prompt", "Hello?"]) == 1
    message = "error: There is no folder nobody-here/no-model, and from the Hub it cannot be loaded: "
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "{0}/none.jpg"], "There is no image file '{0}/none.jpg'."),
        (["--image", "{0}/broken.jpg"], "Cannot decode the image file '{0}/broken.jpg': it is not of an image format"),
        (["--image", "{0}/cut.png"], "Cannot decode the image file '{0}/cut.png': "),
        (["--out", "{0}/box.txt"], "{0}/box.txt does not say in which format to write the picture: end it in .png"),
        (["--out", "{0}/box"], "{0}/box does not say in which format"),
        (["--out", "{0}/none/box.png"], "The folder {0}/none, in which box.png should be written, does not exist."),
        (["--image", "{0}/red.png", "--out", "{0}/../{1}/red.png"], "{0}/../{1}/red.png is the picture itself, which"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0, but must be at least 1."),
        (["--temperature", "-0.1"], "temperature is -0.1, but must be 0 (always the likeliest token) or more."),
        (["--temperature", "nan"], "temperature is nan, but must be"),
    ],
)
def test_bad_options_are_told_before_the_model_is_loaded(photos, monkeypatch, capsys, options, message):
    monkeypatch.setattr("ssm_vlm.chat.load_chat_model", None)
    (photos / "broken.jpg").write_bytes(b"no picture")
    Image.effect_noise((40, 20), 50).save(photos / "cut.png")
    (photos / "cut.png").write_bytes((photos / "cut.png").read_bytes()[:200])
    places = str(photos), photos.name
    options = [option.format(*places) for option in options]
    assert cli.main(["chat", "--model", "any", "--prompt", "Hello?", *options]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message.format(*places)}") and captured.err.count("\n") == 1


def test_an_unusable_device(run_dir, capsys):
    for device in ("toaster", "cuda:99"):
        assert cli.main(["chat", "--model", str(run_dir), "--prompt", "Hello?", "--device", device]) == 1
        captured = capsys.readouterr()
        assert (
            captured.err.startswith(f"error: The device {device!r} cannot be used: ") and captured.err.count("\n") == 1
        )


def test_an_empty_question(chat):
    with pytest.raises(ValueError, match="The question is empty"):
        chat("--prompt", " ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--box", "the middle"], "--box needs a picture"),
        (["--box", "the middle", "--image", "red.png", "--short"], "--short goes with --prompt or a conversation"),
        (["--box", "the middle", "--prompt", "Hello?"], "not allowed with"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_options_that_do_not_go_together(capsys, options, message):
    with pytest.raises(SystemExit) as end:
        main(["--model", "any", *options])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_interrupted_while_loading(photos, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ssm_vlm.chat.load_chat_model", interrupted)
    assert main(["--model", "any", "--prompt", "Hello?"]) == 130
