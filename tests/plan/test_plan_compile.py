"""Compiling ahead of time: what the compiler says is read, a refusal is an answer, and a stored step is the step."""

import json

import jax
import pytest

import tuning
from tests import runs
from tuning import build
from tuning.__main__ import main
from tuning.plan import compile, hlo, stored, topology
from tuning.training import writer

LOOP = """HloModule m, is_scheduled=true

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %all-gather.1 = f32[16,8]{1,0:T(8,128)} all-gather(%x), channel_id=7, dimensions={0}, metadata={op_name="step/while/body/dot"}
  %all-gather.2 = f32[16,8]{1,0:T(8,128)} all-gather(%x), channel_id=7, dimensions={0}
  %small = bf16[2]{0:T(256)S(1)} fusion(%x), kind=kLoop, calls=%inside
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %x)
}

%inside (a: f32[4,8]) -> bf16[2] {
  %big = f32[4096,4096]{1,0} broadcast(%a)
  ROOT %r = bf16[2]{0} slice(%big)
}

%cond (p: (s32[], f32[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %w = (s32[], f32[4,8]{1,0}) while(%init), condition=%cond, body=%body
  %all-reduce-start.1 = f32[4,8]{1,0} all-reduce-start(%a), channel_id=9, to_apply=%add
  ROOT %y = f32[64,8]{1,0} custom-call(%a), metadata={op_name="step/out"}
}
"""


def test_a_program_s_exchanges_count_once_for_each_turn_of_their_loop():
    found = hlo.Program(LOOP).collectives()
    assert [(c.kind, c.nbytes, c.times, c.in_loop) for c in found] == [("all-gather", 512, 12, True), ("all-reduce", 128, 1, False)]
    assert hlo.totals(found) == {"all-gather": {"count": 12, "bytes": 6144}, "all-reduce": {"count": 1, "bytes": 128}}


def test_what_lies_inside_a_fusion_or_on_the_chip_is_no_buffer():
    assert hlo.Program(LOOP).largest(3) == [(2048, "f32[64,8]", "step/out"), (512, "f32[16,8]", "step/while/body/dot"),
                                           (128, "f32[4,8]", "all-reduce-start.1")]  # fmt: skip


def test_a_real_program_s_loops_turn_as_often_as_they_were_written():
    twelve = jax.jit(lambda x: jax.lax.fori_loop(0, 12, lambda i, x: x @ x, x))
    program = hlo.Program(twelve.lower(jax.ShapeDtypeStruct((64, 64), "float32")).compile().as_text())
    assert max(program.times[name] for name in program.loops) == 12


@pytest.mark.parametrize(
    "message, needed, available",
    [
        ("Ran out of memory on HBM, the total memory required for HLO temporaries (90.19G) exceeds available HBM (15.75G).", 90.19, 15.75),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 20.33G of 15.75G hbm. Exceeded hbm capacity by 4.58G.", 20.33, 15.75),
    ],
)
def test_a_refusal_says_what_was_needed(message, needed, available):
    found = compile.refused(message, 1.0)
    assert (found.needed_bytes, found.available_bytes) == (int(needed * 2**30), int(available * 2**30))
    assert compile.refused("RESOURCE_EXHAUSTED: out of something", 1.0).needed_bytes is None


def test_a_plan_s_program_is_the_run_s(home):
    """The sketch of a run has the shapes and shardings of the run itself: one program serves both."""
    config = runs.config(home, mesh=dict(data=2, fsdp=2, tensor=2))
    real, sketch = build.parts(config), build.parts(config, sketch=jax.devices())
    assert compile.lower(real).as_text() == compile.lower(sketch).as_text()
    made = compile.compile(sketch)
    assert isinstance(made, compile.Compiled)
    assert made.peak_bytes == made.argument_bytes + made.output_bytes - made.alias_bytes + made.temporary_bytes > 0
    assert made.collectives["all-reduce"]["count"] > 0 and made.seconds > 0


def test_a_stored_step_trains_as_the_run_would_and_only_that_run(home, tmp_path):
    config = runs.config(home)
    parts = build.parts(config, sketch=jax.devices())
    made = compile.compile(parts)
    assert isinstance(made, compile.Compiled)
    stored.save(tmp_path / "step.bin", parts, made)
    tuning.train(config, tmp_path / "a")
    tuning.train(config, tmp_path / "b", compiled=tmp_path / "step.bin")
    lines = [writer.comparable(tmp_path / name / "metrics.jsonl") for name in "ab"]
    assert lines[0] == lines[1] and len(lines[0]) > 1
    other = runs.config(home)
    other["optimizer"]["learning_rate"] *= 2
    with pytest.raises(ValueError, match=r"the step of another run: optimizer\.learning_rate"):
        tuning.train(other, tmp_path / "c", compiled=tmp_path / "step.bin")
    with pytest.raises(ValueError, match="there is no such file"):
        tuning.train(config, tmp_path / "d", compiled=tmp_path / "none.bin")


def test_the_command_plans_as_json_without_data_or_weights(tmp_path, capsys, monkeypatch):
    from tuning.cli import plan

    monkeypatch.setattr(plan, "begin", lambda name: topology.parse(name))  # jax has begun already in this process
    section = "dict(model=dict(path='meta-llama/Llama-3.1-8B'))"
    (tmp_path / "c.py").write_text(f"import ml_collections\n\ndef get_config():\n    return ml_collections.ConfigDict({section})\n")
    asked = ["plan", f"--config={tmp_path / 'c.py'}", "--config.model.dtype=bfloat16", "--config.train.batch_size=1", "--json"]
    assert main([*asked, "--topology=h100:1"]) == 0
    made = json.loads(capsys.readouterr().out)
    added = 41_943_040  # rank 16
    assert made["parameters"] == {"total": 8_030_261_248 + added, "tuned": added, "matmul": 7_504_658_432 + added}
    assert made["fits"] is True and made["bytes_per_device"]["weights"] == 2 * 8_030_261_248
    used = made["bytes_per_device"]
    assert used["total"] == sum(size for name, size in used.items() if name not in ("total", "cache"))
    assert made["tokens_per_second"] > 1000 and "Automodel" in made["sources"]["tokens_per_second"]
    assert made["cost"] is None and made["sources"]["cost"] == "no price table was given"
    assert main([*asked, "--topology=rtx4090:1", "--config.method.name=full"]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False
