"""T5, T5 1.1 and what was made from it (Flan-T5, ByT5), and mT5."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tuning.hub.family import Family, Form, Raw, activation, activation_name, bare, refuse, renamed, size, speaks, value
from tuning.hub.names import Row
from tuning.models.encoder_decoder import EncoderDecoderConfig
from tuning.models.heads import HeadConfig
from tuning.models.transformer import TransformerConfig

OTHER_NAMES = {"hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers", "head_dim": "d_kv"}
MAX_LENGTH = 1 << 20  # there is a bucket for any distance; `n_positions` only says how long the texts of pre-training were

# Sublayers, ours and the file's, in the order in which the file numbers them.
SUBLAYERS = {
    "encoder": {"attn": "SelfAttention", "mlp": "DenseReluDense"},
    "decoder": {"attn": "SelfAttention", "cross": "EncDecAttention", "mlp": "DenseReluDense"},
}
PLAIN = {"mlp/up": "wi", "mlp/down": "wo"}
GATED = {"mlp/gate": "wi_0", "mlp/up": "wi_1", "mlp/down": "wo"}


def table(raw: Raw) -> tuple[Row, ...]:
    """Where the body's tensors go."""
    return (Row("embed/table", "shared.weight"), *_side("encoder", raw), *_side("decoder", raw))


def _side(side: str, raw: Raw) -> Iterator[Row]:
    yield Row(f"{side}/relative/table", f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    for number, (name, theirs) in enumerate(SUBLAYERS[side].items()):
        layer = f"{side}.block.{{layer}}.layer.{number}"
        feed = GATED if feed_forward(raw)[1] else PLAIN
        for leaf, tensor in (feed if name == "mlp" else {f"{name}/{x}": x for x in "qkvo"}).items():
            yield Row(f"{side}/{leaf}/kernel", f"{layer}.{theirs}.{tensor}.weight", transposed=True)
        yield Row(f"{side}/{name}_norm/scale", f"{layer}.layer_norm.weight")
    yield Row(f"{side}/norm/scale", f"{side}.final_layer_norm.weight")


def feed_forward(raw: Raw) -> tuple[str, bool]:
    """(activation, whether the feed-forward layer is gated). What `feed_forward_proj` means may be said again, and then counts."""
    said = value(raw, "feed_forward_proj", "gated-gelu" if raw["model_type"] == "mt5" else "relu")
    *gate, name = said.split("-")
    if gate not in ([], ["gated"]):
        raise ValueError(f"config.json: feed_forward_proj={said!r} is neither an activation's name nor one after 'gated-'.")
    name = value(raw, "dense_act_fn", "gelu_new" if said == "gated-gelu" else name)
    return activation({"dense_act_fn": name}, "dense_act_fn"), bool(value(raw, "is_gated_act", bool(gate)))


def scaled(raw: Raw) -> bool:
    """Whether the decoder's output is scaled on its way to the vocabulary, as in T5 alone. Before transformers 5, a tied head says so."""
    said = raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings") is not False)
    return bool(said) and raw.get("model_type") != "mt5"


def read(raw: Raw) -> EncoderDecoderConfig:
    """config.json of either family, whose defaults differ."""
    raw = renamed(raw, OTHER_NAMES)
    refuse(raw, "is_encoder_decoder", (True,), "only the whole network is read, not one side of it")
    refuse(raw, "is_decoder", (False,), "only the whole network is read, not one side of it")
    layers, heads, rate = size(raw, "num_layers"), size(raw, "num_heads"), float(value(raw, "dropout_rate", 0.1))
    act, gated = feed_forward(raw)
    encoder = TransformerConfig(
        vocab_size=size(raw, "vocab_size"), width=size(raw, "d_model"), layers=layers, heads=heads, kv_heads=heads,
        head_dim=size(raw, "d_kv"), hidden=size(raw, "d_ff"), max_length=MAX_LENGTH, causal=False, positions="relative", scale=1.0,
        relative=(size(raw, "relative_attention_num_buckets", 32), size(raw, "relative_attention_max_distance", 128)),
        norm_eps=float(value(raw, "layer_norm_epsilon", 1e-6)), activation=act, gated=gated,
        dropout=rate, attention_dropout=rate, mlp_dropout=rate,
    )  # fmt: skip
    tied = bool(value(raw, "tie_word_embeddings", True))
    decoder = encoder.replace(layers=size(raw, "num_decoder_layers", layers), kinds=(), causal=True, tied=tied)
    start = value(raw, "decoder_start_token_id", 0 if raw["model_type"] == "mt5" else None)
    return EncoderDecoderConfig(encoder, decoder, start)


def write(c: EncoderDecoderConfig) -> dict[str, Any]:
    """The keys that `read` and the head read."""
    d = c.decoder
    name = "gelu" if d.gated and d.activation == "gelu_tanh" else activation_name(d.activation)
    return {
        "is_encoder_decoder": True,
        "vocab_size": d.vocab_size,
        "d_model": d.width,
        "d_kv": d.head_dim,
        "d_ff": d.hidden,
        "num_layers": c.encoder.layers,
        "num_decoder_layers": d.layers,
        "num_heads": d.heads,
        "relative_attention_num_buckets": d.relative[0],
        "relative_attention_max_distance": d.relative[1],
        "dropout_rate": d.dropout,
        "layer_norm_epsilon": d.norm_eps,
        "feed_forward_proj": f"gated-{name}" if d.gated else name,
        "dense_act_fn": activation_name(d.activation),
        "is_gated_act": d.gated,
        "decoder_start_token_id": c.start,
        "tie_word_embeddings": d.tied,
        **({"scale_decoder_outputs": d.head.scale != 1} if d.head.output == "vocabulary" else {}),
    }


def untie(raw: Raw) -> dict[str, Any]:
    """transformers 5 writes tie_word_embeddings=true for every network, and goes by the tensors. The scale must stay what it was."""
    return {**raw, "tie_word_embeddings": False, "scale_decoder_outputs": scaled(raw)}


def head(raw: Raw) -> HeadConfig:
    """The output over the vocabulary."""
    return speaks(raw, scale=size(renamed(raw, OTHER_NAMES), "d_model", 1) ** -0.5 if scaled(raw) else 1.0)


def _family(name: str, older: tuple[str, ...] = ()) -> Family:
    speaking = Form(head, (Row("head/kernel", "lm_head.weight", transposed=True),))
    forms = {f"{name}ForConditionalGeneration": speaking, f"{name}Model": Form(bare), **dict.fromkeys(older, speaking)}
    copies = {f"{side}.embed_tokens.weight": "shared.weight" for side in SUBLAYERS}
    unused = r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$"
    return Family(forms, read, write, table, prefix="", aliases=copies, ignored=unused, untie=untie)


FAMILIES = {"t5": _family("T5", ("T5WithLMHeadModel",)), "mt5": _family("MT5")}
