"""Checkpoint to bundle: the model definition, checkpoint reading and the ONNX export."""
