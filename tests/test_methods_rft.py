"""RFT's path selection against a direct transcription of its rule, and by hand."""

import random

import pytest

from mrjax.methods import rft


def distance(a: str, b: str) -> int:
  """Textbook Levenshtein distance."""
  row = list(range(len(b) + 1))
  for i, x in enumerate(a, 1):
    last, row[0] = row[0], i
    for j, y in enumerate(b, 1):
      last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
  return row[-1]


def farthest(texts):
  """The selection as the paper's rule reads, recomputing every distance."""
  kept = []
  for i, text in enumerate(texts):
    keys = [rft.path_key(texts[k]) for k in kept]
    if rft.path_key(text) not in keys:
      kept.append(i)
      continue
    slot = keys.index(rft.path_key(text))
    incumbent = texts[kept[slot]]
    others = [texts[k] for k in kept if texts[k] != incumbent]
    gain = sum(distance(text, o) for o in others)
    if gain > sum(distance(incumbent, o) for o in others):
      kept[slot] = i
  return kept


@pytest.mark.parametrize(
  ('text', 'key'),
  [
    ('a <<1 + 1 = 2>>2 b <<2*3=6>>', '1+1=2|2*3=6'),
    ('<<1+1=2>>', '1+1=2'),
    ('<<1.0+1=2>>', '1.0+1=2'),  # another path than 1+1=2
    ('<<1+\t1=2>>', '1+\t1=2'),  # only spaces go
    ('no annotation', ''),
  ],
)
def test_path_key(text, key):
  assert rft.path_key(text) == key


def test_farthest_replaces_in_place():
  texts = [
    '<<1+1=2>> aaaa',
    '<<2+0=2>> aaab',
    '<<1+1=2>> zzzzzz',  # farther from the second than the first is
    '<<1+1=2>> aaaz',  # nearer: refused
  ]
  assert rft.select_paths(texts) == [2, 1]
  assert rft.select_paths(texts, dedup='first') == [0, 1]
  assert rft.select_paths(texts, dedup='none') == [0, 1, 2, 3]


def test_farthest_keeps_the_incumbent_on_ties_and_alone():
  assert rft.select_paths(['<<1=1>> a', '<<1=1>> zzzzzzz']) == [0]
  tie = ['<<1=1>> ab', '<<2=2>> xx', '<<1=1>> cd']
  assert rft.select_paths(tie) == [0, 1]


def test_one_sample_without_annotations_survives():
  assert rft.select_paths(['ab', 'cd', 'ef'], dedup='first') == [0]


def test_distances_are_of_code_points():
  texts = ['<<1=1>> éé', '<<2=2>> aaa', '<<1=1>> 😀😀😀😀']
  assert rft.select_paths(texts) == farthest(texts) == [2, 1]


@pytest.mark.parametrize('seed', range(30))
def test_farthest_agrees_with_the_plain_rule(seed):
  rng = random.Random(seed)
  texts = [
    f'<<{rng.randrange(4)}=1>>' + ''.join(rng.choices('abcd ', k=rng.randrange(12)))
    for _ in range(40)
  ]
  texts += rng.choices(texts, k=10)  # repeats, as samples at low temperature have
  assert rft.select_paths(texts) == farthest(texts)


def test_unknown_dedup():
  with pytest.raises(ValueError, match="unknown dedup 'near'; one of farthest"):
    rft.select_paths([], dedup='near')


def test_histogram_has_the_papers_bins():
  counts = dict.fromkeys(range(101), 1)
  assert rft.correct_histogram(counts, num_seeds=100) == {
    '0': 1,
    '1-20': 20,
    '21-40': 20,
    '41-60': 20,
    '61-80': 20,
    '81-99': 19,
    '100': 1,
  }
  # Equal counts of different questions do not collapse, as they did in the original.
  assert rft.correct_histogram({3: 5}, num_seeds=4) == (
    {'0': 0, '1': 0, '2': 0, '3': 5, '4': 0}
  )
  assert rft.correct_histogram({0: 2}, num_seeds=0) == {'0': 2}
  assert rft.correct_histogram({1: 2}, num_seeds=1) == {'0': 0, '1': 2}


def test_statistics():
  seeds = [(0, 0), (0, 1), (1, 0)]
  statistics = rft.Statistics(seeds, ['A', 'B'])
  statistics.add(
    [
      rft.Sample(0, 0, False, None),
      rft.Sample(0, 1, True, '<<1=1>>'),
      rft.Sample(1, 0, True, '<<1=1>> again'),
    ],
    num_kept=1,
  )
  statistics.add(
    [rft.Sample(0, 0, True, '<<2=2>>'), rft.Sample(1, 0, True, '<<3=3>>')], num_kept=2
  )
  statistics.add([rft.Sample(0, 1, True, None)], num_kept=0)
  statistics.add([], num_kept=0)
  assert statistics.summary() == {
    'num_samples': 6,
    'num_correct': 5,
    'num_false_annotations': 1,
    'num_questions': 4,
    'num_questions_unsolved': 1,
    'num_questions_without_samples': 1,
    'num_kept': 3,
    'correct_per_question': 1.25,
    'kept_per_question': 0.75,
    'paths_per_question': 0.75,
    'correct_histogram': {'0': 1, '1': 1, '2': 2, '3': 0},
    'solved_at': [1, 3, 3],
    'paths_at': [0.25, 0.5, 0.75],
    'sets': {
      'A': {
        'num_samples': 4,
        'num_correct': 3,
        'exclusive_paths': 1,
        'exclusive_share': 1 / 3,
      },
      'B': {
        'num_samples': 2,
        'num_correct': 2,
        'exclusive_paths': 1,
        'exclusive_share': 1 / 3,
      },
    },
  }
