"""The packed row: one micro-batch, as the collator makes it and the model takes it.

It holds whole documents one after another in one sequence of T positions, padded only at the end. Documents
never attend to each other, and each has the LongRoPE factors of its own length.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch


@dataclass(frozen=True)
class PackedRow:
    """One row, with all tensors on one device.

    input_ids: int64 [T], negative at image positions, which are in the order of the image vectors. Padding at
        the end is a document of its own, so that cu_seqlens ends at T.
    labels: int64 [T], -100 outside assistant replies, not shifted. The last position of a document predicts
        nothing: the first label of a document is always -100.
    position_ids: int64 [T], starting at 0 in each document.
    cu_seqlens: int32 [documents + 1]; document d has the positions cu_seqlens[d] .. cu_seqlens[d + 1] - 1.
    tiles: uint8 [tiles, 3, S, S], the tiles of all images, image after image, row-major within an image.
    grids: int64 [images, 2], rows and columns of tiles of each image; the sum of rows * columns is `tiles`.
    image_positions: int64 [image tokens], where input_ids is negative, ascending.
    vision_calls: calls of the vision tower for this row, at least 1; the same number on all ranks of a
        micro-step, because the collectives of ZeRO-3 would not match otherwise.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    tiles: torch.Tensor
    grids: torch.Tensor
    image_positions: torch.Tensor
    vision_calls: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedRow:
        """The same row on `device`."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=non_blocking) if isinstance(value, torch.Tensor) else value
            for f in fields(self)
            for value in [getattr(self, f.name)]
        }
        return PackedRow(**moved)

    def padded(self, multiple: int) -> PackedRow:
        """The same row with T padded to a multiple of `multiple`; the padding is a document of its own."""
        added = -len(self.input_ids) % multiple
        if not added:
            return self
        end = self.cu_seqlens[-1:] + added
        return replace(
            self,
            input_ids=torch.cat([self.input_ids, self.input_ids.new_zeros(added)]),
            labels=torch.cat([self.labels, self.labels.new_full((added,), -100)]),
            position_ids=torch.cat([self.position_ids, torch.arange(added, device=self.position_ids.device)]),
            cu_seqlens=torch.cat([self.cu_seqlens, end]),
        )

    def targets(self) -> torch.Tensor:
        """What each position must predict, int64 [T]: the next label, and -100 at the end of a document."""
        targets = torch.cat([self.labels[1:], self.labels.new_full((1,), -100)])
        targets[(self.cu_seqlens[1:] - 1).clamp(min=0).long()] = -100
        return targets

    @property
    def num_targets(self) -> int:
        """The number of positions with a label."""
        return int((self.labels != -100).sum())
