"""The op vocabulary: what hvpfast computes, as plain PyTorch. Kernels replace these bodies; the bodies define them.

`N` samples, `T` shared positions, `I` / `O` input / output features, `K` columns, `M = K N`:
`a` (N, T, I) is a layer's input and `g` (M, T, O) the gradient at its output; row m pairs with `a[m % N]`.
The gradient of sample m with respect to the layer's weight is `g_m' a_m`, (O, I).

Every op accumulates in float32 (float64 for float64) and returns that dtype: 16-bit inputs give float32 results.
"""

from hvpfast.arguments import accumulate_dtype
from hvpfast.ops.factors import conv_gram, gram
from hvpfast.ops.kron import kron_apply, kron_solve
from hvpfast.ops.krylov import cg_update, reorthogonalize
from hvpfast.ops.layers import convolve, matmul
from hvpfast.ops.loss import softmax_hvp, softmax_root, softmax_sample
from hvpfast.ops.rop import activation_rop, linear_rop, norm_rop
from hvpfast.ops.samples import (
    rotated_second_moment,
    sample_dots,
    sample_grads,
    sample_gram,
    sample_norms_squared,
    sample_statistics,
    second_moment,
    weighted_grad,
)
from hvpfast.ops.stats import (
    bias_sample_stats,
    embedding_sample_norms,
    embedding_second_moment,
    norm_sample_stats,
)
