"""Rewrites of an exported graph for a runtime that lacks a kernel; the meaning stays the same.

ONNX Runtime's CPU provider has no kernel for ``GroupNormalization`` and expands it into some twenty nodes.
An instance normalisation over grouped channels is the same arithmetic in five, with a kernel each: on a
small U-Net the difference is a fifth of the time.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np


def for_onnxruntime_cpu(path: Path) -> int:
    """Rewrite ``path`` in place; returns the number of nodes that were lowered."""
    import onnx_ir as ir

    model = ir.load(path)
    graph = model.graph
    made: dict[str, ir.Value] = {}

    def constant(name: str, array: np.ndarray) -> ir.Value:
        if name not in made:
            value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
            graph.register_initializer(value)
            made[name] = value
        return made[name]

    count = 0
    for node in list(graph):
        if node.op_type != "GroupNormalization" or node.domain not in ("", "ai.onnx"):
            continue
        x, scale, bias = node.inputs
        if (
            x is None
            or scale is None
            or bias is None
            or scale.const_value is None
            or bias.const_value is None
            or x.shape is None
        ):
            continue
        groups = node.attributes["num_groups"].as_int()
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        name = node.outputs[0].name or f"group_norm.{count}"
        grouped = constant(f"lowered.groups_{groups}", np.array([0, groups, -1], np.int64))
        # the spatial size is only known symbolically when it is dynamic; then ask the graph for it
        if all(isinstance(d, int) for d in x.shape[1:]):
            full = constant(f"{name}.shape", np.array([0, *(int(d) for d in x.shape[1:])], np.int64))
            extra = []
        else:
            shape_of = ir.Node("", "Shape", [x])
            full, extra = shape_of.outputs[0], [shape_of]
        flat = ir.Node("", "Reshape", [x, grouped])
        normed = ir.Node(
            "", "InstanceNormalization",
            [flat.outputs[0], constant(f"lowered.one_{groups}", np.ones(groups, np.float32)),
             constant(f"lowered.zero_{groups}", np.zeros(groups, np.float32))],
            attributes=[ir.AttrFloat32("epsilon", epsilon)],
        )  # fmt: skip
        back = ir.Node("", "Reshape", [normed.outputs[0], full])
        rank = len(x.shape)
        column = (-1, *(1,) * (rank - 2))
        scaled = ir.Node(
            "", "Mul", [back.outputs[0], constant(f"{name}.scale", scale.const_value.numpy().reshape(column).copy())]
        )
        shifted = ir.Node(
            "", "Add", [scaled.outputs[0], constant(f"{name}.bias", bias.const_value.numpy().reshape(column).copy())]
        )
        new = [*extra, flat, normed, back, scaled, shifted]
        for i, made_node in enumerate(new):
            made_node.outputs[0].name = f"{name}.gn{i}"
        final = shifted.outputs[0]
        final.shape, final.type = node.outputs[0].shape, node.outputs[0].type
        graph.insert_before(node, new)
        ir.convenience.replace_all_uses_with(node.outputs[0], final)
        graph.remove(node, safe=True)
        count += 1
    if count:
        # the old weights are memory-mapped from the file that is about to be replaced
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=value.name)
        ir.save(model, path, external_data=path.name + ".data")
    return count
