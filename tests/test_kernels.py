"""Where a device's time goes, from traces made by hand and by the profiler."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from amskv_jax.errors import AmskvError
from amskv_jax.reports.kernels import KINDS, kind_of, read_profile


def named(pid, process, threads):
    yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": process}}
    for tid, name in threads.items():
        yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}}


def ran(pid, tid, name, start, duration, **arguments):
    event = {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": start, "dur": duration}
    return {**event, "args": arguments} if arguments else event


def write(folder, events):
    below = folder / "plugins" / "profile" / "now"
    below.mkdir(parents=True)
    with gzip.open(below / "host.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": [*events, {}]}, file)
    return folder


def test_a_gpus_kernels_are_those_on_its_streams(tmp_path):
    gemm = {"hlo_op": "custom-call.7", "hlo_module": "jit___call"}
    profile = read_profile(
        write(
            tmp_path,
            [
                *named(1, "/device:GPU:0", {1: "Stream #13(Compute)", 2: "XLA Ops"}),
                *named(9, "/host:CPU", {1: "python"}),
                ran(1, 1, "nvjet_tst_128x256", 100, 30, **gemm),
                ran(1, 1, "nvjet_tst_128x256", 140, 20, **gemm),
                ran(1, 1, "loop_concatenate_fusion", 160, 5, hlo_op="loop_concatenate_fusion"),
                ran(1, 1, "conv_fprop", 180, 10, hlo_op="c", hlo_module="jit_decode_pixels"),
                ran(1, 2, "custom-call.7", 100, 60, **gemm),  # the same once more
                ran(9, 1, "Execute", 0, 900, hlo_op="custom-call.7"),
            ],
        )
    )
    first, *others = profile.kernels
    assert (first.name, first.operation, first.kind) == (
        "nvjet_tst_128x256",
        "custom-call.7",
        "products",
    )
    assert (first.launches, first.seconds) == (2, pytest.approx(50e-6))
    assert [kernel.kind for kernel in others] == ["decoder", "copies"]
    assert profile.span_seconds == pytest.approx(90e-6)
    assert profile.idle_seconds == pytest.approx(25e-6)
    kinds = profile.kinds()
    assert tuple(kinds) == KINDS
    assert kinds["products"] == pytest.approx(50e-6)
    assert sum(kinds.values()) == pytest.approx(65e-6)


def test_kernels_of_a_graph_count_whole_though_they_overlap(tmp_path):
    def graph(number):
        return {"hlo_op": f"command_buffer_{number}", "hlo_module": "jit_generate"}

    profile = read_profile(
        write(
            tmp_path,
            [
                *named(1, "/device:GPU:0", {1: "Stream #14(Compute)"}),
                ran(1, 1, "nvjet_tst", 100, 50, **graph(1)),
                ran(1, 1, "loop_concatenate_fusion", 110, 20, **graph(1)),
                ran(1, 1, "nvjet_tst", 160, 50, **graph(2)),
            ],
        )
    )
    assert [(kernel.name, kernel.launches) for kernel in profile.kernels] == [
        ("nvjet_tst", 2),
        ("loop_concatenate_fusion", 1),
    ]
    assert profile.kinds()["products"] == pytest.approx(100e-6)
    assert profile.kinds()["copies"] == pytest.approx(20e-6)
    assert profile.idle_seconds == pytest.approx(10e-6)


def test_what_runs_inside_counts_once(tmp_path):
    profile = read_profile(
        write(
            tmp_path,
            [
                *named(9, "/host:CPU", {1: "worker", 2: "other worker"}),
                ran(9, 1, "while.3", 0, 100, hlo_op="while.3"),
                ran(9, 1, "call.1", 10, 50, hlo_op="call.1"),
                ran(9, 1, "dot.5", 20, 30, hlo_op="dot.5"),
                ran(9, 1, "sort.2", 70, 20, hlo_op="sort.2"),
                ran(9, 2, "add_multiply_fusion", 0, 40, hlo_op="add_multiply_fusion"),
                ran(9, 2, "ThreadPool", 0, 400),
            ],
        )
    )
    microseconds = {kernel.name: 1e6 * kernel.seconds for kernel in profile.kernels}
    expected = {"while.3": 30, "call.1": 20, "dot.5": 30, "sort.2": 20, "add_multiply_fusion": 40}
    assert microseconds == pytest.approx(expected)
    assert profile.idle_seconds == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_tn_n", "products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop>", "products"),
        ("gemm_fusion_dot_12", "products"),
        ("void cublasLt::splitKreduce_kernel", "products"),
        ("implicit_convolve_sgemm", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("loop_convert_fusion", "elementwise"),
        ("loop_add_fusion_3", "elementwise"),
        ("input_reduce_fusion", "elementwise"),
        ("fusion.12", "elementwise"),
        ("broadcast_add_fusion", "elementwise"),
        ("wrapped_concatenate", "copies"),
        ("loop_dynamic_slice_fusion_4", "copies"),
        ("select_dynamic-update-slice_fusion", "copies"),
        ("MemcpyD2D", "copies"),
        ("copy.313", "copies"),
        ("void cub::DeviceRadixSortOnesweepKernel", "sorting"),
        ("TopKKernel", "sorting"),
        ("while.151", "other"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind
    assert kind_of(name, name, "jit_decode_pixels") == "decoder"


def test_the_profilers_own_trace(tmp_path):
    product = jax.jit(lambda x: jnp.sort(x @ x)).lower(jnp.ones((64, 64))).compile()
    with jax.profiler.trace(tmp_path):
        product(jnp.ones((64, 64))).block_until_ready()
    kinds = read_profile(tmp_path).kinds()
    assert kinds["products"] > 0
    assert kinds["sorting"] > 0


def test_what_is_no_trace(tmp_path):
    with pytest.raises(AmskvError, match=r"no trace of jax.profiler below"):
        read_profile(tmp_path)
    write(tmp_path, named(9, "/host:CPU", {}))
    with pytest.raises(AmskvError, match="no kernel of any device"):
        read_profile(tmp_path)
    file = next(tmp_path.glob("**/*.gz"))
    for damaged in (b"", b"no gzip", file.read_bytes()[:-9], gzip.compress(b"{}")):
        file.write_bytes(damaged)
        with pytest.raises(AmskvError, match="cannot read the trace"):
            read_profile(tmp_path)
