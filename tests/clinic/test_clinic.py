"""Every planted illness is named, in five runs of five; no healthy run is called ill."""

import json

import pytest

from moe_core.routers import ROUTERS
from moe_tools import diagnosis
from moe_tools.diagnosis import ILLNESSES
from moe_tools.diagnosis.routing_log import RoutingLog

from .patients import HEALTHY, PATIENTS, healthy
from .ward import SEEDS

seeds = pytest.mark.parametrize("seed", SEEDS)


@seeds
@pytest.mark.parametrize("name", ROUTERS)
def test_a_healthy_run_of_every_router_is_not_called_ill(name, seed):
    findings = diagnosis.diagnose(healthy(name, seed))
    assert findings == [], str(findings)


@seeds
@pytest.mark.parametrize("patient", PATIENTS, ids=lambda patient: patient.name)
def test_a_planted_illness_is_named_and_nothing_that_does_not_come_with_it(patient, seed):
    log = RoutingLog.from_dict(
        json.loads(json.dumps(patient.run(seed).to_dict()))
    )  # as a file would give it back
    findings = diagnosis.diagnose(log)
    assert patient.name in findings.names, str(findings)
    assert set(findings.names) <= {patient.name, *patient.brings}, str(findings)


@seeds
@pytest.mark.parametrize(
    "patient", [patient for patient in PATIENTS if patient.twin], ids=lambda patient: patient.name
)
def test_the_twin_in_which_the_one_thing_is_right_is_well(patient, seed):
    findings = diagnosis.diagnose(patient.twin(seed))
    assert findings == [] and patient.name not in findings.unasked, str(findings)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_found_first_and_what_came_before_it_is_still_asked(value):
    log = RoutingLog.from_dict(PATIENTS[1].run(0).to_dict())
    log.training[-1].loss = value
    assert diagnosis.diagnose(log).names[:2] == ["diverged", PATIENTS[1].name]
    for step in log.training:
        step.loss = value
    findings = diagnosis.diagnose(log)
    assert findings.names == ["diverged"] and len(findings.unasked) == len(ILLNESSES)


def test_every_illness_has_a_patient_but_memory_pressure_which_needs_a_device():
    assert set(HEALTHY) <= set(ROUTERS)
    assert {patient.name for patient in PATIENTS} == set(ILLNESSES) - {"memory pressure"}
