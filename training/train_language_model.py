"""Trains a small language model and its tokenizer from scratch on conversations without pictures.

`python -m ssm_vlm.training.train_language_model recipe.yaml [--key value ...]`. Only the embedded study needs it: real
runs take a published language model.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

from ..modeling.chat_templates import VICUNA_TEMPLATE, render_conversations
from ..modeling.image_processing_llava_style import LlavaStyleImageProcessor
from ..modeling.processing_llava_style import LlavaStyleProcessor
from .collator import ConversationCollator
from .datasets import LlavaConversations
from .recipe import REQUIRED, RunArguments, RunDirectory, fingerprint, parse_recipe, require, resolved, run_script
from .trainer import ControlledTrainer, train_and_save

_SENTENCE_END = re.compile(r"(?<=[.?!:])\s+|[\n\"]|</?s>")


@dataclass
class LanguageModelArguments:
    """What is trained on what."""

    language_model_config: dict[str, Any] = field(
        default=REQUIRED, metadata={"help": "Config of a causal language model, `model_type` included."}
    )
    vocabulary: int = field(default=512, metadata={"help": "Tokens of the byte-level BPE."})
    data_path: str = field(default=REQUIRED, metadata={"help": "LLaVA conversations without pictures."})


def train_tokenizer(conversations: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with `<s>`, `</s>`, `<pad>` and `<image>`, every digit a token of its own, as Llama has it.

    A sentence of three words or more that stands in a third of the conversations is one token (the idea of SuperBPE,
    arXiv 2503.13423): instructions that never change then cost a small model next to nothing.

    Args:
        conversations: rendered conversations.
        vocabulary: tokens of the BPE; frequent sentences come on top.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(conversations, trainer)
    standing_in = Counter(sentence for text in conversations for sentence in set(_SENTENCE_END.split(text)))
    frequent = [s for s, rows in standing_in.items() if 3 * rows >= len(conversations) and len(s.split()) >= 3]
    tokenizer.add_tokens([AddedToken(sentence, normalized=False) for sentence in sorted(frequent)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=VICUNA_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _render(data: LlavaConversations, rows: int = 2000) -> list[str]:
    """The first conversations as the language model will see them."""
    few = [data[index]["messages"] for index in range(min(rows, len(data)))]
    texts, _ = render_conversations(few, chat_template=VICUNA_TEMPLATE, bos_token="<s>", eos_token="</s>")
    return texts


def train_language_model(model_args: LanguageModelArguments, args: RunArguments) -> RunDirectory:
    """Trains, unless the run is already finished. The run directory then holds model and tokenizer."""
    require(model_args, "language_model_config", "data_path")
    if "model_type" not in model_args.language_model_config:
        raise ValueError("language_model_config lacks the key 'model_type', such as llama.")
    run = RunDirectory.of(resolved(model_args, args), {"data_path": partial(fingerprint, model_args.data_path)}, args)
    if run.is_finished:
        return run
    data = LlavaConversations(model_args.data_path, None)
    tokenizer = train_tokenizer(_render(data), model_args.vocabulary)
    processor = LlavaStyleProcessor(LlavaStyleImageProcessor(), tokenizer)
    set_seed(args.seed)
    config = AutoConfig.for_model(
        **{
            **model_args.language_model_config,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    )
    trainer = ControlledTrainer(
        model=AutoModelForCausalLM.from_config(config),
        args=args,
        train_dataset=data,
        data_collator=ConversationCollator(processor),
        grouping=(data.lengths(0), data.is_multimodal),
    )

    train_and_save(trainer, run, tokenizer.save_pretrained)
    return run


def main(argv: Sequence[str] | None = None) -> RunDirectory:
    return train_language_model(*parse_recipe(argv, LanguageModelArguments, RunArguments))


if __name__ == "__main__":
    run_script(main)
