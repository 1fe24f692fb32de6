"""`ssm-vlm chat`: ask a model about a picture of your own, once or in a conversation in the terminal."""

import argparse
import contextlib
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from rich.console import Console
from transformers.utils import logging

from .conversation import Conversation, check_generation, load_chat_model
from .eval.drawing import PREDICTED_COLOUR, LabelledBox, draw_boxes
from .eval.grounding import Box
from .eval.tasks import GROUNDING_PROMPT, VQA_PROMPT
from .modeling.image_processing_llava_style import load_image

DTYPES = ("auto", "float32", "bfloat16", "float16")


class Session:
    """Shows a conversation in the terminal: answers as they come, boxes in pixels, and boxes drawn where asked.

    Args:
        conversation: with the picture in it, if there is one.
        console: where everything is written.
        picture_path: where that picture is from.
        out: file to draw every answer's boxes in, or None.
        is_short: ask each question with the line for short answers.
    """

    def __init__(
        self,
        conversation: Conversation,
        console: Console,
        picture_path: str | None = None,
        out: Path | None = None,
        is_short: bool = False,
    ):
        self.conversation, self.console, self.picture_path = conversation, console, picture_path
        self.out, self.is_short, self.is_over = out, is_short, False
        self.boxes: list[Box] = []  # of the last answer, those with an area
        self.label = ""
        self.how_to_save = "--out annotated.png"

    def ask(self, question: str) -> None:
        """Asks a question of the user's own."""
        self._ask(VQA_PROMPT.replace("{question}", question) if self.is_short else question, label="")

    def ask_for_box(self, expression: str) -> None:
        """Asks where something is, with the prompt that models learn localisation by.

        Raises:
            ValueError: there is no picture, or no expression.
        """
        if self.conversation.picture is None:
            raise ValueError("There is no picture to find a box in: give one with --image, or with /image PATH.")
        if not expression.strip():
            raise ValueError("There is nothing to find: say what, for example /box the red car.")
        self._ask(GROUNDING_PROMPT.replace("{sentence}", expression), label=expression)

    def _ask(self, prompt: str, label: str) -> None:
        try:
            answer = self.conversation.ask(prompt, on_text=self._write)
        except KeyboardInterrupt:
            self.console.print()
            raise
        self.console.print()
        if not answer.text:
            self.say("(the answer is empty)", "dim")
        if answer.is_cut:
            self.say("(the answer was cut off here; --max-new-tokens allows longer ones)", "dim")
        found = self.conversation.boxes(answer.text)
        self.boxes, self.label = [box for box in found if box.x1 < box.x2 and box.y1 < box.y2], label
        for box in self.boxes:
            corners = ", ".join(f"{value:.1f}" for value in box)
            self.say(f"box: {corners} (left, top, right, bottom) in pixels of {self.picture_name}", "cyan")
        if len(found) > len(self.boxes):
            self.say("(a box lies beside the picture, where it was padded)", "dim")
        if self.boxes and self.out is not None:
            self.save(self.out)
        elif self.boxes:
            self.say(f"({self.how_to_save} draws it on the picture)", "dim")
        elif self.out is not None:
            self.say(f"(the answer holds no box to draw, so {self.out} is not written)", "dim")

    @property
    def picture_name(self) -> str:
        """The picture's file and size, width first, as for the user."""
        picture = self.conversation.picture
        if picture is None:
            return "no picture yet"
        return f"{os.path.basename(self.picture_path or 'picture')} ({picture.width} x {picture.height})"

    def _write(self, piece: str) -> None:
        self.console.out(_printable(piece), end="", highlight=False)

    def say(self, line: str, style: str = "") -> None:
        """Writes a line that is not the model's."""
        self.console.print(_printable(line), style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def save(self, path: str | Path) -> None:
        """Draws the boxes of the last answer on the picture.

        Raises:
            ValueError: the last answer holds no box, there is no path, or see `check_out`.
            OSError: the file cannot be written.
        """
        picture = self.conversation.picture
        if picture is None or not self.boxes:
            raise ValueError("The last answer holds no box to draw.")
        path = Path(_unquoted(path, "say where to, for example /save annotated.png")).expanduser()
        check_out(path, self.picture_path)
        labelled = [LabelledBox(box, self.label, PREDICTED_COLOUR) for box in self.boxes]
        drawn = draw_boxes(picture, labelled)
        drawn.save(path)
        scale = drawn.width // picture.width
        self.say(f"drawn in {path}" + (f", {scale} times as large" if scale > 1 else ""), "cyan")

    def look_at(self, path: str) -> None:
        """Looks at another picture, which begins a new conversation."""
        path = os.path.expanduser(_unquoted(path, "say which picture, for example /image photo.jpg"))
        self.conversation.start(load_image(path))
        self.picture_path, self.boxes = path, []
        self.say(f"{self.picture_name}; the conversation begins anew", "dim")

    def reset(self, _: str) -> None:
        """Forgets what was said, but not the picture."""
        self.conversation.start(self.conversation.picture)
        self.boxes = []
        self.say("the conversation begins anew", "dim")

    def help(self, _: str) -> None:
        """Lists the commands."""
        for command in COMMANDS.values():
            self.say(f"  {command.usage:<18} {command.meaning}", "dim")

    def quit(self, _: str) -> None:
        """Ends the conversation."""
        self.is_over = True

    def run(self) -> None:
        """Reads questions and commands until /quit, the end of the input, or Ctrl-C where a question is expected."""
        self.how_to_save = "/save annotated.png"
        self.say(f"{self.picture_name}; /help lists the commands, Ctrl-C stops an answer", "dim")
        is_typed = sys.stdin.isatty()
        if is_typed:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  input() then edits lines and knows the ones before
        while not self.is_over:
            try:
                line = input("> " if is_typed else "").strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            try:
                self.handle(line)
            except KeyboardInterrupt:
                self.say("(stopped; the question is forgotten)", "dim")
            except (ValueError, OSError) as error:
                self.say(f"error: {error}", "red")

    def handle(self, line: str) -> None:
        """Does what one line of the user's asks for; nothing for an empty one.

        Raises:
            ValueError: an unknown command, or see the commands.
        """
        name, _, argument = line.partition(" ")
        if not line.startswith("/"):
            if line:
                self.ask(line)
        elif name in COMMANDS:
            COMMANDS[name].run(self, argument.strip())
        else:
            raise ValueError(f"There is no command {name}: known are {', '.join(COMMANDS)}.")


class Command(NamedTuple):
    usage: str
    meaning: str
    run: Callable[[Session, str], None]


COMMANDS = {
    "/image": Command("/image PATH", "ask about another picture", Session.look_at),
    "/box": Command("/box EXPRESSION", "ask where something is in the picture", Session.ask_for_box),
    "/save": Command("/save PATH", "draw the boxes of the last answer on the picture", Session.save),
    "/reset": Command("/reset", "begin anew with the same picture", Session.reset),
    "/help": Command("/help", "list the commands", Session.help),
    "/quit": Command("/quit", "end", Session.quit),
}


def check_out(path: Path, picture_path: str | None) -> None:
    """Refuses a file that a picture cannot be written to.

    Raises:
        ValueError: an ending that Pillow cannot write, or the picture itself.
        FileNotFoundError: its folder does not exist.
    """
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{path} does not say in which format to write the picture: end it in .png or .jpg.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The folder {path.parent}, in which {path.name} should be written, does not exist.")
    if picture_path is not None and path.exists() and os.path.exists(picture_path) and path.samefile(picture_path):
        raise ValueError(f"{path} is the picture itself, which would be lost: write to another file.")


def _unquoted(path: str | Path, wanted: str) -> str:
    """A path as it may be typed or dropped into a terminal."""
    path = str(path).strip().strip("'\"")
    if not path:
        raise ValueError(f"There is no path: {wanted}.")
    return path


def _printable(text: str) -> str:
    """Without control characters: a model must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """One line on the terminal while a model is loaded, in place of progress bars."""
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with Console(stderr=True).status(f"loading {name}"):
            yield
    finally:
        if had_bars:
            logging.enable_progress_bar()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "ssm-vlm chat",
        description="Ask a model about a picture of your own; without --prompt or --box, in a conversation.",
    )
    parser.add_argument("--model", required=True, help="run directory, or another saved model: a folder or a Hub name")
    parser.add_argument("--image", help="your picture: a file or a URL; without one, text only")
    question = parser.add_mutually_exclusive_group()
    question.add_argument("--prompt", help="a question, given to the model as it is")
    question.add_argument("--box", metavar="EXPRESSION", help="ask where something is, such as 'the red car'")
    parser.add_argument("--short", action="store_true", help="ask for an answer of a single word or phrase")
    parser.add_argument("--out", type=Path, help="draw the boxes of the answer on the picture and write it here")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer in tokens (default: 256)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0, the default, is greedy; above, tokens are drawn"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: auto, as it was saved")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status.

    Raises:
        ValueError, OSError: options, a picture or a model that cannot be used, each in one sentence.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if options.short and options.box is not None:
        parser.error("--short goes with --prompt or a conversation, not with --box: a box is no word or phrase")
    if options.box is not None and options.image is None:
        parser.error("--box needs a picture to find the box in: give one with --image")
    check_generation(options.max_new_tokens, options.temperature)
    picture = None if options.image is None else load_image(options.image)
    if options.out is not None:
        check_out(options.out, options.image)
    console = Console()
    try:
        with _loading(options.model):
            model, processor = load_chat_model(options.model, options.device, options.dtype)
        conversation = Conversation(
            model, processor, picture, max_new_tokens=options.max_new_tokens, temperature=options.temperature
        )
        session = Session(conversation, console, options.image, options.out, options.short)
        if options.box is not None:
            session.ask_for_box(options.box)
        elif options.prompt is not None:
            session.ask(options.prompt)
        else:
            session.run()
    except KeyboardInterrupt:
        return 130
    return 0
