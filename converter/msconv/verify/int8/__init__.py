"""The proof of W8A8 artifacts: a reference with the same arithmetic, led where rounding is a tie."""
