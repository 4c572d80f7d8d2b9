"""Trains the checkpoint of qvl_model/assets/digits: a small Qwen3-VL that answers questions about handwriting.

    python examples/digits/train.py                      # first run; README.md has the ones after it, and wall times
    python examples/digits/train.py --out DIR --steps 3  # a smoke test

Three stages. The vision encoder learns alone, first on small pictures of one digit, then on scenes: linear heads name
the digit, the colour and the places under every visual token and draw the ink of every patch. Then the whole model
learns, on scenes with several questions each, asked as the turns of one conversation; the loss is the cross-entropy of
the answers' tokens, and the heads' loss, whose weight fades. The heads are thrown away. Without the first two stages
the encoder sits for a long time on a plateau where it knows every colour and no digit, at three times the cost a step.

All randomness comes from --seed: step n draws from the generator (seed, n), whatever the number of workers.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scenes import COLOURS, KINDS, SIDE, WORDINGS, Question, Scene, ask, draw_scene, load_scans, split_scans
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from qvl_model import Qwen3VL, Qwen3VLConfig
from qvl_model.layers import GeluMLP, LayerNorm, SwiGLU
from qvl_model.preprocess import ImagePreprocessor, PatchConfig
from qvl_model.processor import Processor
from qvl_model.tokenizer import Tokenizer
from qvl_model.weights import save_pretrained

ASSETS = Path(__file__).resolve().parents[2] / "qvl_model" / "assets" / "digits"
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# Single digits, words with the space before them, runs of other signs, and runs of white space.
WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
PATCH, MERGE = 12, 2
SMALL = (2 * PATCH * MERGE, 2 * PATCH * MERGE)
# What photographs of common shapes become when they are resized to SIDE * SIDE pixels.
SIZES = ((SIDE, SIDE), (72, 96), (96, 72), (72, 120), (120, 72))
NOTHING = (10, len(COLOURS), 4, 4)  # what the heads call the background
IGNORED = -100
TEXT_BLOCK = 16  # sequences are padded to a multiple, so that there are few shapes to compile for


def build_processor() -> Processor:
    """A byte-level BPE over the task's words, so that any text can be asked, and patches of 12 x 12 pixels."""
    words = [
        wording.format(c=c, v=v, n=n, s=s)
        for kind in KINDS
        for wording in WORDINGS[kind]
        for c in ("colour", "color")
        for v in "0123456789"
        for n in COLOURS
        for s in ("left", "right")
    ]
    words += ["user\n", "assistant\n", "system\n", "yes", "no", "1 2 3 4", *COLOURS] * 500
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(words, trainer)
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"}
    areas = [height * width for height, width in SIZES]
    images = ImagePreprocessor(
        PatchConfig(patch_size=PATCH, merge_size=MERGE, min_pixels=min(areas), max_pixels=max(areas))
    )
    return Processor(Tokenizer(backend, config), images)


def build_config(processor: Processor) -> Qwen3VLConfig:
    """`Qwen3VLConfig.digits()` with this tokenizer's size and ids."""
    tokenizer = processor.tokenizer
    return replace(
        Qwen3VLConfig.digits(len(tokenizer)),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id,
        vision_end_token_id=tokenizer.vision_end_token_id,
    )


@torch.no_grad()
def initialise(model: Qwen3VL) -> None:
    """Matrices keep the variance of what they multiply (std 1 / sqrt(fan-in)).

    The customary 0.02 is that of a width of 2500; here it leaves every block's contribution too small to learn from.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "pos_embed" not in name:
            parameter.normal_(std=1 / math.sqrt(parameter[0].numel()))


class Scenes(Dataset):
    """Batch n: pixels, what the heads should see, and from the third stage on token ids and labels.

    `pool` are the indices of the scans to draw from, `stages` the steps at which the second and third stage begin.
    """

    def __init__(
        self, processor: Processor, pool: np.ndarray, options: argparse.Namespace, stages: tuple[int, int]
    ) -> None:
        self.processor, self.pool, self.options, self.stages = processor, pool, options, stages
        self.scans = load_scans()
        # The shipped preprocessor would enlarge small pictures; scenes it leaves as they are.
        smallest = SMALL[0] * SMALL[1]
        self.images = ImagePreprocessor(replace(processor.image_preprocessor.config, min_pixels=smallest))

    def __len__(self) -> int:
        return self.options.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.options.seed, step])
        if step < self.stages[0]:
            # Four small pictures are as many patches as one scene.
            scenes = [draw_scene(rng, self.scans, self.pool, 1, SMALL) for _ in range(4 * self.options.batch)]
            return self._seen(scenes)
        size = SIZES[0] if rng.random() < 0.6 else SIZES[rng.integers(1, len(SIZES))]
        most = 4 if size[1] >= SIDE else 3
        scenes = [draw_scene(rng, self.scans, self.pool, 1 + i % most, size) for i in range(self.options.batch)]
        seen = self._seen(scenes)
        return seen if step < self.stages[1] else seen | self._asked(scenes, rng)

    def _seen(self, scenes: list[Scene]) -> dict[str, Tensor]:
        pixels, grids = self.images([scene.image for scene in scenes])
        seen, ink = (np.concatenate(parts) for parts in zip(*(targets(scene) for scene in scenes)))
        return {
            "pixel_values": pixels,
            "image_grid_thw": grids,
            "seen": torch.from_numpy(seen),
            "ink": torch.from_numpy(ink),
        }

    def _asked(self, scenes: list[Scene], rng: np.random.Generator) -> dict[str, Tensor]:
        height, width = scenes[0].image.shape[:2]
        tokens = height * width // (PATCH * MERGE) ** 2
        rows = [
            self._conversation(choose_questions(rng, scene, self.options.turns, self.options.favour), tokens)
            for scene in scenes
        ]
        longest = max(len(ids) for ids, _ in rows)
        shape = (len(rows), -(-longest // TEXT_BLOCK) * TEXT_BLOCK)
        ids, labels = torch.full(shape, self.processor.pad_token_id), torch.full(shape, IGNORED)
        for row, (known, answers) in enumerate(rows):
            ids[row, : len(known)] = torch.tensor(known)
            labels[row, : len(answers)] = torch.tensor(answers)
        return {"input_ids": ids, "labels": labels, "attention_mask": (ids != self.processor.pad_token_id).long()}

    def _conversation(self, questions: list[Question], tokens: int) -> tuple[list[int], list[int]]:
        """Token ids, and the same with everything but the answers ignored."""
        encode = self.processor.tokenizer.encode
        ids: list[int] = []
        labels: list[int] = []
        for number, question in enumerate(questions):
            image = "<|vision_start|>" + "<|image_pad|>" * tokens + "<|vision_end|>" if number == 0 else ""
            asked = encode(f"<|im_start|>user\n{image}{question.text}<|im_end|>\n<|im_start|>assistant\n")
            answered = encode(f"{question.answer}<|im_end|>")
            newline = encode("\n")
            ids += asked + answered + newline
            labels += [IGNORED] * len(asked) + answered + [IGNORED] * len(newline)
        return ids, labels


def choose_questions(
    rng: np.random.Generator, scene: Scene, turns: int, favoured: Sequence[str] = ()
) -> list[Question]:
    """Different kinds in random order; each mention in `favoured` makes a kind likelier to be early.

    One that gives the others away ("read") comes last but for one time in three.
    """
    weights = np.array([1.0 + 3.0 * favoured.count(kind) for kind in KINDS])
    kinds = [str(kind) for kind in rng.choice(KINDS, len(KINDS), replace=False, p=weights / weights.sum())]
    if "read" in kinds[:turns] and rng.random() < 2 / 3:
        kinds = [kind for kind in kinds[:turns] if kind != "read"] + ["read"]
    questions = [ask(rng, scene, kind) for kind in kinds]
    return [question for question in questions if question is not None][:turns]


def targets(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """What the heads should see.

    (tokens, 4): the value, the colour, the place from the left and the place by height of the digit at every token's
    centre; 10, 8, 4 and 4 where there is none. And the ink of every patch, (patches, PATCH * PATCH). Both in the order
    of the pixel values.
    """
    height, width = scene.ink.shape
    cell = PATCH * MERGE
    rows, columns = np.meshgrid(
        (np.arange(height // cell) + 0.5) * cell, (np.arange(width // cell) + 0.5) * cell, indexing="ij"
    )
    seen = np.empty((*rows.shape, 4), np.int64)
    seen[:] = NOTHING
    tallest = sorted(scene.digits, key=lambda digit: -digit.height)
    for place, digit in enumerate(scene.digits):
        covered = (abs(rows - digit.y) < digit.height / 2) & (abs(columns - digit.x) < 0.45 * digit.height)
        seen[covered] = (digit.value, list(COLOURS).index(digit.colour), place, tallest.index(digit))
    ink = scene.ink.reshape(height // cell, MERGE, PATCH, width // cell, MERGE, PATCH)
    return seen.reshape(-1, 4), ink.transpose(0, 3, 1, 4, 2, 5).reshape(-1, PATCH * PATCH)


class Heads(nn.Module):
    """What teaches the encoder to see: it names digit, colour and places at every token, and draws every patch's ink.

    Digits and colours are named in the words of the text model: a feature is compared with the token embeddings of
    "7" and "red". So what the encoder says about a token is in the language in which it is asked and answered.
    """

    def __init__(self, model: Qwen3VL, tokenizer: Tokenizer) -> None:
        super().__init__()
        channels = model.config.text.hidden_size
        names = [[str(value) for value in range(10)], list(COLOURS), [f" {colour}" for colour in COLOURS]]
        self.words = [torch.tensor([tokenizer.encode(name)[0] for name in group]) for group in names]
        self.nothing = nn.Parameter(torch.randn(3, 1, channels) / math.sqrt(channels))
        self.left, self.tall = nn.Linear(channels, 5), nn.Linear(channels, 5)
        self.ink = nn.Linear(model.config.vision.hidden_size, PATCH * PATCH)

    def forward(self, features: Tensor, embeddings: Tensor, patches: Tensor, batch: dict[str, Tensor]) -> Tensor:
        features = F.rms_norm(features, features.shape[-1:])
        value, colour, left, tall = batch["seen"].unbind(1)
        loss = 5 * F.binary_cross_entropy_with_logits(self.ink(patches), batch["ink"])
        for words, nothing, wanted in zip(self.words, self.nothing, (value, colour, colour)):
            loss = loss + F.cross_entropy(features @ torch.cat((embeddings[words], nothing)).T, wanted)
        return loss + F.cross_entropy(self.left(features), left) + F.cross_entropy(self.tall(features), tall)


class Trainer:
    """The model with the heads, the optimizer, and the stages' losses and learning rates."""

    def __init__(self, options: argparse.Namespace, processor: Processor) -> None:
        self.options = options
        self.stages = int(options.small * options.steps), int((options.small + options.looking) * options.steps)
        if options.resume:
            self.model = Qwen3VL.from_pretrained(options.resume, weights="fp32").requires_grad_().train()
        else:
            self.model = Qwen3VL(build_config(processor)).train()
            initialise(self.model)
        self.heads = Heads(self.model, processor.tokenizer)
        self.patches = torch.empty(0)
        self.model.model.visual.blocks[1].register_forward_hook(self._keep_patches)
        if options.compile:
            for module in self.model.modules():
                if isinstance(module, (GeluMLP, SwiGLU, LayerNorm)):
                    module.compile()
        self.parameters = [*self.model.parameters(), *self.heads.parameters()]
        matrices, vectors = ([p for p in self.parameters if (p.ndim > 1) == many] for many in (True, False))
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.relative_rate)

    def _keep_patches(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.patches = output

    def relative_rate(self, step: int) -> float:
        """Warm-up and a constant rate for the encoder alone, then warm-up again to 3/4 of it and a cosine to 1 %."""
        asking = step - self.stages[1]
        if asking < 0:
            return min(1.0, (step + 1) / 60)
        return min(1.0, (asking + 1) / 100) * (0.38 + 0.37 * math.cos(math.pi * self.share_asked(step)))

    def share_asked(self, step: int) -> float:
        """How much of the third stage is over."""
        return (step - self.stages[1]) / max(1, self.options.steps - self.stages[1])

    def losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The heads' loss, and the cross-entropy of the answers' tokens (zero while the encoder learns alone)."""
        if "labels" not in batch:
            features, _ = self.model.model.visual(batch["pixel_values"], batch["image_grid_thw"])
            return self.seeing(features, batch), torch.zeros(())
        logits, wanted, features = self.answers(batch)
        return self.seeing(features, batch), F.cross_entropy(logits, wanted)

    def seeing(self, features: Tensor, batch: dict[str, Tensor]) -> Tensor:
        embeddings = self.model.model.language_model.embed_tokens.weight
        return self.heads(features, embeddings, self.patches, batch)

    def answers(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and ids of all the answers' tokens, row after row, and the visual tokens' features."""
        names = ("pixel_values", "image_grid_thw", "input_ids", "attention_mask")
        inputs = self.model.embed_inputs(**{name: batch[name] for name in names})
        features = inputs.embeds[batch["input_ids"] == self.model.config.image_token_id]
        labels = batch["labels"][:, 1:]
        chosen = labels != IGNORED
        hidden = self.model.hidden_states(inputs)[:, :-1]
        return self.model.lm_head(hidden[chosen]), labels[chosen], features

    def step(self, number: int, batch: dict[str, Tensor]) -> tuple[float, float]:
        seeing, answers = self.losses(batch)
        loss = answers + seeing * min(1.0, max(0.2, 1 - 2 * self.share_asked(number)))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        return seeing.item(), answers.item()

    @torch.no_grad()
    def exact(self, batch: dict[str, Tensor]) -> float:
        """Share of rows whose every answer token is the likeliest, which is what greedy generation would write."""
        logits, wanted, _ = self.answers(batch)
        row = (batch["labels"][:, 1:] != IGNORED).nonzero()[:, 0]
        wrong = torch.zeros(len(batch["labels"])).index_add(0, row, (logits.argmax(-1) != wanted).float())
        return float((wrong == 0).float().mean())


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    processor = build_processor()
    trainer = Trainer(options, processor)
    seen, unseen = split_scans(load_scans().labels)
    loader = DataLoader(
        Scenes(processor, seen, options, trainer.stages),
        batch_size=None,
        num_workers=options.workers,
        prefetch_factor=8 if options.workers else None,
    )
    # Watched, not chosen by: the last step's weights are saved whatever it says.
    watched = argparse.Namespace(**{**vars(options), "turns": 1, "favour": [], "batch": 256, "seed": 1})
    test = Scenes(processor, unseen, watched, (0, 0))[0]
    start = time.time()
    for number, batch in enumerate(tqdm(loader, total=options.steps, mininterval=10)):
        seeing, answers = trainer.step(number, batch)
        if number % 100 == 99 or number == options.steps - 1:
            exact = f", {trainer.exact(test):.1%} right on test scans" if number >= trainer.stages[1] else ""
            tqdm.write(
                f"step {number + 1}: seeing {seeing:.3f}, answers {answers:.3f}{exact}, {time.time() - start:.0f} s"
            )
    save(trainer.model, processor, Path(options.out))


def save(model: Qwen3VL, processor: Processor, folder: Path) -> None:
    """The released format, weights in bfloat16: what is on disk is what is evaluated."""
    processor.save_pretrained(folder)
    save_pretrained(model.eval().to(torch.bfloat16), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ASSETS), help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--small", type=float, default=0.15, help="share of the steps on small pictures of one digit")
    parser.add_argument("--looking", type=float, default=0.5, help="share of the steps on scenes without questions")
    parser.add_argument("--batch", type=int, default=48, help="scenes a step")
    parser.add_argument("--turns", type=int, default=3, help="questions about each scene")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--favour",
        nargs="*",
        default=[],
        choices=KINDS,
        help="kinds to ask more often, three times more each time named",
    )
    parser.add_argument("--resume", metavar="FOLDER", help="start from these weights; the heads start anew")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=shutil.which("g++") is not None)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
