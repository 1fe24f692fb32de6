"""The `ssm-vlm` command."""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "study": ("ssm_vlm.eval.study", "run a controlled study, by default the embedded one, and print its table"),
    "chat": ("ssm_vlm.chat", "ask a model about a picture, once or in a conversation"),
    "convert": ("ssm_vlm.convert_command", "turn published weights into a folder that Transformers loads"),
    "encoders": ("ssm_vlm.encoders_command", "list every encoder that has a name"),
    "evaluate": ("ssm_vlm.eval.evaluate", "score a model on VQA v2 or RefCOCO files"),
    "serve": ("ssm_vlm.serve_command", "serve models over HTTP, by `transformers serve`"),
    "card": ("ssm_vlm.card_command", "write the model card of a saved model"),
    "push": ("ssm_vlm.push_command", "upload a saved model to the Hugging Face Hub"),
    "train": ("ssm_vlm.training.train_vlm", "train a vision-language model by a recipe"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hands the rest of the command line to the chosen command; returns the exit status."""
    parser = argparse.ArgumentParser("ssm-vlm", description="Swap vision encoders inside a vision-language model.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, help_text) in COMMANDS.items():
        commands.add_parser(name, help=help_text, add_help=False)
    argv = list(sys.argv[1:] if argv is None else argv)
    chosen = parser.parse_args(argv[:1]).command
    try:
        status = importlib.import_module(COMMANDS[chosen][0]).main(argv[1:])
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return status if isinstance(status, int) else 0
