"""Tiles -> CLIP -> projection -> HD layout: the vectors that replace the embeddings of image tokens.

In: views (tiles and one global view per image), as uint8 tiles that are normalised here, or as published
pixel values. Out: [image tokens, hidden_size], image after image.

Only real tiles go through the tower. The caller sets the number of calls of the tower, because under ZeRO-3
all ranks must make the same number. The projection is part of a call, so that gradient checkpointing stores
no intermediate results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionModel

from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.processor.pixels import global_views, normalise

if TYPE_CHECKING:
    from phi3v_dist.parallel.sequence import SequenceGroup

SUB, GLB = -1, -2  # in image_order: separators, after a line of tokens and before a global view


class ClipTower(CLIPVisionModel):
    """CLIP as Phi-3-V uses it: the patch features of the second last layer, without the class token.

    The last encoder layer and post_layernorm are in every checkpoint, but nothing uses their output. These 18
    tensors are frozen (weight decay would change them otherwise) and skipped in forward.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.freeze_dead()

    def freeze_dead(self) -> None:
        """Sets requires_grad to False for the 18 unused tensors."""
        for module in (self.encoder.layers[-1], self.post_layernorm):
            module.requires_grad_(False)

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> torch.Tensor:
        """Normalised views [views, 3, S, S] -> features [views, (S / 14)^2, width]."""
        hidden = self.pre_layrnorm(self.embeddings(pixel_values))
        for layer in self.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        return hidden[:, 1:]


class ImageProcessor(nn.Module):
    """Holds the tower under the name that the published checkpoint gives it."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        clip = config.clip_config()
        clip._attn_implementation = "eager" if config._attn_implementation == "eager" else "sdpa"
        self.vision_model = ClipTower(clip)


class VisionEmbedding(nn.Module):
    """The tower, the two separators and the projection."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        clip = config.clip_config()
        width = 4 * clip.hidden_size
        self.tile = clip.image_size
        self.side = clip.image_size // clip.patch_size  # patches along a side of a tile
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., torch.Tensor]  # set when it is enabled
        self.img_processor = ImageProcessor(config)
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, width))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.img_projection = nn.Sequential(
            nn.Linear(width, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )

    def forward(
        self,
        tiles: torch.Tensor,
        globals_: torch.Tensor | None,
        grids: torch.Tensor,
        *,
        calls: int,
        sequence: SequenceGroup | None = None,
        cuts: Sequence[int] = (),
    ) -> torch.Tensor:
        """The image vectors [image tokens, hidden_size] of all images, in `calls` calls of the tower.

        tiles: [tiles, 3, S, S], uint8 and raw, or floating point and normalised. globals_: normalised global
        views [images, 3, S, S], or None to compute them from uint8 tiles. grids: int64 [images, 2], rows and
        columns of tiles. sequence, cuts: the ranks that share these images; each rank encodes its part of the
        views and gets the vectors cuts[rank] .. cuts[rank + 1] - 1. A rank without views encodes a blank one.
        A rank without vectors returns an empty tensor, through which backward runs nevertheless.
        """
        shapes = [(int(rows), int(cols)) for rows, cols in grids.tolist()]
        num_tiles, views = len(tiles), len(tiles) + len(shapes)
        starts, rank = ([0, views], 0) if sequence is None else (sequence.share(views), sequence.rank)
        first, stop = starts[rank], starts[rank + 1]
        images = slice(max(first - num_tiles, 0), max(stop - num_tiles, 0))
        globals_ = _some_global_views(tiles, shapes, images) if globals_ is None else globals_[images]
        tokens = self._encode(tiles[first : min(stop, num_tiles)], globals_, calls)
        area = (self.side // 2) ** 2
        made, blank = tokens[: (stop - first) * area], tokens[(stop - first) * area :]
        separators = self.img_projection(torch.stack((self.sub_GN.flatten(), self.glb_GN.flatten())))
        if len(blank):  # blank views only keep the number of calls equal: part of the graph, no effect
            separators = separators + 0.0 * blank.sum()
        order = image_order(shapes, self.side // 2)
        if sequence is None:
            place = torch.empty(len(made), dtype=torch.int64)
            real = (order >= 0).nonzero()[:, 0]
            place[order[real]] = real
            vectors = made.new_zeros(len(order), made.shape[1])
            vectors = vectors.index_put((place.to(made.device),), made)
        else:
            wanted = [order[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
            order = wanted[rank]
            vectors = sequence.send_tokens(made, wanted, [start * area for start in starts])
        for code, vector in ((SUB, separators[0]), (GLB, separators[1])):
            where = (order == code).nonzero()[:, 0].to(made.device)
            vectors = vectors.index_put((where,), vector.expand(len(where), -1))
        return vectors

    def _encode(self, tiles: torch.Tensor, globals_: torch.Tensor, calls: int) -> torch.Tensor:
        """Projected tokens [views * (side / 2)^2, hidden_size]: those of tiles, of global views, then of
        blank views, of which there are as many as `calls` needs.
        """
        num_tiles, num_views = len(tiles), len(tiles) + len(globals_)
        total = max(num_views, calls)
        bounds = [total * call // calls for call in range(calls + 1)]
        saving = self.gradient_checkpointing and self.training and calls > 1
        tower_learns = any(parameter.requires_grad for parameter in self.img_processor.parameters())
        chunks = []
        for start, stop in zip(bounds, bounds[1:], strict=False):
            raw = tiles[start : min(stop, num_tiles)]
            whole = globals_[max(start - num_tiles, 0) : max(min(stop, num_views) - num_tiles, 0)]
            blanks = stop - max(start, num_views) if stop > num_views else 0
            if not saving:
                chunk = self._encode_chunk(raw, whole, blanks)
            elif tower_learns:
                chunk = self._gradient_checkpointing_func(self._encode_chunk, raw, whole, blanks)
            else:  # a frozen tower: backward ends at the projection and need not compute the tower again
                features = self._features(raw, whole, blanks)
                chunk = self._gradient_checkpointing_func(self._project, features)
            chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    def _encode_chunk(self, tiles: torch.Tensor, globals_: torch.Tensor, blanks: int) -> torch.Tensor:
        return self._project(self._features(tiles, globals_, blanks))

    def _features(self, tiles: torch.Tensor, globals_: torch.Tensor, blanks: int) -> torch.Tensor:
        """The tower's features [views, side^2, width] of tiles, global views and `blanks` blank views."""
        dtype = self.glb_GN.dtype
        parts = []
        if len(tiles):
            parts.append((normalise(tiles) if tiles.dtype == torch.uint8 else tiles).to(dtype))
        if len(globals_):
            parts.append(globals_.to(dtype))
        if blanks:
            parts.append(torch.zeros(blanks, 3, self.tile, self.tile, dtype=dtype, device=tiles.device))
        found: torch.Tensor = self.img_processor.vision_model(
            torch.cat(parts) if len(parts) > 1 else parts[0]
        )
        return found

    def _project(self, features: torch.Tensor) -> torch.Tensor:
        """[views, side^2, width] -> [views * (side / 2)^2, hidden_size]."""
        projected: torch.Tensor = self.img_projection(self._merge(features).flatten(0, 2))
        return projected

    def _merge(self, features: torch.Tensor) -> torch.Tensor:
        """[views, side^2, width] -> [views, side / 2, side / 2, 4 width]: 2 x 2 patches become a token."""
        half = self.side // 2
        blocks = features.view(len(features), half, 2, half, 2, features.shape[-1])
        return blocks.transpose(2, 3).reshape(len(features), half, half, 4 * features.shape[-1])


def image_order(shapes: Sequence[tuple[int, int]], half: int) -> torch.Tensor:
    """For each image token, image after image, the token of a view that belongs there.

    shapes: rows and columns of tiles of each image. half: tokens along a side of a view. Out: int64 [image
    tokens] on the CPU, view * half^2 + token, where views are numbered tiles first, then global views; SUB or
    GLB for a separator.
    """
    area = half * half
    num_tiles = sum(rows * cols for rows, cols in shapes)
    grid = torch.arange(area).view(half, half)
    pieces = [torch.empty(0, dtype=torch.int64)]
    start = 0
    for place, (rows, cols) in enumerate(shapes):
        tiles = torch.arange(start, start + rows * cols).view(rows, 1, cols, 1) * area
        image = (tiles + grid.view(1, half, 1, half)).reshape(rows * half, cols * half)
        whole = (num_tiles + place) * area + grid
        pieces += [_with_separators(image), torch.tensor([GLB]), _with_separators(whole)]
        start += rows * cols
    return torch.cat(pieces)


def _with_separators(image: torch.Tensor) -> torch.Tensor:
    """[lines, tokens] -> [lines * (tokens + 1)], with a separator after each line."""
    return F.pad(image, (0, 1), value=SUB).flatten()


def _some_global_views(tiles: torch.Tensor, shapes: Sequence[tuple[int, int]], images: slice) -> torch.Tensor:
    """The global views [images, 3, S, S] of `images`, from the tiles of all images."""
    chosen = shapes[images]
    if not chosen:
        return tiles.new_zeros(0, *tiles.shape[1:]).float()
    before = sum(rows * cols for rows, cols in shapes[: images.start])
    count = sum(rows * cols for rows, cols in chosen)
    return global_views(tiles[before : before + count], torch.tensor(chosen))
