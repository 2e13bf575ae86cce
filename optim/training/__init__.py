"""Training optimizers: subclasses of ``torch.optim.Optimizer`` and what steers them."""

__all__: list[str] = []
