"""Packaging of ross_mcore. Versions that were tested together are pinned in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="ross_mcore",
    version="0.2.0",
    description="Model-parallel training of ROSS (reconstructive visual instruction tuning) on Megatron-Core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["ross_mcore", "ross_mcore.*"]),
    package_data={
        "ross_mcore": [
            *("recipes/*", "recipes/*/*.yaml", "serving/page/*"),
            *("run_report/*.html", "run_report/*.css", "run_report/*.js"),
        ]
    },
    entry_points={"console_scripts": ["ross = ross_mcore.__main__:main"]},
    install_requires=[
        "torch>=2.7",
        "megatron-core==0.16.1",
        "transformers>=5.23",
        "diffusers>=0.36",
        "webdataset>=1.0",
        "tokenizers",
        "safetensors>=0.5",
        "sentencepiece",
        "isal",
        "numpy",
        "pillow>=11.3",  # the first with AVIF
        "pyyaml",
        "rich",
        "tensorboard",
        "psutil",
    ],
    extras_require={
        # Apex is not on PyPI: build it from its repository with --cpp_ext and --cuda_ext. It is optional; it brings
        # fused gradient accumulation. Transformer Engine and flash-attn compile against the installed torch and CUDA.
        # Transformer Engine takes flash-attn up to 2.8.1 (2.9) or 2.8.3 (2.10, 2.11), on Blackwell from 2.7.3, and does
        # without any other.
        "gpu": ["transformer-engine[pytorch]>=2.9,<2.12", "flash-attn>=2.7.3,<=2.8.1"],
        # Shards behind URLs (s3://, gs://, https://); fsspec itself comes with torch.
        "remote": ["fsspec[http,s3,gs]"],
        # Pictures in HEIC, as phones save them.
        "heif": ["pillow-heif>=1.0"],
        # Records in parquet files, and data sets of Hugging Face's datasets.
        "parquet": ["pyarrow"],
        # `ross serve`: an OpenAI-compatible server and its page.
        "serve": ["fastapi>=0.115", "uvicorn>=0.30"],
        # BLEU and chrF of captions in `ross eval`.
        "eval": ["sacrebleu>=2.4"],
        # Services that take a run's figures (--tracker).
        "wandb": ["wandb>=0.20"],
        "trackio": ["trackio>=0.20"],
        "mlflow": ["mlflow>=3"],
        "dev": [
            *("pillow-heif", "pyarrow", "fastapi", "uvicorn", "openai", "sacrebleu", "pytest>=8", "pytest-timeout"),
            *("hypothesis", "ruff", "mypy", "types-PyYAML"),
        ],
    },
)
