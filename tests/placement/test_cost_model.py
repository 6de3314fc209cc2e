"""Times of steps, checked against what can be worked out on paper."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgewalk.placement.collective_cost import all_reduce_s, all_to_all_s
from ridgewalk.placement.cost_model import CostModel, GroupLoad, StepTime, greatest_of_normals
from ridgewalk.placement.data_files import shipped_path
from ridgewalk.placement.hardware import HardwareSpec, Link, find_hardware
from ridgewalk.placement.measured_curve import MeasuredCurve
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec

ALONE = Mesh()


def shipped(name: str) -> ModelSpec:
    path = shipped_path("models", name)
    assert path is not None
    return ModelSpec.from_config(json.loads(path.read_text()))


def ideal(text: str = "8xh200") -> HardwareSpec:
    """Hardware that reaches its peaks and has no overheads."""
    names = ("bandwidth_efficiency", "flops_efficiency", "link_efficiency")
    overheads = (
        "stage_overhead_s", "ranks_overhead_s", "layer_overhead_s", "sparse_layer_overhead_s", "step_overhead_s",
        "sequence_overhead_s", "expert_fill",
    )  # fmt: skip
    return msgspec.structs.replace(find_hardware(text), **dict.fromkeys(names, 1.0), **dict.fromkeys(overheads, 0.0))


def decoding(sequences: float, context: float) -> GroupLoad:
    return GroupLoad(sequences, sequences, sequences * context, sequences * context)


def test_one_sequence_reads_the_weights_and_its_context_once() -> None:
    spec = shipped("qwen2.5-32b")
    (time,) = CostModel(spec, Mesh(), ideal()).stage_times([decoding(1, 1000)])
    read = 2 * (spec.num_parameters - spec.vocab_size * spec.hidden_size)  # one row of the embedding is looked up
    assert time.weights == pytest.approx(read / 4.8e12, rel=1e-3)
    assert time.attention == pytest.approx(262_144 * 1000 / 4.8e12)
    assert time.products == time.all_reduce == time.send == time.dispatch_combine == 0


def test_a_long_prompt_takes_the_time_of_its_arithmetic() -> None:
    spec = shipped("llama-3.1-8b")
    (time,) = CostModel(spec, Mesh(), ideal()).stage_times([GroupLoad(8192, 1, 8192, 8192 * 4096.5)])
    head = 2 * spec.vocab_size * spec.hidden_size
    assert time.products == pytest.approx((8192 * (spec.flops_per_token() - head) + head) / 989e12, rel=1e-6)
    assert time.weights == 0


def test_ranks_share_weights_and_kv_and_pay_two_all_reduces_a_layer() -> None:
    spec, hardware = shipped("llama-3.1-70b"), ideal()
    (one,) = CostModel(spec, Mesh(), hardware).stage_times([decoding(8, 4000)])
    (eight,) = CostModel(spec, Mesh(tp=8), hardware).stage_times([decoding(8, 4000)])
    assert eight.weights == pytest.approx(one.weights / 8, rel=1e-2)
    assert eight.attention == pytest.approx(one.attention / 8)
    assert eight.all_reduce == pytest.approx(160 * all_reduce_s(hardware, 8, 8 * 8192 * 2))


def test_an_all_reduce_sends_its_bytes_once_through_the_switch_and_twice_round_a_ring() -> None:
    nodes = ideal("2x8xh200")
    assert all_reduce_s(nodes, 8, 450e9) == pytest.approx(1 + nodes.within_node.latency_s)
    assert all_reduce_s(nodes, 16, 50e9) == pytest.approx(2 * 15 / 16 + nodes.between_nodes.latency_s)


def test_stages_share_out_the_layers_and_only_the_last_has_the_head() -> None:
    spec, hardware = shipped("qwen2.5-14b"), ideal()
    (whole,) = CostModel(spec, Mesh(), hardware).stage_times([decoding(4, 1000)])
    stages = CostModel(spec, Mesh(pp=4), hardware).stage_times([decoding(4, 1000)])
    assert sum(stage.weights for stage in stages) == pytest.approx(whole.weights)
    assert sum(stage.attention for stage in stages) == pytest.approx(whole.attention)
    assert [stage.send > 0 for stage in stages] == [True, True, True, False]


def test_a_latent_is_repeated_by_tensor_parallelism_and_divided_by_stages_and_attention_groups() -> None:
    spec, hardware = shipped("deepseek-r1"), ideal()

    def attention(mesh: Mesh, groups: int = 1) -> float:
        loads = [decoding(8 / groups, 4000)] * groups
        return CostModel(spec, mesh, hardware).stage_times(loads)[0].attention

    assert attention(Mesh(tp=8)) == pytest.approx(61 * 576 * 2 * 8 * 4000 / 4.8e12)
    assert attention(Mesh(tp=4, pp=2)) == pytest.approx(attention(Mesh(tp=8)) / 2, rel=0.05)
    assert attention(Mesh(dp=8, expert_parallel=True), groups=8) < attention(Mesh(tp=8)) / 2


def test_more_tokens_touch_more_experts_until_all_are_read() -> None:
    model = CostModel(shipped("mixtral-8x7b"), Mesh(tp=2), ideal())
    few, more, all_of_them = (model.stage_times([decoding(count, 100)])[0].weights for count in (1, 4, 64))
    assert few < more < all_of_them
    experts = 32 * 8 * 3 * 4096 * 14336 * 2 / 2 / 4.8e12
    assert all_of_them - few == pytest.approx(experts * 6 / 8, rel=0.01)  # one token of two choices touches a quarter


def test_experts_of_all_attention_groups_pay_dispatch_and_combine() -> None:
    spec = shipped("qwen3-235b-a22b")
    (time,) = CostModel(spec, Mesh(dp=8, expert_parallel=True), ideal()).stage_times([decoding(32, 2000)] * 8)
    sent = 32 * 4096 * 2 * 8 * 7 / 8
    assert time.dispatch_combine == pytest.approx(2 * 94 * (9.5e-6 + sent / 450e9))
    assert time.all_reduce == 0


def test_an_all_reduce_takes_what_was_measured_on_eight_h100() -> None:
    """By https://github.com/vllm-project/vllm/pull/42324 (multimem)."""
    hardware = find_hardware("8xh100")
    for mebibytes, measured_us in ((0.5, 11), (1, 14), (2, 18), (4, 27), (8, 46), (16, 87), (32, 165), (64, 320)):
        assert all_reduce_s(hardware, 8, mebibytes * 2**20) * 1e6 == pytest.approx(measured_us, rel=0.08)


def test_narrow_slices_of_experts_are_read_at_less_than_the_bandwidth() -> None:
    spec = shipped("deepseek-r1")
    plain, filling = ideal(), msgspec.structs.replace(ideal(), expert_fill=384.0)

    def stretch(mesh: Mesh) -> float:
        groups = [decoding(64, 1000)] * mesh.dp
        slow, fast = (CostModel(spec, mesh, each).stage_times(groups)[0].weights for each in (filling, plain))
        return slow / fast

    assert 1 < stretch(Mesh(dp=8, expert_parallel=True)) < 1.15
    assert stretch(Mesh(tp=2, pp=4)) < stretch(Mesh(tp=4, pp=2)) < stretch(Mesh(tp=8))
    assert stretch(Mesh(tp=8)) == pytest.approx(1 + 128 * (2 / 7168 + 8 / 2048), rel=0.02)


def test_ranks_of_one_process_tell_each_other_nothing() -> None:
    hardware = msgspec.structs.replace(ideal(), ranks_overhead_s=1.0)
    times = [CostModel(shipped("qwen2.5-14b"), mesh, hardware) for mesh in (Mesh(), Mesh(tp=2), Mesh(pp=2))]
    assert [[stage.ranks for stage in cost.stage_times([decoding(1, 9)])] for cost in times] == [[0], [1], [1, 1]]


def test_the_expected_maximum_of_normals_is_as_published() -> None:
    # Harter 1961, expected values of normal order statistics.
    published = {1: 0.0, 2: 0.56419, 4: 1.02938, 8: 1.42360, 16: 1.76599}
    assert {count: greatest_of_normals(count) for count in published} == pytest.approx(published, abs=0.03)


def test_ranks_in_lockstep_wait_for_the_last_by_a_share_of_what_they_compute() -> None:
    spec = shipped("mixtral-8x7b")
    hardware = msgspec.structs.replace(ideal(), straggle=0.1, layer_overhead_s=1e-5)
    load = [decoding(8, 1000)]
    for mesh, meeting in ((Mesh(), 1), (Mesh(pp=2), 1), (Mesh(tp=8), 8), (Mesh(tp=2), 2)):
        for time in CostModel(spec, mesh, hardware).stage_times(load):
            computed = time.weights + time.products + time.attention + time.launch
            expected = 0.1 * greatest_of_normals(meeting) / greatest_of_normals(8) * computed
            assert time.straggle == pytest.approx(expected)
            assert time.total == pytest.approx(sum(time))
    (experts,) = CostModel(spec, Mesh(dp=8, expert_parallel=True), hardware).stage_times(load * 8)
    assert experts.straggle == pytest.approx(
        0.1 * (experts.weights + experts.products + experts.attention + experts.launch)
    )
    alone = msgspec.structs.replace(hardware, devices_per_node=1, within_node=None)
    (single,) = CostModel(spec, Mesh(), alone).stage_times(load)
    assert single.straggle == 0


def test_the_busiest_rank_has_more_experts_of_few_tokens_and_no_more_of_many() -> None:
    spec = shipped("mixtral-8x7b")  # 8 experts, 2 of them for a token
    moe = spec.moe
    assert moe is not None

    def read(mesh: Mesh, tokens: int) -> float:
        (time,) = CostModel(spec, mesh, ideal()).stage_times([decoding(tokens / mesh.dp, 1)] * mesh.dp)
        (none,) = CostModel(spec, mesh, ideal()).stage_times([GroupLoad(1e-12, 1e-12, 0, 0)] * mesh.dp)
        return time.weights - none.weights

    one, spread = read(Mesh(), 2), read(Mesh(dp=2, expert_parallel=True), 2)
    untouched = 0.75**2
    mean = 4 * (1 - untouched)
    busiest = mean + greatest_of_normals(2) * (mean * untouched) ** 0.5
    assert spread / one == pytest.approx(busiest / (2 * mean), rel=1e-3)
    assert read(Mesh(dp=2, expert_parallel=True), 64) == pytest.approx(read(Mesh(), 64) / 2, rel=1e-3)


@pytest.mark.parametrize("constant", ["layer_overhead_s", "stage_overhead_s", "value_overhead_s"])
def test_every_overhead_is_in_the_total(constant: str) -> None:
    hardware, load = ideal(), [decoding(8, 1000)]
    slower = msgspec.structs.replace(hardware, **{constant: 1.0})
    before, after = (
        CostModel(shipped("qwen2.5-14b"), Mesh(pp=2), each).stage_times(load) for each in (hardware, slower)
    )
    assert all(late.total > early.total + 0.9 for early, late in zip(before, after, strict=True))


def test_products_of_few_rows_take_what_was_measured_for_so_many() -> None:
    spec = shipped("llama-3.1-8b")
    slow = msgspec.structs.replace(ideal(), product_shares={"bfloat16": {1: 0.001, 64: 0.5, 1024: 1.0}})
    times = [CostModel(spec, Mesh(), slow).stage_times([GroupLoad(rows, rows, 0, 0)])[0] for rows in (1, 1024, 544)]
    one, many, between = (time.weights + time.products for time in times)
    whole = CostModel(spec, Mesh(), ideal()).stage_times([GroupLoad(1024, 1024, 0, 0)])[0].products
    assert one == pytest.approx(whole / 1024 / 0.001)
    assert many == pytest.approx(whole)
    assert between == pytest.approx(whole / 1024 * (64 / 0.5 + 1024) / 2)


def test_of_measured_products_what_one_row_takes_is_reading() -> None:
    """Weights are read once; what more rows take beyond it is computing."""
    spec, shares = shipped("mixtral-8x7b"), {"bfloat16": {1: 1e-3, 64: 5e-2}}
    bandwidth = 989e12 * 1e-3  # bytes/s that one row reads: two FLOPs for each weight of two bytes
    measured = msgspec.structs.replace(
        ideal(), product_shares=shares, memory_bandwidth=bandwidth, expert_flops={"bfloat16": {1: 989e9, 64: 49e12}}
    )
    one, many = (CostModel(spec, ALONE, measured).stage_times([GroupLoad(n, n, 0, 0)])[0] for n in (1, 512))
    read = (spec.num_parameters - _tables(spec) / 2) * 2 / bandwidth
    assert one.products == pytest.approx(0, abs=1e-3 * one.weights)
    assert many.weights == pytest.approx(read, rel=1e-2)
    assert many.weights > one.weights
    assert many.products > 0


def test_rows_of_an_expert_are_those_that_meet_there() -> None:
    spec = shipped("mixtral-8x7b")
    shares = {"bfloat16": {1: 0.01, 4096: 0.01}}  # a hundred times as slow whatever the rows, so that all is computing
    slow = msgspec.structs.replace(ideal(), product_shares=shares)
    assert spec.moe is not None
    times = [CostModel(spec, Mesh(), each).stage_times([GroupLoad(512, 0, 0, 0)])[0] for each in (ideal(), slow)]
    assert times[1].weights + times[1].products == pytest.approx(
        100 * 512 * 2 * (spec.active_parameters - _tables(spec)) / 989e12, rel=1e-2
    )


def test_experts_take_what_was_measured_of_experts_and_of_their_slices() -> None:
    spec, measured = shipped("mixtral-8x7b"), {"bfloat16": {1: 2e9, 4: 8e9, 64: 16e9}}
    hardware = msgspec.structs.replace(ideal(), expert_flops=measured, expert_fill=3000.0, straggle=0.0)
    expert = 6 * 4096 * 14336  # FLOPs of a row

    def slower(tokens: int, mesh: Mesh = ALONE) -> float:
        """Products and reading of a layer beyond what they take without routed experts. Seconds."""
        load = [GroupLoad(tokens, 0, 0, 0)] * mesh.dp
        (time,) = CostModel(spec, mesh, hardware).stage_times(load)
        nothing = msgspec.structs.replace(hardware, expert_flops={"bfloat16": {1: 1e30}})
        (rest,) = CostModel(spec, mesh, nothing).stage_times(load)
        return (time.weights + time.products - rest.weights - rest.products) / 32

    def stretch(slices: int) -> float:
        return 1 + 1000 * (2 / 4096 + slices / 14336)

    assert slower(256) == pytest.approx(8 * stretch(1) * expert * 64 / 16e9, rel=1e-3)  # 64 rows for each of 8
    assert slower(16) == pytest.approx(8 * stretch(1) * expert * 4 / 8e9, rel=0.02)
    assert slower(1) == pytest.approx(2 * stretch(1) * expert / 2e9, rel=1e-3)  # two are read
    assert slower(256, Mesh(tp=4)) == pytest.approx(8 * stretch(4) * expert / 4 * 64 / 16e9, rel=1e-3)


def _tables(spec: ModelSpec) -> int:
    return 2 * spec.vocab_size * spec.hidden_size


def test_reading_kv_slows_with_the_queries_that_share_it_where_that_was_measured() -> None:
    spec = shipped("llama-3.1-8b")  # 32 heads, 8 KV heads
    measured = msgspec.structs.replace(ideal(), attention_bandwidth={"bfloat16": {2: 4e9, 8: 1e9}})
    (time,) = CostModel(spec, Mesh(), measured).stage_times([decoding(1, 1000)])
    per_byte = (1 / 4e9 * 4 + 1 / 1e9 * 2) / 6
    assert time.attention == pytest.approx(131_072 * 1000 * per_byte)


def test_an_all_to_all_may_have_a_link_of_its_own() -> None:
    link = Link(latency_s=1e-3, bandwidth=1e9)
    hardware = msgspec.structs.replace(ideal(), all_to_all=link)
    assert all_to_all_s(hardware, 4, 4e9) == pytest.approx(1e-3 + 3)
    assert all_to_all_s(ideal(), 4, 4e9) == pytest.approx(ideal().within_node.latency_s + 3 / 450)


@given(st.dictionaries(st.integers(1, 512), st.floats(1e-6, 1e3), min_size=1), st.floats(0.1, 2000))
def test_a_curve_is_what_was_measured_and_stays_between(measured: dict[int, float], size: float) -> None:
    curve = MeasuredCurve.of(measured)
    assert all(curve.at(known) == pytest.approx(value) for known, value in measured.items())
    if size <= max(measured):
        assert min(measured.values()) * 0.999 <= curve.at(size) <= max(measured.values()) * 1.001
    else:
        assert curve.at(size) == pytest.approx(measured[max(measured)] * size / max(measured))


def test_the_host_pays_for_each_step_and_each_sequence() -> None:
    hardware = msgspec.structs.replace(ideal(), step_overhead_s=1e-3, sequence_overhead_s=1e-5)
    assert CostModel(shipped("qwen2.5-14b"), Mesh(), hardware).host_s(100) == pytest.approx(2e-3)


def test_total_is_the_sum_of_the_terms() -> None:
    assert StepTime(*(float(2**at) for at, _ in enumerate(StepTime._fields))).total == 2 ** len(StepTime._fields) - 1
