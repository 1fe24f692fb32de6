"""Any timm model by its id: a dozen families, each held to timm's own feature maps and to the encoder contract."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from ssm_vlm.configuration.configuration_llava_style import LlavaStyleConfig
from ssm_vlm.configuration.timm_stages import create_timm_model, tapped_timm_config
from ssm_vlm.modeling.encoder_loading import load_encoder
from ssm_vlm.modeling.modeling_llava_style import LlavaStyleModel
from ssm_vlm.modeling.modeling_tapped_timm import TappedTimmBackbone
from ssm_vlm.modeling.timm_backbones import load_timm_encoder
from ssm_vlm.modeling.token_grid import encoder_downsampling, grid_size, num_image_tokens

pytestmark = pytest.mark.timm

ANY, MULTIPLE, ONE = "any canvas", "multiples", "one size"
MODELS = {  # architecture -> default tap, its stride, which canvases it takes
    "resnet10t": ("stage3", 16, ANY),
    "test_convnext": ("stage3", 16, ANY),
    "test_vit": ("block5", 16, MULTIPLE),
    "swin_tiny_patch4_window7_224": ("stage3", 16, MULTIPLE),
    "test_maxvit": ("stage3", 16, MULTIPLE),
    "test_coatnet": ("stage3", 16, ONE),
    "hiera_tiny_224": ("stage3", 16, ONE),
    "eva02_tiny_patch14_224": ("block11", 14, MULTIPLE),
    "davit_tiny": ("stage3", 16, ANY),
    "mambaout_femto": ("stage3", 16, ANY),
    "fastvit_t8": ("stage3", 16, ANY),
    "pvt_v2_b0": ("stage3", 16, ANY),
    "test_efficientnet": ("stage3", 16, ANY),
    "poolformer_s12": ("stage3", 16, MULTIPLE),
}
SMALL = {  # what makes the larger of them small
    "swin_tiny_patch4_window7_224": {"embed_dim": 12, "depths": [1, 1, 2, 1], "img_size": 64},
    "hiera_tiny_224": {"embed_dim": 16, "stages": [1, 1, 2, 1]},
    "eva02_tiny_patch14_224": {"depth": 12, "embed_dim": 24, "num_heads": 2, "img_size": 56},
    "davit_tiny": {"embed_dims": [12, 24, 48, 96], "num_heads": [1, 2, 4, 8], "depths": [1, 1, 2, 1]},
    "mambaout_femto": {"dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1]},
    "pvt_v2_b0": {"embed_dims": [8, 16, 24, 32], "num_heads": [1, 2, 4, 8], "depths": [1, 1, 2, 1]},
}


@pytest.fixture(scope="module", params=MODELS)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def config(architecture):
    return tapped_timm_config(architecture, model_args=SMALL.get(architecture))


@pytest.fixture(scope="module")
def whole(config):
    """timm's own model with random weights that no constant of its initialisation hides."""
    import timm

    torch.manual_seed(0)
    arguments = {key: value for key, value in config.model_args.items() if key != "feature_cls"}
    model = timm.create_model(config.backbone, **arguments).eval()
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not name.endswith("running_var"):
            value += 0.05 * torch.randn_like(value)
    return model


@pytest.fixture(scope="module")
def file(whole, tmp_path_factory):
    path = tmp_path_factory.mktemp("timm") / "model.safetensors"
    save_file({key: value.contiguous() for key, value in whole.state_dict().items()}, path)
    return path


def native(config, whole):
    size = config.model_args.get("img_size") or whole.pretrained_cfg["input_size"][-1]
    return (size, size)


def canvas(config, whole, more=0):
    """A canvas that the model takes, not square where it can be."""
    height, width = native(config, whole)
    return (height, width) if config.only_size else (height, width + (more or config.canvas_multiple or 37))


def taps(model, pixels, index):
    with torch.no_grad():
        options = {"stop_early": True, "intermediates_only": True, "output_fmt": "NCHW"}
        return model.forward_intermediates(pixels, indices=[index], **options)[0]


def error(ours, expected):
    assert ours.shape == expected.shape
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def features(encoder, pixels):
    with torch.no_grad():
        return encoder(pixels).feature_maps[-1]


def test_tap_stride_and_canvases(architecture, config):
    tap, stride, takes = MODELS[architecture]
    total = 1
    for step, _ in encoder_downsampling(config):
        total *= step
    assert (config.out_features, total) == ([tap], stride)
    assert takes == (MULTIPLE if config.canvas_multiple else ONE if config.only_size else ANY)


def test_features_are_timms(config, whole, file):
    encoder = load_timm_encoder(file, config)
    pixels = torch.randn(2, 3, *canvas(config, whole))
    expected = taps(whole, pixels, config.out_indices[-1])
    assert error(features(encoder, pixels), expected) < 1e-5
    assert encoder.channels == [config.hidden_size] == [expected.shape[1]]
    # the mutant: one tensor of the last block before the tap is another one
    last = [value for value in encoder.parameters() if value.ndim > 1][-1]
    last.data = last.data.flip(0)
    assert error(features(encoder, pixels), expected) > 1e-4


def test_nothing_after_the_tap(config, whole, file):
    """All that is kept has a part in the features."""
    encoder = load_timm_encoder(file, config)
    encoder(torch.randn(1, 3, *canvas(config, whole))).feature_maps[-1].sum().backward()
    assert [key for key, value in encoder.named_parameters() if value.grad is None] == []
    assert sum(p.numel() for p in encoder.parameters()) < sum(p.numel() for p in whole.parameters())


def test_an_image_processor_can_count_tokens(config, whole, file):
    encoder = load_timm_encoder(file, config)
    for more in (0, 1, 9, 17, 31):
        height, width = canvas(config, whole, more)
        if config.canvas_multiple:
            width += -width % config.canvas_multiple
        grid = features(encoder, torch.randn(1, 3, height, width)).shape[-2:]
        assert tuple(grid) == grid_size(height, width, encoder_downsampling(config)), (height, width)


def test_canvases_that_do_not_fit_are_refused(config, whole, file):
    if not config.canvas_multiple and not config.only_size:
        pytest.skip("takes any canvas")
    height, width = native(config, whole)
    fits = f"multiples of {config.canvas_multiple} pixels" if config.canvas_multiple else f"{height}x{width} pixels"
    with pytest.raises(ValueError, match=f"{config.backbone}.*{fits}, got {height}x{width + 1}"):
        load_timm_encoder(file, config)(torch.randn(1, 3, height, width + 1))


def test_saved_and_reloaded(config, whole, file, tmp_path):
    load_timm_encoder(file, config).save_pretrained(tmp_path)
    first, second = load_encoder(tmp_path), load_encoder(tmp_path)
    assert type(first) is TappedTimmBackbone and first.config.to_dict() == second.config.to_dict()
    pixels = torch.randn(1, 3, *canvas(config, whole))
    assert torch.equal(features(first, pixels), features(second, pixels))
    assert error(features(first, pixels), taps(whole, pixels, config.out_indices[-1])) < 1e-5


def test_frozen_inside_the_vlm(config, whole, file, tmp_path):
    """Under `train()` a frozen encoder, BatchNorm included, gives what it gives in `eval()`; so does a saved VLM."""
    text = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    model = LlavaStyleModel(
        LlavaStyleConfig(vision_config=config, text_config=text, image_token_id=31),
        vision_tower=load_timm_encoder(file, config),
    )
    size = canvas(config, whole)
    pixels = torch.randn(2, 3, *size)
    count = num_image_tokens(*size, encoder_downsampling(config))
    expected = model.eval().get_tap_features(pixels)
    before = {key: value.clone() for key, value in model.vision_tower.state_dict().items()}
    model.train()
    ids = torch.tensor([[1] + [31] * count + [2, 3]] * 2)
    model(input_ids=ids, pixel_values=pixels).last_hidden_state.sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in model.vision_tower.parameters())
    for one, other in zip(expected, model.get_tap_features(pixels), strict=True):
        assert one.shape == (count, config.hidden_size) and torch.equal(one, other)
    assert all(torch.equal(value, before[key]) for key, value in model.vision_tower.state_dict().items())
    model.save_pretrained(tmp_path)
    reloaded = LlavaStyleModel.from_pretrained(tmp_path).eval()
    assert error(reloaded.get_tap_features(pixels)[0], expected[0]) < 1e-5


def test_training_batch_norm_is_not_inert(config, whole, file):
    """What the test of freezing would miss otherwise: in train mode, the statistics move."""
    encoder = load_timm_encoder(file, config)
    statistics = [key for key in encoder.state_dict() if key.endswith("running_mean")]
    if not statistics:
        pytest.skip("no BatchNorm")
    before = encoder.state_dict()[statistics[0]].clone()
    features(encoder.train(), torch.randn(2, 3, *canvas(config, whole)))
    assert not torch.equal(encoder.state_dict()[statistics[0]], before)


class TestPlainModels:
    """The norm of a plain vision transformer is visible in the config, and not applied unless it says so."""

    @pytest.fixture(scope="class")
    def vit(self):
        import timm

        torch.manual_seed(0)
        model = timm.create_model("test_vit", dynamic_img_size=True).eval()
        model.norm.weight.data = torch.rand(64) + 0.5
        return model

    @pytest.mark.parametrize("apply_final_norm", [False, True])
    @pytest.mark.parametrize("tap", ["block1", "block6"])
    def test_final_norm(self, vit, tmp_path, tap, apply_final_norm):
        save_file(vit.state_dict(), tmp_path / "model.safetensors")
        config = tapped_timm_config("test_vit", tap, apply_final_norm=apply_final_norm)
        encoder = load_timm_encoder(tmp_path / "model.safetensors", config)
        pixels = torch.randn(1, 3, 160, 96)
        index = int(tap.removeprefix("block")) - 1
        with torch.no_grad():
            maps = vit.forward_intermediates(pixels, indices=[index], norm=apply_final_norm, intermediates_only=True)
        assert error(features(encoder, pixels), maps[0]) < 1e-5
        assert any("norm.weight" in key and ".blocks." not in key for key in encoder.state_dict()) is apply_final_norm
        encoder.save_pretrained(tmp_path / "saved")
        assert load_encoder(tmp_path / "saved").config.apply_final_norm is apply_final_norm


class TestById:
    def test_without_weights(self):
        encoder = load_encoder("timm/resnet10t.c3_in1k", tap="stage2", pretrained=False)
        assert isinstance(encoder, TappedTimmBackbone) and not encoder.training
        assert encoder.channels == [128] and features(encoder, torch.randn(1, 3, 64, 96)).shape == (1, 128, 8, 12)

    def test_a_folder_as_timm_publishes_it(self, tmp_path):
        self.publish(tmp_path)
        encoder = load_encoder(tmp_path, tap="stage4")
        weights = load_file(tmp_path / "model.safetensors")
        assert torch.equal(
            encoder.timm_model["stages_0"].blocks[0].conv_dw.weight, weights["stages.0.blocks.0.conv_dw.weight"]
        )
        encoder.save_pretrained(tmp_path / "tapped")
        assert load_encoder(tmp_path / "tapped").config.out_features == ["stage4"]

    def publish(self, folder):
        model = create_timm_model("test_convnext")
        weights = {key: torch.randn(value.shape) for key, value in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
        mean = {
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
            "input_size": [3, 160, 160],
            "interpolation": "bicubic",
        }
        config = {"architecture": "test_convnext", "num_classes": 1000, "pretrained_cfg": mean | {"crop_pct": 0.9}}
        (folder / "config.json").write_text(json.dumps(config))
        return weights

    def test_its_image_processor(self, tmp_path):
        from ssm_vlm.modeling.encoder_preprocessing import encoder_image_processor

        self.publish(tmp_path)
        processor = encoder_image_processor(tmp_path, load_encoder(tmp_path).config)
        assert (*processor.image_mean, *processor.image_std) == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
        assert (processor.size.height, processor.size.width) == (160, 160)
        assert processor.downsampling == [[4, "floor"], [2, "floor"], [2, "floor"]]

    def test_a_file_of_another_model(self, tmp_path):
        weights = self.publish(tmp_path)
        save_file(weights | {"extra.bias": torch.zeros(1)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="undeclared extra.bias"):
            load_encoder(tmp_path)

    @pytest.mark.parametrize(
        ("name", "tap", "message"),
        [
            ("timm/resnet10tt.c3_in1k", None, "timm .* has no model named 'resnet10tt'"),
            ("timm/resnet10t.c3_in1k", "stage5", "resnet10t has no tap 'stage5'; choose stem, stage1, stage2"),
            ("timm/test_vit.r160_in1k", "stage3", "test_vit has no tap 'stage3'; choose block1, block2"),
            ("timm/mixer_s16_224", "stage3", "mixer_s16_224 has no tap 'stage3'; choose block1 to block8"),
            ("timm/legacy_xception.tf_in1k", None, "'legacy_xception' do not follow their strides"),
        ],
    )
    def test_what_is_not_there(self, name, tap, message):
        with pytest.raises(ValueError, match=message):
            load_encoder(name, tap=tap, pretrained=False)
