"""Only what the assistant says is learned, whatever the template and the tokenizer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ssm_vlm import LlavaStyleImageProcessor, LlavaStyleProcessor
from ssm_vlm.modeling.chat_templates import VICUNA_TEMPLATE
from ssm_vlm.training import labels as labels_module
from ssm_vlm.training.labels import tokenize_conversation

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Llama-2 style: no generation prompt of its own, the answer follows [/INST] and a space
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
# like reasoning models: what an earlier answer thought is dropped once another turn follows
REWRITES_HISTORY = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# the generation prompt ends in a space that a tokenizer joins with the answer's first word
TRAILING_SPACE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
MARKED_TRAILING_SPACE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '</s>' }}{% endgeneration %}{% else %}{{ message['content'] + '</s>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# template, how an answer looks in the labels
TEMPLATES = {
    "vicuna": (VICUNA_TEMPLATE, " {}</s>"),
    "chatml": (CHATML, "{}<|im_end|>"),
    "marked chatml": (MARKED_CHATML, "{}<|im_end|>"),
    "inst": (INST, " {}</s>"),
}
CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. USER: what is this? ASSISTANT: a cat",
    "USER: where is the dog? ASSISTANT: on the mat, in the picture. [INST] [/INST]",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def wrap(backend):
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def byte_level(corpus=CORPUS):
    """GPT-2, Qwen, Llama 3."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    return wrap(backend)


def sentencepiece(across_words=False):
    """Llama, Llama 2, Vicuna: a space is part of the word behind it, and each piece of text begins with one."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if not across_words:  # SentencePiece learns no piece across words; the finished tokenizer has no such rule
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False, max_token_length=12)
    backend.train_from_iterator(CORPUS, trainer)
    if not across_words:
        backend.pre_tokenizer = pre_tokenizers.Sequence([])
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return wrap(backend)


TOKENIZERS = {"byte level": byte_level(), "sentencepiece": sentencepiece()}
NEWLINES = byte_level(["\n\n" * 50])  # knows two line breaks as one token
TOKENIZERS_ACROSS_WORDS = sentencepiece(across_words=True)
PICTURE, WIDE = Image.new("RGB", (8, 8)), Image.new("RGB", (40, 10))  # 1 and 10 tokens


def make_processor(template=VICUNA_TEMPLATE, tokenizer="byte level"):
    image_processor = LlavaStyleImageProcessor(
        geometry="letterbox_corner",
        size={"height": 32, "width": 64},
        size_divisor=8,
        downsampling=[[4, "floor"], [2, "ceil"]],
    )
    return LlavaStyleProcessor(image_processor, TOKENIZERS[tokenizer], chat_template=template)


def user(text, pictures=0):
    return {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}


def assistant(text):
    return {"role": "assistant", "content": text}


SIX_TURNS = [
    user("what is this?", 1),
    assistant("a cat"),
    user("USER: is it? ASSISTANT: no"),  # text that looks like the template
    assistant("ASSISTANT: it is a cat."),
    user("where?"),
    assistant("on the mat\n\nin the picture"),
]


def learned(processor, sample):
    """The label tokens, decoded run by run."""
    ids, labels = sample["input_ids"], sample["labels"]
    assert ((labels == -100) | (labels == ids)).all()
    runs, run = [], []
    for label in [*labels.tolist(), -100]:
        if label >= 0:
            run.append(label)
        elif run:
            runs.append(processor.tokenizer.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_what_ends_them_are_learned_and_nothing_else(name, tokenizer):
    template, shape = TEMPLATES[name]
    processor = make_processor(template, tokenizer)
    sample = tokenize_conversation(processor, SIX_TURNS, [WIDE])
    answers = [shape.format(turn["content"]) for turn in SIX_TURNS if turn["role"] == "assistant"]
    # the SentencePiece decoder drops the space in front of the first word it is given
    strip = (lambda text: text.lstrip(" ")) if tokenizer == "sentencepiece" else (lambda text: text)
    assert [strip(text) for text in learned(processor, sample)] == [strip(text) for text in answers]
    assert sample["input_ids"].dtype == sample["labels"].dtype == torch.int64
    assert (sample["input_ids"] == processor.image_token_id).sum() == 10
    assert sample["image_sizes"].tolist() == [[16, 40]] and sample["pixel_values"].shape == (1, 3, 16, 40)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", [2, 4, 6])
def test_training_and_generation_see_the_same_tokens(name, tokenizer, turns):
    """The sample is what `apply_chat_template` makes, and starts with the prompt that generation would be given."""
    processor = make_processor(TEMPLATES[name][0], tokenizer)
    conversation = SIX_TURNS[:turns]
    sample = tokenize_conversation(processor, conversation, [WIDE])
    shown = [{**conversation[0], "content": [{"type": "image", "image": WIDE}, conversation[0]["content"][1]]}]
    shown += conversation[1:]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    whole = processor.apply_chat_template(shown, **options)
    assert torch.equal(whole["input_ids"][0], sample["input_ids"])
    assert torch.equal(whole["pixel_values"], sample["pixel_values"])
    prompt = processor.apply_chat_template(shown[:-1], add_generation_prompt=True, **options)["input_ids"][0]
    assert torch.equal(sample["input_ids"][: len(prompt)], prompt)
    last_answer = sample["labels"][len(prompt) :]
    assert last_answer[0] >= 0 and sample["labels"][len(prompt) - 1] == -100


def test_marks_and_prefixes_agree():
    marked, unmarked = (tokenize_conversation(make_processor(t), SIX_TURNS, [WIDE]) for t in (MARKED_CHATML, CHATML))
    assert torch.equal(marked["input_ids"], unmarked["input_ids"])
    assert torch.equal(marked["labels"], unmarked["labels"])


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30)


@pytest.mark.parametrize("name", ["vicuna", "chatml", "marked chatml"])
@settings(max_examples=60)
@given(texts=st.lists(TEXT, min_size=2, max_size=6))
def test_any_text(name, texts):
    """Byte-level tokenizers give text back exactly, so the learned runs can be compared to the last character."""
    template, shape = TEMPLATES[name]
    processor = make_processor(template)
    texts = [text.replace("<", "(") for text in texts[: len(texts) // 2 * 2]]  # no special tokens by accident
    conversation = [(assistant if index % 2 else user)(text) for index, text in enumerate(texts)]
    sample = tokenize_conversation(processor, conversation)
    assert learned(processor, sample) == [shape.format(text) for text in texts[1::2]]


def test_an_answer_that_begins_inside_a_character_of_many_tokens():
    processor = make_processor()
    sample = tokenize_conversation(processor, [user("?"), assistant("猫🐈")])
    assert learned(processor, sample) == [" 猫🐈</s>"]
    assert (sample["labels"] >= 0).sum() > 4


def test_text_only_rows_have_no_pictures():
    sample = tokenize_conversation(make_processor(), [user("hello"), assistant("hi")])
    assert set(sample) == {"input_ids", "labels"}


@pytest.mark.parametrize("template", [VICUNA_TEMPLATE, CHATML], ids=["vicuna", "chatml"])
def test_several_pictures_in_order(template):
    processor = make_processor(template)
    conversation = [user("a", 1), assistant("b"), user("c", 2), assistant("d")]
    sample = tokenize_conversation(processor, conversation, [WIDE, PICTURE, WIDE])
    is_image = sample["input_ids"] == processor.image_token_id
    assert is_image.sum() == 10 + 1 + 10
    assert (sample["labels"][is_image] == -100).all()
    if template == CHATML:  # each picture is a line of its own
        runs = torch.diff(is_image.nonzero()[:, 0])
        assert [int(i) for i in (runs > 1).nonzero()[:, 0] + 1] == [10, 11]


def test_a_picture_in_an_answer_is_not_learned():
    processor = make_processor(CHATML)
    answer = {"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "this one"}]}
    sample = tokenize_conversation(processor, [user("which?"), answer], [WIDE])
    assert (sample["labels"][sample["input_ids"] == processor.image_token_id] == -100).all()
    assert learned(processor, sample) == ["\nthis one<|im_end|>"]


def test_pictures_named_in_the_messages(tmp_path):
    WIDE.save(tmp_path / "wide.png")
    processor = make_processor()
    for part in (
        {"path": str(tmp_path / "wide.png")},
        {"image": WIDE},
        {"url": str(tmp_path / "wide.png"), "image": None},
    ):
        conversation = [{"role": "user", "content": [{"type": "image", **part}]}, assistant("a")]
        assert tokenize_conversation(processor, conversation)["image_sizes"].tolist() == [[16, 40]]


def test_cached_features_need_no_pictures():
    processor = make_processor()
    sample = tokenize_conversation(processor, SIX_TURNS, image_token_counts=[10])
    wanted = tokenize_conversation(processor, SIX_TURNS, [WIDE])
    assert set(sample) == {"input_ids", "labels"}
    assert torch.equal(sample["input_ids"], wanted["input_ids"])
    assert torch.equal(sample["labels"], wanted["labels"])


@pytest.mark.parametrize("max_length", [1, 20, 60, 90, 10_000])
@pytest.mark.parametrize("pictures", [0, 2])
def test_truncation_cuts_text_only(max_length, pictures):
    processor = make_processor(CHATML)
    conversation = [user("x"), assistant("first answer"), user("y", pictures), assistant("second answer " * 5)]
    images = [WIDE] * pictures
    whole = tokenize_conversation(processor, conversation, images)
    image_token = processor.image_token_id
    text = whole["input_ids"][whole["input_ids"] != image_token]
    try:
        sample = tokenize_conversation(processor, conversation, images, max_length)
    except ValueError as error:
        assert max_length == 1 and "its first 1 tokens of text hold no answer" in str(error)
        return
    kept = sample["input_ids"]
    assert torch.equal(kept[kept != image_token], text[:max_length])
    assert (kept == image_token).sum() == 10 * pictures
    expected = whole["labels"][whole["input_ids"] != image_token][:max_length]
    assert torch.equal(sample["labels"][kept != image_token], expected)


@pytest.mark.parametrize(
    ("conversation", "options", "message"),
    [
        ([user("a")], {}, "Sample 'row 7' has no assistant message"),
        ([user("a", 1), assistant("b")], {"images": []}, "Sample 'row 7' has 1 image placeholders but 0 pictures"),
        ([user("a", 1), assistant("b")], {}, "Sample 'row 7' has 1 image placeholders but 0 pictures"),
        ([user("a"), assistant("b")], {"images": [PICTURE]}, "has 0 image placeholders but 1 pictures"),
        ([user("a <image>", 1), assistant("b")], {"images": [PICTURE]}, "has 2 image placeholders but 1 pictures"),
        ([user("a", 1), assistant("b")], {"image_token_counts": []}, "has 1 image placeholders but 0 pictures"),
        ([user("a"), assistant("b")], {"max_length": 3}, "nothing to learn: its first 3 tokens of text hold no answer"),
        (
            [user("a"), {"role": "tool", "content": "x"}, assistant("b")],
            {},
            "does not fit the chat template: The roles",
        ),
    ],
)
def test_what_cannot_be_learned_from_is_told(conversation, options, message):
    with pytest.raises(ValueError, match=message):
        tokenize_conversation(make_processor(), conversation, **options, sample_id="row 7")


def test_a_generation_prompt_that_answers_do_not_continue_is_told():
    processor = make_processor(CHATML.replace("assistant\\n", "assistant\\n<think></think>"))
    with pytest.raises(ValueError, match="does not render message 1 as a continuation of its prompt"):
        tokenize_conversation(processor, [user("a"), assistant("b")])


def test_a_template_that_rewrites_history_is_told():
    processor = make_processor(REWRITES_HISTORY)
    thought = [user("a"), assistant("<think>hm</think>b"), user("c"), assistant("d")]
    with pytest.raises(
        ValueError, match=r"A conversation: the chat template does not render message 1 as a continuation"
    ):
        tokenize_conversation(processor, thought)
    assert learned(processor, tokenize_conversation(processor, thought[:2])) == ["<think>hm</think>b<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "tokenizer", "joined"),
    [
        (TRAILING_SPACE, TOKENIZERS["byte level"], " a"),
        (MARKED_TRAILING_SPACE, TOKENIZERS["byte level"], " a"),
        (VICUNA_TEMPLATE, TOKENIZERS_ACROSS_WORDS, ": a cat"),
    ],
    ids=["trailing space", "trailing space, marked", "words joined"],
)
def test_a_token_across_the_end_of_the_prompt_is_told(template, tokenizer, joined):
    processor = LlavaStyleProcessor(make_processor().image_processor, tokenizer, chat_template=template)
    with pytest.raises(ValueError, match=f"the tokenizer joins the end of the prompt .* in one token, '{joined}'"):
        tokenize_conversation(processor, [user("what?"), assistant("a cat")])


def test_white_space_that_an_answer_begins_with_is_no_error():
    processor = LlavaStyleProcessor(make_processor().image_processor, NEWLINES, chat_template=CHATML)
    sample = tokenize_conversation(processor, [user("a"), assistant("\n\nb")])
    assert learned(processor, sample) == ["\n\n\nb<|im_end|>"]  # the first line break is the prompt's own


def test_marked_templates_are_rendered_and_tokenized_once(monkeypatch):
    """This runs for every sample of every epoch: about half a millisecond for six turns."""
    processor = make_processor()
    calls = []
    render = labels_module.render_conversations
    monkeypatch.setattr(
        labels_module, "render_conversations", lambda *a, **k: calls.append("render") or render(*a, **k)
    )
    tokenizer = processor.tokenizer

    class Counted:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, *args, **kwargs):
            calls.append("tokenize")
            return tokenizer(*args, **kwargs)

    monkeypatch.setattr(processor, "tokenizer", Counted())
    tokenize_conversation(processor, SIX_TURNS, [WIDE])
    assert calls == ["render", "tokenize"]
