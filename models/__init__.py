"""The language models: what can be served, how it is asked, how it runs."""
