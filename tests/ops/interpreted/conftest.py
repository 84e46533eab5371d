"""Kernels run here by Triton's interpreter, on CPU tensors. Triton decides at import, so this folder needs a process of its own:
`pytest tests/ops/interpreted`; as part of a larger run it is left out."""

import os
from importlib.util import find_spec

interpreting = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
collect_ignore_glob = [] if interpreting else ["test_*.py"]


def _dot_of_bfloat16() -> None:
    """The interpreter keeps bfloat16 as 16-bit integers and its matrix product multiplies those: give it the numbers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def widened(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return plain(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


if interpreting:
    _dot_of_bfloat16()
