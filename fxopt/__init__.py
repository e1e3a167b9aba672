"""Git for model graphs: verified, timed and reversible transformations of torch.fx graph modules."""

__version__ = "0.1.0"
