"""The Triton programs of the Future-KL; `kernel` launches them and says how they share the work.

Every program takes one tile of consecutive tokens, whatever segments lie in it: a token's sum is x_t + γ_t·y_{t+1},
where γ_t is 0 for the last token of a segment, so that an associative scan over pairs (decay, sum) needs no borders.
Neither does it matter to memory, which is read and written in whole, aligned lines.

A sum that reaches over the end of a tile needs what follows it. Each program publishes the sum at its tile's first
token as soon as it has summed its own tokens, and then waits for the tiles that its last segment reaches into: their
sums, decayed, are what follows. Programs publish before they wait, and tiles are taken by ticket from the right, so
that only tiles already taken are waited for. No program needs another's total, but only its tile's own sum; the terms
are therefore always added in the same order, and a repeated call gives the same bits.

A published sum is one 64-bit word that is stored and loaded at once: it is its own flag, and no other word has to be
ordered with it. EMPTY, the bit pattern of all ones, is a NaN that no sum is left to have.
"""

# The language of Triton's programs is not Python's: parameters are typed by what they are called with.
# mypy: ignore-errors

import triton
import triton.language as tl

EMPTY = tl.constexpr(-1)
NAN_BITS = tl.constexpr(0x7FF8000000000000)
WINDOW = tl.constexpr(32)
"""Tiles that are waited for at a time."""

TICKETS = tl.constexpr(0)
FINISHED = tl.constexpr(1)
FIRST_TILE = tl.constexpr(2)
"""Words of `state`: tickets drawn, programs done, then a sum for every tile and a count for every segment.

All are EMPTY between two launches; counters therefore begin at −1.
"""


@triton.jit
def sum_kernel(  # noqa: PLR0913
    values,
    following,
    bounds,
    tile_segments,
    state,
    sums,
    num_tokens,
    num_tiles,
    horizon,
    gamma: tl.float64,
    inverse_half_life: tl.float64,
    has_following: tl.constexpr,
    tile_size: tl.constexpr,
):
    """Decayed sums from the right: `values` [T] to `sums` [T], in the dtype of the latter."""
    tile = _take_tile(state, num_tiles)
    tokens = tile * tile_size + tl.arange(0, tile_size)
    whole = (tile + 1) * tile_size <= num_tokens
    result = _scan(
        _load(values, tokens, num_tokens, whole),
        following,
        bounds,
        tile_segments,
        state,
        tile,
        horizon,
        gamma,
        inverse_half_life,
        has_following,
        tile_size,
        sums.dtype.element_ty,
    )
    _store(sums, tokens, result, num_tokens, whole)
    _finish(state, num_tiles, bounds, 0, tile_size)


@triton.jit
def head_kernel(  # noqa: PLR0913
    values,
    bounds,
    tile_segments,
    state,
    heads,
    num_tokens,
    num_tiles,
    horizon,
    gamma: tl.float64,
    inverse_half_life: tl.float64,
    tile_size: tl.constexpr,
):
    """The sums of `sum_kernel` at the first tokens of the segments alone: `values` [T] to `heads` [S]."""
    tile = _take_tile(state, num_tiles)
    tokens = tile * tile_size + tl.arange(0, tile_size)
    whole = (tile + 1) * tile_size <= num_tokens
    result = _scan(
        _load(values, tokens, num_tokens, whole),
        values,
        bounds,
        tile_segments,
        state,
        tile,
        horizon,
        gamma,
        inverse_half_life,
        False,
        tile_size,
        heads.dtype.element_ty,
    )
    for segment in range(tl.load(tile_segments + 2 * tile), tl.load(tile_segments + 2 * tile + 1)):
        start = tl.load(bounds + segment)
        is_head = (tokens == start) & (start < tl.load(bounds + segment + 1))
        tl.store(heads + segment + tl.zeros_like(tokens), result, mask=is_head)
    _finish(state, num_tiles, bounds, 0, tile_size)


@triton.jit
def influence_kernel(  # noqa: PLR0913
    log_ratio,
    ratio,
    advantages,
    following,
    bounds,
    tile_segments,
    state,
    future_kl,
    weights,
    counts,
    num_tokens,
    num_tiles,
    num_segments,
    horizon,
    gamma: tl.float64,
    inverse_half_life: tl.float64,
    log_dual_clip: tl.float64,
    clip_low: tl.float64,
    clip_high: tl.float64,
    safety_threshold: tl.float64,
    safe_floor: tl.float64,
    participation: tl.constexpr,
    include_current_token: tl.constexpr,
    reset_risky: tl.constexpr,
    has_following: tl.constexpr,
    tile_size: tl.constexpr,
):
    """Participation, sum and influence weight of every token, and dual-clipped tokens of every segment."""
    dtype: tl.constexpr = future_kl.dtype.element_ty
    tile = _take_tile(state, num_tiles)
    tokens = tile * tile_size + tl.arange(0, tile_size)
    whole = (tile + 1) * tile_size <= num_tokens
    delta = _load(log_ratio, tokens, num_tokens, whole).to(dtype)
    negative = _load(advantages, tokens, num_tokens, whole) < 0
    moved_far = _load(ratio, tokens, num_tokens, whole).to(dtype) > tl.full([tile_size], safety_threshold, dtype)

    beyond = delta > tl.full([tile_size], log_dual_clip, dtype)
    clipped = (negative & beyond).to(tl.int32)
    if tl.max(clipped, axis=0) > 0:
        _count(clipped, tokens, bounds, tile_segments, state + FIRST_TILE + num_tiles, tile)
    if participation == "all_tokens":
        delta = tl.where(beyond, 0.0, delta)
    elif participation == "negative_advantage":
        delta = tl.where(negative & beyond, 0.0, delta)

    result = _scan(
        delta,
        following,
        bounds,
        tile_segments,
        state,
        tile,
        horizon,
        gamma,
        inverse_half_life,
        has_following,
        tile_size,
        dtype,
    )
    if not include_current_token:
        result = result - delta
    _store(future_kl, tokens, result, num_tokens, whole)

    low = tl.full([tile_size], clip_low, dtype)
    high = tl.full([tile_size], clip_high, dtype)
    # Comparisons let a NaN through, where minimum and maximum would lose it; an infinity ends at a bound.
    weight = tl.exp(result)
    weight = tl.where(weight > high, high, weight)
    weight = tl.where(weight < low, low, weight)
    if reset_risky:
        safe = tl.full([tile_size], 1.0, dtype)
    else:
        floor = tl.full([tile_size], safe_floor, dtype)
        safe = tl.where(weight > 1.0, 1.0, weight)
        safe = tl.where(safe < floor, floor, safe)
    weight = tl.where(negative & moved_far, safe, weight)
    _store(weights, tokens, weight, num_tokens, whole)
    _finish(state, num_tiles, counts, num_segments, tile_size)


@triton.jit
def _take_tile(state, num_tiles):
    """The rightmost tile that nobody has taken."""
    tickets_before = tl.atomic_add(state + TICKETS, 1, sem="relaxed") + 1
    return num_tiles - 1 - tickets_before.to(tl.int32)


@triton.jit
def _load(pointer, tokens, num_tokens, whole):
    # Without a mask where there need be none: only then are several tokens loaded at a time, whatever num_tokens is.
    if whole:
        values = tl.load(pointer + tokens)
    else:
        values = tl.load(pointer + tokens, mask=tokens < num_tokens, other=0.0)
    return values


@triton.jit
def _store(pointer, tokens, values, num_tokens, whole):
    values = values.to(pointer.dtype.element_ty)
    if whole:
        tl.store(pointer + tokens, values)
    else:
        tl.store(pointer + tokens, values, mask=tokens < num_tokens)


@triton.jit
def _scan(  # noqa: PLR0913
    terms,
    following,
    bounds,
    tile_segments,
    state,
    tile,
    horizon,
    gamma,
    inverse_half_life,
    has_following: tl.constexpr,
    tile_size: tl.constexpr,
    dtype: tl.constexpr,
):
    """Sums of a tile's tokens over the whole of their segments: [tile] to [tile] in `dtype`.

    Rows of four tokens, as one load instruction fetches them, are summed one token after the other; between the rows of
    a tile runs a scan, whose steps are shuffles.
    """
    rows: tl.constexpr = tile_size // 4
    tokens = tile * tile_size + tl.arange(0, tile_size)
    terms = terms.to(tl.float64)
    decays = tl.full([tile_size], gamma, tl.float64)
    first = tl.load(tile_segments + 2 * tile)
    stop = tl.load(tile_segments + 2 * tile + 1)
    for segment in range(first, stop):
        end = tl.load(bounds + segment + 1)
        is_last = (tokens == end - 1) & (end > tl.load(bounds + segment))
        decays = tl.where(is_last, 0.0, decays)
        if has_following:
            terms = tl.where(is_last, terms + gamma * tl.load(following + segment), terms)

    x0, x1, x2, x3 = _split_rows(terms, rows)
    g0, g1, g2, g3 = _split_rows(decays, rows)
    sums = x0 + _decayed(g0, x1 + _decayed(g1, x2 + _decayed(g2, x3)))
    # Mirrored, since `associative_scan(reverse=True)` spends more shuffles on mirroring than on the scan.
    mirror = rows - 1 - tl.arange(0, rows)
    products = tl.gather(g0 * g1 * g2 * g3, mirror, 0)
    products, sums = tl.associative_scan((products, tl.gather(sums, mirror, 0)), 0, _join)
    _publish(state + FIRST_TILE + tile + mirror, sums, mirror == 0)

    # How many tiles to the right the last segment reaches; what lies behind the horizon has decayed to zero.
    reach = ((tl.load(bounds + stop) - 1) // tile_size).to(tl.int32) - tile
    behind_tile = _sum_behind(state + FIRST_TILE + tile, tl.minimum(reach, horizon), inverse_half_life, tile_size)
    behind = tl.gather(sums + _decayed(products, behind_tile), tl.maximum(mirror - 1, 0), 0)
    x3 += _decayed(g3, tl.where(mirror == 0, behind_tile, behind))
    x2 += _decayed(g2, x3)
    x1 += _decayed(g1, x2)
    x0 += _decayed(g0, x1)
    return tl.reshape(tl.join(tl.join(x0.to(dtype), x2.to(dtype)), tl.join(x1.to(dtype), x3.to(dtype))), [tile_size])


@triton.jit
def _split_rows(values, rows: tl.constexpr):
    """First, second, third and fourth tokens of the rows: [4 · rows] to four times [rows]."""
    even, odd = tl.split(tl.reshape(values, [rows, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _decayed(decay, total):
    # A product with a decay of 0 is left out, or an infinity or NaN would leak into the segment before.
    return tl.where(decay == 0.0, 0.0, decay * total)


@triton.jit
def _join(later_decay, later_sum, decay, total):
    return decay * later_decay, total + _decayed(decay, later_sum)


@triton.jit
def _publish(words, sums, is_first):
    bits = tl.where(sums == sums, sums.to(tl.int64, bitcast=True), NAN_BITS)
    tl.atomic_xchg(words, bits, mask=is_first, sem="relaxed")


@triton.jit
def _sum_behind(word, reach, inverse_half_life, tile_size: tl.constexpr):
    """Decayed sum at the first token behind this tile, from the own sums of the `reach` next tiles."""
    total = tl.sum(tl.zeros([WINDOW], tl.float64), axis=0)
    for nearest in range(1, reach + 1, WINDOW):
        steps = nearest + tl.arange(0, WINDOW)
        waited_for = steps <= reach
        words = _read(word + steps, waited_for)
        while tl.max((words == EMPTY).to(tl.int32), axis=0) > 0:
            words = _read(word + steps, waited_for)
        decays = tl.exp2((1 - steps).to(tl.float64) * tile_size * inverse_half_life)
        sums = words.to(tl.float64, bitcast=True)
        total += tl.sum(tl.where(waited_for & (decays > 0.0), decays * sums, 0.0), axis=0)
    return total


@triton.jit
def _read(words, wanted):
    # An atomic, although nothing is changed. One thread reads a word and hands it to whichever others hold that place
    # of the tensor; with a load each would read for itself, and warps that saw different words would part ways.
    return tl.where(wanted, tl.atomic_or(words, tl.zeros([WINDOW], tl.int64), mask=wanted, sem="relaxed"), 0)


@triton.jit
def _count(clipped, tokens, bounds, tile_segments, counts, tile):
    """Add a tile's marked tokens to the counts of their segments."""
    for segment in range(tl.load(tile_segments + 2 * tile), tl.load(tile_segments + 2 * tile + 1)):
        inside = (tokens >= tl.load(bounds + segment)) & (tokens < tl.load(bounds + segment + 1))
        count = tl.sum(tl.where(inside, clipped, 0), axis=0)
        if count > 0:
            tl.atomic_add(counts + segment, count.to(tl.int64), sem="relaxed")


@triton.jit
def _finish(state, num_tiles, counts, num_counts, tile_size: tl.constexpr):
    """The last program to finish hands out the counts and leaves the state as it was found."""
    tl.debug_barrier()
    finished_before = tl.atomic_add(state + FINISHED, 1, sem="acq_rel") + 1
    if finished_before == num_tiles - 1:
        places = tl.arange(0, tile_size)
        words = state + FIRST_TILE + num_tiles
        for start in range(0, num_counts, tile_size):
            mask = start + places < num_counts
            found = tl.load(words + start + places, mask=mask, volatile=True)
            tl.store(counts + start + places, found - EMPTY, mask=mask)
        tl.debug_barrier()
        num_words = FIRST_TILE + num_tiles + num_counts
        for start in range(0, num_words, tile_size):
            tl.store(state + start + places, EMPTY, mask=start + places < num_words)
