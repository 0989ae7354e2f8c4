"""The arithmetic of the comparisons on tables made by hand, and all steps on a toy of images."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import bright_pngs, lively_net, write_parquet

import dynaslim
from dynaslim.checkpoint import Checkpoint
from dynaslim.cost import CostTable, madds
from dynaslim.cost_file import write_cost_table
from dynaslim.data import ImageDataset
from dynaslim.data.transforms import normalise
from dynaslim.errors import UsageError
from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import DataRecipe, OptimRecipe, SupernetRecipe
from dynaslim.runtime.calibrate_budget import simulate
from dynaslim.runtime.escalation import Escalation, averaged
from dynaslim.zoo import ZOO, write_spec

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from results import (  # noqa: E402
    cells,
    comparisons,
    heads,
    judging,
    measure_ms,
    plan,
    policies,
    quick,
    run,
    summaries,
    table,
    training,
)
from results.answers import Table, answer, images_of  # noqa: E402
from results.plan import static_spec  # noqa: E402

# six images, three routes of cost 1, 2 and 4; the trunk costs 0.5
RIGHT = np.array(
    [[1, 1, 1], [1, 1, 1], [1, 0, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]], bool
)  # fmt: skip
SURE = np.array([0.9, 0.8, 0.3, 0.4, 0.2, 0.1])[:, None].repeat(3, 1)
COSTS = [1.0, 2.0, 4.0]


# -- policies --------------------------------------------------------------------------------------


def test_the_uniform_line_is_the_upper_hull():
    costs, top1 = [1, 2, 3, 4], [0.5, 0.52, 0.7, 0.6]
    line = policies.uniform_line
    assert line(costs, top1, 1) == 0.5
    assert line(costs, top1, 2) == pytest.approx(0.6)  # above the second route: between its mates
    assert line(costs, top1, 3.5) == 0.7  # dearer is worse: nobody would take it
    assert line(costs, top1, 0.5) == 0.5
    with pytest.raises(ValueError, match="no routes"):
        line([], [], 1)


def test_random_routing_is_a_weighted_mean():
    found = policies.random_routing(COSTS, [0.5, 0.6, 0.8], [0.5, 0, 0.5])
    assert found == pytest.approx((2.5, 0.65, 0))
    with pytest.raises(ValueError, match="add up to 1"):
        policies.random_routing(COSTS, [0.5, 0.6, 0.8], [0.5, 0.1, 0.5])


def test_the_oracle_takes_the_cheapest_that_is_right():
    found = policies.oracle(RIGHT, COSTS)
    assert found == pytest.approx(((1 + 1 + 1 + 2 + 4 + 1) / 6, 5 / 6, 0))


def test_a_gate_sends_every_image_to_its_choice():
    found = policies.gated(RIGHT, COSTS, np.array([0, 1, 1, 1, 2, 0]))
    assert found == pytest.approx(((1 + 2 + 2 + 2 + 4 + 1) / 6, 4 / 6, 0))


def test_a_ladder_pays_for_every_step_but_one_trunk():
    one = policies.ladder(RIGHT, SURE, COSTS, 0.5, (0, 2), (0.35,))
    # images 2, 4 and 5 go on: 2 stays right, 4 becomes right
    assert one == pytest.approx((1 + 3 * 3.5 / 6, 4 / 6, 3 / 6))
    without_escalation = policies.ladder(RIGHT, SURE, COSTS, 0.5, (0, 2), (0.0,))
    assert without_escalation == policies.gated(RIGHT, COSTS, np.zeros(6, int))
    found = policies.ladder(RIGHT, SURE, COSTS, 0.5, (0, 1, 2), (0.35, 0.25))
    # 2, 4 and 5 go on to the second route, of them 4 and 5 to the third
    assert found == pytest.approx((1 + (3 * 1.5 + 2 * 3.5) / 6, 3 / 6, 5 / 6))
    with pytest.raises(ValueError, match="3 steps need 2 thresholds, got 1"):
        policies.ladder(RIGHT, SURE, COSTS, 0.5, (0, 1, 2), (0.35,))


def test_a_cascade_pays_for_both_networks():
    found = policies.cascade(RIGHT[:, 0], SURE[:, 0], RIGHT[:, 2], (1.0, 4.0), tau=0.35)
    assert found == pytest.approx((1 + 4 * 3 / 6, 4 / 6, 3 / 6))


def test_thresholds_part_the_images_at_a_share():
    sure = np.array([0.1, 0.5, 0.2, 0.9])
    for share, under in [(0, 0), (0.25, 1), (0.5, 2), (0.75, 3), (1, 4)]:
        assert (sure < policies.threshold_for(sure, share)).sum() == under


def test_the_best_setting_within_a_budget():
    costs, top1 = np.array([1.0, 2.0, 2.5, 3.0]), np.array([0.5, 0.7, 0.7, 0.6])
    assert policies.best_settings(costs, top1, [0.5, 1, 2.2, 9]) == [0, 0, 1, 1]


# -- tables ----------------------------------------------------------------------------------------


def _table(images: int = 400, seed: int = 0) -> Table:
    """Answers of a network of four routes that are right the more often the wider they are."""
    rng = np.random.default_rng(seed)
    spec = ZOO["ds_resnet8_cifar"]
    labels = rng.integers(0, 10, images)
    hard = rng.random(images)
    logits = rng.normal(size=(images, 4, 10)).astype(np.float32)
    for k in range(4):
        logits[np.arange(images), k, labels] += 6 * (1 - hard) + k * hard
    gate = np.stack([-hard, -hard / 2, hard / 2, hard], 1).astype(np.float32) - 0.5
    features = hard[:, None].astype(np.float32)
    return Table(spec, 32, logits, labels, gate, features, features, features)


def test_costs_and_losses_of_a_table():
    table = _table(50)
    spec = table.spec
    for cost, route in zip(table.costs_R, spec.routes, strict=True):
        # a path has its gate's slimming head, a route alone has not
        assert cost == pytest.approx(madds(spec, route, 32), rel=1e-4)
        assert cost >= madds(spec, route, 32)
    chances = np.exp(table.logits_NRC) / np.exp(table.logits_NRC).sum(2, keepdims=True)
    own = chances[np.arange(50), :, table.labels_N]
    assert table.losses_NR == pytest.approx(-np.log(own), rel=1e-4)


def test_the_arithmetic_here_is_the_runtimes():
    """`policies.ladder` and `simulate`, which the engine is tested against, agree."""
    table = _table()
    for target, tau in [(1, 0.3), (3, 0.7)]:
        ours = policies.ladder(
            table.correct_NR, table.margins_NR, table.costs_R, table.trunk, (0, target), (tau,)
        )
        found = simulate(table.paths, comparisons.FAR, [Escalation(tau, (target,))])
        assert (ours.cost, ours.top1) == pytest.approx((found.madds, found.top1))
        assert ours.escalated == pytest.approx(found.escalated)


def test_every_way_keeps_to_its_budget_where_it_was_chosen():
    table = _table()
    found = comparisons.compare(table, table)
    assert set(found["ways"]) == {
        "both", "gate", "escalation", "ladder", "cascade_one_network", "random",
    }  # fmt: skip
    for name, rows in found["ways"].items():
        for share, row in zip(found["shares"], rows, strict=True):
            cheapest = min(found["madds"]) / max(found["madds"])
            assert row["share"] <= max(share, cheapest) + 1e-9 or name == "ladder"
            line = policies.uniform_line(found["madds"], found["top1"], row["madds"])
            assert row["over_uniform"] == pytest.approx(row["top1"] - line)
    both, gate = (np.array([r["top1"] for r in found["ways"][w]]) for w in ("both", "gate"))
    assert (both >= gate - 1e-9).all()
    assert found["oracle"]["top1"] >= both.max()
    json.dumps(found)


def _looking(images: int = 400, seed: int = 0) -> Table:
    """As `_table`, with answers for mirror images, which are as good as those of the widest."""
    table, other = _table(images, seed), _table(images, seed)
    rng = np.random.default_rng(seed + 100)
    mirrored = other.logits_NRC[:, -1] + rng.normal(0, 1.5, (images, 10)).astype(np.float32)
    return replace(table, mirrored_NC=mirrored)


def test_the_oracle_has_its_control():
    right, mirrored = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    assert policies.seen_twice(right, mirrored, 4.0) == (8.0, 0.75, 1.0)
    table = _looking()
    found = comparisons.compare(table, table)
    either = table.correct_NR[:, 3] | (table.mirrored_NC.argmax(1) == table.labels_N)
    assert found["seen_twice"] == {
        "cost": 2 * table.costs_R[3], "top1": either.mean(), "escalated": 1.0
    }  # fmt: skip
    assert comparisons.compare(_table(), _table())["seen_twice"] is None
    json.dumps(found)


def test_a_second_look_is_judged_beside_doing_without():
    # hard images, whose mirror images are always right
    table = _looking()
    noise = np.random.default_rng(1).normal(0, 3, table.logits_NRC.shape).astype(np.float32)
    table = replace(table, logits_NRC=table.logits_NRC + noise)
    sure = np.full_like(table.mirrored_NC, -30)
    sure[np.arange(400), table.labels_N] = 30
    table = replace(table, mirrored_NC=sure)
    assert table.paths.second_look_N.mean() > 0.95
    assert table.seen_once.paths.second_look_N is None
    found = comparisons.compare(table, table)
    both, once = (found["ways"][way] for way in ("both", "seen_once"))
    assert "seen_once" not in comparisons.compare(table.seen_once, table.seen_once)["ways"]
    assert both[-1]["top1"] > once[-1]["top1"] + 0.05
    assert both[-1]["share"] <= 1.3
    setting = found["settings"]["both"][-1]
    steps = comparisons.escalations_of(json.loads(json.dumps(setting)))
    assert steps[-1].mirror
    assert simulate(table.paths, setting["shift"], steps).top1 == both[-1]["top1"]
    point = measure_ms._point(setting)
    assert list(point.escalations) == steps


def test_a_table_comes_back_from_its_file(tmp_path):
    table = _looking(20)
    table.save(tmp_path / "t.npz")
    found = Table.read(tmp_path / "t.npz")
    assert found.spec == table.spec
    assert (found.logits_NRC == table.logits_NRC).all()
    assert (found.rows(np.array([3, 5])).labels_N == table.labels_N[[3, 5]]).all()
    assert (found.mirrored_NC == table.mirrored_NC).all()
    assert found.rows(np.array([3, 5])).mirrored_NC.shape == (2, 10)
    assert found.route(2).mirrored_NC is None
    scores = averaged(table.logits_NRC[:, 3], table.mirrored_NC)
    assert (table.paths.second_look_N == (scores.argmax(1) == table.labels_N)).all()


def test_answers_have_the_mirror_images_where_they_may(one_thread):
    net = lively_net("ds_resnet8_cifar")
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    images = ImageDataset(pixels, torch.arange(6), tuple("abcdefghij"), "noise")
    pre = Preprocessing(32)
    recipe = {"supernet": {"augment": {"mirror": True}}}
    made = answer(Checkpoint(net, preprocessing=pre, recipe=recipe), images)
    with torch.inference_mode():
        expected = net(normalise(pixels, pre).flip(3), net.spec.widest_choice).numpy()
    np.testing.assert_allclose(made.mirrored_NC, expected, atol=1e-4 * np.abs(expected).max())
    assert answer(Checkpoint(net, preprocessing=pre), images).mirrored_NC is None


def test_a_cascade_of_one_network_pays_its_trunk_twice():
    table = _table()
    alone = {k: table.route(k) for k in range(4)}
    (first, *_) = comparisons.cascade(alone, alone)
    assert first.escalated == 0 or first.cost > table.costs_R[0]
    tau = policies.threshold_for(table.margins_NR[:, 0], 0.3)
    whole = comparisons._cascade(alone, 0, 3, tau)
    kept = policies.ladder(
        table.correct_NR, table.margins_NR, table.costs_R, table.trunk, (0, 3), (tau,)
    )
    assert whole.top1 == kept.top1
    assert whole.cost == pytest.approx(kept.cost + 0.3 * table.trunk, rel=1e-3)


def test_heads_find_what_distinguishes_the_routes(monkeypatch, one_thread):
    """Hard images gain by width: a head that sees how hard they are beats the uniform line."""
    monkeypatch.setattr(heads, "BISECTIONS", 5)
    table = _table(1500)
    noise = np.random.default_rng(1).normal(size=(1500, 3)).astype(np.float32)
    features = np.concatenate([table.hidden_NF, noise], 1)

    def fit(weight: float) -> heads.Head:
        return heads.fit(
            features, table.losses_NR, table.costs_R, cost_weight=weight, iterations=20
        )

    head = heads.fit_to_cost(fit, features, table.costs_R, 0.5)
    found = policies.gated(table.correct_NR, table.costs_R, head(features).argmax(1))
    assert 0.3 < found.cost / max(table.costs_R) <= 0.5
    assert found.top1 > policies.uniform_line(table.costs_R, table.top1_R, found.cost) + 0.02


# -- plans and cells -------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", plan.EXPERIMENTS)
def test_every_experiment_has_jobs_with_cells_of_their_own(experiment):
    jobs = plan.jobs_of(experiment, None, (0, 1, 2))
    assert len({str(job.cell) for job in jobs}) == len(jobs)
    first_alone = experiment == "rates_cifar10"
    assert {job.cell.seed for job in jobs} == ({0} if first_alone else {0, 1, 2})
    for job in jobs:
        assert job.recipe.seed == job.cell.seed
        json.dumps(job.settings())
        assert job.needs is None or job.needs.cell.seed == job.cell.seed


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match="choose from headline"):
        plan.jobs_of("headlines", None, (0,))
    with pytest.raises(UsageError, match="headline has supernet, gates, static3"):
        plan.jobs_of("headline", None, (0,), ["static9"])


def test_rates_to_try_are_named(capsys):
    assert run.main(["rates_quick", "--rates", ""]) == 2
    assert capsys.readouterr().err.startswith("--rates '': give learning rates to try")
    assert run.main(["rates_quick", "--rates", "0.1,fast"]) == 2
    assert capsys.readouterr().err.startswith("--rates '0.1,fast': expected numbers")
    (job, *_) = plan.jobs_of("rates_quick", None, (0,), rates=[0.3])
    assert job.recipe.optim.lr == 0.3


def test_where_the_images_lie_is_no_part_of_the_settings():
    here, there = (plan.cifar10(folder, 0).to_dict() for folder in (None, "elsewhere"))
    assert here != there
    assert cells.digest(here) == cells.digest(there)
    assert cells.digest(here) != cells.digest(plan.cifar10(None, 1).to_dict())


def test_committed_cells_are_of_the_settings_in_the_plan():
    """A recipe that was changed after its numbers were made would be of other networks."""
    jobs = [job for name in plan.EXPERIMENTS for job in plan.jobs_of(name, None, range(3))]
    for job in jobs:
        found = job.cell.read()
        assert found is None or found["settings_sha256"] == cells.digest(job.settings()), job.cell


def test_learning_rates_are_those_that_the_held_out_images_chose():
    top1 = {
        cell["variant"]: np.mean(cell["held_out"]["top1"])
        for cell in cells.all_cells("rates_cifar10")
    }
    _, chosen = plan.best_settings("cifar10", ["labels"])
    assert top1[f"labels_lr{chosen:g}"] == max(top1[f"labels_lr{rate:g}"] for rate in plan.RATES)
    assert plan.best_settings("cifar10", ["another way"]) == ("another way", 0.2)


def test_an_average_of_another_decay_is_used_where_the_held_out_images_chose_it():
    tried = plan.tried_rates("quick")
    ways = [way for way in plan.ways_of("quick") if way.split("_")[0] == "both"]
    means = {
        (way, rate): np.mean(top1)
        for way in ways
        for rate, top1 in tried[way].items()
        if len(top1) == 3
    }
    chosen = plan.best_settings("quick", ways)
    assert means[chosen] == max(means.values())
    recipe = next(job.recipe for job in plan.jobs_of("quick", None, (0,), ["both"]))
    assert (recipe.ema_decay, recipe.optim.lr) == (
        plan.ways_of("quick")[chosen[0]]["ema_decay"],
        chosen[1],
    )


def test_the_recipe_that_ships_is_the_one_that_is_measured():
    shipped = plan.cifar10(None, 0, epochs=None)
    (longer, *_) = plan.jobs_of("longer", None, [0])
    assert longer.recipe == shipped


def test_a_static_network_is_the_route_alone():
    # where every block has attention, that of a narrow network has fewer hidden features
    for name, near in (("ds_resnet8_cifar", 0), ("ds_mbnet_tiny", 0.01)):
        spec = ZOO[name]
        for k, route in enumerate(spec.routes):
            alone = static_spec(spec, k)
            assert alone.routes == (route,)
            cost = madds(spec, route, 32)
            assert madds(alone, alone.smallest, 32) == pytest.approx(cost, rel=near)


# -- all steps -------------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Experiments on pictures of 16 px whose class is their brightness; files in `tmp_path`."""
    folder = tmp_path / "data" / "toy"
    write_parquet(folder, bright_pngs(240), classes=4, split="train")
    write_parquet(folder, bright_pngs(80), classes=4, split="test")
    spec = ZOO["ds_resnet8_cifar"].replace(name="toy", num_classes=4)
    widths = (4,), (4,), (4, 8, 14, 24), (4, 8, 14, 24)
    stages = tuple(
        replace(stage, widths=w, stride=2) for stage, w in zip(spec.stages, widths, strict=True)
    )
    model = write_spec(tmp_path / "toy.yaml", spec.replace(stages=stages))

    def recipe(_, seed, epochs=None):
        return SupernetRecipe(
            model=str(model),
            epochs=2,
            batch_size=24,
            seed=seed,
            calibration_batches=4,
            channels_last=False,
            optim=OptimRecipe(lr=0.1),
            data=DataRecipe(path=str(folder), val_share=0.2, image_size_px=16),
        )

    monkeypatch.setattr(plan, "cifar10", recipe)
    monkeypatch.setattr(plan, "LATENCY", str(tmp_path / "latency.json"))
    monkeypatch.setattr(cells, "CELLS", tmp_path / "cells")
    monkeypatch.setattr(cells, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(judging, "RUNS", tmp_path / "runs")
    judging._images.cache_clear()
    return tmp_path


def test_headline_from_training_to_cell(toy, one_thread, capsys):
    jobs = plan.jobs_of("headline", None, [0])
    for job in (*jobs, *plan.jobs_of("distillation", None, [0])):
        training.run(job)
        assert job.cell.is_done(job.settings())
    cell = jobs[0].cell.read()
    assert len(cell["held_out"]["top1"]) == len(cell["madds"]) == 4
    assert not re.search(r"/data/|tmp", json.dumps(cell["settings"]["recipe"]["data"]))
    static = plan.Cell("headline", "static3", 0).read()
    assert static["madds"] == cell["madds"][3:]
    assert static["held_out"]["top1"][0] > 0.3, "four classes"
    assert run.main(["headline", "--seeds", "0", "--list"]) == 0
    assert capsys.readouterr().out.count(": done") == len(jobs)

    (compared,) = judging.judge("headline", None, [0], test=False)
    judging.judge("headline", None, [0], test=True)
    found = compared.read()
    assert found["held_out"]["images"] == 24
    assert found["test"]["images"] == 80
    assert "cascade" in found["test"]["ways"]
    assert len(found["test"]["static_top1"]) == len(found["test"]["distillation_top1"]) == 4
    assert [g["target"] for g in found["test"]["gates"]] == list(plan.TARGETS)


def test_gates_by_milliseconds_and_of_every_feature(toy, one_thread, monkeypatch):
    monkeypatch.setattr(heads, "BISECTIONS", 1)
    for job in plan.jobs_of("headline", None, [0], ["supernet", "gates"]):
        training.run(job)
    spec = dynaslim.read(cells.Cell("headline", "gates", 0).run / "gate_0.50.safetensors").net.spec
    as_if_ms = replace(CostTable.from_madds(spec, 16), unit="ms")
    write_cost_table(plan.LATENCY, as_if_ms, spec, 16)
    (job,) = plan.jobs_of("gates", None, [0])
    training.run(job)
    (compared,) = judging.judge("gates", None, [0], test=False)
    found = compared.read()["held_out"]
    assert set(found["features"]) == {
        name + more for name in judging.FEATURES for more in ("", ", hidden layer")
    }
    for rows in (*found["trained_on"].values(), *found["features"].values()):
        assert [row["target"] for row in rows] == list(plan.TARGETS)
    assert set(found["trained_on"]) == {"madds", "ms"}


def test_a_gate_without_its_supernet_is_refused(toy):
    (job,) = plan.jobs_of("headline", None, [0], ["gates"])
    with pytest.raises(UsageError, match="needs headline/supernet_s0, which is not trained yet"):
        training.run(job)


def test_imagenette_is_skipped_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(run, "has_gpu", lambda: False)
    assert run.main(["imagenette"]) == 0
    assert "skipped, it needs a GPU" in capsys.readouterr().out


# -- summaries and page ----------------------------------------------------------------------------


def _compared(seed: int) -> dict:
    table = _looking(300, seed)
    found = comparisons.compare(table, _looking(300, seed + 10))
    found["gates"] = [{"target": t, **judging._gated(table)} for t in plan.TARGETS]
    found["static_top1"] = [top1 - 0.01 for top1 in found["top1"]]
    found["distillation_top1"] = [top1 - 0.02 for top1 in found["top1"]]
    return found


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Cells of three seeds, times of one, and where the page goes."""
    for name in ("CELLS", "RUNS"):
        monkeypatch.setattr(cells, name, tmp_path / name.lower())
    for module in (summaries, table):
        monkeypatch.setattr(module, "HERE", tmp_path / "results")
    monkeypatch.setattr(table, "DOCS", tmp_path / "docs")
    for seed in range(3):
        found = _compared(seed)
        for name in ("headline", "imagenette"):
            cells.Cell("compare", name, seed).write({"seed": seed}, {"test": found})
        top1 = {target: [0.7 + k / 50 for k in range(4)] for target in plan.TEACHING}
        cells.Cell("compare", "quick", seed).write({"seed": seed}, {"test": {"top1": top1}})
    times = {f"route{k}": {"median": 0.1 * (k + 1)} for k in range(4)}
    for way in ("both", "gate", "escalation"):
        for share in comparisons.SHARES:
            times[f"{way}@{share:g}"] = {"median": 0.4 * share}
    for arm in times.values():
        arm["faster_than_widest"] = {"median": 0.4 / arm["median"]}
    slow = {name: {**arm, "median": 2 * arm["median"]} for name, arm in times.items()}
    made = {"ms_per_image": {"slow": slow, "fast": times}, "shares": list(comparisons.SHARES)}
    made |= {"hardware": {"cores": 2, "processor": "P"}, "batch": 32, "rounds": 9}
    made["settings_sha256"] = cells.digest(plan.jobs_of("headline", None, [0])[0].settings())
    (tmp_path / "results" / "ms").mkdir(parents=True)
    (tmp_path / "results" / "ms" / "headline_s0.json").write_text(json.dumps(made))
    return tmp_path


def test_means_spreads_and_goals(written):
    found = summaries.supernets("headline")
    seeds = [_compared(seed)["top1"][3] for seed in range(3)]
    assert found["split"] == "test"
    assert found["routes"][3]["mean"] == pytest.approx(np.mean(seeds))
    assert found["routes"][3]["sd"] == pytest.approx(np.std(seeds, ddof=1))
    assert found["supernet_less_static_top1"]["mean"] == pytest.approx(0.01)
    assert found["ms"]["backend"] == "fast"
    goals = found["goals"]
    assert goals["not_below_statics"] is True
    for row in goals["budgets"]:
        near = row["drop"] <= 0.3 and row["share"] <= 0.5 and row["speed"] >= 1.62
        assert (row["budget"] in goals["near_the_widest"]) == near
        over = row["over_uniform_madds"] >= 0.5 and row["over_uniform_ms"] >= 0.3
        assert (row["budget"] in goals["over_uniform"]) == over
    assert goals["over_uniform"], "these tables are made for gates to win"


def test_one_seed_that_was_not_tested_keeps_the_test_split_shut(written):
    cells.Cell("compare", "headline", 3).write({"seed": 3}, {"held_out": _compared(3)})
    assert summaries.supernets("headline")["split"] == "held_out"
    assert summaries.supernets("headline")["seeds"] == [3]


def test_the_page_has_what_is_in_the_summaries(written, capsys):
    (written / "results" / "notes.md").write_text("A note of a person.\n")
    assert table.main([]) == 0
    assert table.main(["--check"]) == 0
    text = (written / "docs" / "results.md").read_text()
    found = summaries.supernets("headline")
    for value in found["routes"]:
        assert f"{100 * value['mean']:.2f} ± {100 * value['sd']:.2f}" in text
    assert "A note of a person." in text
    # no oracle without its control
    twice = f"{100 * found['seen_twice']['top1']['mean']:.2f}"
    assert re.search(rf"\| oracle: .*\n\| its control: .* \| {twice} ± ", text)
    assert text.count("| oracle: ") == text.count("| its control: ") > 1
    assert text.count("The oracle gives") == text.count("is right at least once for")
    photographs = text.split("## Imagenette")[1].split("## Ablations")[0]
    assert "Imagenette, gate and escalation, on the images of the test split" in photographs
    assert f"{100 * found['routes'][0]['mean']:.2f}" in photographs
    for picture in re.findall(r"\]\((img/.*?)\)", text):
        assert b"uniform routes" in (written / "docs" / picture).read_bytes()
    (written / "docs" / "results.md").write_text(text.replace("CIFAR-10", "CIFAR-11"))
    capsys.readouterr()
    assert table.main(["--check"]) == 1
    assert capsys.readouterr().out == "docs/results.md: stale\n"


def test_the_committed_page_is_current():
    assert table.main(["--check"]) == 0


def test_a_repeated_number_is_held_against_the_spread(written, monkeypatch, capsys):
    assert summaries.within(0.71, {"mean": 0.70, "sd": 0.004})
    assert not summaries.within(0.713, {"mean": 0.70, "sd": 0.004})
    assert summaries.within(0.709, {"mean": 0.70, "sd": 0.0})
    monkeypatch.setattr(quick, "repeat", lambda seed, folder: dict.fromkeys(plan.TEACHING, 0.735))
    assert quick.main([]) == 0
    assert capsys.readouterr().out.count("within the spread") == len(plan.TEACHING)
    monkeypatch.setattr(quick, "repeat", lambda seed, folder: {"labels": 0.76, "ensemble": 0.73})
    assert quick.main([]) == 1
    out = capsys.readouterr().out
    assert out.count("OUTSIDE") == out.count("within") == 1


# -- the model that ships --------------------------------------------------------------------------


def test_what_ships_is_made_of_a_supernet(toy, one_thread):
    from results import ship

    (job,) = plan.jobs_of("headline", None, [0], ["supernet"])
    training.run(job)
    argv = [str(job.cell.checkpoint), "--data", str(toy / "data"), "--name", "toy"]
    assert ship.main([*argv, "--out", str(toy), "--run", str(toy / "ship")]) == 0
    made = dynaslim.read(toy / "toy.safetensors")
    assert made.recipe["supernet"]["data"]["path"] == "toy"
    for place in ("data", "runs", "ship"):
        assert f"{toy}/{place}" not in json.dumps(dict(made.recipe))
    assert made.metrics["test"]["images"] == 80
    rows = made.metrics["test_budgets"]
    engine = dynaslim.Engine(made, backend="eager", cache_dir=None)
    images = images_of(str(toy / "data" / "toy"), "test", made.preprocessing)
    x = normalise(images.images_NCSS, made.preprocessing).numpy()
    for row in rows:
        out = engine(x, budget=row["budget"])
        assert out.madds.mean() == pytest.approx(row["madds"])
        assert (out.logits.argmax(1) == images.labels_N.numpy()).mean() == row["top1"]
    card = (toy / "toy.md").read_text()
    assert card.startswith("# toy")
    for row in rows:
        assert (
            f"| budget {row['budget']:g} | {row['madds'] / 1e6:.2f} M | {row['top1']:.2%}" in card
        )
