"""Star graphs: what is drawn, its text and ids, splits, grading, and pairs."""

import random
from collections import Counter

import pytest

from mrjax.data.values import parse_value
from mrjax.methods import star_graph, star_graph_pairs
from mrjax.records import Problem

# G(2, 3): 26 -> 41 -> 8 and 26 -> 3 -> 17.
QUESTION = '26,3|26,41|41,8|3,17/26,8='
PROBLEM = Problem('g', QUESTION, answer='26,41,8')


def test_the_worked_graph():
  graph = star_graph.parse_graph(QUESTION)
  assert graph.edges == ((26, 3), (26, 41), (41, 8), (3, 17))
  assert (graph.start, graph.goal, graph.path) == (26, 8, (26, 41, 8))
  assert (graph.question, graph.answer) == (QUESTION, '26,41,8')
  assert star_graph.path_to(graph, 17) == (26, 3, 17)
  assert star_graph.path_to(graph, 5) == ()


@pytest.mark.parametrize(('arms', 'length'), star_graph.PAPER_SHAPES)
def test_drawn_graphs_have_their_shape(arms, length):
  rng = random.Random(0)
  goals_at, first = Counter(), Counter()
  for _ in range(200):
    graph = star_graph.draw_graph(rng, num_arms=arms, path_length=length)
    assert len(graph.edges) == arms * (length - 1)
    nodes = {node for edge in graph.edges for node in edge}
    assert len(nodes) == 1 + arms * (length - 1)
    assert nodes <= set(range(50))
    assert sum(a == graph.start for a, _ in graph.edges) == arms
    assert len(graph.path) == length
    assert set(zip(graph.path, graph.path[1:])) <= set(graph.edges)
    assert star_graph.parse_graph(graph.question) == graph
    ways = [b for a, b in graph.edges if a == graph.start]
    goals_at[ways.index(graph.path[1])] += 1
    first[graph.edges.index((graph.start, graph.path[1]))] += 1
  # Neither the order of the edges nor the place of one tells the arm.
  assert len(goals_at) == arms and max(goals_at.values()) < 2 * 200 / arms
  assert len(first) > len(graph.edges) / 2


@pytest.mark.parametrize(
  'question',
  [
    '',
    '26,41|41,8/26,8',  # no end
    '26,41|41,8/26,8=26',
    '26,041|41,8/26,8=',
    '26,41 41,8/26,8=',
    '1,2|1,3|4,3/1,2=',  # two ways in
    '1,2|2,1/1,2=',  # a way into the start
    '1,2|2,3|1,4|4,5/1,2=',  # the goal is no leaf
    '1,2|2,3|1,4/1,3=',  # arms of two lengths
    '1,2|2,3|2,4/1,3=',  # a fork
    '1,2|2,3|2,4|5,5/1,3=',  # a fork whose missing edge is a cycle apart
    '1,2|1,3|5,6|6,5/1,3=',  # a cycle apart
    '1,2|1,3|5,6/1,3=',  # an edge apart
    '1,2|1,3/5,3=',  # another start
  ],
)
def test_other_texts_are_no_star_graphs(question):
  with pytest.raises(ValueError, match=r'is no question of a star|is no star graph'):
    star_graph.parse_graph(question)


@pytest.mark.parametrize(
  ('arms', 'length', 'nodes'), [(1, 5, 50), (2, 1, 50), (2, 20, 38), (7, 9, 50)]
)
def test_bad_shapes(arms, length, nodes):
  with pytest.raises(ValueError, match='want at least 2 arms'):
    star_graph.draw_graph(
      random.Random(0), num_arms=arms, path_length=length, num_nodes=nodes
    )


# Splits -----------------------------------------------------------------------


def generate(split, size, **changes):
  arguments = {'num_arms': 2, 'path_length': 3} | changes
  return star_graph.generate_graphs(split, size=size, **arguments)


def edges_of(problem):
  return frozenset(star_graph.parse_graph(problem.question).edges)


def test_problems_are_whole_and_more_keep_the_first():
  problems = generate('pretrain', 40)
  assert problems[:15] == generate('pretrain', 15)
  for problem in problems:
    graph = star_graph.parse_graph(problem.question)
    assert problem.answer == problem.solution == graph.answer
    assert problem.id.startswith('star-2-3-pretrain-42-')
  assert len({problem.id for problem in problems}) == 40
  assert generate('pretrain', 15, seed=1) != problems[:15]


def test_no_graph_is_in_two_splits_of_any_seed():
  # 6 ids: few enough graphs for the same edges to come again.
  found = {
    split: {
      edges_of(problem)
      for seed in range(3)
      for problem in generate(split, size, seed=seed, num_nodes=6)
    }
    for split, size in (('pretrain', 300), ('posttrain', 200), ('test', 20))
  }
  assert not found['pretrain'] & found['posttrain']
  assert not (found['pretrain'] | found['posttrain']) & found['test']
  assert len(found['pretrain']) < 3 * 300  # the same ones do come


def test_splits_have_their_shares():
  assert star_graph.SPLIT_SIZES == {
    'pretrain': 200_000,
    'posttrain': 200_000,
    'test': 20_000,
  }
  last = {
    split: int(generate(split, size)[-1].id.rpartition('-')[2])
    for split, size in (('pretrain', 1000), ('posttrain', 1000), ('test', 100))
  }
  # A hundred draws of 1 in 21 take 2,100 on average, 205 the standard deviation.
  assert 1300 < last['test'] < 2900
  assert 1900 < last['pretrain'] < 2300 and 1900 < last['posttrain'] < 2300


def test_problems_are_distinct_and_can_run_out():
  # G(2, 2) on 3 ids: 3 centres, 2 goals; 6 questions but for the order of edges.
  found, size = {}, 0
  for split in star_graph.SPLIT_SIZES:
    with pytest.raises(ValueError, match=r'found only (.*) distinct graphs of G') as e:
      generate(split, 7, path_length=2, num_nodes=3)
    count = int(str(e.value).split()[2])
    size += count
    if count:
      problems = generate(split, count, path_length=2, num_nodes=3)
      found |= {(edges_of(p), p.answer): p for p in problems}
  assert size == len(found) == 6


def test_bad_generation():
  with pytest.raises(ValueError, match="no split 'dev', only pretrain, posttrain"):
    generate('dev', 1)
  for changes in ({'size': 0}, {'size': 1, 'seed': -1}):
    with pytest.raises(ValueError, match='want at least 1 and 0'):
      generate('test', **changes)


# Text and ids -----------------------------------------------------------------


def test_the_numeral_vocabulary():
  ids = star_graph.encode(QUESTION + '26,41,8$')
  assert ids == [
    *(26, 3, 50, 26, 41, 50, 41, 8, 50, 3, 17),
    *(52, 26, 8, 51, 26, 41, 8, 53),
  ]
  assert star_graph.decode(ids) == QUESTION + '26,41,8$'
  assert star_graph.encode('6|7', num_nodes=9) == [6, 9, 7]
  assert star_graph.encode('') == []


@pytest.mark.parametrize('seed', range(20))
def test_ids_come_back(seed):
  rng = random.Random(seed)
  ids = [rng.randrange(54) for _ in range(rng.randrange(30))]
  assert star_graph.encode(star_graph.decode(ids)) == ids
  graph = star_graph.draw_graph(rng, num_arms=3, path_length=4)
  assert star_graph.decode(star_graph.encode(graph.question)) == graph.question


@pytest.mark.parametrize('text', ['50', '1 2', 'a', '07', '1;2', '1234567'])
def test_texts_outside_the_vocabulary(text):
  with pytest.raises(ValueError, match='begins with no node below 50'):
    star_graph.encode(text)


@pytest.mark.parametrize('i', [-1, 54])
def test_ids_outside_the_vocabulary(i):
  with pytest.raises(ValueError, match=f'id {i} is not in the vocabulary'):
    star_graph.decode([1, i])


# Grading and pairs ------------------------------------------------------------


@pytest.mark.parametrize(
  ('text', 'verdict'),
  [
    ('26,41,8', 'correct'),
    (' 26,41,8\n', 'correct'),
    ('26,3,17', 'other_arm'),
    ('26,41,8,8', 'no_path'),
    ('26,41', 'no_path'),
    ('41,8', 'no_path'),
    ('26,3,8', 'no_path'),
    ('26, 41, 8', 'no_path'),
    ('', 'no_path'),
  ],
)
def test_verdicts(text, verdict):
  assert star_graph.verdict(PROBLEM, text) == verdict
  assert star_graph.is_correct(PROBLEM, text) == (verdict == 'correct')


def sample(text, index=0, problem_id='g'):
  return {'problem_id': problem_id, 'sample_index': index, 'text': text}


def test_shares_of_verdicts():
  texts = ['26,41,8', '26,3,17', '26,3,17', '26,3,17', 'x']
  samples = [sample(text, i) for i, text in enumerate(texts)]
  assert star_graph.summarise([PROBLEM], samples) == {
    'num_samples': 5,
    'correct': 0.2,
    'other_arm': 0.6,
    'no_path': 0.2,
  }
  with pytest.raises(ValueError, match='no sample to sum up'):
    star_graph.summarise([PROBLEM], [])
  with pytest.raises(ValueError, match="sample of problem 'h', which is not among"):
    star_graph.summarise([PROBLEM], [sample('', problem_id='h')])


def test_the_first_wrong_sample_makes_the_pair():
  problems = [PROBLEM, *(Problem(key, QUESTION, answer='26,41,8') for key in 'hijk')]
  samples = [
    sample('26,3,17', 7),
    sample('26,3,8 ', 2),
    sample('', 1),
    sample('26,41,8', 0),
    sample('26,41,8', 0, 'h'),
    sample('26,41,8', 1, 'h'),
    sample('26,41,8', 0, 'i'),
    sample('26,3,17', 1, 'i'),
    sample(' ', 0, 'k'),
  ]
  pairs, counts = star_graph_pairs.find_pairs(problems, samples)
  assert [pair[1:] for pair in pairs] == [('26,3,8', 2), ('26,3,17', 1)]
  assert counts == {
    'num_problems': 5,
    'num_pairs': 2,
    'num_without_samples': 1,
    'num_without_wrong': 2,
    'num_empty': 2,
  }
  pairs, counts = star_graph_pairs.find_pairs(problems, samples[::-1], max_tries=1)
  assert pairs == [] and counts['num_without_wrong'] == 4


def test_pairs_as_records():
  pairs = [star_graph_pairs.Pair(PROBLEM, '26,3,17', 4)]
  right, wrong = star_graph_pairs.pair_values(pairs)
  assert right == {
    'problem_id': 'g',
    'prompt_ids': star_graph.encode(QUESTION),
    'response_ids': [26, 41, 8],
    'switch': 0,
    'reward': 1,
    'round': 1,
  }
  assert wrong == right | {'response_ids': [26, 3, 17], 'reward': 0}
  assert parse_value(wrong, where='').reward == 0.0
  (row,) = star_graph_pairs.pair_values(pairs, encode=lambda text: [len(text)])[:1]
  assert row['prompt_ids'] == [26] and row['response_ids'] == [7]
  assert star_graph_pairs.pair_preferences(pairs) == [
    {
      'prompt': QUESTION,
      'chosen': '26,41,8',
      'rejected': '26,3,17',
      'problem_id': 'g',
    }
  ]


def test_bad_pairs():
  with pytest.raises(ValueError, match='max_tries=0; want at least 1'):
    star_graph_pairs.find_pairs([PROBLEM], [], max_tries=0)
  with pytest.raises(ValueError, match="sample 0 of problem 'g' comes twice"):
    star_graph_pairs.find_pairs([PROBLEM], [sample('a'), sample('a')])
  with pytest.raises(ValueError, match="problem 'h' is of none of these problems"):
    star_graph_pairs.find_pairs([PROBLEM], [sample('a', problem_id='h')])
  pair = star_graph_pairs.Pair(Problem('n', QUESTION), '26,3,17', 0)
  for convert in (star_graph_pairs.pair_values, star_graph_pairs.pair_preferences):
    with pytest.raises(ValueError, match="'n' has no answer; want the path"):
      convert([pair])
