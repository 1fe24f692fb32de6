"""ViT-Adapter: our model and the conversion of its published files, held to the definition in float64.

The definition below is written from the paper's section 3 over the names of mmseg's files: every sum of the deformable
attention is spelled out over the four cells around each point.
"""

import re

import pytest
import torch
from definition_pieces import cubic, gelu, layer_norm, linear, relative_error, resized
from transformers import AutoBackbone, AutoModel, UperNetConfig, UperNetForSemanticSegmentation

from ssm_vlm.configuration.configuration_vit_adapter import VitAdapterConfig
from ssm_vlm.modeling.convert_vit_adapter import VIT_ADAPTER_LAYOUT
from ssm_vlm.modeling.encoder_conversion import convert_published
from ssm_vlm.modeling.encoder_loading import load_encoder
from ssm_vlm.modeling.modeling_vit_adapter import VitAdapterBackbone
from ssm_vlm.modeling.token_grid import encoder_downsampling, grid_size

WIDTH, HEADS, DEPTH, INTERACTIONS, PRETRAINED = 32, 2, 8, 4, 3
PRIOR, DEFORM_HEADS, POINTS, VALUES, FFN = 4, 2, 4, 16, 8
LEVELS = ("stage1", "stage2", "stage3", "stage4")
SIZES = {"square": (64, 64), "oblong": (64, 96), "tall": (96, 32), "one cell": (32, 32)}


def linear_shapes(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm_shapes(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def batch_norm_shapes(name, width):
    return norm_shapes(name, width) | {f"{name}.running_mean": (width,), f"{name}.running_var": (width,)}


def exchange_shapes(name, levels, ffn):
    reads = DEFORM_HEADS * levels * POINTS
    shapes = norm_shapes(f"{name}.query_norm", WIDTH) | norm_shapes(f"{name}.feat_norm", WIDTH)
    shapes |= linear_shapes(f"{name}.attn.sampling_offsets", WIDTH, 2 * reads)
    shapes |= linear_shapes(f"{name}.attn.attention_weights", WIDTH, reads)
    shapes |= linear_shapes(f"{name}.attn.value_proj", WIDTH, VALUES)
    shapes |= linear_shapes(f"{name}.attn.output_proj", VALUES, WIDTH)
    if ffn:
        shapes |= norm_shapes(f"{name}.ffn_norm", WIDTH) | linear_shapes(f"{name}.ffn.fc1", WIDTH, FFN)
        shapes |= {f"{name}.ffn.dwconv.dwconv.weight": (FFN, 1, 3, 3), f"{name}.ffn.dwconv.dwconv.bias": (FFN,)}
        shapes |= linear_shapes(f"{name}.ffn.fc2", FFN, WIDTH)
    return shapes


def mmseg_weights(dtype=torch.float64, interactions=INTERACTIONS, light=False):
    """A random model under the names of the published files' `backbone`, large enough that every part of it shows."""
    torch.manual_seed(0)
    shapes = {"pos_embed": (1, PRETRAINED**2 + 1, WIDTH), "level_embed": (3, WIDTH)}
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, 16, 16), "patch_embed.proj.bias": (WIDTH,)}
    for block in (f"blocks.{index}" for index in range(DEPTH)):
        shapes |= norm_shapes(f"{block}.norm1", WIDTH) | norm_shapes(f"{block}.norm2", WIDTH)
        shapes |= linear_shapes(f"{block}.attn.qkv", WIDTH, 3 * WIDTH) | linear_shapes(
            f"{block}.attn.proj", WIDTH, WIDTH
        )
        shapes |= linear_shapes(f"{block}.mlp.fc1", WIDTH, 4 * WIDTH) | linear_shapes(
            f"{block}.mlp.fc2", 4 * WIDTH, WIDTH
        )
        shapes |= {f"{block}.gamma1": (WIDTH,), f"{block}.gamma2": (WIDTH,)}
    prior_widths = [PRIOR, 2 * PRIOR, 4 * PRIOR, 4 * PRIOR]
    for index in range(3):
        shapes |= {f"spm.stem.{3 * index}.weight": (PRIOR, PRIOR if index else 3, 3, 3)}
        shapes |= batch_norm_shapes(f"spm.stem.{3 * index + 1}", PRIOR)
        shapes |= {f"spm.conv{index + 2}.0.weight": (prior_widths[index + 1], prior_widths[index], 3, 3)}
        shapes |= batch_norm_shapes(f"spm.conv{index + 2}.1", prior_widths[index + 1])
    for index, width in enumerate(prior_widths, 1):
        shapes |= {f"spm.fc{index}.weight": (WIDTH, width, 1, 1), f"spm.fc{index}.bias": (WIDTH,)}
    for index in range(interactions):
        shapes |= exchange_shapes(f"interactions.{index}.injector", 3, False)
        shapes |= {f"interactions.{index}.injector.gamma": (WIDTH,)}
        shapes |= exchange_shapes(f"interactions.{index}.extractor", 1, not light)
    for index in range(0 if light else 2):
        shapes |= exchange_shapes(f"interactions.{interactions - 1}.extra_extractors.{index}", 1, True)
    shapes |= {"up.weight": (WIDTH, WIDTH, 2, 2), "up.bias": (WIDTH,)}
    for index in range(1, 5):
        shapes |= batch_norm_shapes(f"norm{index}", WIDTH)
    weights = {}
    for name, shape in shapes.items():
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 and "embed" not in name[:11] else 9
        weights[name] = torch.randn(shape, dtype=dtype) * (0.3 if len(shape) == 1 else fan_in**-0.5)
        if (
            "norm" in name
            and name.endswith("weight")
            or "gamma" in name
            or re.search(r"(stem|conv\d)\.\d\.weight", name)
        ):
            weights[name] += 1.0 if len(shape) == 1 else 0.0
        if "running_var" in name:
            weights[name] = weights[name].square() + 0.5
        if "sampling_offsets.bias" in name:
            weights[name] *= 5.0
    return weights


class Definition:
    """ViT-Adapter of one picture, over the weights of a file."""

    def __init__(self, weights, interactions=INTERACTIONS, window=0, added="each"):
        self.weights, self.interactions, self.window, self.added = weights, interactions, window, added

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x, name):
        return layer_norm(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def batch_norm(self, x, name):
        """[C, H, W] with the statistics of training."""
        mean, var, scale, shift = (
            self.weights[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    def conv(self, x, name, stride=1, padding=1, groups=1):
        bias = self.weights.get(f"{name}.bias")
        return torch.nn.functional.conv2d(
            x[None], self.weights[f"{name}.weight"], bias, stride=stride, padding=padding, groups=groups
        )[0]

    def spatial_prior(self, picture):
        x = picture
        for index, stride in enumerate((2, 1, 1)):
            x = self.batch_norm(self.conv(x, f"spm.stem.{3 * index}", stride), f"spm.stem.{3 * index + 1}").clamp(min=0)
        maps = [torch.nn.functional.max_pool2d(x[None], 3, 2, 1)[0]]
        for index in (2, 3, 4):
            x = self.conv(maps[-1], f"spm.conv{index}.0", 2)
            maps.append(self.batch_norm(x, f"spm.conv{index}.1").clamp(min=0))
        return [self.conv(x, f"spm.fc{index}", padding=0) for index, x in enumerate(maps, 1)]

    def deformable(self, query, centres, source, grids, name):
        """[Q, C]: each head of each query sums weighted values at points of every map."""
        shape = (DEFORM_HEADS, len(grids), POINTS)
        offsets = self.linear(query, f"{name}.sampling_offsets").unflatten(-1, (*shape, 2))
        weights = self.linear(query, f"{name}.attention_weights").unflatten(-1, (DEFORM_HEADS, -1)).softmax(-1)
        weights = weights.unflatten(-1, shape[1:])
        values = self.linear(source, f"{name}.value_proj").unflatten(-1, (DEFORM_HEADS, -1))  # [S, heads, D]
        heads, start = [0.0] * DEFORM_HEADS, 0
        for level, (rows, columns) in enumerate(grids):
            cells = values[start : start + rows * columns]
            start += rows * columns
            for head in range(DEFORM_HEADS):
                for point in range(POINTS):
                    # In cells, the centre of the first at 0.
                    x = centres[:, 0] * columns - 0.5 + offsets[:, head, level, point, 0]
                    y = centres[:, 1] * rows - 0.5 + offsets[:, head, level, point, 1]
                    read = 0.0
                    for row in (y.floor(), y.floor() + 1):
                        for column in (x.floor(), x.floor() + 1):
                            share = (1 - (y - row).abs()) * (1 - (x - column).abs())
                            inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
                            index = (row.clamp(0, rows - 1) * columns + column.clamp(0, columns - 1)).long()
                            read = read + (share * inside)[:, None] * cells[index, head]
                    heads[head] = heads[head] + weights[:, head, level, point, None] * read
        return self.linear(torch.cat(heads, -1), f"{name}.output_proj")

    def exchange(self, query, centres, source, grids, name):
        query, source = self.norm(query, f"{name}.query_norm"), self.norm(source, f"{name}.feat_norm")
        return self.deformable(query, centres, source, grids, f"{name}.attn")

    def extractor(self, pyramid, centres, x, grids, name):
        pyramid = pyramid + self.exchange(pyramid, centres, x, [grids[1]], name)
        if f"{name}.ffn.fc1.weight" not in self.weights:
            return pyramid
        hidden = self.linear(self.norm(pyramid, f"{name}.ffn_norm"), f"{name}.ffn.fc1")
        maps = []
        for level, grid in zip(hidden.split([r * c for r, c in grids]), grids, strict=True):
            level = level.unflatten(0, grid).permute(2, 0, 1)
            maps.append(self.conv(level, f"{name}.ffn.dwconv.dwconv", groups=FFN).permute(1, 2, 0).flatten(0, 1))
        return pyramid + self.linear(gelu(torch.cat(maps)), f"{name}.ffn.fc2")

    def attention(self, x, grid, name, window):
        """[N, C]; queries, keys and values past the edge of a map that windows do not divide are zeros."""
        qkv = self.linear(x, f"{name}.qkv").unflatten(0, grid)
        side = (window, window) if window else grid
        mixed = torch.zeros(*grid, WIDTH, dtype=x.dtype)
        for top in range(0, grid[0], side[0]):
            for left in range(0, grid[1], side[1]):
                cells = torch.zeros(*side, 3 * WIDTH, dtype=x.dtype)
                found = qkv[top : top + side[0], left : left + side[1]]
                cells[: found.shape[0], : found.shape[1]] = found
                heads = []
                for head in range(HEADS):
                    part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
                    q, k, v = (piece[:, part] for piece in cells.flatten(0, 1).split(WIDTH, dim=1))
                    heads.append((q @ k.T / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v)
                out = torch.cat(heads, 1).unflatten(0, side)[: found.shape[0], : found.shape[1]]
                mixed[top : top + side[0], left : left + side[1]] = out
        return self.linear(mixed.flatten(0, 1), f"{name}.proj")

    def block(self, x, grid, name, window):
        gammas = [self.weights.get(f"{name}.gamma{index}", 1.0) for index in (1, 2)]
        x = x + gammas[0] * self.attention(self.norm(x, f"{name}.norm1"), grid, f"{name}.attn", window)
        hidden = gelu(self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        return x + gammas[1] * self.linear(hidden, f"{name}.mlp.fc2")

    def __call__(self, picture):
        """[3, H, W], sides multiples of 32 -> the four levels [C, H / stride, W / stride]."""
        height, width = picture.shape[1:]
        grids = [(height // stride, width // stride) for stride in (8, 16, 32)]
        rows, columns = grids[1]
        priors = self.spatial_prior(picture)
        pyramid = torch.cat(
            [prior.flatten(1).T + level for prior, level in zip(priors[1:], self.weights["level_embed"], strict=True)]
        )
        patches = picture.unflatten(2, (columns, 16)).unflatten(1, (rows, 16)).permute(1, 3, 0, 2, 4).flatten(2)
        x = patches @ self.weights["patch_embed.proj.weight"].flatten(1).T + self.weights["patch_embed.proj.bias"]
        positions = self.weights["pos_embed"][0, 1:].unflatten(0, (PRETRAINED, PRETRAINED))
        x = (x + resized(positions, rows, columns, cubic, False)).flatten(0, 1)
        centres = [
            torch.tensor([((c + 0.5) / w, (r + 0.5) / h) for r in range(h) for c in range(w)], dtype=x.dtype)
            for h, w in grids
        ]
        group, outputs = DEPTH // self.interactions, []
        for index in range(self.interactions):
            name = f"interactions.{index}"
            taken = self.exchange(x, centres[1], pyramid, grids, f"{name}.injector")
            x = x + self.weights[f"{name}.injector.gamma"] * taken
            for block in range(index * group, (index + 1) * group):
                x = self.block(x, grids[1], f"blocks.{block}", 0 if block % group == group - 1 else self.window)
            extractors = [f"{name}.extractor", f"{name}.extra_extractors.0", f"{name}.extra_extractors.1"]
            for extractor in extractors:
                if f"{extractor}.query_norm.weight" in self.weights:
                    pyramid = self.extractor(pyramid, torch.cat(centres), x, grids, extractor)
            outputs.append(x)
        maps = [
            level.unflatten(0, grid).permute(2, 0, 1)
            for level, grid in zip(pyramid.split([r * c for r, c in grids]), grids, strict=True)
        ]
        up = torch.einsum("ihw,iojk->ohjwk", maps[0], self.weights["up.weight"]).flatten(3, 4).flatten(1, 2)
        maps.insert(0, up + self.weights["up.bias"][:, None, None] + priors[0])
        if self.added != "none":
            for index, level in enumerate(maps):
                x = outputs[index if self.added == "each" else -1].unflatten(0, grids[1])
                maps[index] = level + resized(x, *level.shape[1:], linear, True).permute(2, 0, 1)
        return [self.batch_norm(level, f"norm{index}") for index, level in enumerate(maps, 1)]


def published(weights, head="decode_head.conv_seg.weight"):
    batches = {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(7)
        for name in weights
        if "running_mean" in name
    }
    return {f"backbone.{name}": tensor for name, tensor in (weights | batches).items()} | {head: torch.zeros(1)}


def converted(tensors, **changes):
    """The whole model in a file, its class and config as the layout says."""
    tensors = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    model_class, config = VIT_ADAPTER_LAYOUT.infer(tensors)
    kept = {k: t for k, t in tensors.items() if not any(re.match(p, k) for p in VIT_ADAPTER_LAYOUT.discards)}
    config = type(config)(**{**config.to_dict(), **changes})
    model = model_class(config).eval()
    model.load_state_dict(VIT_ADAPTER_LAYOUT.convert(kept, config))
    return model


def pictures(size, count=2):
    torch.manual_seed(1)
    return torch.randn(count, 3, *size, dtype=torch.float64)


def expected_levels(definition, pixels):
    return [torch.stack(level) for level in zip(*(definition(picture) for picture in pixels), strict=True)]


def assert_same(feature_maps, expected, tolerance):
    for name, ours, reference in zip(LEVELS, feature_maps, expected, strict=True):
        assert ours.shape == reference.shape and relative_error(ours, reference) <= tolerance, name


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
def test_forward_is_the_definition(size):
    weights, pixels = mmseg_weights(), pictures(size)
    with torch.no_grad():
        expected = expected_levels(Definition(weights), pixels)
        assert_same(converted(published(weights))(pixels.float()).feature_maps, expected, 1e-5)


def test_sides_that_are_no_multiples_of_32():
    """The canvas is filled up with zeros, and cells that hold no picture are cut away."""
    weights, pixels = mmseg_weights(), pictures((71, 49))
    with torch.no_grad():
        whole = expected_levels(Definition(weights), torch.nn.functional.pad(pixels, (0, 15, 0, 25)))
        expected = [m[..., : -(-71 // s), : -(-49 // s)] for m, s in zip(whole, (4, 8, 16, 32), strict=True)]
        assert_same(converted(published(weights))(pixels.float()).feature_maps, expected, 1e-5)


def test_a_detector_has_windows_and_adds_the_last_map():
    weights, pixels = mmseg_weights(), pictures((64, 96))
    backbone = converted(published(weights, "roi_head.bbox_head.fc_cls.weight"), window_size=3)
    assert backbone.config.added_vit_features == "last"
    with torch.no_grad():
        expected = expected_levels(Definition(weights, window=3, added="last"), pixels)
        assert_same(backbone(pixels.float()).feature_maps, expected, 1e-5)


def test_the_light_model():
    """One interaction around all blocks, no convolutional network, no extra extractors, nothing added."""
    weights, pixels = mmseg_weights(interactions=1, light=True), pictures((64, 96))
    with torch.no_grad():
        expected = expected_levels(Definition(weights, interactions=1, added="none"), pixels)
        assert_same(converted(published(weights))(pixels.float()).feature_maps, expected, 1e-5)


def test_without_layer_scale():
    weights, pixels = mmseg_weights(), pictures((64, 64))
    weights = {name: tensor for name, tensor in weights.items() if not re.search(r"blocks.*gamma", name)}
    with torch.no_grad():
        expected = expected_levels(Definition(weights), pixels)
        assert_same(converted(published(weights))(pixels.float()).feature_maps, expected, 1e-5)


def test_gradients_are_the_definitions():
    weights = {
        name: tensor if "running" in name else tensor.requires_grad_() for name, tensor in mmseg_weights().items()
    }
    pixels = pictures((64, 96), 1).requires_grad_()
    expected = Definition(weights)(pixels[0])
    cotangents = [torch.randn_like(level) for level in expected]
    sum((level * cotangent).sum() for level, cotangent in zip(expected, cotangents, strict=True)).backward()
    backbone = converted(published({name: tensor.detach() for name, tensor in weights.items()}))
    ours = pixels.detach().float().requires_grad_()
    levels = backbone(ours).feature_maps
    sum((m[0] * cotangent.float()).sum() for m, cotangent in zip(levels, cotangents, strict=True)).backward()
    assert relative_error(ours.grad, pixels.grad) <= 1e-4
    grads = {f"backbone.{name}": tensor.grad for name, tensor in weights.items() if "running" not in name}
    gradients = VIT_ADAPTER_LAYOUT.convert(grads, backbone.config)
    parameters = dict(backbone.named_parameters())
    assert set(gradients) == set(parameters)
    for name, gradient in gradients.items():
        assert relative_error(parameters[name].grad, gradient) <= 1e-3, name


@pytest.mark.parametrize("size", [(64, 96), (71, 49)])
def test_bf16_is_close_to_float32(size):
    backbone = converted(published(mmseg_weights()))
    pixels = pictures(size).float()
    with torch.no_grad():
        expected = backbone(pixels).feature_maps
        features = backbone.bfloat16()(pixels.bfloat16()).feature_maps
    for ours, reference in zip(features, expected, strict=True):
        assert ours.dtype == torch.bfloat16 and relative_error(ours, reference.double()) <= 2e-2


def swap(one, other):
    def mutate(weights):
        weights[one], weights[other] = weights[other], weights[one]

    return mutate


def zero(*names):
    def mutate(weights):
        for name in names:
            weights[name] = torch.zeros_like(weights[name])

    return mutate


def x_and_y_exchanged(weights):
    name = "interactions.1.injector.attn.sampling_offsets.bias"
    weights[name] = weights[name].unflatten(0, (-1, 2)).flip(1).flatten()


def transposed_positions(weights):
    grid = weights["pos_embed"][:, 1:].unflatten(1, (PRETRAINED, PRETRAINED)).transpose(1, 2).flatten(1, 2)
    weights["pos_embed"] = torch.cat([weights["pos_embed"][:, :1], grid], 1)


MUTATIONS = {
    "injector reads at y, x": x_and_y_exchanged,
    "extractors read nothing beside": zero("interactions.0.extractor.attn.sampling_offsets.bias"),
    "norms of an injector exchanged": swap(
        "interactions.2.injector.query_norm.weight", "interactions.2.injector.feat_norm.weight"
    ),
    "extra extractors exchanged": swap(
        "interactions.3.extra_extractors.0.attn.value_proj.weight",
        "interactions.3.extra_extractors.1.attn.value_proj.weight",
    ),
    "nothing is injected": zero("interactions.0.injector.gamma"),
    "no level embedding": zero("level_embed"),
    "no depthwise convolution": zero("interactions.1.extractor.ffn.dwconv.dwconv.weight"),
    "positions transposed": transposed_positions,
    "stem statistics": zero("spm.stem.4.running_mean"),
    "a block's scales exchanged": swap("blocks.5.gamma1", "blocks.5.gamma2"),
    "last norm's statistics": zero("norm4.running_mean"),
}
CONFIG_MUTATIONS = {
    "windows": {"window_size": 2},
    "the last map for every level": {"added_vit_features": "last"},
    "no map for any level": {"added_vit_features": "none"},
    "heads for points": {"deform_num_heads": 4, "deform_num_points": 2},
    "heads of the ViT": {"num_attention_heads": 4},
    "another epsilon": {"layer_norm_eps": 1e-2},
    "another activation": {"hidden_act": "relu"},
}


def noticed(backbone):
    """Whether a level is not that of the definition of the unchanged weights."""
    pixels = pictures((64, 96))
    with torch.no_grad():
        expected = expected_levels(Definition(mmseg_weights()), pixels)
        features = backbone(pixels.float()).feature_maps
    return max(relative_error(ours, level) for ours, level in zip(features, expected, strict=True)) > 1e-3


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_weight_is_noticed(mutation):
    weights = mmseg_weights()
    MUTATIONS[mutation](weights)
    assert noticed(converted(published(weights)))


@pytest.mark.parametrize("mutation", CONFIG_MUTATIONS)
def test_a_wrong_config_is_noticed(mutation):
    assert noticed(converted(published(mmseg_weights()), **CONFIG_MUTATIONS[mutation]))


def test_nothing_wrong_is_not_noticed():
    assert not noticed(converted(published(mmseg_weights())))


@pytest.mark.parametrize("prefix", ["backbone.", "module.backbone.", ""])
def test_everything_is_inferred(prefix):
    tensors = {prefix + name: tensor for name, tensor in mmseg_weights(torch.float32).items()}
    assert VIT_ADAPTER_LAYOUT.recognises(tensors)
    _, config = VIT_ADAPTER_LAYOUT.infer(tensors | {"decode_head.conv_seg.bias": torch.zeros(150)})
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (WIDTH, DEPTH, HEADS)
    assert (config.num_interactions, config.num_extra_extractors, config.conv_inner_size) == (INTERACTIONS, 2, PRIOR)
    assert (config.deform_num_heads, config.deform_num_points) == (DEFORM_HEADS, POINTS)
    assert (config.value_size, config.mlp_ratio, config.conv_ffn_ratio) == (VALUES, 4, FFN / WIDTH)
    assert config.pretrain_image_size == 16 * PRETRAINED and config.window_size == 0 and config.layer_scale
    assert config.added_vit_features == "each" and config.out_features == list(LEVELS)


def test_a_published_detector_has_windows_of_14():
    _, config = VIT_ADAPTER_LAYOUT.infer(published(mmseg_weights(torch.float32), "rpn_head.rpn_conv.weight"))
    assert config.window_size == 14 and config.added_vit_features == "last"


@pytest.mark.parametrize("tap", LEVELS)
def test_what_only_other_levels_need_does_not_exist(tap):
    whole = converted(published(mmseg_weights()))
    tapped = VitAdapterBackbone(
        VitAdapterConfig(**whole.config.to_dict() | {"out_features": [tap], "out_indices": None})
    )
    ours, all_of_them = tapped.state_dict(), whole.state_dict()
    left_out = {key.rsplit(".", 1)[0] for key in set(all_of_them) - set(ours)}
    only_stage1 = set() if tap == "stage1" else {"upsample", "spatial_prior.projections.stage1"}
    assert left_out == only_stage1 | {f"norms.{name}" for name in LEVELS if name != tap} and set(ours) <= set(
        all_of_them
    )
    tapped.eval().load_state_dict({key: all_of_them[key] for key in ours})
    pixels = pictures((64, 96)).float().requires_grad_()
    (features,) = tapped(pixels).feature_maps
    assert torch.allclose(features, whole(pixels).feature_maps[LEVELS.index(tap)], atol=1e-5)
    (features * torch.randn_like(features)).sum().backward()
    unused = [name for name, parameter in tapped.named_parameters() if parameter.grad is None]
    assert not unused


@pytest.mark.parametrize("tap", LEVELS)
def test_the_counted_grid_of_every_level(tap):
    backbone = converted(published(mmseg_weights()))
    config = VitAdapterConfig(**backbone.config.to_dict() | {"out_features": [tap], "out_indices": None})
    for size in ((64, 96), (71, 49), (33, 31)):
        with torch.no_grad():
            features = backbone(pictures(size, 1).float()).feature_maps[LEVELS.index(tap)]
        assert features.shape[2:] == grid_size(*size, encoder_downsampling(config))


def test_all_four_levels_inside_upernet():
    """A pyramid of strides 4 to 32 is what UperNet was made for."""
    backbone = converted(published(mmseg_weights()))
    torch.manual_seed(0)
    config = UperNetConfig(
        backbone_config=backbone.config, hidden_size=8, pool_scales=[1, 2], num_labels=3, auxiliary_in_channels=WIDTH
    )
    model = UperNetForSemanticSegmentation(config).train()
    model.backbone.load_state_dict(backbone.state_dict())
    labels = torch.randint(3, (2, 64, 96))
    output = model(pixel_values=pictures((64, 96)).float(), labels=labels)
    assert output.logits.shape == (2, 3, 64, 96)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.backbone.parameters())


def test_saved_and_loaded_by_the_auto_classes(tmp_path):
    backbone = converted(published(mmseg_weights()))
    backbone.save_pretrained(tmp_path)
    pixels = pictures((71, 49)).float()
    with torch.no_grad():
        expected = backbone(pixels).feature_maps
        again, info = VitAdapterBackbone.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        for ours, reference in zip(again.eval()(pixels).feature_maps, expected, strict=True):
            assert torch.equal(ours, reference)
        model = AutoModel.from_pretrained(tmp_path).eval()
        output = model(pixels, output_hidden_states=True)
        assert torch.equal(output.last_hidden_state, expected[-1].flatten(2).transpose(1, 2))
        assert len(output.hidden_states) == 5
    assert type(AutoBackbone.from_config(backbone.config)) is VitAdapterBackbone


def test_random_initialisation_fills_every_parameter():
    """What a file lacks is drawn anew: nothing is left as memory happened to be."""
    config = VitAdapterConfig(**converted(published(mmseg_weights())).config.to_dict())
    torch.manual_seed(0)
    backbone = VitAdapterBackbone(config)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.fill_(float("nan"))
        backbone.apply(backbone._init_weights)  # children first, as Transformers does
    assert all(parameter.isfinite().all() for parameter in backbone.parameters())
    offsets = backbone.interactions[0].extractor.attention.sampling_offsets.bias.unflatten(0, (DEFORM_HEADS, POINTS, 2))
    expected = torch.tensor([[[1.0, 0], [2, 0], [3, 0], [4, 0]], [[-1.0, 0], [-2, 0], [-3, 0], [-4, 0]]])
    assert torch.allclose(offsets, expected, atol=1e-6)


def test_gradient_checkpointing_changes_nothing():
    backbone = converted(published(mmseg_weights()))
    pixels, gradients = pictures((64, 64)).float(), []
    for checkpointing in (False, True):
        if checkpointing:
            backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        backbone.zero_grad()
        backbone.train()
        for module in backbone.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        backbone(pixels).feature_maps[-1].square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-5), name


@pytest.fixture
def segmenter_file(tmp_path):
    """A segmenter as mmseg saves it."""
    tensors = {key: t.float() if t.is_floating_point() else t for key, t in published(mmseg_weights()).items()}
    path = tmp_path / "upernet.pth.tar"
    torch.save({"meta": {"epoch": 1}, "state_dict": tensors}, path)
    return path


def test_from_a_published_file_to_a_folder(segmenter_file, tmp_path):
    """Read, converted, saved, and loaded whole and at every level."""
    conversion = convert_published(segmenter_file, tmp_path / "whole")
    assert conversion.layout == "vit_adapter" and conversion.discarded == ["decode_head.conv_seg.weight"]
    pixels = pictures((64, 96)).float()
    with torch.no_grad():
        expected = converted(published(mmseg_weights()))(pixels).feature_maps
        whole, info = VitAdapterBackbone.from_pretrained(tmp_path / "whole", output_loading_info=True)
        assert not any(info.values())
        for ours, reference in zip(whole.eval()(pixels).feature_maps, expected, strict=True):
            assert torch.equal(ours, reference)
        for tap, reference in zip(LEVELS, expected, strict=True):
            tapped = load_encoder(tmp_path / "whole", tap=tap)
            assert list(tapped.norms) == [tap] and torch.allclose(tapped(pixels).feature_maps[-1], reference, atol=1e-5)


def test_another_file_than_the_named_one_is_refused(segmenter_file, tmp_path):
    with pytest.raises(ValueError, match="another shape for|of another architecture|lacks"):
        convert_published(segmenter_file, tmp_path / "whole", "vit_adapter_small.deit_ade20k_upernet_512")
    tensors = torch.load(segmenter_file)["state_dict"]
    for change, words in (
        ({"backbone.cls_token": torch.zeros(1, 1, WIDTH)}, "has undeclared backbone.cls_token"),
        ({"backbone.blocks.1.mlp.fc2.bias": torch.zeros(5)}, r"fc2.bias \(5,\) instead of \(32,\)"),
    ):
        torch.save({"state_dict": tensors | change}, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=words):
            convert_published(tmp_path / "other.pth", tmp_path / "whole")
    torch.save({"state_dict": {k: t for k, t in tensors.items() if k != "backbone.norm2.bias"}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="lacks norms.stage2.bias"):
        convert_published(tmp_path / "other.pth", tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("pos_embed"), "holds no pos_embed"),
        (lambda w: w.update({"patch_embed.proj.weight": torch.zeros(WIDTH, 3, 14, 14)}), "patches of 14"),
        (lambda w: w.update(pos_embed=torch.zeros(1, 12, WIDTH)), "12 positions"),
        (lambda w: w.update({"interactions.0.extractor.attn.attention_weights.bias": torch.zeros(6)}), "6 points"),
    ],
)
def test_a_broken_file_is_told(change, words):
    weights = mmseg_weights(torch.float32)
    change(weights)
    with pytest.raises(ValueError, match=words):
        VIT_ADAPTER_LAYOUT.infer(published(weights))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads=5"),
        ({"deform_num_heads": 5}, "multiple of deform_num_heads=5"),
        ({"num_hidden_layers": 10}, "num_hidden_layers must be a multiple of num_interactions=4"),
        ({"num_interactions": 3}, "one interaction per level"),
        ({"deform_num_points": 0}, "deform_num_points must be at least 1"),
        ({"hidden_act": "gleu"}, "no activation 'gleu'"),
        ({"out_features": ["stage5"]}, "stage5"),
    ],
)
def test_a_config_that_does_not_fit_is_told(fields, words):
    with pytest.raises(ValueError, match=words):
        VitAdapterConfig(**fields)


def test_pictures_of_another_shape_are_told():
    with pytest.raises(ValueError, match=r"pixel_values must be \[batch, 3, height, width\], got \[2, 1, 32, 32\]"):
        converted(published(mmseg_weights()))(torch.zeros(2, 1, 32, 32))
