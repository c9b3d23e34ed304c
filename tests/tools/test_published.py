"""Published models: every parameter count exact, every refusal with its reason."""

import subprocess
import sys

import pytest

import moe_core
from moe_tools.accounting.published import ANNOUNCED, MODELS, UNSUPPORTED

from ..core.published_counts import COUNTS


@pytest.mark.parametrize("name", MODELS)
def test_total_and_active_parameters_are_exact_in_every_convention(name):
    spec = MODELS[name]
    assert (
        spec.total_params,
        spec.active_params,
        spec.active_params_head,
        spec.active_params_nonemb,
    ) == COUNTS[name]
    assert tuple(spec.active(c) for c in ("all", "head", "nonemb")) == COUNTS[name][1:]


def test_every_model_of_the_list_is_there_or_refused_with_a_reason():
    assert set(MODELS) | set(UNSUPPORTED) == set(COUNTS) and not set(MODELS) & set(UNSUPPORTED)
    assert len(COUNTS) == 47 and len(MODELS) >= 40
    for name, reason in UNSUPPORTED.items():
        assert len(reason) > 40
        with pytest.raises(KeyError, match=name.split()[0]) as error:
            MODELS[name]
        assert reason in str(error.value)


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(KeyError, match="mixtral-9x9b.*mixtral-8x7b"):
        MODELS["mixtral-9x9b"]
    assert "mixtral-9x9b" not in MODELS and MODELS.get("mixtral-9x9b") is None


def test_the_call_of_the_readme():
    spec = moe_core.published.MODELS["mixtral-8x7b"]
    assert (spec.total_params, spec.active_params) == (46_702_792_704, 12_879_925_248)


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_add_up_and_every_model_says_where_it_is_from(name):
    spec = MODELS[name]
    assert (
        sum(spec.parts.values()) == spec.total_params
        and sum(spec.active_parts.values()) == spec.active_params
    )
    assert all(spec.parts[part] >= spec.active_parts[part] >= 0 for part in spec.parts)
    assert spec.source and (spec.parts["head"] == 0) == spec.tied


def test_what_was_announced_is_near_what_is_counted_but_for_the_known_exceptions():
    assert set(ANNOUNCED) <= set(COUNTS)
    far = {}
    for name in set(ANNOUNCED) & set(MODELS):
        total, active = ANNOUNCED[name]
        spec = MODELS[name]
        nearest = min(
            (spec.active(c) / 1e9 for c in ("all", "head", "nonemb")),
            key=lambda value: abs(value - (active or value)),
        )
        far[name] = max(
            abs(spec.total_params / 1e9 / total - 1) if total else 0,
            abs(nearest / active - 1) if active else 0,
        )
    # names with one digit ("A3B", "A400M"), and d12's active figure, which does not reproduce
    exceptions = {
        "glm-4.7-flash",
        "qwen3-next-80b-a3b",
        "granite-3-1b-a400m",
        "et-d12 (2603.11535)",
    }
    assert {name for name, distance in far.items() if distance > 0.04} == exceptions, far


def test_published_models_are_there_after_importing_the_core_alone():
    code = "import moe_core; print(moe_core.published.MODELS['grok-1'].total_params)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=moe_core.__path__[0] + "/..",
    )
    assert done.stdout.strip() == "315684820992"
