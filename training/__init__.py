"""Training of the cell tokenizer and of the language model; installed as `rvqa.training`."""
