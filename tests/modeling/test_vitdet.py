"""ViTDet: detectron2's files become Transformers' `VitDetBackbone`, which is held to the definition in float64.

The definition below is written from the ViTDet and MViTv2 papers, over detectron2's names of the weights. Two things
are as in both implementations and not as in the MViTv2 paper's equation 4: the relative position term is not divided by
the square root of the head's width, and padding cells of a window are attended to (as zeros before the projection).
"""

import pickle
import re

import numpy as np
import pytest
import torch
from definition_pieces import cubic, gelu, layer_norm, linear, relative_error, resize_matrix, resized
from transformers import AutoBackbone, AutoModel, VitDetBackbone

from ssm_vlm.modeling.convert_vitdet import VITDET_LAYOUT
from ssm_vlm.modeling.encoder_conversion import convert_published
from ssm_vlm.modeling.encoder_loading import load_encoder
from ssm_vlm.modeling.token_grid import encoder_downsampling, grid_size

WIDTH, HEADS, DEPTH, PATCH, WINDOW, GRID, PRETRAINED = 12, 2, 4, 4, 3, 6, 4
GLOBAL_BLOCKS, RESIDUAL_BLOCKS = (1, 3), (2,)
SIZES = {
    "trained": (24, 24),
    "oblong": (24, 40),
    "tall and larger": (52, 28),
    "not a multiple": (27, 37),
    "pretrained": (16, 16),
    "one patch": (4, 4),
}
DETECTOR = ("backbone.simfp_2.0.weight", "proposal_generator.rpn_head.conv.weight", "roi_heads.box_head.fc1.weight")


def detectron2_weights(dtype=torch.float64):
    """A random ViT under the names of `backbone.net`, large enough that every part of it shows."""
    torch.manual_seed(0)
    shapes = {"patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,)}
    shapes["pos_embed"] = (1, PRETRAINED**2 + 1, WIDTH)
    for block in range(DEPTH):
        reach = 2 * (GRID if block in GLOBAL_BLOCKS else WINDOW) - 1
        parts = {"attn.qkv.weight": (3 * WIDTH, WIDTH), "attn.qkv.bias": (3 * WIDTH,)}
        parts |= {"attn.proj.weight": (WIDTH, WIDTH), "attn.proj.bias": (WIDTH,)}
        parts |= {f"attn.rel_pos_{axis}": (reach, WIDTH // HEADS) for axis in "hw"}
        parts |= {"mlp.fc1.weight": (4 * WIDTH, WIDTH), "mlp.fc1.bias": (4 * WIDTH,)}
        parts |= {"mlp.fc2.weight": (WIDTH, 4 * WIDTH), "mlp.fc2.bias": (WIDTH,)}
        parts |= {f"norm{i}.{kind}": (WIDTH,) for i in (1, 2) for kind in ("weight", "bias")}
        if block in RESIDUAL_BLOCKS:
            half = WIDTH // 2
            parts |= {"residual.conv1.weight": (half, WIDTH, 1, 1), "residual.conv2.weight": (half, half, 3, 3)}
            parts |= {"residual.conv3.weight": (WIDTH, half, 1, 1)}
            for i, width in ((1, half), (2, half), (3, WIDTH)):
                parts |= {f"residual.norm{i}.weight": (width,), f"residual.norm{i}.bias": (width,)}
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in parts.items()}
    weights = {}
    for name, shape in shapes.items():
        scale = 0.5 if len(shape) == 1 or "pos" in name else 1.0 / max(np.prod(shape[1:]), 1) ** 0.5
        weights[name] = scale * torch.randn(shape, dtype=dtype) + (1.0 if "norm" in name and "weight" in name else 0.0)
    return weights


def attention(x, weights, block):
    """[H, W, C] -> [H, W, C]: every cell attends to every cell, with decomposed relative positions."""
    height, width, _ = x.shape
    qkv = x.flatten(0, 1) @ weights[f"{block}attn.qkv.weight"].T + weights[f"{block}attn.qkv.bias"]
    outputs = []
    for head in range(HEADS):
        part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
        q, k, v = (piece[:, part] for piece in qkv.split(WIDTH, dim=1))
        scores = q @ k.T / (WIDTH // HEADS) ** 0.5
        for axis, size in (("h", height), ("w", width)):
            table = weights[f"{block}attn.rel_pos_{axis}"]
            if table.shape[0] != 2 * size - 1:
                table = resize_matrix(table.shape[0], 2 * size - 1, linear, True) @ table
            row, column = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
            place = row if axis == "h" else column
            offset = place[:, None] - place[None, :] + size - 1
            scores = scores + (q[:, None] * table[offset]).sum(-1)
        outputs.append(scores.softmax(-1) @ v)
    mixed = torch.cat(outputs, 1) @ weights[f"{block}attn.proj.weight"].T + weights[f"{block}attn.proj.bias"]
    return mixed.unflatten(0, (height, width))


def windowed(x, weights, block):
    """The same inside each window of a grid that begins at the top left; the last ones reach into zeros."""
    height, width, _ = x.shape
    out = torch.zeros_like(x)
    for top in range(0, height, WINDOW):
        for left in range(0, width, WINDOW):
            cells = x[top : top + WINDOW, left : left + WINDOW]
            rows, columns = cells.shape[:2]
            padded = torch.zeros(WINDOW, WINDOW, WIDTH, dtype=x.dtype)
            padded[:rows, :columns] = cells
            out[top : top + rows, left : left + columns] = attention(padded, weights, block)[:rows, :columns]
    return out


def bottleneck(x, weights, block):
    y = x.permute(2, 0, 1)  # [C, H, W]
    for index, padding in ((1, 0), (2, 1), (3, 0)):
        y = torch.nn.functional.conv2d(y[None], weights[f"{block}residual.conv{index}.weight"], padding=padding)[0]
        scale, shift = (weights[f"{block}residual.norm{index}.{kind}"][:, None, None] for kind in ("weight", "bias"))
        y = layer_norm(y, scale, shift, dim=0)
        y = gelu(y) if index < 3 else y
    return x + y.permute(1, 2, 0)


def definition(weights, picture):
    """[3, H, W] -> [C, H / patch, W / patch]: the output of the last block."""
    rows, columns = picture.shape[1] // PATCH, picture.shape[2] // PATCH
    patches = picture[:, : rows * PATCH, : columns * PATCH].unflatten(2, (columns, PATCH)).unflatten(1, (rows, PATCH))
    patches = patches.permute(1, 3, 0, 2, 4).flatten(2)  # [rows, columns, 3 * patch * patch]
    x = patches @ weights["patch_embed.proj.weight"].flatten(1).T + weights["patch_embed.proj.bias"]
    positions = weights["pos_embed"][0, -(PRETRAINED**2) :].unflatten(0, (PRETRAINED, PRETRAINED))
    x = x + resized(positions, rows, columns, cubic, False)
    for index in range(DEPTH):
        block = f"blocks.{index}."
        mix = attention if index in GLOBAL_BLOCKS else windowed
        x = x + mix(layer_norm(x, weights[f"{block}norm1.weight"], weights[f"{block}norm1.bias"]), weights, block)
        y = layer_norm(x, weights[f"{block}norm2.weight"], weights[f"{block}norm2.bias"])
        y = gelu(y @ weights[f"{block}mlp.fc1.weight"].T + weights[f"{block}mlp.fc1.bias"])
        x = x + y @ weights[f"{block}mlp.fc2.weight"].T + weights[f"{block}mlp.fc2.bias"]
        if index in RESIDUAL_BLOCKS:
            x = bottleneck(x, weights, block)
    return x.permute(2, 0, 1)


def published(weights, prefix="backbone.net."):
    return {prefix + name: tensor for name, tensor in weights.items()}


def converted_backbone(weights, **changes):
    tensors = {key: tensor.float() for key, tensor in published(weights).items()}
    model_class, config = VITDET_LAYOUT.infer(tensors)
    assert model_class is VitDetBackbone
    for key, value in changes.items():
        setattr(config, key, value)
    model = model_class(config).eval()
    model.load_state_dict(VITDET_LAYOUT.convert(tensors, config))
    return model


def pictures(size):
    torch.manual_seed(1)
    return torch.randn(2, 3, *size, dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
def test_forward_is_the_definition(size):
    weights, pixels = detectron2_weights(), pictures(size)
    backbone = converted_backbone(weights)
    with torch.no_grad():
        features = backbone(pixels.float()).feature_maps[-1]
    expected = torch.stack([definition(weights, picture) for picture in pixels])
    assert features.shape[2:] == grid_size(*size, encoder_downsampling(backbone.config))
    assert relative_error(features, expected) <= 1e-5


@pytest.mark.parametrize("size", [(24, 24), (27, 37)])
def test_gradients_are_the_definitions(size):
    weights = {name: tensor.requires_grad_() for name, tensor in detectron2_weights().items()}
    pixels = pictures(size)[:1].requires_grad_()
    expected = definition(weights, pixels[0])
    cotangent = torch.randn_like(expected)
    (expected * cotangent).sum().backward()
    backbone = converted_backbone({name: tensor.detach() for name, tensor in weights.items()})
    ours = pixels.detach().float().requires_grad_()
    (backbone(ours).feature_maps[-1] * cotangent.float()).sum().backward()
    assert relative_error(ours.grad, pixels.grad) <= 1e-4
    gradients = VITDET_LAYOUT.convert(published({name: t.grad for name, t in weights.items()}), backbone.config)
    parameters = dict(backbone.named_parameters())
    assert set(gradients) == set(parameters)
    for name, gradient in gradients.items():
        assert relative_error(parameters[name].grad, gradient) <= 1e-4, name


@pytest.mark.parametrize("size", [(24, 24), (27, 37)])
def test_bf16_is_close_to_float32(size):
    backbone = converted_backbone(detectron2_weights())
    pixels = pictures(size).float()
    with torch.no_grad():
        expected = backbone(pixels).feature_maps[-1].double()
        features = backbone.bfloat16()(pixels.bfloat16()).feature_maps[-1]
    assert features.dtype == torch.bfloat16 and relative_error(features, expected) <= 2e-2


def swap(one, other):
    def mutate(weights):
        weights[one], weights[other] = weights[other], weights[one]

    return mutate


def zero(name):
    def mutate(weights):
        weights[name] = torch.zeros_like(weights[name])

    return mutate


def transposed_positions(weights):
    grid = weights["pos_embed"][:, 1:].unflatten(1, (PRETRAINED, PRETRAINED)).transpose(1, 2).flatten(1, 2)
    weights["pos_embed"] = torch.cat([weights["pos_embed"][:, :1], grid], 1)


MUTATIONS = {
    "axes of the relative positions exchanged, window": swap("blocks.0.attn.rel_pos_h", "blocks.0.attn.rel_pos_w"),
    "axes of the relative positions exchanged, global": swap("blocks.3.attn.rel_pos_h", "blocks.3.attn.rel_pos_w"),
    "no relative position": zero("blocks.2.attn.rel_pos_h"),
    "norms exchanged": swap("blocks.1.norm1.weight", "blocks.1.norm2.weight"),
    "no residual block": zero("blocks.2.residual.norm3.weight"),
    "positions transposed": transposed_positions,
    "last block without MLP": zero("blocks.3.mlp.fc2.weight"),
    "no query bias": zero("blocks.1.attn.qkv.bias"),
}
CONFIG_MUTATIONS = {
    "a global block has windows": {"window_block_indices": [0, 2, 3]},
    "windows of another size": {"window_size": 2},
    "no windows": {"window_block_indices": []},
    "another epsilon": {"layer_norm_eps": 1e-2},
    "another activation": {"hidden_act": "relu"},
    "heads of another width": {"num_attention_heads": 3},
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_weight_is_noticed(mutation):
    weights, pixels = detectron2_weights(), pictures((24, 40))
    expected = torch.stack([definition(weights, picture) for picture in pixels])
    MUTATIONS[mutation](weights)
    with torch.no_grad():
        assert relative_error(converted_backbone(weights)(pixels.float()).feature_maps[-1], expected) > 1e-3


@pytest.mark.parametrize("mutation", CONFIG_MUTATIONS)
def test_a_wrong_config_is_noticed(mutation):
    """Sizes that no longer fit are errors; the rest shows in the features."""
    weights, pixels = detectron2_weights(), pictures((24, 40))
    expected = torch.stack([definition(weights, picture) for picture in pixels])
    try:
        backbone = converted_backbone(weights, **CONFIG_MUTATIONS[mutation])
    except RuntimeError:
        return
    with torch.no_grad():
        assert relative_error(backbone(pixels.float()).feature_maps[-1], expected) > 1e-3


def test_everything_is_inferred():
    tensors = published(detectron2_weights(torch.float32), "module.backbone.net.")
    assert VITDET_LAYOUT.recognises(tensors)
    _, config = VITDET_LAYOUT.infer(tensors)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (WIDTH, DEPTH, HEADS)
    assert (config.patch_size, config.mlp_ratio, config.window_size) == (PATCH, 4, WINDOW)
    assert (config.image_size, config.pretrain_image_size) == (GRID * PATCH, PRETRAINED * PATCH)
    assert config.window_block_indices == [0, 2] and config.residual_block_indices == [2]
    assert config.out_features == ["stage4"] and config.qkv_bias and config.use_relative_position_embeddings


def test_positions_without_a_class_token():
    """A model pretrained without one has as many positions as cells."""
    weights, pixels = detectron2_weights(), pictures((24, 40))
    weights["pos_embed"] = weights["pos_embed"][:, 1:]
    expected = torch.stack([definition(weights, picture) for picture in pixels])
    with torch.no_grad():
        assert relative_error(converted_backbone(weights)(pixels.float()).feature_maps[-1], expected) <= 1e-5


def test_the_detector_is_discarded_and_nothing_else():
    def discarded(key):
        return any(re.match(pattern, key) for pattern in VITDET_LAYOUT.discards)

    keys = published(detectron2_weights())
    assert not any(discarded(key) or discarded(f"module.{key}") for key in keys)
    assert all(discarded(key) and discarded(f"module.{key}") for key in (*DETECTOR, "pixel_mean", "pixel_std"))
    assert not discarded("backbone.net.norm.weight") and not discarded("backbone.bottom_up.stem.weight")


@pytest.fixture
def zoo_file(tmp_path):
    """A detector as the model zoo pickles it."""
    arrays = {key: tensor.numpy() for key, tensor in published(detectron2_weights(torch.float32)).items()}
    arrays |= {key: np.zeros(1, np.float32) for key in DETECTOR}
    path = tmp_path / "model_final_61ccd1.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    return path


def test_from_a_zoo_file_to_a_folder(zoo_file, tmp_path):
    """Read, converted, saved, and loaded whole and tapped, by Transformers' own classes and by this library."""
    conversion = convert_published(zoo_file, tmp_path / "whole")
    assert conversion.layout == "vitdet" and sorted(conversion.discarded) == sorted(DETECTOR)
    backbone = converted_backbone(detectron2_weights(torch.float32))
    pixels = pictures((24, 40)).float()
    with torch.no_grad():
        outputs = backbone(pixels, output_hidden_states=True)
        again, info = VitDetBackbone.from_pretrained(tmp_path / "whole", output_loading_info=True)
        assert not any(info.values()) and torch.equal(again.eval()(pixels).feature_maps[-1], outputs.feature_maps[-1])
        model = AutoModel.from_pretrained(tmp_path / "whole").eval()
        assert torch.equal(model(pixels).last_hidden_state, outputs.feature_maps[-1])
        for block in range(1, DEPTH + 1):
            tapped = load_encoder(tmp_path / "whole", tap=f"block{block}")
            assert len(tapped.encoder.layer) == block
            assert torch.equal(tapped(pixels).feature_maps[-1], outputs.hidden_states[block])
        assert len(load_encoder(tmp_path / "whole").encoder.layer) == DEPTH


def test_another_file_than_the_named_one_is_refused(zoo_file, tmp_path):
    with pytest.raises(ValueError, match="its SHA-256 is"):
        convert_published(zoo_file, tmp_path / "whole", "vitdet_base_patch16.coco_maskrcnn_1024")
    tensors = published(detectron2_weights(torch.float32))
    for change, words in (
        ({"backbone.net.norm.weight": torch.zeros(1)}, "has undeclared backbone.net.norm.weight"),
        ({"backbone.net.blocks.1.mlp.fc2.bias": torch.zeros(5)}, r"fc2.bias \(5,\) instead of \(12,\)"),
    ):
        torch.save({"model": tensors | change}, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=words):
            convert_published(tmp_path / "other.pth", tmp_path / "whole")
    torch.save({"model": tensors}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="'vit_adapter'|layout 'vitdet', not in"):
        convert_published(tmp_path / "other.pth", tmp_path / "whole", "vit_adapter_small.deit_ade20k_upernet_512")
    assert not (tmp_path / "whole").exists()


def test_nothing_is_allocated_after_the_last_block():
    with torch.device("meta"):
        backbone = AutoBackbone.from_config(converted_backbone(detectron2_weights()).config)
    assert {key.split(".")[0] for key in backbone.state_dict()} == {"embeddings", "encoder"}
    assert len(backbone.encoder.layer) == DEPTH


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("pos_embed"), "backbone.net.pos_embed"),
        (lambda w: w.pop("blocks.1.attn.rel_pos_h"), "backbone.net.blocks.1.attn.rel_pos_h"),
        (lambda w: [w.pop(key) for key in list(w) if "patch_embed" in key], "backbone.net.patch_embed.proj.weight"),
        (lambda w: w.update(pos_embed=torch.zeros(1, 15, WIDTH)), "has 15 rows"),
        (lambda w: w.update({"blocks.0.attn.rel_pos_h": torch.zeros(9, 6)}), "one square window"),
    ],
)
def test_a_broken_file_is_told(change, words):
    weights = detectron2_weights(torch.float32)
    change(weights)
    with pytest.raises(ValueError, match=words):
        VITDET_LAYOUT.infer(published(weights))


def test_blocks_that_are_all_alike():
    """Tables of one length are windows where they are 14 wide, as every published window is, else whole pictures."""
    for side, windowed_blocks in ((14, [0, 1, 2, 3]), (6, [])):
        weights = detectron2_weights(torch.float32)
        for key in [key for key in weights if "rel_pos" in key]:
            weights[key] = torch.zeros(2 * side - 1, WIDTH // HEADS)
        _, config = VITDET_LAYOUT.infer(published(weights))
        assert config.window_block_indices == windowed_blocks
        assert config.image_size == (24 if side == 6 else 1024)
        assert VitDetBackbone(config).encoder.layer[0].attention.rel_pos_h.shape[0] == 2 * side - 1
