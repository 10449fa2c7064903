"""The contract of the routed experts' products: which rows meet which weights, in the plainest jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.formats import decode_e2m1, decode_e4m3, unpack_fp4
from pallas_kernels.fp8_matmul.reference import BLOCK, scale_value

GROUP = 32  # channels of a packed row that share a scale


def check_shapes(x, block_expert, blocks_used, w, scale, packed: bool, row=None) -> None:
    """Raise where the operands of `expert_matmul` do not fit each other or have types it does not know."""
    (E, N, width), blocks = w.shape, block_expert.shape[0]
    K = 2 * width if packed else width
    kind = jnp.uint8 if packed else jnp.float8_e4m3fn
    if w.dtype != kind or x.ndim != 2 or x.shape[1] != K:
        raise ValueError(
            f"expert_matmul: x {x.shape} does not fit w {w.dtype}{list(w.shape)}: with {packed=}, w must be "
            f"{jnp.dtype(kind).name} [E, N, {'K / 2' if packed else 'K'}] and x [blocks * rows, K]"
        )
    rows = x if row is None else row
    if block_expert.ndim != 1 or not blocks or rows.shape[0] % blocks or jnp.ndim(blocks_used):
        raise ValueError(
            f"expert_matmul: block_expert {block_expert.shape} must name the expert of each of x's blocks, of which "
            f"x {rows.shape} has a whole number, and blocks_used be a number, not {jnp.shape(blocks_used)}"
        )
    shape = (E, N, -(-K // GROUP)) if packed else (E, -(-N // BLOCK), -(-K // BLOCK))
    kinds = (jnp.uint8,) if packed else (jnp.uint8, jnp.float32)
    if scale.shape != shape or scale.dtype not in kinds:
        names = " or ".join(jnp.dtype(k).name for k in kinds)
        raise ValueError(f"expert_matmul: scale is {scale.dtype}{list(scale.shape)}; it must be {names} {list(shape)}")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"expert_matmul: x is {x.dtype}; give bfloat16 or float32")


def expert_values(w, scale, packed: bool):
    """One expert's weights [N, K] in float32."""
    codes = decode_e2m1(unpack_fp4(w)) if packed else decode_e4m3(w)
    N, K = codes.shape
    factor = jnp.repeat(scale_value(scale), GROUP if packed else BLOCK, axis=1)[:, :K]
    return codes * (factor if packed else jnp.repeat(factor, BLOCK, axis=0)[:N])


def pick_rows(x: jax.Array, row: jax.Array | None) -> jax.Array:
    """x [n, K], its rows int32 [S] of at least 0, the last for those there are not -> [S, K]; None: all of them."""
    return x if row is None else x.at[row].get(mode="clip", wrap_negative_indices=False)


def expert_matmul(x, block_expert, blocks_used, w, scale, *, row=None, packed: bool):
    """Rows sorted by expert and cut into blocks, each block times the weights of its expert, transposed.

    Args:
      x: [blocks * R, K] bfloat16 or float32, R rows a block.
      block_expert: int32 [blocks] in [0, E).
      blocks_used: int32 scalar; blocks from there on hold nothing.
      w: `packed`, uint8 [E, N, K / 2]: two e2m1 codes a byte, the low nibble being the even channel; else
        float8_e4m3fn [E, N, K] without NaN codes.
      row: int32 [blocks * R] in [0, n], which rows of an x [n, K] to take; n may give any of them.
      scale: `packed`, uint8 e8m0 exponent bytes [E, N, K / 32]; else uint8 or float32
        [E, ceil(N / 128), ceil(K / 128)].
    Returns:
      [blocks * R, N] in x.dtype: products and sums in fp32 (float32 x is multiplied exactly), rounded once. Blocks that
      are not used are zeros here; implementations read no weights for them, and may leave anything there. They may
      sum in another order, too.
    Raises:
      ValueError: the shapes or types disagree.
    Source: architecture 6 and 8.3.
    """
    check_shapes(x, block_expert, blocks_used, w, scale, packed, row)
    x, blocks = pick_rows(x, row), block_expert.shape[0]

    def product(block):
        rows, expert, used = block
        values = expert_values(w[expert], scale[expert], packed)
        out = jnp.einsum("rk,nk->rn", rows.astype(jnp.float32), values, precision="highest")
        return jnp.where(used, out, 0).astype(x.dtype)

    used = jnp.arange(blocks) < blocks_used
    return jax.lax.map(product, (x.reshape(blocks, -1, x.shape[1]), block_expert, used)).reshape(x.shape[0], -1)
