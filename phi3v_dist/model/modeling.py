"""Phi-3-Vision as a transformers model: one set of weights, two calling conventions.

Published convention: `input_ids` [B, T] with negative ids at the positions of image vectors, `pixel_values`,
`image_sizes` and `attention_mask`, as the published processor makes them. It follows the rules of the
published code exactly: one choice between short and long RoPE factors per forward, padding counted.

Packed row: `row=PackedRow`. Every document is computed as if it were the only one, and forward returns the
sum of the negative log likelihoods of all targets.

The decoder layers and CLIP are those of transformers; RoPE, attention and the layout of image vectors are in
this package. Tensor names are those of the published checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3RMSNorm

from phi3v_dist.model.attention import NAME, Layout, block_mask, causal_mask, make_layout, padded_layout
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.rope import LongRope
from phi3v_dist.model.row import PackedRow
from phi3v_dist.model.vision import VisionEmbedding
from phi3v_dist.processor.geometry import image_token_count, vision_calls_needed
from shards.common.errors import BadInputError

if TYPE_CHECKING:
    from phi3v_dist.parallel.sequence import SequenceGroup

IGNORE = -100
PUBLISHED_VOCAB = 32064
# The published code keeps a second reference to the embedding; some trainers save it under this name.
EMBEDDING_ALIAS = "model.vision_embed_tokens.wte.weight"


class LossHead(nn.Linear):
    """lm_head: logits, or the loss of targets without all logits in memory at once.

    The loss is computed in this module's forward, because that is where ZeRO-3 has gathered the weight.
    """

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [..., H] -> logits [..., V]; with targets int64 [N], hidden [N, H]: sum of NLL, float32."""
        if targets is None:
            return F.linear(hidden, self.weight)
        # reduction="sum" would add up in the dtype of `hidden`: 10.31 instead of 10.54 in bf16 (torch 2.13).
        # Without acc_dtype the exponentials of a token are summed in it too: losses below 0.005 became 0.
        if hidden.dtype in (torch.bfloat16, torch.float16):
            options = nn.LinearCrossEntropyOptions(acc_dtype=torch.float32)
        else:
            options = nn.LinearCrossEntropyOptions(acc_policy="accurate")
        nll = F.linear_cross_entropy(hidden, self.weight, targets, reduction="none", options=options)
        return nll.float().sum()


class Phi3VModel(nn.Module):
    """Embedding, vision, decoder layers and final norm: the tensors under `model.` of the checkpoint."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.vision_embed_tokens = VisionEmbedding(config)
        self.layers = nn.ModuleList([Phi3DecoderLayer(config, n) for n in range(config.num_hidden_layers)])
        self.norm = Phi3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rope = LongRope(config)

    def embed(
        self, input_ids: torch.Tensor, positions: torch.Tensor, vectors: torch.Tensor | None
    ) -> torch.Tensor:
        """Embeddings [N, H] of input_ids [N], with `vectors` [image tokens, H] at `positions` (int64).

        Negative ids are looked up as id 0; `vectors` replace what that gives.
        """
        embeddings = self.embed_tokens(input_ids.clamp(min=0))
        if vectors is None:
            return embeddings
        return embeddings.index_put((positions,), vectors.to(embeddings.dtype))

    def decode(
        self, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], **attention: Any
    ) -> torch.Tensor:
        """Decoder layers and final norm: [B, T, H] -> [B, T, H]. attention: arguments of the attention
        function.
        """
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=rotation, **attention)
        return self.norm(hidden)


class Phi3VForCausalLM(PreTrainedModel, GenerationMixin):
    """The model with its lm_head.

    vision_chunk: the most views in one call of the vision tower. sequence: the ranks that share every packed
    row with this one, which then computes its slice of the row; None for whole rows.
    """

    config_class = Phi3VConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Phi3DecoderLayer", "CLIPEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        self.model = Phi3VModel(config)
        self.lm_head = LossHead(config.hidden_size, config.vocab_size, bias=False)
        self.vision_chunk = 64
        self.sequence: SequenceGroup | None = None
        self.post_init()
        _stop_at_turns(self)

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Loads a checkpoint as transformers does, but strictly, and makes generation stop at <|end|>.

        Raises BadInputError naming a tensor that is missing or unexpected, where transformers would continue
        with random weights, or a damaged weight file.
        """
        try:
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise BadInputError(
                f"{name}: a truncated or damaged weight file ({error}); download it again"
            ) from error
        for key, what in (("missing_keys", "is missing"), ("unexpected_keys", "is unexpected")):
            names = set(info[key]) - {EMBEDDING_ALIAS}
            if names:
                raise BadInputError(f"{name}: tensor {min(names)} {what}; not a complete Phi-3-V checkpoint")
        model.model.vision_embed_tokens.img_processor.vision_model.freeze_dead()  # undone by loading
        _stop_at_turns(model)
        return (model, info) if output_loading_info else model

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        """This package's attention, whatever kernel is asked for (it chooses its own), except for "eager"."""
        return "eager" if attn_implementation == "eager" else NAME

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VisionEmbedding):
            init.zeros_(module.glb_GN)
            init.zeros_(module.sub_GN)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        if not isinstance(new_embeddings, LossHead):  # transformers makes an nn.Linear to grow the vocabulary
            head = LossHead(
                new_embeddings.in_features, new_embeddings.out_features, bias=False, device="meta"
            )
            head.weight = new_embeddings.weight
            new_embeddings = head
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        row: PackedRow | None = None,
        return_logits: bool = False,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | torch.Tensor | tuple:
        """Published convention, or a packed row. No argument is modified.

        input_ids: int64 [B, T], negative at image positions, row-major in the order of the images.
        attention_mask: [B, T with cache], 1 = real. pixel_values: [images, views, 3, S, S] normalised, global
        view first. image_sizes: int64 [images, 2], px (height, width) of the padded canvas. labels: int64
        [B, T], negative ones ignored; the loss is the mean over the others. Returns CausalLMOutputWithPast
        with float32 logits.

        row: a packed row, which holds all tensors; leave out the others. Returns the float32 sum of the
        negative log likelihoods of its targets, or float32 logits [T, V] with `return_logits`; with
        `self.sequence` those of this rank's slice, so that the sum over the ranks is that of the row.

        Raises ValueError for arguments that are not supported or contradict each other, BadInputError if
        input_ids and images do not belong together.
        """
        for name in ("output_attentions", "output_hidden_states"):
            if others.get(name):
                raise ValueError(f"{name} is not supported; put a forward hook on model.model.layers")
        if row is not None:
            return self._forward_row(row, return_logits)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds (or a packed row)")
        embeddings = (
            self._embed_batch(input_ids, pixel_values, image_sizes)
            if inputs_embeds is None
            else inputs_embeds
        )
        assert embeddings is not None
        length = embeddings.shape[1]
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and self.training and self.is_gradient_checkpointing:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=embeddings.device)[None]
        if past:
            self._refuse_mixed_factors(position_ids, length)
        rotation = self.model.rope.batch(position_ids, embeddings.dtype)
        hidden = self.model.decode(
            embeddings,
            rotation,
            past_key_values=past_key_values if use_cache or past else None,
            use_cache=use_cache,
            **self._batch_attention(embeddings, attention_mask, past),
        )
        kept = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        logits = self.lm_head(kept).float()
        loss = None
        if labels is not None:
            targets = labels[:, 1:].flatten()
            targets = targets.masked_fill(targets < 0, IGNORE)  # also image ids, in copies of input_ids
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORE)
        cache = past_key_values if use_cache else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def _forward_row(self, row: PackedRow, return_logits: bool) -> torch.Tensor:
        """The loss or the logits of a packed row, or of this rank's slice of it."""
        sequence = self.sequence
        part = slice(0, len(row.input_ids))
        if sequence is not None:
            row = row.padded(sequence.size)
            part = sequence.part(len(row.input_ids))
        embeddings = self._embed_row(row, part)[None]
        rotation = self.model.rope.packed(row.position_ids, row.cu_seqlens, embeddings.dtype, part=part)
        attention: dict[str, Any] = {"layout": make_layout(row.cu_seqlens), "sequence": sequence}
        if self.config._attn_implementation == "eager":
            if sequence is not None:
                raise ValueError(
                    "eager attention cannot share a row among ranks; leave attn_implementation unset"
                )
            attention = {"attention_mask": _additive(block_mask(row.cu_seqlens), embeddings.dtype)}
        hidden = self.model.decode(embeddings, rotation, **attention)[0]
        if return_logits:
            return self.lm_head(hidden).float()
        targets = row.targets()[part]
        chosen = (targets != IGNORE).nonzero()[:, 0]
        if not len(chosen):  # ZeRO-3 gathers lm_head on all ranks, so every rank must run it
            return self.lm_head(hidden[:1], targets.new_zeros(1)) * 0.0
        return self.lm_head(hidden.index_select(0, chosen), targets.index_select(0, chosen))

    def _embed_row(self, row: PackedRow, part: slice) -> torch.Tensor:
        """Embeddings [positions of part, H] with the image vectors in place."""
        found = len(row.image_positions)
        side = self.model.vision_embed_tokens.side // 2
        expected = sum(image_token_count(rows, cols, side) for rows, cols in row.grids.tolist())
        if found != expected:
            raise BadInputError(
                f"row: {found} image positions for images of {expected} tokens; input_ids and grids disagree"
            )
        cuts = [0, found]
        first, stop = 0, found
        if self.sequence is not None:
            edges = torch.arange(self.sequence.size + 1) * (part.stop - part.start)
            cuts = torch.searchsorted(row.image_positions.cpu(), edges).tolist()
            first, stop = cuts[self.sequence.rank], cuts[self.sequence.rank + 1]
        vectors = self.model.vision_embed_tokens(
            row.tiles, None, row.grids, calls=row.vision_calls, sequence=self.sequence, cuts=cuts
        )
        positions = row.image_positions[first:stop] - part.start
        return self.model.embed(row.input_ids[part], positions, vectors)

    def _embed_batch(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        image_sizes: torch.Tensor | None,
    ) -> torch.Tensor:
        """Embeddings [B, T, H] with the image vectors in place. Raises BadInputError if they do not fit."""
        assert input_ids is not None
        flat = input_ids.flatten()
        positions = (flat < 0).nonzero()[:, 0]
        vectors = None
        if pixel_values is None and len(positions):
            raise BadInputError(
                f"input_ids has {len(positions)} image positions but there are no pixel_values; "
                "pass the processor's"
            )
        if pixel_values is not None:
            if not len(positions):
                raise BadInputError(
                    "pixel_values are given but input_ids has no image positions, so they would be ignored; "
                    "make input_ids with Phi3VProcessor, <|image_1|> in the text"
                )
            vectors = self._image_vectors(pixel_values, image_sizes)
            if len(vectors) != len(positions):
                raise BadInputError(
                    f"input_ids has {len(positions)} image positions but the images have {len(vectors)} "
                    "tokens; input_ids, pixel_values and image_sizes must come from one processor call"
                )
        return self.model.embed(flat, positions, vectors).view(*input_ids.shape, -1)

    def _image_vectors(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> torch.Tensor:
        vision = self.model.vision_embed_tokens
        if image_sizes is None:
            raise BadInputError("pixel_values need image_sizes, the (height, width) of each image's canvas")
        side = vision.tile
        if pixel_values.ndim != 5 or tuple(pixel_values.shape[2:]) != (3, side, side):
            raise BadInputError(
                f"pixel_values has shape {list(pixel_values.shape)}, expected "
                f"[images, views, 3, {side}, {side}]"
            )
        sizes = image_sizes.reshape(-1, 2)
        grids = sizes.to("cpu", torch.int64) // side
        counts = grids.prod(1).tolist()
        if len(counts) != len(pixel_values) or max(counts, default=0) >= pixel_values.shape[1]:
            raise BadInputError(
                f"image_sizes {sizes.tolist()} do not fit pixel_values of {len(pixel_values)} image(s) "
                f"with at most {pixel_values.shape[1] - 1} tile(s)"
            )
        tiles = torch.cat([views[1 : 1 + n] for views, n in zip(pixel_values, counts, strict=True)])
        calls = vision_calls_needed(len(tiles), len(counts), self.vision_chunk)
        return vision(tiles, pixel_values[:, 0], grids, calls=calls)

    def _batch_attention(
        self, embeddings: torch.Tensor, attention_mask: torch.Tensor | None, past: int
    ) -> dict[str, Any]:
        """Arguments of the attention function for a batch; past: positions in the cache."""
        batch, length = embeddings.shape[:2]
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask has {attention_mask.ndim} dimensions, expected [batch, positions]"
            )
        if self.config._attn_implementation == "eager":
            if attention_mask is None:
                attention_mask = torch.ones(batch, past + length, device=embeddings.device)
            mask = causal_mask(attention_mask[:, : past + length], length)
            return {"attention_mask": _additive(mask, embeddings.dtype)}
        if past:
            return {"attention_mask": attention_mask}
        layout: Layout
        if attention_mask is None:
            layout = make_layout(torch.arange(batch + 1, device=embeddings.device) * length)
        else:
            layout = padded_layout(attention_mask)
        return {"layout": layout}

    def _refuse_mixed_factors(self, position_ids: torch.Tensor, length: int) -> None:
        """Raises BadInputError where the new positions need other RoPE factors than the cached keys have."""
        longest, limit = int(position_ids.max()) + 1, self.config.original_max_position_embeddings
        if longest - length <= limit < longest:
            raise BadInputError(
                f"position {longest - 1} needs the long RoPE factors but the cached keys have the short ones "
                f"(up to {limit} positions); run the whole sequence without a cache, as generate() does"
            )

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Inputs of a generation step: images only when the prompt is read, which happens again with a new
        cache where the RoPE factors change, or where a further turn brings images.
        """
        images = {name: kwargs.pop(name, None) for name in ("pixel_values", "image_sizes")}
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        if past:
            stale = self._switches_factors(past, input_ids.shape[1], kwargs.get("attention_mask"))
            more_images = is_first_iteration and bool((input_ids[:, past:] < 0).any())  # of a further turn
            if stale or more_images:
                kwargs.update(past_key_values=DynamicCache(), next_sequence_length=None)
                past = 0
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not past:
            inputs.update({name: value for name, value in images.items() if value is not None})
        return inputs

    def _switches_factors(self, past: int, total: int, attention_mask: torch.Tensor | None) -> bool:
        """Whether `past` positions have the short RoPE factors and `total` need the long ones."""
        limit = self.config.original_max_position_embeddings
        if total <= limit:
            return False
        if attention_mask is None:
            return past <= limit < total
        before, after = (int(attention_mask[:, :n].sum(1).max()) for n in (past, total))
        return before <= limit < after


def _stop_at_turns(model: Phi3VForCausalLM) -> None:
    """Generation stops at <|end|> and <|endoftext|>, which end turns; published configs name only </s>, which
    the model never generates.
    """
    if model.config.vocab_size == PUBLISHED_VOCAB and model.generation_config.eos_token_id in (None, 2, [2]):
        model.generation_config.eos_token_id = [32007, 32000]


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask (True = attend) as the value that eager attention adds to scores, in `dtype`."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
