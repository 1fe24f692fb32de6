"""Triton kernels of the four-direction selective scan; `triton.py` launches them and says how the work is cut.

A *tile* is TILE consecutive positions of an order times CHANNELS channels, in registers: the channels lie across the
lanes (channels-last memory is read in full lines) and the positions within a thread, so that a scan over a tile is a
chain of multiply-adds without any exchange between threads. Rows and reversed rows (columns and reversed columns) visit
the same tiles in opposite order; such a *pair* shares a program. A *chunk* is a run of tiles.

Names of arrays: x, grad, sum and out are contiguous maps [positions of all images, channels]; low_rank, b and c are
maps with one stride per position and one per direction. Weights are [K, ...] and contiguous. Decays are powers of 2.
Nothing here assumes more than 16 bits of a column index, 32 bits of a position in an image, and 64 of an address.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:  # in a `try`, so that a saved model's remote code does not name Triton as a requirement
    raise ImportError("These kernels need Triton (pip install triton).") from error

UNKNOWN = [
    "batch", "length", "height", "width", "chunks", "tiles_of_map", "programs",
    "channels", "low_rank_stride", "low_rank_stride_k", "b_stride", "b_stride_k", "c_stride", "c_stride_k",
]  # fmt: skip
"""Numbers that the compiler may know nothing about. Maps of most sizes so share one binary per rank and dtype (of
`tiles` it may know that there is one, or a multiple of 16); and from a stride that it knew to be a multiple of 8 it
would make each thread load 8 channels at once, spread a tile's positions over the other threads, and scan by shuffles
(counted: 532 of them in place of none)."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile_positions(
    first, length, height, width, FLIP: tl.constexpr, COLUMNS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Index in the map of the TILE positions from `first` on in an order, with FLIP the last first; which exist. Those
    that do not are the last position that does, so that loads need no mask.

    One integer division per tile, none per position: with TALL (height >= TILE) a tile meets at most one column's end,
    otherwise rows stay below 2 TILE, where a float quotient is exact. WIDE: offsets in an image need 64 bits.
    """
    steps = tl.arange(0, TILE)
    if FLIP:
        steps = TILE - 1 - steps
    exists = first + steps < length
    first = tl.minimum(first, length - 1)
    steps = tl.minimum(steps, length - 1 - first)
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
def _softplus(z, EXACT: tl.constexpr):
    """log(1 + e^z), and its derivative e^z / (1 + e^z) as e^(z - log(1 + e^z)).

    The first as max(z, 0) + log1p(e^-|z|): finite everywhere, and small steps keep all digits.

    log1p is e times a polynomial (Chebyshev interpolation of log1p(e) / e on [0, 1], relative error 3e-8, or 1e-5 where
    not EXACT: three multiply-adds less) and not a logarithm, which would lose the digits of small e in 1 + e and whose
    unit has the exponentials to do. Above 20, where torch's softplus becomes the identity, it is one to that accuracy.
    """
    e = tl.exp2(tl.abs(z) * -LOG2_E)
    if EXACT:
        p = 0.0051261018961668015 * e - 0.029074065387248993
        p = p * e + 0.0775160863995552
        p = p * e - 0.13602247834205627
        p = p * e + 0.19076880812644958
        p = p * e - 0.2483539879322052
        p = p * e + 0.3331812024116516
        p = p * e - 0.4999944567680359
        p = p * e + 0.9999999403953552
    else:
        p = -0.02344365604221821 * e + 0.10013972967863083
        p = p * e - 0.2090795338153839
        p = p * e + 0.32484957575798035
        p = p * e - 0.49931466579437256
        p = p * e + 0.9999905824661255
    return tl.maximum(z, 0.0) + p * e, tl.exp2((tl.minimum(z, 0.0) - p * e) * LOG2_E)


@triton.jit
def _weights(
    weight_ptr, bias_ptr, k, cols, inside, channels, rank, CHANNELS: tl.constexpr, RANKS: tl.constexpr
):  # fmt: skip
    """Of the step sizes of direction k: [RANKS, CHANNELS] and [CHANNELS]."""
    ranks = tl.arange(0, RANKS)
    weight = tl.load(
        weight_ptr + (k * channels + cols)[None, :] * rank + ranks[:, None],
        mask=inside[None, :] & (ranks < rank)[:, None],
        other=0.0,
    )
    return weight, tl.load(bias_ptr + k * channels + cols, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _project(
    low_rank_ptr, weight, bias, rows, stride, rank,
    TILE: tl.constexpr, CHANNELS: tl.constexpr, RANKS: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """What softplus makes the step sizes of a tile, [TILE, CHANNELS], by a product of tiles: for 24 ranks a fourth of a
    tensor core's instruction per element and half of one for its way through shared memory, where a loop over ranks
    takes 3.6 per rank.

    The added axis does nothing but end the layout of the product. With its positions over the lanes it would become the
    layout of all that follows, the scan too; the compiler's layouts do not pass the insertion of an axis.
    """
    ranks = tl.arange(0, RANKS)
    low_rank = tl.load(
        low_rank_ptr + (rows * stride)[:, None] + ranks[None, :], mask=(ranks < rank)[None, :], other=0.0
    )
    z = tl.broadcast_to(bias[None, :], [TILE, CHANNELS])
    if PRODUCT == "half":  # both of one such dtype; sums are float32
        z = tl.dot(low_rank, weight, z)
    else:
        z = tl.dot(low_rank.to(tl.float32), weight.to(tl.float32), z, input_precision=PRODUCT)
    return tl.reshape(z[None, :, :], [TILE, CHANNELS])


@triton.jit
def _then(decay, state, next_decay, next_state):
    """h -> decay h + state, followed by the next such map."""
    return decay * next_decay, next_decay * state + next_state


@triton.jit
def _then_counted(decay, state, total, next_decay, next_state, next_total):
    """The same with the sum of the step sizes. (A sum beside the scan would be in a layout of its own, and softplus be
    computed in both.)"""
    return decay * next_decay, next_decay * state + next_state, total + next_total


@triton.jit
def _then_decayed(decay, decayed, added, next_decay, next_decayed, next_added):
    """Of a run of positions: product of decays; what is left of the state before the last; what the last adds to it.

    Scanned instead of the state itself because h_t - added_t would lose all digits where states decay fast.
    """
    return decay * next_decay, next_decayed + next_decay * (decayed + added), next_added


@triton.jit
def _row(values, row: tl.constexpr, TILE: tl.constexpr):
    """A row of a tile, [CHANNELS]. No instruction: rows are registers of a thread, and adding -0.0 is nothing to the
    compiler (adding 0.0 would be, for the sake of -0.0)."""
    return tl.sum(tl.where((tl.arange(0, TILE) == row)[:, None], values, -0.0), axis=0)


@triton.jit
def _adjoints(direct, decay, behind, TILE: tl.constexpr):
    """g_t = direct_t + decay_{t+1} g_{t+1} over a tile, with `behind` for the last term at its last position.

    Row by row, since a reversed scan of Triton's would turn the tile around by shuffles: five for each number.
    """
    rows = tl.arange(0, TILE)[:, None]
    result = direct
    for step in tl.static_range(TILE):
        adjoint = _row(direct, TILE - 1 - step, TILE) + behind
        result = tl.where(rows == TILE - 1 - step, adjoint[None, :], result)
        behind = _row(decay, TILE - 1 - step, TILE) * adjoint
    return result


@triton.jit
def _sum_of_channels(values):
    """[TILE, CHANNELS] -> [TILE]. Turned by way of shared memory (the added axis ends the layout), as a sum over lanes
    costs ten instructions per position."""
    return tl.reshape(tl.sum(tl.trans(values)[None, :, :], axis=1), [values.shape[0]])


@triton.jit
def _program(channels, chunks, CHANNELS: tl.constexpr, FULL: tl.constexpr):
    """Channels that this program owns and which of them exist; its chunk; its image. Neighbours differ in channels, so
    that they share the projections in the cache."""
    blocks = tl.cdiv(channels, CHANNELS)
    pid = tl.program_id(0)
    cols = pid % blocks * CHANNELS + tl.arange(0, CHANNELS)
    pid = pid // blocks
    inside = cols < channels
    if FULL:  # all of them do, and the compiler needs no masks
        inside = tl.full([CHANNELS], True, tl.int1)
    return cols, inside, pid % chunks, (pid // chunks).to(tl.int64)


@triton.jit
def _rate(a_log_ptr, k, n, cols, inside, channels, states):
    """-exp(a_log) of direction k and state n, [CHANNELS]."""
    a_log = tl.load(a_log_ptr + (k * channels + cols) * states + n, mask=inside, other=0.0).to(tl.float32)
    return -tl.exp2(a_log * LOG2_E)


@triton.jit(do_not_specialize=UNKNOWN)
def summarise_chunks(
    x_ptr, low_rank_ptr, b_ptr, c_ptr, weight_ptr, bias_ptr, a_log_ptr, grad_ptr, totals_ptr, locals_ptr,
    batch, length, height, width, channels, rank, states,
    low_rank_stride, low_rank_stride_k, b_stride, b_stride_k, c_stride, c_stride_k,
    tiles, chunks,
    PAIR: tl.constexpr, DIRECTIONS: tl.constexpr, ADJOINT: tl.constexpr, STATES: tl.constexpr,
    RANKS: tl.constexpr, PRODUCT: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr,
    FULL: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What each chunk does to a state that passes through it, for each direction of a pair.

    totals [K, B, chunks, E]: sum of the step sizes (a state decays by exp(rate total)). locals [kinds, K, B, chunks, N,
    E]: state at the chunk's end if it enters with none; with ADJOINT also, as kind 1, decayed gradient of the state
    before the chunk if none comes from behind it (one tile per chunk then).
    """
    channels = channels // VECTOR * VECTOR  # which the compiler may know
    cols, inside, chunk, image = _program(channels, chunks, CHANNELS, FULL)
    state_rows = tl.arange(0, STATES)
    first_row = (tl.arange(0, TILE) == 0)[:, None]
    before = image * length  # positions of the images before
    x_ptr += before * channels
    low_rank_ptr += before * low_rank_stride
    b_ptr += before * b_stride
    c_ptr += before * c_stride
    grad_ptr += before * channels
    for side in tl.static_range(2 if DIRECTIONS > PAIR + 2 else 1):
        k = PAIR + 2 * side
        weight, bias = _weights(weight_ptr, bias_ptr, k, cols, inside, channels, rank, CHANNELS, RANKS)
        cell = (k * batch + image) * chunks + chunk
        all_cells = (DIRECTIONS * batch).to(tl.int64) * chunks
        total = tl.zeros([CHANNELS], tl.float32)
        held = tl.zeros([STATES, CHANNELS], tl.float32)
        for step in range(tiles):
            first = (chunk * tiles + (tiles - 1 - step if side == 1 else step)) * TILE
            rows, exists = _tile_positions(first, length, height, width, side == 1, PAIR == 1, TALL, WIDE, TILE)
            z = _project(
                low_rank_ptr + k * low_rank_stride_k, weight, bias, rows, low_rank_stride, rank,
                TILE, CHANNELS, RANKS, PRODUCT,
            )  # fmt: skip
            delta, _ = _softplus(z, x_ptr.dtype.element_ty == tl.float32)
            targets = (rows * channels)[:, None] + cols[None, :]
            x = tl.load(x_ptr + targets, mask=inside[None, :], other=0.0)
            added = delta * x.to(tl.float32)
            of_tile = tl.zeros([CHANNELS], tl.float32)
            if ADJOINT:
                grad = tl.load(grad_ptr + targets, mask=inside[None, :], other=0.0)
                grad = grad.to(tl.float32)
            for n in range(states):
                rate_log2 = _rate(a_log_ptr, k, n, cols, inside, channels, states) * LOG2_E
                b = tl.load(b_ptr + rows * b_stride + k * b_stride_k + n, mask=exists, other=0.0).to(tl.float32)
                decay = tl.exp2(delta * rate_log2[None, :])
                this = (state_rows == n)[:, None]
                entering = tl.sum(tl.where(this, held, -0.0), axis=0)
                put_in = added * b[:, None]
                put_in = tl.where(first_row, put_in + decay * entering[None, :], put_in)
                through, state, sums = tl.associative_scan((decay, put_in, delta), 0, _then_counted)
                held = tl.where(this, _row(state, TILE - 1, TILE)[None, :], held)
                of_tile = _row(sums, TILE - 1, TILE)
                if ADJOINT:
                    c = tl.load(c_ptr + rows * c_stride + k * c_stride_k + n, mask=exists, other=0.0).to(tl.float32)
                    start = tl.sum(grad * c[:, None] * through, axis=0)
                    tl.store(locals_ptr + ((all_cells + cell) * states + n) * channels + cols, start, mask=inside)
            total += of_tile
        tl.store(totals_ptr + cell * channels + cols, total, mask=inside)
        tl.store(
            locals_ptr + (cell * states + state_rows)[:, None] * channels + cols[None, :],
            held,
            mask=(state_rows < states)[:, None] & inside[None, :],
        )


@triton.jit(do_not_specialize=UNKNOWN)
def carry_states(
    totals_ptr, locals_ptr, a_log_ptr, entering_ptr, batch, channels, states, chunks,
    DIRECTIONS: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Scan over chunk summaries: entering [kinds, K, B, chunks, N, E], the state that enters each chunk (kind 0), and
    the decayed gradient of a state that comes from behind it (kind 1), which travels against the direction."""
    cols, inside, n, line = _program(channels, states, CHANNELS, False)  # line: (kind, k, image)
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
        carried = _row(state, TILE - 1, TILE)


@triton.jit(do_not_specialize=UNKNOWN)
def apply_forward(
    x_ptr, low_rank_ptr, b_ptr, c_ptr, weight_ptr, bias_ptr, a_log_ptr, d_ptr, entering_ptr, sum_ptr, out_ptr,
    batch, length, height, width, channels, rank, states,
    low_rank_stride, low_rank_stride_k, b_stride, b_stride_k, c_stride, c_stride_k,
    tiles, chunks,
    PAIR: tl.constexpr, DIRECTIONS: tl.constexpr, CHUNKED: tl.constexpr, STATES: tl.constexpr,
    RANKS: tl.constexpr, PRODUCT: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr,
    FULL: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Results of a pair of directions, added to those of the directions before in `sum` (float32) and, by the last
    direction of all, written to `out`; the first adds the skips of all. CHUNKED: states come from `entering`; else the
    one chunk begins with none."""
    SIDES: tl.constexpr = 2 if DIRECTIONS > PAIR + 2 else 1
    FINAL: tl.constexpr = PAIR == 1 or DIRECTIONS == 1
    channels = channels // VECTOR * VECTOR  # which the compiler may know
    cols, inside, chunk, image = _program(channels, chunks, CHANNELS, FULL)
    state_rows = tl.arange(0, STATES)
    first_row = (tl.arange(0, TILE) == 0)[:, None]
    before = image * length  # positions of the images before
    x_ptr += before * channels
    low_rank_ptr += before * low_rank_stride
    b_ptr += before * b_stride
    c_ptr += before * c_stride
    sum_ptr += before * channels
    out_ptr += before * channels
    skip = tl.zeros([CHANNELS], tl.float32)
    if PAIR == 0:
        for k in tl.static_range(DIRECTIONS):
            skip += tl.load(d_ptr + k * channels + cols, mask=inside, other=0.0).to(tl.float32)
    for side in tl.static_range(SIDES):
        k = PAIR + 2 * side
        weight, bias = _weights(weight_ptr, bias_ptr, k, cols, inside, channels, rank, CHANNELS, RANKS)
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
            targets = (rows * channels)[:, None] + cols[None, :]
            z = _project(
                low_rank_ptr + k * low_rank_stride_k, weight, bias, rows, low_rank_stride, rank,
                TILE, CHANNELS, RANKS, PRODUCT,
            )  # fmt: skip
            delta, _ = _softplus(z, x_ptr.dtype.element_ty == tl.float32)
            x = tl.load(x_ptr + targets, mask=inside[None, :], other=0.0).to(tl.float32)
            added = delta * x
            if side == 0 and PAIR == 0:
                y = x * skip[None, :]
            else:
                y = tl.load(sum_ptr + targets, mask=inside[None, :], other=0.0)
            for n in range(states):
                rate_log2 = _rate(a_log_ptr, k, n, cols, inside, channels, states) * LOG2_E
                b = tl.load(b_ptr + rows * b_stride + k * b_stride_k + n, mask=exists, other=0.0).to(tl.float32)
                c = tl.load(c_ptr + rows * c_stride + k * c_stride_k + n).to(tl.float32)
                decay = tl.exp2(delta * rate_log2[None, :])
                this = (state_rows == n)[:, None]
                entering = tl.sum(tl.where(this, held, -0.0), axis=0)
                put_in = added * b[:, None]
                put_in = tl.where(first_row, put_in + decay * entering[None, :], put_in)
                _, state = tl.associative_scan((decay, put_in), 0, _then)
                y += state * c[:, None]
                held = tl.where(this, _row(state, TILE - 1, TILE)[None, :], held)
            there = exists[:, None] & inside[None, :]
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
    low_rank_stride, low_rank_stride_k, b_stride, b_stride_k, c_stride, c_stride_k,
    tiles, tiles_of_map, programs,
    PAIR: tl.constexpr, DIRECTIONS: tl.constexpr, CHUNKED: tl.constexpr, STATES: tl.constexpr,
    RANKS: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr,
    VECTOR: tl.constexpr, FULL: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of a pair of directions from the states and adjoint states that enter each *tile*.

    grad_x is summed over the directions as `apply_forward` sums results. grad_maps [blocks, B, L, K, R + 2 N] holds
    this block of channels' share of the gradients of low_rank, b and c; grad_parameters [programs, K, R + N + 2, E]
    this program's share of those of weight, bias, rates and (k = 0 only) d. No two programs write to one place.
    """
    SIDES: tl.constexpr = 2 if DIRECTIONS > PAIR + 2 else 1
    FINAL: tl.constexpr = PAIR == 1 or DIRECTIONS == 1
    channels = channels // VECTOR * VECTOR  # which the compiler may know
    cols, inside, program, image = _program(channels, programs, CHANNELS, FULL)
    block = tl.program_id(0) % tl.cdiv(channels, CHANNELS)
    state_rows = tl.arange(0, STATES)
    ranks = tl.arange(0, RANKS)
    first_row = (tl.arange(0, TILE) == 0)[:, None]
    fields = rank + 2 * states
    before = image * length  # positions of the images before
    x_ptr += before * channels
    low_rank_ptr += before * low_rank_stride
    b_ptr += before * b_stride
    c_ptr += before * c_stride
    grad_ptr += before * channels
    sum_ptr += before * channels
    grad_x_ptr += before * channels
    grad_maps_ptr += (block.to(tl.int64) * batch * length + before) * DIRECTIONS * fields
    skip = tl.zeros([CHANNELS], tl.float32)
    if PAIR == 0:
        for k in tl.static_range(DIRECTIONS):
            skip += tl.load(d_ptr + k * channels + cols, mask=inside, other=0.0).to(tl.float32)
    for side in tl.static_range(SIDES):
        k = PAIR + 2 * side
        weight, bias = _weights(weight_ptr, bias_ptr, k, cols, inside, channels, rank, CHANNELS, RANKS)
        grad_weight = tl.zeros([RANKS, CHANNELS], tl.float32)
        grad_bias = tl.zeros([CHANNELS], tl.float32)
        grad_rates = tl.zeros([STATES, CHANNELS], tl.float32)
        grad_skip = tl.zeros([CHANNELS], tl.float32)
        for step in range(tiles):
            tile = program * tiles + step
            rows, exists = _tile_positions(tile * TILE, length, height, width, side == 1, PAIR == 1, TALL, WIDE, TILE)
            targets = (rows * channels)[:, None] + cols[None, :]
            z = _project(
                low_rank_ptr + k * low_rank_stride_k, weight, bias, rows, low_rank_stride, rank,
                TILE, CHANNELS, RANKS, PRODUCT,
            )  # fmt: skip
            delta, slope = _softplus(z, x_ptr.dtype.element_ty == tl.float32)
            x = tl.load(x_ptr + targets, mask=inside[None, :], other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + targets, mask=inside[None, :], other=0.0).to(tl.float32)
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
                put_in = added * b[:, None]
                entering = tl.zeros([CHANNELS], tl.float32)
                behind = tl.zeros([CHANNELS], tl.float32)
                if CHUNKED:
                    known = inside & (tile < tiles_of_map)
                    entering = tl.load(entering_ptr + (cell * states + n) * channels + cols, mask=known, other=0.0)
                    here = entering_ptr + ((all_cells + cell) * states + n) * channels + cols
                    behind = tl.load(here, mask=known, other=0.0)
                decayed = tl.where(first_row, decay * entering[None, :], 0.0)
                _, decayed, _ = tl.associative_scan((decay, decayed, put_in), 0, _then_decayed)
                adjoint = _adjoints(grad * c[:, None], decay, behind, TILE)
                field_c = grad_maps_ptr + field + rank + states + n
                tl.store(field_c, _sum_of_channels(grad * (decayed + put_in)), mask=exists)
                tl.store(grad_maps_ptr + field + rank + n, _sum_of_channels(adjoint * added), mask=exists)
                grad_added += adjoint * b[:, None]
                decayed = decayed * adjoint  # gradient with respect to delta rate
                grad_delta += decayed * rate[None, :]
                share = tl.sum(decayed * delta, axis=0)
                grad_rates += tl.where((state_rows == n)[:, None], share[None, :], 0.0)
            if side == 0 and PAIR == 0:
                grad_x = grad * skip[None, :]
                grad_skip += tl.sum(tl.where(exists[:, None], grad * x, 0.0), axis=0)
            else:
                grad_x = tl.load(sum_ptr + targets, mask=inside[None, :], other=0.0)
            grad_x += grad_added * delta
            there = exists[:, None] & inside[None, :]
            if FINAL and side == SIDES - 1:
                tl.store(grad_x_ptr + targets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=there)
            else:
                tl.store(sum_ptr + targets, grad_x, mask=there)
            grad_z = (grad_delta + grad_added * x) * slope  # 0 where b and c are
            grad_bias += tl.sum(grad_z, axis=0)
            low_rank = tl.load(
                low_rank_ptr + k * low_rank_stride_k + rows[None, :] * low_rank_stride + ranks[:, None],
                mask=(ranks < rank)[:, None],
                other=0.0,
            )  # [RANKS, TILE]
            grad_weight += tl.dot(low_rank.to(tl.float32), grad_z, input_precision=PRECISION)
            tl.store(
                grad_maps_ptr + field[:, None] + ranks[None, :],
                tl.dot(grad_z, tl.trans(weight).to(tl.float32), input_precision=PRECISION),
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
