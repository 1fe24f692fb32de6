"""Triton kernels of the four-direction selective scan; `triton.py` launches them and says how the work is cut.

A *tile* is TILE consecutive positions of an order times CHANNELS channels, in registers: the channels lie across the
lanes (channels-last memory is read in full lines) and the positions within a thread, so that a scan over a tile is a
chain of multiply-adds without any exchange between threads. Rows and reversed rows (columns and reversed columns) visit
the same tiles in opposite order; such a *pair* shares a program. A *chunk* is a run of tiles.

Names of arrays: b, c, low_rank, x, grad are maps, [positions of all images, ...] with one stride per position (and one
per direction); `maps_row` is the position's index in them. Weights are [K, ...] and contiguous. Decays are powers of 2.
Nothing here assumes more than 16 bits of a column index, 32 bits of a position in an image, and 64 of an address.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:  # in a `try`, so that a saved model's remote code does not name Triton as a requirement
    raise ImportError("These kernels need Triton (pip install triton).") from error

UNKNOWN = [
    "batch", "length", "height", "width", "chunks", "tiles_of_map", "programs",
    "channels", "x_stride", "low_rank_stride", "low_rank_stride_k", "b_stride", "b_stride_k", "c_stride", "c_stride_k",
]  # fmt: skip
"""Numbers that the compiler may know nothing about. Maps of any size so share one binary per rank and dtype; and from a
stride that it knew to be a multiple of 8 it would make each thread load 8 channels at once, spread a tile's positions
over the other threads, and scan by shuffles (counted: 532 of them in place of none)."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile_positions(
    first, length, height, width, FLIP: tl.constexpr, COLUMNS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Index in the map of the TILE positions from `first` on in an order, with FLIP the last first; which exist.

    One integer division per tile, none per position: with TALL (height >= TILE) a tile meets at most one column's end,
    otherwise rows stay below 2 TILE, where a float quotient is exact. WIDE: offsets in an image need 64 bits.
    """
    steps = tl.arange(0, TILE)
    if FLIP:
        steps = TILE - 1 - steps
    exists = first + steps < length
    if COLUMNS:
        column = first // height
        row = first - column * height + steps
        if TALL:
            wraps = (row >= height).to(tl.int32)
        else:
            wraps = ((row.to(tl.float32) + 0.5) / height.to(tl.float32)).to(tl.int32)
        positions = (row - wraps * height) * width + column + wraps
    else:
        positions = first + steps
    if WIDE:
        positions = positions.to(tl.int64)
    return positions, exists


@triton.jit
def _softplus(z):
    """log(1 + e^z) and its derivative. As max(z, 0) + log1p(e^-|z|): finite everywhere, small steps keep all digits.

    log1p is e times a polynomial (Chebyshev interpolation of log1p(e) / e on [0, 1], relative error 3e-8) and not a
    logarithm, which costs as much and would lose the digits of small e in 1 + e. Above 20, where torch's softplus
    becomes the identity, both are the identity to float32.
    """
    e = tl.exp2(-tl.abs(z) * LOG2_E)
    p = 0.0051261018961668015 * e - 0.029074065387248993
    p = p * e + 0.0775160863995552
    p = p * e - 0.13602247834205627
    p = p * e + 0.19076880812644958
    p = p * e - 0.2483539879322052
    p = p * e + 0.3331812024116516
    p = p * e - 0.4999944567680359
    p = p * e + 0.9999999403953552
    return tl.maximum(z, 0.0) + p * e, e


@triton.jit
def _step_sizes(
    low_rank_ptr, weight_ptr, bias_ptr, rows, exists, stride, k, cols, inside, channels, rank,
    TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Step sizes of a tile, 0 at positions that do not exist (so that they neither decay nor add), and their derivative
    by what softplus takes, each [TILE, CHANNELS].

    A loop over ranks and no product of tiles: the layout of a product, with positions over the lanes, would become the
    layout of all that follows, the scan too.
    """
    z = tl.zeros([TILE, CHANNELS], tl.float32)
    z += tl.load(bias_ptr + k * channels + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    for r in range(rank):
        weight = tl.load(weight_ptr + (k * channels + cols) * rank + r, mask=inside, other=0.0).to(tl.float32)
        low_rank = tl.load(low_rank_ptr + rows * stride + r, mask=exists, other=0.0).to(tl.float32)
        z += low_rank[:, None] * weight[None, :]
    delta, e = _softplus(z)
    return tl.where(exists[:, None], delta, 0.0), tl.where(z >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _then(decay, state, next_decay, next_state):
    """h -> decay h + state, followed by the next such map."""
    return decay * next_decay, next_decay * state + next_state


@triton.jit
def _then_decayed(decay, decayed, added, next_decay, next_decayed, next_added):
    """Of a run of positions: product of decays; what is left of the state before the last; what the last adds to it.

    Scanned instead of the state itself because h_t - added_t would lose all digits where states decay fast.
    """
    return decay * next_decay, next_decayed + next_decay * (decayed + added), next_added


@triton.jit
def _then_adjoint(decay, adjoint, through, next_decay, next_adjoint, next_through):
    """The same for g_t = direct_t + decay_{t+1} g_{t+1}, whose decays belong to the position visited before: decay at
    the run's last position, g there, product of the decays of all others."""
    return next_decay, next_adjoint + next_through * (decay * adjoint), next_through * (decay * through)


@triton.jit
def _last_row(values, TILE: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, TILE) == TILE - 1)[:, None], values, 0.0), axis=0)


@triton.jit
def _program(channels, chunks, CHANNELS: tl.constexpr):
    """Channels that this program owns and which of them exist; its chunk; its image. Neighbours differ in channels, so
    that they share the projections in the cache."""
    blocks = tl.cdiv(channels, CHANNELS)
    pid = tl.program_id(0)
    cols = pid % blocks * CHANNELS + tl.arange(0, CHANNELS)
    pid = pid // blocks
    return cols, cols < channels, pid % chunks, (pid // chunks).to(tl.int64)


@triton.jit
def _rate(a_log_ptr, k, n, cols, inside, channels, states):
    """-exp(a_log) of direction k and state n, [CHANNELS]."""
    a_log = tl.load(a_log_ptr + (k * channels + cols) * states + n, mask=inside, other=0.0).to(tl.float32)
    return -tl.exp2(a_log * LOG2_E)


@triton.jit(do_not_specialize=UNKNOWN)
def summarise_chunks(
    x_ptr, low_rank_ptr, b_ptr, c_ptr, weight_ptr, bias_ptr, a_log_ptr, grad_ptr, totals_ptr, locals_ptr,
    batch, length, height, width, channels, rank, states,
    x_stride, low_rank_stride, low_rank_stride_k, b_stride, b_stride_k, c_stride, c_stride_k,
    tiles, chunks,
    PAIR: tl.constexpr, DIRECTIONS: tl.constexpr, ADJOINT: tl.constexpr, STATES: tl.constexpr,
    TILE: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What each chunk does to a state that passes through it, for each direction of a pair.

    totals [K, B, chunks, E]: sum of the step sizes (a state decays by exp(rate total)). locals [kinds, K, B, chunks, N,
    E]: state at the chunk's end if it enters with none; with ADJOINT also, as kind 1, decayed gradient of the state
    before the chunk if none comes from behind it (one tile per chunk then). Positions are read against the direction:
    what a position adds decays by all that comes after it, and the adjoint travels that way.
    """
    x_stride = x_stride // VECTOR * VECTOR  # which the compiler may know
    channels = channels // VECTOR * VECTOR
    cols, inside, chunk, image = _program(channels, chunks, CHANNELS)
    state_rows = tl.arange(0, STATES)
    before = image * length  # positions of the images before
    x_ptr += before * x_stride
    low_rank_ptr += before * low_rank_stride
    b_ptr += before * b_stride
    c_ptr += before * c_stride
    grad_ptr += before * channels
    for side in tl.static_range(2 if DIRECTIONS > PAIR + 2 else 1):
        k = PAIR + 2 * side
        cell = (k * batch + image) * chunks + chunk
        all_cells = (DIRECTIONS * batch).to(tl.int64) * chunks
        chunk_total = tl.zeros([CHANNELS], tl.float32)
        ends = tl.zeros([STATES, CHANNELS], tl.float32)
        for step in range(tiles):
            first = (chunk * tiles + (tiles - 1 - step if side == 1 else step)) * TILE
            rows, exists = _tile_positions(first, length, height, width, side == 0, PAIR == 1, TALL, WIDE, TILE)
            there = exists[:, None] & inside[None, :]
            delta, _ = _step_sizes(
                low_rank_ptr + k * low_rank_stride_k, weight_ptr, bias_ptr, rows, exists, low_rank_stride,
                k, cols, inside, channels, rank, TILE, CHANNELS,
            )  # fmt: skip
            x = tl.load(x_ptr + (rows * x_stride)[:, None] + cols[None, :], mask=there, other=0.0).to(tl.float32)
            added = delta * x
            after = tl.cumsum(delta, axis=0) - delta  # until the tile's end, which comes first here
            total = tl.sum(delta, axis=0)
            if ADJOINT:
                grad = tl.load(grad_ptr + (rows * channels)[:, None] + cols[None, :], mask=there, other=0.0)
                grad = grad.to(tl.float32)
            for n in range(states):
                rate_log2 = _rate(a_log_ptr, k, n, cols, inside, channels, states) * LOG2_E
                b = tl.load(b_ptr + rows * b_stride + k * b_stride_k + n, mask=exists, other=0.0).to(tl.float32)
                end = tl.sum(added * b[:, None] * tl.exp2(after * rate_log2[None, :]), axis=0)
                this = (state_rows == n)[:, None]
                ends = tl.where(this, ends * tl.exp2(total * rate_log2)[None, :] + end[None, :], ends)
                if ADJOINT:
                    c = tl.load(c_ptr + rows * c_stride + k * c_stride_k + n, mask=exists, other=0.0).to(tl.float32)
                    decay = tl.exp2(delta * rate_log2[None, :])
                    _, start = tl.associative_scan((decay, decay * grad * c[:, None]), 0, _then)
                    start = _last_row(start, TILE)
                    tl.store(locals_ptr + ((all_cells + cell) * states + n) * channels + cols, start, mask=inside)
            chunk_total += total
        tl.store(totals_ptr + cell * channels + cols, chunk_total, mask=inside)
        tl.store(
            locals_ptr + (cell * states + state_rows)[:, None] * channels + cols[None, :],
            ends,
            mask=(state_rows < states)[:, None] & inside[None, :],
        )


@triton.jit(do_not_specialize=UNKNOWN)
def carry_states(
    totals_ptr, locals_ptr, a_log_ptr, entering_ptr, batch, channels, states, chunks,
    DIRECTIONS: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Scan over chunk summaries: entering [kinds, K, B, chunks, N, E], the state that enters each chunk (kind 0), and
    the decayed gradient of a state that comes from behind it (kind 1), which travels against the direction."""
    cols, inside, n, line = _program(channels, states, CHANNELS)  # line: (kind, k, image)
    kind = line // (DIRECTIONS * batch)
    cell = line - kind * (DIRECTIONS * batch)  # (k, image)
    k = (cell // batch).to(tl.int32)
    backwards = ((k >= 2).to(tl.int32) + kind.to(tl.int32)) % 2  # 1: from the last chunk to the first
    rate_log2 = _rate(a_log_ptr, k, n, cols, inside, channels, states) * LOG2_E
    carried = tl.zeros([CHANNELS], tl.float32)
    origin = backwards * (chunks - 1)
    direction = 1 - 2 * backwards
    tl.store(entering_ptr + ((line * chunks + origin) * states + n) * channels + cols, carried, mask=inside)
    steps = tl.arange(0, TILE)
    for first in range(0, chunks - 1, TILE):
        order = first + steps
        chunk = origin + direction * order
        there = (order < chunks - 1)[:, None] & inside[None, :]
        totals = tl.load(
            totals_ptr + (cell * chunks + chunk)[:, None] * channels + cols[None, :], mask=there, other=0.0
        )
        added = tl.load(
            locals_ptr + ((line * chunks + chunk) * states + n)[:, None] * channels + cols[None, :],
            mask=there,
            other=0.0,
        )
        through, state = tl.associative_scan((tl.exp2(totals * rate_log2[None, :]), added), 0, _then)
        state += through * carried[None, :]
        tl.store(
            entering_ptr + ((line * chunks + chunk + direction) * states + n)[:, None] * channels + cols[None, :],
            state,
            mask=there,
        )
        carried = _last_row(state, TILE)


@triton.jit(do_not_specialize=UNKNOWN)
def apply_forward(
    x_ptr, low_rank_ptr, b_ptr, c_ptr, weight_ptr, bias_ptr, a_log_ptr, d_ptr, entering_ptr, sum_ptr, out_ptr,
    batch, length, height, width, channels, rank, states,
    x_stride, low_rank_stride, low_rank_stride_k, b_stride, b_stride_k, c_stride, c_stride_k,
    tiles, chunks,
    PAIR: tl.constexpr, DIRECTIONS: tl.constexpr, CHUNKED: tl.constexpr, STATES: tl.constexpr,
    TILE: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Results of a pair of directions, added to those of the directions before in `sum` (float32) and, by the last
    direction of all, written to `out`. CHUNKED: states come from `entering`; else the one chunk begins with none."""
    SIDES: tl.constexpr = 2 if DIRECTIONS > PAIR + 2 else 1
    FINAL: tl.constexpr = PAIR == 1 or DIRECTIONS == 1
    x_stride = x_stride // VECTOR * VECTOR  # which the compiler may know
    channels = channels // VECTOR * VECTOR
    cols, inside, chunk, image = _program(channels, chunks, CHANNELS)
    state_rows = tl.arange(0, STATES)
    before = image * length  # positions of the images before
    x_ptr += before * x_stride
    low_rank_ptr += before * low_rank_stride
    b_ptr += before * b_stride
    c_ptr += before * c_stride
    sum_ptr += before * channels
    out_ptr += before * channels
    for side in tl.static_range(SIDES):
        k = PAIR + 2 * side
        skip = tl.load(d_ptr + k * channels + cols, mask=inside, other=0.0).to(tl.float32)
        held = tl.zeros([STATES, CHANNELS], tl.float32)
        if CHUNKED:
            cell = (k * batch + image) * chunks + chunk
            held = tl.load(
                entering_ptr + (cell * states + state_rows)[:, None] * channels + cols[None, :],
                mask=(state_rows < states)[:, None] & inside[None, :],
                other=0.0,
            )
        for step in range(tiles):
            first = (chunk * tiles + (tiles - 1 - step if side == 1 else step)) * TILE
            rows, exists = _tile_positions(first, length, height, width, side == 1, PAIR == 1, TALL, WIDE, TILE)
            there = exists[:, None] & inside[None, :]
            targets = (rows * channels)[:, None] + cols[None, :]
            delta, _ = _step_sizes(
                low_rank_ptr + k * low_rank_stride_k, weight_ptr, bias_ptr, rows, exists, low_rank_stride,
                k, cols, inside, channels, rank, TILE, CHANNELS,
            )  # fmt: skip
            x = tl.load(x_ptr + (rows * x_stride)[:, None] + cols[None, :], mask=there, other=0.0).to(tl.float32)
            if side == 0 and PAIR == 0:
                y = tl.zeros([TILE, CHANNELS], tl.float32)
            else:
                y = tl.load(sum_ptr + targets, mask=there, other=0.0)
            y += x * skip[None, :]
            added = delta * x
            for n in range(states):
                rate_log2 = _rate(a_log_ptr, k, n, cols, inside, channels, states) * LOG2_E
                b = tl.load(b_ptr + rows * b_stride + k * b_stride_k + n, mask=exists, other=0.0).to(tl.float32)
                c = tl.load(c_ptr + rows * c_stride + k * c_stride_k + n, mask=exists, other=0.0).to(tl.float32)
                decay = tl.exp2(delta * rate_log2[None, :])
                through, state = tl.associative_scan((decay, added * b[:, None]), 0, _then)
                this = (state_rows == n)[:, None]
                state += through * tl.sum(tl.where(this, held, 0.0), axis=0)[None, :]
                y += state * c[:, None]
                held = tl.where(this, _last_row(state, TILE)[None, :], held)
            if FINAL and side == SIDES - 1:
                tl.store(out_ptr + targets, y.to(out_ptr.dtype.element_ty), mask=there)
            else:
                tl.store(sum_ptr + targets, y, mask=there)
        if side < SIDES - 1:
            tl.debug_barrier()  # the next direction reads what other threads may have written


@triton.jit(do_not_specialize=UNKNOWN)
def apply_backward(
    x_ptr, low_rank_ptr, b_ptr, c_ptr, weight_ptr, bias_ptr, a_log_ptr, d_ptr, grad_ptr, entering_ptr,
    sum_ptr, grad_x_ptr, grad_maps_ptr, grad_parameters_ptr,
    batch, length, height, width, channels, rank, states,
    x_stride, low_rank_stride, low_rank_stride_k, b_stride, b_stride_k, c_stride, c_stride_k,
    tiles, tiles_of_map, programs,
    PAIR: tl.constexpr, DIRECTIONS: tl.constexpr, CHUNKED: tl.constexpr, STATES: tl.constexpr,
    RANK: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr,
    VECTOR: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a pair of directions from the states and adjoint states that enter each *tile*.

    grad_x is summed over the directions as `apply_forward` sums results. grad_maps [blocks, B, L, K, R + 2 N] holds
    this block of channels' share of the gradients of low_rank, b and c; grad_parameters [programs, K, R + N + 2, E]
    this program's share of those of weight, bias, rates and (k = 0 only) d. No two programs write to one place.
    """
    SIDES: tl.constexpr = 2 if DIRECTIONS > PAIR + 2 else 1
    FINAL: tl.constexpr = PAIR == 1 or DIRECTIONS == 1
    x_stride = x_stride // VECTOR * VECTOR  # which the compiler may know
    channels = channels // VECTOR * VECTOR
    cols, inside, program, image = _program(channels, programs, CHANNELS)
    block = tl.program_id(0) % tl.cdiv(channels, CHANNELS)
    state_rows = tl.arange(0, STATES)
    ranks = tl.arange(0, RANK)
    fields = rank + 2 * states
    before = image * length  # positions of the images before
    x_ptr += before * x_stride
    low_rank_ptr += before * low_rank_stride
    b_ptr += before * b_stride
    c_ptr += before * c_stride
    grad_ptr += before * channels
    sum_ptr += before * channels
    grad_x_ptr += before * channels
    grad_maps_ptr += (block.to(tl.int64) * batch * length + before) * DIRECTIONS * fields
    for side in tl.static_range(SIDES):
        k = PAIR + 2 * side
        skip = tl.load(d_ptr + k * channels + cols, mask=inside, other=0.0).to(tl.float32)
        grad_weight = tl.zeros([RANK, CHANNELS], tl.float32)
        grad_bias = tl.zeros([CHANNELS], tl.float32)
        grad_rates = tl.zeros([STATES, CHANNELS], tl.float32)
        grad_skip = tl.zeros([CHANNELS], tl.float32)
        for step in range(tiles):
            tile = program * tiles + step
            rows, exists = _tile_positions(tile * TILE, length, height, width, side == 1, PAIR == 1, TALL, WIDE, TILE)
            there = exists[:, None] & inside[None, :]
            targets = (rows * channels)[:, None] + cols[None, :]
            delta, slope = _step_sizes(
                low_rank_ptr + k * low_rank_stride_k, weight_ptr, bias_ptr, rows, exists, low_rank_stride,
                k, cols, inside, channels, rank, TILE, CHANNELS,
            )  # fmt: skip
            x = tl.load(x_ptr + (rows * x_stride)[:, None] + cols[None, :], mask=there, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + targets, mask=there, other=0.0).to(tl.float32)
            added = delta * x
            grad_added = tl.zeros([TILE, CHANNELS], tl.float32)  # with respect to delta x
            grad_delta = tl.zeros([TILE, CHANNELS], tl.float32)
            field = (rows * DIRECTIONS + k) * fields
            cell = (k * batch + image) * tiles_of_map + tile
            all_cells = (DIRECTIONS * batch).to(tl.int64) * tiles_of_map
            for n in range(states):
                rate = _rate(a_log_ptr, k, n, cols, inside, channels, states)
                b = tl.load(b_ptr + rows * b_stride + k * b_stride_k + n, mask=exists, other=0.0).to(tl.float32)
                c = tl.load(c_ptr + rows * c_stride + k * c_stride_k + n, mask=exists, other=0.0).to(tl.float32)
                decay = tl.exp2(delta * (rate * LOG2_E)[None, :])
                nothing = tl.zeros([TILE, CHANNELS], tl.float32)
                put_in = added * b[:, None]
                through, decayed, _ = tl.associative_scan((decay, nothing, put_in), 0, _then_decayed)
                _, adjoint, behind = tl.associative_scan(
                    (decay, grad * c[:, None], nothing + 1.0), 0, _then_adjoint, reverse=True
                )
                if CHUNKED:
                    known = inside & (tile < tiles_of_map)
                    here = entering_ptr + (cell * states + n) * channels + cols
                    decayed += through * tl.load(here, mask=known, other=0.0)[None, :]
                    here = entering_ptr + ((all_cells + cell) * states + n) * channels + cols
                    adjoint += behind * tl.load(here, mask=known, other=0.0)[None, :]
                tl.store(
                    grad_maps_ptr + field + rank + states + n, tl.sum(grad * (decayed + put_in), axis=1), mask=exists
                )
                tl.store(grad_maps_ptr + field + rank + n, tl.sum(adjoint * added, axis=1), mask=exists)
                grad_added += adjoint * b[:, None]
                decayed = decayed * adjoint  # gradient with respect to delta rate
                grad_delta += decayed * rate[None, :]
                share = tl.sum(decayed * delta, axis=0)
                grad_rates += tl.where((state_rows == n)[:, None], share[None, :], 0.0)
            if side == 0 and PAIR == 0:
                grad_x = tl.zeros([TILE, CHANNELS], tl.float32)
                grad_skip += tl.sum(grad * x, axis=0)
            else:
                grad_x = tl.load(sum_ptr + targets, mask=there, other=0.0)
            grad_x += grad_added * delta + grad * skip[None, :]
            if FINAL and side == SIDES - 1:
                tl.store(grad_x_ptr + targets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=there)
            else:
                tl.store(sum_ptr + targets, grad_x, mask=there)
            grad_z = tl.where(exists[:, None], (grad_delta + grad_added * x) * slope, 0.0)
            grad_bias += tl.sum(grad_z, axis=0)
            low_rank = tl.load(
                low_rank_ptr + k * low_rank_stride_k + rows[None, :] * low_rank_stride + ranks[:, None],
                mask=exists[None, :] & (ranks < rank)[:, None],
                other=0.0,
            )  # [RANK, TILE]
            weight = tl.load(
                weight_ptr + (k * channels + cols)[:, None] * rank + ranks[None, :],
                mask=inside[:, None] & (ranks < rank)[None, :],
                other=0.0,
            )  # [CHANNELS, RANK]
            grad_weight += tl.dot(low_rank.to(tl.float32), grad_z, input_precision=PRECISION)
            tl.store(
                grad_maps_ptr + field[:, None] + ranks[None, :],
                tl.dot(grad_z, weight.to(tl.float32), input_precision=PRECISION),
                mask=exists[:, None] & (ranks < rank)[None, :],
            )
        mine = grad_parameters_ptr + (((image * programs + program) * DIRECTIONS) + k) * (rank + states + 2) * channels
        tl.store(
            mine + ranks[:, None] * channels + cols[None, :],
            grad_weight,
            mask=(ranks < rank)[:, None] & inside[None, :],
        )
        tl.store(mine + rank * channels + cols, grad_bias, mask=inside)
        tl.store(
            mine + (rank + 1 + state_rows)[:, None] * channels + cols[None, :],
            grad_rates,
            mask=(state_rows < states)[:, None] & inside[None, :],
        )
        if k == 0:
            tl.store(mine + (rank + 1 + states) * channels + cols, grad_skip, mask=inside)
        if side < SIDES - 1:
            tl.debug_barrier()  # the next direction reads what other threads may have written


__all__ = ["apply_backward", "apply_forward", "carry_states", "summarise_chunks"]
