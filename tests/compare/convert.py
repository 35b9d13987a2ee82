"""Writes a small float ONNX network as TFLite, so that LiteRT runs the very same weights.

It knows the operators of the networks compared here and refuses others by name. Nothing is
approximated: tensors become NHWC, a bias or ReLU that only one operator needs is fused into it (as
TensorFlow's own converter does), padding that TFLite has no name for becomes a PAD operator, and
the weights behind a flattening are reordered instead of the activations.

    python convert.py model.onnx model.tflite
"""

import sys

import flatbuffers
import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as tfl
from onnx import numpy_helper


class Unknown(Exception):
    """An operator or attribute that has no counterpart here."""


def convert(onnx_path, tflite_path):
    """Converts a file; returns nothing."""
    graph = onnx.load(onnx_path).graph
    writer = Writer()
    net = Network(graph, writer)
    net.build()
    with open(tflite_path, "wb") as file:
        file.write(writer.finish(net.inputs, net.outputs))


class Network:
    """Walks an ONNX graph and emits TFLite operators."""

    def __init__(self, graph, writer):
        self.graph, self.writer = graph, writer
        self.constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
        # Of each activation: its tensor in the TFLite file and its shape there (NHWC or rows).
        self.values = {}
        # Flattened activations: the (height, width, channels) they had.
        self.flattened = {}
        self.uses = {}
        for node in graph.node:
            for name in node.input:
                self.uses.setdefault(name, []).append(node)
        self.fused = set()
        self.inputs, self.outputs = [], []

    def build(self):
        for value in self.graph.input:
            if value.name in self.constants:
                continue
            n, c, h, w = [d.dim_value or 1 for d in value.type.tensor_type.shape.dim]
            self.values[value.name] = self.writer.tensor([n, h, w, c], value.name), [n, h, w, c]
            self.inputs.append(self.values[value.name][0])
        # First, since a constant may be made after the node it is fused into.
        for node in self.graph.node:
            if all(name in self.constants for name in node.input):
                self.fold(node)
        for node in self.graph.node:
            if node.output[0] not in self.fused and node.output[0] not in self.constants:
                handler = getattr(self, f"op_{node.op_type.lower()}", None)
                if handler is None:
                    raise Unknown(f"operator {node.op_type} ({node.name})")
                handler(node, {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute})
        self.outputs = [self.values[o.name][0] for o in self.graph.output]

    def fold(self, node):
        if node.op_type != "Reshape":
            raise Unknown(f"constant {node.op_type}")
        data, shape = (self.constants[name] for name in node.input)
        self.constants[node.output[0]] = data.reshape(shape)

    def only_user(self, name, op_type):
        """The one node that uses a value, if it is of this type and the value is no output."""
        users = self.uses.get(name, [])
        if len(users) == 1 and users[0].op_type == op_type:
            if name not in [o.name for o in self.graph.output]:
                return users[0]
        return None

    def bias_and_relu(self, name, channels, bias):
        """Fuses `+ constant` (where there is no bias yet) and ReLU; gives (name, bias, act)."""
        user = self.only_user(name, "Add") if bias is None else None
        if user is not None:
            other = next(i for i in user.input if i != name)
            if other in self.constants and self.constants[other].size == channels:
                bias = self.constants[other].reshape(channels)
                name = self.take(user)
        if bias is None:
            bias = np.zeros(channels, np.float32)
        name, act = self.relu(name)
        return name, bias, act

    def relu(self, name):
        user = self.only_user(name, "Relu")
        if user is None:
            return name, tfl.ActivationFunctionType.NONE
        return self.take(user), tfl.ActivationFunctionType.RELU

    def take(self, node):
        self.fused.add(node.output[0])
        return node.output[0]

    def emit(self, code, inputs, shape, name, options):
        out = self.writer.tensor(shape, name)
        self.writer.operator(code, inputs, [out], options)
        self.values[name] = out, shape

    def padded(self, name, kernel, strides, attrs):
        """The input of a window operator, the padding it needs, and its output's rows, columns."""
        tensor, (n, h, w, c) = self.values[name]
        if list(attrs.get("dilations", [1, 1])) != [1, 1] or attrs.get("group", 1) != 1:
            raise Unknown("dilation or groups")
        auto = attrs.get("auto_pad", b"NOTSET").decode()
        pads = list(attrs.get("pads", [0, 0, 0, 0]))
        if auto == "SAME_UPPER":
            out = [-(-side // s) for side, s in zip((h, w), strides)]
            return tensor, tfl.Padding.SAME, out
        if auto not in ("NOTSET", "VALID"):
            raise Unknown(f"auto_pad {auto}")
        top, left, bottom, right = pads
        sides = h + top + bottom, w + left + right
        out = [(side - k) // s + 1 for side, k, s in zip(sides, kernel, strides)]
        centred = [p == (k - 1) // 2 for p, k in zip(pads, list(kernel) * 2)]
        if list(strides) == [1, 1] and all(centred) and all(k % 2 for k in kernel) and any(pads):
            return tensor, tfl.Padding.SAME, out
        if any(pads):
            amounts = self.writer.constant(
                np.array([[0, 0], [top, bottom], [left, right], [0, 0]], np.int32), "pads"
            )
            shape = [n, *sides, c]
            inner = self.writer.tensor(shape, f"{name}.padded")
            self.writer.operator(
                tfl.BuiltinOperator.PAD, [tensor, amounts], [inner], tfl.PadOptionsT()
            )
            tensor = inner
        return tensor, tfl.Padding.VALID, out

    def op_conv(self, node, attrs):
        weight = self.constants[node.input[1]]
        bias = self.constants[node.input[2]] if len(node.input) > 2 else None
        kernel, strides = weight.shape[2:], attrs.get("strides", [1, 1])
        tensor, padding, (h, w) = self.padded(node.input[0], kernel, strides, attrs)
        channels = weight.shape[0]
        name, bias, act = self.bias_and_relu(node.output[0], channels, bias)
        options = tfl.Conv2DOptionsT()
        options.padding, options.fusedActivationFunction = padding, act
        options.strideH, options.strideW = strides
        inputs = [
            tensor,
            self.writer.constant(weight.transpose(0, 2, 3, 1), f"{name}.weight"),
            self.writer.constant(bias, f"{name}.bias"),
        ]
        self.emit(tfl.BuiltinOperator.CONV_2D, inputs, [1, h, w, channels], name, options)

    def op_maxpool(self, node, attrs):
        kernel, strides = attrs["kernel_shape"], attrs.get("strides", [1, 1])
        if any(attrs.get("pads", [])):
            raise Unknown("padded MaxPool")
        tensor, padding, (h, w) = self.padded(node.input[0], kernel, strides, attrs)
        options = tfl.Pool2DOptionsT()
        options.padding = padding
        options.filterHeight, options.filterWidth = kernel
        options.strideH, options.strideW = strides
        channels = self.values[node.input[0]][1][3]
        code = tfl.BuiltinOperator.MAX_POOL_2D
        self.emit(code, [tensor], [1, h, w, channels], node.output[0], options)

    def op_reshape(self, node, attrs):
        self.op_flatten(node, attrs)

    def op_flatten(self, node, _attrs):
        tensor, shape = self.values[node.input[0]]
        _, h, w, c = shape
        length = h * w * c
        options = tfl.ReshapeOptionsT()
        options.newShape = [1, length]
        target = self.writer.constant(np.array([1, length], np.int32), f"{node.output[0]}.shape")
        code = tfl.BuiltinOperator.RESHAPE
        self.emit(code, [tensor, target], [1, length], node.output[0], options)
        self.flattened[node.output[0]] = h, w, c

    def op_gemm(self, node, attrs):
        if attrs.get("alpha", 1.0) != 1.0 or attrs.get("beta", 1.0) != 1.0 or attrs.get("transA"):
            raise Unknown("scaled or transposed Gemm")
        weight = self.constants[node.input[1]]
        bias = self.constants[node.input[2]] if len(node.input) > 2 else None
        self.dense(node, weight if attrs.get("transB") else weight.T, bias)

    def op_matmul(self, node, _attrs):
        self.dense(node, self.constants[node.input[1]].T, None)

    def dense(self, node, weight, bias):
        """`weight` is output × input, its columns in the order of ONNX."""
        if node.input[0] in self.flattened:
            h, w, c = self.flattened[node.input[0]]
            weight = weight.reshape(-1, c, h, w).transpose(0, 2, 3, 1).reshape(len(weight), -1)
        name, bias, act = self.bias_and_relu(node.output[0], len(weight), bias)
        options = tfl.FullyConnectedOptionsT()
        options.fusedActivationFunction = act
        inputs = [
            self.values[node.input[0]][0],
            self.writer.constant(weight, f"{name}.weight"),
            self.writer.constant(bias, f"{name}.bias"),
        ]
        code = tfl.BuiltinOperator.FULLY_CONNECTED
        self.emit(code, inputs, [1, len(weight)], name, options)

    def op_add(self, node, _attrs):
        operands = [self.values[name] for name in node.input]
        name, act = self.relu(node.output[0])
        options = tfl.AddOptionsT()
        options.fusedActivationFunction = act
        tensors = [tensor for tensor, _ in operands]
        self.emit(tfl.BuiltinOperator.ADD, tensors, operands[0][1], name, options)

    def op_relu(self, node, _attrs):
        tensor, shape = self.values[node.input[0]]
        self.emit(tfl.BuiltinOperator.RELU, [tensor], shape, node.output[0], None)


class Writer:
    """A TFLite file in the making."""

    # The options' type of each operator.
    OPTIONS = {
        tfl.BuiltinOperator.CONV_2D: tfl.BuiltinOptions.Conv2DOptions,
        tfl.BuiltinOperator.MAX_POOL_2D: tfl.BuiltinOptions.Pool2DOptions,
        tfl.BuiltinOperator.RESHAPE: tfl.BuiltinOptions.ReshapeOptions,
        tfl.BuiltinOperator.FULLY_CONNECTED: tfl.BuiltinOptions.FullyConnectedOptions,
        tfl.BuiltinOperator.ADD: tfl.BuiltinOptions.AddOptions,
        tfl.BuiltinOperator.PAD: tfl.BuiltinOptions.PadOptions,
        tfl.BuiltinOperator.RELU: tfl.BuiltinOptions.NONE,
    }

    def __init__(self):
        # The first buffer of a file is empty by convention: tensors without data name it.
        self.buffers, self.tensors, self.operators, self.codes = [tfl.BufferT()], [], [], []

    def tensor(self, shape, name, buffer=0, kind=tfl.TensorType.FLOAT32):
        tensor = tfl.TensorT()
        tensor.shape, tensor.name, tensor.buffer, tensor.type = list(shape), name, buffer, kind
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def constant(self, array, name):
        kinds = {"float32": tfl.TensorType.FLOAT32, "int32": tfl.TensorType.INT32}
        buffer = tfl.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        self.buffers.append(buffer)
        return self.tensor(array.shape, name, len(self.buffers) - 1, kinds[array.dtype.name])

    def operator(self, code, inputs, outputs, options):
        if code not in self.codes:
            self.codes.append(code)
        operator = tfl.OperatorT()
        operator.opcodeIndex = self.codes.index(code)
        operator.inputs, operator.outputs = inputs, outputs
        operator.builtinOptionsType, operator.builtinOptions = self.OPTIONS[code], options
        self.operators.append(operator)

    def finish(self, inputs, outputs):
        model = tfl.ModelT()
        model.version, model.description, model.buffers = 3, "converted from ONNX", self.buffers
        model.operatorCodes = []
        for code in self.codes:
            entry = tfl.OperatorCodeT()
            entry.builtinCode, entry.deprecatedBuiltinCode, entry.version = code, min(code, 127), 1
            model.operatorCodes.append(entry)
        graph = tfl.SubGraphT()
        graph.tensors, graph.operators = self.tensors, self.operators
        graph.inputs, graph.outputs, graph.name = inputs, outputs, "main"
        model.subgraphs = [graph]
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        convert(*sys.argv[1:])
    except Unknown as error:
        sys.exit(f"{sys.argv[1]}: {error} is not known to this converter")
