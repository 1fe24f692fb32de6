"""The classifier on any encoder's tap: what it computes, its label groups, saving."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, ConvNextConfig, Trainer, TrainingArguments

from ssm_vlm import (
    BackboneClassifierConfig,
    BackboneForImageClassification,
    HiddenStateBackboneConfig,
    SSMVisionConfig,
    load_encoder,
)

ENCODERS = {
    "ssm": SSMVisionConfig(
        image_size=16, stem="conv3x2", hidden_sizes=[8, 12], depths=[1, 1], mixer="ss2d", d_state=1,
        out_features=["stage2"],
    ),
    "vit": HiddenStateBackboneConfig(
        vision_config={
            "model_type": "vit", "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 16, "image_size": 16, "patch_size": 8,
        },
        tap_layer=-2,
    ),
    "convnext": ConvNextConfig(num_stages=3, hidden_sizes=[8, 8, 12], depths=[1, 1, 1], out_features=["stage3"]),
}  # fmt: skip


def build(encoder="ssm", labels=5, **fields) -> BackboneForImageClassification:
    torch.manual_seed(0)
    config = BackboneClassifierConfig(
        backbone_config=ENCODERS[encoder], id2label={n: f"class {n}" for n in range(labels)}, **fields
    )
    return BackboneForImageClassification(config).eval()


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_norm_pooling_and_a_linear_layer_on_the_tap(encoder, pooling, pixels):
    model = build(encoder, pooling=pooling)
    with torch.no_grad():
        nn.init.normal_(model.norm.weight)
        tap = model.backbone(pixels).feature_maps[-1]  # [3, C, h, w]
        tokens = model.norm(tap.permute(0, 2, 3, 1).reshape(3, -1, tap.shape[1]))
        pooled = {"mean": tokens.mean(dim=1), "max": tokens.max(dim=1).values}[pooling]
        expected = pooled @ model.classifier.weight.T + model.classifier.bias
        assert torch.allclose(model(pixels).logits, expected, atol=1e-5)
    assert model(pixels).loss is None


def test_the_loss_is_cross_entropy(pixels):
    model, labels = build(), torch.tensor([4, 0, 2])
    output = model(pixels, labels=labels)
    chosen = output.logits.log_softmax(1)[torch.arange(3), labels]
    assert torch.allclose(output.loss, -chosen.mean())
    assert torch.allclose(model(pixels, labels=labels[:, None]).loss, output.loss), "[B, 1] as well as [B]"


def test_the_losses_of_label_groups_are_added_up(pixels):
    model, labels = build(labels=5, label_groups=[2, 3]), torch.tensor([[1, 0], [0, 2], [1, 1]])
    output = model(pixels, labels=labels)
    first = nn.functional.cross_entropy(output.logits[:, :2], labels[:, 0])
    second = nn.functional.cross_entropy(output.logits[:, 2:], labels[:, 1])
    assert torch.allclose(output.loss, first + second)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.classifier.parameters())


def test_label_groups_have_to_add_up():
    with pytest.raises(ValueError, match=r"label_groups \[2, 2\] must add up to the 5 labels"):
        build(labels=5, label_groups=[2, 2])


def test_an_unknown_pooling_is_refused():
    with pytest.raises(Exception, match="pooling"):
        build(pooling="median")


def test_tuples_instead_of_an_output(pixels):
    model = build()
    loss, logits = model(pixels, labels=torch.tensor([0, 1, 2]), return_dict=False)
    assert torch.equal(logits, model(pixels).logits) and loss.ndim == 0


@pytest.mark.parametrize("encoder", ENCODERS)
def test_saved_and_loaded_by_the_auto_class(encoder, pixels, tmp_path):
    model = build(encoder, pooling="max", labels=5, label_groups=[2, 3])
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.pooling, config.label_groups, config.id2label[4]) == ("max", [2, 3], "class 4")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is BackboneForImageClassification
    assert torch.equal(loaded(pixels).logits, model(pixels).logits)


def test_an_encoder_is_taken_as_it_is():
    backbone = load_encoder("digit_vit.digitscenes_64", pretrained=False)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    config = BackboneClassifierConfig(backbone_config=backbone.config, id2label={0: "a", 1: "b"})
    model = BackboneForImageClassification(config, backbone)
    assert model.backbone is backbone
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert model.backbone.config._attn_implementation == "sdpa", "a config made around another one resets it"


def test_two_small_batches_make_the_gradient_of_one_large(tmp_path):
    """The Trainer must know that the loss is a mean over pictures, which it then scales under accumulation."""
    pictures = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    rows = [{"pixel_values": picture, "labels": label} for label, picture in enumerate(pictures)]

    def step(batch: int, accumulation: int) -> torch.Tensor:
        model = build()
        args = TrainingArguments(
            tmp_path, max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            optim="sgd", learning_rate=1.0, max_grad_norm=0.0, report_to="none", use_cpu=True, disable_tqdm=True,
            save_strategy="no",
        )  # fmt: skip
        before = model.classifier.weight.detach().clone()
        Trainer(model, args, train_dataset=rows).train()
        return model.classifier.weight.detach() - before

    assert torch.allclose(step(batch=4, accumulation=1), step(batch=2, accumulation=2), atol=1e-6)
