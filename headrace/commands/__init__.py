"""The commands, by theme. Their modules import what they need inside, so that `headrace --help` is quick."""
