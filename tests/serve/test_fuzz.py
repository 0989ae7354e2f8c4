"""Requests made up from the OpenAPI document, valid and not: answers are as documented."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from dynaslim.serve import ServeOptions, create_app

HEADERS = {"Authorization": "Bearer admin"}
OPERATIONS = (
    ("/v1/predict", "POST"),
    ("/v1/models", "GET"),
    ("/healthz", "GET"),
    ("/readyz", "GET"),
    ("/metrics", "GET"),
    ("/v2/health/live", "GET"),
    ("/v2/health/ready", "GET"),
    ("/v2", "GET"),
    ("/v2/models/{name}", "GET"),
    ("/v2/models/{name}/ready", "GET"),
    ("/v2/models/{name}/infer", "POST"),
    ("/v2/repository/index", "POST"),
    ("/v2/repository/models/{name}/load", "POST"),
    ("/v2/repository/models/{name}/unload", "POST"),
)
POSTED = [path for path, method in OPERATIONS if method == "POST"]
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
    checks.ignored_auth,
]
# what breaks the document may also be too large (too many images are 413), or late by its deadline
REJECTED = ["400", "401", "404", "405", "413", "415", "422", "429", "504"]
CONFIG = schemathesis.Config.from_dict(
    {"checks": {"negative_data_rejection": {"expected-statuses": REJECTED}}}
)
# that what fits the document is also taken cannot be checked: hardly any string is a picture


CASES = [
    *((path, method, GenerationMode.POSITIVE) for path, method in OPERATIONS),
    *((path, "POST", GenerationMode.NEGATIVE) for path in POSTED),  # others have hardly anything
]


@pytest.fixture(scope="module")
def api(engine, live):
    options = ServeOptions(token="secret", admin_token="admin", max_body_mb=0.5, max_images=4)
    app = create_app(engine, options)
    with live(app) as port:
        yield schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json", config=CONFIG)


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_answers_are_as_documented(api, path, method, mode):
    operation = api[path][method]
    statuses = set()

    @settings(
        max_examples=80 if path in POSTED else 3,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(mode))
    def check(case):
        answer = case.call_and_validate(headers=HEADERS, checks=CHECKS)
        statuses.add(answer.status_code)

    check()
    assert all(status < 500 or status == 504 for status in statuses), "504: by its own deadline"
    if path in POSTED and (mode is GenerationMode.NEGATIVE or "/repository/" not in path):
        assert statuses & {400, 415, 422}
    if mode is GenerationMode.POSITIVE and not path.endswith(("/infer", "/load", "/unload")):
        assert 200 in statuses, "some of the files that it makes up are pictures"


def test_all_operations_are_tried(api):
    found = {(op.ok().path, op.ok().method.upper()) for op in api.get_all_operations()}
    assert found == set(OPERATIONS)
