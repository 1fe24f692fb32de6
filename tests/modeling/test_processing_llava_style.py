"""The processor: placeholders, batches, chat templates, saving."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from ssm_vlm import LlavaStyleImageProcessor, LlavaStyleProcessor
from ssm_vlm.modeling.chat_templates import VICUNA_SYSTEM_PROMPT, VICUNA_TEMPLATE, with_images

TEXT_ONLY_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PICTURE_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer(**settings):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([VICUNA_SYSTEM_PROMPT + " USER: what is this? ASSISTANT: a cat"], trainer)
    defaults = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    defaults["extra_special_tokens"] = {"image_token": "<image>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**defaults, **settings})


def make_processor(chat_template=None, tokenizer=None, **settings):
    # letterbox_corner to a divisor: pictures of different size get different canvases, and so token counts
    defaults = {"geometry": "letterbox_corner", "size": {"height": 32, "width": 64}, "size_divisor": 8}
    defaults["downsampling"] = [[4, "floor"], [2, "ceil"]]
    image_processor = LlavaStyleImageProcessor(**{**defaults, **settings})
    return LlavaStyleProcessor(image_processor, tokenizer or make_tokenizer(), chat_template=chat_template)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


SMALL, WIDE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (40, 10), "blue")  # 1 x 1 and 2 x 5 tokens


def image_part(picture=None):
    return {"type": "image"} | ({} if picture is None else {"image": picture})


def text_part(text):
    return {"type": "text", "text": text}


def user(*parts):
    return {"role": "user", "content": [text_part(part) if isinstance(part, str) else part for part in parts]}


def assistant(text):
    return {"role": "assistant", "content": text}


# Templates


def test_vicuna_template_is_the_papers_format(processor):
    """Image tokens after BOS, system text in turn 1 only, answers end in </s>, an empty answer becomes a space."""
    messages = [
        user(image_part(), "\nWhat is this?"),
        assistant("A cat."),
        {"role": "user", "content": "And this? "},
        assistant(""),
    ]
    wanted = (
        f"<s><image>{VICUNA_SYSTEM_PROMPT} USER: What is this? ASSISTANT: A cat.</s>USER: And this? ASSISTANT:  </s>"
    )
    assert processor.apply_chat_template(messages) == wanted
    prompt = f"<s><image>{VICUNA_SYSTEM_PROMPT} USER: What is this? ASSISTANT:"
    assert processor.apply_chat_template(messages[:1], add_generation_prompt=True) == prompt


def test_vicuna_template_puts_every_picture_after_bos_and_takes_a_system_message(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        user("First?", image_part()),
        assistant("One."),
        user(image_part(), "Second?"),
    ]
    wanted = "<s><image><image>Be brief. USER: First? ASSISTANT: One.</s>USER: Second?"
    assert processor.apply_chat_template(messages) == wanted


def test_vicuna_template_refuses_other_roles(processor):
    with pytest.raises(Exception, match="roles are user and assistant.*got tool"):
        processor.apply_chat_template([user("a"), {"role": "tool", "content": "b"}])


def test_a_text_only_template_is_extended_and_stays_what_it_was():
    messages = [user(image_part(), "What?", image_part()), assistant("Cat."), {"role": "user", "content": "Sure?"}]
    chatml = make_processor(TEXT_ONLY_CHATML)
    wanted = (
        "<|im_start|>user\n<image>\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\nCat.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chatml.apply_chat_template(messages, add_generation_prompt=True) == wanted
    assert chatml.chat_template.endswith(TEXT_ONLY_CHATML)
    again = make_processor(chatml.chat_template)
    assert again.chat_template == chatml.chat_template


@pytest.mark.parametrize(
    "template",
    [
        PICTURE_CHATML.replace("{{ '<image>' }}", ""),  # reads the text of a list and loses its pictures
        PICTURE_CHATML.replace("{{ part['text'] }}", ""),  # reads the pictures and loses the text
        TEXT_ONLY_CHATML.replace("message['content'] +", "message['content'] | string +"),  # prints the list itself
    ],
)
def test_a_template_that_renders_lists_wrongly_without_complaint_is_extended(template):
    shown = make_processor(template).apply_chat_template([user(image_part(), "x")])
    assert shown == "<|im_start|>user\n<image>\nx<|im_end|>\n"


def test_a_template_that_takes_pictures_is_left_alone():
    assert make_processor(PICTURE_CHATML).chat_template == PICTURE_CHATML
    assert make_processor(VICUNA_TEMPLATE).chat_template == VICUNA_TEMPLATE


def test_the_template_comes_from_the_tokenizer_unless_given():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PICTURE_CHATML
    assert make_processor(tokenizer=tokenizer).chat_template == PICTURE_CHATML
    assert make_processor(VICUNA_TEMPLATE, tokenizer).chat_template == VICUNA_TEMPLATE
    assert make_processor().chat_template == VICUNA_TEMPLATE


def test_a_template_that_loses_pictures_is_told():
    with pytest.raises(ValueError, match="does not render '<image>' once"):
        with_images("{{ messages[0]['role'] }}", image_token="<image>")


def test_templates_by_name():
    tokenizer = make_tokenizer()
    processor = make_processor(
        {"default": TEXT_ONLY_CHATML, "plain": "{{ messages[0]['content'][0]['text'] }}"}, tokenizer
    )
    assert "<image>\nx" in processor.apply_chat_template([user(image_part(), "x")])
    assert processor.apply_chat_template([user("x")], chat_template="plain") == "x"


def test_another_placeholder_is_used_throughout():
    tokenizer = make_tokenizer(extra_special_tokens={"image_token": "<pic>"})
    processor = make_processor(tokenizer=tokenizer)
    assert processor.apply_chat_template([user(image_part(), "x")]).startswith("<s><pic>A chat")
    features = processor.apply_chat_template([user(image_part(WIDE), "x")], tokenize=True, return_dict=True)
    assert features["input_ids"][0].count(tokenizer.convert_tokens_to_ids("<pic>")) == 10
    unnamed = make_tokenizer(extra_special_tokens=["<pic>"])
    other = LlavaStyleProcessor(processor.image_processor, unnamed, image_token="<pic>")
    assert other.apply_chat_template([user(image_part(), "x")]).startswith("<s><pic>A chat")


# Placeholders and batches


@pytest.mark.parametrize("return_tensors", ["pt", None])
def test_placeholders_are_expanded_to_the_number_of_tokens(processor, return_tensors):
    features = processor(images=[SMALL, WIDE], text="<image>a<image>b", return_tensors=return_tensors)
    ids = np.asarray(features["input_ids"])[0]
    a, b = (processor.tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    image = processor.image_token_id
    assert ids.tolist() == [image, a, *[image] * 10, b]
    assert np.asarray(features["image_sizes"]).tolist() == [[8, 8], [16, 40]]
    assert np.asarray(features["pixel_values"]).shape == (2, 3, 16, 40)


def test_tokens_are_counted_on_the_canvas_by_the_encoders_own_arithmetic():
    sizes = [(8, 8), (10, 40), (9, 41), (800, 1333)]
    counted = make_processor()._get_num_multimodal_tokens(image_sizes=sizes)
    assert counted["num_image_tokens"] == [1, 2 * 5, 2 * 6, 4 * 7]
    assert counted["num_image_patches"] == [1, 1, 1, 1]
    # VMamba v2 rounds up: 50 x 84; a 16 x 16 patch stem rounds down: 50 x 83 (paper release, 1333 x 800)
    detector = {"size": {"height": 800, "width": 1333}, "size_divisor": None}
    vmamba = make_processor(**detector, downsampling=[[2, "ceil"]] * 4)
    vit = make_processor(**detector, downsampling=[[16, "floor"]])
    assert vmamba._get_num_multimodal_tokens(image_sizes=[(480, 640)])["num_image_tokens"] == [4200]
    assert vit._get_num_multimodal_tokens(image_sizes=[(480, 640)])["num_image_tokens"] == [4150]


def test_pixels_alone_and_text_alone(processor):
    assert set(processor(images=SMALL)) == {"pixel_values", "image_sizes"}
    assert set(processor(text="hello")) == {"input_ids", "attention_mask"}
    assert set(processor(images=[[], []], text=["a", "b"])) == {"input_ids", "attention_mask"}


def test_geometry_comes_along_when_asked_for(processor):
    features = processor(images=[WIDE], text="<image>", return_tensors="pt", return_geometry=True)
    assert features["geometry"] == [processor.image_processor.get_geometry(10, 40)]
    assert "geometry" not in processor(images=[WIDE], text="<image>", return_tensors="pt")


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        ([SMALL], "no placeholder", "Found total 0 <image> tokens and 1 images"),
        ([SMALL], "<image><image>", "Found total 2 <image> tokens and 1 images"),
        (None, "<image>", "Found 1 <image> tokens in the text but no images were passed"),
        ([[SMALL, SMALL], []], ["<image>", "<image>"], "Text 0 has 1 <image> placeholders but 2 pictures"),
        ([[], []], ["a", "<image>"], "Text 1 has 1 <image> placeholders but 0 pictures"),
    ],
)
def test_counts_that_differ_are_told(processor, images, text, message):
    with pytest.raises(ValueError, match=message):
        processor(images=images, text=text)


def test_a_tokenizer_without_the_placeholder_is_told():
    tokenizer = make_tokenizer(extra_special_tokens=[])
    with pytest.raises(ValueError, match=r"does not know '<image>' as one token: add it with tokenizer.add_tokens"):
        make_processor(tokenizer=tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)  # as the sentence says
    assert make_processor(tokenizer=tokenizer).image_token_id == len(tokenizer) - 1


def test_tokens_cut_by_truncation_are_told(processor):
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):
        processor(images=[WIDE], text="<image>", truncation=True, max_length=4)


CONVERSATIONS = [
    [user(image_part(WIDE), "what is this?")],
    [user("no picture")],
    [user(image_part(SMALL), "and"), assistant("a"), user(image_part(WIDE), "this?")],
]


@pytest.mark.parametrize(
    "template", [VICUNA_TEMPLATE, TEXT_ONLY_CHATML, PICTURE_CHATML], ids=["vicuna", "text", "picture"]
)
def test_a_batch_for_generation_is_padded_left_and_equals_its_rows(template):
    processor = make_processor(template)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    batch = processor.apply_chat_template(CONVERSATIONS, processor_kwargs={"padding": True}, **options)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["image_sizes"].tolist() == [[16, 40], [8, 8], [16, 40]]
    for row, conversation in enumerate(CONVERSATIONS):
        alone = processor.apply_chat_template(conversation, **options)
        mask = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][mask], alone["input_ids"][0])
        assert mask[-1] and torch.equal(mask, mask.sort().values)  # the padding is on the left
        assert (batch["input_ids"][row][~mask] == processor.tokenizer.pad_token_id).all()
    assert not batch["attention_mask"].all()
    assert processor.tokenizer.padding_side == "right"  # the tokenizer itself is not touched


def test_padding_for_generation_can_be_put_right(processor):
    batch = processor.apply_chat_template(
        CONVERSATIONS,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    assert batch["attention_mask"][:, 0].all() and not batch["attention_mask"][:, -1].all()


def test_bos_stands_once_and_first_and_pictures_right_behind_it(processor):
    ids = processor.apply_chat_template(CONVERSATIONS[0], tokenize=True, return_dict=True)["input_ids"][0]
    assert ids[:12].count(processor.tokenizer.bos_token_id) == 1 and ids[0] == processor.tokenizer.bos_token_id
    assert set(ids[1:11]) == {processor.image_token_id} and ids.count(processor.image_token_id) == 10


def test_messages_are_not_changed(processor):
    conversation = [user(image_part(WIDE), "what?")]
    before = [{**message, "content": list(message["content"])} for message in conversation]
    processor.apply_chat_template(conversation, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert conversation == before


def test_pictures_by_path_in_messages(processor, tmp_path):
    WIDE.save(tmp_path / "wide.png")
    path = str(tmp_path / "wide.png")
    wanted = processor.apply_chat_template(CONVERSATIONS[0], tokenize=True, return_dict=True, return_tensors="pt")
    for key in ("path", "url", "image"):
        conversation = [user({"type": "image", key: path}, "what is this?")]
        features = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(features["pixel_values"], wanted["pixel_values"])
        assert torch.equal(features["input_ids"], wanted["input_ids"])


def test_a_file_that_does_not_decode_is_named(processor, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="Cannot decode the image file '.*broken.png'"):
        processor(images=[str(tmp_path / "broken.png")], text="<image>")


def test_assistant_mask_is_the_generation_mark(processor):
    conversation = [user(image_part(WIDE), "what?"), assistant("a cat"), user("sure?"), assistant("yes")]
    features = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    said = features["input_ids"][0][features["assistant_masks"][0].bool()]
    assert processor.tokenizer.decode(said) == " a cat</s> yes</s>"


def test_continuing_the_last_answer(processor):
    conversation = [user("what?"), {"role": "assistant", "content": [text_part("a")]}]
    assert processor.apply_chat_template(conversation, continue_final_message=True).endswith("USER: what? ASSISTANT: a")


# Saving


def test_saved_and_loaded_again_in_a_fresh_process(tmp_path):
    processor = make_processor(TEXT_ONLY_CHATML)
    processor.save_pretrained(tmp_path)
    np.save(tmp_path / "picture.npy", np.asarray(WIDE))
    code = """
import sys, numpy as np, torch, ssm_vlm
from transformers import AutoProcessor
folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder)
assert type(processor) is ssm_vlm.LlavaStyleProcessor
assert type(processor.image_processor) is ssm_vlm.LlavaStyleImageProcessor
conversation = [{"role": "user", "content": [{"type": "image", "image": np.load(folder + "/picture.npy")},
                                             {"type": "text", "text": "what is this?"}]}]
features = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
torch.save(dict(features), folder + "/features.pt")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    loaded = torch.load(tmp_path / "features.pt", weights_only=True)
    wanted = processor.apply_chat_template(CONVERSATIONS[0], tokenize=True, return_dict=True, return_tensors="pt")
    assert set(loaded) == set(wanted)
    for key in wanted:
        assert torch.equal(loaded[key], wanted[key]), key


def test_loading_keeps_everything(tmp_path):
    processor = make_processor(PICTURE_CHATML)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.chat_template == PICTURE_CHATML
    assert loaded.image_token_id == processor.image_token_id
    overridden = AutoProcessor.from_pretrained(tmp_path, size={"height": 64, "width": 64})
    assert overridden.image_processor.size.height == 64


def test_model_input_names(processor):
    assert set(processor.model_input_names) >= {"input_ids", "attention_mask", "pixel_values", "image_sizes"}
