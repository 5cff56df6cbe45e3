"""Package metadata: what `pip install` needs to know. Tool settings are in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="tuning",
    version="0.1.0",
    description="Tuning of language models in JAX",
    python_requires=">=3.11",
    packages=find_packages(include=["tuning", "tuning.*"]),
    entry_points={"console_scripts": ["tuning = tuning.__main__:main"]},
    # Lower bounds only: the versions that the tests were first run with.
    install_requires=[
        "absl-py>=2.1",
        "datasets>=5.0",
        "flax>=0.12",
        "grain>=0.2.10",
        "huggingface_hub>=1.0",
        "jax>=0.10",
        "jinja2>=3.1",  # chat templates are written in it
        "ml_collections>=1.0",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.11",
        "protobuf>=4",  # the container of SentencePiece models
        "rich>=13",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "tokenizers>=0.22",
        "transformers>=5.0",
    ],
    extras_require={
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        # torch is pinned: the tests compare with what it computes.
        "test": [
            "torch==2.13.0",
            "peft>=0.18",
            "pyright[nodejs]",
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "qwix>=0.1.8",
            "ruff",
            "setuptools>=64",
        ],
    },
)
