"""Planning: every sample once, few shapes, little waste."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mrjax.sampling.batches import place_buckets, plan_batches, prompt_bucket
from mrjax.sampling.requests import Request, SamplingParams, hash_problem_id


def requests_of(shapes) -> list[Request]:
  params = SamplingParams(max_new_tokens=64)
  return [
    Request(f'p{i}', (1,) * length, count, params, first_sample_index=first)
    for i, (length, count, first) in enumerate(shapes)
  ]


@settings(max_examples=60, deadline=None)
@given(
  st.lists(
    st.tuples(st.integers(1, 200), st.integers(1, 40), st.integers(0, 5)), max_size=12
  ),
  st.integers(1, 70),
  st.sampled_from([1, 2, 8]),
)
def test_every_sample_runs_once_in_batches_of_one_size(shapes, max_rows, shards):
  max_rows = max(max_rows, shards)
  requests = requests_of(shapes)
  batches = plan_batches(requests, max_rows=max_rows, shards=shards)
  seen = [
    (request.problem_id, index)
    for batch in batches
    for _, request, index in batch.rows()
  ]
  wanted = [
    (request.problem_id, request.first_sample_index + j)
    for request in requests
    for j in range(request.num_samples)
  ]
  assert sorted(seen) == sorted(wanted)
  assert len({(batch.num_groups, batch.group_size) for batch in batches}) <= 1
  for batch in batches:
    assert batch.num_groups % shards == 0
    assert batch.num_groups * batch.group_size <= max_rows
    rows = [row for row, _, _ in batch.rows()]
    assert len(set(rows)) == len(rows)
    arrays = batch.row_arrays()
    for row, request, index in batch.rows():
      assert row // batch.group_size < len(batch.groups)
      assert arrays.sample_indices_B[row] == index
      assert arrays.prompt_lengths_B[row] == len(request.prompt_ids)
      prompt = batch.prompt_array()[row // batch.group_size]
      assert (prompt != 0).sum() == len(request.prompt_ids)
    filled = set(rows)
    for row in range(batch.num_groups * batch.group_size):
      assert (arrays.max_new_tokens_B[row] > 0) == (row in filled)


def test_samples_of_one_prompt_share_its_prefill():
  (batch, *_) = plan_batches(requests_of([(30, 16, 0)] * 64), max_rows=256, shards=1)
  assert (batch.num_groups, batch.group_size) == (16, 16)
  (batch, *_) = plan_batches(requests_of([(30, 100, 0)] * 9), max_rows=64, shards=1)
  assert (batch.num_groups, batch.group_size) == (1, 50)
  (batch, *_) = plan_batches(requests_of([(30, 100, 0)] * 9), max_rows=256, shards=1)
  assert (batch.num_groups, batch.group_size) == (2, 100)


def test_one_leftover_request_does_not_stretch_or_shrink_the_groups():
  shapes = [(30, 100, 0)] * 50 + [(30, 3, 97)]
  (batch, *_) = plan_batches(requests_of(shapes), max_rows=256, shards=1)
  assert batch.group_size == 100


def test_few_requests_run_in_a_small_batch():
  (batch,) = plan_batches(requests_of([(30, 1, 0)]), max_rows=256, shards=1)
  assert (batch.num_groups, batch.group_size) == (1, 1)
  (batch,) = plan_batches(requests_of([(30, 2, 0)] * 3), max_rows=256, shards=2)
  assert (batch.num_groups, batch.group_size) == (4, 2)


def test_shorter_prompts_get_a_bucket_of_their_own_when_they_are_many():
  few = requests_of([(100, 1, 0)] * 4 + [(20, 1, 0)] * 12)
  batches = plan_batches(few, max_rows=4, shards=1)
  assert [batch.prompt_bucket for batch in batches] == [128] * 4
  many = requests_of([(100, 1, 0)] * 4 + [(20, 1, 0)] * 32)
  batches = plan_batches(many, max_rows=4, shards=1)
  assert [batch.prompt_bucket for batch in batches] == [128] + [32] * 8


def test_buckets():
  assert [prompt_bucket(n) for n in (1, 32, 33, 64, 65, 1000)] == [
    *(32, 32, 64, 64, 128),
    1024,
  ]
  for max_new_tokens in (1, 15, 16, 17, 31, 64, 100, 128, 1000):
    buckets = place_buckets(max_new_tokens)
    assert buckets == sorted(set(buckets)) and len(buckets) <= 4
    assert max_new_tokens <= buckets[-1] < max_new_tokens + 16


def test_problem_hashes_are_the_same_everywhere():
  # A change of these numbers changes every row that was ever sampled.
  assert hash_problem_id('gsm8k-test-17').tolist() == [2676489573, 3056417014]
