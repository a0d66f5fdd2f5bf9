"""Layers proved each by itself, from what enters it in the reference: by as many workers as there are.

What a layer makes is compared with what the reference's layer makes, and the next layer is given the latter.  So a
layer's own error is seen, and not what has added up before it; see docs/proof.md for what follows from that.
"""
