import dataclasses
import itertools
import random

import numpy as np
import pytest
from helpers import ZOO_NAMES, micro_spec
from hypothesis import given
from hypothesis import strategies as st

from dynaslim.errors import UsageError
from dynaslim.spec import TEACHER_INDEX, GateSpec, NetSpec, Route, StageSpec
from dynaslim.zoo import ZOO, get_spec


def test_ds_mbnet_routes_are_the_released_ones():
    spec = get_spec("ds_mbnet")
    assert [route.widths for route in spec.routes] == [
        (16, 32, 48, 96, 224 + 32 * k, 736 + 32 * k) for k in range(14)
    ]
    assert spec.largest.widths == (24, 88, 168, 264, 640, 1152)
    assert spec.largest not in spec.routes
    assert spec.gates == (GateSpec((0, 4, 9, 13)),)
    assert spec.routing_space == tuple(spec.routes[k] for k in (0, 4, 9, 13))


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_spec_survives_json_and_hashing(name):
    spec = ZOO[name]
    again = NetSpec.from_dict(spec.to_dict())
    assert again == spec
    assert hash(again) == hash(spec)


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_routes_are_values(name):
    spec = ZOO[name]
    assert len(set(spec.routes)) == len(spec.routes) == spec.num_widths
    shuffled = random.Random(0).sample(spec.routes, len(spec.routes))
    assert sorted(shuffled) == list(spec.routes)
    for route in (*spec.routes, spec.largest):
        assert Route.parse(str(route)) == route
        assert spec.coerce_route(list(route.widths)) == route
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.smallest.widths = (1,)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_route_and_indices_are_inverse(indices):
    spec = get_spec("ds_resnet50")
    route = spec.route_at(indices)
    assert spec.segment_indices(route) == (0, *indices)


def test_four_gates_combine():
    spec = get_spec("ds_resnet50")
    assert len(spec.gates) == 4
    assert len(set(spec.routing_space)) == 4**4
    assert spec.largest == spec.routes[-1]
    assert not spec.has_separate_teacher


def test_teacher_has_its_own_statistics_only_off_the_routes():
    mbnet, resnet = get_spec("ds_mbnet"), get_spec("ds_resnet50")
    assert mbnet.segment_indices(mbnet.largest) == (TEACHER_INDEX, TEACHER_INDEX)
    assert mbnet.num_slots(0) == 2  # the stem's two widths are separate anyway
    assert mbnet.num_slots(4) == 15
    assert mbnet.width(4, TEACHER_INDEX) == (640, 14)
    assert mbnet.width(4, 13) == (640, 13)
    assert resnet.num_slots(1) == 4


def test_single_width_stages_stay_fixed():
    spec = NetSpec(
        "fixed-head",
        (
            StageSpec((8,), block="conv"),
            StageSpec((8, 16), gate=GateSpec((0, 1))),
            StageSpec((32,), block="conv", kernel=1),
        ),
    )
    assert [route.widths for route in spec.routes] == [(8, 8, 32), (8, 16, 32)]
    # what feeds it differs by route, so its statistics do
    assert [spec.width(2, index) for index in (0, 1)] == [(32, 0), (32, 1)]
    assert spec.slot_widths(2) == (32, 32)


def test_routes_from_lists_are_routes():
    spec = get_spec("ds_mbnet_tiny")
    assert Route([12, 24, 48, 48, 96]) == spec.smallest
    assert hash(Route([12, 24, 48, 48, 96])) == hash(spec.smallest)
    assert spec.smallest <= spec.smallest < spec.largest


def test_with_choices():
    spec = get_spec("ds_mbnet").with_choices((0, 1, 2, 3))
    assert spec.gates[0].choices == (0, 1, 2, 3)
    assert get_spec("ds_resnet50").with_choices((0, 3)).gates == (GateSpec((0, 3)),) * 4


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        (
            (16, 32, 48, 96, 300, 832),
            r"route \(16, 32, 48, 96, 300, 832\): stage 4 allows 224, 256, .*640, not 300",
        ),
        ((16, 32, 48, 96, 224, 768), r"stage 5 allows 736 behind that gate, not 768"),
        ((24, 32, 48, 96, 224, 736), r"stage 0 allows 16 on a route, not 24"),
        ((16, 32, 48), r"ds_mbnet has 6 stages.*such as \(16, 32, 48, 96, 224, 736\)"),
    ],
)
def test_foreign_routes_are_refused_by_stage(widths, message):
    with pytest.raises(UsageError, match=message):
        get_spec("ds_mbnet").coerce_route(widths)


@pytest.mark.parametrize("form", [str, list, lambda route: np.array(route.widths), Route])
def test_what_stands_for_a_route(form):
    spec = get_spec("ds_mbnet")
    route = spec.routes[1]
    found = spec.coerce_route(form(route.widths if form in (list, Route) else route))
    assert found == route
    assert all(type(width) is int for width in found.widths)


@pytest.mark.parametrize(
    "thing", [3, 0.5, object(), [16, None], [[16, 32]], (16.0, 32.5), "cheap", "16-x"]
)
def test_what_is_no_route_at_all(thing):
    with pytest.raises(UsageError, match=r"^route .*: expected channel counts joined by"):
        get_spec("ds_mbnet").coerce_route(thing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": ()}, "at least one stage"),
        ({"num_classes": 0}, "num_classes 0"),
        ({"activation": "gelu"}, "activation 'gelu'"),
        ({"attention_at": "none"}, "attention_at 'none'"),
        ({"num_classes": 2.5}, "num_classes 2.5"),
        ({"stages": (StageSpec((8.0,), block="conv"),)}, "must be whole numbers"),
        ({"stages": (StageSpec((8,), block="conv", kernel=-1),)}, "kernel -1"),
        (
            {"stages": (StageSpec((8,), block="conv"), StageSpec((8,), "basic"))},
            "would scale every shortcut",
        ),
        ({"stages": (StageSpec((8,)),)}, "stem must be a 'conv'"),
        ({"stages": (StageSpec((8, 8), block="conv"),)}, "must rise"),
        ({"stages": (StageSpec((8,), block="conv", kernel=2),)}, "kernel 2 must be odd"),
        ({"stages": (StageSpec((8,), block="conv", expansion=0),)}, "expansion 0 must be"),
        (
            {"stages": (StageSpec((8,), block="conv", blocks=2, max_pool=True),)},
            "one block has a max pool",
        ),
        (
            {"stages": (StageSpec((8, 9), block="conv", gate=GateSpec((0,))),)},
            "'conv' has no gate",
        ),
        (
            {"stages": (StageSpec((8,), block="conv"), StageSpec((8, 9), gate=GateSpec((0, 2))))},
            r"choice 2 is out of range.*2 widths \(0 to 1\)",
        ),
        (
            {
                "stages": (
                    StageSpec((8,), block="conv"),
                    StageSpec((8, 9), gate=GateSpec((0, 1))),
                    StageSpec((8, 9, 10)),
                )
            },
            "has 3 widths, but the gated stages have 2",
        ),
    ],
)
def test_specs_that_do_not_fit_together(change, message):
    with pytest.raises(UsageError, match=message):
        micro_spec(**change)


def test_from_dict_names_what_is_wrong():
    data = get_spec("ds_mbnet_tiny").to_dict()
    with pytest.raises(UsageError, match="colour"):
        NetSpec.from_dict({**data, "colour": 1})
    with pytest.raises(UsageError, match="not a network spec"):
        NetSpec.from_dict({"name": "x"})
    with pytest.raises(UsageError, match=r"not a network spec: .*'wide'"):
        NetSpec.from_dict({"name": "x", "stages": [{"widths": ["wide"]}]})


def test_image_below_total_stride():
    with pytest.raises(UsageError, match="31x64 px: ds_mbnet divides it by 32"):
        get_spec("ds_mbnet").check_image_size(31, 64)


@pytest.mark.parametrize("name", ZOO)
def test_paths_count_options(name):
    spec = ZOO[name].with_choices([1, 3])
    for path in itertools.islice(itertools.product((0, 1), repeat=len(spec.gates)), 40):
        route = spec.route_along(path)
        assert route == spec.route_at([(1, 3)[option] for option in path])
        assert spec.path_of(route) == path
        assert spec.path_at(spec.segment_indices(route)[1:]) == path
    with pytest.raises(UsageError, match=r"gate 0 of .* chooses among width indices 1, 3, not 0"):
        spec.path_of(spec.smallest)
