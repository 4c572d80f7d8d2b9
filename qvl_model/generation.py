"""Text from a model: prefill in chunks, then one token per row and step, until every row has ended.

Letters: B rows (prompts), L tokens of the longest prompt, N new tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .planning import CACHES
from .sampling import Sampler, SamplingOptions
from .stopping import StopWatch, UntilStop

if TYPE_CHECKING:
    from .cache import KVCache
    from .inputs import Inputs
    from .model import Qwen3VL
    from .processor import Batch, Processor

Stop = str | int | Sequence[str | int]
_LONG_WORK = 3.0  # seconds after which a progress bar appears


class Streamer(Protocol):
    """Receives tokens as they are made; the text streamers of transformers fit too (they take one row)."""

    def put(self, value: Tensor) -> None:
        """First the prompt (B, L), then the (B,) tokens of every step, pad tokens where a row has ended."""

    def end(self) -> None:
        """Nothing follows."""


@dataclass(frozen=True)
class GenerationOptions:
    """When to stop, and how to choose.

    Attributes:
        max_new_tokens: at most so many; fewer where the model's positions end.
        sampling: how a token is chosen.
        stop_ids: a row ends behind any of these tokens.
        stop_strings: a row ends behind the token that completes one of these.
        pad_id: what stands behind the end of a row.
        prefill_chunk: a prompt is computed so many tokens at a time, which bounds the memory of its activations.
        progress: show a bar on a terminal.
        cache: format of keys and values: "fp32", "bf16", "fp16", "int8"; None is the model's choice.
    """

    max_new_tokens: int = 512
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    pad_id: int = 0
    prefill_chunk: int = 1024
    progress: bool = False
    cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"generate: {name} must be at least 1, got {getattr(self, name)}")
        if self.cache is not None and self.cache not in CACHES:
            raise ValueError(f"generate: cache must be one of {', '.join(CACHES)}, got {self.cache!r}")
        if "" in self.stop_strings:
            raise ValueError("generate: a stop string must not be empty")


def processor_of(model: Qwen3VL) -> Processor:
    """The processor of the checkpoint that `model` was loaded from, read on first use.

    Raises:
        ValueError: the model was not loaded from a checkpoint; set `model.processor` then.
    """
    found: Any = getattr(model, "processor", None)
    if found is None:
        source: Any = getattr(model, "processor_source", None)
        if source is None:
            raise ValueError("this model has no tokenizer: load it with from_pretrained, or set model.processor")
        from .processor import Processor

        found = Processor.from_pretrained(source)
        model.processor = found
    return found


def _optional_processor(model: Qwen3VL) -> Processor | None:
    """None for random weights, and for a folder of weights without a tokenizer: ids in, ids out works all the same."""
    source: Any = getattr(model, "processor_source", None)
    if getattr(model, "processor", None) is None and (source is None or not Path(source, "tokenizer.json").is_file()):
        return None
    return processor_of(model)


def _decoder(model: Qwen3VL) -> Callable[[list[int]], str]:
    tokenizer = processor_of(model).tokenizer
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


@dataclass(frozen=True)
class _Prompt:
    """Prepared inputs, each row's own token ids, and the number of new tokens that the positions leave room for."""

    inputs: Inputs
    rows: list[Tensor]
    room: int


def _prepare(model: Qwen3VL, input_ids: Tensor, media: dict[str, Any]) -> _Prompt:
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"generate: the prompt is empty; input_ids must be (B, L), got {tuple(input_ids.shape)}")
    media = {name: None if x is None else x.to(model.device) for name, x in media.items()}
    input_ids = input_ids.to(model.device)
    mask = media.get("attention_mask")
    if mask is not None and mask.shape != input_ids.shape:
        raise ValueError(f"generate: attention_mask must have shape {tuple(input_ids.shape)}, got {tuple(mask.shape)}")
    rows = list(input_ids) if mask is None else [ids[keep.bool()] for ids, keep in zip(input_ids, mask)]
    longest, limit = max(len(row) for row in rows), model.config.text.max_position_embeddings
    if longest > limit:
        raise ValueError(f"generate: the prompt has {longest} tokens, the model has {limit} positions")
    # Of the last new token no key is ever needed, hence one more than there are free positions.
    return _Prompt(model.embed_inputs(input_ids, **media), rows, limit - longest + 1)


def _prefill(model: Qwen3VL, inputs: Inputs, cache: KVCache, options: GenerationOptions) -> Tensor:
    """Logits (B, V) of each row's last token; the cache holds the prompts afterwards."""
    from tqdm import tqdm

    from .prefill import prefill

    hidden_bar = None if options.progress else True  # None: where stderr is no terminal
    tokens = int(inputs.lengths.sum())
    with tqdm(total=tokens, unit="token", desc="prompt", leave=False, delay=_LONG_WORK, disable=hidden_bar) as bar:
        return model.lm_head(prefill(model, inputs, cache, options.prefill_chunk, bar.update))


def stream_tokens(
    model: Qwen3VL, input_ids: Tensor, options: GenerationOptions, **media: Tensor | None
) -> Iterator[Tensor]:
    """Yields (B,) token ids per step, `options.pad_id` where a row has ended; stops when all have.

    `media` are the other arguments of `Qwen3VL.embed_inputs`. Each row gets the tokens that it gets alone. Closing the
    iterator stops the work.

    Raises:
        ValueError: the prompt is empty, longer than the model's positions, or does not match its media.
    """
    with torch.no_grad():
        prompt = _prepare(model, input_ids, media)
    decode = _decoder(model) if options.stop_strings else None
    watch = StopWatch(options.stop_ids, options.stop_strings, len(prompt.rows), decode)
    sampler = Sampler(options.sampling, prompt.rows, model.config.text.vocab_size, model.device)
    return _steps(model, prompt, options, sampler, watch)


# Not inference_mode: its tensors cannot be used in training afterwards, and what a policy said often is.
@torch.no_grad()
def _steps(
    model: Qwen3VL, prompt: _Prompt, options: GenerationOptions, sampler: Sampler, watch: StopWatch
) -> Iterator[Tensor]:
    from .decoding import Decoder

    batch, tokens = prompt.inputs.embeds.shape[:2]
    steps = min(options.max_new_tokens, prompt.room)
    cache = model.new_cache(batch, tokens + steps - 1, CACHES[options.cache] if options.cache else None)
    logits = _prefill(model, prompt.inputs, cache, options)
    decode = Decoder(model, cache)
    rows = list(range(batch))  # of the prompt, those that the cache still holds
    alive = set(rows)
    for step in range(steps):
        chosen = sampler(logits)
        said = torch.full((batch,), options.pad_id, device=chosen.device)
        for place, (row, token) in enumerate(zip(rows, chosen.tolist())):
            if row in alive:
                said[row] = chosen[place]
                if watch.ended(row, token):
                    alive.remove(row)
        yield said
        if not alive or step == steps - 1:
            return
        # Dropping a row copies the cache of all others, so it is done when half of them can go.
        if 2 * len(alive) <= len(rows):
            kept = [place for place, row in enumerate(rows) if row in alive]
            rows = [rows[place] for place in kept]
            cache.select(kept)
            sampler.select(kept)
            chosen = chosen[kept]
            decode = Decoder(model, cache)
        logits = decode(chosen)


def make_options(
    model: Qwen3VL,
    *,
    max_new_tokens: int = 512,
    stop: Stop | None = None,
    ignore_eos: bool = False,
    prefill_chunk: int | None = None,
    progress: bool = True,
    cache: str | None = None,
    **sampling: Any,
) -> GenerationOptions:
    """The options of `generate`, with the end and pad tokens of the checkpoint that `model` came from."""
    processor = _optional_processor(model)
    entries = () if stop is None else (stop,) if isinstance(stop, (str, int)) else tuple(stop)
    ids = {entry for entry in entries if isinstance(entry, int)}
    if processor is not None and not ignore_eos:
        ids |= set(processor.eos_token_ids)
    return GenerationOptions(
        max_new_tokens,
        SamplingOptions(**sampling),
        frozenset(ids),
        tuple(entry for entry in entries if isinstance(entry, str)),
        0 if processor is None else processor.pad_token_id,
        model.prefill_chunk if prefill_chunk is None else prefill_chunk,
        progress,
        cache,
    )


# More than six parameters: they are those of a processor's output and the usual names of generation.
def generate(
    model: Qwen3VL,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    pixel_values: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    pixel_values_videos: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    max_new_tokens: int = 512,
    streamer: Streamer | None = None,
    **options: Any,
) -> Tensor:
    """Prompts (B, L), padded on either side, to (B, L + N) token ids.

    A row is prompt, new tokens, the stop token if one ended it, then pad tokens. It gets the tokens that it gets alone.
    Ctrl-C ends the work: what there is so far is returned, with a warning.

    Args:
        input_ids, attention_mask, pixel_values, ...: what a processor makes; see `Qwen3VL.embed_inputs`.
        max_new_tokens: at most so many; fewer where the model's positions end.
        streamer: is given the prompt and the (B,) tokens of every step.
        stop: strings or token ids (one, or several) that end a row, besides the checkpoint's end tokens.
        ignore_eos: go on behind the checkpoint's end tokens.
        prefill_chunk: prompt tokens computed at a time (1024, or less where memory is short); a smaller number takes
            less memory.
        cache: format of keys and values: "fp32", "bf16", "fp16", "int8" (1 byte each, for "fused" attention); by
            default the checkpoint's, int8 where memory is short.
        progress: show a bar where the work is long and stderr a terminal (True).
        do_sample, temperature, top_k, top_p, min_p, repetition_penalty, seed: of `SamplingOptions`.

    Raises:
        ValueError: an empty prompt, one longer than the positions, placeholders that do not match the media, or an
            option out of its range; the message has the numbers.
    """
    from tqdm import tqdm

    chosen = make_options(model, max_new_tokens=max_new_tokens, **options)
    tokens = stream_tokens(
        model,
        input_ids,
        chosen,
        attention_mask=attention_mask,
        pixel_values=pixel_values,
        image_grid_thw=image_grid_thw,
        pixel_values_videos=pixel_values_videos,
        video_grid_thw=video_grid_thw,
    )
    said: list[Tensor] = []
    if streamer is not None:
        streamer.put(input_ids)
    hidden = None if chosen.progress and streamer is None else True
    try:
        for step in tqdm(tokens, total=max_new_tokens, unit="token", leave=False, delay=_LONG_WORK, disable=hidden):
            said.append(step)
            if streamer is not None:
                streamer.put(step)
    except KeyboardInterrupt:
        warnings.warn(f"generate: interrupted after {len(said)} of {max_new_tokens} tokens", stacklevel=2)
    finally:
        if streamer is not None:
            streamer.end()
    return torch.cat([input_ids.to(model.device), *(step[:, None] for step in said)], dim=1)


def stream_text(model: Qwen3VL, batch: Batch, **generation: Any) -> Iterator[str]:
    """The answer to one prompt in pieces, as they are made, without special tokens and without the stop string.

    Errors are raised by this call, not by the first piece.
    """
    options = make_options(model, **generation)
    tokens = stream_tokens(model, options=options, **batch)
    return _pieces(processor_of(model), tokens, options)


def _pieces(processor: Processor, tokens: Iterator[Tensor], options: GenerationOptions) -> Iterator[str]:
    decoder, until_stop = processor.stream_decoder(), UntilStop(options.stop_strings)
    for token in tokens:
        if piece := until_stop.put(decoder.put(int(token[0]))):
            yield piece
    if piece := until_stop.put(decoder.end()) + until_stop.end():
        yield piece


def user_message(text: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> dict[str, Any]:
    """A user's message that shows images and videos first and then says `text`."""
    media = [{"type": "image", "image": image} for image in images]
    media += [{"type": "video", "video": video} for video in videos]
    return {"role": "user", "content": [*media, {"type": "text", "text": text}]}


def chat(
    model: Qwen3VL,
    messages: str | Sequence[Any],
    images: Sequence[Any] | None = None,
    videos: Sequence[Any] | None = None,
    *,
    stream: bool = False,
    **generation: Any,
) -> str | Iterator[str]:
    """The answer to a conversation: text, or with `stream=True` an iterator of pieces of text.

    Args:
        messages: `{"role": ..., "content": ...}` as for `Processor.encode_chat`, or a question as plain text, about all
            of `images` and `videos`.
        images, videos: for the parts that do not carry their own: paths, PIL images, arrays.
        generation: options of `generate`.

    >>> model.chat("Which digits are these?", images=["scene.png"])  # doctest: +SKIP
    '4 and 2'
    """
    if isinstance(messages, str):
        conversation: Sequence[Any] = [user_message(messages, images or (), videos or ())]
        images = videos = None
    else:
        conversation = messages
    batch = processor_of(model).encode_chat(conversation, images, videos)
    pieces = stream_text(model, batch, **generation)
    if stream:
        return pieces
    text = ""
    try:
        for piece in pieces:
            text += piece
    except KeyboardInterrupt:
        warnings.warn("chat: interrupted, the answer is not complete", stacklevel=2)
    return text


def answer_all(model: Qwen3VL, conversations: Sequence[Sequence[Any]], **generation: Any) -> list[str]:
    """The answers to several conversations, computed as one batch. Ctrl-C is the caller's: there is no half answer."""
    processor = processor_of(model)
    options = make_options(model, **generation)
    batch = processor.encode_chat(conversations)
    steps = torch.stack(list(stream_tokens(model, options=options, **batch)), dim=1)
    answers = []
    for row in steps.tolist():
        until_stop = UntilStop(options.stop_strings)
        end = next((place for place, token in enumerate(row) if token in options.stop_ids), len(row))
        answers.append(until_stop.put(processor.decode(row[:end])) + until_stop.end())
    return answers
