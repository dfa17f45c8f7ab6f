"""The front door: command line, the stack on one machine, its servers. Stays light, for every process imports it."""

__version__ = "0.1.0"
