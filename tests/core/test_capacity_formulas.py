"""Each formula gives its library's number: rounding, K, floors and all."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_core.capacity import FORMULAS, expert_capacity

from .helpers import fast

NAMES = (
    "exact",
    "megatron",
    "deepspeed",
    "tutel",
    "megablocks",
    "fairscale",
    "nanomoe",
    "flaxformer",
    "st_moe",
    "hf_switch",
)
# (T, K, E, c_f) -> places, in the order of NAMES; worked out by hand from the libraries' code.
TABLE = {
    (1024, 2, 8, 1.25): (320, 320, 320, 320, 320, 256, 320, 160, 160, 64),
    (100, 2, 8, 1.25): (
        32,
        32,
        32,
        32,
        31,
        25,
        32,
        16,
        15,
        64,
    ),  # 31.25 slots; flaxformer and st_moe leave K out: 15.625
    (101, 2, 8, 1.0): (
        26,
        26,
        26,
        26,
        25,
        25,
        26,
        13,
        12,
        64,
    ),  # 25.25 slots; nanoMoE: 25, made even
    (1024, 3, 8, 1.0): (384, 384, 384, 384, 384, 256, 384, 128, 128, 64),
    (9, 3, 4, 1.0): (7, 7, 7, 9, 6, 4, 6, 4, 4, 64),  # 6.75 slots; Tutel: 3 * ceil(9/4)
    (100, 1, 1, 1.1): (
        110,
        111,
        110,
        110,
        110,
        200,
        110,
        110,
        100,
        64,
    ),  # 100 * 1.1 is 110.00000000000001 in floats, 110 in float32
    (4, 1, 8, 1.0): (1, 1, 4, 1, 0, 1, 4, 4, 4, 64),  # half a slot; four libraries never go below 4
    (44, 1, 8, 1.0): (6, 6, 6, 6, 5, 11, 6, 6, 5, 64),  # 5.5 rounds to the even 6
    (52, 1, 8, 1.0): (7, 7, 7, 7, 6, 13, 6, 6, 6, 64),  # and 6.5 too
    (0, 2, 8, 1.25): (0, 0, 4, 0, 0, 0, 4, 4, 4, 64),
    (8, 2, 4, 100.0): (400, 400, 400, 400, 400, 4, 400, 200, 8, 64),  # more places than tokens
}


def test_the_formulas_are_these():
    assert tuple(FORMULAS) == NAMES


@pytest.mark.parametrize("sizes", TABLE, ids=str)
def test_each_formula_gives_its_librarys_number(sizes):
    assert tuple(expert_capacity(*sizes, formula=name) for name in NAMES) == TABLE[sizes]


@fast
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 256), st.floats(0, 4))
def test_the_deepspeed_formula_rounds_as_float32_tensors_do(T, K, E, factor):
    assert expert_capacity(T, K, E, factor, formula="deepspeed", min_capacity=0) == int(
        torch.ceil((T / E) * torch.tensor(factor * K))
    )


@fast
@given(
    st.integers(0, 10**6),
    st.integers(1, 8),
    st.integers(1, 256),
    st.integers(1, 400),
    st.sampled_from(NAMES),
)
def test_no_formula_is_far_from_the_exact_one_but_for_what_it_leaves_out(T, K, E, hundredths, name):
    factor = hundredths / 100
    places = {
        name: expert_capacity(T, K, E, factor, formula=name, min_capacity=0) for name in NAMES
    }
    rounded = K * factor + K if name == "tutel" else 1
    alike = {
        "fairscale": 2 * T / E,
        "flaxformer": factor * T / E,
        "st_moe": min(T, factor * T / E),
        "hf_switch": 64,
    }
    assert abs(places[name] - alike.get(name, factor * T * K / E)) <= rounded + 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_floor_of_ones_own_replaces_the_librarys(name):
    assert expert_capacity(4, 1, 8, 1.0, formula=name, min_capacity=100) == 100
    assert expert_capacity(4, 1, 8, 1.0, formula=name, min_capacity=0) <= (
        64 if name == "hf_switch" else 1
    )


@pytest.mark.parametrize("name", NAMES)
def test_factor_zero_is_no_place_or_the_largest_load(name):
    if name in ("tutel", "megablocks"):
        assert expert_capacity(100, 2, 8, 0, formula=name, largest_load=37) == 37
        assert expert_capacity(100, 2, 8, 0, formula=name, largest_load=2, min_capacity=5) == 5
        with pytest.raises(
            ValueError,
            match=f"capacity_factor=0 means the largest load with formula='{name}': give largest_load",
        ):
            expert_capacity(100, 2, 8, 0, formula=name)
    else:
        constant = {"fairscale": 25, "hf_switch": 64}.get(name, 0)
        assert (
            expert_capacity(100, 2, 8, 0, formula=name, min_capacity=0, largest_load=37) == constant
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"formula": "mine"}, "formula='mine' must be one of 'exact', 'megatron'"),
        ({"min_capacity": -1}, "min_capacity=-1 must be a whole number, at least 0"),
        ({"min_capacity": 1.5}, "min_capacity=1.5 must be a whole number, at least 0"),
        (
            {"formula": "tutel", "capacity_factor": 0, "largest_load": -1},
            "largest_load=-1 must be a whole number",
        ),
        ({"capacity_factor": math.nan}, "capacity_factor=nan must be at least 0 and finite"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        expert_capacity(
            **{"n_tokens": 8, "top_k": 1, "n_experts": 2, "capacity_factor": 1.0, **arguments}
        )
