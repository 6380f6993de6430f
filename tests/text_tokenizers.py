"""A real tokenizer.json, made as T5's is."""

import string

WORDS = ("red", "fox", "in", "the", "snow", "house", "sea", "night", "blue", "bird")


def save_tokenizer(path, end=True):
    """Write a Unigram tokenizer of at most 80 tokens; 0 is padding, 1 the end, 2 unknown."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(f"▁{word}", -3.0) for word in WORDS]
    vocabulary += [(letter, -6.0) for letter in string.ascii_lowercase + string.digits + ",.-"]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("  ", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
        )
    # Some files on the hub ask for these; they must have no influence.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=20)
    tokenizer.save(str(path))
    return path
