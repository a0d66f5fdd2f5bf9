"""Proving ONNX files: run by ONNX's reference implementation, and by onnxruntime where it is installed.

Nothing here is shared with what wrote the files but the manifest: values are found by their names.
"""
