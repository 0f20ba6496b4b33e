"""Fine-tune a language model with QLoRA: rows in a bucket go in, a tuned adapter comes out."""

__version__ = "0.1.0"
