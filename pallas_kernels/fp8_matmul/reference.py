"""The contract of FP8 products: which values are multiplied and where they are rounded, in the plainest jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.formats import decode_e4m3, decode_e8m0

BLOCK = 128  # weights and channels that share a scale


def check_shapes(x, w, scale, x_scale=None) -> None:
    """Raise where the operands of `fp8_matmul` do not fit each other or have types it does not know."""
    N, K = w.shape
    blocks = -(-N // BLOCK), -(-K // BLOCK)
    if w.dtype != jnp.float8_e4m3fn or x.shape[-1] != K or scale.shape != blocks:
        raise ValueError(
            f"fp8_matmul: x {x.shape} and scale {scale.shape} do not fit w {w.dtype}{list(w.shape)}: "
            f"x must have {K} channels, w be float8_e4m3fn and scale {blocks}"
        )
    codes = x.dtype == jnp.float8_e4m3fn
    if codes != (x_scale is not None) or (not codes and x.dtype not in (jnp.bfloat16, jnp.float32)):
        raise ValueError(f"fp8_matmul: x is {x.dtype}; give bfloat16 or float32, or float8_e4m3fn with an x_scale")
    if x_scale is not None and x_scale.shape != (*x.shape[:-1], blocks[1]):
        raise ValueError(f"fp8_matmul: x_scale {x_scale.shape} must be {(*x.shape[:-1], blocks[1])} for x {x.shape}")
    for name, array in (("scale", scale), ("x_scale", x_scale)):
        if array is not None and array.dtype not in (jnp.uint8, jnp.float32):
            raise ValueError(f"fp8_matmul: {name} is {array.dtype}; give uint8 (e8m0 exponent bytes) or float32")


def result_dtype(x: jax.Array, out_dtype) -> jnp.dtype:
    """`out_dtype`, or x's own where that is wide, or bfloat16."""
    default = jnp.bfloat16 if x.dtype == jnp.float8_e4m3fn else x.dtype
    return jnp.dtype(default if out_dtype is None else out_dtype)


def scale_value(scale: jax.Array) -> jax.Array:
    """uint8 e8m0 or float32 -> float32."""
    return decode_e8m0(scale) if scale.dtype == jnp.uint8 else scale


def fp8_matmul(x, w, scale, *, x_scale=None, out_dtype=None):
    """x times w transposed, each block of 128 x 128 weights with its scale.

    Args:
      x: [..., K] bfloat16 or float32, or float8_e4m3fn codes (with `x_scale`).
      w: float8_e4m3fn [N, K], as stored: out, in. The two NaN codes do not occur.
      scale: uint8 e8m0 exponent bytes or float32, [ceil(N / 128), ceil(K / 128)]; last blocks may be partial.
      x_scale: None, or uint8 e8m0 or float32 [..., ceil(K / 128)]: one for a row's 128 channels.
      out_dtype: of the result; x's by default, bfloat16 for codes.
    Returns:
      [..., N]: products and sums in fp32 (float32 x is multiplied exactly), rounded once. Implementations may sum in
      another order, and where scales are powers of two apply them before the product, which is exact.
    Raises:
      ValueError: the shapes or types disagree.
    Source: architecture 8.1.
    """
    check_shapes(x, w, scale, x_scale)
    N, K = w.shape
    weights, rows = scale_value(scale), None if x_scale is None else scale_value(x_scale)
    total = jnp.zeros((*x.shape[:-1], N), jnp.float32)
    for block, start in enumerate(range(0, K, BLOCK)):
        cut = slice(start, min(start + BLOCK, K))
        a = decode_e4m3(x[..., cut]) if rows is not None else x[..., cut].astype(jnp.float32)
        part = jnp.einsum("...k,nk->...n", a, decode_e4m3(w[:, cut]), precision="highest")
        part *= jnp.repeat(weights[:, block], BLOCK)[:N]
        total += part if rows is None else part * rows[..., block, None]
    return total.astype(result_dtype(x, out_dtype))


def check_groups(o, cos, sin, w, scale, groups: int) -> None:
    """Raise where the operands of `grouped_output_projection` do not fit each other."""
    B, T, H, D = o.shape
    R = 2 * cos.shape[-1]
    if cos.shape != sin.shape or cos.shape[:2] != (B, T) or R > D:
        raise ValueError(f"grouped_output_projection: cos {cos.shape} and sin {sin.shape} do not fit o {o.shape}")
    blocks = tuple(-(-n // BLOCK) for n in w.shape)
    if H % groups or w.shape[0] % groups or w.shape[1] * groups != H * D or scale.shape != blocks:
        raise ValueError(
            f"grouped_output_projection: w {w.shape} with scale {scale.shape} does not fit o {o.shape} in {groups} "
            f"groups: w must be [{groups} * O, {H * D} / {groups}] and scale {blocks}"
        )


def block_rows(group: int, rows: int) -> tuple[slice, slice]:
    """Whole 128-row blocks that hold rows group * rows .. of a weight, and where in them those rows are."""
    start, stop = group * rows, (group + 1) * rows
    first = start // BLOCK * BLOCK
    return slice(first, -(-stop // BLOCK) * BLOCK), slice(start - first, stop - first)


def inverse_rope(o, cos, sin):
    """Turn back interleaved pairs of the trailing channels of o [B, T, H, D] by cos, sin [B, T, R / 2], in fp32."""
    return turn(o, cos[:, :, None], -sin[:, :, None])


def turn(x, cos, sin):
    """Turn interleaved pairs of the trailing channels of x [..., D] by cos, sin [..., R / 2], broadcast, in fp32."""
    half = cos.shape[-1]
    still, turning = x[..., : -2 * half], x[..., -2 * half :].astype(jnp.float32)
    cos, sin = (table.astype(jnp.float32) for table in (cos, sin))
    pairs = turning.reshape(*turning.shape[:-1], half, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(turning.shape)
    return jnp.concatenate([still, turned.astype(x.dtype)], axis=-1)


def grouped_output_projection(o, cos, sin, w, scale, *, groups: int):
    """Turn attention outputs back by RoPE and project each group of heads with its own rows of w.

    Args:
      o: bfloat16 or float32 [B, T, H, D].
      cos, sin: float32 [B, T, R / 2], of the queries' positions; they turn the trailing R channels, in pairs.
      w, scale: as in `fp8_matmul`; w [G * O, H / G * D], rows g * O .. are those of group g.
      groups: G.
    Returns:
      [B, T, G * O] in o.dtype. The turned channels are rounded to o.dtype before the product.
    Raises:
      ValueError: the shapes disagree.
    Source: architecture 3.4 (inverse RoPE on the output) and 3.5.
    """
    check_groups(o, cos, sin, w, scale, groups)
    B, T = o.shape[:2]
    x = inverse_rope(o, cos, sin).reshape(B, T, groups, -1)
    rows = w.shape[0] // groups
    parts = []
    for g in range(groups):
        held, wanted = block_rows(g, rows)
        blocks = slice(held.start // BLOCK, held.stop // BLOCK)
        parts.append(fp8_matmul(x[:, :, g], w[held], scale[blocks])[..., wanted])
    return jnp.concatenate(parts, axis=-1)
