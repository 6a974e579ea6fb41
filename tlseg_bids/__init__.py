"""tlseg: a BIDS App that labels the structures of the brain in any T1w or T2w scan."""

__version__ = "0.1.0"
