"""Routed inference: the engine. Running a package needs no torch.

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
    FROM_PACKAGE,
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
from dynaslim.runtime.package import open_package
from dynaslim.runtime.router import Router
from dynaslim.runtime.spending import Ledger
from dynaslim.runtime.variants import (
    OpenModel,
    Precision,
    VariantSource,
    check_precision,
    variant_table,
)
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

    The trunk runs on the whole batch. At each gate, rows are sorted into buckets by their choice,
    and each bucket runs the next segment as a dense network of exactly that width. Within float
    tolerance, a row's answer does not depend on the other rows of the batch. The weights are
    copied: after further training, make a new engine. Programs are compiled when first needed, or
    ahead by `warm_up`, and kept on disk. An engine is thread-safe.
    """

    def __init__(
        self,
        net: ElasticNet | Checkpoint | OpenModel,
        *,
        source: VariantSource | None = None,
        backend: str = "auto",
        precision: str = "fp32",
        calibration: Any = None,
        **options: Any,
    ) -> None:
        """Make an engine from a network, or from a checkpoint or package, with its budget curve.

        `backend` is one of `dynaslim.runtime.backends.BACKENDS` or "auto", which measures the
        installed ones for a few seconds and takes the fastest. `precision` is fp32, bf16 or int8;
        int8 needs `calibration`, an iterable of normalised batches (B, C, H, W). A `source`, if
        given, provides the network's segments and determines the precision. Other options are the
        fields of `EngineOptions`.

        Raises:
            UsageError: for an unknown backend or one that is not installed, a precision that it
                does not support, an invalid option, or a network without gates.
            RuntimeError: if the network is in training mode.
        """
        self._options = EngineOptions.named(options)
        if isinstance(net, OpenModel):
            source = net.source
        else:
            from dynaslim.checkpoint import Checkpoint

            net = net if isinstance(net, Checkpoint) else Checkpoint(net)
        if source is None:
            assert not isinstance(net, OpenModel)
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
        """Whether unsure images may also be run mirrored."""
        self.curve: BudgetCurve | None = None
        if net.budget is not None:
            self.curve = BudgetCurve.from_dict(net.budget)
            self.curve.check_fits(self.spec, mirror=self.mirror)
        self.latency = self._options.table(self.spec)
        self.measured: dict[str, float] = {}
        """Milliseconds of a batch by backend, as measured by "auto"."""
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
        """Create the source of a network's variants in a precision."""
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
        """Make an engine from a checkpoint file; options are those of `Engine`.

        `device` None means the GPU, if there is one, for backend cudagraph, and else the CPU.
        torch is imported only if a program is not in the cache, or with options that need it.

        Raises:
            CheckpointError: as `dynaslim.read`.
            UsageError: as `Engine`.
        """
        backend = options.get("backend", "auto")
        given = (device, options.get("source"), options.get("calibration"))
        plain = all(value is None for value in given) and options.get("precision", "fp32") == "fp32"
        if plain and backend in ("auto", *FROM_PACKAGE):
            from dynaslim.runtime.checkpoint_source import open_checkpoint

            return cls(open_checkpoint(path, options.get("cache_dir", "auto")), **options)
        from dynaslim.checkpoint import read

        if device is None:
            device = default_device(backend)
        return cls(read(path, device=device), **options)

    @classmethod
    def cascade(cls, rungs: Sequence[Any], **options: Any) -> Engine:
        """Make an engine from a cascade of whole networks: unsure images go to the next network.

            engine = dynaslim.Engine.cascade(["small.safetensors", "large.safetensors"])
            logits, rungs, madds = engine(x, escalate=0.3)      # a margin
            engine.calibrate(batches)                           # of held-out images and labels
            logits, rungs, madds = engine(x)                    # at most 0.5 points are lost

        `rungs` are as for `dynaslim.cascade`, whose result `export_package` and `evaluate` also
        accept. Options are those of `Engine`.

        Raises:
            The errors of `dynaslim.cascade` and `Engine`.
        """
        from dynaslim.runtime.cascade import cascade

        return cls(cascade(rungs), **options)

    @classmethod
    def from_source(
        cls, source: VariantSource, checkpoint: Checkpoint, *, backend: str = "auto", **options: Any
    ) -> Engine:
        """Make an engine from a checkpoint and a given source; options are those of `Engine`.

        Raises:
            UsageError: as `Engine`.
        """
        return cls(checkpoint, source=source, backend=backend, **options)

    @classmethod
    def from_package(cls, path: str | Path, *, backend: str = "auto", **options: Any) -> Engine:
        """Make an engine from an exported package, run by onnxruntime or openvino without torch.

        Options are those of `Engine`, except precision and calibration, which the export fixed.

        Raises:
            PackageError: if a file is missing, altered, or of a newer version.
            UsageError: if the backend cannot run packages or is not installed, or if a precision
                or calibration is given.
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
        """The router; "auto" chooses a backend here, by default for the first batch's size."""
        if self._router is not None:
            return self._router
        with self._starting:
            if self._router is None:
                given = self._options.image_size
                side = self.usual_image_size if given is None else given
                backend, self.measured = fastest(
                    self.source,
                    self._resources,
                    (side, side) if given is not None or size is None else size,
                    self._options.batch_size,
                )
                self._start(backend)
            assert self._router is not None
            return self._router

    @property
    def usual_image_size(self) -> int:
        """Side in pixels of the images that the network is meant for."""
        if self.preprocessing is not None:
            return self.preprocessing.image_size_px
        return self.spec.usual_image_size

    @property
    def backend(self) -> str:
        """The name of the backend; makes "auto" choose if it has not yet."""
        return self.router.backend.name

    @property
    def router(self) -> Router:
        """The router, which divides and runs batches."""
        return self._running()

    @property
    def counts(self) -> Counts:
        """Which programs were compiled in this process, and which were read from disk."""
        return self.router.backend.counts

    def warm_up(self, image_size: int | None = None) -> None:
        """Compile ahead everything that routing images of `image_size` pixels needs."""
        side = self.usual_image_size if image_size is None else image_size
        self.spec.check_image_size(side, side)
        self._running((side, side)).warm_up((side, side))

    def calibrate(self, batches: Iterable[tuple[Any, Any]]) -> BudgetCurve:
        """Measure the budget curve on held-out images, and use it from now on.

        `batches` are pairs of tensors, normalised images (B, C, S, S) and labels (B,), with at
        least 100 images in all. For a cascade, the thresholds of all rungs are optimised jointly.

        Raises:
            UsageError: if there are fewer images, or they are not square or differ in size.
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

        `budget` is a share of the widest route's multiply-adds (0.6), a mean per image such as
        "250M" multiply-adds or "4.5ms", or a loss of accuracy in points, "drop=0.3" (see
        `BudgetCurve.at`); it needs a curve. `shift` adjusts the gates' decisions directly: positive
        is cheaper. `escalate` "auto" lets rows escalate, to a wider route or to their mirror image,
        as the curve's point for the budget says. A number instead lets rows escalate whose margin
        (largest minus second largest probability) is below it, at a cost on top of the budget; None
        turns escalation off. `max_route` caps the width of every row. A cascade with a curve uses
        "drop=0.5" if `budget`, `shift` and `escalate` are left out; a number for `escalate` applies
        at each of its rungs.

        A budget is the average cost of images like those of the curve. With `hold` it is a bound:
        the mean cost over all rows of the engine's calls with this budget and `hold` never exceeds
        it, whatever the images. Fewer rows then take wider routes or escalate; which ones depends
        only on the rows before and beside them. A `Ledger` instead of True applies the bound to the
        calls that share it. For budgets in ms or drop=, the bound is the mean multiply-adds of
        their point.

        Raises:
            UsageError (a ValueError): if x is not a batch of images that the network takes, or the
                arguments are invalid or conflict. The engine remains usable.
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
        """A function that runs all images along one route: (B, in_channels, H, W) -> (B, N) logits.

        A package runs the route segment by segment, which is a little slower than one program, and
        supports only routes that its gates can take.

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
        """End the threads; the next call starts new ones."""
        if self._router is not None:
            self._router.workers.close()

    # -- one call -----------------------------------------------------------------------------

    def _in_parts(
        self,
        x: Any,
        router: Router,
        run: Callable[[Array, int], tuple[np.ndarray, ...]],
    ) -> list[Any]:
        """Call `run` on up to `max_batch` images at a time, with the number of their first row.

        Returns the joined results in the library and on the device of the caller's images.
        """
        images, most = router.backend.arrays.images(x), self._options.max_batch
        parts = [run(images[n : n + most], n) for n in range(0, len(images), most)]
        parts = parts or [self._nothing()]
        joined = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
        return [like(x, result) for result in joined]

    def _decisions(self, size: tuple[int, int], **arguments: Any) -> Decisions:
        """The decisions for a call's arguments, cached over calls."""
        # the key has the types too: True is not a budget, although it equals 1.0
        key = (size, *arguments.values(), *map(type, arguments.values()))
        try:
            known = self._decided.get(key)
        except TypeError:  # a list is not hashable
            return self._make_decisions(size, arguments)
        if known is None:
            known = self._make_decisions(size, arguments)
            if len(self._decided) >= _KEPT_DECISIONS:  # the budget may change at every call
                self._decided.clear()
            self._decided[key] = known
        return known

    def _make_decisions(self, size: tuple[int, int], arguments: Mapping[str, Any]) -> Decisions:
        costs = self._costs.get(size)
        if costs is None:
            costs = self._costs[size] = PathCosts(CostTable.from_madds(self.spec, size))
        return make_decisions(self.spec, costs, self.curve, mirror=self.mirror, **arguments)

    def _ledger(self, decisions: Decisions, hold: bool | Ledger) -> Ledger | None:
        """The ledger in which a call records its cost; None without `hold`."""
        if decisions.held is None:
            return None
        check(not self._options.merge, "hold: not with merge, which makes routes wider afterwards")
        if isinstance(hold, Ledger):
            return hold
        if len(self._ledgers) >= _KEPT_DECISIONS:  # new ones start from 0, which keeps the bound
            self._ledgers.clear()
        return self._ledgers.setdefault(decisions.held, Ledger())

    @staticmethod
    def _routed(
        router: Router, images: Array, decisions: Decisions, first: int, ledger: Ledger | None
    ) -> tuple[np.ndarray, ...]:
        """Route one part of a batch; with a ledger, within what is left of the budget."""

        def answers(chosen: Decisions | HeldCall) -> tuple[np.ndarray, ...]:
            return decisions.results(
                router.routed(
                    images, chosen.decide, chosen.escalating, limits=decisions.limits, first=first
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
            unspent -= len(images) * decisions.held  # as if the call had never happened
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
