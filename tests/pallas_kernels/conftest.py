"""How these tests run jax."""

import jax

# A kernel in an interpreter calls back into Python, which computes with jax, too: a program that the test dispatched
# meanwhile could hold the very threads those callbacks need, for ever. So every program ends before the next begins.
jax.config.update("jax_cpu_enable_async_dispatch", False)
