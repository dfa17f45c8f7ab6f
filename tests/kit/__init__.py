"""What tests share: waiting by condition, homes that clean up after themselves, databases of their own."""
