r"""Trains a value model as in Q# (arXiv 2502.20548) on responses with rewards.

Records hold `problem_id`, `prompt_ids`, `response_ids`, `switch` (the first supervised
token of the response), `reward` and `round`. On a laptop:

  python -m experiments.train_value --model=tiny-0.2m --data=round1.jsonl \
    --eval_data=other_problems.jsonl --learning_rate=1e-3 --output_dir=outputs/value

In the setting of the paper (one H100, about five hours by its account; not measured
here), second round:

  python -m experiments.train_value --model=meta-llama/Llama-3.2-1B-Instruct \
    --data=round1.jsonl,round2.jsonl --eval_data=other_problems.jsonl \
    --drop_no_variation --packing=false --batch_size=8 --max_length=2048 \
    --num_epochs=5 --output_dir=outputs/value

Run it again with the same flags after it was stopped and it goes on from its last
checkpoint.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import training_flags
from mrjax.losses.value import CLASSIFIER_TYPES, LOSS_TYPES
from mrjax.runs import cli, value
from mrjax.runs.value_steps import INIT_MODES

_D = value.Config
_FLAGS = (
  *training_flags.define(
    _D,
    data='Value records in JSON Lines: a file, directory or glob for each round, with '
    'commas. --eval_data are records of other problems (eval_ood_... in the metrics).',
  ),
  flags.DEFINE_enum(
    'classifier_type',
    _D.classifier_type,
    CLASSIFIER_TYPES,
    'V values the text up to a token, Q every next token.',
  ),
  flags.DEFINE_enum(
    'loss_type',
    _D.loss_type,
    LOSS_TYPES,
    'Cross-entropy or squared error of one probability, or likelihood of atoms.',
  ),
  flags.DEFINE_integer('num_atoms', _D.num_atoms, 'mle: rewards it tells apart.'),
  flags.DEFINE_float('v_min', _D.v_min, 'mle: lowest reward.'),
  flags.DEFINE_float('v_max', _D.v_max, 'mle: highest reward.'),
  flags.DEFINE_bool('use_bias', _D.use_bias, 'Train a bias in the head.'),
  flags.DEFINE_enum(
    'init_mode',
    _D.init_mode,
    INIT_MODES,
    "The head's first weights: random; zero (predicts the middle); reuse (Q: the rows "
    'of the language-model head; V has none: random); warmstart (those of --model, a '
    'value model).',
  ),
  flags.DEFINE_bool(
    'use_all_ref_tokens',
    _D.use_all_ref_tokens,
    'Supervise all tokens from the switch on, rather than the first alone.',
  ),
  flags.DEFINE_bool(
    'drop_no_variation',
    _D.drop_no_variation,
    'Leave out problems whose rewards are all equal.',
  ),
  flags.DEFINE_enum(
    'inference_mode',
    _D.inference_mode,
    value.INFERENCE_MODES,
    'What guidance will do with the model; expectation wants labels exp(eta * reward).',
  ),
  flags.DEFINE_bool(
    'cd_baseline', _D.cd_baseline, 'Plain rewards as labels whatever the mode.'
  ),
  flags.DEFINE_float(
    'eta', _D.eta, 'expectation: guidance strength; 1 over that of the paper.'
  ),
  flags.DEFINE_float('shift_reward', _D.shift_reward, 'Taken from every reward.'),
  flags.DEFINE_float('scale_reward', _D.scale_reward, 'Factor after the shift.'),
  flags.DEFINE_float(
    'id_eval_ratio',
    _D.id_eval_ratio,
    'Share of --data held out for evaluation (eval_id_... in the metrics). Its loss is '
    'the evaluation loss of the last line and decides the best checkpoint; at 0, that '
    'of --eval_data does.',
  ),
  flags.DEFINE_integer(
    'eval_max_size', _D.eval_max_size, 'Records of each evaluation, at most.'
  ),
)

flags.adopt_module_key_flags(training_flags)


def main(argv: Sequence[str]) -> None:
  del argv
  values: dict[str, Any] = {flag.name: flag.value for flag in _FLAGS}
  print(training_flags.describe(value.run(value.Config(**values))))


if __name__ == '__main__':
  cli.run(main)
