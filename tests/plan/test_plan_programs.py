"""What the TPU compiler makes of the train step, read from its programs, for a slice that is not here; skipped without libtpu."""

import functools
import json
import math

import pytest

from tuning.plan import assigned, compile, hlo, topology

pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install libtpu")

WIDTH, HIDDEN, VOCABULARY, LENGTH, RANK, DEVICES = 512, 1536, 32_000, 1024, 16, 8
ON_CHIP = 128 * 2**20  # bytes of a v5e's vector memory
LLAMA = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
RUNS = {
    "lora": dict(method=dict(name="lora", rank=RANK)),
    "full": dict(method=dict(name="full")),
    "qlora": dict(method=dict(name="lora", rank=RANK), quantise="nf4"),
    "tensor": dict(method=dict(name="lora", rank=RANK), mesh=dict(data=1, fsdp=-1, tensor=2)),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """(name of a run, layers) -> its step as the compiler has it."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def made(name, layers=8):
        path = folder / f"{layers}"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": layers}))
        run = RUNS[name]
        mesh = run.get("mesh", dict(data=1, fsdp=-1))
        config = {
            "model": dict(path=str(path), dtype="bfloat16", remat="full", quantise=run.get("quantise", "")), "method": run["method"],
            "mesh": mesh, "data": dict(train=dict(length=LENGTH)), "train": dict(batch_size=DEVICES // mesh.get("tensor", 1)),
        }  # fmt: skip
        return assigned.assigned(config, topology.parse("v5e:2x4"))

    return made


@pytest.mark.parametrize("name", RUNS)
def test_logits_of_all_tokens_never_exist(program, name):
    whole = LENGTH * VOCABULARY // RUNS[name].get("mesh", {}).get("tensor", 1)
    arrays = [array for lines in hlo.Program(program(name).text).computations.values() for line in lines for array in line.arrays]
    assert max(math.prod(array.shape) for array in arrays if VOCABULARY in array.shape or VOCABULARY // 2 in array.shape) < whole


def kernel_gradients(text):
    """Products of the layers' backward pass that add up over all tokens, and have no side as short as an adapter's."""
    lines = [line for lines in hlo.Program(text).computations.values() for line in lines if line.op in ("dot", "convolution")]
    backward = [line for line in lines if "transpose(jvp())/while" in line.source and "rematted" not in line.source]
    return [line for line in backward if line.arrays and not {LENGTH, RANK} & set(line.arrays[0].shape)]


def test_frozen_kernels_have_no_gradient(program):
    assert kernel_gradients(program("full").text)  # those that learn have one
    for name in ("lora", "qlora", "tensor"):
        assert not kernel_gradients(program(name).text)


@pytest.mark.parametrize("name", RUNS)
def test_whole_kernels_are_gathered_inside_the_loop_over_layers_alone(program, name):
    found = hlo.Program(program(name).text).collectives()
    gathered = [one for one in found if one.kind == "all-gather" and one.nbytes >= WIDTH * WIDTH]
    outside = [one for one in gathered if not one.in_loop]
    assert any(one.in_loop and one.times == 8 for one in gathered)
    assert all(any(VOCABULARY in a.shape or VOCABULARY // 2 in a.shape for a in one.arrays) for one in outside)  # embedding and head


def test_a_program_does_not_grow_with_the_number_of_layers(program):
    sizes = [sum(map(len, hlo.Program(program("lora", layers).text).computations.values())) for layers in (8, 32, 80)]
    assert max(sizes) <= 1.1 * min(sizes)  # ten times the layers


def test_the_memory_is_that_of_the_finished_program(program):
    """Ended early, the compiler has said what it says at the end; jax leaves out gaps between buffers, and counts what lies on the chip."""
    config = {
        "model": dict(path="openai-community/gpt2", dtype="bfloat16", remat="full"), "method": dict(name="partial", parts=("biases",)),
        "mesh": dict(data=1, fsdp=-1), "data": dict(train=dict(length=256)), "train": dict(batch_size=4),
    }  # fmt: skip
    where = topology.parse("v5e:2x2")
    early = assigned.assigned(config, where)
    from tuning import build

    late = compile.compile(build.parts(config, sketch=where.targets()))
    assert early.collectives == late.collectives
    assert 0.95 * early.hbm_bytes <= late.hbm_bytes <= early.hbm_bytes + ON_CHIP
