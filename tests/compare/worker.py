"""ONNX Runtime or LiteRT behind the line protocol of `flywheel-agent bench --stdin`.

Reads `run FIRST COUNT` and `memory` on stdin, answers one line of JSON each; the first line says
`ready`. It does what a plain script would do: Pillow opens the picture, NumPy prepares it, the
runtime runs it on one thread, argmax decides.

    python worker.py ort|litert MODEL FOLDER SPEC_JSON
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image


class Ort:
    def __init__(self, model):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        self.session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self.name = self.session.get_inputs()[0].name
        self.channels_last = False

    def prepare(self, values):
        return values

    def run(self, values):
        return self.session.run(None, {self.name: values})[0][0]


class LiteRt:
    def __init__(self, model):
        from ai_edge_litert.interpreter import Interpreter

        self.interpreter = Interpreter(model_path=model, num_threads=1)
        self.interpreter.allocate_tensors()
        self.input = self.interpreter.get_input_details()[0]
        self.output = self.interpreter.get_output_details()[0]["index"]
        self.channels_last = True

    def prepare(self, values):
        """Of a quantised model, the input is quantised too."""
        if self.input["dtype"] == np.float32:
            return values
        scale, zero = self.input["quantization"]
        limits = np.iinfo(self.input["dtype"])
        scaled = np.round(values / scale) + zero
        return np.clip(scaled, limits.min, limits.max).astype(self.input["dtype"])

    def run(self, values):
        self.interpreter.set_tensor(self.input["index"], values)
        self.interpreter.invoke()
        return self.interpreter.get_tensor(self.output)[0]


def memory():
    fields = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
    )
    kib = lambda name: int(fields[name].split()[0])
    return {"rss_kib": kib("VmRSS"), "peak_rss_kib": kib("VmHWM")}


def main():
    runtime, model, folder, spec = sys.argv[1:]
    spec = json.loads(spec)
    channels, height, width = spec["input"]
    divisor = np.float32(spec["divisor"])
    shape = (1, 1, channels)
    mean = np.array(spec["mean"][:channels], np.float32).reshape(shape)
    std = np.array(spec["std"][:channels], np.float32).reshape(shape)
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix in (".png", ".jpg"))
    engine = {"ort": Ort, "litert": LiteRt}[runtime](model)

    def read(index):
        picture = Image.open(files[index])
        return picture.convert("L" if channels == 1 else "RGB")

    def preprocess(picture):
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        values = np.asarray(picture, np.float32).reshape(height, width, channels)
        values = (values / divisor - mean) / std
        if not engine.channels_last:
            values = np.ascontiguousarray(values.transpose(2, 0, 1))
        return engine.prepare(values[None])

    def say(answer):
        print(json.dumps(answer), flush=True)

    engine.run(preprocess(read(0)))
    say({"ready": True, "engine": runtime, "frames": len(files)})
    for line in sys.stdin:
        words = line.split()
        if words[0] == "memory":
            say(memory())
            continue
        first, count = int(words[1]), int(words[2])
        answer = {k: [] for k in ("top1", "read", "preprocess", "infer", "score", "total")}
        for index in range(first, first + count):
            border = [time.perf_counter_ns()]
            picture = read(index)
            border.append(time.perf_counter_ns())
            values = preprocess(picture)
            border.append(time.perf_counter_ns())
            logits = engine.run(values)
            border.append(time.perf_counter_ns())
            top1 = int(np.argmax(logits))
            border.append(time.perf_counter_ns())
            laps = [b - a for a, b in zip(border, border[1:])]
            for stage, lap in zip(("read", "preprocess", "infer", "score"), laps):
                answer[stage].append(lap)
            answer["top1"].append(top1)
            answer["total"].append(border[-1] - border[0])
        say(answer)


if __name__ == "__main__":
    main()
