"""Which numbers an option may be, and the one message where it is none of them."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Range(NamedTuple):
  """Numbers that an option may be.

  Attributes:
    text: What a message calls them.
    holds: Whether a number is one; False for NaN.
  """

  text: str
  holds: Callable[[float], bool]


FINITE = Range('a finite number', math.isfinite)
NOT_NEGATIVE = Range('at least 0, and finite', lambda x: 0 <= x < math.inf)
POSITIVE = Range('a positive number, and finite', lambda x: 0 < x < math.inf)
SHARE = Range('a number in [0, 1]', lambda x: 0 <= x <= 1)
BELOW_ONE = Range('a number in [0, 1)', lambda x: 0 <= x < 1)


def check_ranges(config: Any, ranges: Mapping[str, Range]) -> None:
  """Raises ValueError for the first field of `config` that is out of its range.

  Args:
    config: Its fields are called as flags are; one that is None is not looked at.
    ranges: By name of the field.
  """
  for name, wanted in ranges.items():
    value = getattr(config, name)
    if value is not None and not wanted.holds(value):
      raise ValueError(f'--{name}={value}: want {wanted.text}.')
