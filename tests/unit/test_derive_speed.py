"""Derivation takes a moment, not a wait: it runs whenever a device loads a model or changes its precision."""

from __future__ import annotations

import time

import pytest
from helpers_programs import PRECISIONS, conv, fill, layer, pool, requant, rescale

from bitstrata_runtime import AffineInfo, Node, Program, derive


def resnet_like(widths: list[int], blocks: int) -> Program:
    """A chain of residual stages with 3x3 convolutions, pixels in."""
    layers, affines, nodes = {}, {}, [Node("x", "input")]
    ranges = dict.fromkeys(PRECISIONS, (0, 255))

    def add(source: str, out: int, inner: int, kernel: int, first: bool = False) -> str:
        name = f"l{len(layers)}"
        layers[name] = layer(
            name, (out, inner, kernel, kernel), planes=not first, input_range=ranges if first else None
        )
        affines[name] = AffineInfo(name, out)
        codes = source
        if not first:
            nodes.append(requant(f"{name}.in", source, name, clip=(0.0, None)))
            codes = f"{name}.in"
        nodes.append(conv(f"{name}.acc", codes, name, padding=kernel // 2))
        nodes.append(rescale(f"{name}.out", f"{name}.acc", name))
        return f"{name}.out"

    stream = add("x", widths[0], 3, 3, first=True)
    inner = widths[0]
    for width in widths:
        for _ in range(blocks):
            branch = add(add(stream, width, inner, 3), width, width, 3)
            if width == inner:
                nodes.append(Node(f"{branch}.sum", "add", (stream, branch)))
                branch = f"{branch}.sum"
            stream, inner = branch, width
    nodes.append(pool("pooled", "avgpool", stream, 32, 32))
    output = add("pooled", 10, inner, 1)
    return fill(Program((3, 32, 32), "pixels", tuple(nodes), output, layers, affines, PRECISIONS, {}, {}), 0)


@pytest.mark.parametrize(("widths", "blocks", "limit"), [([16, 32, 64], 3, 0.3), ([64, 128, 256, 512], 2, 3.0)])
def test_derivation_is_fast(widths, blocks, limit):
    """ResNet-20's and ResNet-18's sizes; processor time, so that a busy machine does not matter."""
    program = resnet_like(widths, blocks)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        derive(program, 2)
        seconds.append(time.process_time() - start)
    assert min(seconds) < limit
