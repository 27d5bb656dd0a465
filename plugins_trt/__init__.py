"""The custom operations of the step graph, one folder each: reference, ONNX face and (later) GPU and TensorRT faces."""
