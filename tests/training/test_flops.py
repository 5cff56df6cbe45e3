"""FLOPs per token against formulas, against published throughputs, and against what a model of ours is made of."""

import itertools
import math
import types

import pytest

from tuning.core import tree
from tuning.models import network, transformer
from tuning.training.flops import flops_per_token, peak_flops

# L, D, F, H, head width, KV, V, tied
LLAMA = {
    "1B": (16, 2048, 8192, 32, 64, 8, 128256, True),
    "3B": (28, 3072, 8192, 24, 128, 8, 128256, True),
    "8B": (32, 4096, 14336, 32, 128, 8, 128256, False),
    "70B": (80, 8192, 28672, 64, 128, 8, 128256, False),
    "405B": (126, 16384, 53248, 128, 128, 8, 128256, False),
}


def model(name, rank=0, cuts=()):
    """(shapes of the leaves, forward attention FLOPs per token and unit of length) of a published model, its linear layers adapted."""
    L, D, F, H, hd, KV, V, tied = LLAMA[name]
    sizes = {"attn/q": (D, H * hd), "attn/k": (D, KV * hd), "attn/v": (D, KV * hd), "attn/o": (H * hd, D)}
    sizes |= {"mlp/gate": (D, F), "mlp/up": (D, F), "mlp/down": (F, D)}
    leaves = {"embed/table": (V, D), "norm/scale": (D,)} | ({} if tied else {"head/kernel": (D, V)})
    edges = (0, *cuts, L)
    for start, stop in itertools.pairwise(edges):
        block = f"blocks/{start}-{stop - 1}"
        leaves |= {f"{block}/attn_norm/scale": (stop - start, D), f"{block}/attn/q/bias": (stop - start, H * hd)}
        for role, (inner, outer) in sizes.items():
            leaves[f"{block}/{role}/kernel"] = (stop - start, inner, outer)
            if rank:
                leaves |= {
                    f"{block}/{role}/adapter/a": (stop - start, inner, rank),
                    f"{block}/{role}/adapter/b": (stop - start, rank, outer),
                }
    return leaves, 2 * L * H * hd


def flops(name, length, tuned, rank=0, cuts=()):
    leaves, attention = model(name, rank, cuts)
    return flops_per_token(leaves, tuned, attention * length)


def everything(name):
    return True


def nothing(name):
    return False


def adapters(name):
    return "/adapter/" in name


@pytest.mark.parametrize(
    "name, full, lora, forward", [("8B", 48.25, 33.49, 16.08), ("70B", 433.12, 295.36, 144.37), ("3B", 21.39, 15.11, 7.13)]
)
def test_full_tuning_lora_and_evaluation_of_published_sizes(name, full, lora, forward):
    found = [flops(name, 4096, everything), flops(name, 4096, adapters, rank=16), flops(name, 4096, nothing)]
    assert [round(x / 1e9, 2) for x in found] == [full, lora, forward]


@pytest.mark.parametrize(
    "name, length, tokens_per_second, teraflops, tolerance",
    [
        ("70B", 8192, 2686.98, 1207.05, 1e-3),
        ("70B", 8192, 4127.56, 1854.19, 1e-3),
        ("70B", 8192, 2670.55, 1199.67, 1e-3),
        ("70B", 8192, 4121.02, 1851.25, 1e-3),
        ("70B", 131072, 963.03, 897.94, 1e-3),
        ("70B", 131072, 1087.99, 1014.45, 1e-3),
        ("405B", 8192, 499.77, 1261.40, 1e-3),
        ("405B", 8192, 763.54, 1927.15, 1e-3),
        ("8B", 8192, 14451, 744, 5e-3),  # the published value is rounded
        ("70B", 4096, 1638, 710, 5e-3),
        ("70B", 8192, 866.77, 389, 5e-3),
    ],
)
def test_published_throughputs_of_full_tuning_are_reproduced(name, length, tokens_per_second, teraflops, tolerance):
    assert flops(name, length, everything) * tokens_per_second / 1e12 == pytest.approx(teraflops, rel=tolerance)


@pytest.mark.parametrize("name", ["1B", "8B"])
def test_every_way_of_tuning_follows_its_formula(name):
    L, D, F, H, hd, KV, V, tied = LLAMA[name]
    linear = L * (2 * D * H * hd + 2 * D * KV * hd + 3 * D * F)
    matrices, lora, attention = linear + D * V, L * 16 * (2 * (D + H * hd) + 2 * (D + KV * hd) + 3 * (D + F)), 2 * L * 100 * H * hd
    at = lambda tuned, **k: flops(name, 100, tuned, **k)  # noqa: E731
    assert at(nothing) == 2 * matrices + attention
    assert at(everything) == 6 * matrices + 3 * attention
    assert at(adapters, rank=16) == 4 * matrices + 6 * lora + 3 * attention
    assert at(lambda n: n.endswith("scale")) == 4 * matrices + 3 * attention
    assert at(lambda n: n.endswith("bias")) == 4 * matrices + 3 * attention
    assert at(lambda n: n == "norm/scale") == 2 * linear + 4 * D * V + attention
    if tied:  # the table is below all layers, and the head's matrix
        assert at(lambda n: n.startswith("embed")) == 4 * linear + 6 * D * V + 3 * attention
    else:
        assert at(lambda n: n.startswith("head")) == 2 * linear + 4 * D * V + attention
        assert at(lambda n: n.startswith("embed")) == 4 * matrices + 3 * attention
        assert at(lambda n: adapters(n) or n.startswith("head"), rank=16) == 4 * matrices + 2 * D * V + 6 * lora + 3 * attention


@pytest.mark.parametrize("last", [1, 4, 15, 16])
def test_the_last_layers_alone_spare_the_backward_pass_below_them(last):
    L, D, F, H, hd, KV, V, _ = LLAMA["1B"]
    linear, attention = L * (2 * D * H * hd + 2 * D * KV * hd + 3 * D * F), 2 * L * 100 * H * hd
    cuts = (L - last,) if last < L else ()
    found = flops("1B", 100, lambda n: n.startswith(f"blocks/{L - last}-"), cuts=cuts)
    assert found == pytest.approx(2 * linear + 4 * D * V + attention + last / L * (4 * linear + 2 * attention), rel=1e-12)


def test_an_adapter_in_one_middle_segment_needs_the_gradient_from_there_up():
    leaves, attention = model("1B", rank=8, cuts=(4, 8))
    middle = flops_per_token(leaves, lambda n: n.startswith("blocks/4-7") and adapters(n), attention)
    upper = flops_per_token(leaves, lambda n: n.startswith("blocks/8-15") and adapters(n), attention)
    lower = flops_per_token(leaves, lambda n: n.startswith("blocks/0-3") and adapters(n), attention)
    assert upper < middle < lower
    first = "blocks/0-3/attn/q/adapter/a"  # one leaf at the bottom costs the whole way down; its neighbours add their own gradients
    others = sum(math.prod(shape) for n, shape in leaves.items() if n.startswith("blocks/0-3") and adapters(n) and n != first)
    assert lower == flops_per_token(leaves, lambda n: n == first, attention) + 2 * others


@pytest.mark.parametrize("tied", [True, False])
def test_the_leaves_of_a_model_of_ours_are_all_recognised(tied):
    config = transformer.TransformerConfig(50, 16, 4, 4, 2, 8, 24, 64, tied=tied, added=(50, 3))
    abstract = network.build(config.construct(transformer.Sites(), cuts=(2,))).abstract
    leaves = {name: leaf.shape for name, leaf in tree.flatten(abstract).items()}
    linear = 4 * (2 * 16 * 32 + 2 * 16 * 16 + 3 * 16 * 24)
    head = 16 * 53  # the added tokens too
    assert flops_per_token(leaves, everything, 10.0) == 6 * (linear + head) + 30
    assert flops_per_token(leaves, nothing, 10.0) == 2 * (linear + head) + 10


@pytest.mark.parametrize(
    "kind, teraflops",
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
    ],
)
def test_the_peak_of_a_device_is_its_data_sheets(kind, teraflops):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == teraflops * 1e12


@pytest.mark.parametrize(
    "kind", ["cpu", "TPU v3", "TPU v4 lite", "NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L40", "AMD MI300X"]
)
def test_an_unknown_device_has_no_peak(kind):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) is None
