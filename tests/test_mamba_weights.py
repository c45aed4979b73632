# SPDX-License-Identifier: Apache-2.0
"""A trained Mamba, the package typeseg's, through the kernels, against onnxruntime on its ONNX twin.

It labels every byte of a text with the language it is written in. A block scans both ways:

    u, z = split(layer_norm(x) @ Win);  u = silu(conv(u));  low, B, C = split(u @ Wx);  dt = softplus(low @ Wdt) + 1e-4
    x += (scan(u, dt, B, C) + reversed scan of reversed inputs) * silu(z) @ Wout
"""

import functools

import numpy as np
import pytest
from compare import assert_close
from data_packages import folder_of

from cupyattn import QMatrix, layer_norm, quant_gemm, selective_scan, selective_state_update
from cupyattn.reference.selective_scan import selective_scan as reference

TEXT = (b"def area(r):\n    return 3.14159 * r ** 2\n\nSELECT name, COUNT(*) FROM users WHERE age > 30 GROUP BY name;\n"
        b'{"id": 7, "tags": ["a", "b"]}\n<p class="x">caf\xc3\xa9</p>\n#include <stdio.h>\n'
        b"int main(void) { return 0; }\n")
RANK, STATES, LAYERS = 16, 16, 6   # of dt, of the scan


@functools.cache
def file(name):
    return folder_of("typeseg") / "data" / name


@functools.cache
def weights():
    with np.load(file("mamba_al.npz")) as arrays:
        return dict(arrays)


def ids():
    """The model's: ASCII, and 128 for all other bytes."""
    return np.minimum(np.frombuffer(TEXT, np.uint8), 128)


@functools.cache
def expected():
    """Scores [bytes, classes] by onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file("mamba_al.onnx"), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"ids": ids().astype(np.int64)})[0]


@functools.cache
def _matrix(name):
    return QMatrix.from_dense(np.ascontiguousarray(weights()[name + "__kernel"].T))


def _dense(x, name):
    return quant_gemm(x, _matrix(name), bias=weights()[name + "__bias"])


def _norm(x, name):
    return layer_norm(x, weights()[name + "__scale"], weights()[name + "__bias"], eps=1e-6)


def _silu(x):
    return x / (1 + np.exp(-x))


def _same_conv(x, name):
    """Depthwise over the rows; of 4 taps 1 looks back and 2 look ahead, so it is no causal_conv1d."""
    taps = weights()[name + "__kernel"][:, 0]                             # [width, channels]
    before = (len(taps) - 1) // 2
    padded = np.pad(x, ((before, len(taps) - 1 - before), (0, 0)))
    return sum(padded[i:i + len(x)] * tap for i, tap in enumerate(taps)) + weights()[name + "__bias"]


def block_inputs(x, layer):
    """What the scan of a layer takes, and the gate."""
    u, z = np.split(_dense(_norm(x, layer + "LayerNorm_0"), layer + "Dense_0"), 2, axis=1)
    u = _silu(_same_conv(u, layer + "Conv_0"))
    low, B, C = np.split(_dense(u, layer + "Dense_1"), [RANK, RANK + STATES], axis=1)
    dt = np.logaddexp(0, _dense(low, layer + "Dense_2")) + np.float32(1e-4)
    return dict(x=u, dt=dt, A=-np.exp(weights()[layer + "A_log"]), B=B, C=C, D=weights()[layer + "D"]), z


def both_ways(inputs, scan):
    """The outputs of a scan from the left plus those of one from the right."""
    reverse = {name: np.ascontiguousarray(a[::-1]) if name in ("x", "dt", "B", "C") else a
               for name, a in inputs.items()}
    return scan(**inputs) + scan(**reverse)[::-1]


def scores(scan):
    """Scores [bytes, classes]."""
    x = weights()["Embed_0__embedding"][ids()]
    for n in range(LAYERS):
        layer = f"CheckpointMambaBlock1D_{n}__"
        inputs, z = block_inputs(x, layer)
        x = x + _dense(both_ways(inputs, scan) * _silu(z), layer + "Dense_3")
    return _dense(_norm(x, "LayerNorm_0"), "Dense_0")


@pytest.mark.parametrize("chunk_size", [32, 256])
def test_scores(chunk_size):
    found = scores(functools.partial(selective_scan, chunk_size=chunk_size))
    print("largest difference", np.abs(found - expected()).max(), "of scores to", np.abs(expected()).max())
    assert_close(found, expected(), 2e-5, 0)   # of which 1.2e-5 are onnxruntime's distance to float64, 3e-6 ours
    assert (found.argmax(axis=1) == expected().argmax(axis=1)).all()


@functools.cache
def first_block():
    inputs, _ = block_inputs(weights()["Embed_0__embedding"][ids()], "CheckpointMambaBlock1D_0__")
    return inputs


@pytest.mark.parametrize("xp", ["numpy", "standin"], indirect=True)   # machines with a GPU may lack the package
def test_scan_is_its_single_steps(xp):
    """Prefill of the text's first half and updates by the second are the prefill of all of it."""
    on_device = {name: xp.array(a) for name, a in first_block().items()}
    rows, half = len(TEXT), len(TEXT) // 2

    def part(begin, end):
        return {name: a[begin:end] if name in ("x", "dt", "B", "C") else a for name, a in on_device.items()}

    pools = [xp.array(np.full((1, 256, STATES), np.nan, np.float32)) for _ in range(2)]
    new = xp.array(np.array([False]))
    whole = xp.numpy(selective_scan(**on_device, state=pools[0], has_state=new, chunk_size=64))
    want = reference(**first_block())
    bound = 2e-6 * np.abs(want).max()
    assert_close(whole, want, bound, 2e-6)
    assert_close(xp.numpy(selective_scan(**part(0, half), state=pools[1], has_state=new, chunk_size=64)), want[:half],
                 bound, 2e-6)
    for t in range(half, rows):
        assert_close(xp.numpy(selective_state_update(pools[1], **part(t, t + 1))), want[t:t + 1], bound, 2e-6)
    assert_close(xp.numpy(pools[1]), xp.numpy(pools[0]), 2e-6 * np.abs(xp.numpy(pools[0])).max(), 2e-6)
