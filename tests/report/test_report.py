"""The page of a run: its numbers are those of the evaluation, and no name does harm."""

import json
import re

import numpy as np
import pytest
import torch
from report_runs import HOSTILE, PRE, TARGETS, Page, held_images, make_net

from dynaslim.checkpoint import read
from dynaslim.cost import params
from dynaslim.evaluation import evaluate
from dynaslim.report import ReportOptions, build_report, make_report, text
from dynaslim.report.data import at_cost, measure_details, paired_difference
from dynaslim.runtime.budget_search import accuracy_interval


@pytest.fixture(scope="module")
def page(gate_page):
    return Page(gate_page.html)


@pytest.fixture(scope="module")
def evaluation(data):
    """What the chosen gate, the middle one, does on the held-out images."""
    return evaluate(make_net(1), held_images(data), PRE)


# -- numbers --------------------------------------------------------------------------------------


def test_accuracies_and_costs_are_those_of_the_evaluation(page, gate_page, evaluation, data):
    rows = {row[0]: row for row in page.rows(["", "MAdds", "of the widest"])}
    assert list(rows) == [
        *(str(route) for route in make_net().spec.routes),
        *(f"dynamic, target {target:g}" for target in TARGETS),
    ]
    widest = evaluation.routes[-1]
    for route in evaluation.routes:
        low, high = accuracy_interval(route.top1, 20)
        assert rows[text.widths_of(route.widths)][1:5] == [
            text.millions(route.madds),
            f"{route.madds / widest.madds:.0%}",
            f"{route.top1:.2%}",
            f"{low:.1%} to {high:.1%}",
        ]
    for number, target in enumerate(TARGETS):
        dynamic = evaluate(make_net(number), held_images(data), PRE).dynamic
        row = rows[f"dynamic, target {target:g}"]
        assert (row[1], row[3]) == (text.millions(dynamic.mean_madds), f"{dynamic.top1:.2%}")
    summary = gate_page.summary
    assert summary["dynamic"]["top1"] == evaluation.dynamic.top1
    assert summary["dynamic"]["madds"] == evaluation.dynamic.mean_madds
    assert [r["top1"] for r in summary["routes"]] == [r.top1 for r in evaluation.routes]
    assert (summary["images"], summary["target"], summary["split"]) == (20, 0.6, "train")


def test_headline_compares_with_the_widest_route(page, gate_page, evaluation, data):
    """The interval is that of the images on which the two disagree."""
    net, images = make_net(1), held_images(data)
    details = measure_details(net, images, PRE, evaluation, batch_size=7)
    right = evaluation.predictions == evaluation.labels
    widest_right = details.widest_correct_N
    assert widest_right.float().mean().item() == pytest.approx(evaluation.routes[-1].top1)
    better, worse = int((right & ~widest_right).sum()), int((~right & widest_right).sum())
    difference = paired_difference(better, worse, 20)
    assert better + worse > 0, "the images are such that the two disagree"
    assert gate_page.summary["dynamic"]["against_widest"] == pytest.approx(difference._asdict())
    dynamic, widest = evaluation.dynamic, evaluation.routes[-1]
    assert f"needs {dynamic.mean_madds / widest.madds:.0%} of the multiply-adds" in page.text
    assert f"is right on {dynamic.top1:.2%} of 20 images" in page.text
    assert f"{text.points(difference.low)} to {text.points(difference.high)} points" in page.text


def test_routes_and_classes_are_those_of_the_evaluation(page, evaluation):
    taken = page.rows(["route", "MAdds", "images"])
    right = (evaluation.predictions == evaluation.labels).numpy()
    shown = {row[0]: row for row in taken}
    for number, route in enumerate(evaluation.taken):
        own = evaluation.taken_number.numpy() == number
        assert shown[str(route)][2] == str(own.sum())
        assert shown[str(route)][4] == f"{right[own].mean():.2%}"
    assert sum(int(row[2]) for row in taken) == 20
    classes = page.rows(["class", "images", "top-1"])
    costs = [one.mean_madds for one in evaluation.per_class]
    order = sorted(range(5), key=lambda index: -costs[index])
    for row, index in zip(classes, order, strict=True):
        one = evaluation.per_class[index]
        assert row[:3] == [text.name_of(HOSTILE[index], index), str(one.images), f"{one.top1:.2%}"]
        assert row[4] == text.millions(one.mean_madds)
    bars = next(t[1:] for t in page.tables if t[0][-1:] == ["mean MAdds"] and t[0][0] == "")
    assert bars[0][0] == "all images"
    for row, index in zip(bars[1:], order, strict=True):
        shares = [f"{share:.1%}" for share in evaluation.per_class[index].route_shares]
        assert sorted(row[1:-1]) == sorted(shares)


def test_confusions_add_up(page, evaluation):
    (matrix,) = (t for t in page.tables if t[0][0].startswith("class ↓"))
    counts = np.array([[int(cell) for cell in row[1:]] for row in matrix[1:]])
    assert counts.sum() == 20
    assert counts.trace() == round(20 * evaluation.dynamic.top1)
    for label in range(5):
        for answer in range(5):
            both = (evaluation.labels == label) & (evaluation.predictions == answer)
            assert counts[label, answer] == both.sum()
    pairs = page.rows(["class", "taken for"])
    assert [int(row[2]) for row in pairs] == sorted((int(r[2]) for r in pairs), reverse=True)
    assert sum(int(row[2]) for row in pairs) <= 20 - counts.trace()


def test_histograms_count_every_image(page, evaluation, data):
    tables = [t for t in page.tables if t[0][1:] == ["right", "wrong", "share right"]]
    assert [t[0][0] for t in tables] == [
        *["probability of the chosen width"] * 2,
        "margin between the two likeliest classes",
    ]
    right = round(20 * evaluation.dynamic.top1)
    for table in tables:
        assert sum(int(row[1]) for row in table[1:]) == right
        assert sum(int(row[2]) for row in table[1:]) == 20 - right


def test_details_are_those_of_the_gates_and_of_each_image_alone(evaluation, data):
    net, images = make_net(1), held_images(data)
    from dynaslim.data.transforms import normalise
    from dynaslim.nn.functional import argmax_one_hot

    details = measure_details(net, images, PRE, evaluation, batch_size=6)
    pixels, _ = next(images.batches(20))
    with torch.inference_mode():
        gated = net.forward_gated(normalise(pixels, PRE), lambda logits, _: argmax_one_hot(logits))
    for number, logits in enumerate(gated.gate_logits):
        expected = logits.softmax(1).amax(1)
        torch.testing.assert_close(details.gate_probability_GN[number], expected)
    top = gated.logits.softmax(1).topk(2).values
    torch.testing.assert_close(details.margin_N, top[:, 0] - top[:, 1], rtol=1e-4, atol=1e-5)


def test_times_are_reported_as_measured(page, gate_page):
    rows = {row[0]: row for row in page.rows(["", "MAdds", "of the widest"])}
    summary = gate_page.summary
    assert summary["backend"] == "eager"
    for route in summary["routes"]:
        assert route["ms"] > 0
        row = rows[text.widths_of(route["widths"])]
        assert row[5] == text.milliseconds(route["ms"])
        assert row[-1] == text.megabytes(params(make_net(0).spec, route["widths"]))
    assert rows["dynamic, target 0.6"][5] == text.milliseconds(summary["dynamic"]["ms"])
    assert rows[text.widths_of(summary["routes"][-1]["widths"])][7] == f"1.00{text.TIMES}"
    assert "Medians of 2 interleaved rounds of" in page.text
    assert "by eager on" in page.text


# -- the page -------------------------------------------------------------------------------------


def test_page_requests_nothing_and_runs_nothing(gate_page, page):
    html = gate_page.html
    assert html.startswith("<!doctype html>")
    assert len(html) < 1_000_000
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "form", "base", "foreignobject"}
    assert not re.search(r"https?:|//[a-z]|@import|javascript:", html.partition("<body>")[0])
    addresses = 0
    for tag, given in page.elements:
        assert not [name for name in given if name.startswith("on")], (tag, given)
        for name in ("src", "href", "xlink:href", "action", "data"):
            if name in given:
                addresses += 1
                assert given[name].startswith(("data:", "#")), given[name]
    assert addresses > 30
    assert all(f"url({u}" in ("url(#",) for u in re.findall(r"url\((.)", html))
    policy = next(g["content"] for t, g in page.elements if g.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_every_chart_has_words_and_numbers(page, gate_page):
    charts = [g for t, g in page.elements if t == "svg" and g.get("role") == "img"]
    assert len(charts) == 2 + 1 + 3 + 2
    assert all(len(given["aria-label"]) > 20 for given in charts)
    assert sum(tag == "figure" for tag, _ in page.elements) == len(charts)
    assert sum(tag == "details" for tag, _ in page.elements) == len(charts) + 1  # and the recipe
    assert all(given["alt"] for tag, given in page.elements if tag == "img")
    svg = re.findall("<svg.*?</svg>", gate_page.html, re.DOTALL)
    assert sum(part.count("<title>") for part in svg) > 50, "points and bars have tooltips"
    assert not re.search("#[0-9a-f]{6}\\b", "".join(svg)), "all colours are the style sheet's"
    identifiers = [given["id"] for _, given in page.elements if "id" in given]
    assert len(identifiers) == len(set(identifiers))


def test_parts_and_order(page):
    assert page.parts == [
        *("costs", "classes", "images", "confidence", "training", "confusion", "making"),
    ]
    links = [g["href"][1:] for t, g in page.elements if t == "a"]
    assert links == page.parts


def test_hostile_names_are_text(gate_page, page):
    """Names of classes and folders, commands and processors come from strangers."""
    words = page.text
    for name in ("<script>alert(1)</script>", "\"><img src=x onerror='alert(1)'>"):
        assert name in words
        assert name not in gate_page.html
    assert "{{ 7 * 7 }}" in words
    assert "dynaslim train gate --out '<script>2'" in words
    assert "<script>3" in words
    assert "<i>" in words, "the folder is named"
    assert "w" * 300 not in gate_page.html
    assert "w" * 79 + "…" in words
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", gate_page.html)
    gate_page.html.encode()


def test_names_no_file_can_hold(gate_run):
    page = Page(make_report(gate_run, rounds=0, title="a \udc80 \x00 <u>"))
    assert "a \ufffd \ufffd <u>" in page.text


def test_gallery_marks_wrong_answers_by_more_than_colour(page, evaluation):
    shots = [g["class"] for t, g in page.elements if t == "li" and "shot" in g.get("class", "")]
    assert set(shots) == {"shot right", "shot wrong"}
    assert page.text.count("✗") == shots.count("shot wrong") + 1  # and where it is explained
    assert page.text.count("✓") == shots.count("shot right")
    mistakes = 20 - round(20 * evaluation.dynamic.top1)
    images = sum(tag == "img" for tag, _ in page.elements)
    assert images == len(shots) == 20 + min(12, mistakes), "few images: each is shown once by route"


def test_curves_of_both_stages(page):
    assert "Stage I: the supernet" in page.text
    (losses,) = (t for t in page.tables if t[0] == ["step", "largest", "randoms", "smallest"])
    assert len(losses) <= 13
    assert float(losses[-1][2]) == 1.5, "the mean of the random routes"
    (accuracy,) = (t for t in page.tables if t[0][:2] == ["step", "last route (widest)"])
    assert accuracy[-1] == ["300", "40", "20"]


def test_recipe_and_commands_repeat_it(page, gate_run):
    assert "val_share: 0.25" in page.text
    file = str(gate_run / "gate_0.60.safetensors")
    assert f"'{file}'" in page.text
    assert read(file).recipe["target"] == 0.6


# -- small parts ----------------------------------------------------------------------------------


def test_intervals():
    low, high = accuracy_interval(0.5, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert accuracy_interval(1.0, 10).high == 1.0
    assert str(accuracy_interval(0.0, 6).low) == "0.0", "not even minus zero"
    assert 0 < accuracy_interval(0.0, 10).high < 0.31
    same = paired_difference(0, 0, 50)
    assert same == (0, 0, 0)
    assert not same.is_clear
    clear = paired_difference(30, 10, 1000)
    assert clear.value == pytest.approx(0.02)
    assert (clear.low, clear.high) == (
        pytest.approx(0.0077, abs=1e-4),
        pytest.approx(0.0323, abs=1e-4),
    )
    assert clear.is_clear
    assert not paired_difference(12, 10, 1000).is_clear


def test_line_between_routes():
    line = [(2.0, 0.6), (1.0, 0.5), (4.0, 0.7)]
    assert at_cost(line, 1.5) == pytest.approx(0.55)
    assert at_cost(line, 3.0) == pytest.approx(0.65)
    assert at_cost(line, 1.0) == 0.5
    assert at_cost(line, 4.5) is None
    assert at_cost([], 1.0) is None


def test_numbers_as_they_are_written():
    assert text.points(-0.0140) == f"{text.MINUS}1.40"
    assert text.points(-0.00001) == "+0.00"
    assert text.milliseconds(0.07072) == "0.0707 ms"
    assert text.milliseconds(1.519) == "1.52 ms"
    assert text.milliseconds(153.4) == "153 ms"
    assert text.percent(None) == text.NONE
    assert text.name_of(None, 7) == "class 7"


def test_request_is_checked(gate_run):
    for wrong in ({"images": 0}, {"rounds": 1}, {"rounds": -1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
            make_report(gate_run, **wrong)


def test_some_images_are_always_the_same(gate_run):
    pages = [build_report(gate_run, ReportOptions(images=9, rounds=0)) for _ in range(2)]
    assert pages[0].summary["images"] == 9
    assert pages[0].html == pages[1].html
    assert "9 images at random of 20" in Page(pages[0].html).text
    json.dumps(pages[0].summary, allow_nan=False)
