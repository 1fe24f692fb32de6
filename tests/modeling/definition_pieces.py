"""Pieces that definitions of vision transformers in float64 share, each written from its formula."""

import math

import torch


def layer_norm(x, weight, bias, dim=-1, eps=1e-6):
    """Zero mean and unit variance along `dim`, then scale and shift."""
    centred = x - x.mean(dim, keepdim=True)
    return centred / (centred.square().mean(dim, keepdim=True) + eps).sqrt() * weight + bias


def gelu(x):
    """x times the normal distribution's probability of being below x."""
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def resize_matrix(size, new_size, kernel, clamp_start):
    """[new_size, size]: what each old cell adds to each new one; cell centres are at halves, borders repeat."""
    matrix = torch.zeros(new_size, size, dtype=torch.float64)
    for row in range(new_size):
        source = (row + 0.5) * size / new_size - 0.5
        source = max(source, 0.0) if clamp_start else source
        first = math.floor(source) - 1
        for cell in range(first, first + 4):
            matrix[row, min(max(cell, 0), size - 1)] += kernel(abs(source - cell))
    return matrix


def linear(distance):
    """Linear interpolation's kernel; its sources do not begin before the first cell (`clamp_start`)."""
    return max(1 - distance, 0.0)


def cubic(distance, a=-0.75):
    """Bicubic interpolation's kernel (Keys 1981)."""
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a if distance < 2 else 0.0


def resized(feature_map, rows, columns, kernel, clamp_start):
    """[H, W, C] -> [rows, columns, C]"""
    down, across = (
        resize_matrix(old, new, kernel, clamp_start)
        for old, new in ((feature_map.shape[0], rows), (feature_map.shape[1], columns))
    )
    return torch.einsum("rh,cw,hwd->rcd", down, across, feature_map)


def relative_error(ours, reference):
    """Largest difference over the reference's largest value."""
    return ((ours.double() - reference).abs().max() / reference.abs().max()).item()
