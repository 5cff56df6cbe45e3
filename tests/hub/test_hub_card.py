"""Model cards: what they tell, what they leave out, and that a user's text stays text."""

import dataclasses
import json
import re

import pytest
from huggingface_hub import metadata_load
from markdown_it import MarkdownIt

from tuning.hub import card
from tuning.hub.card import Data, Facts

CONFIG = {
    "model": {"name": "pretrained", "path": "owner/base-7b", "revision": "v1", "dtype": "bfloat16"},
    "method": {"name": "lora", "rank": 16, "dropout": 0.0, "targets": ["attn/q", "mlp/.*|x$"], "rank_stabilized": False},
    "objective": {"name": "next_token", "z_loss": 1e-08},
    "data": {
        "train": {"path": "/home/ann/secret/train.jsonl", "subset": None, "split": "train", "length": 256},
        "eval": {"path": "owner/questions", "subset": "hard", "split": "test[:5%]", "length": 256},
    },
    "optimizer": {"name": "adamw", "learning_rate": 0.0003, "b1": 0.9, "schedule": {"name": "cosine", "warmup_steps": 10}},
    "train": {"steps": 3, "batch_size": 8, "accumulate": 1},
    "seed": 12345,
}
PROVENANCE = {
    "data": {"train": "a" * 64, "eval": "0123456789abcdef"},
    "python": "3.11.7",
    "packages": {"jax": "0.10.2"},
    "devices": {"platform": "tpu", "kind": "TPU v5 lite", "count": 8, "processes": 2},
    "git": {"commit": "00862b4", "dirty": True},
}
METRICS = [
    {"step": 0, "eval/loss": 5.25, "eval/accuracy": 0.125},
    {"step": 1, "train/loss": 4.0, "train/tokens": 1000.0},
    {"step": 2, "train/loss": 3.0, "train/tokens": 900.0},
    {"step": 2, "eval/loss": 3.5, "eval/accuracy": 0.25, "time/eval_seconds": 1.0},
    {"step": 3, "train/loss": 2.0, "train/tokens": 800.0},
    {"step": 3, "eval/loss": None, "eval/accuracy": 0.5},
]


def of_run(step=2, **known):
    return card.from_run(CONFIG, PROVENANCE, METRICS, step, **{"adapter": True, "model_class": "LlamaForCausalLM", **known})


def front(text, tmp_path):
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    return metadata_load(tmp_path / "README.md")


def test_the_card_of_a_run_tells_what_its_files_tell(tmp_path):
    text = card.card(of_run(trainable=1000, parameters=8000))
    assert front(text, tmp_path) == {
        "base_model": "owner/base-7b",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["tuning", "lora"],
        "datasets": ["owner/questions"],
    }
    for line in (
        "- revision: v1",
        "- rank: 16",
        r"- targets: attn/q, mlp/.\*\|x\$",
        "- trainable parameters: 1,000 of 8,000 (12.5000%)",
        f"| train | train.jsonl |  | train | sha256 {'a' * 64} |",
        r"| eval | owner/questions | hard | test\[:5%\] | fingerprint 0123456789abcdef |",
        "- steps: 2 of 3",
        "- rows per step: 8",
        "- tokens trained on: 1,900",
        r"- objective: next\_token (z\_loss 1e-08)",
        r"- optimiser: adamw (b1 0.9, schedule cosine (warmup\_steps 10))",
        "- learning rate: 0.0003",
        "- seed: 12345",
        "- hardware: 8 × TPU v5 lite",
        "- dtype: bfloat16",
        "| measure | step 0 | step 2 |",
        "| loss | 5.25 | 3.5 |",
        "| accuracy | 0.125 | 0.25 |",
        "- jax: 0.10.2",
        "- commit: 00862b4 with uncommitted changes",
    ):
        assert line in text.splitlines(), line
    assert "eval_seconds" not in text and "3.11.7" in text


def test_a_figure_that_was_not_finite_is_not_a_number(tmp_path):
    assert "| loss | 5.25 | not finite |" in card.card(of_run(step=3)).splitlines()


@pytest.mark.parametrize("metrics", [METRICS[:1] + METRICS[2:], []])
def test_tokens_are_told_only_where_every_step_was_logged(metrics):
    assert card.from_run(CONFIG, PROVENANCE, metrics, 2, adapter=True).tokens is None


def test_counts_that_the_run_noted_are_told():
    noted = {"parameters": {"trainable": 10, "all": 40}, "counts": {"train": {"rows": 1234, "learned": 5678}}}
    text = card.card(card.from_run(CONFIG, PROVENANCE | noted, METRICS, 2, adapter=True))
    assert "- trainable parameters: 10 of 40 (25.0000%)" in text.splitlines()
    assert f"| train | train.jsonl |  | train | 1,234 | 5,678 | sha256 {'a' * 64} |" in text.splitlines()


def test_what_is_not_known_is_left_out(tmp_path):
    text = card.card(Facts(adapter=False))
    assert front(text, tmp_path) == {"library_name": "transformers", "tags": ["tuning"]}
    assert re.findall("^#+ .*", text, re.MULTILINE) == ["# A model", "## Use"] and "None" not in text
    only = card.card(card.from_run({}, {}, [], adapter=True))
    assert re.findall("^#+ .*", only, re.MULTILINE) == ["# A model", "## Use"] and "None" not in only
    unknown = card.card(of_run(step=None))
    assert "step 2" not in unknown and "| loss | 5.25 |" in unknown.splitlines() and "- steps" not in unknown


def test_a_real_config_and_provenance_have_the_keys_that_are_looked_for():
    from tuning import build
    from tuning.training import provenance

    config = build.resolve(
        {"model": {"path": "owner/base", "revision": "v1"}, "data": {"train": {"path": "x.jsonl"}, "eval": {"path": "y"}}}
    )
    facts = card.from_run(config, provenance.collect([], {"train": "a" * 64, "eval": "b" * 64}), METRICS, 2, adapter=True)
    unknown = {"model_class", "license", "trainable", "parameters", "embedding_rows"}
    assert {field.name for field in dataclasses.fields(facts) if getattr(facts, field.name) in (None, {})} <= unknown | {"commit"}
    assert set(facts.data) == {"train", "eval"} and facts.method["name"] == "lora" and "learning_rate" in facts.optimizer


LOCAL = ["/home/ann/models/base", "~/ann/base", "../ann/base/", "C:\\ann\\base", "file:///home/ann/base", "ann/more/base"]


@pytest.mark.parametrize("path", LOCAL)
def test_folders_are_never_told(path, tmp_path):
    facts = Facts(
        adapter=True, base=path, model_class="LlamaForCausalLM", data={"train": Data(path=[path, path]), "eval": Data(path=path)},
        method={"name": "lora", "start": path.replace("ann/more", "/ann")},
    )  # fmt: skip
    text = card.card(facts)
    assert "ann" not in text and "home" not in text and text.count("base") >= 4
    assert "base_model" not in front(text, tmp_path)


def test_a_local_folder_is_no_hub_id_whatever_its_name(tmp_path, monkeypatch):
    (tmp_path / "owner" / "base-7b").mkdir(parents=True)
    assert of_run().base_on_hub
    monkeypatch.chdir(tmp_path)
    assert not of_run().base_on_hub


HOSTILE = [
    "a\"b'c: - [x] {y}",
    "a|b`c`*d*_e_~f~$g$",
    "line\nbreak\r\n---\n# title",
    "<script>alert(1)</script>&amp;",
    "[click](https://evil.example) ![x](https://evil.example/x.png) <https://evil.example>",
    "back\\slash\\|pipe",
    "no",
    "1.0",
    "# x",
    "```\nfence",
    "{{ jinja }} %s \\n",
    "bidi\u202eedoc \x00\x07\x85\u2028\ufeff\udc80",
    "日本語 🙂 é",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_users_text_stays_text(text, tmp_path):
    shown = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    facts = Facts(
        adapter=True, base="owner/base", base_on_hub=True, revision=text, method={"name": text, text: [text]},
        license={"license": "other", "license_name": text}, model_class="LlamaForCausalLM",
        data={"train": Data(path=text.replace("/", "").replace("\\", ""), split=text, digest="a" * 64)}, start={text: 1.0}, end={text: 2.0},
        step=7, versions={text: text}, objective={"name": "x", text: text},
    )  # fmt: skip
    readme = card.card(facts)
    found = front(readme, tmp_path)
    assert set(found) == {"base_model", "base_model_relation", "library_name", "pipeline_tag", "tags", "license", "license_name"}
    assert found["license_name"] == shown and found["tags"] == ["tuning", shown]
    body = readme.split("\n---\n", 1)[1]
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(body)
    assert set(re.findall(r"<(\w+)", html)) == {"h1", "h2", "p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "pre", "code"}
    assert html.count("<h2>") == 7 and html.count("<table>") == 2 and html.count("<pre>") == 2
    tables = [line for line in body.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in tables} == {5, 4}
    plain = html.replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert f"<td>{shown}</td>\n<td>1</td>\n<td>2</td>" in plain


def test_a_license_is_only_what_the_base_says(tmp_path):
    assert card.license_of(None) is None and card.license_of(tmp_path) is None
    for text, found in (
        ("no front matter", None),
        ("---\nlanguage: en\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\n- a\n---\n", None),
        ("---\nlicense: 3\n---\n", None),
        ("---\nlicense: mit\ntags: [x]\n---\n# A", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        ),
    ):
        (tmp_path / "README.md").write_text(text)
        assert card.license_of(tmp_path) == found
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n" + "x" * card.CARD_BYTES)
    assert card.license_of(tmp_path) is None


def test_a_license_file_of_the_base_is_linked_where_it_is(tmp_path):
    license = {"license": "other", "license_link": "LICENSE"}
    link = "https://huggingface.co/owner/base-7b/blob/main/LICENSE"
    assert front(card.card(of_run(license=license)), tmp_path)["license_link"] == link
    assert "license_link" not in front(card.card(of_run(license=license, base_on_hub=False)), tmp_path)


@pytest.mark.parametrize("ending", card.HEADS)
def test_what_loads_a_class_is_what_transformers_has_for_it(ending):
    import transformers

    task, auto = card.HEADS[ending]
    classes = getattr(transformers, auto)._model_mapping._model_mapping.values()
    assert any(name.endswith(ending) for names in classes for name in ([names] if isinstance(names, str) else names))
    text = card.card(Facts(adapter=False, model_class=f"Any{ending}"))
    assert f"model = {auto}.from_pretrained" in text and ("pipeline_tag" in text) == (task is not None)


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_lines_that_load_the_model_do_so(tmp_path):
    torch, peft, transformers = (pytest.importorskip(name) for name in ("torch", "peft", "transformers"))
    from tokenizers import Tokenizer, models

    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    for name in ("base", "adapter"):
        words.save_pretrained(tmp_path / name)
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(13)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")

    for adapter, rows, kind in ((False, None, transformers.LlamaForCausalLM), (True, 13, peft.PeftModel)):
        lines = blocks(card.card(Facts(adapter=adapter, model_class="LlamaForCausalLM", embedding_rows=rows)))[0]
        given = {card.FOLDER: tmp_path / ("adapter" if adapter else "base"), '"path/to/the/base"': tmp_path / "base"}
        for placeholder, path in given.items():
            lines = lines.replace(placeholder, json.dumps(str(path)))
        space = {}
        exec(lines, space)
        assert isinstance(space["model"], kind) and len(space["tokenizer"]) == 2
        assert space["model"](torch.zeros(1, 3, dtype=torch.long)).logits.shape[-1] == (rows or 11)


def test_the_base_is_loaded_at_its_revision():
    theirs, ours = blocks(card.card(of_run()))
    assert 'AutoModelForCausalLM.from_pretrained("owner/base-7b", revision="v1")' in theirs
    assert f'tuning.load("owner/base-7b", adapter={card.FOLDER}, revision="v1")' in ours
    assert "revision" not in "".join(blocks(card.card(dataclasses.replace(of_run(), revision=None))))
