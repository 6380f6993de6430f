"""The text side of text-to-image models: tokens, features, and files of features."""

from amskv_jax.models.infinity.prompts import TextFeatures
from amskv_jax.text.encoder import TextEncoder
from amskv_jax.text.features import read_features, write_features
from amskv_jax.text.prompts import PromptCutWarning, PromptTokenizer, read_prompts
from amskv_jax.text.reader import PromptReader, Texts

__all__ = [
    "PromptCutWarning",
    "PromptReader",
    "PromptTokenizer",
    "TextEncoder",
    "TextFeatures",
    "Texts",
    "read_features",
    "read_prompts",
    "write_features",
]
