"""Cached generation against repeated full forward passes and against transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tuning.core import mesh, tree
from tuning.core.types import Batch, Inputs
from tuning.decode.generate import generate
from tuning.models import network
from tuning.models.encoder_decoder import EncoderDecoderConfig
from tuning.models.transformer import TransformerConfig
from tuning.nn.block import Kind
from tuning.nn.sites import NOTHING

CUTS = (1,)
CONFIG = TransformerConfig(
    vocab_size=61, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, hidden=48, max_length=128, kinds=(Kind(window=5),) * 3
)
PROMPTS = [[5, 17, 9], [40], list(range(2, 25)), [7, 7, 7, 60, 1, 33]]
N = 12


@pytest.fixture(scope="module")
def model():
    """(extend, empty_cache, params) of a random decoder with a cut in its stack and a sliding window."""
    net = network.build(CONFIG.construct(NOTHING, CUTS))
    return net.extend, functools.partial(CONFIG.empty_cache, cuts=CUTS), jax.jit(net.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def greedy(model):
    return generate(*model, PROMPTS, max_new_tokens=N)


def by_full_passes(model, prompt):
    """N greedy tokens, each from a forward pass over everything before it."""
    net, params = model[0].__self__, model[2]

    @jax.jit
    def following(tokens_1T, length):
        places_1T = jnp.arange(tokens_1T.shape[1])[None]
        batch = Batch(tokens_1T, tokens_1T, tokens_1T, (places_1T < length).astype(jnp.int32), places_1T)
        hidden_1TD, head, _ = net.apply(params, batch)
        return head(hidden_1TD[0, length - 1]).argmax()

    tokens = list(prompt)
    for _ in range(N):
        row = np.zeros((1, 40), np.int32)
        row[0, : len(tokens)] = tokens
        tokens.append(int(following(row, len(tokens))))
    return tokens[len(prompt) :]


def test_cached_greedy_tokens_are_those_of_repeated_full_passes(model, greedy):
    assert greedy == [by_full_passes(model, prompt) for prompt in PROMPTS]
    assert len({token for row in greedy for token in row}) > 10  # a model that repeats one token would prove little


def test_greedy_output_does_not_depend_on_the_rest_of_the_batch(model, greedy):
    assert [generate(*model, [prompt], max_new_tokens=N)[0] for prompt in PROMPTS] == greedy
    long = list(range(1, 61)) * 2  # another bucket of prompt lengths
    assert generate(*model, [*PROMPTS, long], max_new_tokens=N)[: len(PROMPTS)] == greedy


@pytest.fixture(scope="module")
def sampled(model):
    return functools.partial(generate, *model, max_new_tokens=N, temperature=1.0, top_k=30, top_p=0.95, seed=4)


def test_sampled_output_does_not_depend_on_the_rest_of_the_batch(sampled):
    together = sampled(PROMPTS)
    assert sampled([PROMPTS[3], *PROMPTS[1:3], [3]])[1:3] == together[1:3]
    assert sampled([PROMPTS[0], list(range(1, 61)) * 2])[0] == together[0]  # another bucket of prompt lengths


def test_a_seed_repeats_its_samples_and_another_seed_does_not(sampled):
    assert sampled(PROMPTS) == sampled(PROMPTS)
    assert sampled(PROMPTS) != sampled(PROMPTS, seed=5)
    first, second, *_ = sampled([PROMPTS[0]] * 4)
    assert first != second


def test_sampling_continues_where_an_earlier_call_ended(sampled):
    whole = sampled(PROMPTS)
    start = [row[:5] for row in whole]
    rest = [row[: N - 5] for row in sampled([[*prompt, *new] for prompt, new in zip(PROMPTS, start, strict=True)])]
    assert rest == [row[5:] for row in whole]


@pytest.mark.parametrize("place", [0, 4, N - 1])
def test_a_sequence_ends_before_its_first_stop_token(model, greedy, place):
    stop = (greedy[0][place], 61)
    cut = [row[: next((i for i, token in enumerate(row) if token in stop), N)] for row in greedy]
    assert generate(*model, PROMPTS, max_new_tokens=N, stop=stop) == cut


def test_the_loop_ends_when_every_sequence_has_met_a_stop_token(model, greedy):
    extend, empty_cache, params = model
    calls = []

    def counted(*inputs):
        jax.debug.callback(lambda: calls.append(1))
        return extend(*inputs)

    stop = (greedy[0][3],)
    shown = generate(counted, empty_cache, params, PROMPTS[:1], max_new_tokens=N, stop=stop)[0]
    jax.effects_barrier()
    assert len(calls) == len(shown) + 1 < N  # the pass over the prompt gives the first token


def test_what_fills_the_padding_changes_nothing(model, greedy):
    assert generate(*model, PROMPTS, max_new_tokens=N, pad=33) == greedy


def test_prompts_of_one_bucket_share_one_compiled_program(model, greedy):
    extend, empty_cache, params = model
    traced = []

    def counted(*inputs):
        traced.append(1)
        return extend(*inputs)

    call = functools.partial(generate, counted, empty_cache, params, max_new_tokens=N)
    call([[1, 2, 3], [4]])
    once = len(traced)
    call([[9], list(range(1, 61))], seed=3, pad=2)
    assert len(traced) == once


def test_generation_on_a_mesh_gives_the_same_tokens(model, greedy):
    extend, empty_cache, params = model
    where = mesh.mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(where):
        split = jax.device_put(params, mesh.shardings(params, extend.__self__.axes, where))
        assert generate(extend, empty_cache, split, PROMPTS, max_new_tokens=N) == greedy


@pytest.mark.parametrize(
    "prompts, settings, message",
    [
        ([[1], []], {}, r"prompts\[1\] is empty.* Begin it"),
        ([[1] * 100], {"max_new_tokens": 29, "max_length": 128}, r"has 100 tokens; with max_new_tokens=29 .* max_length=128\. Shorten"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be positive. Set"),
        ([[1]], {"seed": -1}, "seed=-1 must lie in .* Set"),
        ([[1]], {"temperature": -0.5}, "temperature=-0.5 must"),
        ([[1]], {"top_k": -2}, "top_k=-2 must"),
        ([[1]], {"top_p": 0.0}, "top_p=0.0 must"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(model, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(*model, prompts, **{"max_new_tokens": N} | settings)


def test_a_prompt_may_fill_max_length_exactly_and_no_prompts_have_no_answers(model):
    assert [len(row) for row in generate(*model, [[1] * 52] * 4, max_new_tokens=N, max_length=64)] == [N] * 4
    assert generate(*model, [], max_new_tokens=N) == []


def llama_params(llama, layers):
    """The tree of our decoder, uncut, from the tensors of transformers' Llama: kernels are transposed and stacked over the layers."""
    tensors = {name: tensor.numpy() for name, tensor in llama.state_dict().items()}
    stacked = lambda name: np.stack([tensors[f"model.layers.{i}.{name}.weight"] for i in range(layers)])  # noqa: E731
    block = f"blocks/0-{layers - 1}"
    leaves = {f"{block}/attn/{x}/kernel": stacked(f"self_attn.{x}_proj").swapaxes(1, 2) for x in "qkvo"}
    leaves |= {f"{block}/mlp/{x}/kernel": stacked(f"mlp.{x}_proj").swapaxes(1, 2) for x in ("gate", "up", "down")}
    leaves[f"{block}/attn_norm/scale"] = stacked("input_layernorm")
    leaves[f"{block}/mlp_norm/scale"] = stacked("post_attention_layernorm")
    leaves["embed/table"], leaves["norm/scale"] = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
    leaves["head/kernel"] = tensors["lm_head.weight"].T
    return tree.unflatten(leaves)


def test_greedy_tokens_are_those_of_transformers():
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    llama = LlamaForCausalLM(LlamaConfig(**sizes, head_dim=8, max_position_embeddings=128, rms_norm_eps=1e-6, initializer_range=0.3)).eval()
    config = TransformerConfig(vocab_size=61, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48, max_length=128)
    net = network.build(config.construct(NOTHING))
    ours = generate(net.extend, config.empty_cache, llama_params(llama, 2), PROMPTS, max_new_tokens=N)

    width = max(map(len, PROMPTS))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    theirs = llama.generate(tokens, attention_mask=mask, max_new_tokens=N, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours == theirs[:, width:].tolist()
    assert len({token for row in ours for token in row}) > 10


# Encoder-decoders.

SIDE = dict(vocab_size=61, width=32, heads=4, kv_heads=4, head_dim=8, hidden=48, max_length=128, positions="relative", relative=(8, 20))
BOTH = EncoderDecoderConfig(TransformerConfig(layers=2, causal=False, **SIDE), TransformerConfig(layers=3, **SIDE), start=0)
INPUTS = [[5, 17, 9], [40], list(range(2, 45)), [7, 7, 7, 60, 1, 33]]
STARTS = [[0], [0], [0], [0, 12, 44]]


@pytest.fixture(scope="module")
def two_sided():
    """(extend, empty_cache, params, remember) of a random encoder-decoder with a cut in its decoder."""
    net = network.build(BOTH.construct(NOTHING, CUTS))
    params = jax.jit(net.init)(jax.random.key(0))
    louder = lambda name, x: x * (10 if name.endswith("table") else 3 if "/attn/" in name or "/cross/" in name else 1)  # noqa: E731
    params = tree.map_named(louder, params)  # so that tokens and distances count
    return net.extend, functools.partial(BOTH.empty_cache, cuts=CUTS), params, net.remember


def answers(two_sided, starts=STARTS, inputs=INPUTS, **settings):
    *model, remember = two_sided
    return generate(*model, starts, remember=remember, inputs=inputs, **{"max_new_tokens": N} | settings)


@pytest.fixture(scope="module")
def answered(two_sided):
    return answers(two_sided)


def test_an_encoder_decoders_greedy_tokens_are_those_of_repeated_full_passes(two_sided, answered):
    net, params = two_sided[0].__self__, two_sided[2]

    @jax.jit
    def following(tokens_1T, read_1S, length, size):
        at_1T, at_1S = jnp.arange(tokens_1T.shape[1])[None], jnp.arange(read_1S.shape[1])[None]
        real_1T = (at_1T < length).astype(jnp.int32)
        inputs = Inputs(read_1S, (at_1S < size).astype(jnp.int32), at_1S)
        hidden_1TD, head, _ = net.apply(params, Batch(tokens_1T, tokens_1T, real_1T, real_1T, at_1T, inputs=inputs))
        return head(hidden_1TD[0, length - 1]).argmax()

    for start, read, shown in zip(STARTS, INPUTS, answered, strict=True):
        tokens, row, source = list(start), np.zeros((1, 16), np.int32), np.zeros((1, 48), np.int32)
        source[0, : len(read)] = read
        for _ in range(N):
            row[0, : len(tokens)] = tokens
            tokens.append(int(following(row, source, len(tokens), len(read))))
        assert shown == tokens[len(start) :]
    assert len({token for row in answered for token in row}) > 10  # a model that repeats one token would prove little
    assert answered[0] != answered[1]  # the same start: what the encoder read makes the difference


def test_an_answer_does_not_depend_on_the_rest_of_the_batch_nor_on_padding(two_sided, answered):
    assert [answers(two_sided, [start], [read])[0] for start, read in zip(STARTS, INPUTS, strict=True)] == answered
    long = list(range(1, 61)) * 2  # another bucket of input lengths
    assert answers(two_sided, [*STARTS, [0]], [*INPUTS, long], pad=33)[: len(INPUTS)] == answered


def test_an_encoder_decoder_on_a_mesh_gives_the_same_tokens(two_sided, answered):
    extend, empty_cache, params, remember = two_sided
    where = mesh.mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(where):
        split = jax.device_put(params, mesh.shardings(params, extend.__self__.axes, where))
        assert answers((extend, empty_cache, split, remember)) == answered


@pytest.mark.parametrize(
    "inputs, settings, message",
    [
        (None, {}, "with `remember` and `inputs`"),
        ([[5]], {}, "1 inputs for 4 prompts"),
        ([[5], [], [5], [5]], {}, r"inputs\[1\] is empty"),
        ([[5], [5], [5], [5] * 20], {"max_length": 19}, r"inputs\[3\] has 20 tokens, which exceeds max_length=19\. Shorten"),
    ],
)
def test_inputs_that_cannot_be_read_are_refused(two_sided, inputs, settings, message):
    with pytest.raises(ValueError, match=message):
        answers(two_sided, inputs=inputs, **settings)
