# SPDX-License-Identifier: Apache-2.0
"""Which columns share a scale: groups in order, and act-order, where `g_idx` says it column by column."""

import math

import numpy as np

from .tensors import only

UNIT = 32       # columns of the groups that groups of odd sizes are filled up to
_DIVISOR = 16   # of the size of groups in act-order that are left as they are


def group_columns(in_features, groups, group_size=None, g_idx=None):
    """Segments of groups of one size, whatever `g_idx` says.

    Groups of different sizes are split into a size that divides them all, or, if that is no multiple of 16, filled
    with columns of no x.

    Parameters
    ----------
    in_features : int
    groups : int
        Rows of scales in the checkpoint.
    group_size : int, optional
        -1 for all columns. Default what `groups` says. Not looked at for act-order.
    g_idx : ndarray [in_features], integer, optional
        Group of each column, negative from the end. All alike with several groups: not act-order.

    Returns
    -------
    group : int
        Columns of a group; the last may have fewer.
    index : ndarray, int
        For each group of the segment its row of scales.
    order : ndarray [columns], int32, optional
        As in `CodedWeight`; None when columns stay where they are.
    """
    if g_idx is not None:
        if g_idx.shape != (in_features,):
            raise ValueError(f"QMatrix: g_idx must have shape [{in_features}], got {list(g_idx.shape)}")
        if ((g_idx < -groups) | (g_idx >= groups)).any():
            raise ValueError(f"QMatrix: g_idx must be below {groups} groups, got {g_idx.min()} to {g_idx.max()}")
        g_idx = np.where(g_idx < 0, g_idx + groups, g_idx)
    if g_idx is None or (g_idx == g_idx[0]).all():
        return _group_size(in_features, groups, group_size), np.arange(groups), None
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    sizes = np.bincount(g_idx, minlength=groups)
    index = np.flatnonzero(sizes)
    sizes = sizes[index]
    group = math.gcd(*sizes[:-1].tolist())
    if group % _DIVISOR:
        order, group = _filled(order, sizes), UNIT
    index = np.repeat(index, -(-sizes // group))
    in_place = len(order) == in_features and (order == np.arange(in_features)).all()
    return group, index, None if in_place else order


def _filled(order, sizes):
    """`order` with -1 after each group, up to a multiple of `UNIT`."""
    wide = -(-sizes // UNIT) * UNIT
    place = np.arange(len(order)) + np.repeat(np.cumsum(wide - sizes) - (wide - sizes), sizes)
    filled = np.full(wide.sum(), -1, np.int32)
    filled[place] = order
    return filled


def _group_size(columns, groups, size):
    """`size` checked against the number of groups, or the size that number implies."""
    if size is None:
        least, most = -(-columns // groups), columns if groups == 1 else (columns - 1) // (groups - 1)
        likely = [columns // groups] if columns % groups == 0 else []
        likely += [1 << n for n in range(16) if least <= 1 << n <= most]
        likely = likely if groups > 1 else [columns]
        return only("group_size", sorted(set(likely)) or list(range(least, most + 1)),
                    f"{groups} groups of {columns} columns")
    size = columns if size < 0 else min(int(size), columns)
    if size == 0 or -(-columns // size) != groups:
        raise ValueError(f"QMatrix: group_size must give {groups} groups of {columns} columns, got {size}")
    return size
