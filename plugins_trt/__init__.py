"""The custom operations of the step, one folder each: reference, Triton kernel and, where ONNX has it, its node."""
