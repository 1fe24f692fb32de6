"""Batches of pictures of several sizes, and the image tokens that have to match them."""

import torch


def group_by_size(pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> dict[tuple[int, int], list[int]]:
    """Which images of a padded batch share a canvas size.

    Args:
        pixel_values: [n, channels, H, W]; smaller images are padded at the bottom and right.
        image_sizes: [n, 2] height and width of each canvas before padding, in pixels; None means all fill H x W.

    Returns:
        (height, width) -> indices of the images of that size, in order of first appearance.

    Raises:
        ValueError: A shape is wrong, or a canvas does not fit the batch.
    """
    if pixel_values.ndim != 4:
        raise ValueError(
            f"pixel_values has shape {list(pixel_values.shape)}: it must be [number of images, channels, height, "
            "width], with the images of all rows of the batch one after the other."
        )
    count, _, height, width = pixel_values.shape
    if image_sizes is None:
        return {(height, width): list(range(count))}
    sizes = torch.as_tensor(image_sizes)
    if sizes.shape != (count, 2):
        raise ValueError(
            f"image_sizes has shape {list(sizes.shape)} for {count} image(s) in pixel_values: it must be [{count}, 2], "
            "the height and width of each canvas before batch padding."
        )
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (h, w) in enumerate(sizes.tolist()):
        if not (0 < h <= height and 0 < w <= width):
            raise ValueError(
                f"image_sizes[{index}] is {h}x{w} but pixel_values is {height}x{width}: a canvas has at least one "
                "pixel and fits the batch."
            )
        groups.setdefault((h, w), []).append(index)
    return groups


def check_image_tokens(tokens_per_row: list[int], tokens_per_image: list[int]) -> None:
    """Every row of the batch must hold exactly the image tokens of its own images, in order.

    Args:
        tokens_per_row: Number of image tokens in each row of `input_ids`.
        tokens_per_image: Number of features of each image, in the order of the images.

    Raises:
        ValueError: With both counts, and what would be right.
    """
    found, given = sum(tokens_per_row), sum(tokens_per_image)
    what = f"{len(tokens_per_image)} image(s) give {given} features ({tokens_per_image} per image)"
    if found != given:
        raise ValueError(
            f"input_ids hold {found} image tokens ({tokens_per_row} per row) but the {what}: each image needs as many "
            "image tokens as it has features, num_image_tokens(height, width) of its canvas; was a prompt cut short, "
            "its <image> placeholder not expanded, or is the processor another model's (its image processor needs "
            "downsampling=model_downsampling(model.config))?"
        )
    ends, total = {0}, 0
    for count in tokens_per_image:
        total += count
        ends.add(total)
    total = 0
    for row, count in enumerate(tokens_per_row):
        total += count
        if total not in ends:
            raise ValueError(
                f"Row {row} of input_ids holds {count} image tokens ({tokens_per_row} per row), which is no whole "
                f"number of images: the {what}, and each row needs all the tokens of its own images."
            )


def check_tap_features(image_features: torch.Tensor | list[torch.Tensor], width: int) -> list[torch.Tensor]:
    """Cached tap features as a list with one [N_i, width] tensor for each image.

    Raises:
        ValueError: A tensor is of another shape.
    """
    features = list(image_features)
    for index, tokens in enumerate(features):
        if tokens.ndim != 2 or tokens.shape[-1] != width:
            raise ValueError(
                f"image_features[{index}] has shape {list(tokens.shape)}: cached tap features are [tokens, {width}] "
                "for each image, before tap norm and connector."
            )
    return features
