"""Examples that ship with Headrace: questions to run, and the small model that answers them."""
