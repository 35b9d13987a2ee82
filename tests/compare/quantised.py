"""Writes a quantised TFLite network as ONNX with QuantizeLinear and DequantizeLinear (QDQ), so that
ONNX Runtime and Flywheel are given the very same integers as LiteRT (tract computes with them in
float).

It knows the operators of the MLPerf Tiny ResNet and refuses others by name. The ONNX file takes
f32, NCHW, pixels divided by 255, and gives the logits: a final softmax is left out.

    python quantised.py model.tflite model.onnx
"""

import sys

import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as tfl
from onnx import TensorProto, helper, numpy_helper

from convert import Unknown

NAMES = {
    value: name for name, value in vars(tfl.BuiltinOperator).items() if isinstance(value, int)
}
KINDS = {tfl.TensorType.INT8: np.int8, tfl.TensorType.INT32: np.int32}


def convert(tflite_path, onnx_path):
    """Converts a file; returns nothing."""
    with open(tflite_path, "rb") as file:
        data = file.read()
    model = tfl.ModelT.InitFromObj(tfl.Model.GetRootAs(data, 0))
    network = Network(model)
    onnx.save(network.build(), onnx_path)


class Network:
    """Walks the one graph of a TFLite model and emits ONNX nodes."""

    def __init__(self, model):
        self.model, self.graph = model, model.subgraphs[0]
        self.nodes, self.constants = [], []
        # Of each activation: the name of its dequantised value.
        self.values = {}

    def build(self):
        source = self.graph.inputs[0]
        _, height, width, channels = self.graph.tensors[source].shape
        scale, zero = self.quantisation(source)
        if (scale, zero) != (1.0, -128):
            raise Unknown(f"an input of scale {scale} and zero {zero}")
        shape = [1, int(channels), int(height), int(width)]
        declared = helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)
        # The network's own values are pixels from 0 to 255; what it is given is 0 to 1.
        zero = self.constant(np.int8(zero))
        given = [self.constant(np.float32(scale / 255)), zero]
        pixels = self.node("QuantizeLinear", ["input", *given])
        own = [pixels, self.constant(np.float32(scale)), zero]
        self.values[source] = self.node("DequantizeLinear", own)
        for operator in self.graph.operators:
            code = self.model.operatorCodes[operator.opcodeIndex]
            name = NAMES[max(code.builtinCode, code.deprecatedBuiltinCode)]
            handler = getattr(self, f"op_{name.lower()}", None)
            if handler is None:
                raise Unknown(f"operator {name}")
            handler(operator, operator.builtinOptions)
        last = self.values[self.graph.outputs[0]]
        classes = int(self.graph.tensors[self.graph.outputs[0]].shape[-1])
        output = helper.make_tensor_value_info(last, TensorProto.FLOAT, [1, classes])
        graph = helper.make_graph(self.nodes, "main", [declared], [output], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        onnx.checker.check_model(model)
        return model

    def quantisation(self, tensor):
        q = self.graph.tensors[tensor].quantization
        return float(q.scale[0]), int(q.zeroPoint[0])

    def array(self, tensor):
        entry = self.graph.tensors[tensor]
        data = np.asarray(self.model.buffers[entry.buffer].data, np.uint8)
        return data.view(KINDS[entry.type]).reshape(entry.shape)

    def constant(self, array):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, kind, inputs, **attributes):
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def requantised(self, value, scale, zero):
        parameters = [self.constant(np.float32(scale)), self.constant(np.int8(zero))]
        quantised = self.node("QuantizeLinear", [value, *parameters])
        return self.node("DequantizeLinear", [quantised, *parameters])

    def finish(self, operator, value, activation):
        if activation == tfl.ActivationFunctionType.RELU:
            value = self.node("Relu", [value])
        elif activation != tfl.ActivationFunctionType.NONE:
            raise Unknown(f"activation {activation}")
        out = operator.outputs[0]
        self.values[out] = self.requantised(value, *self.quantisation(out))

    def weights(self, operator, order):
        """Weight and bias, dequantised by channel (the first axis)."""
        tensor, bias = operator.inputs[1], operator.inputs[2]
        weight = self.array(tensor)
        scales = np.asarray(self.graph.tensors[tensor].quantization.scale, np.float32)
        scales = np.broadcast_to(scales, len(weight)).copy()
        zeros = np.zeros(len(weight), np.int8)
        weight = self.node(
            "DequantizeLinear",
            [self.constant(weight.transpose(order)), self.constant(scales), self.constant(zeros)],
            axis=0,
        )
        # A bias counts in products of the input's and the weight's units.
        scales = scales * np.float32(self.quantisation(operator.inputs[0])[0])
        inputs = [self.constant(self.array(bias)), self.constant(scales)]
        return weight, self.node("DequantizeLinear", inputs, axis=0)

    def op_conv_2d(self, operator, options):
        if (options.dilationHFactor, options.dilationWFactor) != (1, 1):
            raise Unknown("dilation")
        weight, bias = self.weights(operator, (0, 3, 1, 2))
        same = options.padding == tfl.Padding.SAME
        _, height, width, _ = self.graph.tensors[operator.inputs[1]].shape
        value = self.node(
            "Conv",
            [self.values[operator.inputs[0]], weight, bias],
            kernel_shape=[int(height), int(width)],
            strides=[options.strideH, options.strideW],
            auto_pad="SAME_UPPER" if same else "VALID",
        )
        self.finish(operator, value, options.fusedActivationFunction)

    def op_add(self, operator, options):
        value = self.node("Add", [self.values[tensor] for tensor in operator.inputs])
        self.finish(operator, value, options.fusedActivationFunction)

    def op_average_pool_2d(self, operator, options):
        if options.padding != tfl.Padding.VALID:
            raise Unknown("padded AVERAGE_POOL_2D")
        value = self.node(
            "AveragePool",
            [self.values[operator.inputs[0]]],
            kernel_shape=[options.filterHeight, options.filterWidth],
            strides=[options.strideH, options.strideW],
        )
        self.finish(operator, value, options.fusedActivationFunction)

    def op_reshape(self, operator, _options):
        shape = self.graph.tensors[operator.inputs[0]].shape
        if list(shape[1:3]) != [1, 1]:
            raise Unknown("RESHAPE of rows and columns, which lie otherwise in ONNX")
        value = self.values[operator.inputs[0]]
        self.values[operator.outputs[0]] = self.node("Flatten", [value], axis=1)

    def op_fully_connected(self, operator, options):
        weight, bias = self.weights(operator, (0, 1))
        value = self.node("Gemm", [self.values[operator.inputs[0]], weight, bias], transB=1)
        self.finish(operator, value, options.fusedActivationFunction)

    def op_softmax(self, operator, _options):
        if operator.outputs[0] != self.graph.outputs[0]:
            raise Unknown("SOFTMAX that is not the end")
        self.values[operator.outputs[0]] = self.values[operator.inputs[0]]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        convert(*sys.argv[1:])
    except Unknown as error:
        sys.exit(f"{sys.argv[1]}: {error} is not known to this converter")
