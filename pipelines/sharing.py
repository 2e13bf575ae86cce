"""Pipelines made of the components of a pipeline in memory, neither copied nor converted."""

from typing import Any

from diffusers import DiffusionPipeline

__all__ = ["SharedComponentsMixin"]

_AS_THEY_ARE = object()  # for a dtype: leave every component's


class SharedComponentsMixin:
    """Makes `from_pipe` leave the components' dtypes alone, where Diffusers' own makes them float32."""

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """A pipeline of this class with the components of a pipeline in memory: shared, neither copied nor converted.

        The way back is the stock class's ``from_pipe``, which converts the components to ``dtype`` where they
        are, float32 if none is given: pass ``dtype=pipe.dtype``.

        Args:
            pipeline: of the same family.
            kwargs: components that replace the pipeline's, ``dtype``; as in Diffusers.

        Raises:
            ValueError: if the pipeline lacks a component.
        """
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = _AS_THEY_ARE
        return super().from_pipe(pipeline, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As in Diffusers."""
        return self if kwargs.get("dtype") is _AS_THEY_ARE else super().to(*args, **kwargs)
