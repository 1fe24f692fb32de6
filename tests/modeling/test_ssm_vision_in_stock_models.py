"""The encoder, unchanged, inside models that Transformers ships: LLaVA, UperNet and DETR."""

import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    DetrConfig,
    DetrForObjectDetection,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from ssm_vlm import SSMVisionConfig, SSMVisionModel
from ssm_vlm.modeling.mixers import MIXERS

IMAGE_TOKEN = 99
GRID = (3, 5)  # of the 48x70 pictures below at stage 3
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def vision_config(**fields):
    return SSMVisionConfig(
        **{
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "out_features": ["stage3"],
            "output_norm": "layernorm",
            "head_dim": 8,
            "window_size": 3,
        }
        | fields
    )


def build(**fields):
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision_config(**fields),
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config)


def inputs():
    generator = torch.Generator().manual_seed(1)
    image_tokens = GRID[0] * GRID[1]
    text = torch.randint(3, 98, (2, 6), generator=generator)
    input_ids = torch.cat([torch.ones(2, 1).long(), torch.full((2, image_tokens), IMAGE_TOKEN), text], dim=1)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(2, 3, 48, 70, generator=generator),
    }


def test_llava_reads_the_tap():
    model = build().eval()
    tower = model.model.vision_tower
    assert type(tower) is SSMVisionModel and len(tower.stages) == 3
    pixel_values = inputs()["pixel_values"]
    with torch.no_grad():
        features = model.get_image_features(pixel_values).pooler_output
        tokens = tower(pixel_values).last_hidden_state
        expected = model.model.multi_modal_projector(tokens)
    assert tokens.shape == (2, GRID[0] * GRID[1], 16)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(features, expected, strict=True))


@pytest.mark.parametrize("mixer", MIXERS)
def test_llava_trains_through_the_encoder(mixer):
    model = build(mixer=mixer)
    batch = inputs()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_TOKEN, -100)
    output = model(**batch, labels=labels)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.model.vision_tower.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["stem.conv1.weight"].abs().max() > 0


def test_llava_answer_depends_on_the_picture():
    model = build().eval()
    batch = inputs()
    with torch.no_grad():
        logits = model(**batch).logits
        other = model(**batch | {"pixel_values": batch["pixel_values"].flip(-1)}).logits
    assert (logits - other).abs().max() > 1e-4


def test_llava_saved_folder_opens_bit_equal_and_generates_alike(tmp_path):
    model = build().eval()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    loaded.eval()
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(loaded) is LlavaForConditionalGeneration
    assert loaded.config.vision_config.to_diff_dict() == model.config.vision_config.to_diff_dict() | {
        "dtype": "float32"
    }
    saved = model.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    batch = inputs()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        settings = {"max_new_tokens": 5, "do_sample": False}
        generated = model.generate(**batch, **settings)
        assert torch.equal(loaded.generate(**batch, **settings), generated)
        assert torch.equal(model.generate(**batch, **settings, use_cache=False), generated)
    assert generated.shape[1] > batch["input_ids"].shape[1]


@pytest.mark.slow
def test_llava_saved_folder_opens_in_another_process(tmp_path):
    model = build().eval()
    model.save_pretrained(tmp_path / "model")
    torch.save(inputs(), tmp_path / "inputs.pt")
    code = (
        "import sys, torch, ssm_vlm\n"
        "from transformers import AutoModelForImageTextToText\n"
        "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1] + '/model').eval()\n"
        "with torch.no_grad():\n"
        "    torch.save(model(**torch.load(sys.argv[1] + '/inputs.pt')).logits, sys.argv[1] + '/logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(**inputs()).logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_llava_accepts_every_attention_implementation(implementation):
    config = build().config
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=implementation)
    assert model.config.text_config._attn_implementation == implementation


def test_llava_gradient_checkpointing_reaches_the_encoder():
    model = build().train()
    model.activation_checkpointing_enable()
    calls = []
    model.model.vision_tower.stages[0].blocks[0].norm1.register_forward_hook(lambda *_: calls.append(1))
    batch = inputs()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert len(calls) == 2


@pytest.mark.parametrize("size", [(64, 64), (45, 67)])
def test_upernet_segments_with_it(size):
    config = UperNetConfig(
        backbone_config=vision_config(out_features=STAGES, hidden_sizes=[8, 8, 8, 8]),
        hidden_size=8,
        num_labels=4,
        auxiliary_in_channels=8,
        auxiliary_channels=8,
        pool_scales=[1, 2],
    )
    model = UperNetForSemanticSegmentation(config)
    output = model(torch.randn(2, 3, *size), labels=torch.randint(0, 4, (2, *size)))
    assert output.logits.shape == (2, 4, *size)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.backbone.parameters())


def test_detr_detects_with_it():
    config = DetrConfig(
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        backbone_config=vision_config(out_features=["stage4"]),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
        num_labels=3,
    )
    model = DetrForObjectDetection(config)
    output = model(torch.randn(1, 3, 64, 80))
    assert output.logits.shape == (1, 5, 4)
    (output.logits.square().mean() + output.pred_boxes.sum()).backward()
    parameters = dict(model.named_parameters())
    gradient = next(value.grad for name, value in parameters.items() if name.endswith("stages.0.blocks.0.mixer.a_log"))
    assert gradient.isfinite().all() and gradient.abs().max() > 0
