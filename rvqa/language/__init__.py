"""The language model: its directory, vocabulary, prompts and grammar."""
