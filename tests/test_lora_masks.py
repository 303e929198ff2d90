"""Masks: which weights train, and that splitting loses nothing."""

import jax
import numpy as np
import pytest

from mrjax import trees
from mrjax.lora import masks

SHAPES = {
  'embed/embedding': (11, 6),
  'layers/attn/q/kernel': (5, 6, 2, 3),
  'layers/attn/q/lora_a': (5, 6, 4),
  'layers/attn/q/lora_b': (5, 4, 2, 3),
  'layers/attn_norm/scale': (5, 6),
  'final_norm/scale': (6,),
  'lm_head/kernel': (6, 11),
}


def make_params():
  rng = np.random.default_rng(0)
  return trees.unflatten(
    {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
  )


@pytest.mark.parametrize(
  'name, trainable',
  [
    ('all', set(SHAPES)),
    ('lora', {'layers/attn/q/lora_a', 'layers/attn/q/lora_b'}),
    ('head', {'lm_head/kernel'}),
    ('norms', {'layers/attn_norm/scale', 'final_norm/scale'}),
    ('embeddings', {'embed/embedding', 'lm_head/kernel'}),
    ('last_layers:2', {n for n in SHAPES if n != 'embed/embedding'}),
  ],
)
def test_presets_name_what_trains_and_split_loses_nothing(name, trainable):
  params = make_params()
  mask = masks.make_mask(params, masks.rules_named(name))
  first, second = masks.split(params, mask)
  assert set(trees.flatten(first)) == trainable
  merged = masks.merge(first, second)
  jax.tree.map(np.testing.assert_array_equal, merged, params)
  assert trees.num_bytes(first) + trees.num_bytes(second) == trees.num_bytes(params)


def test_last_layers_cuts_the_stacked_leaves():
  params = make_params()
  mask = masks.make_mask(params, masks.rules_named('last_layers:2'))
  first, second = masks.split(params, mask)
  np.testing.assert_array_equal(
    first['layers']['attn']['q']['kernel'], params['layers']['attn']['q']['kernel'][3:]
  )
  assert second['layers']['attn']['q']['kernel'].shape == (3, 6, 2, 3)


def test_the_first_rule_that_matches_decides():
  rules = [(r'lora_b$', False), (r'attn/', True)]
  mask = trees.flatten(masks.make_mask(make_params(), rules))
  assert mask['layers/attn/q/kernel'] and not mask['layers/attn/q/lora_b']


@pytest.mark.parametrize(
  'rules, message',
  [
    ([(r'nothing', True)], 'No parameter is trainable'),
    ([(r'^layers/', 6)], '6 last layers'),
    ([(r'^embed', 2)], '2 last layers of embed/embedding'),
  ],
)
def test_rules_that_train_nothing_or_too_much_are_refused(rules, message):
  with pytest.raises(ValueError, match=message):
    masks.make_mask(make_params(), rules)


@pytest.mark.parametrize('name', ['lora_a', 'last_layers:0', 'last_layers:'])
def test_unknown_presets_are_refused(name):
  with pytest.raises(ValueError, match=f'--trainable={name}: want one of .*regex:'):
    masks.rules_named(name)
