"""Natural gradient by truncated Newton steps, or by an exact step from a Gram matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fused_so.likelihoods import Likelihood, likelihood_of
from fused_so.ops import _check
from fused_so.optim.base import (
    ModelOptimizer,
    check_choice,
    check_count,
    check_grad_scaler,
    check_number,
    loss_scale,
)
from fused_so.optim.batches import Batch, Inputs, Watch, batch_of
from fused_so.optim.exact import ExactSteps
from fused_so.optim.metric import METRICS, OF_TARGETS, examples_of
from fused_so.optim.solved import NOT_FINITE, Solved
from fused_so.optim.truncated import TruncatedSteps
from fused_so.optim.trust import Trust
from fused_so.solvers import Solution

SOLVERS = ("cg", "minres_qlp", "gram")


class NaturalGradient(ModelOptimizer):
    r"""Steps along (G + lambda I)^-1 p.grad, with G the metric of the model's distributions.

    .. math:: G = \sum_i J_i^T D_i J_i

    for any differentiable module whose output is one tensor, the parameters of a `likelihood`. G
    is never made: cg and minres_qlp know it by products, two backward passes each (J v is one
    through the backward pass that makes J^T u), and gram by inner products of per-example
    gradients.

    The usual loop works: a hook keeps the inputs of the model's calls, and the gradients of its
    outputs, from the backward pass to the step. `p.grad` is the right-hand side and only read, so
    clipping and accumulation (of means over equally many micro-batches) work. The model is called
    once more in a step (not by gram with "empirical_fisher"), and draws its dropout anew there;
    buffers stay. Its functions must be twice differentiable; attention takes PyTorch's math backend
    there, which is.

    Args:
        model: the module to train.
        lr: the learning rate, >= 0.
        likelihood: a `fused_so.likelihoods` Likelihood with the reduction of the loss, or the
            nn.MSELoss, nn.BCEWithLogitsLoss or nn.CrossEntropyLoss that is minimized.
        solver: "cg", for which G + damping must be positive definite; "minres_qlp", which takes
            an indefinite or singular one too; "gram", the exact step, for a model all of whose
            trained parameters are those of nn.Linear layers that are called once, on an example
            a row.
        metric: "gauss_newton", which is the Fisher matrix (gram: for small outputs, as it has a
            row an example and output); "sampled_fisher", an estimate of it by targets drawn from
            the model; "empirical_fisher", with the targets of the loss (for cross-entropy the
            cheap Gauss-Newton of George 2017, section 3.4; `TONGA` has its limits); or "hessian"
            (not gram).
        damping: lambda >= 0, in units of G, which are those of the loss; > 0 for gram. The same
            in all param groups.
        adapt_damping_every: adjust damping every so many steps by the reduction ratio; None: it
            is fixed. Takes the loss again after the step (see `step`), and a product with G
            more. The attribute `reduction_ratio` is the last ratio.
        line_search: halve the step until the loss falls by a hundredth of what its slope
            promises; after ten times the parameters stay. Takes the loss again.
        max_iterations, tolerance, progress: of the solver, as in `fused_so.solvers`.
        warm_start: start the solver from the last solution, for a product more. The attribute
            `last_solution` has all that the solver said.
        preconditioner: r -> M^-1 r for the solver, lists of tensors in the order of the
            parameters, those without a gradient left out.
        metric_inputs: an iterable of inputs (a loader of unlabeled ones, say) for the metric
            instead of those of the gradient, one a step, round and round: a tensor, a tuple of
            arguments or a dict of keyword arguments. None: those of the gradient. The attribute
            may be set at any time. Where it stands is not part of a checkpoint: a resumed run
            begins the iterable anew.
        momentum, nesterov, weight_decay, max_norm: as for `ACP`; the norm is that of
            G + damping, over all param groups. Momentum and weight decay, which the loss of a
            batch cannot judge, are not for an adapting damping or a line search.
        grad_scaler: the torch.amp.GradScaler in use, if any; "empirical_fisher" and "hessian" see
            gradients before they are unscaled.
        params: parameters or param groups; by default all of the model's that require a gradient.
            A group may set lr, momentum, nesterov, weight_decay and max_norm.

    Raises:
        TypeError, ValueError: an option out of its range, or a model that solver does not take.

    A solution that cannot be used (a product with a NaN, a singular metric with nothing to damp
    it, no direction of descent) leaves the parameters as they are, and one warning says why.

    Source: Pascanu and Bengio 2014, sections 3, 5, 7 and 8.3. cg and minres_qlp wait for the
    device in every iteration.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.5,
        *,
        likelihood: Likelihood | nn.Module,
        solver: str = "cg",
        metric: str = "gauss_newton",
        damping: float = 0.1,
        adapt_damping_every: int | None = None,
        line_search: bool = False,
        max_iterations: int = 20,
        tolerance: float = 1e-4,
        progress: float | None = None,
        warm_start: bool = False,
        preconditioner: Callable[[list[Tensor]], list[Tensor]] | None = None,
        metric_inputs: Iterable | None = None,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        params: Iterable | None = None,
    ):
        check_choice("solver", solver, SOLVERS)
        check_choice("metric", metric, METRICS)
        if solver == "gram" and metric == "hessian":
            raise ValueError("metric must not be 'hessian' for solver 'gram'")
        _check.boolean("line_search", line_search)
        _check.boolean("warm_start", warm_start)
        if adapt_damping_every is not None:
            check_count("adapt_damping_every", adapt_damping_every)
        check_grad_scaler(grad_scaler)
        TruncatedSteps.check(max_iterations, tolerance, progress, preconditioner)
        of_outputs = likelihood_of(likelihood, name="likelihood")
        self._metric, self._exact = metric, solver == "gram"
        self._trust = Trust(adapt_damping_every, line_search)
        self._grad_scaler = grad_scaler
        self.last_solution: Solution | None = None
        self.metric_inputs = metric_inputs
        options = {
            "lr": lr,
            "damping": damping,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "max_norm": max_norm,
        }
        super().__init__(model, options, params)
        self._watch = Watch(model)
        if self._exact:
            self._steps_of = ExactSteps(self._watch, of_outputs, metric, grad_scaler)
        else:
            self._steps_of = TruncatedSteps(
                self._watch,
                of_outputs,
                metric,
                solver,
                max_iterations=max_iterations,
                tolerance=tolerance,
                progress=progress,
                preconditioner=preconditioner,
                warm_start=warm_start,
            )
        try:
            self._adopt()
        except ValueError:
            self.remove_hooks()
            raise

    @property
    def metric_inputs(self) -> Iterable | None:
        return self._given_inputs

    @metric_inputs.setter
    def metric_inputs(self, inputs: Iterable | None) -> None:
        self._check_metric_inputs(inputs)
        self._inputs = None if inputs is None else Inputs(inputs)
        self._given_inputs = inputs

    def _check_metric_inputs(self, inputs: Any) -> None:
        if inputs is not None and self._metric in OF_TARGETS:
            raise ValueError(
                f"metric_inputs must be None for metric {self._metric!r}, which needs targets"
            )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_number("damping", group["damping"], 0.0, positive=self._exact)
        first = self.param_groups[0]["damping"]
        if group["damping"] != first:
            raise ValueError(
                f"damping must be the same in all param groups, got {first} and {group['damping']}"
            )
        self._trust.check_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any torch optimizer; damping is by default what it is now."""
        if self._model is not None:
            param_group = {"damping": self.damping, **param_group}
        super().add_param_group(param_group)

    def _adopt(self) -> None:
        names = {p: name for name, p in self._watch.module.named_parameters()}
        params = [p for group in self.param_groups for p in group["params"]]
        for p in params:
            if p not in names:
                raise ValueError(
                    f"params must be parameters of the model, got one of shape {tuple(p.shape)} "
                    f"that is not"
                )
        self._steps_of.adopt({p: names[p] for p in params})

    @property
    def damping(self) -> float:
        """lambda, as it is now."""
        return self.param_groups[0]["damping"]

    @property
    def reduction_ratio(self) -> float | None:
        """What the loss fell by, over what its quadratic model promised, when last looked at."""
        return self._trust.ratio

    def step(self, closure: Callable[[], Any] | None = None, *, metric_inputs: Any = None) -> Any:
        """Updates the parameters from their gradients.

        Args:
            closure: computes the loss and its gradients, as for any torch optimizer. It is called
                again where damping adapts or a line search runs; p.grad keeps what it was. What
                the model does in training it does again: BatchNorm takes the batch in once more,
                and dropout is drawn anew (the losses then differ by more than the step).
            metric_inputs: the inputs whose metric this step takes, as one batch of the
                attribute: a tensor, a tuple of arguments or a dict of keyword arguments.

        Raises:
            TypeError, ValueError: metric_inputs cannot be used; an adapting damping or a line
                search without closure, or with one that does not return the loss; no backward
                pass through the model since the last step.
        """
        self._check_metric_inputs(metric_inputs)
        batch = None if metric_inputs is None else batch_of(metric_inputs)
        self._trust.check_closure(closure)
        self._step_inputs = batch
        try:
            return super().step(closure)
        finally:
            self._forget_batch()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and with them what the next step would know of their batch."""
        super().zero_grad(set_to_none)
        self._forget_batch()

    def _forget_batch(self) -> None:
        self._watch.batches.clear()
        self._steps_of.forget()

    def remove_hooks(self) -> None:
        """Detaches the optimizer from the model; it can no longer learn of batches."""
        self._watch.remove()
        self._steps_of.remove_hooks()

    def _update(self) -> None:
        grouped = [(group, self._plain_updates(group)) for group in self.param_groups]
        params = [update.param for _, own in grouped for update in own]
        if not params:
            return
        self._trust.check_loss(self.loss)
        solved = self._solved(params)
        if solved is None:
            return
        deltas = dict(zip(params, solved.deltas, strict=True))
        grouped = [
            (group, [update._replace(delta=deltas[update.param]) for update in own])
            for group, own in grouped
            if own
        ]
        updates = [update for _, own in grouped for update in own]
        # One norm for all groups, which the metric couples.
        bounds = [self._bounds(group, [updates], [solved.square])[0] for group, _ in grouped]

        def apply(scale: float) -> None:
            for (group, own), bound in zip(grouped, bounds, strict=True):
                self._apply(group, own, bound * scale)

        def curvature() -> Tensor:
            step = {
                param: delta * (group["lr"] * bound).to(delta.device, delta.dtype)
                for (group, own), bound in zip(grouped, bounds, strict=True)
                for param, delta, *_ in own
            }
            return self._steps_of.curvature(step)

        def look() -> Any:
            with torch.enable_grad():
                return self._watch.quietly(self.closure)

        groups, loss = self.param_groups, self.loss
        failure = self._trust.take(groups, updates, self._steps, apply, curvature, look, loss)
        if failure:
            self._skip(f"{failure} along the step")

    def _solved(self, params: list[Tensor]) -> Solved | None:
        """The solution, or None if the step is to be skipped."""
        seen = [self._unscaled(batch) for batch in self._watch.batches]
        if not seen:
            raise ValueError(
                "no backward pass went through a call of the model since the last step or "
                "zero_grad; call the model itself, and backward before step"
            )
        batches, examples = seen, None
        if self._step_inputs is not None or self._inputs is not None:
            batches = [self._step_inputs or self._inputs.next()]
            examples = sum(examples_of(batch.score) for batch in seen)
        solved = self._steps_of.solve(params, batches, examples, self.damping, self.state)
        self.last_solution = solved.solution
        if solved.failure == NOT_FINITE:
            self._warn_unless_finite(torch.tensor(False))
        elif solved.failure:
            self._skip(solved.failure)
        return None if solved.failure is not None else solved

    def _skip(self, reason: str) -> None:
        self._warn_once(
            ("skip", reason),
            f"{reason}; such steps are skipped (more damping may help, or solver 'minres_qlp')",
        )

    def _unscaled(self, batch: Batch) -> Batch:
        scale = loss_scale(self._grad_scaler, batch.score.device)
        return batch._replace(score=batch.score / scale) if isinstance(scale, Tensor) else batch
