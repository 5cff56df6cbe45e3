"""The search for a prompt: candidates by the loss of the answers after them."""

import json

import pytest

import tuning
from tests import runs
from tuning.__main__ import main
from tuning.api import evaluate, propose_prompts, rank_prompts

PROMPTS = ["{prompt}", "say: {prompt}", "{prompt} {prompt} "]


def asked(home, prompt="prompt"):
    shown = {"path": str(home / "eval.jsonl"), "length": 48, "format": {"name": "pairs", "prompt": prompt, "completion": "completion"}}
    return {"data": {"eval": shown}}


def test_the_best_prompt_comes_first_with_the_loss_that_evaluation_finds(home):
    model = tuning.load(home / "model")
    ranked = rank_prompts(model, asked(home), PROMPTS)
    assert sorted(prompt for prompt, _ in ranked) == sorted(PROMPTS)
    losses = [measures["loss"] for _, measures in ranked]
    assert losses == sorted(losses) and len(set(losses)) == 3
    for prompt, measures in ranked:
        assert evaluate(model, asked(home, prompt))["loss"] == pytest.approx(measures["loss"], rel=1e-6)


def test_the_verb_prints_a_line_for_each(home, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("say: {prompt}\\n\n")
    flags = [f"--config.data.eval.{key}={value}" for key, value in runs_of(home).items()]
    assert main(["prompts", f"--model={home / 'model'}", "--prompt={prompt}", f"--file={tmp_path / 'prompts.txt'}", *flags]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["prompt"] for line in lines} == {"{prompt}", "say: {prompt}\n"} and lines[0]["loss"] <= lines[1]["loss"]


def runs_of(home):
    return {"path": home / "eval.jsonl", "length": 48, "format.name": "pairs", "format.completion": "completion"}


def test_proposals_must_name_the_same_columns():
    class Model:
        said = ("{prompt}?", "nothing", "{prompt}!", "{prompt}?", "{prompt}")

        def generate(self, ask, seed, **settings):
            return [self.said[seed]]

    assert propose_prompts(Model(), "a prompt:", 5, ["{prompt}"]) == ["{prompt}?", "{prompt}!"]
    with pytest.raises(ValueError, match="None of 1 proposals"):
        propose_prompts(Model(), "a prompt:", 1, ["{question}"])


@pytest.mark.parametrize(("prompts", "message"), [([], "There are 0"), (["a {prompt}"] * 2, "1 of them different")])
def test_candidates_are_some_and_differ(home, prompts, message):
    with pytest.raises(ValueError, match=message):
        rank_prompts(tuning.load(home / "model"), asked(home), prompts)


def test_other_formats_have_no_answers_after_a_prompt(home):
    config = runs.config(home, data__eval__format={"name": "text"})
    with pytest.raises(ValueError, match="must be 'pairs'"):
        rank_prompts(tuning.load(home / "model"), config, PROMPTS)
