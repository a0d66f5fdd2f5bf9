"""What SGLang imports from sgl_kernel.speculative."""

from .drafts import reconstruct_indices_from_tree_mask

__all__ = ["reconstruct_indices_from_tree_mask"]
