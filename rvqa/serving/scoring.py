"""Log probabilities of many answers after a prompt, in one forward pass.

The answers' prefixes make a tree (a trie). Its nodes stand side by side behind the prompt; each sees the prompt and its
own prefixes alone, at the position it would have if its answer stood there alone. What answers share is computed once.

Legend: B prompts, P prompt ids, U nodes, C answers, E their tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS = 50_000_000
"""Entries of the largest block of logits, B x (U + 1) x V."""


class AnswerTree:
    """Answers made ready for a model: sequences of ids, none of them empty."""

    def __init__(self, network: PreTrainedModel, answers: Sequence[Sequence[int]]) -> None:
        nodes: dict[tuple[int, ...], int] = {(): 0}  # the empty prefix is the end of the prompt
        for answer in answers:
            for size in range(1, len(answer)):
                nodes.setdefault(tuple(answer[:size]), len(nodes))
        prefixes = list(nodes)[1:]
        device = network.device
        self.network, self.n_answers = network, len(answers)
        self.id_U = torch.tensor([prefix[-1] for prefix in prefixes], dtype=torch.long, device=device)
        self.depth_U = torch.tensor([len(prefix) - 1 for prefix in prefixes], dtype=torch.long, device=device)
        sees = torch.zeros(len(prefixes), len(prefixes), dtype=torch.bool)
        for row, prefix in enumerate(prefixes):
            sees[row, [nodes[prefix[:size]] - 1 for size in range(1, len(prefix) + 1)]] = True
        self.sees_UU = sees.to(device)
        steps = [
            (nodes[tuple(answer[:i])], token_id, row)
            for row, answer in enumerate(answers)
            for i, token_id in enumerate(answer)
        ]
        self.node_E, self.id_E, self.answer_E = (torch.tensor(each, device=device) for each in zip(*steps, strict=True))
        self.most_prompts = max(1, LOGITS // (len(nodes) * network.get_output_embeddings().weight.shape[0]))

    @torch.inference_mode()
    def scores(self, prompts_BP: torch.Tensor, pad_B: torch.Tensor | None = None) -> torch.Tensor:
        """Log probability of every answer after every prompt, in nats, float32 [B, C].

        Parameters
        ----------
        prompts_BP
            int64, padded on the left, on the model's device.
        pad_B
            How many ids of each row are padding; None where none is.
        """
        (B, P), U, device = prompts_BP.shape, len(self.id_U), prompts_BP.device
        dtype = self.network.dtype
        S = P + U
        sees_SS = torch.ones(S, S, dtype=torch.bool, device=device).tril()
        sees_SS[P:, P:] = self.sees_UU
        sees_BSS, position_BS = sees_SS[None], torch.cat([torch.arange(P, device=device), P + self.depth_U])[None]
        if pad_B is not None:
            place_S = torch.arange(S, device=device)
            itself_SS = torch.eye(S, dtype=torch.bool, device=device)  # a row of padding must see something
            sees_BSS = (sees_BSS & (place_S >= pad_B[:, None])[:, None]) | itself_SS
            position_BS = (position_BS - pad_B[:, None]).clamp_min(0)
        mask_BSS = torch.zeros(sees_BSS.shape, dtype=dtype, device=device)
        mask_BSS.masked_fill_(~sees_BSS, torch.finfo(dtype).min)
        hidden_BSH = self.network.get_decoder()(
            input_ids=torch.cat([prompts_BP, self.id_U.expand(B, U)], dim=1),
            attention_mask=mask_BSS[:, None].expand(B, 1, S, S),
            position_ids=position_BS.expand(B, S),
            use_cache=False,
        ).last_hidden_state
        logits_BUV = self.network.get_output_embeddings()(hidden_BSH[:, P - 1 :])  # the prompt's end, then the nodes
        log_BE = logits_BUV[:, self.node_E, self.id_E].float() - logits_BUV.float().logsumexp(-1)[:, self.node_E]
        return log_BE.new_zeros(B, self.n_answers).index_add_(1, self.answer_E, log_BE)
