"""Routed inference: the product. Needs no torch where a package is run.

Suffixes: B rows, G gates, K options of a gate, N classes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dynaslim.cost import CostTable
from dynaslim.errors import UsageError, check
from dynaslim.graph import AnySpec
from dynaslim.runtime.arrays import Array
from dynaslim.runtime.auto import fastest
from dynaslim.runtime.backends import (
    Backend,
    Counts,
    Resources,
    default_device,
    make_backend,
)
from dynaslim.runtime.budget import BudgetCurve, PathCosts
from dynaslim.runtime.cache import open_cache, usable_cores
from dynaslim.runtime.decisions import Budget, Decisions, HeldCall, make_decisions
from dynaslim.runtime.options import EngineOptions, RoutedOutput, check_images, like
from dynaslim.runtime.package import Package, open_package
from dynaslim.runtime.router import Router
from dynaslim.runtime.spending import Ledger
from dynaslim.runtime.variants import Precision, VariantSource, check_precision, variant_table
from dynaslim.spec import Route

if TYPE_CHECKING:
    from dynaslim.checkpoint import Checkpoint
    from dynaslim.nn.net import ElasticNet

Escalate = Literal["auto"] | float | None
_KEPT_DECISIONS = 64


class Engine:
    """Runs a network on batches, every image along the route that its gates choose.

        engine = dynaslim.Engine(net)                  # or Engine.from_checkpoint, .from_package
        logits, routes, madds = engine(x)
        logits, routes, madds = engine(x, budget=0.6)       # of the widest route's cost

    The trunk runs on the whole batch; at each gate rows are sorted into buckets by choice, and each
    bucket runs the next segment as a dense network of just its width. A row's answer does not
    depend on the rows it came with, to float tolerance. The weights are copied: a network that is
    trained further needs a new engine. Programs are compiled when they are first needed (`warm_up`
    does it ahead) and kept on disk. May be called by several threads at once.
    """

    def __init__(
        self,
        net: ElasticNet | Checkpoint | Package,
        *,
        source: VariantSource | None = None,
        backend: str = "auto",
        precision: str = "fp32",
        calibration: Any = None,
        **options: Any,
    ) -> None:
        """Make an engine of a network, or of a checkpoint or a package, which bring a budget curve.

        `backend` is one of `dynaslim.runtime.backends.BACKENDS` or "auto", which measures those
        that are installed for a few seconds and takes the fastest. `precision` is fp32, bf16 or
        int8; int8 needs `calibration`, an iterable of normalised batches (B, C, H, W). A `source`
        has the network's segments in a precision of its own. Other options are the fields of
        `EngineOptions`.

        Raises:
            UsageError: for an unknown backend or one that is not installed, a precision that it
                does not have, an option that makes no sense, or a network without gates.
            RuntimeError: if the network is in training mode.
        """
        self._options = EngineOptions.named(options)
        if isinstance(net, Package):
            source = net.source
        else:
            from dynaslim.checkpoint import Checkpoint

            net = net if isinstance(net, Checkpoint) else Checkpoint(net)
        if source is None:
            assert not isinstance(net, Package)
            source = self._source_of(net.net, backend, check_precision(precision), calibration)
        else:
            check(
                precision == "fp32" and calibration is None,
                f"precision {precision}, calibration: the variants are {source.precision} already",
            )
        self.spec: AnySpec = source.spec
        if not self.spec.gates:
            raise UsageError(f"{self.spec.name} has no gates: call net(x, route) instead")
        self.source: VariantSource = source
        self.class_names = net.class_names
        self.preprocessing = net.preprocessing
        self.mirror = net.mirror
        """Whether unsure images may be shown as their mirror images too."""
        self.curve: BudgetCurve | None = None
        if net.budget is not None:
            self.curve = BudgetCurve.from_dict(net.budget)
            self.curve.check_fits(self.spec, mirror=self.mirror)
        self.latency = self._options.table(self.spec)
        self.measured: dict[str, float] = {}
        """What "auto" measured: milliseconds of a batch by backend."""
        cache = open_cache(source.key, self._options.cache_dir)
        self._resources = Resources(self._options.workers or usable_cores(), cache)
        self._costs: dict[tuple[int, int], PathCosts] = {}
        self._decided: dict[tuple[Any, ...], Decisions] = {}
        self._ledgers: dict[float, Ledger] = {}
        self._router: Router | None = None
        self._starting = threading.Lock()
        if backend != "auto":
            self._start(make_backend(backend, source, self._resources))

    def _source_of(
        self, net: ElasticNet, backend: str, precision: Precision, calibration: Any
    ) -> VariantSource:
        """The source of a network's variants, in a precision."""
        if precision == "int8" and net.has_weights:
            from dynaslim.runtime.quantise import QuantisedSource

            check(calibration is not None, "precision int8 needs calibration: batches of images")
            return QuantisedSource(
                net, calibration, backend=backend, cache_dir=self._options.cache_dir
            )
        from dynaslim.runtime.program_net import source_of

        made = source_of(net, precision)
        check(calibration is None, f"calibration is for precision int8, not {made.precision}")
        return made

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, device: Any = None, **options: Any) -> Engine:
        """An engine of a checkpoint file; options as those of `Engine`.

        `device` None is the CPU, and for backend cudagraph the GPU.

        Raises:
            CheckpointError: as `dynaslim.read`.
            UsageError: as `Engine`.
        """
        from dynaslim.checkpoint import read

        if device is None:
            device = default_device(options.get("backend", "auto"))
        return cls(read(path, device=device), **options)

    @classmethod
    def cascade(cls, rungs: Sequence[Any], **options: Any) -> Engine:
        """An engine of a cascade of whole networks: all images run on the first, unsure ones go on.

            engine = dynaslim.Engine.cascade(["small.safetensors", "large.safetensors"])
            logits, rungs, madds = engine(x, escalate=0.3)      # a margin
            engine.calibrate(batches)                           # of held-out images and labels
            logits, rungs, madds = engine(x)                    # at most 0.5 points are lost

        `rungs` are as for `dynaslim.cascade`, which gives what `export_package` and `evaluate`
        take; options as those of `Engine`.

        Raises:
            As `dynaslim.cascade` and `Engine`.
        """
        from dynaslim.runtime.cascade import cascade

        return cls(cascade(rungs), **options)

    @classmethod
    def from_source(
        cls, source: VariantSource, checkpoint: Checkpoint, *, backend: str = "auto", **options: Any
    ) -> Engine:
        """An engine of a checkpoint's network with a source of its own; options as above.

        Raises:
            UsageError: as `Engine`.
        """
        return cls(checkpoint, source=source, backend=backend, **options)

    @classmethod
    def from_package(cls, path: str | Path, *, backend: str = "auto", **options: Any) -> Engine:
        """An engine of an exported package, by onnxruntime or openvino; torch is not needed.

        Options as those of `Engine`, but precision and calibration, which were settled when the
        package was made.

        Raises:
            PackageError: if a file is missing, altered, or of a newer version.
            UsageError: if the backend does not run packages, or is not installed, or for a
                precision or calibration.
        """
        for name in ("precision", "calibration"):
            check(
                name not in options,
                f"{name}: a package runs in the precision that it was exported in; "
                f"leave it out, or export anew",
            )
        return cls(open_package(path), backend=backend, **options)

    def _start(self, backend: Backend) -> Router:
        merge = None
        if self._options.merge and self.latency is not None:
            merge = partial(self.latency.merge, variant_table(self.spec))
        self._router = Router(
            self.spec, backend, rows_per_piece=self._options.rows_per_piece, merge=merge
        )
        return self._router

    def _running(self, size: tuple[int, int] | None = None) -> Router:
        """The router; "auto" chooses here, for the first batch's size if none was given."""
        if self._router is not None:
            return self._router
        with self._starting:
            if self._router is None:
                given = self._options.image_size
                side = self._side() if given is None else given
                backend, self.measured = fastest(
                    self.source,
                    self._resources,
                    (side, side) if given is not None or size is None else size,
                    self._options.batch_size,
                )
                self._start(backend)
            assert self._router is not None
            return self._router

    def _side(self) -> int:
        """The side of the images that the network is for."""
        if self.preprocessing is not None:
            return self.preprocessing.image_size_px
        return self.spec.usual_image_size

    @property
    def backend(self) -> str:
        """The name of the backend; "auto" has chosen when this returns."""
        return self.router.backend.name

    @property
    def router(self) -> Router:
        """What divides and runs the batches."""
        return self._running()

    @property
    def counts(self) -> Counts:
        """Which programs were compiled in this process, and which were read from disk."""
        return self.router.backend.counts

    def warm_up(self, image_size: int | None = None) -> None:
        """Compile all that routing needs for images of `image_size` pixels, before it is needed."""
        side = self._side() if image_size is None else image_size
        self.spec.check_image_size(side, side)
        self._running((side, side)).warm_up((side, side))

    def calibrate(self, batches: Iterable[tuple[Any, Any]]) -> BudgetCurve:
        """Measure the budget curve on held-out images, and use it from now on.

        `batches` are tensors of normalised images (B, C, S, S) and labels (B,), together 100 images
        or more. For a cascade this finds the thresholds of all rungs together.

        Raises:
            UsageError: if there are fewer images, or they are not square or not of one size.
        """
        from dynaslim.runtime.budget_search import LEAST_IMAGES, fit_curve
        from dynaslim.runtime.calibrate_budget import answer_paths
        from dynaslim.runtime.program_net import ProgramNet

        answers = answer_paths(ProgramNet(self.source), batches, mirror=self.mirror)
        check(
            len(answers) >= LEAST_IMAGES,
            f"{len(answers)} images are too few to tell settings apart; give {LEAST_IMAGES}",
        )
        self.curve = fit_curve(answers)
        self._decided.clear()
        return self.curve

    def route_of(self, indices: Any) -> Route:
        """The route for one row of `RoutedOutput.routes`."""
        return self.spec.route_at([int(index) for index in indices])

    def __call__(
        self,
        x: Any,
        *,
        budget: Budget | None = None,
        shift: float | None = None,
        escalate: Escalate = "auto",
        max_route: Route | str | Sequence[int] | None = None,
        hold: bool | Ledger = False,
    ) -> RoutedOutput:
        """Images (B, in_channels, H, W), normalised -> logits, routes and costs of every row.

        `budget` is a share of the widest route's multiply-adds (0.6), "250M" of them or "4.5ms" as
        means per image, or "drop=0.3" points of accuracy (see `BudgetCurve.at`); it needs a curve.
        `shift` moves the gates' decisions by hand: positive is cheaper. `escalate` "auto" lets rows
        escalate, to a wider route or to their mirror image, as the curve sets for the budget; a
        number lets rows whose margin (likeliest minus next probability) is below it, on top of the
        budget; None never. `max_route` caps the width of every row. A cascade with a curve takes
        "drop=0.5" where neither a budget nor a shift is given, and a number lets its rows go on
        from rung to rung.

        A budget is what images like those of the curve cost on average. With `hold` it is a bound:
        the mean cost of all rows of the engine's calls with this budget and `hold` never exceeds
        it, whatever they are. Fewer rows then take wider routes or escalate, which depends on the
        rows before and beside them, and on nothing else. A `Ledger` instead of True counts the
        rows of the calls that it is given to. Of budgets in ms and drop= it is the mean multiply-
        adds of their point that holds.

        Raises:
            UsageError (a ValueError): if x is not a batch of images that the network takes, or the
                arguments do not fit; the engine works on.
            ValueError: if an image has values that are not finite.
        """
        size = check_images(x, self.spec)
        router = self._running(size)
        decisions = self._decisions(
            size,
            budget=budget,
            shift=shift,
            escalate=escalate,
            max_route=max_route,
            hold=hold is not False,
        )
        ledger = self._ledger(decisions, hold)
        return RoutedOutput(
            *self._in_parts(
                x,
                router,
                lambda images, first: self._routed(router, images, decisions, first, ledger),
            )
        )

    def static(self, route: Route | str | Sequence[int]) -> Callable[[Any], Any]:
        """One route for all images and no gate: images (B, in_channels, H, W) -> logits (B, N).

        A package runs it segment by segment, which costs a little more than one program, and only
        along routes that its gates can take.

        Raises:
            UsageError: if the route is not one of the network's, or not in the package.
        """
        checked = self.spec.coerce_route(route)
        path: tuple[int, ...] | None = None
        if not self.source.has_modules:
            try:
                path = self.spec.path_of(checked)
            except UsageError:
                raise UsageError(
                    f"route {checked}: is not in the package, whose gates choose among "
                    f"{', '.join(map(str, self.spec.routing_space[:4]))}"
                    f"{', ...' if len(self.spec.routing_space) > 4 else ''}"
                ) from None

        def run(x: Any) -> Any:
            router = self._running(check_images(x, self.spec))

            def logits(images: Array, first: int) -> tuple[np.ndarray]:
                if path is not None:
                    return (router.along(images, path, first=first),)
                return (router.backend.arrays.host(router.static(images, checked, first=first)),)

            return self._in_parts(x, router, logits)[0]

        return run

    def close(self) -> None:
        """Let the threads go; the next call starts new ones."""
        if self._router is not None:
            self._router.workers.close()

    # -- one call -----------------------------------------------------------------------------

    def _in_parts(
        self,
        x: Any,
        router: Router,
        run: Callable[[Array, int], tuple[np.ndarray, ...]],
    ) -> list[Any]:
        """What `run` gives for at most `max_batch` images, and the row of the first, at a time.

        Its results are joined, and given as the caller gave the images.
        """
        images, most = router.backend.arrays.images(x), self._options.max_batch
        parts = [run(images[n : n + most], n) for n in range(0, len(images), most)]
        parts = parts or [self._nothing()]
        joined = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
        return [like(x, result) for result in joined]

    def _decisions(self, size: tuple[int, int], **arguments: Any) -> Decisions:
        """The decisions of a call by its arguments; those of the last calls are kept."""
        # types too: True is no budget, though it equals 1.0
        key = (size, *arguments.values(), *map(type, arguments.values()))
        try:
            known = self._decided.get(key)
        except TypeError:  # a list cannot be looked up
            return self._make_decisions(size, arguments)
        if known is None:
            known = self._make_decisions(size, arguments)
            if len(self._decided) >= _KEPT_DECISIONS:  # a budget that moves all the time
                self._decided.clear()
            self._decided[key] = known
        return known

    def _make_decisions(self, size: tuple[int, int], arguments: Mapping[str, Any]) -> Decisions:
        costs = self._costs.get(size)
        if costs is None:
            costs = self._costs[size] = PathCosts(CostTable.from_madds(self.spec, size))
        return make_decisions(self.spec, costs, self.curve, mirror=self.mirror, **arguments)

    def _ledger(self, decisions: Decisions, hold: bool | Ledger) -> Ledger | None:
        """Where a call counts what it costs; None if its budget need not hold."""
        if decisions.held is None:
            return None
        check(not self._options.merge, "hold: not with merge, which makes routes wider afterwards")
        if isinstance(hold, Ledger):
            return hold
        if len(self._ledgers) >= _KEPT_DECISIONS:  # a new one starts from 0, and holds as well
            self._ledgers.clear()
        return self._ledgers.setdefault(decisions.held, Ledger())

    @staticmethod
    def _routed(
        router: Router, images: Array, decisions: Decisions, first: int, ledger: Ledger | None
    ) -> tuple[np.ndarray, ...]:
        """One part of a batch; a budget that holds is taken from the ledger."""

        def answers(chosen: Decisions | HeldCall) -> tuple[np.ndarray, ...]:
            return decisions.results(
                router.routed(
                    images, chosen.decide, chosen.unsure, limits=decisions.limits, first=first
                )
            )

        if ledger is None:
            return answers(decisions)
        assert decisions.held is not None
        unspent = ledger.reserve(len(images), decisions.held)
        try:
            made = answers(decisions.within(len(images), unspent))
            unspent -= float(made[2].sum()) / decisions.costs.table.widest_cost
        except BaseException:
            unspent -= len(images) * decisions.held  # as if the call had not been made
            raise
        finally:
            ledger.give_back(unspent)
        return made

    def _nothing(self) -> tuple[np.ndarray, ...]:
        return (
            np.empty((0, self.spec.num_classes), np.float32),
            np.empty((0, len(self.spec.gates)), np.int64),
            np.empty(0),
            np.empty(0, bool),
            np.empty(0, bool),
        )
