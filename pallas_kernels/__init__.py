"""Operations on arrays, one folder each: a jnp reference that is the contract, and the kernels that keep it."""
