"""Batches on their way to the device, one ahead of the step that uses them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from smkd.data.loader import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches with their crops on the device.

    On CUDA the next batch is copied, on a stream of its own and from pinned memory, while the device works on the
    last one; elsewhere a batch is copied when it is asked for.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copying = torch.cuda.Stream(device)
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copying):
            following = batch.to(device), copying.record_event()
        if ahead is not None:
            yield _arrived(*ahead, device)
        ahead = following
    if ahead is not None:
        yield _arrived(*ahead, device)


def _arrived(batch: Batch, copied: torch.cuda.Event, device: torch.device) -> Batch:
    """The batch, once the stream that computes has been told to wait for its copy."""
    computing = torch.cuda.current_stream(device)
    computing.wait_event(copied)
    for crops in (batch.global_crops, batch.local_crops):
        crops.record_stream(computing)
    return batch
