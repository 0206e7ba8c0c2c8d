"""The language model training starts from: a pretrained one from disk, or the small one made here from scratch.

Both ways end the same: tokenizer and model of Hugging Face, cell tokens installed, rows initialised from the codebooks.
"""

import re
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
from rvqa.io.files import sentence
from rvqa.language.opening import NO_MODEL, open_language_model, quiet_transformers
from rvqa.language.rows import install_rows
from rvqa.language.vocabulary import CellVocabulary

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

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


def open_base(base: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a pretrained causal language model: never a pickle, no code of its own.

    Parameters
    ----------
    base
        Directory, or name of a model on Hugging Face's hub.

    Raises
    ------
    rvqa.errors.InputError
        No such directory or name, no safetensors, or nothing that transformers opens.
    """
    path = Path(base)
    if path.is_dir():
        return open_language_model(path, exact=False)
    if not _HUB_NAME.fullmatch(str(base)):
        raise InputError(
            f"There is no directory {base} to start from. Give a model's directory, or its name on the hub."
        )
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                base, dtype="auto", use_safetensors=True, trust_remote_code=False
            )
    except NO_MODEL as error:
        raise InputError(
            f"{base} is not a directory here, and on the hub it cannot be opened as a causal language model: "
            f"{sentence(error)} Give the directory of a model that was downloaded."
        ) from error
    return model, tokenizer


def load_backbone(
    base: str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase] | None,
    texts: Iterable[str],
    codebooks_MKD: torch.Tensor,
    *,
    seed: int,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, CellVocabulary]:
    """Language model ready for training on cells.

    Parameters
    ----------
    base
        Directory or name of a causal language model that Hugging Face opens without remote code, such as
        `Qwen/Qwen3-4B-Thinking-2507`, or what `open_base` gave; None makes the small one.
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
        model, tokenizer = base if isinstance(base, tuple) else open_base(base)
        vocabulary = CellVocabulary.install(tokenizer, levels=levels, entries=entries)
    install_rows(model, vocabulary, codebooks_MKD, seed=seed)
    return model, tokenizer, vocabulary
