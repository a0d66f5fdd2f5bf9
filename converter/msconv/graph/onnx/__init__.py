"""ONNX files of a decoder: its graph in ONNX's operators, its weights where the artifact has them.

Two forms: one graph for any shape with the fused operators of opset 23, and plain operators of opset 17 with fixed
shapes.  From the same configuration and stored weights as every other graph; needs no MindSpore.
"""
