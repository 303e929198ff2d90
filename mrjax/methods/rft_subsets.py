"""RFT's smaller and larger data: fewer seeds, fewer problems, several models.

Yuan et al. 2023, arXiv 2308.01825: its curves over k (samples a question), its SFT runs
on a half to a 32nd of GSM8K, and its unions of several models' samples.
"""

import math
import random
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

PAPER_KS = (1, 3, 6, 12, 25, 50, 100)
PAPER_FRACTIONS = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)


class Union(NamedTuple):
  """Samples of several models under one selection.

  Attributes:
    models: Their sets come in this order, on which the selection depends.
    num_samples: Of each model for a question.
    temperature: That they are drawn at.
  """

  models: tuple[str, ...]
  num_samples: int = 100
  temperature: float = 0.7


# LLaMA 1 without, LLaMA 2 with the suffix.
UNIONS: dict[str, Union] = {
  'U13B': Union(('7B', '7B-2', '13B', '13B-2')),
  'U33B': Union(('7B', '7B-2', '13B', '13B-2', '33B')),
}


def union_samples(name: str, sample_sets: Mapping[str, str]) -> str:
  """Returns the sample sets of a union in order, as `rft.collect --samples` takes them.

  Selection runs anew over all samples, as in the paper's code (its text speaks of
  joining what was selected from each model).

  Args:
    name: Of `UNIONS`.
    sample_sets: Directory, file or glob by model; others than the union's are ignored.

  Raises:
    ValueError: No such union, a model has no set, or a set holds a comma.
  """
  if name not in UNIONS:
    raise ValueError(f'unknown union {name!r}; one of {", ".join(UNIONS)}')
  models = UNIONS[name].models
  missing = [model for model in models if not sample_sets.get(model)]
  if missing:
    raise ValueError(
      f'{name} wants samples of {", ".join(models)}; there are none of '
      f'{", ".join(missing)}. Sample them, or name the sets that there are by hand'
    )
  sets = [sample_sets[model] for model in models]
  for chosen in sets:
    if ',' in chosen:
      raise ValueError(
        f'sample set {chosen!r} holds a comma, which parts the sets; rename it'
      )
  return ','.join(sets)


def first_seeds(seeds: Collection[tuple[int, int]], k: int) -> list[tuple[int, int]]:
  """Returns the first k sample indices of every set: what a run of k would have drawn.

  A sample depends on its index and not on how many are drawn, so this is that run.
  Seeds are counted and not compared with k: a set may begin at 1. (The original drew
  seeds 1 to 100 and collected 0 to 99, one too few.)

  Args:
    seeds: Every (set number, sample index) there is.
    k: Samples a question and set.

  Raises:
    ValueError: k is below 1, or a set has fewer.
  """
  if k < 1:
    raise ValueError(f'k={k}; want at least 1 sample a question')
  by_set: dict[int, list[int]] = {}
  for number, index in sorted(set(seeds)):
    by_set.setdefault(number, []).append(index)
  for number, indices in by_set.items():
    if len(indices) < k:
      raise ValueError(
        f'k={k}, but sample set {number} has {len(indices)} samples a question; draw '
        'more, or take a smaller k'
      )
  return [(number, i) for number, found in by_set.items() for i in found[:k]]


def down_sample(
  problem_ids: Sequence[str], fraction: float, *, seed: int = 0
) -> list[str]:
  """Returns a random part of the problems, in their order.

  Each problem has a number that the seed and its id alone decide, and the lowest are
  taken: so a smaller fraction is part of a larger one, and no order matters.

  Args:
    problem_ids: All different.
    fraction: Of the problems, above 0 and at most 1; the number is rounded half up. The
      paper trains 3 epochs and 3 / fraction epochs on what is left, and reports the
      better.
    seed: Another one takes others.

  Raises:
    ValueError: A bad fraction, an id twice, or no problem is left.
  """
  if not 0 < fraction <= 1:
    raise ValueError(f'fraction={fraction}; want 0 < fraction <= 1')
  if len(set(problem_ids)) < len(problem_ids):
    raise ValueError(f'{len(problem_ids)} problem ids are not all different')
  size = math.floor(fraction * len(problem_ids) + 0.5)
  if not size:
    raise ValueError(
      f'fraction={fraction:g} of {len(problem_ids)} problems leaves none; take a '
      'larger one'
    )
  ranked = sorted(
    problem_ids, key=lambda key: (random.Random(f'{seed}/{key}/fraction').random(), key)
  )
  chosen = set(ranked[:size])
  return [key for key in problem_ids if key in chosen]
