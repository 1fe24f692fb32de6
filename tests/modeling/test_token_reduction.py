"""Connectors that make fewer tokens: by their definition, on every shape of grid, and in step with the processor."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llava_style_toys import IMAGE, SIZE, batch, build, padded, pictures, vision_config

from ssm_vlm import LlavaStyleForConditionalGeneration, load_connector, model_downsampling, save_connector
from ssm_vlm.modeling.connectors import CONNECTORS, REDUCTIONS, Connector, connector_downsampling
from ssm_vlm.modeling.rank_balance import ExtraWork
from ssm_vlm.modeling.token_grid import grid_size, num_image_tokens
from ssm_vlm.modeling.token_positions import sincos_2d

STRIDE = 8  # of the toy encoders
GRIDS = [(4, 4), (2, 6), (6, 2), (5, 7), (3, 3), (1, 9), (1, 1)]
REDUCING = [name for name, (reduction, _) in CONNECTORS.items() if reduction is not None]
OPTIONS = {"average_pool": {"connector_grid": [2, 3]}, "pixel_shuffle": {"connector_factor": 2}}


def options(name: str) -> dict:
    return next((given for prefix, given in OPTIONS.items() if name.startswith(prefix)), {})


def average_pool_by_loops(tokens: torch.Tensor, grid: tuple[int, int], wanted: list[int]) -> torch.Tensor:
    """[h * w, C] -> [h' * w', C], each cell the mean of the cells that it touches."""
    (height, width), (rows, columns) = grid, map(min, grid, wanted)
    cells = []
    for i, j in itertools.product(range(rows), range(columns)):
        ys = [y for y in range(height) if y * rows < (i + 1) * height and (y + 1) * rows > i * height]
        xs = [x for x in range(width) if x * columns < (j + 1) * width and (x + 1) * columns > j * width]
        cells.append(sum(tokens[y * width + x] for y in ys for x in xs) / (len(ys) * len(xs)))
    return torch.stack(cells)


def pixel_shuffle_by_loops(tokens: torch.Tensor, grid: tuple[int, int], factor: int) -> torch.Tensor:
    """[h * w, C] -> [h' * w', C * f * f]; outside of the map there are zeros."""
    height, width = grid
    rows, columns = math.ceil(height / factor), math.ceil(width / factor)
    out = tokens.new_zeros(rows * columns, tokens.shape[1] * factor**2)
    for y, x, channel in itertools.product(range(height), range(width), range(tokens.shape[1])):
        place = (channel * factor + y % factor) * factor + x % factor
        out[(y // factor) * columns + x // factor, place] = tokens[y * width + x, channel]
    return out


CASES = [("average_pool_linear", average_pool_by_loops, {"connector_grid": grid}) for grid in ([2, 3], [1, 1], [9, 2])]
CASES += [("pixel_shuffle_linear", pixel_shuffle_by_loops, {"connector_factor": factor}) for factor in (1, 2, 3)]


def tokens_of(grids: list[tuple[int, int]], channels: int = 5, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(h * w, channels, generator=generator, dtype=dtype) for h, w in grids]


@pytest.mark.parametrize(("name", "by_loops", "given_options"), CASES)
def test_by_definition_in_float64_on_every_shape_of_grid(name, by_loops, given_options):
    """Values and gradients, all grids in one batch and some of them twice."""
    (value,) = given_options.values()
    connector = Connector(name, 5, 4, **given_options)
    grids = [*GRIDS, *GRIDS[:3]]
    ours, theirs = ([t.requires_grad_() for t in tokens_of(grids)] for _ in range(2))
    reduced = connector.reduce(ours, grids)
    expected = [by_loops(tokens, grid, value) for tokens, grid in zip(theirs, grids, strict=True)]
    for outputs in (reduced, expected):
        sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in outputs).backward()
    for index, (found, right) in enumerate(zip(reduced, expected, strict=True)):
        torch.testing.assert_close(found, right, atol=1e-12, rtol=0)
        torch.testing.assert_close(ours[index].grad, theirs[index].grad, atol=1e-12, rtol=0)


MUTATIONS = {
    "columns before rows": lambda tokens, grid: (tokens.unflatten(0, grid).transpose(0, 1).flatten(0, 1), grid[::-1]),
    "grid turned": lambda tokens, grid: (tokens, grid[::-1]),
    "last token lost": lambda tokens, grid: (torch.cat([tokens[:-1], torch.zeros_like(tokens[-1:])]), grid),
    "shifted by a token": lambda tokens, grid: (tokens.roll(1, 0), grid),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize(("name", "by_loops", "given_options"), CASES[:1] + CASES[-2:])
def test_the_comparison_notices(name, by_loops, given_options, mutation):
    """Mutation twin of the test above."""
    (value,) = given_options.values()
    connector = Connector(name, 5, 4, **given_options)
    (tokens,), grid = tokens_of([(5, 7)]), (5, 7)
    expected = by_loops(tokens, grid, value)
    wrong_tokens, wrong_grid = MUTATIONS[mutation](tokens, grid)
    (found,) = connector.reduce([wrong_tokens], [wrong_grid])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["average_pool_mlp2", "pixel_shuffle_mlp2"])
def test_bfloat16_is_close_to_float32(name):
    connector = Connector(name, 8, 6, **options(name))
    (tokens,) = tokens_of([(5, 7)], 8, torch.float32)
    exact = connector(connector.reduce([tokens], [(5, 7)])[0])
    rough = connector.to(torch.bfloat16)
    found = rough(rough.reduce([tokens.to(torch.bfloat16)], [(5, 7)])[0])
    assert (found.float() - exact).abs().max() <= 2e-2 * exact.abs().max()


sides = st.integers(1, 200)
values = {
    "average_pool": st.lists(st.integers(1, 20), min_size=2, max_size=2),
    "pixel_shuffle": st.integers(1, 6),
}


@settings(max_examples=60)
@given(st.data(), sides, sides, st.sampled_from(list(REDUCTIONS)))
def test_the_step_says_how_many_tokens_are_left(data, height, width, name):
    value = data.draw(values[name])
    reduction = REDUCTIONS[name]
    step = reduction.step(value)
    reduced = reduction.reduce(torch.zeros(1, 2, height, width), value)
    assert reduced.shape == (1, reduction.width(2, value), *grid_size(height, width, [step]))
    assert num_image_tokens(height, width, [step]) <= height * width


@settings(max_examples=60)
@given(sides, sides, st.integers(1, 4), st.integers(1, 4))
def test_two_pixel_shuffles_count_as_one_of_their_product(height, width, first, second):
    one = grid_size(height, width, [[first * second, "ceil"]])
    assert grid_size(height, width, [[first, "ceil"], [second, "ceil"]]) == one


@settings(max_examples=60)
@given(sides, sides, st.integers(1, 200), st.integers(1, 200))
def test_a_grid_bounds_each_side_and_no_side_grows(height, width, rows, columns):
    found = grid_size(height, width, [[[rows, columns], "at_most"]])
    assert found == (min(height, rows), min(width, columns))


SIZES = {
    "square": [(4 * STRIDE, 4 * STRIDE)],
    "oblong": [(2 * STRIDE, 5 * STRIDE)],
    "odd": [(3 * STRIDE, 7 * STRIDE)],
    "mixed": [(SIZE, SIZE), (5 * STRIDE, 3 * STRIDE), (SIZE, 7 * STRIDE), (SIZE, SIZE), (STRIDE, STRIDE)],
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", CONNECTORS)
def test_the_model_gives_as_many_features_as_its_steps_say(name, sizes):
    """Each picture of a batch as alone, and cached features as pixels."""
    model = build(connector=name, tap_norm="layernorm", token_positions="sincos2d", **options(name))
    images = pictures(*SIZES[sizes])
    inputs = padded(images)
    with torch.no_grad():
        together = model.get_image_features(**inputs).pooler_output
        alone = [model.get_image_features(image[None]).pooler_output[0] for image in images]
        cache = model.get_tap_features(**inputs)
        cached = model.get_image_features(image_features=cache, image_sizes=inputs["image_sizes"]).pooler_output
    steps = model_downsampling(model.config)
    assert [len(t) for t in together] == [num_image_tokens(h, w, steps) for h, w in SIZES[sizes]]
    for one, other, third in zip(together, alone, cached, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one, third)


@pytest.mark.parametrize("name", REDUCING)
def test_codes_and_tap_norm_come_before_the_reduction(name):
    model = build(connector=name, tap_norm="layernorm", token_positions="sincos2d", **options(name))
    image = pictures((3 * STRIDE, 5 * STRIDE))[0][None]
    by_loops = average_pool_by_loops if name.startswith("average") else pixel_shuffle_by_loops
    with torch.no_grad():
        tap = model.get_tap_features(image)[0]
        tokens = torch.nn.functional.layer_norm(tap, tap.shape[-1:]) + sincos_2d(3, 5, tap.shape[-1])
        expected = model.connector(by_loops(tokens, (3, 5), *options(name).values()))
        torch.testing.assert_close(model.get_image_features(image).pooler_output[0], expected, atol=1e-5, rtol=1e-4)


def image_rows(model, sizes) -> list[list[int]]:
    """One row of text for each picture, its image tokens as the model's own steps count them."""
    steps = model_downsampling(model.config)
    return [[1, *[IMAGE] * num_image_tokens(h, w, steps), 5 + n, 6] for n, (h, w) in enumerate(sizes)]


@pytest.mark.parametrize("vision", [None, "ssm_vision stage4"])
@pytest.mark.parametrize("name", CONNECTORS)
def test_learns_and_answers(name, vision):
    """A training step of an encoder that is not frozen, then generation, with pictures of several sizes and without."""
    sizes = [(2 * SIZE, 2 * SIZE), (3 * SIZE, 5 * SIZE), (SIZE, 3 * SIZE)]
    if vision is None:
        model = build(connector=name, freeze_vision=False, **options(name))
    else:
        tower = vision_config(
            "ssm_vision", hidden_sizes=[4, 4, 8, 8], depths=[1] * 4, out_features=["stage4"], drop_path_rate=0.0
        )
        model = build(tower, connector=name, freeze_vision=False, **options(name))
    inputs = padded(pictures(*sizes))
    model.train()
    model(**inputs, **batch(*image_rows(model, sizes))).loss.backward()
    for part in (model.connector, model.vision_tower):
        gradients = [p.grad for p in part.parameters()]
        assert all(g is not None and g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
    model.zero_grad()
    model(**batch([1, 4, 5, 6])).loss.backward()  # text only
    assert all(p.grad is None or not p.grad.any() for p in model.connector.parameters())
    prompts = batch(*image_rows(model.eval(), sizes), side="left")
    prompts.pop("labels")
    tokens = model.generate(**inputs, **prompts, max_new_tokens=3, do_sample=False)
    assert tokens.shape == (3, prompts["input_ids"].shape[1] + 3)
    with torch.no_grad():
        cache = model.get_tap_features(**inputs)
    again = model.generate(
        image_features=cache, image_sizes=inputs["image_sizes"], **prompts, max_new_tokens=3, do_sample=False
    )
    assert torch.equal(tokens, again)


@pytest.mark.parametrize(
    ("height", "width", "grid"), [(224, 224, (7, 7)), (224, 250, (7, 8)), (512, 512, (16, 16)), (800, 1333, (25, 42))]
)
def test_vmamba_at_stage_4(height, width, grid):
    """The stem and downsamplings of VMamba v2, with few channels; the large pictures are counted but not run."""
    tower = vision_config(
        "ssm_vision", hidden_sizes=[2, 2, 2, 4], depths=[1] * 4, stem="conv3x2", out_features=["stage4"]
    )
    model = build(tower, connector="linear")
    steps = model_downsampling(model.config)
    assert steps == [[2, "ceil"]] * 5 and grid_size(height, width, steps) == grid
    if height < 500:
        with torch.no_grad():
            (features,) = model.get_image_features(torch.zeros(1, 3, height, width)).pooler_output
        assert len(features) == math.prod(grid)


@pytest.mark.parametrize("name", REDUCING)
def test_saved_and_loaded(name, tmp_path):
    model = build(connector=name, **options(name))
    model.save_pretrained(tmp_path / "whole")
    loaded = LlavaStyleForConditionalGeneration.from_pretrained(tmp_path / "whole")
    image = pictures((3 * STRIDE, 5 * STRIDE))[0][None]
    with torch.no_grad():
        expected = model.get_image_features(image).pooler_output[0]
        assert torch.equal(loaded.get_image_features(image).pooler_output[0], expected)
        save_connector(model, tmp_path / "alone")
        other = build(connector=name, seed=1, **options(name))
        other.vision_tower.load_state_dict(model.vision_tower.state_dict())
        assert not torch.equal(other.get_image_features(image).pooler_output[0], expected)
        load_connector(other, tmp_path / "alone")
        assert torch.equal(other.get_image_features(image).pooler_output[0], expected)


def test_a_saved_connector_that_reduces_otherwise_is_refused(tmp_path):
    save_connector(build(connector="average_pool_mlp2", connector_grid=[2, 3]), tmp_path)
    with pytest.raises(ValueError, match=r"connector_grid is \[2, 3\], not \[14, 14\]"):
        load_connector(build(connector="average_pool_mlp2"), tmp_path)
    with pytest.raises(ValueError, match="connector is 'average_pool_mlp2', not 'pixel_shuffle_mlp2'"):
        load_connector(build(connector="pixel_shuffle_mlp2"), tmp_path)


def test_defaults():
    assert connector_downsampling("mlp2") == []
    assert connector_downsampling("average_pool_mlp2") == [[[14, 14], "at_most"]]
    assert connector_downsampling("pixel_shuffle_linear", connector_factor=None) == [[2, "ceil"]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"connector": "mlp2", "connector_factor": 2},
            "connector_factor=2 is not read by connector='mlp2', only by pix",
        ),
        (
            {"connector": "pixel_shuffle_mlp2", "connector_grid": [2, 2]},
            r"connector_grid=\[2, 2\] is not read by connector='pixel_shuffle_mlp2', only by average_pool_linear, aver",
        ),
        ({"connector": "average_pool_mlp2", "connector_grid": [2]}, r"connector_grid=\[2\] .*give \[rows, columns\]"),
        ({"connector": "average_pool_mlp2", "connector_grid": [0, 2]}, "both at least 1"),
        ({"connector": "pixel_shuffle_mlp2", "connector_factor": 0}, "give a whole number of at least 1"),
    ],
)
def test_options_that_do_not_fit_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        build(**fields)


@pytest.mark.parametrize("name", ["average_pool_mlp2", "pixel_shuffle_mlp2"])
def test_cached_features_need_the_sizes_of_their_canvases(name):
    model = build(connector=name)
    inputs = padded(pictures((SIZE, SIZE), (SIZE, 2 * SIZE)))
    cached = model.get_tap_features(**inputs)
    with pytest.raises(ValueError, match=f"need image_sizes too, since connector='{name}' depends on the grid"):
        model.get_image_features(image_features=cached)
    with pytest.raises(ValueError, match="Image 0 has 4 features at the tap, but its size .* a grid of 2x4"):
        model.get_image_features(image_features=cached, image_sizes=inputs["image_sizes"].flip(0))
    with pytest.raises(ValueError, match=r"image_sizes has 1 rows for 2 image\(s\)"):
        model.get_image_features(image_features=cached, image_sizes=inputs["image_sizes"][:1])
    with pytest.raises(ValueError, match=f"connector='{name}' needs the grid of each image"):
        model.project(cached)


def test_a_processor_of_another_model_is_told():
    model = build(connector="pixel_shuffle_mlp2")
    plain = build(connector="mlp2")
    with pytest.raises(ValueError, match=r"needs downsampling=model_downsampling\(model.config\)"):
        model(**padded(pictures((SIZE, SIZE))), **batch(*image_rows(plain, [(SIZE, SIZE)])))


@pytest.mark.parametrize("extra", [ExtraWork(0, True), ExtraWork(1, True), ExtraWork(2, False)])
@pytest.mark.parametrize("name", CONNECTORS)
def test_dummy_pictures_for_other_ranks_count_nothing(name, extra, monkeypatch):
    """What a rank runs only to keep in step changes neither loss nor gradients, with its own pictures and without."""
    model = build(connector=name, freeze_vision=False, token_positions="sincos2d", **options(name)).train()
    for stage in model.vision_tower.modules():  # DropPath would draw other numbers
        if hasattr(stage, "drop_prob"):
            stage.drop_prob = 0.0
    sizes = [(SIZE, SIZE), (3 * SIZE, 5 * SIZE)]
    with_images = {**padded(pictures(*sizes)), **batch(*image_rows(model, sizes))}
    for inputs in (with_images, batch([1, 4, 5, 6])):
        have_images = "pixel_values" in inputs
        seen = []
        for work in (ExtraWork(0, False), ExtraWork(extra.tower_calls, extra.project and not have_images)):
            monkeypatch.setattr("ssm_vlm.modeling.modeling_llava_style.extra_work", lambda *_, work=work, **__: work)
            model.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            seen.append((loss.detach(), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}))
        (loss, gradients), (other_loss, other_gradients) = seen
        torch.testing.assert_close(loss, other_loss)
        for key, gradient in other_gradients.items():
            torch.testing.assert_close(gradient, gradients.get(key, torch.zeros_like(gradient)))
        if extra.tower_calls or not have_images:
            assert any(key.startswith("connector") for key in other_gradients)
