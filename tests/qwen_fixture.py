"""Small language models for tests: one with the real Qwen3 vocabulary and random weights, and one made without files.

The Qwen3 fixture is Qwen's BPE (151,643 tokens, read from the reference folder), Qwen3's 26 added tokens at ids 151,643
to 151,668, and a random model of 151,936 rows, hidden size 64 and 2 layers with tied embeddings. Its 9.7 M parameters
stand in for Qwen3-4B in tests of vocabulary, masks, Hugging Face and vLLM.
"""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rvqa.language.vocabulary import CellVocabulary

BPE_FILE = "qwen_base_bpe_tokenizer.json.gz"
BPE_SIZE = 151_643  # tokens of the BPE itself
QWEN_SIZE = 151_669  # with the 26 added tokens
QWEN_ROWS = 151_936  # rows of the embedding matrix

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
PLAIN_TOKENS = [  # added with special=False in Qwen3
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]


def qwen_tokenizer(ref_dir: Path | str) -> PreTrainedTokenizerFast:
    """Make a fresh Qwen3 tokenizer (151,669 tokens) from `<ref_dir>/qwen_base_bpe_tokenizer.json.gz`."""
    with gzip.open(Path(ref_dir) / BPE_FILE, "rt", encoding="utf-8") as file:
        content = json.load(file)
    assert len(content["model"]["vocab"]) == BPE_SIZE
    content["added_tokens"] = []  # three of the 26, at their usual ids
    return _wrap(Tokenizer.from_str(json.dumps(content)))


@functools.cache
def qwen_tokenizer_with_cells(ref_dir: Path) -> tuple[PreTrainedTokenizerFast, CellVocabulary]:
    """Make, once, a Qwen3 tokenizer with cell tokens; all tests share it and must not change it."""
    tokenizer = qwen_tokenizer(ref_dir)
    assert len(tokenizer) == QWEN_SIZE
    return tokenizer, CellVocabulary.install(tokenizer)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a fresh tokenizer of 256 bytes and the 26 added tokens of Qwen3, which needs no files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer)


def qwen_model(rows: int = QWEN_ROWS, *, tied: bool = True, seed: int = 0, **settings: Any) -> Qwen3ForCausalLM:
    """Make a random Qwen3 model in evaluation mode; `settings` go to its config. The global random state is kept."""
    config = Qwen3Config(
        **{
            "vocab_size": rows,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": tied,
            "bos_token_id": None,
            "eos_token_id": None,
            **settings,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).eval()


def save_qwen(ref_dir: Path | str, directory: Path | str) -> None:
    """Write the Qwen3 fixture, without cell tokens, as a Hugging Face checkpoint directory."""
    tokenizer = qwen_tokenizer(ref_dir)
    model = qwen_model(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
