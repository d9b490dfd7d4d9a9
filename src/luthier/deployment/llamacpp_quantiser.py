"""A process that makes a K-quant: ``SOURCE TARGET KIND THREADS [IMPORTANCE]``; see :mod:`luthier.deployment.k_quants`.

It needs llama-cpp-python, which Luthier itself does not.
"""

from __future__ import annotations

import ctypes
import sys

from safetensors.numpy import load_file


def main(source: str, target: str, kind: str, threads: str, importance: str | None = None) -> int:
    """llama.cpp's own status: 0 where it has written."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    params.nthread = int(threads)
    if importance is not None:
        columns = {name.encode(): values for name, values in load_file(importance).items()}
        entries = (llama_cpp.llama_model_imatrix_data * (len(columns) + 1))()  # the last one, without a name, ends it
        for entry, (name, values) in zip(entries, columns.items(), strict=False):
            entry.name, entry.size = name, values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
