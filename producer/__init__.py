"""The way in: client, validation, bulk files. Loads no torch."""
