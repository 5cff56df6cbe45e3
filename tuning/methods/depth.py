"""How fast leaves learn by their depth: lower layers more slowly, or later.

A rate that falls by a factor from layer to layer is discriminative fine-tuning, and stages that begin one after the other are gradual
unfreezing (Howard and Ruder, 2018, arXiv:1801.06146). The first has become usual for encoders (Clark et al., 2020, arXiv:2003.10555);
its exponents here are those of BEiT (Bao et al., 2021, arXiv:2106.08254).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tuning.methods.method import Pace
from tuning.nn.sites import Outline
from tuning.nn.stack import apart, layer_range

Leaf = tuple[str, int | None]  # of one layer: its name without its layers, and the layer; None outside the stack


def by_layer(name: str) -> list[Leaf]:
    """The leaves that are stacked in the leaf of this name."""
    bare, layers = apart(name)
    return [(bare, None)] if layers is None else [(bare, layer) for layer in layers]


def paces(outline: Outline, chosen: Iterable[Leaf], layer_decay: float, unfreeze_every: int) -> Callable[[str], Pace]:
    """The pace of each leaf where the `chosen` ones learn.

    Of L layers, layer l has the rate layer_decay ** (L - l) and the embeddings, with all that stands before the layers, have
    layer_decay ** (L + 1). The head, with the norm before it, has the whole rate, and begins at once, together with the highest layer;
    one layer more begins every `unfreeze_every` steps, and the embeddings last. Where nothing is chosen there is no stage. A tied matrix
    is an embedding. The layers of an encoder count as layers below those of its decoder.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"method.layer_decay={layer_decay} is what a rate is multiplied with from layer to layer, above 0 and at most 1.")
    if unfreeze_every < 0:
        raise ValueError(f"method.unfreeze_every={unfreeze_every} counts steps. Set it to 0 to let all leaves learn from the start.")
    below = max((span.stop for name in outline.leaves if name.startswith("encoder/") and (span := layer_range(name))), default=0)
    top = below + outline.layers + 1

    def place(leaf: Leaf) -> int:
        """From 0 for the embeddings over the layers to `top` for the head; a norm behind layers goes with what stands on it."""
        name, layer = leaf
        if layer is not None:
            return 1 + layer + (0 if name.startswith("encoder/") else below)
        return top if name.startswith(("head/", "norm/", "decoder/norm/")) else below + 1 if name.startswith("encoder/norm/") else 0

    stages = {min(place(leaf), top - 1) for leaf in chosen}

    def pace(name: str) -> Pace:
        places = [place(leaf) for leaf in by_layer(name)]
        rates = tuple(layer_decay ** (top - at) for at in places)
        begins = tuple(unfreeze_every * sum(stage > at for stage in stages) for at in places)
        return Pace(rates, begins) if layer_range(name) else Pace(rates[0], begins[0])

    return pace
