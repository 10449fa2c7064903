"""One schedule for the whole model: shared by every layer, the same results with lanes and without, steps in flight."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_cases import FULL, GOLDEN, load_model
from small_models import small

import dsv4_jax
from dsv4_jax import DeepseekV4
from dsv4_jax.attention import CsaAttention
from dsv4_jax.kernels import XlaKernels
from dsv4_jax.numerics import ExactNumerics
from dsv4_jax.schedule import IN_ORDER, AsyncSchedule

LANES = AsyncSchedule(streams=True)


def schedules(model) -> list[AsyncSchedule]:
    return [node.schedule for _, node in nnx.iter_graph(model) if hasattr(node, "schedule")]


@pytest.mark.slow
def test_a_model_with_three_mtp_layers_has_one_schedule_of_three_lanes():
    config = small(3).config
    model = jax.eval_shape(lambda: DeepseekV4(config, max_tokens=512))
    found = schedules(model)
    holders = 1 + 2 * (config.num_hidden_layers + 3) + 3  # the model; attention and experts of each layer; MTP layers
    assert len(found) == holders and len({id(schedule) for schedule in found}) == 1
    assert found[0].lanes == 3


def test_the_parents_schedule_is_handed_down():
    mine = AsyncSchedule(lanes=2, in_flight=1)
    model = jax.eval_shape(lambda: DeepseekV4(small(3).config, max_tokens=512, schedule=mine))
    assert all(schedule is mine for schedule in schedules(model))


def test_a_layer_built_without_one_runs_in_order():
    config = small().config
    spec = next(spec for spec in config.layers if spec.ratio == 4)
    build = lambda: CsaAttention(config, spec, XlaKernels(), ExactNumerics(), jnp.float32)
    assert jax.eval_shape(build).schedule is IN_ORDER


def on_lanes(model: DeepseekV4) -> DeepseekV4:
    """The same model, whose branches run in regions of their own."""
    graph, state = nnx.split(model)
    copy = nnx.merge(graph, state)
    for _, node in nnx.iter_graph(copy):
        if hasattr(node, "schedule"):
            node.schedule = LANES
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("case, drafts", [("calm/fp8", 2), *([("tiny/fp8", 0)] if FULL else [])])
def test_lanes_change_no_result(case, drafts):
    model = load_model(GOLDEN / case, max_tokens=256)
    lanes = on_lanes(model)
    ids = np.random.default_rng(0).integers(1, 190, (2, 75))
    # Other fusions round elsewhere in float32.
    np.testing.assert_allclose(dsv4_jax.logits(lanes, ids), dsv4_jax.logits(model, ids), atol=1e-4)
    request = {"max_new_tokens": 24, "drafts": drafts}
    want, got = (dsv4_jax.generate(m, ids[:, :40], **request) for m in (model, lanes))
    np.testing.assert_array_equal(got.tokens, want.tokens)


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_branches_take_turns_on_the_lanes(lanes):
    """Main on stream 0, the second of two branches that start at lane 2 on the lane after."""
    schedule = dataclasses.replace(LANES, lanes=lanes)

    def fork(x):
        return schedule.fork(lambda: jnp.sin(x), lambda: jnp.cos(x), lambda: jnp.tan(x), lane=2)

    x = jnp.arange(4.0)
    text = jax.jit(fork).lower(x).as_text()
    streams = [int(n) for n in re.findall(r' call @.*_xla_stream_annotation = "(\d+)"', text)]
    assert streams == [0, 1 + 1 % lanes, 1 + 2 % lanes]
    np.testing.assert_allclose(jax.jit(fork)(x), [jnp.sin(x), jnp.cos(x), jnp.tan(x)], rtol=1e-6)


def test_a_gradient_goes_through_lanes():
    def loss(x, schedule):
        kinked = jax.custom_vjp(lambda x: x * x)  # as a kernel: a gradient of its own
        kinked.defvjp(lambda x: (x * x, x), lambda x, g: (3 * g * x,))
        main, branch = schedule.fork(lambda: jnp.sin(x).sum(), lambda: kinked(x).sum())
        return main * branch

    x = jnp.arange(1.0, 4.0)
    want, got = (jax.jit(jax.grad(loss), static_argnums=1)(x, schedule) for schedule in (IN_ORDER, LANES))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_steps_are_dispatched_before_results_are_fetched():
    """With k in flight, the first result is fetched once k + 1 steps are under way."""
    log: list[str] = []

    class Result:
        def __init__(self, n):
            self.n = n

        def copy_to_host_async(self):
            log.append(f"copy {self.n}")

    def step(state):
        log.append(f"step {state}")
        return state + 1, Result(state)

    fetched = []
    for out in AsyncSchedule(in_flight=2).run(step, 0, 5):
        log.append(f"fetch {out.n}")
        fetched.append(out.n)
    assert fetched == [0, 1, 2, 3, 4]
    assert log.index("step 2") < log.index("fetch 0") < log.index("step 3") < log.index("fetch 1")
