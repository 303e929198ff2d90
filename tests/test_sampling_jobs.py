"""What the contenders of the sampling benchmark are asked for."""

import numpy as np

from experiments.benchmarks import sampling_jobs
from experiments.benchmarks.sampling_jobs import Job

PROMPTS = [[3 + i, 4, 5 + i] for i in range(sampling_jobs.NUM_PROMPTS)]


def test_natural_lengths_are_one_table_with_the_mean_it_states():
  job = sampling_jobs.natural('model', PROMPTS)
  lengths = np.array(job.lengths)
  assert lengths.shape == (64, 16)
  assert abs(lengths.mean() - 48) < 0.5
  assert (lengths.min(), lengths.max()) == (4, 128)
  assert job.num_tokens == lengths.sum()
  fewer = sampling_jobs.natural('model', PROMPTS[:5])
  assert fewer.lengths == job.lengths[:5]


def test_a_job_is_the_same_after_its_file(tmp_path):
  job = sampling_jobs.natural('model', PROMPTS[:3])
  assert Job.load(job.save(tmp_path / 'job.json')) == job


def test_rows_at_once_are_those_of_the_prompts_handed_over_together():
  assert sampling_jobs.fixed('model', PROMPTS).rows_at_once == 64 * 16
  one = sampling_jobs.greedy('model', num_prompts=4, prompts_at_once=1)
  assert (one.rows_at_once, one.num_tokens) == (1, 4 * 128)
  uneven = Job('model', PROMPTS[:3], [[1], [1, 1], [1] * 5], 2)
  assert uneven.rows_at_once == 5


def test_the_longest_prompt_and_the_longest_completion_fit():
  assert Job('model', [[3] * 7, [4] * 2], [[1, 11], [5]], 2).max_length == 7 + 11


def test_both_sides_of_shared_prompts_do_the_same_work():
  shared = sampling_jobs.shared_prefix('model', shared=True)
  unshared = sampling_jobs.shared_prefix('model', shared=False)
  assert [len(ids) for ids in shared.prompts] == [512]
  assert {len(ids) for ids in unshared.prompts} == {512}
  assert len(set(map(tuple, unshared.prompts))) == 64
  assert shared.num_tokens == unshared.num_tokens == 64 * 64
  assert shared.rows_at_once == unshared.rows_at_once == 64


def test_requests_ask_for_what_the_job_says():
  job = sampling_jobs.fixed('model', PROMPTS[:2])
  requests = job.requests()
  assert [list(request.prompt_ids) for request in requests] == PROMPTS[:2]
  assert [request.problem_id for request in requests] == ['0', '1']
  for request in requests:
    assert request.num_samples == 16
    assert request.params.max_new_tokens == 128
    assert (request.params.temperature, request.params.top_p) == (0.8, 0.95)
