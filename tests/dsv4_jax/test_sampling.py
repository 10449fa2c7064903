"""Samplers against the distributions they promise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.generate.sampling import Greedy, Sample, row_keys, token_keys

LOGITS = jnp.log(jnp.asarray([[0.4, 0.05, 0.3, 0.15, 0.1]]))


def support(sampler: Sample) -> set[int]:
    return set(np.flatnonzero(np.isfinite(np.asarray(sampler.filtered(LOGITS)))[0]).tolist())


@pytest.mark.parametrize(
    ("sampler", "kept"),
    [
        (Sample(), {0, 1, 2, 3, 4}),
        (Sample(top_k=1), {0}),
        (Sample(top_k=3), {0, 2, 3}),
        (Sample(top_p=0.1), {0}),
        (Sample(top_p=0.65), {0, 2}),
        (Sample(top_p=0.75), {0, 2, 3}),
        (Sample(top_p=1.0), {0, 1, 2, 3, 4}),
        (Sample(min_p=0.3), {0, 2, 3}),
        (Sample(min_p=1.0), {0}),
        (Sample(top_k=4, top_p=0.9, min_p=0.3), {0, 2, 3}),
    ],
)
def test_filters_keep_what_they_should(sampler, kept):
    assert support(sampler) == kept


def test_draws_follow_the_tempered_distribution():
    n, temperature = 20_000, 0.7
    keys = row_keys(jnp.uint32(3), n)
    drawn = jax.jit(Sample(temperature=temperature))(jnp.repeat(LOGITS, n, axis=0), keys)
    want = np.asarray(jax.nn.softmax(LOGITS[0] / temperature)) * n
    chi2 = ((np.bincount(np.asarray(drawn), minlength=5) - want) ** 2 / want).sum()
    assert chi2 < 18.47  # p = 0.001 with 4 degrees of freedom


def test_greedy_takes_the_lower_id_of_a_tie():
    assert Greedy()(jnp.asarray([[1.0, 3.0, 3.0]]), None).tolist() == [1]


def test_keys_differ_by_row_and_step():
    keys = row_keys(jnp.uint32(0), 4)
    draws = [jax.vmap(jax.random.uniform)(token_keys(keys, jnp.full(4, s))).tolist() for s in range(3)]
    assert len(set(sum(draws, []))) == 12
    alone = row_keys(jnp.asarray([0], jnp.uint32), 1)
    assert jax.random.key_data(alone)[0].tolist() == jax.random.key_data(keys)[0].tolist()


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1}],
)
def test_values_out_of_range_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sample(**options)
