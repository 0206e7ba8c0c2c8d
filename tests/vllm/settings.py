"""Settings of a vLLM engine with very small limits, for tests."""

from vllm import TokensPrompt

TIGHT = {
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 64,  # prompts are processed in parts
    "block_size": 32,
    "num_gpu_blocks_override": 64,  # room for a few whole outputs, so that others are preempted
    "disable_log_stats": False,
}


def generate(llm, prompts, params):
    outputs = llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], params, use_tqdm=False)
    return [output.outputs[0] for output in outputs]
