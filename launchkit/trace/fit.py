"""From sizes seen at a few points to exact polynomials.

A size is looked for as one monomial ``c·b^i·s^j·r^k`` first, then as a sum of two, then by solving for all
monomials of the basis. The last point is never used to find a form, only to check it: a form that misses it by
one byte is an error, not a warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, product
from math import gcd, lcm

from launchkit.errors import TraceError
from launchkit.program import Point, Size, Term

# Powers of (micro-batch, sequence length, rank) that sizes and FLOP counts of a step are made of. A quadratic term
# in length comes from attention; none was ever seen in micro-batch or rank.
_POWERS = tuple(product((0, 1), (0, 1, 2), (0, 1)))


class Fitter:
    """Fits values seen at ``points`` (the last is the held-back one) and remembers what it has fitted."""

    def __init__(self, points: Sequence[Point]) -> None:
        self.points = tuple(points)
        self._columns = {
            powers: [_monomial(point, powers) for point in self.points]
            for powers in _POWERS
            if not _redundant(powers, self.points)
        }
        self._stride = gcd(*(point.seq_len for point in self.points))
        self._known: dict[tuple[int, ...], Size] = {}
        self._known_traffic: dict[tuple[int, ...], Size] = {}

    def fit(self, values: Sequence[int], *, what: str) -> Size:
        """The polynomial through ``values``. Raises ``TraceError`` naming ``what`` where none fits."""
        key = tuple(values)
        size = self._known.get(key)
        if size is None:
            size = self._known[key] = self._search(key, what)
        return size

    def fit_traffic(self, values: Sequence[int]) -> Size:
        """The bytes that a kernel moves: the polynomial through ``values``, or, where none of three terms fits, what it
        moves per token at the held-back point. Only the clock reads it."""
        key = tuple(values)
        if key not in self._known_traffic:
            self._known_traffic[key] = self._search_traffic(key)
        return self._known_traffic[key]

    def _search_traffic(self, values: tuple[int, ...]) -> Size:
        try:
            return self.fit(values, what="the traffic of a kernel")
        except TraceError:
            furthest = self.points[-1]
            return Size((Term(round(values[-1] / (furthest.micro_batch * furthest.seq_len)), 1, 1),))

    def _search(self, values: tuple[int, ...], what: str) -> Size:
        if not any(values):
            return Size(())
        if len(values) == 1:  # a program of this point alone
            return Size.constant(values[0])
        for count in (1, 2, 3):
            if count >= len(self.points):
                break
            for powers in combinations(self._columns, count):
                size = self._solve(values, powers)
                if size is not None:
                    return size
        seen = ", ".join(f"{v} at b={p.micro_batch} s={p.seq_len}" for v, p in zip(values, self.points, strict=True))
        raise TraceError(f"the size of {what} is no polynomial in batch and length ({seen})")

    def _solve(self, values: tuple[int, ...], powers: tuple[tuple[int, int, int], ...]) -> Size | None:
        """Coefficients from the points but the last by elimination, kept if they fit every point.

        They are whole numbers, or have a denominator that the lengths' stride makes whole: what a model computes chunk
        by chunk goes with the number of chunks, or its square.
        """
        columns = [self._columns[p] for p in powers]
        solution = _solve_exactly([[c[i] for c in columns] for i in range(len(values) - 1)], values[:-1])
        if solution is None or not all(solution):
            return None
        denominator = lcm(*(x.denominator for x in solution))
        if self._stride**2 % denominator:
            return None
        if sum(x * c[-1] for x, c in zip(solution, columns, strict=True)) != values[-1]:
            return None
        terms = (Term(int(x * denominator), *p) for x, p in zip(solution, powers, strict=True))
        return Size(tuple(terms), denominator)


def _monomial(point: Point, powers: tuple[int, int, int]) -> int:
    return point.micro_batch ** powers[0] * point.seq_len ** powers[1] * max(point.lora_rank, 1) ** powers[2]


def _redundant(powers: tuple[int, int, int], points: Sequence[Point]) -> bool:
    """A power of a variable that is the same at every point cannot be told from a constant."""
    return any(power and len({point[axis] for point in points}) == 1 for axis, power in enumerate(powers))


def _solve_exactly(rows: list[list[int]], values: Sequence[int]) -> list[Fraction] | None:
    """The one solution of an overdetermined linear system, None if there is none or more than one."""
    width = len(rows[0])
    if width > len(rows):
        return None
    matrix = [[Fraction(x) for x in row] + [Fraction(v)] for row, v in zip(rows, values, strict=True)]
    for column in range(width):
        pivot = next((i for i in range(column, len(matrix)) if matrix[i][column]), None)
        if pivot is None:
            return None
        matrix[column], matrix[pivot] = matrix[pivot], matrix[column]
        lead = matrix[column][column]
        matrix[column] = [x / lead for x in matrix[column]]
        for i, row in enumerate(matrix):
            if i != column and row[column]:
                factor = row[column]
                matrix[i] = [x - factor * y for x, y in zip(row, matrix[column], strict=True)]
    if any(row[-1] for row in matrix[width:]):
        return None
    return [matrix[i][-1] for i in range(width)]
