"""What the corrections of UBP cost, counted: which of its exact modes is the cheaper one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple


class Cost(NamedTuple):
    """Multiply-adds an example for H v at every layer, and the most numbers it carries."""

    products: int
    numbers: int


def matrix_free(shapes: Sequence[tuple[int, int]]) -> Cost:
    """Through all layers above and back, once a layer; shapes are (out, in), from input to output.

    The lowest layer sends no signal down, and so has no correction.
    """
    sizes = [height * width for height, width in shapes]
    above = [sum(sizes[i + 1 :]) for i in range(1, len(sizes))]
    return Cost(2 * sum(above), max(height for height, _ in shapes))


def carried(shapes: Sequence[tuple[int, int]], rows: int) -> Cost:
    """With so many rows of the Jacobian at the outputs, fewer below a narrower layer."""
    products, numbers = 0, rows * shapes[-1][0]
    for i in range(len(shapes) - 1, 0, -1):
        height, width = shapes[i]
        last = i == 1
        if rows > height and not last:
            # Half of J^T J, and its Cholesky factor.
            products += rows * height * (height + 1) // 2 + height**3 // 3
            rows = height
        # J v, J^T of that, and J W.
        products += 2 * rows * height
        if not last:
            products += rows * height * width
            numbers = max(numbers, rows * width)
    return Cost(products, numbers)


def gradient(shapes: Sequence[tuple[int, int]]) -> int:
    """Multiply-adds an example of a forward and backward pass."""
    sizes = [height * width for height, width in shapes]
    return 3 * sum(sizes) - sizes[0]


def corrected(shapes: Sequence[tuple[int, int]], cost: Cost) -> int:
    """Multiply-adds an example of a whole step whose H v cost as given.

    Besides them a layer takes dW h, dW^T da and W^T of the corrections above the lowest one, and
    the corrections' part of its own gradient below the top one.
    """
    sizes = [height * width for height, width in shapes]
    return gradient(shapes) + cost.products + 3 * sum(sizes[1:]) + sum(sizes[:-1])


def of_modes(
    shapes: Sequence[tuple[int, int]], curvature: str, sketch_size: int
) -> dict[str, Cost]:
    """What every mode costs that has the curvature."""
    if curvature == "hessian":
        return {"matrix_free": matrix_free(shapes)}
    return {
        "matrix_free": matrix_free(shapes),
        "jacobian": carried(shapes, shapes[-1][0]),
        "sketch": carried(shapes, sketch_size),
    }


def cheaper_exact(costs: Mapping[str, Cost]) -> str:
    """The exact mode with fewer operations."""
    return min(costs.keys() - {"sketch"}, key=lambda mode: costs[mode].products)


def lines(
    shapes: Sequence[tuple[int, int]], costs: Mapping[str, Cost], batch_size: int
) -> Iterator[str]:
    """A line of text for what each mode costs."""
    for mode, cost in costs.items():
        total = corrected(shapes, cost)
        yield (
            f"  {mode}: {2e-9 * batch_size * total:.3g} Gflop a step at batch {batch_size}, "
            f"{total / gradient(shapes):.2f} times a gradient; its largest tensor has "
            f"{batch_size * cost.numbers:,} numbers"
        )
