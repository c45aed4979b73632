# SPDX-License-Identifier: Apache-2.0
"""quant_gemm's shapes through other libraries, those that are installed, in a process with torch, which ours never has.

    python perf/peers_quant_gemm.py [--rows FILE]

Needs a GPU and torch; peers: tinygemm (torch's own ``_weight_int4pack_mm``), bitsandbytes (NF4), gemlite (int4) and
humming (int4). int4 has groups of 128, NF4 blocks of 64; activations are bfloat16 for tinygemm, else float16. Each
result is compared with a plain product of the weights the peer itself dequantizes to before it is timed as
``perf/timing.py`` times ours: calls over rotating copies of the weight, four times the L2 cache together, in one CUDA
graph. A peer that is missing or fails is named, and the others go on. ``--rows FILE`` appends JSON lines of the form
that ``perf/table.py`` prints, whose baseline is cuBLAS through torch.
"""

import argparse
import importlib.util
import json
import statistics
import sys
from functools import partial
from pathlib import Path

GROUP = 128
WRONG = 0.02   # relative Frobenius, from which on a result is not timed: weights of the wrong scale or order


def seconds_per_call(torch, calls, rounds=20):
    """Median time of one of `calls`, captured together."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        times = []
        for _ in range(rounds + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3 / len(calls))
    return statistics.median(times[2:])


# A peer is a function of torch and weights [N, K] that returns (dtype of x, function that makes a copy of the packed
# weight, function of x and such a copy that multiplies, the weights it stands for).

def tinygemm(torch, w):
    """torch.ops.aten._weight_int4pack_mm, asymmetric int4, bfloat16."""
    n, k = w.shape
    groups = w.float().reshape(n, k // GROUP, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-6)
    codes = ((groups - low) / scale).round().clamp(0, 15)
    scale, zero = scale.bfloat16(), (low + 8 * scale).bfloat16()   # weight = (code - 8) * scale + zero
    values = ((codes - 8) * scale.float() + zero.float()).reshape(n, k)
    codes = codes.reshape(n, k).int()
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    both = torch.cat([scale, zero], -1).transpose(0, 1).contiguous()   # [groups, N, 2]

    def multiply(x, weight):
        return torch.ops.aten._weight_int4pack_mm(x, weight[0], GROUP, weight[1])

    return torch.bfloat16, lambda: (packed.clone(), both.clone()), multiply, values


def bitsandbytes(torch, w):
    """matmul_4bit with NF4, blocks of 64."""
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(w.half(), blocksize=64, quant_type="nf4")

    def multiply(x, weight):
        return bnb.matmul_4bit(x, weight.t(), quant_state=state)

    return torch.float16, packed.clone, multiply, bnb.functional.dequantize_4bit(packed, state).float()


def gemlite(torch, w):
    """GemLiteLinear, int4 with groups of 128."""
    from gemlite.core import DType, GemLiteLinear, set_autotune

    set_autotune(False)   # it ships a table
    n, k = w.shape
    groups = w.float().reshape(n, k // GROUP, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-6).half().float()
    zero = (-low / scale).round()
    codes = (groups / scale + zero).round().clamp(0, 15)
    values = ((codes - zero) * scale).reshape(n, k)

    def packed():
        layer = GemLiteLinear(4, group_size=GROUP, in_features=k, out_features=n, input_dtype=DType.FP16,
                              output_dtype=DType.FP16)
        layer.pack(codes.reshape(n, k).to(torch.uint8), scale.reshape(n, -1).half(), zero.reshape(n, -1).half(), None)
        return layer

    return torch.float16, packed, lambda x, layer: layer(x), values


def humming(torch, w):
    """HummingLayer, int4 with groups of 128."""
    from humming.layer import HummingLayer

    n, k = w.shape
    half = w.half()

    def packed():
        layer = HummingLayer(shape_n=n, shape_k=k, torch_dtype=torch.float16,
                             weight_config={"dtype": "uint4", "group_size": GROUP, "has_zero_point": True}).cuda()
        layer.load_from_unquantized(half)
        layer.transform()
        return layer

    values = packed()(torch.eye(k, dtype=torch.float16, device="cuda")).t().float()   # it has no function for them
    return torch.float16, packed, lambda x, layer: layer(x), values


PEERS = (tinygemm, bitsandbytes, gemlite, humming)
NEEDS = {"tinygemm": "torch", "bitsandbytes": "bitsandbytes", "gemlite": "gemlite", "humming": "humming"}


def measure(torch, peer, shape, keep):
    """Check and time one peer at all numbers of tokens of a shape."""
    n, k = shape.rows, shape.columns
    w = torch.randn(n, k, device="cuda") * 0.05
    dtype, copy, multiply, values = peer(torch, w)
    l2 = 4 * torch.cuda.get_device_properties(0).L2_cache_size
    weights, plain = ([make() for _ in range(max(2, -(-l2 // nbytes)))] for make, nbytes in (
        (copy, n * k // 2), (lambda: values.to(dtype), 2 * n * k)))
    for tokens in shape.tokens:
        x = torch.randn(tokens, k, device="cuda", dtype=dtype)
        want = x.float() @ values.T
        error = float((multiply(x, weights[0]).float() - want).norm() / want.norm())
        if not error < WRONG:
            raise ValueError(f"{n}x{k}, {tokens} tokens: result is off by {error:.2g}; nothing is timed that is wrong")
        seconds = seconds_per_call(torch, [partial(multiply, x, weight) for weight in weights])
        cublas = seconds_per_call(torch, [partial(torch.matmul, x, weight.T) for weight in plain])
        keep({"op": peer.__name__, "shape": f"{shape.name} {n}x{k} tokens {tokens}", "seconds": seconds,
              "device": torch.cuda.get_device_name(), "nbytes": n * k // 2 + 4 * n * k // GROUP + 2 * tokens * (n + k),
              "flops": 2 * tokens * n * k, "baseline_seconds": cublas})


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=Path, metavar="FILE", help="append one JSON line per product to FILE")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("torch") is None:
        print("peers_quant_gemm: torch is not installed; nothing was measured", file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print("peers_quant_gemm: torch finds no GPU; nothing was measured", file=sys.stderr)
        return 2
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    from shapes import matmuls
    from table import markdown

    rows = []

    def keep(row):
        rows.append(row)
        if options.rows:
            with open(options.rows, "a") as file:
                file.write(json.dumps(row) + "\n")

    for peer in PEERS:
        if importlib.util.find_spec(NEEDS[peer.__name__]) is None:
            print(f"{peer.__name__}: not installed", file=sys.stderr)
            continue
        try:
            for shape in matmuls():
                measure(torch, peer, shape, keep)
        except Exception as error:   # one peer's trouble is not the others'
            print(f"{peer.__name__}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                  file=sys.stderr)
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
