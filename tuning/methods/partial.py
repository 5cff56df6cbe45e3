"""Partial tuning: some leaves learn, the others stay as they are.

Biases alone are BitFit (Ben Zaken et al., 2022, arXiv:2106.10199): parts=("biases",). The head alone: parts=("head",).
"""

from __future__ import annotations

from tuning.core import tree
from tuning.methods import depth
from tuning.methods.method import Method
from tuning.nn.sites import Outline
from tuning.nn.stack import counted_layers

# Positions are embeddings too, T5's relative ones among them, which published checkpoints call a bias.
PARTS = {
    "embeddings": r"(^|/)(embed|positions|types|relative)/(table|added)$",
    "norms": r"(^|/|_)norm/(scale|bias)$",
    "biases": r"/bias$",
    "head": r"^head/",
}


def partial(
    outline: Outline,
    *,
    leaves: str = "",
    parts: tuple[str, ...] = (),
    layers: tuple[int, int] | None = None,
    last_layers: int = 0,
    layer_decay: float = 1.0,
    unfreeze_every: int = 0,
) -> Method:
    """All that one of the first four keys names learns.

    leaves          a regular expression for names of leaves
    parts           names of PARTS: embeddings (of tokens, positions and types), norms, biases (those of norms too), head
    layers          (first, stop): all leaves of the layers from `first` up to, and without, `stop`; an encoder-decoder's are its decoder's
    last_layers     how many layers at the end learn with all their leaves
    layer_decay     what the learning rate is multiplied with from the head down, layer by layer
    unfreeze_every  steps after which one layer more begins to learn, from the top; 0 lets all learn from the start

    Layers below the first one that learns cost no backward pass: the stack is cut there.
    """
    spans, patterns = _spans(outline, layers, last_layers), _patterns(outline, leaves, parts)
    if not spans and not patterns:
        raise ValueError("Partial tuning of nothing: set method.leaves (a regular expression), method.parts, method.layers or last_layers.")

    def chooses(name: str, layer: int | None) -> bool:
        inside = counted_layers(name) is not None and any(layer in span for span in spans)
        return inside or any(tree.matches(pattern, name) for pattern in patterns)

    chosen = {leaf for name in outline.leaves for leaf in depth.by_layer(name) if chooses(name, leaf[1])}

    def tuned(name: str) -> bool:
        learns = {leaf in chosen for leaf in depth.by_layer(name)}
        if len(learns) > 1:
            raise ValueError(f"method.leaves={leaves!r} matches some layers of {name} only. Choose layers with method.layers.")
        return learns.pop()

    cuts = sorted({cut for span in spans for cut in (span.start, span.stop)})
    return Method(tuned=tuned, cuts=tuple(cuts), pace=depth.paces(outline, chosen, layer_decay, unfreeze_every))


def _spans(outline: Outline, layers: tuple[int, int] | None, last_layers: int) -> list[range]:
    """The layers that learn with all their leaves."""
    if not 0 <= last_layers <= outline.layers:
        raise ValueError(f"method.last_layers={last_layers}: the model has {outline.layers} layers.")
    if layers is not None and not (len(layers) == 2 and 0 <= layers[0] < layers[1] <= outline.layers):
        raise ValueError(
            f"method.layers={tuple(layers)} is the first layer and the one behind the last; the model has {outline.layers} layers."
        )
    first = outline.layers - last_layers
    return [*([range(*layers)] if layers else []), *([range(first, outline.layers)] if last_layers else [])]


def _patterns(outline: Outline, leaves: str, parts: tuple[str, ...]) -> list[str]:
    """Regular expressions for the leaves that learn in all layers; each matches something."""
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"method.parts: {unknown[0]!r} is not one of {', '.join(PARTS)}.")
    asked = {**({f"method.leaves={leaves!r}": leaves} if leaves else {}), **{f"method.parts: {part!r}": PARTS[part] for part in parts}}
    for key, pattern in asked.items():
        if not any(tree.matches(pattern, name) for name in outline.leaves):
            hint = " This model has none, or its head is tied to embed/table." if pattern.startswith("^head") else ""
            raise ValueError(f"{key} matches no leaf.{hint} There are: {tree.listing(outline.leaves, 40)}.")
    return list(asked.values())
