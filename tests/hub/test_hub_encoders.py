"""BERT, RoBERTa, DistilBERT, ModernBERT and sentence encoders beyond what every family is tested for: against transformers.

Shapes: B sequences, T tokens, D width.
"""

import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import checkpoints
from tuning import build, weights
from tuning.core import mesh, tree
from tuning.core.types import Batch
from tuning.hub import checkpoint, families, files, sentences
from tuning.hub.sentences import Sentences
from tuning.models import heads, transformer
from tuning.nn import block, mlp
from tuning.source import pretrained

torch = pytest.importorskip("torch")
LENGTHS = (40, 25, 3)
MASK = np.stack([np.arange(40) < n for n in LENGTHS]).astype(np.int64)


def batch_of(tokens, mask, types=None) -> Batch:
    at = np.maximum(mask.cumsum(1) - 1, 0)
    return Batch(*(None if x is None else np.asarray(x, np.int32) for x in (tokens, tokens, mask, mask, at, types)))


def ask(model, batch):
    """(last hidden states or logits, pooled) of a transformers model."""
    said = {} if batch.types is None else {"token_type_ids": torch.tensor(batch.types.astype(np.int64))}
    with torch.no_grad():
        return model(torch.tensor(batch.tokens.astype(np.int64)), attention_mask=torch.tensor(batch.segments.astype(np.int64)), **said)


def assert_same(ours, theirs):
    gap = np.abs(np.asarray(ours) - np.asarray(theirs)).max()
    assert gap <= 1e-5 * max(1, np.abs(np.asarray(theirs)).max()), gap


def said(net, batch):
    """(hidden states, what the head makes of them)."""
    return jax.device_get(_said(net.network.apply, net.params, batch))


@functools.partial(jax.jit, static_argnums=0)
def _said(apply, params, batch):
    hidden, head, _ = apply(params, batch)
    return hidden, head(hidden)


OTHERS = [
    ("bert_classes", "NextSentencePrediction"),
    ("roberta_classes", "TokenClassification"),
    ("roberta_classes", "QuestionAnswering"),
    ("distilbert_classes", "TokenClassification"),
    ("distilbert_classes", "QuestionAnswering"),
    ("distilbert_classes", ""),
    ("modernbert_classes", "TokenClassification"),
    ("modernbert_classes", ""),
]


@pytest.mark.parametrize(("family", "auto"), OTHERS)
def test_the_other_classes_of_a_family_say_what_transformers_says(family, auto, tmp_path, ours):
    directory = checkpoints.tiny(family, tmp_path, auto=auto, num_hidden_layers=2, layer_types=None, num_labels=2)
    net, model = ours(directory), checkpoints.reference(directory, auto)
    tokens = checkpoints.tokens(3, 40) * MASK
    out = ask(model, batch := batch_of(tokens, MASK, tokens % 2 if net.config.type_count == 2 else None))
    _, answer = said(net, batch)
    if "start_logits" in out:
        assert_same(answer[MASK == 1], torch.stack([out.start_logits, out.end_logits], -1)[MASK == 1])
    elif net.config.head.pool:
        assert_same(answer[:, 0], out.logits)
    else:
        assert_same(answer[MASK == 1], (out.logits if "logits" in out else out.last_hidden_state)[MASK == 1])
    checkpoint.save(tmp_path / "again", net.params, net.config, original=net.raw)
    assert set(files.Tensors(directory)) == set(files.Tensors(tmp_path / "again"))


def test_a_body_with_a_pooler_gives_its_hidden_states_and_what_the_pooler_says(ours_of, reference_of):
    net, tokens = ours_of("bert_pooled"), checkpoints.tokens(3, 40) * MASK
    out = ask(reference_of("bert_pooled"), batch := batch_of(tokens, MASK, tokens % 2))
    hidden, answer = said(net, batch)
    assert_same(hidden[MASK == 1], out.last_hidden_state[MASK == 1])
    assert_same(answer[:, 0], out.pooler_output)


def test_positions_of_roberta_are_counted_from_the_first_token_that_is_not_padding(ours_of, reference_of):
    net, mask = ours_of("roberta_masked"), MASK[:, ::-1]
    tokens = np.where(mask == 1, checkpoints.tokens(3, 40), net.raw["pad_token_id"])
    batch = batch_of(tokens, mask)
    assert_same(said(net, batch)[1][mask == 1], ask(reference_of("roberta_masked"), batch).logits[mask == 1])
    assert net.config.position_offset == 2 and net.config.max_length == net.raw["max_position_embeddings"] - 2


# Files as they were published.


def rewrite(directory, tmp_path, change, **config):
    """A copy of a checkpoint with its tensors changed, and its config.json."""
    tensors = files.Tensors(directory)
    values = {name: tensors.read(name) for name in tensors}
    change(values)
    tmp_path.mkdir(exist_ok=True)
    files.write(tmp_path, values.items())
    (tmp_path / "config.json").write_text(json.dumps({**json.loads((directory / "config.json").read_text()), **config}))
    return tmp_path


def as_published(values):
    """bert-base-uncased: the older names of norms, a tensor of constants, tied weights stored twice, and the second head."""
    for name in [name for name in values if "LayerNorm" in name]:
        values[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = values.pop(name)
    values["bert.embeddings.position_ids"] = np.arange(128, dtype=np.int64)[None]
    values["cls.predictions.decoder.weight"] = values["bert.embeddings.word_embeddings.weight"]
    values["cls.predictions.decoder.bias"] = values["cls.predictions.bias"]
    rng = np.random.default_rng(0)
    for name, shape in {"bert.pooler.dense": (32, 32), "cls.seq_relationship": (2, 32)}.items():
        values[f"{name}.weight"] = rng.normal(size=shape).astype(np.float32)
        values[f"{name}.bias"] = rng.normal(size=shape[:1]).astype(np.float32)


@pytest.fixture(scope="module")
def published(checkpoint_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    return rewrite(checkpoint_of("bert_masked"), folder, as_published, architectures=["BertForPreTraining"])


def test_a_file_of_two_heads_is_read_as_the_masked_language_model(published, ours, ours_of, caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        net = ours(published)
    assert "cls.seq_relationship" in caplog.text and "left out" in caplog.text
    for name, leaf in tree.flatten(ours_of("bert_masked").params).items():
        assert np.array_equal(leaf, tree.flatten(net.params)[name]), name
    checkpoint.save(tmp_path, net.params, net.config, original=net.raw)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    checkpoints.reference(tmp_path, "MaskedLM")  # raises if a tensor is missing or unknown


@pytest.mark.parametrize(
    ("head", "classes", "fresh"),
    [("none", (), set()), ("sequence_classification", ("no", "yes"), {"head/kernel", "head/bias"}), ("masked_language_model", (), set())],
)
def test_another_head_finds_its_weights_in_a_published_file(head, classes, fresh, published):
    source = pretrained(path=str(published), head=head, classes=classes)
    assert source.fresh == fresh
    model = build.model(source, build.METHODS["full"](build.outline(source)), mesh.over(jax.devices()[:1]))
    params = tree.flatten(weights.base_params(model, lambda name: True, 0))
    there = files.Tensors(published)
    if head != "masked_language_model":
        assert np.array_equal(params["head/dense/kernel"], there.read("bert.pooler.dense.weight").T)
    assert np.array_equal(params["embed_norm/scale"], there.read("bert.embeddings.LayerNorm.gamma"))


def test_a_body_without_its_prefix_gets_a_head(checkpoint_of):
    source = pretrained(path=str(checkpoint_of("bert_pooled")), head="sequence_classification", classes=("no", "yes"))
    assert source.fresh == {"head/kernel", "head/bias"}  # the pooler is there
    source = pretrained(path=str(checkpoint_of("bert_pooled")), head="masked_language_model")
    assert source.fresh == {"head/dense/kernel", "head/dense/bias", "head/norm/scale", "head/norm/bias", "head/bias"}


def test_a_second_bias_that_differs_from_the_first_is_refused(checkpoint_of, ours, tmp_path):
    def change(values):
        values["cls.predictions.decoder.bias"] = values["cls.predictions.bias"] + 1

    with pytest.raises(ValueError, match=r"cls.predictions.decoder.bias differs from cls.predictions.bias"):
        ours(rewrite(checkpoint_of("bert_masked"), tmp_path, change))


# Configurations.

BERT = {**checkpoints.COMMON, "model_type": "bert"}
DISTILBERT = dict(model_type="distilbert", vocab_size=100, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64)
MODERNBERT = {**checkpoints.COMMON, "model_type": "modernbert"}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({**BERT, "is_decoder": True}, "is_decoder=True"),
        ({**BERT, "add_cross_attention": True}, "add_cross_attention=True"),
        ({**BERT, "position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({**BERT, "tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({**BERT, "hidden_size": 30}, "hidden_size=30 must be a multiple of num_attention_heads=4"),
        ({**BERT, "type_vocab_size": 0}, "type_vocab_size=0"),
        ({**BERT, "hidden_act": "mish"}, "hidden_act='mish'"),
        ({**DISTILBERT, "dim": None}, "dim=None must be a whole number"),
        ({**MODERNBERT, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({**MODERNBERT, "rope_parameters": {"rope_theta": 7.0}}, "full_attention and for sliding_attention"),
        ({**MODERNBERT, "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, "local layers are not scaled"),
        ({**MODERNBERT, "embedding_dropout": 0.1, "attention_dropout": 0.2}, "must be the same"),
        ({**MODERNBERT, "architectures": ["ModernBertForSequenceClassification"], "classifier_pooling": "max"}, "classifier_pooling='max'"),
    ],
)
def test_what_the_encoder_cannot_do_is_refused(raw, said):
    with pytest.raises(ValueError, match=said):
        families.config_from(raw)


def test_both_layouts_of_modernbert_mean_the_same():
    old = dict(global_attn_every_n_layers=2, global_rope_theta=5e4, local_rope_theta=300.0, local_attention=8)
    turns = {"full_attention": 5e4, "sliding_attention": 300.0}
    new = dict(
        layer_types=["full_attention", "sliding_attention", "full_attention"], local_attention=8,
        rope_parameters={kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in turns.items()},
    )  # fmt: skip
    config = families.config_from({**MODERNBERT, **old})
    assert config == families.config_from({**MODERNBERT, **new})
    assert [(kind.window, kind.rope, kind.attn_norm) for kind in config.kinds] == [
        (None, "global", False), (5, "local", True), (None, "global", True),
    ]  # fmt: skip
    assert families.config_from({**MODERNBERT, **old, "local_rope_theta": None}).local_theta == 5e4
    written = families.config_to(config)
    assert {key: written[key] for key in (*old, "layer_types")} == {**old, "layer_types": new["layer_types"]}


@pytest.mark.parametrize(
    "settings",
    [
        dict(family="bert_classes", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.3),
        dict(family="bert_classes", hidden_dropout_prob=0.1, classifier_dropout=0.4),
        dict(family="bert_classes", auto="TokenClassification", hidden_dropout_prob=0.0, classifier_dropout=0.4),
        dict(family="bert_spans", hidden_dropout_prob=0.1),
        dict(family="bert_masked", hidden_dropout_prob=0.1),
        dict(family="roberta_classes", hidden_dropout_prob=0.1, classifier_dropout=0.4),
        dict(family="distilbert_classes", dropout=0.1, attention_dropout=0.3, seq_classif_dropout=0.4),
        dict(family="distilbert_classes", auto="TokenClassification", dropout=0.1),
        dict(family="distilbert_classes", auto="QuestionAnswering", num_labels=2, dropout=0.1, qa_dropout=0.4),
        dict(family="modernbert_classes", embedding_dropout=0.1, mlp_dropout=0.2, classifier_dropout=0.4),
        dict(family="modernbert_classes", attention_dropout=0.3, mlp_dropout=0.2),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_dropout_falls_where_transformers_drops(settings, tmp_path, ours, monkeypatch):
    """One layer, so that the order in which the rates come up can be compared."""
    family, auto = (settings := dict(settings)).pop("family"), settings.get("auto")
    directory = checkpoints.tiny(family, tmp_path, num_hidden_layers=1, n_layers=1, layer_types=["full_attention"], **settings)
    net = ours(directory)
    auto = checkpoints.FAMILIES[family]["auto"] if auto is None else auto
    model, rates = checkpoints.reference(directory, auto).train(), []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, *_: rates.append(module.p))
    tokens = checkpoints.tokens(2, 8)
    ask(model, batch := batch_of(tokens, np.ones_like(tokens)))
    got = []
    for place in (block, mlp, transformer, heads):
        monkeypatch.setattr(place, "dropout", lambda x, rate, key: (got.append(rate), x)[1])
    hidden, head, _ = net.network.apply(net.params, batch, jax.random.key(0))
    head(hidden)
    assert [rate for rate in got if rate] == [rate for rate in rates if rate]
    shares = {"attention_dropout", "attention_probs_dropout_prob"} & set(net.raw)
    assert net.config.attention_dropout == net.raw[shares.pop()]
    again = families.config_from({**families.config_to(net.config), "num_hidden_layers": 1})
    assert families.architecture(again) == families.architecture(net.config)


def test_a_head_drops_only_while_training(ours_of):
    net, tokens = ours_of("bert_classes"), checkpoints.tokens(2, 8)
    batch, key = batch_of(tokens, np.ones_like(tokens)), jax.random.key(3)
    hidden, answer = said(net, batch)
    training = net.network.apply(net.params, batch, key)[1]
    assert np.abs(np.asarray(training(hidden)) - answer).max() > 1e-3
    assert np.array_equal(training(hidden), training(hidden))  # a key gives the same ones each time


# Sentence encoders.

MODULES = [
    {"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
    for i, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")))
]


def sentence_files(folder, modules=MODULES, pooling=None, limits=None, prompts=None):
    (folder / "1_Pooling").mkdir(exist_ok=True)
    written = {
        "modules.json": modules, "1_Pooling/config.json": pooling, "sentence_bert_config.json": limits,
        "config_sentence_transformers.json": prompts,
    }  # fmt: skip
    for name, content in written.items():
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


OLD = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}
LATER = {
    "transformer_task": "feature-extraction",
    "module_output_name": "token_embeddings",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
}


def test_a_sentence_encoders_directory_says_how_its_vectors_are_made(tmp_path):
    assert sentences.read(tmp_path) is None
    limits = {"max_seq_length": 256, "do_lower_case": True}
    assert sentences.read(sentence_files(tmp_path, pooling=OLD, limits=limits)) == Sentences(("mean",), True, 256, True)
    newer = {"embedding_dimension": 32, "pooling_mode": "lasttoken", "include_prompt": True}
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": None}
    sentence_files(tmp_path, MODULES[:2], newer, LATER, prompts)
    assert sentences.read(tmp_path) == Sentences(("lasttoken",), False)
    sentence_files(tmp_path, pooling={"word_embedding_dimension": 32, "pooling_mode_cls_token": True})
    assert sentences.read(tmp_path).pooling == ("cls", "mean")  # the mean is taken unless it is said not to be


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            dict(modules=[*MODULES[:2], {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}]),
            "Pooling -> Dense is not",
        ),
        (dict(modules=MODULES[:1]), "Transformer is not supported"),
        (dict(modules=[{**MODULES[0], "path": "0_Transformer"}, *MODULES[1:]]), "the first in ''"),
        (dict(modules={"modules": []}), "is no list of modules"),
        (dict(pooling={**OLD, "pooling_mode_weighted": True}), "pooling_mode_weighted"),
        (dict(pooling={"pooling_mode": "attention"}), "attention"),
        (dict(pooling={**OLD, "pooling_mode_mean_tokens": False}), "what is supported is a pooling"),
        (dict(pooling=None), "what is supported is a pooling"),
        (dict(limits={"max_seq_length": 8, "model_args": {"x": 1}}), "model_args"),
        (dict(limits={**LATER, "module_output_name": "pooler_output"}), "pooler_output"),
        (dict(prompts={"prompts": {"query": "query: "}, "default_prompt_name": "query"}), "default_prompt_name='query'"),
    ],
)
def test_a_sentence_encoder_that_is_made_otherwise_is_refused(changed, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        sentences.read(sentence_files(tmp_path, **{"pooling": OLD, **changed}))


@pytest.fixture(scope="module")
def hidden_states(ours_of, reference_of):
    """(ours, those of transformers) of texts with padding behind them."""
    batch = batch_of(checkpoints.tokens(3, 40) * MASK, MASK)
    return said(ours_of("bert_pooled"), batch)[0], ask(reference_of("bert_pooled"), batch).last_hidden_state


def torch_pool(hidden_BTD, mask_BT, mode):
    real = mask_BT[..., None].float()
    if mode == "max":
        return hidden_BTD.masked_fill(real == 0, -1e9).max(1).values
    if mode == "mean":
        return (hidden_BTD * real).sum(1) / real.sum(1)
    if mode == "mean_sqrt_len_tokens":
        return (hidden_BTD * real).sum(1) / real.sum(1).sqrt()
    rows = [hidden[mask == 1] for hidden, mask in zip(hidden_BTD, mask_BT, strict=True)]
    if mode == "weightedmean":
        places = [torch.arange(1, len(row) + 1).float()[:, None] for row in rows]
        return torch.stack([(row * place).sum(0) / place.sum() for row, place in zip(rows, places, strict=True)])
    return torch.stack([row[{"cls": 0, "lasttoken": -1}[mode]] for row in rows])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", [*sentences.POOLINGS.values(), "cls+max+mean"])
def test_vectors_of_texts_are_those_of_transformers_pooled_by_hand(mode, normalize, hidden_states):
    (ours, theirs), modes = hidden_states, mode.split("+")
    vectors = torch.cat([torch_pool(theirs, torch.tensor(MASK), one) for one in modes], 1)
    vectors = torch.nn.functional.normalize(vectors, dim=1) if normalize else vectors
    vectors_of = lambda *x: sentences.pool(*map(jnp.asarray, x), Sentences(tuple(modes), normalize))  # noqa: E731
    got = vectors_of(ours, MASK)
    assert got.dtype == jnp.float32 and got.shape == (3, 32 * len(modes))
    assert_same(got, vectors)
    assert_same(vectors_of(*(np.roll(x[1:], 7, 1) for x in (ours, MASK))), vectors[1:])  # padding on either side
