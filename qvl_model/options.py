"""The options that several commands of `qvl` share."""

from __future__ import annotations

from typing import Annotated

import typer

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PATH_OR_ID",
        help="Folder of a checkpoint, or a hub id such as Qwen/Qwen3-VL-2B-Instruct. Default: the small model that "
        "ships, which answers questions about handwritten digits.",
    ),
]
WeightsOption = Annotated[
    str,
    typer.Option(
        help="Number format of the weights: fp32, bf16, int8, int4, or auto (the checkpoint's own, smaller where that "
        "would not fit; fp32 for the small model that ships)."
    ),
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        help="medium rounds what prompts and pictures multiply, to 12 bits or to the width of the weights, where this "
        "CPU then multiplies faster, and with int4 weights what every token does; highest does not."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
AttentionOption = Annotated[
    list[str] | None,
    typer.Option(
        "--attention",
        metavar="NAME",
        help="Attention of the text layers: fused, linear, sparse:sliding_window=1024,sinks=64, ... Once for "
        "all layers, or repeated for each. Default: what the checkpoint was trained with.",
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory that the model may take, such as 3GB: weights, cache and chunks are chosen to fit. Default: what "
        "is free.",
    ),
]
CacheOption = Annotated[
    str | None, typer.Option(help="Format of keys and values: fp32, bf16, fp16, int8. Default: the checkpoint's.")
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: what torch finds.")]
TokensOption = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
TemperatureOption = Annotated[
    float,
    typer.Option(min=0.0, help="0 always takes the most probable token; above 0 draws, the more freely the higher."),
]
TopKOption = Annotated[int | None, typer.Option(min=0, help="Draw from the K most probable tokens.")]
TopPOption = Annotated[
    float | None, typer.Option(help="Draw from the fewest tokens that have this probability in sum.")
]
MinPOption = Annotated[
    float | None, typer.Option(help="Draw from tokens this probable, relative to the most probable.")
]
PenaltyOption = Annotated[float, typer.Option(help="Above 1: less repetition.")]
SeedOption = Annotated[int | None, typer.Option(help="Makes drawing repeatable.")]
ImagesOption = Annotated[list[str] | None, typer.Option("--image", "-i", metavar="FILE", help="An image; repeatable.")]
VideosOption = Annotated[list[str] | None, typer.Option("--video", metavar="FILE", help="A video; repeatable.")]
