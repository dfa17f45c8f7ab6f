"""How tiny-chat is made: words, conversations, tokenizer, training, evaluation."""
