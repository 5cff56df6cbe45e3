"""Package metadata: what `pip install` needs to know. Tool settings are in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="tuning",
    version="0.1.0",
    description="Tuning of language models in JAX",
    python_requires=">=3.11",
    packages=find_packages(include=["tuning", "tuning.*"]),
    package_data={"tuning.plan": ["*.json"], "tuning.sweep": ["*.html"]},
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
        "scipy>=1.14",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "tokenizers>=0.22",
        "transformers>=5.0",
    ],
    extras_require={
        "cuda": ["jax[cuda13]"],
        "cuda-compiler": ["jax-cuda13-plugin>=0.10"],  # for plans alone: without CUDA's libraries it compiles and cannot run
        "tpu": ["jax[tpu]"],
        "report": ["matplotlib>=3.9", "tensorboard>=2.17"],  # curves of `tuning compare` as PNG, and what reads the events
        "search": ["optuna>=5.0", "sqlalchemy>=2.1", "cmaes>=0.13"],  # --search=gp computes with torch, which whoever wants it installs
        "postgres": ["psycopg[binary]>=3.3"],  # of --storage=postgresql+psycopg://...
        "wandb": ["wandb>=0.20"],
        "mlflow": ["mlflow>=2.16"],
        # torch is pinned: the tests compare with what it computes.
        "test": [
            "torch==2.13.0",
            "cmaes>=0.13",
            "jsonschema>=4.20",
            "matplotlib>=3.9",
            "optuna>=5.0",
            "peft>=0.18",
            "psycopg[binary]>=3.3",
            "pyright[nodejs]",
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "qwix>=0.1.8",
            "ruff",
            "setuptools>=64",
            "sqlalchemy>=2.1",
            "tensorboard>=2.17",
        ],
    },
)
