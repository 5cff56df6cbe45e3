"""What PEFT calls our methods: for each peft_type its keys in adapter_config.json and its tensors (the formats of peft 0.21).

Shapes: L layers, D input width, F output width, R rank, n positions of a prompt or prefix, K key-value heads, H head width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tuning.hub.files import Tensors
from tuning.hub.peft_adalora import Grown
from tuning.hub.peft_modules import Projections, ends, spell
from tuning.hub.peft_norms import Copied
from tuning.methods import kernels
from tuning.methods.ia3 import inside
from tuning.methods.lora import FROM_KERNEL
from tuning.methods.vera import Shared
from tuning.nn import stack

Config = Mapping[str, Any]
Leaves = Mapping[str, np.ndarray]  # by name


class Part(NamedTuple):
    """A tensor of an adapted module.

    ending  of its name
    write   (one layer's values, role) -> those of the file
    read    those of the file -> the layer's values, in any shape
    tied    the ending at a tied output, where the values stand as we hold them
    """

    ending: str
    write: Callable[[np.ndarray, str], np.ndarray] = lambda x, role: x.T
    read: Callable[[np.ndarray], np.ndarray] = np.transpose
    tied: str = ""


class Pack(NamedTuple):
    """All leaves as the one tensor `prompt_embeddings`.

    write  (leaves, sides) -> tensor; of an encoder-decoder PEFT counts two sides
    read   (tensor, leaves that give the shapes) -> leaves
    tell   (leaves) -> the sizes that adapter_config.json says
    """

    write: Callable[[Leaves, int], np.ndarray]
    read: Callable[[np.ndarray, Leaves], dict[str, np.ndarray]]
    tell: Callable[[Leaves], dict[str, int]]


class Kind(NamedTuple):
    """One peft_type.

    method    our name of it; reads_as, the method that it is read as, where that is another one
    keys      {key: (ours, what PEFT takes where it is absent)}
    parts     {last part of a leaf's name: its tensor}, of methods that stand at projections
    lookups   the same at the embedding; pack, of methods that stand at no module
    norms     whether nothing is added, and norms of the base learned
    rows      whether rows of added tokens go with it
    conv      whether PEFT also has it for the layers of GPT-2, which are no nn.Linear
    said      further keys that are read; neutral, {key: values with which it changes nothing}; inert, keys that never do
    constant  what is written besides
    common    tensors of no module, which follow from the method's config: draw(method's config, roles, net)
    plain     (method's config, leaves) -> the same as PEFT has it
    opened    (adapter_config.json, the file's tensors) -> them as they are read
    tell      (method's config, roles, net, the adapter's leaves) -> keys of adapter_config.json
    hear      (adapter_config.json, roles, net) -> keys of the method's config
    """

    method: str
    keys: Mapping[str, tuple[str, Any]]
    parts: Mapping[str, Part] = {}
    lookups: Mapping[str, Part] = {}
    pack: Pack | None = None
    norms: bool = False
    reads_as: str = ""
    rows: bool = False
    conv: bool = True
    said: tuple[str, ...] = ()
    neutral: Mapping[str, tuple] = {}
    inert: tuple[str, ...] = ()
    constant: Mapping[str, Any] = {}
    common: tuple[str, ...] = ()
    draw: Callable[[Config, Iterable[str], Projections], tuple[np.ndarray, ...]] = lambda method, roles, net: ()
    plain: Callable[[Config, Leaves], tuple[Config, Leaves]] = lambda method, leaves: (method, leaves)
    opened: Callable[[Config, Tensors], Any] = lambda raw, tensors: tensors
    tell: Callable[[Config, Sequence[str], Projections, Leaves], dict[str, Any]] = lambda method, roles, net, leaves: {}
    hear: Callable[[Config, Sequence[str], Projections], dict[str, Any]] = lambda raw, roles, net: {}


def whole(value: Any) -> Any:
    """A number that is whole as an int, which is what PEFT writes."""
    return int(value) if isinstance(value, float) and value == int(value) else value


def _check_ranks(leaves: Leaves, part: str, ranks: Mapping[str, int]) -> None:
    """ValueError unless the leaves of this last part of their names, whose last axis is the rank, have the ranks of their roles."""
    for name, leaf in leaves.items():
        module, _, last = name.rpartition("/adapter/")
        if last == part and leaf.shape[-1] != (rank := ranks[stack.apart(module)[0]]):
            raise ValueError(f"The adapters have rank {leaf.shape[-1]} at {module}, not rank={rank}.")


def _tell_loha(method: Config, roles: Sequence[str], net: Projections, leaves: Leaves) -> dict[str, Any]:
    _check_ranks(leaves, "w1_b", {role: method["rank"] for role in roles})
    return {}


def _tell_adalora(method: Config, roles: Sequence[str], net: Projections, leaves: Leaves) -> dict[str, Any]:
    _check_ranks(leaves, "e", {role: method["init_rank"] for role in roles})
    return {}


# LoRA: numbers by role.

BY_ROLE = {"rank_pattern": ("r", "rank", "ranks", int), "alpha_pattern": ("lora_alpha", "alpha", "alphas", float)}


def _tell_lora(method: Config, roles: Sequence[str], net: Projections, leaves: Leaves) -> dict[str, Any]:
    experts = {module.rpartition(".")[2] for module in net.others if "{expert}" in module}
    if clash := [role for role in roles if net.modules[role].rpartition(".")[2] in experts]:
        raise ValueError(
            f"PEFT takes adapters of {', '.join(clash)} for the experts', whose projections have the same names. Use --format=hf."
        )
    sites, told = [net.sites[role] for role in roles], {}
    for key, (_, one, many, kind) in BY_ROLE.items():
        values = kernels.by_role(many, method[one], method.get(many, ()), sites, kind)
        if one == "rank":
            _check_ranks(leaves, "a", values)
        spelled = {role: spell([role], net) for role, value in values.items() if value != method[one]}
        told[key] = {said if isinstance(said, str) else said[0]: whole(values[role]) for role, said in spelled.items()}
        if net.tied and "embed" in spelled:
            told[key][net.tied] = whole(values["embed"])
    return told


def _plain_lora(method: Config, leaves: Leaves) -> tuple[Config, Leaves]:
    """What started from the kernels' own directions as a LoRA of twice the rank: [A, A0] [B; -B0] is A B - A0 B0. alpha keeps the scale."""
    if method.get("init") not in FROM_KERNEL:
        return method, leaves
    more = {"rank": 2, "alpha": 2**0.5 if method["rank_stabilized"] else 2}
    said = dict(method, init="default", rank=2 * method["rank"], alpha=more["alpha"] * method["alpha"])
    for _, one, many, kind in BY_ROLE.values():
        pairs = (entry.rpartition("=") for entry in method.get(many, ()))
        said[many] = tuple(f"{pattern}={kind(text) * more[one]}" for pattern, _, text in pairs)
    joined = dict(leaves)
    for name in [name for name in leaves if name.endswith("/adapter/a0")]:
        place = name.removesuffix("a0")
        a, b = ((leaves[f"{place}{part}"], joined.pop(f"{place}{part}0")) for part in "ab")
        joined |= {f"{place}a": np.concatenate(a, axis=-1), f"{place}b": np.concatenate([b[0], -b[1]], axis=-2)}
    return said, joined


def _hear_lora(raw: Config, roles: Sequence[str], net: Projections) -> dict[str, Any]:
    heard = {}
    for key, (base, _, many, _) in BY_ROLE.items():
        default, patterns = raw.get(base, 8), raw.get(key) or {}

        def of(module: str, patterns=patterns, default=default) -> Any:
            return next((value for said, value in patterns.items() if re.match(rf"(.*\.)?({said})$", module)), default)

        values = {role: {of(module) for module in net.changed(role)} for role in roles}
        if uneven := {role: sorted(found) for role, found in values.items() if len(found) > 1}:
            raise ValueError(f"{CONFIG}: {key}={patterns!r} differs among the layers of {uneven}; here they must share it.")
        heard[many] = tuple(f"{role}={found}" for role, (found,) in values.items() if found != default)
    return heard


# VeRA: the projections that all modules share.


def _draw_vera(method: Config, roles: Iterable[str], net: Projections) -> tuple[np.ndarray, ...]:
    inputs, outputs = zip(*(net.sites[role].shape for role in roles), strict=True)
    return tuple(x.T for x in Shared(max(inputs), max(outputs), method["rank"], method["projection_seed"]).draw())


# IA3: what is scaled, a projection's input or its output.


def _hear_ia3(raw: Config, roles: Sequence[str], net: Projections) -> dict[str, Any]:
    said = raw.get("feedforward_modules")
    for role in roles:
        for module in net.paths(role):
            if (said is not None and ends(module, said)) != inside(role):
                side = "input" if inside(role) else "output"
                raise ValueError(f"{CONFIG}: feedforward_modules={said!r}: the factors of {module} ({role}) are for its {side} here.")
    return {}


# Prompts and prefixes.


def _read_prompt(rows: np.ndarray, leaves: Leaves) -> dict[str, np.ndarray]:
    """The first rows; those of an encoder-decoder's other side are never used."""
    return {name: rows[: leaf.shape[0]] for name, leaf in leaves.items()}


def _tell_prompt(leaves: Leaves) -> dict[str, int]:
    (leaf,) = leaves.values()
    return {"num_virtual_tokens": leaf.shape[0], "token_dim": leaf.shape[1]}


def _places(leaves: Leaves) -> list[tuple[str, range, int]]:
    """(leaf, its layers, 0 for keys or 1 for values) of a prefix. ValueError unless it is one of each for every layer from the first on."""
    found = [(name, stack.apart(name)) for name in leaves]
    places = [(name, layers, int(kind.endswith("/values"))) for name, (kind, layers) in found if kind in PREFIX_LEAVES and layers]
    cells = sorted((layer, side) for _, layers, side in places for layer in layers)
    if len(places) < len(leaves) or cells != [(i, side) for i in range(len(cells) // 2) for side in (0, 1)]:
        raise ValueError(f"PEFT has a prefix of keys and values in all layers of a decoder or encoder; here there is {', '.join(leaves)}.")
    return places


def _write_prefix(leaves: Leaves, sides: int) -> np.ndarray:
    """[n, layers 2 K H]."""
    places = _places(leaves)
    n, K, H = leaves[places[0][0]].shape[1:]
    cells = np.empty((n, sum(len(layers) for _, layers, _ in places) // 2, 2, K, H), leaves[places[0][0]].dtype)
    for name, layers, side in places:
        cells[:, list(layers), side] = np.moveaxis(leaves[name], 0, 1)
    return cells.reshape(n, -1)


def _read_prefix(rows: np.ndarray, leaves: Leaves) -> dict[str, np.ndarray]:
    places = _places(leaves)
    n, K, H = leaves[places[0][0]].shape[1:]
    cells = rows.reshape(n, -1, 2, K, H)
    return {name: np.moveaxis(cells[:, list(layers), side], 1, 0) for name, layers, side in places}


def _tell_prefix(leaves: Leaves) -> dict[str, int]:
    places = _places(leaves)
    n, K, H = leaves[places[0][0]].shape[1:]
    layers = sum(len(layers) for _, layers, _ in places) // 2
    return {"num_virtual_tokens": n, "token_dim": K * H, "num_attention_heads": K, "num_layers": layers}


def _hear_ids(raw: Config, roles: Sequence[str], net: Projections) -> dict[str, Any]:
    ids = raw.get("token_indices") or []
    if not ids or len(set(ids)) < len(ids):
        raise ValueError(f"{CONFIG}: token_indices={ids!r} must be ids, each once.")
    return {"ids": tuple(ids)}


CONFIG, PREFIX = "adapter_config.json", "base_model.model."
BASE = ".base_layer."  # what PEFT writes again of the base where it adapts the embedding or the output
PREFIX_LEAVES = ("attn/adapter/keys", "attn/adapter/values")
LENGTH = {"num_virtual_tokens": ("length", 0)}
SIZES = ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")
PROMPT = Pack(lambda leaves, sides: np.concatenate([*leaves.values()] * sides), _read_prompt, _tell_prompt)
ENCODER = ("encoder_hidden_size", "encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout")
TEXT = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
TARGETS = ("target_modules", "modules_to_save")

NO_DROPOUT = {"rank_dropout": (0.0,), "module_dropout": (0.0,)}

KINDS: dict[str, Kind] = {
    "LORA": Kind(
        "lora",
        {
            "r": ("rank", 8), "lora_alpha": ("alpha", 8.0), "lora_dropout": ("dropout", 0.0), "use_rslora": ("rank_stabilized", False),
            "use_dora": ("dora", False),
        },
        {"a": Part("lora_A.weight"), "b": Part("lora_B.weight"), "magnitude": Part("lora_magnitude_vector")},
        {"a": Part("lora_embedding_A", tied="lora_B.weight"), "b": Part("lora_embedding_B", tied="lora_A.weight")},
        rows=True, said=(*TARGETS, "trainable_token_indices", "ensure_weight_tying", *BY_ROLE),
        # The other ways to start change the base's weights too.
        neutral={"init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"), "bias": ("none",)},
        inert=("megatron_core", "qalora_group_size", "layers_pattern"), constant={"bias": "none", "init_lora_weights": True},
        plain=_plain_lora, tell=_tell_lora, hear=_hear_lora,
    ),
    "VERA": Kind(
        "vera", {"r": ("rank", 256), "d_initial": ("d_initial", 0.1), "vera_dropout": ("dropout", 0.0)},
        {name: Part(f"vera_{name}") for name in ("lambda_d", "lambda_b")},
        said=(*TARGETS, "projection_prng_key"), neutral={"bias": ("none",)},
        inert=("layers_pattern", "init_weights", "save_projection"), constant={"bias": "none", "save_projection": True},
        common=("base_model.vera_A", "base_model.vera_B"), draw=_draw_vera,
        tell=lambda method, roles, net, leaves: {"projection_prng_key": method["projection_seed"]},
        hear=lambda raw, roles, net: {"projection_seed": raw.get("projection_prng_key", 0)},
    ),
    "ADALORA": Kind(
        "adalora",
        {
            "init_r": ("init_rank", 12), "target_r": ("target_rank", 8), "lora_alpha": ("alpha", 8.0), "lora_dropout": ("dropout", 0.0),
            "deltaT": ("every", 1), "beta1": ("beta1", 0.85), "beta2": ("beta2", 0.85), "orth_reg_weight": ("orthogonal", 0.5),
        },
        {"a": Part("lora_A"), "e": Part("lora_E", lambda x, role: x[:, None], np.ravel), "b": Part("lora_B")},
        said=(*TARGETS, "rank_pattern"), neutral={"bias": ("none",)},
        # When ranks are pruned says nothing about those that are left; PEFT reads no directory without it.
        inert=("tinit", "tfinal", "total_step", "r", "init_lora_weights", "megatron_core", "qalora_group_size", "layers_pattern"),
        constant={"bias": "none", "init_lora_weights": True, "tinit": 0, "tfinal": 0, "total_step": 1},
        opened=Grown, tell=_tell_adalora,
    ),
    "IA3": Kind(
        "ia3", {},
        {"scale": Part("ia3_l", lambda x, role: x[None] if inside(role) else x[:, None], np.ravel)},
        said=(*TARGETS, "feedforward_modules"), inert=("init_ia3_weights",), constant={"init_ia3_weights": True},
        tell=lambda method, roles, net, leaves: {"feedforward_modules": spell(filter(inside, roles), net, ends)}, hear=_hear_ia3,
    ),
    "LOHA": Kind(
        "loha", {"r": ("rank", 8), "alpha": ("alpha", 8.0)}, {name: Part(f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
        conv=False, said=TARGETS, neutral=NO_DROPOUT, inert=("init_weights", "layers_pattern"), constant={"init_weights": True},
        tell=_tell_loha,
    ),
    "LOKR": Kind(
        "lokr",
        {"r": ("rank", 8), "alpha": ("alpha", 8.0), "decompose_factor": ("factor", -1), "decompose_both": ("decompose_both", False)},
        {name: Part(f"lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
        conv=False, said=TARGETS, neutral=NO_DROPOUT, inert=("init_weights", "layers_pattern", "rank_dropout_scale"),
        constant={"init_weights": True},
    ),
    "PROMPT_TUNING": Kind(
        "prompt", LENGTH, pack=PROMPT, said=(*SIZES, "modules_to_save"), inert=TEXT, constant={"prompt_tuning_init": "RANDOM"},
    ),
    "P_TUNING": Kind(
        "p_tuning", LENGTH, pack=PROMPT, reads_as="prompt", said=(*SIZES, "modules_to_save"), inert=ENCODER,
        constant={"encoder_reparameterization_type": "MLP", "encoder_num_layers": 2, "encoder_dropout": 0.0},
    ),
    "PREFIX_TUNING": Kind(
        "prefix", LENGTH, pack=Pack(_write_prefix, _read_prefix, _tell_prefix), said=(*SIZES, "modules_to_save"),
        inert=("encoder_hidden_size", "prefix_projection", "init_weights"), constant={"prefix_projection": False},
    ),
    "TRAINABLE_TOKENS": Kind(
        "tokens", {}, {}, {"rows": Part("trainable_tokens_delta", lambda x, role: x, np.asarray, tied="trainable_tokens_delta")},
        said=(*TARGETS, "token_indices"), inert=("init_weights",), constant={"init_weights": True},
        tell=lambda method, roles, net, leaves: {"token_indices": list(method["ids"])}, hear=_hear_ids,
    ),
    "LN_TUNING": Kind("partial", {}, norms=True, said=TARGETS, opened=lambda raw, tensors: Copied(tensors)),
}  # fmt: skip
