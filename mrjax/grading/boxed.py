r"""Finds `\boxed{...}` answers in LaTeX by counting braces."""


def braced(text: str) -> str | None:
  """Returns the inside of the braces that open `text`; None when they do not close."""
  depth = 0
  for position, character in enumerate(text):
    depth += (character == '{') - (character == '}')
    if depth == 0:
      return text[1:position] if position else None
  return None


def last_braced(text: str, command: str) -> str | None:
  r"""Returns the inside of the last `command{...}`, e.g. of the last `\boxed{...}`.

  None when the command is absent, or when the braces of its last occurrence do not
  close: a cut-off answer is no answer, and an earlier box is not taken for it.
  """
  start = text.rfind(command + '{')
  return None if start < 0 else braced(text[start + len(command) :])


def last_boxed(text: str) -> str | None:
  r"""Returns the inside of the last box, in the forms of MATH (Hendrycks et al. 2021).

  `\boxed{5}`, or `\boxed 5` up to the next `$`; `\fbox{5}` where no `\boxed` is.
  """
  for command in (r'\boxed', r'\fbox'):
    start = text.rfind(command)
    if start >= 0:
      rest = text[start + len(command) :]
      if rest.startswith('{'):
        return braced(rest)
      return rest.split('$')[0].strip() if rest.startswith(' ') else None
  return None
