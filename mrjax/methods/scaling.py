"""Scaling plots of RFT: lines through accuracies, and what training and sampling cost.

Yuan et al. 2023, arXiv 2308.01825: accuracy against pre-training loss, against the
logarithm of the amount of data and of the number of distinct reasoning paths (its
figures), and its estimates of FLOPs (its appendix).

The paper draws its lines by eye and claims no regression: the losses are those of
different corpora and tokenizers. The least squares here are ours, and a fit through few
points says little beyond them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from mrjax.records import Record

# Mean lengths of GSM8K in tokens of LLaMA: a question, a human solution.
QUESTION_TOKENS = 66
ANSWER_TOKENS = 130


class Fit(NamedTuple):
  """A least-squares line y = intercept + slope * x.

  Attributes:
    slope: Change of y for one unit of x; with log2, for a doubling.
    intercept: y where x is 0; with log2, where the field is 1.
    r2: Share of the variance of y that the line explains, in [0, 1]; 1 where y does
      not vary.
    num_points: That it goes through.
  """

  slope: float
  intercept: float
  r2: float
  num_points: int

  def __call__(self, x: float) -> float:
    return self.intercept + self.slope * x


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> Fit:
  """Returns the line of least squares.

  Raises:
    ValueError: Not one y for each x, fewer than two different x, or a number that is
      not finite.
  """
  if len(xs) != len(ys):
    raise ValueError(f'want one y for each x, got {len(xs)} and {len(ys)}')
  if not all(map(math.isfinite, [*xs, *ys])):
    raise ValueError(f'want finite numbers, got {list(xs)!r:.80}, {list(ys)!r:.80}')
  if len(set(xs)) < 2:
    raise ValueError(
      f'{len(xs)} points at {len(set(xs))} different x make no line; want at least 2'
    )
  mean_x, mean_y = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
  # Centred first: losses differ in their second digit.
  dxs, dys = [x - mean_x for x in xs], [y - mean_y for y in ys]
  products = zip(dxs, dys, strict=True)
  slope = math.fsum(dx * dy for dx, dy in products) / math.fsum(dx * dx for dx in dxs)
  spread = math.fsum(dy * dy for dy in dys)
  rest = math.fsum((dy - slope * dx) ** 2 for dx, dy in zip(dxs, dys, strict=True))
  r2 = 1 - rest / spread if spread else 1.0
  return Fit(slope, mean_y - slope * mean_x, r2, len(xs))


def fit_points(
  points: Iterable[Mapping[str, float]], x: str, *, y: str = 'accuracy'
) -> Fit:
  """Returns the line through points, e.g. of accuracy against `x='loss'` (figure A).

  Args:
    points: Records.
    x: A field of theirs.
    y: Another.

  Raises:
    ValueError: A point lacks a field, or as `fit_line`.
  """
  return fit_line(*_columns(points, x, y))


def fit_doublings(
  points: Iterable[Mapping[str, float]], x: str, *, y: str = 'accuracy'
) -> Fit:
  """Returns the line against log2 of a field: the slope is the gain of a doubling.

  For the amount of data (figure B; the paper finds it roughly straight from an eighth
  of GSM8K on), k, and distinct paths a question (figure C).

  Raises:
    ValueError: As `fit_points`, or x is not above 0.
  """
  xs, ys = _columns(points, x, y)
  for value in xs:
    if not value > 0:
      raise ValueError(f'field {x!r} is {value}; its logarithm wants a number above 0')
  return fit_line([math.log2(value) for value in xs], ys)


def fit_groups(
  points: Iterable[Record], by: str, fit: Callable[[list[Record]], Fit]
) -> dict[str, Fit]:
  """Returns a fit for the points of each model, or other field, in order of appearance.

  Args:
    points: Records.
    by: The field whose values part them, as 'model'.
    fit: What to do with those of one value.

  Raises:
    ValueError: A point lacks the field, or a group cannot be fitted; names the group.
  """
  groups: dict[str, list[Record]] = {}
  for point in points:
    if by not in point:
      raise ValueError(f'a point has no field {by!r}: {dict(point)!r:.120}')
    groups.setdefault(str(point[by]), []).append(point)
  fits = {}
  for name, group in groups.items():
    try:
      fits[name] = fit(group)
    except ValueError as error:
      raise ValueError(f'{by} {name!r}: {error}') from None
  return fits


def _columns(
  points: Iterable[Mapping[str, float]], *names: str
) -> tuple[list[float], ...]:
  columns: tuple[list[float], ...] = tuple([] for _ in names)
  for point in points:
    for name, column in zip(names, columns, strict=True):
      value = point.get(name)
      if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(
          f'field {name!r} of a point is {value!r:.40}, want a number: '
          f'{dict(point)!r:.120}'
        )
      column.append(value)
  return columns


def training_flops(
  num_params: float, *, context_tokens: float, num_samples: float
) -> float:
  """Returns the operations of training, 6 N n_ctx N_s.

  Args:
    num_params: N, of the model.
    context_tokens: n_ctx, mean tokens of a sample, prompt included.
    num_samples: N_s, samples seen: records times epochs.
  """
  _check_amounts(
    num_params=num_params, context_tokens=context_tokens, num_samples=num_samples
  )
  return 6 * num_params * context_tokens * num_samples


def token_flops(
  num_params: float,
  *,
  num_layers: int,
  width: int,
  context_tokens: float,
  cached: bool = False,
) -> float:
  """Returns the operations of a forward pass for one token.

  2 N + 2 n_layer n_ctx d; with a cache of keys and values 1.66 N + 2 n_layer n_ctx d
  in the paper's estimate. (Its factor is kept; a cache saves no product of a weight
  with the token itself, so 2 N would be our own count.)
  """
  _check_amounts(
    num_params=num_params,
    num_layers=num_layers,
    width=width,
    context_tokens=context_tokens,
  )
  factor = 1.66 if cached else 2
  return factor * num_params + 2 * num_layers * context_tokens * width


def sampling_flops(
  num_params: float,
  *,
  num_layers: int,
  width: int,
  num_samples: float,
  question_tokens: float = QUESTION_TOKENS,
  answer_tokens: float = ANSWER_TOKENS,
) -> float:
  """Returns the operations of drawing samples one by one, with a cache.

  `token_flops` for every token of question and answer, each in the context of the whole
  text; so the question is read anew for every sample, as the paper's code does. (The
  engine here reads it once for all samples of a question.)
  """
  _check_amounts(
    num_samples=num_samples,
    question_tokens=question_tokens,
    answer_tokens=answer_tokens,
  )
  length = question_tokens + answer_tokens
  per_token = token_flops(
    num_params,
    num_layers=num_layers,
    width=width,
    context_tokens=length,
    cached=True,
  )
  return num_samples * length * per_token


def _check_amounts(**amounts: float) -> None:
  for name, value in amounts.items():
    if not (math.isfinite(value) and value > 0):
      raise ValueError(f'{name}={value}; want a finite number above 0')
