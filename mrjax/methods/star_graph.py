"""Q#'s star graphs: finding the path to a leaf, where the first step decides.

Bachmann & Nagarajan 2024, arXiv 2403.06963; Zhou et al. 2025, arXiv 2502.20548. G(d, l)
has d arms that leave a centre, each path with l nodes, the centre included: d * (l - 1)
edges. Given the shuffled edges, the centre and a leaf,

  26,3|26,41|41,8|3,17/26,8=26,41,8

the path is to be written. A model trained on paths goes down a random arm, so it is
right in 1 of d graphs; the value model learns which.

Edges point away from the centre. The numeral vocabulary has the nodes as ids 0 to 49,
then `|`, `=`, `/` and `$`; commas are no tokens. `$` is in no text here: it is free for
an end or for padding.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from mrjax.records import Problem, Record

NUM_NODES = 50
SYMBOLS = '|=/$'
SPLIT_SIZES = {'pretrain': 200_000, 'posttrain': 200_000, 'test': 20_000}
PAPER_SHAPES = ((2, 5), (3, 8), (5, 5), (2, 20))

_SPLIT_OF_PART = {
  'pretrain': range(0, 10),
  'posttrain': range(10, 20),
  'test': range(20, 21),
}
_MAX_MISSES = 20_000  # graphs in a row that are seen or of another split


class Graph(NamedTuple):
  """A star graph as it is asked.

  Attributes:
    edges: (from, to), away from the centre, in the order of the text.
    start: The centre.
    goal: The leaf to reach.
  """

  edges: tuple[tuple[int, int], ...]
  start: int
  goal: int

  @property
  def path(self) -> tuple[int, ...]:
    """The nodes from start to goal, both included."""
    return path_to(self, self.goal)

  @property
  def question(self) -> str:
    """The text before the path."""
    edges = '|'.join(f'{a},{b}' for a, b in self.edges)
    return f'{edges}/{self.start},{self.goal}='

  @property
  def answer(self) -> str:
    """The text of the path."""
    return ','.join(map(str, self.path))


def draw_graph(
  rng: random.Random, *, num_arms: int, path_length: int, num_nodes: int = NUM_NODES
) -> Graph:
  """Returns a random G(num_arms, path_length) on ids below `num_nodes`.

  Raises:
    ValueError: Fewer than 2 arms or 2 nodes a path, or more nodes than ids.
  """
  _check_shape(num_arms, path_length, num_nodes)
  length = path_length - 1
  start, *others = rng.sample(range(num_nodes), 1 + num_arms * length)
  arms = [others[i * length : (i + 1) * length] for i in range(num_arms)]
  edges = [edge for arm in arms for edge in itertools.pairwise([start, *arm])]
  rng.shuffle(edges)
  return Graph(tuple(edges), start, rng.choice(arms)[-1])


def parse_graph(question: str) -> Graph:
  """Returns the graph of a question.

  Raises:
    ValueError: Not in the format, or no star: a node with two ways in, one that cannot
      be reached, a fork outside the centre, arms of different length, or a goal that
      is no leaf.
  """
  match = _QUESTION.fullmatch(question)
  if not match:
    raise ValueError(
      f'{question!r:.80} is no question of a star graph; want a,b|c,d/start,goal='
    )
  pairs = (pair.split(',') for pair in match['edges'].split('|'))
  edges = tuple((int(a), int(b)) for a, b in pairs)
  graph = Graph(edges, int(match['start']), int(match['goal']))
  parents = {b: a for a, b in edges}
  leaves = set(parents) - set(parents.values())
  lengths = {len(path_to(graph, leaf)) - 1 for leaf in leaves}
  fault = ''
  if len(parents) < len(edges) or graph.start in parents:
    fault = 'a node has two ways in, or the start has one'
  elif graph.goal not in leaves:
    fault = f'the goal {graph.goal} is no leaf'
  # Forks give more leaves than the start has ways out; pieces apart add edges.
  elif (
    len(lengths) > 1
    or len(leaves) * max(lengths) != len(edges)
    or len(leaves) != sum(a == graph.start for a, _ in edges)
  ):
    fault = 'its edges are not arms of one length that leave the start'
  if fault:
    raise ValueError(f'{question!r:.80} is no star graph: {fault}')
  return graph


_NUMBER = r'(?:0|[1-9][0-9]{0,5})(?![0-9])'
_QUESTION = re.compile(
  rf'(?P<edges>{_NUMBER},{_NUMBER}(?:\|{_NUMBER},{_NUMBER})*)'
  rf'/(?P<start>{_NUMBER}),(?P<goal>{_NUMBER})='
)


def path_to(graph: Graph, leaf: int) -> tuple[int, ...]:
  """Returns the nodes from the start to a leaf, both included; () without a way."""
  parents = {b: a for a, b in graph.edges}
  path = [leaf]
  while path[-1] in parents and len(path) <= len(parents):
    path.append(parents[path[-1]])
  return tuple(reversed(path)) if path[-1] == graph.start else ()


def generate_graphs(
  split: str,
  *,
  num_arms: int,
  path_length: int,
  size: int | None = None,
  seed: int = 42,
  num_nodes: int = NUM_NODES,
) -> list[Problem]:
  """Returns `size` distinct problems of a split; the same for the same arguments.

  Which split a graph falls into is decided by its edges alone, whatever their order and
  the goal, so no graph is in two splits of any seed or size. Asking for more keeps the
  first ones. `answer` and `solution` are the path.

  Args:
    split: Of `SPLIT_SIZES`.
    num_arms: d.
    path_length: l.
    size: None is that of the paper.
    seed: At least 0.
    num_nodes: Ids to draw from.

  Raises:
    ValueError: An unknown split, a bad number, or more graphs asked for than are found.
  """
  if split not in SPLIT_SIZES:
    raise ValueError(
      f'star graphs have no split {split!r}, only {", ".join(SPLIT_SIZES)}'
    )
  size = SPLIT_SIZES[split] if size is None else size
  if size < 1 or seed < 0:
    raise ValueError(f'size={size}, seed={seed}; want at least 1 and 0')
  _check_shape(num_arms, path_length, num_nodes)
  name = f'star-{num_arms}-{path_length}'
  if num_nodes != NUM_NODES:
    name += f'-of-{num_nodes}'
  problems: list[Problem] = []
  seen: set[bytes] = set()
  misses = 0
  for number in itertools.count():
    if len(problems) == size:
      break
    rng = random.Random(f'{name}/{seed}/{number}')
    graph = draw_graph(
      rng, num_arms=num_arms, path_length=path_length, num_nodes=num_nodes
    )
    digest = hashlib.sha256(str(sorted(graph.edges)).encode()).digest()[:8]
    key = digest + graph.goal.to_bytes(4, 'big')
    if key in seen or _split_of(digest) != split:
      misses += 1
      if misses > _MAX_MISSES:
        raise ValueError(
          f'found only {len(problems)} distinct graphs of G({num_arms}, {path_length}) '
          f'on {num_nodes} ids for {split!r}, want {size}; ask for fewer, or for a '
          'larger shape'
        )
      continue
    misses = 0
    seen.add(key)
    answer = graph.answer
    problems.append(
      Problem(
        f'{name}-{split}-{seed}-{number}',
        graph.question,
        answer=answer,
        solution=answer,
        source='star_graph',
      )
    )
  return problems


def _split_of(digest: bytes) -> str:
  part = int.from_bytes(digest, 'big') % 21
  return next(name for name, parts in _SPLIT_OF_PART.items() if part in parts)


def _check_shape(num_arms: int, path_length: int, num_nodes: int) -> None:
  needed = 1 + num_arms * (path_length - 1)
  if num_arms < 2 or path_length < 2 or needed > num_nodes:
    raise ValueError(
      f'G({num_arms}, {path_length}) on {num_nodes} ids: want at least 2 arms, paths '
      f'of at least 2 nodes, and 1 + d * (l - 1) = {needed} <= {num_nodes} nodes'
    )


_TOKEN = re.compile(rf'(?P<node>{_NUMBER})|(?P<symbol>[{re.escape(SYMBOLS)}])|,')


def encode(text: str, *, num_nodes: int = NUM_NODES) -> list[int]:
  """Returns the ids of a text in the numeral vocabulary; commas are dropped.

  Raises:
    ValueError: A character or a number that is not in the vocabulary.
  """
  ids: list[int] = []
  place = 0
  while place < len(text):
    match = _TOKEN.match(text, place)
    node = int(match['node']) if match and match['node'] else 0
    if not match or node >= num_nodes:
      raise ValueError(
        f'{text[place:]!r:.40} begins with no node below {num_nodes}, symbol of '
        f'{SYMBOLS!r} or comma'
      )
    if match['node']:
      ids.append(node)
    elif match['symbol']:
      ids.append(num_nodes + SYMBOLS.index(match['symbol']))
    place = match.end()
  return ids


def decode(ids: Iterable[int], *, num_nodes: int = NUM_NODES) -> str:
  """Returns the text of ids, a comma between two nodes: the inverse of `encode`.

  Raises:
    ValueError: An id that is not in the vocabulary.
  """
  text = ''
  for i in ids:
    if not 0 <= i < num_nodes + len(SYMBOLS):
      raise ValueError(
        f'id {i} is not in the vocabulary of {num_nodes} nodes and {SYMBOLS!r}'
      )
    if i < num_nodes:
      text += f'{"," if text[-1:].isdigit() else ""}{i}'
    else:
      text += SYMBOLS[i - num_nodes]
  return text


def is_correct(problem: Problem, text: str) -> bool:
  """Whether a text is the path: all tokens must match, and nothing may follow."""
  return text.strip() == problem.answer


def verdict(problem: Problem, text: str) -> str:
  """Returns what a text is: 'correct', 'other_arm' (a path to another leaf), 'no_path'.

  A model that has learned to walk but not where to errs by `other_arm` alone.
  """
  if is_correct(problem, text):
    return 'correct'
  graph = parse_graph(problem.question)
  leaves = {b for _, b in graph.edges} - {a for a, _ in graph.edges}
  arms = {','.join(map(str, path_to(graph, leaf))) for leaf in leaves}
  return 'other_arm' if text.strip() in arms else 'no_path'


def summarise(problems: Iterable[Problem], samples: Iterable[Record]) -> dict[str, Any]:
  """Returns `num_samples`, and the share of each `verdict`.

  Raises:
    ValueError: A sample of no problem here, or no sample.
  """
  by_id = {problem.id: problem for problem in problems}
  counts = {'correct': 0, 'other_arm': 0, 'no_path': 0}
  for sample in samples:
    key = sample['problem_id']
    if key not in by_id:
      raise ValueError(
        f'there is a sample of problem {key!r:.80}, which is not among the '
        f'{len(by_id)} problems; give those that were sampled'
      )
    counts[verdict(by_id[key], sample['text'])] += 1
  total = sum(counts.values())
  if not total:
    raise ValueError('there is no sample to sum up')
  return {'num_samples': total} | {name: n / total for name, n in counts.items()}
