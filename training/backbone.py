"""The language model training starts from: a pretrained one from disk, or the small one made here from scratch.

Both ways end the same: tokenizer and model of Hugging Face, cell tokens installed, rows initialised from the codebooks.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rvqa.errors import InputError
from rvqa.vocabulary import CellVocabulary, install_rows

END, PAD = "<|endoftext|>", "<|pad|>"


def small_tokenizer(texts: Iterable[str], *, vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on these texts; any other text still encodes, byte by byte."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sorted(set(texts)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD)


def small_model(tokenizer: PreTrainedTokenizerBase, vocabulary: CellVocabulary, *, seed: int) -> Qwen3ForCausalLM:
    """Qwen3 with about 0.4 million float32 parameters and random weights, for two cores and a few minutes."""
    config = Qwen3Config(
        vocab_size=vocabulary.base,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).float()


def load_backbone(
    base: str | Path | None, texts: Iterable[str], codebooks_MKD: torch.Tensor, *, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, CellVocabulary]:
    """Language model ready for training on cells.

    Parameters
    ----------
    base
        Directory or name of a causal language model that Hugging Face opens without remote code, such as
        `Qwen/Qwen3-4B-Thinking-2507`; None makes the small one.
    texts
        What the small model's tokenizer is trained on; not read for a pretrained one.
    codebooks_MKD
        Codewords, float32 [M, K, D].
    seed
        Of the small model's weights and the new rows.

    Raises
    ------
    rvqa.errors.InputError
        `base` cannot be opened.
    """
    levels, entries, _ = codebooks_MKD.shape
    if base is None:
        tokenizer: PreTrainedTokenizerBase = small_tokenizer(texts)
        vocabulary = CellVocabulary.install(tokenizer, levels=levels, entries=entries)
        model: PreTrainedModel = small_model(tokenizer, vocabulary, seed=seed)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(base)
            model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", use_safetensors=True)  # never a pickle
        except (OSError, ValueError) as error:
            raise InputError(f"{base} cannot be opened as a causal language model: {error}") from error
        vocabulary = CellVocabulary.install(tokenizer, levels=levels, entries=entries)
    install_rows(model, vocabulary, codebooks_MKD, seed=seed)
    return model, tokenizer, vocabulary
