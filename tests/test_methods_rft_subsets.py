"""RFT's unions, its first k seeds and its fractions of a data set."""

import itertools
import random

import pytest

from mrjax.methods import rft_subsets

IDS = [f'gsm8k-train-{i}' for i in range(97)]


def test_unions_have_400_and_500_samples_a_question():
  totals = {
    name: len(union.models) * union.num_samples
    for name, union in rft_subsets.UNIONS.items()
  }
  assert totals == {'U13B': 400, 'U33B': 500}


def test_union_samples_are_in_the_order_of_the_union():
  sets = {'33B': 'e', '13B-2': 'd', '13B': 'c', '7B-2': 'b', '7B': 'a', '70B': 'z'}
  assert rft_subsets.union_samples('U13B', sets) == 'a,b,c,d'
  assert rft_subsets.union_samples('U33B', sets) == 'a,b,c,d,e'


def test_bad_unions():
  with pytest.raises(ValueError, match="unknown union 'U7B'; one of U13B, U33B"):
    rft_subsets.union_samples('U7B', {})
  with pytest.raises(ValueError, match='there are none of 7B-2, 13B-2'):
    rft_subsets.union_samples('U13B', {'7B': 'a', '13B': 'c', '13B-2': ''})
  with pytest.raises(ValueError, match="'a,b' holds a comma"):
    rft_subsets.union_samples(
      'U13B', dict.fromkeys(('7B', '7B-2', '13B', '13B-2'), 'a,b')
    )


def test_first_seeds_are_those_of_every_set():
  seeds = [(1, 9), (0, 2), (0, 1), (0, 3), (1, 4)]  # a set may begin anywhere
  assert rft_subsets.first_seeds(seeds, 1) == [(0, 1), (1, 4)]
  assert rft_subsets.first_seeds(seeds, 2) == [(0, 1), (0, 2), (1, 4), (1, 9)]
  with pytest.raises(ValueError, match='k=3, but sample set 1 has 2 samples'):
    rft_subsets.first_seeds(seeds, 3)
  with pytest.raises(ValueError, match='k=0; want at least 1'):
    rft_subsets.first_seeds(seeds, 0)


@pytest.mark.parametrize(
  ('fraction', 'size'), [(1, 97), (1 / 2, 49), (1 / 4, 24), (1 / 8, 12), (1 / 32, 3)]
)
def test_fractions_have_their_size_and_order(fraction, size):
  chosen = rft_subsets.down_sample(IDS, fraction)
  assert len(chosen) == size
  assert chosen == [key for key in IDS if key in set(chosen)]


def test_fractions_are_nested_and_depend_on_no_order():
  subsets = [set(rft_subsets.down_sample(IDS, f)) for f in rft_subsets.PAPER_FRACTIONS]
  assert all(larger > smaller for larger, smaller in itertools.pairwise(subsets))
  shuffled = random.Random(3).sample(IDS, len(IDS))
  assert set(rft_subsets.down_sample(shuffled, 1 / 8)) == subsets[3]
  assert set(rft_subsets.down_sample(IDS, 1 / 8, seed=1)) != subsets[3]


def test_bad_fractions():
  for fraction in (0, -0.5, 1.01):
    with pytest.raises(ValueError, match='want 0 < fraction <= 1'):
      rft_subsets.down_sample(IDS, fraction)
  with pytest.raises(ValueError, match='of 3 problems leaves none'):
    rft_subsets.down_sample(IDS[:3], 1 / 32)
  with pytest.raises(ValueError, match='2 problem ids are not all different'):
    rft_subsets.down_sample(['a', 'a'], 1)


def test_gsm8k_fractions():
  ids = [str(i) for i in range(7473)]
  sizes = [len(rft_subsets.down_sample(ids, f)) for f in rft_subsets.PAPER_FRACTIONS]
  assert sizes == [7473, 3737, 1868, 934, 467, 234]
