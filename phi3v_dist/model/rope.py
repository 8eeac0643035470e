"""LongRoPE ("su"): cos and sin of positions, with short or long factors (LongRoPE, arXiv:2402.13753).

Two rules choose the factors. Published model: one choice per forward, long if any position of the batch,
padding counted, is at or past `original_max_position_embeddings`. Packed row: one choice per document, by its
own length.

Frequencies are computed in float32 from the config at the first forward. They are not buffers, so that
nothing that converts a model (`.to`, zero.Init, the meta device) changes them: in bf16 the angles would be
wrong by radians.
"""

from __future__ import annotations

import math

import torch

from phi3v_dist.model.configuration import Phi3VConfig


class LongRope:
    """cos and sin for the decoder's rotary embedding. Keeps the frequencies of each device."""

    def __init__(self, config: Phi3VConfig) -> None:
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.theta = float(config.rope_theta)
        self.original_max = config.original_max_position_embeddings
        scaling = config.rope_scaling
        self._factors = (scaling["short_factor"], scaling["long_factor"]) if scaling else None
        stretch = config.max_position_embeddings / self.original_max
        # Multiplies cos and sin, with short factors too. Published: sqrt(1 + ln(131072 / 4096) / ln(4096)).
        scaled = self._factors is not None and stretch > 1
        self.scale = math.sqrt(1 + math.log(stretch) / math.log(self.original_max)) if scaled else 1.0
        self._inv_freq: dict[torch.device, torch.Tensor] = {}

    def inv_freq(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """float32 [2, head_dim / 2]: short and long frequencies, radians per position."""
        device = torch.device(device)
        if device not in self._inv_freq:
            with torch.inference_mode(False):  # training may use what inference has computed
                self._inv_freq[device] = self._frequencies().to(device)
        return self._inv_freq[device]

    def _frequencies(self) -> torch.Tensor:
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device="cpu").to(torch.float32)
        bases = self.theta ** (exponents / self.head_dim)
        factors = self._factors or ([1.0] * len(bases),) * 2
        made = [1.0 / (torch.tensor(f, dtype=torch.float32, device="cpu") * bases) for f in factors]
        return torch.stack(made)

    def batch(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [B, T, head_dim] by the rule of the published model. position_ids: int64 [B, T]."""
        is_long = position_ids.max() + 1 > self.original_max
        return self._rotation(position_ids, self.inv_freq(position_ids.device)[is_long.long()], dtype)

    def packed(
        self,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        dtype: torch.dtype,
        *,
        part: slice = slice(None),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [1, positions of part, head_dim], each document with the factors of its own length.

        position_ids: int64 [T]. cu_seqlens: int [documents + 1]. part: the positions to compute.
        """
        lengths = cu_seqlens.diff()
        is_long = torch.repeat_interleave(lengths > self.original_max, lengths, output_size=len(position_ids))
        frequencies = self.inv_freq(position_ids.device)[is_long[part].long()]
        cos, sin = self._rotation(position_ids[part], frequencies, dtype)
        return cos[None], sin[None]

    def _rotation(
        self, positions: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[..., None].to(torch.float32) * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)
