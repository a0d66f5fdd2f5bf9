"""Element types: one table of what each is called, how wide it is and what it can hold.  Imports no framework."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class ElementType:
    """`name`: ours, which is also numpy's, torch's and MindSpore's (but for `other_name`).  `code`: in a
    safetensors header.  `largest`: largest finite value of a float, as text for people; "" for whole numbers.
    `storable`: tensors of an artifact may have it."""

    name: str
    nbytes: int
    code: str
    largest: str = ""
    storable: bool = False
    other_name: str = ""

    @property
    def mindspore(self) -> str:
        """The name of MindSpore's attribute."""
        return self.other_name or self.name

    @property
    def bits(self) -> np.dtype[Any]:
        """Unsigned words of its width."""
        import numpy as np

        return np.dtype(f"<u{self.nbytes}")

    @property
    def array(self) -> np.dtype[Any]:
        """The type of an array that holds it where only numpy is there: its bits, if numpy does not know it."""
        import numpy as np

        return self.bits if self.name in OF_ML_DTYPES else np.dtype(self.name)

    @property
    def numpy(self) -> np.dtype[Any]:
        """The type that computes with it; loads ml_dtypes for what numpy does not know."""
        import numpy as np

        if self.name not in OF_ML_DTYPES:
            return np.dtype(self.name)
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, self.name))


OF_ML_DTYPES = ("bfloat16", "float8_e4m3fn", "float8_e5m2")

DTYPES = {
    t.name: t
    for t in (
        ElementType("float32", 4, "F32", "3.4e38", storable=True),
        ElementType("float16", 2, "F16", "65504", storable=True),
        ElementType("bfloat16", 2, "BF16", "3.4e38", storable=True),
        ElementType("float64", 8, "F64", "1.8e308"),
        ElementType("float8_e4m3fn", 1, "F8_E4M3", "448"),
        ElementType("float8_e5m2", 1, "F8_E5M2", "57344"),
        ElementType("int8", 1, "I8", storable=True),
        ElementType("uint8", 1, "U8"),
        ElementType("int16", 2, "I16"),
        ElementType("uint16", 2, "U16"),
        ElementType("int32", 4, "I32", storable=True),
        ElementType("uint32", 4, "U32"),
        ElementType("int64", 8, "I64"),
        ElementType("uint64", 8, "U64"),
        ElementType("bool", 1, "BOOL", other_name="bool_"),
    )
}
BY_CODE = {t.code: t for t in DTYPES.values()}
ValueDtype = Literal["bfloat16", "float16", "float32"]  # of weights that are stored as values
QUANT = {"w8a8": "w8a8-dynamic"}  # what values can be quantised to, and what a manifest calls it
VALUE_DTYPES: tuple[ValueDtype, ...] = get_args(ValueDtype)


def is_float(dtype: str) -> bool:
    """Whether it is the name of a float type, of any width."""
    return dtype in DTYPES and DTYPES[dtype].largest != ""
