"""Random lives of an engine: whatever happens, blocks add up, nobody shares what is written, everyone ends once."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ridgewalk.engine.core import EngineCore
from ridgewalk.engine.request import FinishReason, Request
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.scheduler_config import AdmissionName, SchedulerConfig
from ridgewalk.engine.step_result import StepResult
from tests.engine.fake_ranks import FakeExecutor, next_token


def expected_output(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class EngineLife(RuleBasedStateMachine):
    """Arrivals, steps and aborts in any order, over every kind of scheduler configuration."""

    @initialize(
        num_blocks=st.integers(6, 14),
        block_size=st.integers(1, 4),
        budget=st.integers(1, 12),
        max_num_seqs=st.integers(1, 6),
        steps_in_flight=st.integers(1, 3),
        schedule_ahead=st.booleans(),
        num_stages=st.integers(1, 3),
        num_groups=st.integers(1, 3),
        caching=st.booleans(),
        swap=st.sampled_from([0, 1, 3, 9]),
        admission=st.sampled_from(["prompt_only", "predictive"]),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        budget: int,
        max_num_seqs: int,
        steps_in_flight: int,
        schedule_ahead: bool,
        num_stages: int,
        num_groups: int,
        caching: bool,
        swap: int,
        admission: AdmissionName,
    ) -> None:
        config = SchedulerConfig(
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=num_blocks * block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_steps_in_flight=steps_in_flight,
            schedule_ahead=schedule_ahead and num_stages == 1,
            num_groups=num_groups,
            enable_prefix_caching=caching,
            num_swap_blocks=swap if caching else 0,
            admission=admission,
        )
        self.now = 0.0
        self.executor = FakeExecutor(block_size, num_groups, num_stages=num_stages)
        self.core = EngineCore(config, self.executor, lambda: self.now)
        self.requests: list[Request] = []
        self.ends: Counter[int] = Counter()

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=8),  # two tokens: prefixes are shared often
        max_tokens=st.integers(1, 12),
        stops=st.booleans(),
    )
    def arrive(self, prompt: list[int], max_tokens: int, stops: bool) -> None:
        limit = self.core.scheduler.config.max_model_len
        max_tokens = min(max_tokens, limit - len(prompt))
        if max_tokens >= 1:
            sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=tuple(range(150)) if stops else ())
            self.requests.append(self.core.add(f"r{len(self.requests)}", 0, prompt, sampling))

    @rule()
    def step(self) -> None:
        self.now += 1
        self.record(self.core.pump())

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        if self.core.finish(request, FinishReason.ABORT):
            self.ends[request.seq_id] += 1

    def record(self, results: list[StepResult]) -> None:
        for result in results:
            for request in result.ended:
                self.ends[request.seq_id] += 1

    @invariant()
    def blocks_add_up(self) -> None:
        for group in self.core.scheduler.groups:
            group.kv.pool.check_integrity()
            group.kv.swap.check_integrity()
            waiting = {each.seq_id for each in self.core.scheduler.waiting if each.num_preemptions}
            assert group.kv.swap._expected_by.keys() <= waiting
            pool = group.kv.pool
            assert {pool._hash_of[block] for block in pool._awaited} <= group.kv.swap.expected.keys()
            held = Counter(block for request in group.running for block in request.block_ids)
            writable = Counter(
                block
                for request in group.running
                for block in request.block_ids[request.num_computed_tokens // group.kv.block_size :]
            )
            assert set(held) <= set(range(group.kv.pool.num_blocks))
            assert all(count == 1 for count in writable.values()), "a block that is still written has two owners"

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for _ in range(5000):
            if not self.core.has_work:
                break
            self.step()
        assert not self.core.has_work, "the engine does not come to rest"
        for request in self.requests:
            assert self.ends[request.seq_id] == 1
            if request.finish_reason is FinishReason.LENGTH:
                prompt = request.token_ids[: request.num_prompt_tokens]
                assert request.output_token_ids == expected_output(prompt, request.sampling.max_tokens)
        for group in self.core.scheduler.groups:
            assert group.kv.pool.num_used == 0
            assert not group.kv.swap.expected
            assert not group.kv.pool._awaited
            group.kv.pool.check_integrity()


EngineLife.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestEngineLife = EngineLife.TestCase


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=20), min_size=1, max_size=12),
    num_blocks=st.integers(12, 40),
    budget=st.integers(1, 64),
    admission=st.sampled_from(["prompt_only", "predictive"]),
)
def test_output_does_not_depend_on_batching_or_preemption(
    prompts: list[list[int]], num_blocks: int, budget: int, admission: AdmissionName
) -> None:
    config = SchedulerConfig(
        num_blocks, block_size=4, max_model_len=44, max_num_batched_tokens=budget, admission=admission
    )
    core = EngineCore(config, FakeExecutor(4), lambda: 0.0)
    requests = [core.add(str(i), 0, prompt, SamplingParams(max_tokens=20)) for i, prompt in enumerate(prompts)]
    while core.has_work:
        core.pump()
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.output_token_ids == expected_output(prompt, 20)
