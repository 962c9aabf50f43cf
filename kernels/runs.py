"""Runs: neighbours of a row, contiguous in memory, loaded and stored at once and moved in registers.

A run is a power of two of columns that begins at a multiple of its own length, or of 16 bytes if it is longer: the
last axis of a tile, all of it in one thread. Columns shifted by a tap are then in registers, none of them loaded alone.
Source: own derivation, no code adapted.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def count(numbers):
    return len(numbers)


@triton.constexpr_function
def item(numbers, i):
    return numbers[i]


@triton.constexpr_function
def halvings(run):
    """How often a run of columns is halved until each is alone."""
    return run.bit_length() - 1


@triton.constexpr_function
def runs_met(columns, first, run):
    """The runs that have one of `columns`, which are counted from `first`."""
    return tuple(sorted({(first + column) // run for column in columns}))


@triton.constexpr_function
def place(runs, column, run):
    """Where a column is in the columns of these runs."""
    return runs.index(column // run) * run + column % run


@triton.jit
def columns_of(tile, RUN: tl.constexpr):
    """The columns of a [channels, lanes, RUN] tile, whose last axis is in one thread: no data moves."""
    tiles = (tile,)
    for stage in tl.static_range(halvings(RUN)):
        even, odd = (), ()
        for i in tl.static_range(1 << stage):
            halves = tl.reshape(tiles[i], (tile.shape[0], tile.shape[1], RUN >> (stage + 1), 2))
            first, second = tl.split(halves)
            even, odd = even + (first,), odd + (second,)
        tiles = even + odd
    found = ()
    for i in tl.static_range(RUN):
        found = found + (tl.reshape(tiles[i], (tile.shape[0], tile.shape[1])),)
    return found


@triton.jit
def run_of(tiles, RUN: tl.constexpr):
    """RUN tiles as the columns of one; see `columns_of`."""
    for stage in tl.static_range(halvings(RUN)):
        joined = ()
        for i in tl.static_range(RUN >> (stage + 1)):
            pair = tl.join(tiles[i], tiles[i + (RUN >> (stage + 1))])
            joined = joined + (tl.reshape(pair, (pair.shape[0], pair.shape[1], 2 << stage)),)
        tiles = joined
    return tiles[0]


@triton.jit
def run_pointers(ptr, at, row, column, RUN: tl.constexpr):
    """Pointers to the RUN columns from `column` on, of each lane, as the last axis."""
    at = tl.multiple_of(at + tl.multiple_of(row + column, RUN), (RUN, RUN))
    return ptr + (at[:, :, None] + tl.arange(0, RUN)[None, None, :])
