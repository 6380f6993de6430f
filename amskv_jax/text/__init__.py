"""The text side of text-to-image models: tokens, features, and files of features."""

from amskv_jax.text.encoder import TextEncoder
from amskv_jax.text.features import TextFeatures, read_features, write_features
from amskv_jax.text.prompts import PromptCutWarning, PromptTokenizer, read_prompts

__all__ = [
    "PromptCutWarning",
    "PromptTokenizer",
    "TextEncoder",
    "TextFeatures",
    "read_features",
    "read_prompts",
    "write_features",
]
