"""Generation with the LLaVA-style model: cache, batches, several images, beams, and the whole way from a picture."""

import pytest
import torch
from llava_style_toys import IMAGE, SIZE, TEXT, batch, build, padded, pictures, row, text_config
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast, pipeline

from ssm_vlm import LlavaStyleImageProcessor, LlavaStyleProcessor, num_image_tokens

ROWS = [row(1, "image", 5, "wide", 6), row(1, 3, 4), row(1, "wide", 7, 8)]
IMAGES = pictures((SIZE, SIZE), (SIZE, 2 * SIZE), (2 * SIZE, SIZE))
IMAGES_OF_ROW = [IMAGES[:2], [], IMAGES[2:]]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def prompts(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    inputs = batch(*rows, side="left")
    del inputs["labels"]
    return inputs


def answers(model, rows, images, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens [B, T] and their logits [B, T, V]."""
    inputs = {**prompts(rows), **(padded(images) if images else {})}
    output = model.generate(**inputs, **{**GREEDY, **options})
    return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, 1)


@pytest.mark.parametrize("text", TEXT)
def test_cache_gives_the_same_as_no_cache(text):
    model = build("ssm_vision", text)
    cached, uncached = (answers(model, ROWS, IMAGES, use_cache=use) for use in (True, False))
    torch.testing.assert_close(cached[1], uncached[1], atol=1e-4, rtol=1e-4)
    assert torch.equal(cached[0], uncached[0])


@pytest.mark.parametrize("text", TEXT)
def test_a_left_padded_batch_gives_the_same_as_rows_alone(text):
    """Two images in one row, none in the next, other sizes in the third."""
    model = build("ssm_vision", text)
    together, logits = answers(model, ROWS, IMAGES)
    for i, (tokens, images) in enumerate(zip(ROWS, IMAGES_OF_ROW, strict=True)):
        alone, alone_logits = answers(model, [tokens], images)
        torch.testing.assert_close(logits[i], alone_logits[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(together[i], alone[0])


def test_generation_is_what_forward_says_step_by_step():
    model = build()
    tokens, _ = answers(model, ROWS[:1], IMAGES_OF_ROW[0])
    ids = torch.tensor(ROWS[:1])
    for expected in tokens[0]:
        with torch.no_grad():
            logits = model(input_ids=ids, **padded(IMAGES_OF_ROW[0])).logits[0, -1]
        assert logits.argmax() == expected
        ids = torch.cat([ids, expected.view(1, 1)], 1)


def test_the_encoder_runs_once_for_each_image_size():
    model = build()
    calls = []
    model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    answers(model, ROWS, IMAGES)
    assert len(calls) == 3


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize("cached_features", [False, True])
def test_beams_keep_each_rows_images_together(options, cached_features):
    model = build()
    options = {"max_new_tokens": 4, "do_sample": False, **options}
    inputs = prompts(ROWS)
    with torch.no_grad():
        features = model.get_tap_features(**padded(IMAGES))
    images = {"image_features": features} if cached_features else padded(IMAGES)
    together = model.generate(**inputs, **images, **options)[:, inputs["input_ids"].shape[1] :]
    per_row = options.get("num_return_sequences", 1)
    for i, tokens in enumerate(ROWS):
        own = padded(IMAGES_OF_ROW[i]) if IMAGES_OF_ROW[i] else {}
        alone = model.generate(**prompts([tokens]), **own, **options)[:, len(tokens) :]
        assert torch.equal(together[i * per_row : (i + 1) * per_row], alone)


def test_prefill_in_chunks_gives_the_same():
    model = build()
    whole, logits = answers(model, ROWS, IMAGES)
    chunked, chunked_logits = answers(model, ROWS, IMAGES, prefill_chunk_size=4)
    torch.testing.assert_close(chunked_logits[:, -1], logits[:, -1], atol=1e-4, rtol=1e-4)
    assert torch.equal(whole, chunked)


def test_the_image_token_is_never_generated():
    """Even where the language model likes it best; and where a user lifts the ban, it is a token like any other."""
    model = build(text=text_config("llama", vocab_size=IMAGE + 1))
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 3]])).logits[0, -1]
        head[IMAGE] = 3 * head[logits.argmax()]
        assert model(input_ids=torch.tensor([[1, 3]])).logits[0, -1].argmax() == IMAGE
    tokens, _ = answers(model, [[1, 3]], [])
    assert IMAGE not in tokens
    tokens, _ = answers(model, [[1, 3]], [], suppress_tokens=[])
    assert tokens[0, 0] == IMAGE and tokens.shape == (1, 6)


def test_pixels_and_cached_features_together_are_refused():
    with pytest.raises(ValueError, match="either pixel_values or image_features"):
        build().generate(**prompts(ROWS), **padded(IMAGES), image_features=[torch.zeros(4, 8)])


def test_a_wrong_number_of_image_tokens_is_told_by_generate():
    with pytest.raises(ValueError, match=r"hold 12 image tokens .* but the 1 image\(s\) give 4 features"):
        answers(build(), ROWS[:1], IMAGES[:1])


# ---------------------------------------------------------------------------------------------- from a picture on


@pytest.fixture(scope="module")
def processor():
    words = ["<pad>", "<s>", "</s>", "<unk>", "what", "digit", "?", "USER:", "ASSISTANT:"]
    words += [f"w{i}" for i in range(IMAGE - len(words))] + ["<image>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    image_processor = LlavaStyleImageProcessor(
        geometry="letterbox_corner", size={"height": 32, "width": 48}, size_divisor=8, downsampling=[[8, "ceil"]]
    )
    return LlavaStyleProcessor(image_processor, tokenizer)


def conversation(*images, text="what digit ?"):
    return [
        {"role": "user", "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}]}
    ]


def test_from_pictures_to_answers_through_the_processor(processor):
    model = build("ssm_vision", text=text_config("llama", vocab_size=IMAGE + 1, max_position_embeddings=256))
    assert processor.image_token_id == IMAGE
    wide, tall = Image.new("RGB", (90, 30), "red"), Image.new("RGB", (20, 25), "blue")
    conversations = [conversation(wide, tall), conversation(), conversation(tall)]

    def run(some):
        inputs = processor.apply_chat_template(
            some,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        if "image_sizes" in inputs:
            expected = sum(num_image_tokens(h, w, [[8, "ceil"]]) for h, w in inputs["image_sizes"].tolist())
            assert (inputs["input_ids"] == IMAGE).sum() == expected
        return model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]

    together = run(conversations)
    for i, single in enumerate(conversations):
        assert torch.equal(run([single])[0], together[i])


def test_image_text_to_text_pipeline(processor, tmp_path):
    model = build("ssm_vision", text=text_config("llama", vocab_size=IMAGE + 1, max_position_embeddings=256))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is LlavaStyleProcessor
    ask = pipeline("image-text-to-text", model=str(tmp_path))
    picture = Image.new("RGB", (90, 30), "red")
    answer = ask(text=conversation(picture), max_new_tokens=3, do_sample=False, return_full_text=False)
    inputs = processor.apply_chat_template(
        conversation(picture), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer[0]["generated_text"].split() == processor.decode(expected, skip_special_tokens=True).split()
