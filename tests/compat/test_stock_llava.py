"""Everything stock but the tower and the image processor: `LlavaForConditionalGeneration` behind `LlavaProcessor`."""

import pytest
import torch
from compat_toys import make_processor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, LlavaProcessor

TEXT = "<s>USER: <image> what colour is it? ASSISTANT:"


@pytest.fixture
def processor(tmp_path):
    """Our image processor as it comes out of a saved folder of ours, with no word of the stock model in it."""
    ours = make_processor()
    ours.save_pretrained(tmp_path / "ours")
    image_processor = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    return LlavaProcessor(image_processor, ours.tokenizer, patch_size=16, vision_feature_select_strategy="full")


def test_the_model_takes_what_the_processor_gives(processor, stock_folder, pictures, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(stock_folder)
    processor.save_pretrained(tmp_path / "stock")
    for each in (processor, AutoProcessor.from_pretrained(tmp_path / "stock")):
        inputs = each(images=list(pictures.values()), text=[TEXT] * 2, padding=True, return_tensors="pt")
        assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
        with torch.no_grad():
            together = model(**inputs).logits
            for row, picture in enumerate(pictures.values()):
                alone = model(**each(images=picture, text=TEXT, return_tensors="pt")).logits[0]
                assert torch.allclose(together[row], alone, atol=1e-4)
        assert not torch.allclose(together[0], together[1], atol=1e-2)
        assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[0] == 2


def test_our_own_processor_still_gives_the_sizes(pictures):
    inputs = make_processor()(images=list(pictures.values()), text=["<image>"] * 2)
    assert [list(size) for size in inputs["image_sizes"]] == [[32, 48]] * 2
    assert "image_sizes" not in make_processor(return_image_sizes=False)(images=pictures["red"], text="<image>")
