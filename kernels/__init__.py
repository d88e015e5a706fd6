"""The kernels: one file an op (Triton kernel and launcher), and `native.py` for the compiled ones.

A launcher takes its op's arguments plus `precision` ("auto", "ieee", "bf16x3" or "bf16") and returns what the
op's reference returns. Beside it may stand, with the same arguments:
`supports(...) -> str | None`: why it cannot run (None: it can), and
`worthwhile(...) -> str | None`: why the reference is faster here, from a measured crossover (None: it is not). It is asked
first and looks at shapes, dtypes and devices only: the tensors may be traced, transformed or of a dtype not supported.
Nothing in this folder imports the rest of hvpfast.
"""

if __name__ != "hvpfast.kernels":
    raise ImportError(
        "this is hvpfast's folder of kernels, not a package named 'kernels': it was found because hvpfast's checkout "
        "is on sys.path. Install hvpfast (`pip install -e .`) and import hvpfast.kernels; to import another package "
        "named 'kernels', take the checkout off sys.path."
    )
