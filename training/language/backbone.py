"""The language model that training starts from: a pretrained one, or a small one made here from scratch.

Both give a Hugging Face tokenizer and model with the cell tokens installed and their rows initialised from codebooks.
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
    """Train a byte-level BPE on these texts; it encodes any other text as well, byte by byte."""
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
    """Open a pretrained causal language model, without a pickle and without running code that comes with it.

    Parameters
    ----------
    base
        Directory of a model, or its name on the Hugging Face hub.

    Raises
    ------
    rvqa.errors.InputError
        The directory or name does not exist, has no safetensors, or holds nothing that transformers opens.
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
            f"{sentence(error)} Give the directory of a downloaded model."
        ) from error
    return model, tokenizer


def load_backbone(
    base: str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase] | None,
    texts: Iterable[str],
    codebooks_MKD: torch.Tensor,
    *,
    seed: int,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, CellVocabulary]:
    """Make a language model ready for training on cells.

    Parameters
    ----------
    base
        Directory or name of a causal language model that Hugging Face opens without remote code, such as
        `Qwen/Qwen3-4B-Thinking-2507`, or the result of `open_base`. None makes the small one.
    texts
        Texts that train the small model's tokenizer; a pretrained model does not use them.
    codebooks_MKD
        Codewords, float32 [M, K, D].
    seed
        Seed of the small model's weights and of the new rows.

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
